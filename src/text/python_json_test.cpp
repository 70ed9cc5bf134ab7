#include "text/python_json.h"

#include <cstdlib>
#include <cstring>
#include <random>

#include <gtest/gtest.h>

#include "base/check.h"

namespace hadal::text {
namespace {

std::string round_trip(std::string_view text) { return PyJson::parse(text, "t").dump(); }

TEST(PyJson, WritesWhatPythonWrites) {
  // Pairs of json.dumps(json.loads(a), ensure_ascii=False).
  const std::pair<const char*, const char*> pairs[] = {
      {"1.50", "1.5"},
      {"1.0", "1.0"},
      {"1e5", "100000.0"},
      {"1E+15", "1000000000000000.0"},
      {"1e16", "1e+16"},
      {"123456789012345680.0", "1.2345678901234568e+17"},
      {"0.0001", "0.0001"},
      {"0.00001", "1e-05"},
      {"1.5e-7", "1.5e-07"},
      {"1e-300", "1e-300"},
      {"5e-324", "5e-324"},
      {"2.2250738585072014e-308", "2.2250738585072014e-308"},
      {"1e22", "1e+22"},
      {"1e400", "Infinity"},
      {"-1e400", "-Infinity"},
      {"1e-400", "0.0"},
      {"-0.0", "-0.0"},
      {"-0", "0"},
      {"0.1", "0.1"},
      {"100.25", "100.25"},
      {"1e99999999999999999999", "Infinity"},
      {"0e99999999999999999999", "0.0"},
      {"123456789012345678901234567890", "123456789012345678901234567890"},
      {"-9223372036854775809", "-9223372036854775809"},
      {"NaN", "NaN"},
      {"-Infinity", "-Infinity"},
      {" [ 1 ,2,\t[ ] ,{ }\n] ", "[1, 2, [], {}]"},
      {R"({"b":1,"a":true,"c":null,"b":2})", R"({"b": 2, "a": true, "c": null})"},
      {R"("\u00e9\ud83d\ude00\/\u0001\u007f\b\f\n\r\t\"\\")",
       "\"\u00e9\U0001F600/\\u0001\x7f\\b\\f\\n\\r\\t\\\"\\\\\""},
      {R"("\ud800x\udc00\ud800\u0041")", "\"\uFFFDx\uFFFD\uFFFDA\""},
  };
  for (const auto& [in, out] : pairs) EXPECT_EQ(round_trip(in), out) << in;
}

TEST(PyJson, FloatsReadBackAsTheSameValue) {
  std::mt19937_64 random(17);
  for (int i = 0; i < 20000; ++i) {
    const uint64_t bits = random();
    double value = 0;
    std::memcpy(&value, &bits, sizeof(value));
    const std::string text = PyJson::real(value).dump();
    ASSERT_EQ(round_trip(text), text);
    if (value == value) {
      ASSERT_EQ(std::strtod(text.c_str(), nullptr), value) << text;
    }
  }
}

TEST(PyJson, ManyKeysKeepOrderAndLastValue) {
  std::string in = "{";
  std::string out = "{";
  for (int i = 0; i < 300; ++i) in += concat(i == 0 ? "" : ",", "\"k", i % 150, "\":", i);
  for (int i = 0; i < 150; ++i) out += concat(i == 0 ? "" : ", ", "\"k", i, "\": ", i + 150);
  EXPECT_EQ(round_trip(in + "}"), out + "}");
}

TEST(PyJson, RefusesWhatPythonRefuses) {
  for (const char* text : {"",           " ",
                           "01",         "1.",
                           ".5",         "+1",
                           "-",          "1e",
                           "tru",        "nan",
                           "[1,]",       "[1",
                           "{\"a\"}",    "{a:1}",
                           "{\"a\":1,}", "\"a",
                           "\"\\x\"",    "\"\\u12g4\"",
                           "\"\\u12",    "\"\n\"",
                           "1 2",        "\xEF\xBB\2771",
                           "\"\xFF\"",   "'a'",
                           "[1 2]",      "\"\\"}) {
    EXPECT_THROW(PyJson::parse(text, "t"), InputError) << text;
  }
  EXPECT_THROW(PyJson::parse(std::string(100000, '['), "t"), InputError);
  EXPECT_EQ(round_trip(std::string(500, '[') + std::string(500, ']')).size(), 1000u);
}

TEST(PyJson, TruthIsPythons) {
  for (const char* text : {"null", "false", "0", "-0", "0.0", "\"\"", "[]", "{}"}) {
    EXPECT_FALSE(PyJson::parse(text, "t").truthy()) << text;
  }
  for (const char* text : {"true", "1", "-1", "0.5", "NaN", "\" \"", "[0]", "{\"a\":0}"}) {
    EXPECT_TRUE(PyJson::parse(text, "t").truthy()) << text;
  }
}

TEST(PyJson, SetReplacesInPlace) {
  PyJson object = PyJson::parse(R"({"a":1,"b":2})", "t");
  object.set("a", PyJson::string("x"));
  object.set("c", PyJson::integer(-3));
  object.erase("b");
  EXPECT_EQ(object.dump(), R"({"a": "x", "c": -3})");
  EXPECT_EQ(object.find("b"), nullptr);
}

}  // namespace
}  // namespace hadal::text
