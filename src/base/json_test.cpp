#include "base/json.h"

#include <gtest/gtest.h>

#include "base/check.h"

namespace hadal {
namespace {

template <typename Call>
std::string message_of(Call call) {
  try {
    call();
  } catch (const InputError& error) {
    return error.what();
  }
  return "no InputError";
}

TEST(Json, ErrorsCarryThePathOfTheKey) {
  const auto root = JsonObject::parse(R"({"a": {"b": [1, "x"], "c": -3}})", "f.json");
  const auto a = root.object("a");
  EXPECT_EQ(message_of([&] { a.integers("b", 0, 9); }),
            "f.json: a.b[1]: expected an integer, found string \"x\"");
  EXPECT_EQ(message_of([&] { a.integer("c", 0, 9); }),
            "f.json: a.c: expected an integer from 0 to 9, found number -3");
  EXPECT_EQ(message_of([&] { a.string("d"); }), "f.json: a.d: required key is missing");
  EXPECT_EQ(message_of([&] { root.object("a").object("c"); }),
            "f.json: a.c: expected an object, found number -3");
}

TEST(Json, IntegersMayBeWrittenAsWholeNumbersOnly) {
  const auto root = JsonObject::parse(
      R"({"a": 1e6, "b": 1.5, "c": 18446744073709551615, "d": 1e300, "e": true})", "f");
  EXPECT_EQ(root.integer("a", 0, 1 << 30), 1000000);
  for (const char* key : {"b", "c", "d", "e"})
    EXPECT_THROW(root.integer(key, INT64_MIN, INT64_MAX), InputError) << key;
}

TEST(Json, RefusesDuplicatesTrailingTextAndDepth) {
  EXPECT_EQ(message_of([] { parse_json(R"({"a": 1, "b": {"a": 2, "a": 3}})", "f"); }),
            "f: duplicate key string \"a\"");
  EXPECT_NO_THROW(parse_json(R"({"a": {"a": 1}, "b": {"a": 1}})", "f"));
  EXPECT_THROW(parse_json("{} x", "f"), InputError);
  EXPECT_THROW(parse_json("", "f"), InputError);
  EXPECT_THROW(parse_json("{\"a\": \"\xff\"}", "f"), InputError);
  EXPECT_THROW(parse_json(std::string(100000, '['), "f"), InputError);
  EXPECT_THROW(parse_json("{\"a\": 1e999}", "f"), InputError);
  EXPECT_THROW(JsonObject::parse("[]", "f"), InputError);
}

TEST(Json, ListsKeysNobodyAskedFor) {
  const auto root = JsonObject::parse(R"({"a": 1, "b": null, "c": {"d": 2}})", "f");
  root.integer("a", 0, 2);
  EXPECT_EQ(root.integer_or("b", 7, 0, 9), 7);
  EXPECT_EQ(root.unread_keys(), std::vector<std::string>{"c"});
  EXPECT_EQ(message_of([&] { root.expect_all_read(); }), "f: unknown key c");
  EXPECT_EQ(message_of([&] { root.object("c").expect_all_read(); }), "f: unknown key c.d");
}

TEST(Json, WrittenValuesReadBack) {
  JsonWriter writer;
  writer.begin_object()
      .field("i", int64_t{-9007199254740993})
      .field("d", 0.1)
      .field("e", 1e-06)
      .field("s", "quote \" and \n and \xff")
      .field("b", true)
      .field("list", std::vector<int64_t>{1, 2});
  writer.key("o").begin_array().begin_object().end_object().value(3).end_array().end_object();
  const auto root = JsonObject::parse(writer.str(), "f");
  EXPECT_EQ(root.integer("i", INT64_MIN, 0), -9007199254740993);
  EXPECT_EQ(root.number("d"), 0.1);
  EXPECT_EQ(root.number("e"), 1e-6);
  EXPECT_EQ(root.string("s"), "quote \" and \n and \xEF\xBF\xBD");
  EXPECT_TRUE(root.boolean("b"));
  EXPECT_EQ(root.integers("list", 0, 9), (std::vector<int64_t>{1, 2}));
}

}  // namespace
}  // namespace hadal
