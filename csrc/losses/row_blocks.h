// Rows of logits a block at a time in the accumulation type, so that what is done with them is
// compiled once for all element types. For files that are compiled once per instruction set.
#pragma once

#include "common/simd.h"

namespace pynar::PYNAR_ISA {

// A block of all heads, and their gradients, stay in the innermost cache.
constexpr int64_t kRowBlock = 512;

// A row whose element type only the functions know.
template <typename A>
struct RowReader {
  const void* row;
  // `count` elements from `first` on, in the buffer where they are not of type A as they are.
  const A* (*read)(const void* row, int64_t first, int64_t count, A* buffer);
};

template <typename A>
struct RowWriter {
  void* row;
  // Where elements from `first` on are to be put before write() is called with that place.
  A* (*place)(void* row, int64_t first, A* buffer);
  void (*write)(void* row, int64_t first, int64_t count, const A* from);
};

template <typename T>
const accumulation_t<T>* read_block(const void* row, int64_t first, int64_t count,
                                    accumulation_t<T>* buffer) {
  using Vector = Simd<accumulation_t<T>>;
  const T* x = static_cast<const T*>(row) + first;
  if constexpr (sizeof(T) == sizeof(accumulation_t<T>)) {
    return x;
  } else {
    int64_t i = 0;
    for (; i + Vector::kLanes <= count; i += Vector::kLanes) Vector::load(x + i).store(buffer + i);
    for (; i < count; ++i) buffer[i] = to_accumulation(x[i]);
    return buffer;
  }
}

template <typename T>
accumulation_t<T>* place_block(void* row, int64_t first, accumulation_t<T>* buffer) {
  if constexpr (sizeof(T) == sizeof(accumulation_t<T>)) {
    return static_cast<T*>(row) + first;
  } else {
    return buffer;
  }
}

template <typename T>
void write_block(void* row, int64_t first, int64_t count, const accumulation_t<T>* from) {
  using Vector = Simd<accumulation_t<T>>;
  if constexpr (sizeof(T) != sizeof(accumulation_t<T>)) {
    T* to = static_cast<T*>(row) + first;
    int64_t i = 0;
    for (; i + Vector::kLanes <= count; i += Vector::kLanes) Vector::load(from + i).store(to + i);
    for (; i < count; ++i) to[i] = from_accumulation<T>(from[i]);
  }
}

template <typename T>
RowReader<accumulation_t<T>> row_reader(const T* row) {
  return {row, read_block<T>};
}

template <typename T>
RowWriter<accumulation_t<T>> row_writer(T* row) {
  return {row, place_block<T>, write_block<T>};
}

}  // namespace pynar::PYNAR_ISA
