// Arrays from and to files, for the programs that run kernels on them.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <string>

// Arrays of exactly the size needed, so that AddressSanitizer sees any access beside them.
template <typename T>
std::unique_ptr<T[]> read(const std::string& path, int64_t count) {
  std::unique_ptr<T[]> values(new T[count]);
  std::ifstream file(path, std::ios::binary);
  file.read(reinterpret_cast<char*>(values.get()), count * sizeof(T));
  if (file.gcount() != static_cast<std::streamsize>(count * sizeof(T))) {
    std::fprintf(stderr, "%s is too short\n", path.c_str());
    std::exit(2);
  }
  return values;
}

template <typename T>
void write(const std::string& path, const T* values, int64_t count) {
  std::ofstream file(path, std::ios::binary);
  file.write(reinterpret_cast<const char*>(values), count * sizeof(T));
}
