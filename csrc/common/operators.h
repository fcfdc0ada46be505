// What the host file of an operator needs: tensors and checks, dispatch over element types, and the
// form in which its bound function is declared.
#pragma once

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "common/scalar.h"
#include "common/tensor.h"

namespace pynar {

// Calls body.operator()<T>() for the storage type T of a floating dtype.
template <typename Body>
auto dispatch_floating(DataType dtype, const Body& body) {
  if (dtype == kFloat64) return body.template operator()<double>();
  if (dtype == kBFloat16) return body.template operator()<BFloat16>();
  if (dtype == kFloat16) return body.template operator()<Half>();
  return body.template operator()<float>();
}

// How kernel template arguments are spelled in a LaunchPlan.
template <typename T>
constexpr const char* kTypeName = nullptr;
template <>
inline constexpr const char* kTypeName<float> = "float";
template <>
inline constexpr const char* kTypeName<double> = "double";
template <>
inline constexpr const char* kTypeName<BFloat16> = "pynar::BFloat16";
template <>
inline constexpr const char* kTypeName<Half> = "pynar::Half";

struct KernelLaunch {
  std::string kernel;  // as C++ names it, template arguments included
  int64_t blocks;
  int64_t threads;
};

// What an operator on a GPU comes to when its kernels were not compiled ahead of time: data from
// which pynar/ops/_nvrtc.py compiles and launches them. Every kernel of an operator takes one
// argument, its parameter struct, whose fields are all eight bytes wide.
struct LaunchPlan {
  std::string source;  // below csrc/
  std::vector<KernelLaunch> kernels;
  std::string parameters;  // the bytes of the struct
  int64_t stream;
  int64_t device;

  template <typename Params>
  LaunchPlan(std::string source_file, const Params& params, const Tensor& tensor)
      : source(std::move(source_file)),
        parameters(reinterpret_cast<const char*>(&params), sizeof(params)),
        stream(reinterpret_cast<int64_t>(tensor.stream())),
        device(tensor.device().index) {
    static_assert(sizeof(Params) % 8 == 0 && alignof(Params) == 8);
  }

  // Adds the kernel pynar::name<threads>.
  void add(const std::string& name, int64_t threads, int64_t blocks);
  // Adds the kernel pynar::name<T, number>.
  template <typename T>
  void add(const std::string& name, int64_t number, int64_t threads, int64_t blocks) {
    add_typed(name, kTypeName<T>, number, threads, blocks);
  }
  // Adds the kernel pynar::name<T, threads>.
  template <typename T>
  void add(const std::string& name, int64_t threads, int64_t blocks) {
    add<T>(name, threads, threads, blocks);
  }

 private:
  void add_typed(const std::string& name, const char* type, int64_t number, int64_t threads,
                 int64_t blocks);
};

// Whether to take the NVRTC route although the kernels were compiled ahead of time; for tests.
bool use_nvrtc();
void set_use_nvrtc(bool value);

// The operators. Each fills its outputs and returns nothing, or returns what remains to be
// launched.
int64_t mask_predict_step_workspace(int64_t batch, int64_t steps, int64_t vocabulary,
                                    int64_t element_size);
std::optional<LaunchPlan> mask_predict_step(const Tensor& logits, const Tensor& tokens,
                                            const Tensor& scores, const Tensor& lengths,
                                            const Tensor& num_masked, const Tensor& new_tokens,
                                            const Tensor& new_scores,
                                            const std::optional<Tensor>& workspace);
std::optional<LaunchPlan> divergence_cross_entropy(
    const std::vector<Tensor>& logits, const Tensor& targets, const std::vector<int64_t>& pairs,
    double label_smoothing, const Tensor& cross_entropy, const Tensor& divergence,
    const Tensor& statistics);
std::optional<LaunchPlan> divergence_cross_entropy_backward(
    const Tensor& grad_cross_entropy, const Tensor& grad_divergence,
    const std::vector<Tensor>& logits, const Tensor& targets, const Tensor& statistics,
    const std::vector<int64_t>& pairs, double label_smoothing, const std::vector<Tensor>& grads);
void packed_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& scales,
                   const std::optional<Tensor>& column_sums, const std::optional<Tensor>& bias,
                   const std::optional<Tensor>& residual, const std::optional<Tensor>& norm_weight,
                   const std::optional<Tensor>& norm_bias, int64_t activation, double input_eps,
                   double output_eps, const Tensor& y);
void packed_layers(const Tensor& x, const std::vector<Tensor>& weights,
                   const std::vector<Tensor>& scales, const std::vector<Tensor>& column_sums,
                   const std::vector<Tensor>& biases, const std::vector<Tensor>& norms,
                   const Tensor& intervals, const std::vector<Tensor>& keys,
                   const std::vector<Tensor>& values, const std::optional<Tensor>& memory_intervals,
                   const std::optional<Tensor>& chosen, const std::vector<Tensor>& caches,
                   const std::optional<Tensor>& slots, int64_t content, int64_t layers,
                   int64_t heads, int64_t activation, double eps, const Tensor& y);
void packed_flow(const Tensor& x, const std::vector<int64_t>& kinds, const Tensor& linear,
                 const Tensor& weights, const Tensor& scales, const Tensor& column_sums,
                 const Tensor& biases, const Tensor& norms, const Tensor& memory,
                 const std::vector<Tensor>& rows, const std::vector<Tensor>& pairs, int64_t heads,
                 int64_t hidden, int64_t matrix, double eps, bool inverse, const Tensor& y,
                 const Tensor& logdet);
int64_t linear_argmax_workspace(int64_t rows, int64_t columns, int64_t k);
std::optional<LaunchPlan> linear_argmax(const Tensor& x, const Tensor& weight,
                                        const std::optional<Tensor>& scales,
                                        const std::optional<Tensor>& column_sums,
                                        const std::optional<Tensor>& bias, int64_t columns,
                                        int64_t k, const Tensor& tokens, const Tensor& log_probs,
                                        const Tensor& lse, const std::optional<Tensor>& workspace);
std::optional<LaunchPlan> interval_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                             const Tensor& intervals, double scale,
                                             const Tensor& out, const Tensor& lse);
int64_t interval_attention_backward_workspace(int64_t batch, int64_t heads, int64_t queries,
                                              int64_t element_size);
std::optional<LaunchPlan> interval_attention_backward(const Tensor& grad_out, const Tensor& q,
                                                      const Tensor& k, const Tensor& v,
                                                      const Tensor& intervals, const Tensor& out,
                                                      const Tensor& lse, double scale,
                                                      const Tensor& grad_q, const Tensor& grad_k,
                                                      const Tensor& grad_v,
                                                      const std::optional<Tensor>& workspace);
std::optional<LaunchPlan> actnorm(const Tensor& x, const Tensor& lengths, const Tensor& log_scale,
                                  const Tensor& bias, bool inverse, int64_t squeeze,
                                  const Tensor& y);
std::optional<LaunchPlan> actnorm_backward(const Tensor& grad_y, const Tensor& x,
                                           const Tensor& lengths, const Tensor& log_scale,
                                           const Tensor& bias, bool inverse, int64_t squeeze,
                                           const Tensor& grad_x, const Tensor& grad_log_scale,
                                           const Tensor& grad_bias,
                                           const std::optional<Tensor>& workspace);
std::optional<LaunchPlan> flow_linear(const std::string& name, const Tensor& x,
                                      const Tensor& lengths, const std::optional<Tensor>& log_scale,
                                      const std::optional<Tensor>& bias, const Tensor& weight,
                                      int64_t layout, bool inverse, int64_t squeeze,
                                      const Tensor& y);
int64_t flow_linear_backward_workspace(int64_t batch, int64_t steps, int64_t channels,
                                       int64_t matrices, int64_t dim, int64_t element_size);
std::optional<LaunchPlan> flow_linear_backward(
    const std::string& name, const Tensor& grad_y, const Tensor& x, const Tensor& lengths,
    const std::optional<Tensor>& log_scale, const std::optional<Tensor>& bias, const Tensor& weight,
    int64_t layout, bool inverse, int64_t squeeze, const Tensor& grad_x,
    const Tensor& grad_log_scale, const Tensor& grad_bias, const Tensor& grad_weight,
    const std::optional<Tensor>& workspace);
std::optional<LaunchPlan> squeeze(const Tensor& x, const Tensor& lengths, int64_t factor,
                                  const Tensor& y, const Tensor& dropped);
std::optional<LaunchPlan> unsqueeze(const std::string& name, const Tensor& y, const Tensor& dropped,
                                    const Tensor& lengths, int64_t factor, const Tensor& x);
std::optional<LaunchPlan> affine_coupling(const Tensor& z, const Tensor& lengths,
                                          const Tensor& shift, const Tensor& raw_scale,
                                          bool inverse, const Tensor& y, const Tensor& logdet,
                                          const Tensor& workspace);
std::optional<LaunchPlan> affine_coupling_backward(const Tensor& grad_y, const Tensor& grad_logdet,
                                                   const Tensor& x, const Tensor& raw_scale,
                                                   const Tensor& lengths, bool inverse,
                                                   const Tensor& grad_z, const Tensor& grad_shift,
                                                   const Tensor& grad_raw_scale);
int64_t batched_logdet_most_bytes();
std::optional<LaunchPlan> batched_logdet(const Tensor& weights, const Tensor& logdet,
                                         const Tensor& inverse);

}  // namespace pynar
