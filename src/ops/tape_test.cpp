// The tape on small graphs: what runs again, how often and in which order, and what is refused.
#include "ops/tape.h"

#include <memory>
#include <vector>

#include <ATen/ATen.h>

#include <gtest/gtest.h>

#include "base/check.h"
#include "ops/tensor_memory.h"

namespace hadal::ops {
namespace {

/// Functions that ran again, in order.
struct Again final : TapeObserver {
  std::vector<int64_t> order;
  int64_t needs = 0;
  void ran(int64_t, const std::vector<int64_t>&, const std::vector<Result>&) override {}
  void annotated(int64_t) override {}
  void needed(int64_t) override { ++needs; }
  void released(int64_t) override {}
  void runs_again(int64_t function) override { order.push_back(function); }
  void ran_again(int64_t, double) override {}
};

at::Tensor leaf() {
  return at::arange(1, 7, at::kFloat).div(7).reshape({2, 3}).set_requires_grad(true);
}
at::Tensor square(const at::Tensor& x) { return x * x; }         // saves x
at::Tensor exponential(const at::Tensor& x) { return x.exp(); }  // saves its result

at::Tensor note(const char* name, at::Tensor (*f)(const at::Tensor&), const at::Tensor& x) {
  return checkpointed(recorded(name, f, x));
}

/// Gradient of `forward` at leaf(), with all annotated tensors recomputed.
template <typename Forward>
at::Tensor gradient(const Forward& forward,
                    const std::shared_ptr<Again>& again,
                    bool verify = false,
                    bool tape = true) {
  const at::Tensor x = leaf();
  at::Tensor y;
  {
    std::optional<Tape> recording;
    if (tape) recording.emplace(TapeOptions{.verify = verify, .observer = again});
    y = forward(x);
  }
  y.sum().backward();
  return x.grad();
}

template <typename Forward>
void expect_same(const Forward& forward, const std::vector<int64_t>& order) {
  const auto again = std::make_shared<Again>();
  const at::Tensor made = gradient(forward, again);
  EXPECT_TRUE(at::equal(made, gradient(forward, nullptr, false, /*tape=*/false)));
  EXPECT_EQ(again->order, order);
}

TEST(Tape, AChainRunsAgainOnceInItsOrder) {
  expect_same(
      [](const at::Tensor& x) {
        at::Tensor y = x;
        for (int i = 0; i < 5; ++i) y = note("square", square, y * 0.9);
        return y * y;
      },
      // The last product needs the last result; each multiplication by 0.9 stands between and is
      // kept by its reader, so nothing else has to be made again for it.
      {4});
  expect_same(
      [](const at::Tensor& x) {
        at::Tensor y = x;
        for (int i = 0; i < 5; ++i) y = note("square", square, y);
        return y * y;
      },
      {0, 1, 2, 3, 4});
}

TEST(Tape, WhatIsNotSavedRunsAgainOnTheWay) {
  expect_same(
      [](const at::Tensor& x) {
        const at::Tensor between = recorded(
            "plus", [](const at::Tensor& t) { return t + 1; }, x);
        const at::Tensor a = note("square", square, between);
        const at::Tensor b = note("exp", exponential, between);
        return a * a + b * b;
      },
      // `between` is saved by square(), so that it is kept; both results need it.
      {1, 2});
  expect_same(
      [](const at::Tensor& x) {
        const auto plus = [](const at::Tensor& t) { return t + 1; };
        const at::Tensor between = recorded("plus", plus, x);
        const at::Tensor a = checkpointed(recorded("plus", plus, between));
        const at::Tensor b = checkpointed(recorded("plus", plus, between));
        return a * a + b * b;
      },
      // Nobody saves it: it runs again once, for both.
      {0, 1, 2});
}

TEST(Tape, ViewsShareOneStorage) {
  expect_same(
      [](const at::Tensor& x) {
        const at::Tensor y = note("square", square, x);
        const at::Tensor flat = y.reshape({6}), turned = y.t();
        return (flat * flat).sum() + (turned * turned).sum() + (y * y).sum() +
               (y.detach() * x).sum();
      },
      {0});
}

TEST(Tape, AResultThatItsOwnFunctionSavesIsNotKept) {
  const auto forward = [](const at::Tensor& x) { return note("exp", exponential, x); };
  const auto again = std::make_shared<Again>();
  const at::Tensor x = leaf();
  Tape tape({.observer = again});
  at::Tensor y = forward(x);
  tape.close();
  const at::Tensor sum = y.sum();
  y.reset();
  sum.backward();
  EXPECT_EQ(again->order, (std::vector<int64_t>{0}));
  EXPECT_TRUE(at::equal(x.grad(), leaf().exp().detach()));
}

TEST(Tape, WhatSomebodyHoldsIsNotTakenAway) {
  const auto again = std::make_shared<Again>();
  const at::Tensor x = leaf();
  Tape tape({.observer = again});
  const at::Tensor y = note("square", square, x);
  const at::Tensor sum = (y * y).sum();
  tape.close();
  sum.backward();
  EXPECT_GT(again->needs, 0);
  EXPECT_TRUE(again->order.empty());
}

TEST(Tape, MemoryIsFreedInTheForwardPassAndAfterTheLastReader) {
  count_tensor_memory();
  constexpr int64_t kBytes = 1 << 20;
  const at::Tensor x = at::ones({kBytes / 4}).set_requires_grad(true);
  const int64_t before = tensor_bytes();
  Tape tape({});
  at::Tensor y = x;
  for (int i = 0; i < 8; ++i) y = note("square", square, y);
  const at::Tensor sum = y.sum();
  y.reset();
  tape.close();
  EXPECT_LT(tensor_bytes() - before, kBytes);
  reset_tensor_peak();
  sum.backward();
  EXPECT_LT(tensor_bytes() - before, 2 * kBytes);  // the gradient
  EXPECT_GT(tensor_peak_bytes() - before, 7 * kBytes);
}

TEST(Tape, RandomNumbersAreReplayed) {
  const auto forward = [](const at::Tensor& x) {
    const auto drop = [](const at::Tensor& t) { return t * at::rand(t.sizes()) + at::randn({1}); };
    const at::Tensor y = checkpointed(recorded("drop", drop, x));
    const at::Tensor other = at::rand(y.sizes());
    return y * y * other;
  };
  const auto again = std::make_shared<Again>();
  at::manual_seed(3);
  const at::Tensor made = gradient(forward, again);
  const at::Tensor next = at::rand({4});
  at::manual_seed(3);
  EXPECT_TRUE(at::equal(made, gradient(forward, nullptr, false, /*tape=*/false)));
  // The backward pass left the generator as it was.
  EXPECT_TRUE(at::equal(next, at::rand({4})));
  EXPECT_EQ(again->order, (std::vector<int64_t>{0}));
}

TEST(Tape, AWrongSecondRunIsFound) {
  int runs = 0;
  const auto forward = [&](const at::Tensor& x) {
    const auto wrong = [&runs](const at::Tensor& t) { return t + (runs++ == 0 ? 1 : 2); };
    const at::Tensor y = checkpointed(recorded("wrong", wrong, x));
    return y * y;
  };
  const at::Tensor right = gradient(forward, nullptr, false, /*tape=*/false);
  runs = 0;
  EXPECT_FALSE(at::equal(gradient(forward, nullptr), right));
  runs = 0;
  try {
    gradient(forward, nullptr, /*verify=*/true);
    ADD_FAILURE() << "no error";
  } catch (const std::exception& error) {
    EXPECT_NE(std::string(error.what()).find("block 0: wrong 0 has other bits"), std::string::npos)
        << error.what();
  }
  // One that gives another shape is found without looking at bits.
  runs = 0;
  const auto shape = [&](const at::Tensor& x) {
    const auto grows = [&runs](const at::Tensor& t) { return runs++ == 0 ? t + 1 : t.repeat(2); };
    const at::Tensor y = checkpointed(recorded("grows", grows, x));
    return y * y;
  };
  EXPECT_ANY_THROW(gradient(shape, nullptr));
}

TEST(Tape, InputsAndChangedTensorsAreRefused) {
  const at::Tensor x = leaf();
  Tape tape({});
  EXPECT_THROW(checkpointed(x), Error);
  EXPECT_THROW(checkpointed(x * 2), Error);
  at::Tensor y = recorded("square", square, x);
  y.add_(1);
  EXPECT_THROW(checkpointed(y), Error);
  // After the annotation: when somebody saves it.
  at::Tensor z = note(
      "exp", [](const at::Tensor& t) { return t + 1; }, x);
  z.add_(1);
  EXPECT_THROW(z * z, Error);
  // After it was saved: in the backward pass, as without a tape.
  const at::Tensor kept = x * 1;
  const at::Tensor product = kept * kept;
  kept.detach().add_(1);
  EXPECT_ANY_THROW(product.sum().backward());
  // An input that a second run would take.
  const at::Tensor base = x.detach().clone();
  at::Tensor made = note(
      "plus", [](const at::Tensor& t) { return t + 1; }, base * x);
  const at::Tensor sum = (made * made).sum();
  made.reset();
  EXPECT_THROW(Tape({}), Error) << "another one records";
}

TEST(Tape, WithoutATapeOrGradientsNothingIsRecorded) {
  EXPECT_TRUE(at::equal(checkpointed(leaf()), leaf()));
  const auto again = std::make_shared<Again>();
  const Tape tape({.observer = again});
  const at::NoGradGuard no_grad;
  EXPECT_EQ(Tape::recording(), nullptr);
  EXPECT_TRUE(at::equal(checkpointed(leaf()), leaf()));
}

}  // namespace
}  // namespace hadal::ops
