#include "server/page.h"

#include <algorithm>
#include <string>
#include <string_view>

#include <gtest/gtest.h>

#include "base/file.h"

namespace hadal::server {
namespace {

size_t occurrences(std::string_view text, std::string_view what) {
  size_t count = 0;
  for (size_t at = text.find(what); at != text.npos; at = text.find(what, at + 1)) ++count;
  return count;
}

TEST(Page, IsTheFile) {
  EXPECT_TRUE(page() == read_file(HADAL_SOURCE_DIR "/src/server/page/index.html"));
}

TEST(Page, LoadsNothingAndNeverParsesHtml) {
  EXPECT_TRUE(page().starts_with("<!doctype html>"));
  EXPECT_EQ(occurrences(page(), "<script"), 1u);
  EXPECT_EQ(occurrences(page(), "<link"), 0u);
  EXPECT_EQ(occurrences(page(), "src="), 0u);
  EXPECT_EQ(occurrences(page(), "url("), 0u);
  EXPECT_EQ(occurrences(page(), "https:"), 0u);
  for (const char* sink :
       {"innerHTML =", "outerHTML", "insertAdjacentHTML", "document.write", "eval("}) {
    EXPECT_EQ(occurrences(page(), sink), 0u) << sink;
  }
  EXPECT_TRUE(std::all_of(page().begin(), page().end(), [](char c) { return c > 0; }))
      << "not ASCII";
}

// That the digest is right is checked by page_test.py: a browser runs the script under it.
TEST(Page, HashHasThePoliciesForm) {
  EXPECT_TRUE(page_script_hash().starts_with("sha256-"));
  EXPECT_EQ(page_script_hash().size(), 7u + 44u);
  EXPECT_TRUE(page_script_hash().ends_with("="));
}

}  // namespace
}  // namespace hadal::server
