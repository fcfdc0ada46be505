#include "common/tensor.h"

namespace pynar {
namespace {

template <typename Sizes>
std::string list(const Sizes& sizes) {
  std::string text = "[";
  for (int64_t size : sizes) {
    if (text.size() > 1) text += ", ";
    text += std::to_string(size);
  }
  return text + "]";
}

struct Shape {
  const Tensor& tensor;
  struct Iterator {
    const Tensor& tensor;
    int64_t d;
    int64_t operator*() const { return tensor.size(d); }
    void operator++() { ++d; }
    bool operator!=(const Iterator& other) const { return d != other.d; }
  };
  Iterator begin() const { return {tensor, 0}; }
  Iterator end() const { return {tensor, tensor.dim()}; }
};

}  // namespace

std::string to_string(DataType dtype) {
  if (dtype == kBFloat16) return "bfloat16";
  if (dtype == kBool) return "bool";
  const std::string bits = std::to_string(dtype.bits);
  switch (dtype.code) {
    case dlpack::kFloat:
      return "float" + bits;
    case dlpack::kInt:
      return "int" + bits;
    case dlpack::kUInt:
      return "uint" + bits;
    default:
      return "DLPack type " + std::to_string(dtype.code) + " of " + bits + " bits";
  }
}

std::string to_string(Device device) {
  switch (device.type) {
    case dlpack::kCpu:
      return "cpu";
    case dlpack::kCuda:
      return "cuda:" + std::to_string(device.index);
    default:
      return "DLPack device " + std::to_string(device.type) + ":" + std::to_string(device.index);
  }
}

void Check::dims(const char* name, const Tensor& tensor, int64_t wanted,
                 const char* symbols) const {
  if (tensor.dim() == wanted) return;
  fail(name, "have " + std::to_string(wanted) + " dimensions " + symbols,
       "shape " + list(Shape{tensor}));
}

void Check::shape(const char* name, const Tensor& tensor, std::initializer_list<int64_t> wanted,
                  const char* meaning) const {
  bool equal = tensor.dim() == static_cast<int64_t>(wanted.size());
  int64_t d = 0;
  for (int64_t size : wanted) equal = equal && tensor.size(d++) == size;
  if (equal) return;
  fail(name, "have shape " + list(wanted) + " (" + meaning + ")", list(Shape{tensor}));
}

void Check::dtype(const char* name, const Tensor& tensor,
                  std::initializer_list<DataType> wanted) const {
  std::string names;
  for (const DataType& dtype : wanted) {
    if (tensor.dtype() == dtype) return;
    if (!names.empty()) names += " or ";
    names += to_string(dtype);
  }
  fail(name, "have dtype " + names, to_string(tensor.dtype()));
}

void Check::device(const char* name, const Tensor& tensor, const char* other_name,
                   const Tensor& other) const {
  if (tensor.device() == other.device()) return;
  fail(name, "be on " + to_string(other.device()) + " (device of `" + other_name + "`)",
       to_string(tensor.device()));
}

void Check::contiguous(const char* name, const Tensor& tensor) const {
  if (!tensor.is_contiguous()) fail(name, "be contiguous", "a strided view");
}

void Check::writable(const char* name, const Tensor& tensor) const {
  if (tensor.read_only()) fail(name, "be writable", "a read-only array");
}

void Check::fail(const char* name, const std::string& wanted, const std::string& got) const {
  throw std::invalid_argument(std::string(op_) + ": `" + name + "` must " + wanted + ", got " +
                              got);
}

}  // namespace pynar
