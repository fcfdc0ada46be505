// Lets bound functions take `pynar::Tensor`: torch tensors through the DLPack C exchange interface,
// anything else that has `__dlpack__` (NumPy, CuPy) through its capsule.
#pragma once

#include <optional>
#include <pybind11/pybind11.h>
#include <vector>

#include "common/tensor.h"

namespace pynar {

// The exchange interface of a type, or null. Looked up once a type: the few types seen
// (torch.Tensor, torch.nn.Parameter) are kept alive, so that an address in the cache cannot come to
// mean another.
inline const dlpack::ExchangeApi* exchange_api(PyTypeObject* type) {
  struct Entry {
    PyTypeObject* type;
    const dlpack::ExchangeApi* api;
  };
  constexpr int kEntries = 8;
  static Entry entries[kEntries];
  static int used = 0;
  for (int i = 0; i < used; ++i) {
    if (entries[i].type == type) return entries[i].api;
  }
  const dlpack::ExchangeApi* api = nullptr;
  PyObject* capsule =
      PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__");
  if (capsule == nullptr) {
    PyErr_Clear();
  } else {
    void* pointer = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
    if (pointer == nullptr) PyErr_Clear();
    auto* header = static_cast<dlpack::ExchangeApiHeader*>(pointer);
    while (header != nullptr && header->version.major != dlpack::kMajorVersion) {
      header = header->previous;
    }
    api = reinterpret_cast<const dlpack::ExchangeApi*>(header);
    if (api != nullptr && api->array_from_object == nullptr) api = nullptr;
    Py_DECREF(capsule);
  }
  if (used < kEntries) {
    Py_INCREF(type);
    entries[used++] = {type, api};
  }
  return api;
}

}  // namespace pynar

namespace pybind11::detail {

template <>
struct type_caster<pynar::Tensor> {
  PYBIND11_TYPE_CASTER(pynar::Tensor, const_name("Tensor"));

  [[gnu::noinline]] bool load(handle source, bool) {
    const pynar::dlpack::ExchangeApi* api = pynar::exchange_api(Py_TYPE(source.ptr()));
    if (api == nullptr) return load_capsule(source);
    pynar::dlpack::Array array;
    if (api->array_from_object(source.ptr(), &array) != 0) throw error_already_set();
    value = pynar::Tensor(array, api, false);
    return true;
  }

 private:
  bool load_capsule(handle source) {
    namespace dlpack = pynar::dlpack;
    if (!hasattr(source, "__dlpack__")) return false;
    capsule_ = export_capsule(source);
    dlpack::Array array;
    bool read_only = false;
    if (PyCapsule_IsValid(capsule_.ptr(), "dltensor_versioned")) {
      auto* managed = static_cast<dlpack::ManagedArrayVersioned*>(
          PyCapsule_GetPointer(capsule_.ptr(), "dltensor_versioned"));
      if (managed->version.major != dlpack::kMajorVersion) return false;
      array = managed->array;
      read_only = (managed->flags & dlpack::kReadOnlyFlag) != 0;
    } else if (PyCapsule_IsValid(capsule_.ptr(), "dltensor")) {
      array = static_cast<dlpack::ManagedArray*>(PyCapsule_GetPointer(capsule_.ptr(), "dltensor"))
                  ->array;
    } else {
      return false;
    }
    if (array.strides == nullptr) {
      if (array.ndim > kMaxDims) return false;
      int64_t stride = 1;
      for (int d = array.ndim - 1; d >= 0; --d) {
        strides_[d] = stride;
        stride *= array.shape[d];
      }
      array.strides = strides_;
    }
    value = pynar::Tensor(array, nullptr, read_only);
    return true;
  }

  // The capsule is kept, unconsumed, for the length of the call; its own destructor frees it. A
  // producer on a GPU makes its work visible to the legacy default stream, number 1, on which an
  // operator runs that no exchange interface tells of another.
  static object export_capsule(handle source) {
    object method = source.attr("__dlpack__");
    const auto device = source.attr("__dlpack_device__")().cast<std::pair<int, int>>();
    dict arguments;
    if (device.first == pynar::dlpack::kCuda) arguments["stream"] = 1;
    arguments["max_version"] =
        make_tuple(pynar::dlpack::kMajorVersion, pynar::dlpack::kMinorVersion);
    try {
      return method(**arguments);
    } catch (error_already_set& error) {
      if (!error.matches(PyExc_TypeError)) throw;
    }
    // A producer from before DLPack 1.0.
    arguments.attr("pop")("max_version");
    return method(**arguments);
  }

  static constexpr int kMaxDims = 8;
  object capsule_;
  int64_t strides_[kMaxDims];
};

// pybind11's caster of an optional drops the inner one, and with it the capsule that a view points
// into, before the call; this one keeps it.
template <>
struct type_caster<std::optional<pynar::Tensor>> {
  PYBIND11_TYPE_CASTER(std::optional<pynar::Tensor>, const_name("Tensor | None"));

  [[gnu::noinline]] bool load(handle source, bool convert) {
    if (source.is_none()) return true;
    if (!tensor_.load(source, convert)) return false;
    value = cast_op<pynar::Tensor&>(tensor_);
    return true;
  }

 private:
  make_caster<pynar::Tensor> tensor_;
};

// A list of tensors; for the same reason it keeps the casters.
template <>
struct type_caster<std::vector<pynar::Tensor>> {
  PYBIND11_TYPE_CASTER(std::vector<pynar::Tensor>, const_name("list[Tensor]"));

  [[gnu::noinline]] bool load(handle source, bool convert) {
    if (!isinstance<sequence>(source)) return false;
    const auto items = reinterpret_borrow<sequence>(source);
    tensors_ = std::vector<make_caster<pynar::Tensor>>(items.size());
    for (size_t i = 0; i < tensors_.size(); ++i) {
      const object item = items[i];
      if (!tensors_[i].load(item, convert)) return false;
      value.push_back(cast_op<pynar::Tensor&>(tensors_[i]));
    }
    return true;
  }

 private:
  std::vector<make_caster<pynar::Tensor>> tensors_;
};

}  // namespace pybind11::detail
