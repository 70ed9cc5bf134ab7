#include "base/check.h"

#include <gtest/gtest.h>

namespace hadal {
namespace {

TEST(Check, MessageCarriesValuesAndLocation) {
  const int found = 3;
  try {
    HADAL_CHECK(found == 4, "rms_norm: weight has ", found, " entries, expected ", 4);
    FAIL() << "no exception";
  } catch (const InputError&) {
    FAIL() << "a contract is no input error";
  } catch (const Error& error) {
    const std::string text = error.what();
    EXPECT_NE(text.find("rms_norm: weight has 3 entries, expected 4"), std::string::npos) << text;
    EXPECT_NE(text.find("src/base/check_test.cpp:"), std::string::npos) << text;
  }
}

TEST(Check, InputErrorIsVerbatim) {
  try {
    HADAL_INPUT_CHECK(false, "config.json: n_layers is ", -1);
    FAIL() << "no exception";
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(), "config.json: n_layers is -1");
  }
}

}  // namespace
}  // namespace hadal
