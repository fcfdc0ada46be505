// One matrix of a chain of per-step maps, and what follows it.
#pragma once

#include "flow/flow_linear.h"

namespace pynar {

// What is done to a block of kFlowRows steps, whose states are [C, kFlowRows].
template <typename A>
struct FlowStep {
  const A* weight;  // element (i, j) at i * row_stride + j * column_stride
  int64_t row_stride, column_stride;
  int64_t dim, heads;
  int64_t strided;
  const A* scale;  // [C], of what comes out
  const A* shift;  // [C]
};

// So many rows go together where they stay as they lie; a multiple of what registers hold.
constexpr int64_t kRowsTogether = 18;

}  // namespace pynar
