// The part of the DLPack 1.3 C interface (https://dmlc.github.io/dlpack/latest/c_api.html) that
// this extension uses, declared anew with our names; tests/test_build.py compares the layout with
// the header that PyTorch ships.
#pragma once

#include <cstdint>

namespace pynar::dlpack {

constexpr uint32_t kMajorVersion = 1;
constexpr uint32_t kMinorVersion = 3;
constexpr uint64_t kReadOnlyFlag = 1;

enum DeviceType : int32_t {
  kCpu = 1,
  kCuda = 2,
  kCudaHost = 3,
  kCudaManaged = 13,
};

enum TypeCode : uint8_t {
  kInt = 0,
  kUInt = 1,
  kFloat = 2,
  kBfloat = 4,
  kBool = 6,
};

struct Version {
  uint32_t major;
  uint32_t minor;
};

struct Device {
  DeviceType type;
  int32_t index;

  bool operator==(const Device&) const = default;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;

  bool operator==(const DataType&) const = default;
};

struct Array {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; may be null before DLPack 1.2, which means contiguous
  uint64_t byte_offset;
};

// What a `__dlpack__` capsule named "dltensor" points to.
struct ManagedArray {
  Array array;
  void* context;
  void (*deleter)(ManagedArray*);
};

// What a `__dlpack__` capsule named "dltensor_versioned" points to.
struct ManagedArrayVersioned {
  Version version;
  void* context;
  void (*deleter)(ManagedArrayVersioned*);
  uint64_t flags;
  Array array;
};

struct ExchangeApiHeader {
  Version version;
  ExchangeApiHeader* previous;  // an older interface of the same producer, or null
};

// What the capsule in a type's `__dlpack_c_exchange_api__` points to. Functions return 0, or -1
// with a Python exception set.
struct ExchangeApi {
  ExchangeApiHeader header;
  int (*allocate)(Array* prototype, ManagedArrayVersioned** out, void* error_context,
                  void (*set_error)(void* error_context, const char* kind, const char* message));
  int (*managed_from_object)(void* object, ManagedArrayVersioned** out);
  int (*managed_to_object)(ManagedArrayVersioned* array, void** out_object);
  int (*array_from_object)(void* object, Array* out);  // borrowed, no ownership; may be null
  int (*current_work_stream)(DeviceType type, int32_t index, void** out_stream);
};

}  // namespace pynar::dlpack
