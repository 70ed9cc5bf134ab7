// Memory of a card, for tests of kernels.
#pragma once

#include <vector>

#include <cuda_runtime.h>

#include <gtest/gtest.h>

namespace hadal::testing {

inline void check_cuda(cudaError_t error) {
  ASSERT_EQ(error, cudaSuccess) << cudaGetErrorString(error);
}

template <typename T>
class OnDevice {
 public:
  explicit OnDevice(size_t count) : count_(count) {
    check_cuda(cudaMalloc(&data_, count * sizeof(T)));
    check_cuda(cudaMemset(data_, 0xff, count * sizeof(T)));
  }
  explicit OnDevice(const std::vector<T>& values) : OnDevice(values.size()) {
    check_cuda(cudaMemcpy(data_, values.data(), count_ * sizeof(T), cudaMemcpyHostToDevice));
  }
  ~OnDevice() { cudaFree(data_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  T* get() const { return data_; }
  std::vector<T> read() const {
    std::vector<T> values(count_);
    check_cuda(cudaDeviceSynchronize());
    check_cuda(cudaMemcpy(values.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost));
    return values;
  }

 private:
  T* data_ = nullptr;
  size_t count_;
};

}  // namespace hadal::testing
