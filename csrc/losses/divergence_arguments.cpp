#include "losses/divergence_arguments.h"

#include <string>

namespace pynar {

void check_divergence(const Check& check, const std::vector<Tensor>& logits, const Tensor& targets,
                      const std::vector<int64_t>& pairs, double label_smoothing) {
  const auto heads = static_cast<int64_t>(logits.size());
  if (heads < 1 || heads > kMaxHeads) {
    check.fail("logits", "have 1 to 4 heads", std::to_string(heads));
  }
  const Tensor& first = logits[0];
  for (int64_t h = 0; h < heads; ++h) {
    const Tensor& head = logits[h];
    const std::string text = "logits[" + std::to_string(h) + "]";
    const char* name = text.c_str();
    check.dims(name, head, 2, "[N, V]");
    if (h == 0) check.dtype(name, head, {kFloat32, kBFloat16, kFloat16, kFloat64});
    check.dtype(name, head, {first.dtype()});
    check.shape(name, head, {first.size(0), first.size(1)}, "that of `logits[0]`");
    check.device(name, head, "logits[0]", first);
    if (head.size(1) > 1 && head.stride(1) != 1) {
      check.fail(name, "be contiguous over the vocabulary",
                 "stride " + std::to_string(head.stride(1)));
    }
  }
  const int64_t rows = first.size(0);
  const int64_t vocabulary = first.size(1);
  if (vocabulary == 0) check.fail("logits[0]", "have at least one symbol", "0");
  check.shape("targets", targets, {rows}, "rows of `logits[0]`");
  check.dtype("targets", targets, {kInt64});
  check.device("targets", targets, "logits[0]", first);
  const size_t count = pairs.size() / 2;
  if (pairs.size() % 2 != 0) check.fail("pairs", "be in twos", std::to_string(pairs.size()));
  for (size_t i = 0; i < count; ++i) {
    const int64_t p = pairs[2 * i];
    const int64_t q = pairs[2 * i + 1];
    const std::string text = "(" + std::to_string(p) + ", " + std::to_string(q) + ")";
    if (p == q || p < 0 || p >= heads || q < 0 || q >= heads) {
      check.fail("pairs", "be of two different heads in [0, " + std::to_string(heads) + ")", text);
    }
    for (size_t j = 0; j < i; ++j) {
      const int64_t a = pairs[2 * j];
      const int64_t b = pairs[2 * j + 1];
      if ((a == p && b == q) || (a == q && b == p)) {
        check.fail("pairs", "have each pair once", text + " again");
      }
    }
  }
  if (!(label_smoothing >= 0 && label_smoothing <= 1)) {
    check.fail("label_smoothing", "be in [0, 1]", std::to_string(label_smoothing));
  }
  if (first.device().type == dlpack::kCuda) return;
  if (first.device().type != dlpack::kCpu) {
    check.fail("logits[0]", "be on cpu or cuda", to_string(first.device()));
  }
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t target = targets.data<int64_t>()[row * targets.stride(0)];
    if (target >= 0 && target < vocabulary) continue;
    check.fail("targets", "have values in [0, " + std::to_string(vocabulary) + ")",
               std::to_string(target) + " (row " + std::to_string(row) + ")");
  }
}

void check_by_row(const Check& check, const char* name, const Tensor& x, int64_t count,
                  const Tensor& logits) {
  check.shape(name, x, {count, logits.size(0)}, "as the forward pass returned");
  check.dtype(name, x, {logits.dtype() == kFloat64 ? kFloat64 : kFloat32});
  check.device(name, x, "logits[0]", logits);
}

bool heads_aligned(const std::vector<Tensor>& heads) {
  for (const Tensor& head : heads) {
    const int64_t bytes = head.dtype().bits / 8;
    if (reinterpret_cast<uintptr_t>(head.data<char>()) % 16 != 0) return false;
    if (head.stride(0) * bytes % 16 != 0) return false;
  }
  return true;
}

}  // namespace pynar
