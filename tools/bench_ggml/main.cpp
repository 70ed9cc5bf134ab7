// The comparison of README.md.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <immintrin.h>
#include <random>
#include <thread>
#include <vector>

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>

#include "base/memory.h"
#include "base/parallel.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"
#include "ops/gemm/linear.h"

namespace {

using hadal::ops::GemmRole;

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}
double median(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  return v[v.size() / 2];
}

volatile uint64_t sink;

/// Bytes a second of one pass of all threads over `memory`.
double read_bandwidth(const at::Tensor& memory) {
  const int64_t chunk = int64_t{1} << 20, chunks = memory.numel() / chunk;
  const auto* data = memory.const_data_ptr<uint8_t>();
  const double begin = now();
  hadal::parallel_for(chunks, 1, [&](int64_t first, int64_t last) {
    __m512i acc[4] = {};
    for (const uint8_t* p = data + first * chunk; p < data + last * chunk; p += 256) {
      for (int i = 0; i < 4; ++i) acc[i] = _mm512_xor_si512(acc[i], _mm512_loadu_si512(p + 64 * i));
    }
    sink = _mm512_reduce_add_epi64(acc[0]) ^ _mm512_reduce_add_epi64(acc[1]) ^
           _mm512_reduce_add_epi64(acc[2]) ^ _mm512_reduce_add_epi64(acc[3]);
  });
  return static_cast<double>(chunks * chunk) / (now() - begin);
}

/// FLOP a second of vdpbf16ps on registers alone.
double peak_bf16() {
  constexpr int64_t kSteps = 500000;
  const int threads = hadal::num_threads();
  const double begin = now();
  hadal::parallel_for(threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      __m512 acc[24];
      __m512i x = _mm512_set1_epi32(static_cast<int>(task));
#pragma GCC unroll 24
      for (auto& a : acc) {
        a = _mm512_setzero_ps();
        asm volatile("" : "+v"(a));  // 24 sums, not one sum 24 times
      }
      for (int64_t i = 0; i < kSteps; ++i) {
#pragma GCC unroll 24
        for (auto& a : acc) a = _mm512_dpbf16_ps(a, (__m512bh)x, (__m512bh)x);
        asm volatile("" : "+v"(x));
      }
      float sum = 0;
#pragma GCC unroll 24
      for (auto& a : acc) sum += _mm512_reduce_add_ps(a);
      sink = static_cast<uint64_t>(sum);
    }
  });
  return 24.0 * 64 * static_cast<double>(kSteps * threads) / (now() - begin);
}

struct Shape {
  int64_t out, in;
};

/// The same random codes for both sides: hadal's checkpoint form and ggml's blocks.
struct Codes {
  at::Tensor data, scale;
  std::vector<uint8_t> mxfp4;
};
Codes make_codes(Shape s, unsigned seed) {
  Codes c{at::empty({s.out, s.in / 2}, at::kByte), at::empty({s.out, s.in / 32}, at::kByte), {}};
  std::mt19937_64 random(seed);
  auto* data = c.data.data_ptr<uint8_t>();
  auto* scale = c.scale.data_ptr<uint8_t>();
  for (int64_t i = 0; i < c.data.numel(); i += 8) {
    const uint64_t word = random();
    std::memcpy(data + i, &word, 8);
  }
  for (int64_t i = 0; i < c.scale.numel(); ++i) scale[i] = static_cast<uint8_t>(119 + random() % 4);
  c.mxfp4.resize(static_cast<size_t>(s.out * s.in / 32 * 17));
  for (int64_t b = 0; b < s.out * s.in / 32; ++b) {
    uint8_t* block = c.mxfp4.data() + b * 17;
    block[0] = scale[b];
    for (int i = 0; i < 16; ++i) {  // ggml: element i low, i + 16 high
      const auto code = [&](int k) { return data[b * 16 + k / 2] >> (k % 2 * 4) & 15; };
      block[1 + i] = static_cast<uint8_t>(code(i) | code(i + 16) << 4);
    }
  }
  return c;
}

/// ggml's side: all matrices in one buffer type.
class Ggml {
 public:
  Ggml(Shape shape, size_t count, ggml_backend_buffer_type_t type) : shape_(shape) {
    weights_context_ = ggml_init({ggml_tensor_overhead() * (count + 8), nullptr, true});
    for (size_t i = 0; i < count; ++i)
      weights_.push_back(
          ggml_new_tensor_2d(weights_context_, GGML_TYPE_MXFP4, shape.in, shape.out));
    buffer_ = ggml_backend_alloc_ctx_tensors_from_buft(weights_context_, type);
    ggml_backend_buffer_set_usage(buffer_, GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
  }
  void set(size_t i, const Codes& codes) {
    ggml_backend_tensor_set(weights_[i], codes.mxfp4.data(), 0, codes.mxfp4.size());
  }
  /// Prepares products of `count` matrices beginning at `first` with `rows` rows.
  void plan(size_t first, size_t count, const at::Tensor& x, int threads) {
    drop();
    const int64_t rows = x.size(0);
    const size_t floats = static_cast<size_t>(rows) *
                          static_cast<size_t>(shape_.in + shape_.out * static_cast<int64_t>(count));
    context_ = ggml_init({floats * 4 + ggml_tensor_overhead() * (count + 16) * 2 +
                              ggml_graph_overhead_custom(1024, false) + 65536,
                          nullptr, false});
    ggml_tensor* input = ggml_new_tensor_2d(context_, GGML_TYPE_F32, shape_.in, rows);
    std::memcpy(input->data, x.const_data_ptr<float>(), static_cast<size_t>(x.nbytes()));
    graph_ = ggml_new_graph_custom(context_, 1024, false);
    results_.clear();
    for (size_t i = 0; i < count; ++i) {
      results_.push_back(ggml_mul_mat(context_, weights_[(first + i) % weights_.size()], input));
      ggml_build_forward_expand(graph_, results_.back());
    }
    ggml_threadpool_params params = ggml_threadpool_params_default(threads);
    pool_ = ggml_threadpool_new(&params);
    plan_ = ggml_graph_plan(graph_, threads, pool_);
    work_.resize(plan_.work_size + 64);
    plan_.work_data = work_.data();
  }
  double run() {
    // Workers of the other side that have nothing to do go to sleep first.
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    const double begin = now();
    ggml_graph_compute(graph_, &plan_);
    const double seconds = now() - begin;
    ggml_threadpool_free(pool_);  // its threads would wait busily
    pool_ = nullptr;
    return seconds;
  }
  at::Tensor result(size_t i) const {
    const ggml_tensor* y = results_[i];
    return at::from_blob(y->data, {y->ne[1], y->ne[0]}, at::kFloat).clone();
  }
  void drop() {
    if (pool_ != nullptr) ggml_threadpool_free(pool_);
    if (context_ != nullptr) ggml_free(context_);
    pool_ = nullptr;
    context_ = nullptr;
  }

 private:
  Shape shape_;
  ggml_context *weights_context_ = nullptr, *context_ = nullptr;
  ggml_backend_buffer_t buffer_ = nullptr;
  std::vector<ggml_tensor*> weights_, results_;
  ggml_cgraph* graph_ = nullptr;
  ggml_threadpool* pool_ = nullptr;
  ggml_cplan plan_{};
  std::vector<uint8_t> work_;
};

ggml_backend_buffer_type_t repack_type() {
  ggml_backend_dev_t device = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
  auto get = reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(ggml_backend_reg_get_proc_address(
      ggml_backend_dev_backend_reg(device), "ggml_backend_dev_get_extra_bufts"));
  for (ggml_backend_buffer_type_t* type = get ? get(device) : nullptr; type && *type; ++type) {
    if (std::strstr(ggml_backend_buft_name(*type), "REPACK") != nullptr) return *type;
  }
  return nullptr;
}

}  // namespace

int main(int argc, char** argv) {
  const Shape shape{argc > 2 ? std::atol(argv[1]) : 4096, argc > 2 ? std::atol(argv[2]) : 4096};
  const int rounds = argc > 3 ? std::atoi(argv[3]) : 15;
  hadal::keep_freed_memory();  // as hadal does
  const c10::InferenceMode no_grad;
  ggml_log_set([](ggml_log_level, const char*, void*) {}, nullptr);
  const double matrix_bytes = static_cast<double>(shape.out * shape.in) * 17 / 32;
  const auto count = static_cast<size_t>(std::ceil(1.02 * 1073741824.0 / matrix_bytes));
  std::vector<hadal::ops::Panels> ours;
  Ggml plain(shape, count, ggml_backend_cpu_buffer_type());
  ggml_backend_buffer_type_t type = repack_type();
  std::unique_ptr<Ggml> repack;
  if (type != nullptr) repack = std::make_unique<Ggml>(shape, count, type);
  for (size_t i = 0; i < count; ++i) {
    const Codes codes = make_codes(shape, static_cast<unsigned>(i));
    ours.push_back(hadal::ops::pack_fp4({codes.data}, {codes.scale}).value());
    plain.set(i, codes);
    if (repack) repack->set(i, codes);
  }
  const at::Tensor memory = at::ones({int64_t{1} << 30}, at::kByte);
  std::printf("%zu matrices of %ld x %ld, %.2f GB of FP4 on each side; ggml repack %s\n", count,
              shape.out, shape.in, static_cast<double>(count) * matrix_bytes / 1e9,
              type ? ggml_backend_buft_name(type) : "none");
  for (const int threads : {1, 2}) {
    hadal::set_num_threads(threads);
    for (const int64_t rows : {1, 64, 256}) {
      // What a routed expert gets: rows through Q8_128.
      const at::Tensor x = hadal::ops::quantise_input(at::randn({rows, shape.in}), GemmRole::kFp4,
                                                      hadal::ops::Numerics::kReleased)
                               .to(at::kBFloat16),
                       wide = x.to(at::kFloat);
      // One row: all matrices a pass. Many: a few, each pass others.
      const size_t per_pass = rows == 1 ? count : 4;
      std::vector<double> hadal_s, plain_s, repack_s, read, peak;
      for (int round = 0; round < rounds; ++round) {
        const size_t first = static_cast<size_t>(round) * per_pass % count;
        at::Tensor y;
        const double begin = now();
        for (size_t i = 0; i < per_pass; ++i)
          y = hadal::ops::linear(x, ours[(first + i) % count], GemmRole::kFp4);
        hadal_s.push_back((now() - begin) / static_cast<double>(per_pass));
        plain.plan(first, per_pass, wide, threads);
        plain_s.push_back(plain.run() / static_cast<double>(per_pass));
        if (repack) {
          repack->plan(first, per_pass, wide, threads);
          repack_s.push_back(repack->run() / static_cast<double>(per_pass));
        }
        read.push_back(read_bandwidth(memory));
        peak.push_back(peak_bf16());
        if (round > 0) continue;
        const at::Tensor theirs = plain.result(per_pass - 1), wanted = y.to(at::kFloat);
        std::printf("  relative difference of results: %.4f",
                    ((theirs - wanted).norm() / wanted.norm()).item<double>());
        if (repack)
          std::printf(
              ", repack %.4f",
              ((repack->result(per_pass - 1) - wanted).norm() / wanted.norm()).item<double>());
        std::printf("\n");
      }
      const double ours_s = median(hadal_s), theirs_s = median(plain_s);
      const double repack_time = repack ? median(repack_s) : INFINITY;
      const double flops = 2.0 * static_cast<double>(rows * shape.out * shape.in);
      std::printf(
          "threads %d rows %3ld | hadal %7.3f ms %6.2f GB/s %6.1f GF | ggml plain %7.3f ms %6.2f "
          "GB/s"
          " %6.1f GF | repack %7.3f ms %6.2f GB/s %6.1f GF | ratio %.2f (best ggml), %.2f (plain) "
          "| read %.1f GB/s: "
          "%.0f%% | peak %.0f GF: %.0f%%\n",
          threads, rows, ours_s * 1e3, matrix_bytes / ours_s / 1e9, flops / ours_s / 1e9,
          theirs_s * 1e3, matrix_bytes / theirs_s / 1e9, flops / theirs_s / 1e9, repack_time * 1e3,
          matrix_bytes / repack_time / 1e9, flops / repack_time / 1e9,
          std::min(theirs_s, repack_time) / ours_s, theirs_s / ours_s, median(read) / 1e9,
          100 * matrix_bytes / ours_s / median(read), median(peak) / 1e9,
          100 * flops / ours_s / median(peak));
      std::fflush(stdout);
    }
  }
}
