#include "common/operators.h"

#include <atomic>

namespace pynar {
namespace {

std::atomic<bool> nvrtc{false};

}  // namespace

void LaunchPlan::add(const std::string& name, int64_t threads, int64_t blocks) {
  kernels.push_back({"pynar::" + name + "<" + std::to_string(threads) + ">", blocks, threads});
}

void LaunchPlan::add_typed(const std::string& name, const char* type, int64_t number,
                           int64_t threads, int64_t blocks) {
  std::string kernel = "pynar::" + name + "<";
  kernel += type;
  kernel += ", " + std::to_string(number) + ">";
  kernels.push_back({std::move(kernel), blocks, threads});
}

bool use_nvrtc() {
  return nvrtc.load(std::memory_order_relaxed);
}

void set_use_nvrtc(bool value) {
  nvrtc.store(value);
}

}  // namespace pynar
