#include "common/operators.h"

#include <atomic>

namespace pynar {
namespace {

std::atomic<bool> nvrtc{false};

}  // namespace

bool use_nvrtc() {
  return nvrtc.load(std::memory_order_relaxed);
}

void set_use_nvrtc(bool value) {
  nvrtc.store(value);
}

}  // namespace pynar
