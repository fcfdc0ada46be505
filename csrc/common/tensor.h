// Borrowed views of tensors, and the argument checks of the operators.
#pragma once

#include <initializer_list>
#include <stdexcept>
#include <string>

#include "common/dlpack.h"

namespace pynar {

using dlpack::DataType;
using dlpack::Device;

constexpr DataType kFloat16{dlpack::kFloat, 16, 1};
constexpr DataType kBFloat16{dlpack::kBfloat, 16, 1};
constexpr DataType kFloat32{dlpack::kFloat, 32, 1};
constexpr DataType kFloat64{dlpack::kFloat, 64, 1};
constexpr DataType kInt8{dlpack::kInt, 8, 1};
constexpr DataType kInt32{dlpack::kInt, 32, 1};
constexpr DataType kInt64{dlpack::kInt, 64, 1};
constexpr DataType kUInt8{dlpack::kUInt, 8, 1};
constexpr DataType kBool{dlpack::kBool, 8, 1};

// The stream on which the caller's framework queues its work; null on the CPU.
using Stream = void*;

// A view without ownership: valid while the Python object that it came from is.
class Tensor {
 public:
  Tensor() = default;
  Tensor(const dlpack::Array& array, const dlpack::ExchangeApi* api, bool read_only)
      : array_(array), api_(api), read_only_(read_only) {}

  int64_t dim() const { return array_.ndim; }
  int64_t size(int64_t d) const { return array_.shape[d]; }
  int64_t stride(int64_t d) const { return array_.strides[d]; }
  int64_t numel() const {
    int64_t n = 1;
    for (int64_t d = 0; d < dim(); ++d) n *= size(d);
    return n;
  }
  bool is_contiguous() const {
    int64_t expected = 1;
    for (int64_t d = dim() - 1; d >= 0; --d) {
      if (size(d) != 1 && stride(d) != expected) return numel() == 0;
      expected *= size(d);
    }
    return true;
  }
  DataType dtype() const { return array_.dtype; }
  Device device() const { return array_.device; }
  bool read_only() const { return read_only_; }
  template <typename T>
  T* data() const {
    return reinterpret_cast<T*>(static_cast<char*>(array_.data) + array_.byte_offset);
  }

  // The producer's current stream; the default stream for a producer that has no way to say.
  Stream stream() const {
    Stream stream = nullptr;
    if (device().type == dlpack::kCuda && api_ != nullptr &&
        api_->current_work_stream(device().type, device().index, &stream) != 0) {
      throw std::runtime_error("cannot get the current CUDA stream");
    }
    return stream;
  }

 private:
  dlpack::Array array_{};
  const dlpack::ExchangeApi* api_ = nullptr;
  bool read_only_ = false;
};

// Messages of one form, "operator: `argument` must have ..., got ...", thrown as
// std::invalid_argument, which Python sees as ValueError. pynar/ops/_checks.py says the same where
// the extension is not in use.
class Check {
 public:
  explicit Check(const char* op) : op_(op) {}

  void dims(const char* name, const Tensor& tensor, int64_t wanted, const char* symbols) const;
  void shape(const char* name, const Tensor& tensor, std::initializer_list<int64_t> wanted,
             const char* meaning) const;
  void dtype(const char* name, const Tensor& tensor, std::initializer_list<DataType> wanted) const;
  void device(const char* name, const Tensor& tensor, const char* other_name,
              const Tensor& other) const;
  void contiguous(const char* name, const Tensor& tensor) const;
  void writable(const char* name, const Tensor& tensor) const;
  [[noreturn]] void fail(const char* name, const std::string& wanted, const std::string& got) const;

 private:
  const char* op_;
};

std::string to_string(DataType dtype);
std::string to_string(Device device);

}  // namespace pynar
