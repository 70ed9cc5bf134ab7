# The C++ core of xgrammar, out of its source package that tools/install_deps.sh unpacks: a static library `xgrammar`
# without its Python binding. XGRAMMAR_ROOT names the folder that holds cpp/, include/ and 3rdparty/.
set(XGRAMMAR_ROOT "${CMAKE_SOURCE_DIR}/.deps/xgrammar-0.2.8" CACHE PATH "folder with the sources of xgrammar")
if(NOT EXISTS "${XGRAMMAR_ROOT}/include/xgrammar/xgrammar.h")
  message(FATAL_ERROR "xgrammar not found in ${XGRAMMAR_ROOT}: run tools/install_deps.sh or set XGRAMMAR_ROOT")
endif()
file(GLOB_RECURSE xgrammar_sources "${XGRAMMAR_ROOT}/cpp/*.cc")
list(FILTER xgrammar_sources EXCLUDE REGEX "/cpp/tvm_ffi/.*\\.cc$")

# Faults of 0.2.8, mended in copies of its files. The automata of patterns: the end state that stood for "nothing" could
# have edges of its own, so that a(-[0-9]+)? took "a1" and (xb+|a){2,} took "aab"; states without a way on were merged with
# one that had been merged with another, so that (b|[ab]{1,3}|(a+){0,2}|[ab]) took "bbbb". Strings of JSON: those with a length
# took bare control characters, all took half a surrogate pair (\ud800), which is no character. Classes of characters: bytes
# that are no UTF-8 counted as characters (overlong forms, encoded surrogates), so that a string could hold one. A pattern of a
# JSON string that writes a backslash as [\\] means it and holds its own escapes (src/engine_core/grammar/grammar_pattern.h): its
# automaton is that of a plain text, since that of a JSON string would drop them.
# Properties in any order: one could come twice, and one that is required not at all.
function(xgrammar_mend file)
  file(READ "${XGRAMMAR_ROOT}/cpp/${file}" text)
  set(pairs ${ARGN})
  while(pairs)
    list(POP_FRONT pairs before after)
    string(FIND "${text}" "${${before}}" place)
    if(place EQUAL -1)
      message(FATAL_ERROR "xgrammar: ${file} is not that of 0.2.8 (${before})")
    endif()
    string(REPLACE "${${before}}" "${${after}}" text "${text}")
  endwhile()
  file(CONFIGURE OUTPUT "${CMAKE_BINARY_DIR}/xgrammar/${file}" CONTENT "${text}" @ONLY)
  list(FILTER xgrammar_sources EXCLUDE REGEX "/cpp/${file}$")
  set(xgrammar_sources ${xgrammar_sources} "${CMAKE_BINARY_DIR}/xgrammar/${file}" PARENT_SCOPE)
endfunction()
set(optional_before "    fsm.AddEpsilonEdge(start_, ends_.front());\n  }")
set(optional_after "    auto start = fsm.AddState();
    auto end = fsm.AddState();
    fsm.AddEpsilonEdge(start, start_);
    fsm.AddEpsilonEdge(start, end);
    auto ends = ends_;
    ends.push_back(end);
    return FSMWithStartEnd(fsm, start, ends);
  }")
set(sink_before "      if (outgoing_count == 0) {\n")
set(sink_after "      if (outgoing_count == 0) {\n        if (union_find_set.Count(i)) continue;\n")
set(copies_before "for (int i = 2; i < state.lower_bound; i++) {")
set(copies_after "for (int i = 2; i <= state.lower_bound; i++) {")
set(rest_before "    result = FSMWithStartEnd::Concat(std::vector<FSMWithStartEnd>{result, child});
    for (int end = 0; end < result.NumStates(); ++end) {
      if (result.IsEndState(end)) {
        result.GetFsm().AddEpsilonEdge(end, end_state_of_lower_bound_fsm);
      }
    }")
set(rest_after "    result = FSMWithStartEnd::Concat(std::vector<FSMWithStartEnd>{result, child.Star()});")
set(control_before "{{'\"', '\"'}, {'\\\\', '\\\\'}, {'\\r', '\\r'}, {'\\n', '\\n'}}, true);\n      int32_t body")
set(control_after "{{0, 0x1f}, {'\"', '\"'}, {'\\\\', '\\\\'}}, true);\n      int32_t body")
set(escape_before "Choice({escaped_character, unicode_escape})")
set(escape_after "Choice({escaped_character, unicode_escape,
      Sequence({ByteString(\"u\"), builder_.AddCharacterClass({{'D', 'D'}, {'d', 'd'}}),
                builder_.AddCharacterClass({{'0', '7'}}), hexadecimal_character, hexadecimal_character})})")
set(first_before "      {ByteString(\"u\"),\n       hexadecimal_character,")
set(first_after "      {ByteString(\"u\"),\n       builder_.AddCharacterClass({{'A', 'C'}, {'E', 'F'}, {'a', 'c'}, {'e', 'f'}, {'0', '9'}}),")
set(automaton_before "  bool can_use_fsm = !force_cfg_expansion;
")
set(automaton_after "${automaton_before}  if (regex.find(\"[\\\\\\\\]\") != std::string::npos) json_string = false;
")
set(order_before "  if (any_order_) {
    return GetAnyOrder")
set(order_after "  // With bounds on their number, and where there are too many for a rule each set of them, in the schema's order.
  if (any_order_ && properties.size() <= 6 && max_properties == -1 && min_properties <= static_cast<int>(required.size())) {
    return GetAnyOrder")
set(item_before "  int32_t item_rule_id = builder_.AddRuleWithHint(rule_name + \"_item\", Choice(items));
")
set(item_after "  // A rule for what may follow each set of properties: each of them once, none that is required left out.
  const size_t num_properties = properties.size(), num_sets = size_t{1} << num_properties;
  std::vector<int32_t> parts, rests(num_sets);
  for (size_t i = 0; i < items.size(); ++i)
    parts.push_back(RuleRef(builder_.AddRuleWithHint(rule_name + \"_part\", items[i])));
  for (size_t set = 0; set < num_sets; ++set) rests[set] = builder_.AddEmptyRuleWithHint(rule_name + \"_rest\");
  std::vector<int32_t> firsts;
  for (size_t set = 0; set < num_sets; ++set) {
    std::vector<int32_t> ways;
    bool complete = true;
    for (size_t i = 0; i < parts.size(); ++i) {
      const bool is_property = i < num_properties;
      if (is_property && (set >> i & 1) != 0) continue;
      if (is_property && required.count(properties[i].name) > 0) complete = false;
      const int32_t rest = RuleRef(rests[is_property ? set | size_t{1} << i : set]);
      ways.push_back(Sequence({middle_separator, parts[i], rest}));
      if (set == 0) firsts.push_back(Sequence({first_separator, parts[i], rest, last_separator}));
    }
    if (complete) ways.push_back(Empty());
    builder_.UpdateRuleBody(rests[set], Choice(ways));
  }
  if (!firsts.empty()) return Choice(firsts);
  int32_t item_rule_id = builder_.AddRuleWithHint(rule_name + \"_item\", Choice(items));
")
xgrammar_mend(json_schema_converter.cc order_before order_after item_before item_after automaton_before automaton_after control_before control_after escape_before escape_after first_before first_after)
xgrammar_mend(fsm.cc optional_before optional_after sink_before sink_after)
set(utf8_before "  // Ensure max and min are valid unicode value.
")
set(utf8_after "  constexpr uint32_t well_formed[][2] = {{0, 0x7F}, {0xC280, 0xDFBF}, {0xE0A080, 0xED9FBF},
                                         {0xEE8080, 0xEFBFBF}, {0xF0908080, 0xF48FBFBF}};
  for (const auto& part : well_formed) {
    const uint32_t low = std::max(min, part[0]), high = std::min(max, part[1]);
    if (low <= high) AddSameLengthCharacterRange(fsm, from, to, low, high);
  }
  return;
")
xgrammar_mend(fsm_builder.cc copies_before copies_after rest_before rest_after utf8_before utf8_after)
add_library(xgrammar STATIC ${xgrammar_sources})
# cpp/ is public for support/logging.h alone: its two functions are ours (src/engine_core/grammar/grammar_log.cpp).
target_include_directories(xgrammar SYSTEM PUBLIC "${XGRAMMAR_ROOT}/include" "${XGRAMMAR_ROOT}/3rdparty/dlpack/include"
  "${XGRAMMAR_ROOT}/cpp")
target_include_directories(xgrammar SYSTEM PRIVATE "${XGRAMMAR_ROOT}/3rdparty/picojson")
target_compile_definitions(xgrammar PUBLIC XGRAMMAR_ENABLE_CPPTRACE=0 XGRAMMAR_ENABLE_INTERNAL_CHECK=0
  XGRAMMAR_LOG_CUSTOMIZE=1)
# Not ours to warn about, nor to judge by UBSan; without debug information it compiles faster.
target_compile_options(xgrammar PRIVATE -w -g0)
if(HADAL_SANITIZE)
  target_compile_options(xgrammar PRIVATE -fno-sanitize=undefined)
endif()
set_target_properties(xgrammar PROPERTIES CXX_STANDARD 17 CXX_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON)
# Several files a compilation: most of their time goes into the same headers, and they never change.
hadal_unity(xgrammar 8)
