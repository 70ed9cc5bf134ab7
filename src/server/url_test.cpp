#include "server/url.h"

#include <gtest/gtest.h>

#include "base/check.h"

namespace hadal::server {
namespace {

TEST(Url, SplitsAddresses) {
  const Url plain = Url::parse("http://127.0.0.1:8000", "--url");
  EXPECT_FALSE(plain.tls);
  EXPECT_EQ(plain.host, "127.0.0.1");
  EXPECT_EQ(plain.port, 8000);
  EXPECT_EQ(plain.path, "");
  EXPECT_EQ(plain.str(), "http://127.0.0.1:8000");

  const Url tls = Url::parse("https://example.org/api/v1/", "--url");
  EXPECT_TRUE(tls.tls);
  EXPECT_EQ(tls.port, 443);
  EXPECT_EQ(tls.path, "/api/v1");
  EXPECT_EQ(tls.str(), "https://example.org/api/v1");

  const Url six = Url::parse("http://[::1]:80/", "--url");
  EXPECT_EQ(six.host, "::1");
  EXPECT_EQ(six.port, 80);
  EXPECT_EQ(six.authority(), "[::1]");
  EXPECT_EQ(Url::parse("https://[::1]:8443", "--url").authority(), "[::1]:8443");
}

TEST(Url, RefusesEverythingElse) {
  for (const char* text :
       {"", "localhost:8000", "ftp://x", "http://", "http://:80", "http://x:", "http://x:0",
        "http://x:65536", "http://x:8o", "http://x:-1", "http://::1:80", "http://[::1",
        "http://a b", "http://[::1]x", "http://user@x", "http://x/?q", "http://x#y", "http://x/\n"})
    EXPECT_THROW(Url::parse(text, "--url"), InputError) << text;
}

}  // namespace
}  // namespace hadal::server
