#include "attention/interval_arguments.h"

#include <utility>
#include <vector>

namespace pynar {
namespace {

std::vector<int64_t> shape(const Tensor& x) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < x.dim(); ++d) sizes.push_back(x.size(d));
  return sizes;
}

bool is_packed(const Tensor& q) {
  return q.dim() == 3;
}

}  // namespace

void check_attention(const Check& check, const Tensor& q, const Tensor& k, const Tensor& v,
                     const Tensor& intervals) {
  if (!is_packed(q)) check.dims("q", q, 4, "[B, H, T, D], or 3 [N, H, D]");
  check.dtype("q", q, {kFloat32, kBFloat16, kFloat16, kFloat64});
  const int64_t dim = q.size(q.dim() - 1);
  if (dim < 1 || dim > kMaxHeadDim) {
    check.fail("q", "have 1 to 128 channels a head", std::to_string(dim));
  }
  if (is_packed(q)) {
    check.dims("k", k, 3, "[N, H, D]");
    check.shape("k", k, {k.size(0), q.size(1), dim}, "heads and channels of `q`");
    check.dims("intervals", intervals, 3, "[N, R, 2]");
    check.shape("intervals", intervals, {q.size(0), intervals.size(1), 2},
                "queries of `q`, R, begin and end");
  } else {
    check.dims("k", k, 4, "[B, H, T, D]");
    check.shape("k", k, {q.size(0), q.size(1), k.size(2), dim}, "batch, heads and channels of `q`");
    check.dims("intervals", intervals, 4, "[B, T, R, 2]");
    check.shape("intervals", intervals, {q.size(0), q.size(2), intervals.size(2), 2},
                "batch and queries of `q`, R, begin and end");
  }
  check.dtype("k", k, {q.dtype()});
  check.device("k", k, "q", q);
  check_like(check, "v", v, "k", k);
  check.dtype("intervals", intervals, {kInt32});
  check.device("intervals", intervals, "q", q);
  if (const int64_t r = intervals.size(intervals.dim() - 2); r < 1 || r > kMaxIntervals) {
    check.fail("intervals", "have 1 to 4 intervals a query", std::to_string(r));
  }
  for (const auto& [name, tensor] : {std::pair<const char*, const Tensor&>{"q", q},
                                     {"k", k},
                                     {"v", v},
                                     {"intervals", intervals}}) {
    check_inner_contiguous(check, name, tensor);
  }
  if (q.device().type != dlpack::kCpu && q.device().type != dlpack::kCuda) {
    check.fail("q", "be on cpu or cuda", to_string(q.device()));
  }
}

void check_like(const Check& check, const char* name, const Tensor& x, const char* like_name,
                const Tensor& like) {
  const std::vector<int64_t> wanted = shape(like);
  const std::string meaning = std::string("that of `") + like_name + "`";
  if (wanted.size() == 3) {
    check.shape(name, x, {wanted[0], wanted[1], wanted[2]}, meaning.c_str());
  } else {
    check.shape(name, x, {wanted[0], wanted[1], wanted[2], wanted[3]}, meaning.c_str());
  }
  check.dtype(name, x, {like.dtype()});
  check.device(name, x, like_name, like);
}

void check_lse(const Check& check, const Tensor& lse, const Tensor& q) {
  if (is_packed(q)) {
    check.shape("lse", lse, {q.size(0), q.size(1)}, "queries and heads of `q`");
  } else {
    check.shape("lse", lse, {q.size(0), q.size(1), q.size(2)}, "batch, heads and queries of `q`");
  }
  check.dtype("lse", lse, {q.dtype() == kFloat64 ? kFloat64 : kFloat32});
  check.device("lse", lse, "q", q);
}

void check_inner_contiguous(const Check& check, const char* name, const Tensor& x) {
  const int64_t last = x.dim() - 1;
  if (x.numel() > 0 && x.size(last) > 1 && x.stride(last) != 1) {
    check.fail(name, "be contiguous over its last dimension",
               "stride " + std::to_string(x.stride(last)));
  }
}

void check_output(const Check& check, const char* name, const Tensor& x) {
  check.contiguous(name, x);
  check.writable(name, x);
}

AttentionSizes attention_sizes(const Tensor& q, const Tensor& k, const Tensor& intervals) {
  const bool packed = is_packed(q);
  return {packed ? 1 : q.size(0), q.size(1),           q.size(packed ? 0 : 2),
          k.size(packed ? 0 : 2), q.size(q.dim() - 1), intervals.size(intervals.dim() - 2)};
}

IntervalRows interval_rows(const Tensor& intervals) {
  const bool packed = intervals.dim() == 3;
  return {intervals.data<int32_t>(), packed ? 0 : intervals.stride(0),
          intervals.stride(packed ? 0 : 1), intervals.stride(packed ? 1 : 2)};
}

bool rows_aligned(std::initializer_list<const Tensor*> tensors) {
  for (const Tensor* x : tensors) {
    if (reinterpret_cast<uintptr_t>(x->data<char>()) % 16 != 0) return false;
    for (int64_t d = 0; d + 1 < x->dim(); ++d) {
      if (x->stride(d) * (x->dtype().bits / 8) % 16 != 0) return false;
    }
  }
  return true;
}

}  // namespace pynar
