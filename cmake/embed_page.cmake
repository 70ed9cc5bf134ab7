# cmake -DINPUT=index.html -DOUTPUT=page.cpp -P embed_page.cmake
# Writes the functions of src/server/page.h: the bytes of the page, and the SHA-256 of its one inline script as a content
# security policy names it.
cmake_minimum_required(VERSION 3.25)
file(READ "${INPUT}" hex HEX)
file(READ "${INPUT}" page)
string(FIND "${page}" "\r" carriage_return)
if(NOT carriage_return EQUAL -1)
  message(FATAL_ERROR "${INPUT}: a carriage return; a browser hashes the script without it")
endif()

# --- the script's digest in base64 -------------------------------------------------------------------
string(FIND "${page}" "<script>" begin)
string(FIND "${page}" "</script>" end)
string(FIND "${page}" "<script" last REVERSE)
if(begin EQUAL -1 OR end LESS begin OR NOT last EQUAL begin)
  message(FATAL_ERROR "${INPUT}: exactly one <script> is expected")
endif()
math(EXPR begin "${begin} + 8")
math(EXPR length "${end} - ${begin}")
string(SUBSTRING "${page}" ${begin} ${length} script)
string(SHA256 digest "${script}")
set(alphabet "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")
set(base64 "")
# 32 bytes are ten groups of three and one of two: padded with a zero byte, whose digit becomes "=".
foreach(group RANGE 10)
  math(EXPR at "${group} * 6")
  string(SUBSTRING "${digest}00" ${at} 6 bytes)
  foreach(shift 18 12 6 0)
    math(EXPR digit "(0x${bytes} >> ${shift}) & 63")
    string(SUBSTRING "${alphabet}" ${digit} 1 letter)
    string(APPEND base64 "${letter}")
  endforeach()
endforeach()
string(REGEX REPLACE "A$" "=" base64 "${base64}")

# --- the bytes ---------------------------------------------------------------------------------------
string(REGEX REPLACE "(................................)" "\\1\n" bytes "${hex}")
string(REGEX REPLACE "([0-9a-f][0-9a-f])" "0x\\1," bytes "${bytes}")
file(WRITE "${OUTPUT}" "// Written by cmake/embed_page.cmake out of src/server/page/index.html.
#include \"server/page.h\"

namespace hadal::server {
namespace {
constexpr unsigned char kPage[] = {
${bytes}};
}  // namespace

std::string_view page() { return {reinterpret_cast<const char*>(kPage), sizeof(kPage)}; }

std::string_view page_script_hash() { return \"sha256-${base64}\"; }

}  // namespace hadal::server
")
