#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <string>
#include <tuple>
#include <utility>

#include "common/cpu.h"
#include "common/operators.h"
#include "common/read_bandwidth.h"
#include "common/tensor_caster.h"
#include "linear/multiply_rate.h"

#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef PYNAR_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace py = pybind11;

namespace pynar {
namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = PYNAR_VERSION;
  info["compiler"] = PYNAR_COMPILER;
  info["simd_compiled"] = PYNAR_ISAS;
#ifdef _OPENMP
  info["openmp"] = _OPENMP;
#else
  info["openmp"] = py::none();
#endif
#ifdef PYNAR_WITH_CUDA
  info["cuda"] = CUDART_VERSION;
  info["cuda_architectures"] = PYNAR_CUDA_ARCHITECTURES;
#else
  info["cuda"] = py::none();
  info["cuda_architectures"] = py::none();
#endif
  info["dlpack"] = py::make_tuple(dlpack::kMajorVersion, dlpack::kMinorVersion);
  return info;
}

int num_threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

// The number of GPUs; a machine without a driver has none.
int num_cuda_devices() {
  int count = 0;
#ifdef PYNAR_WITH_CUDA
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    (void)cudaGetLastError();
    count = 0;
  }
#endif
  return count;
}

// Binds an operator. To pybind11 all of them are one type of function, of any arguments: a function
// type of its own for each takes the compiler three times as long.
using Anything = void (*)();
using Call = py::object (*)(Anything function, const py::args& arguments);

[[gnu::noinline]] void check_count(const py::args& arguments, size_t wanted) {
  if (arguments.size() == wanted) return;
  throw py::type_error("expected " + std::to_string(wanted) + " arguments, got " +
                       std::to_string(arguments.size()));
}

[[gnu::noinline]] void refuse(const py::args& arguments, size_t number) {
  const std::string type = py::str(py::type::of(arguments[number]).attr("__name__"));
  throw py::type_error("argument " + std::to_string(number) + " cannot be a " + type);
}

// Other Python threads run while a kernel does.
template <typename Result, typename... Arguments, size_t... kNumber>
py::object call(Anything function, const py::args& arguments, std::index_sequence<kNumber...>) {
  check_count(arguments, sizeof...(Arguments));
  std::tuple<py::detail::make_caster<Arguments>...> casters;
  [[maybe_unused]] const auto load = [&](auto& caster, size_t number) {
    if (!caster.load(PyTuple_GET_ITEM(arguments.ptr(), number), true)) refuse(arguments, number);
  };
  (load(std::get<kNumber>(casters), kNumber), ...);
  const auto run = [&] {
    const py::gil_scoped_release release;
    return reinterpret_cast<Result (*)(Arguments...)>(function)(
        py::detail::cast_op<Arguments>(std::get<kNumber>(casters))...);
  };
  if constexpr (std::is_void_v<Result>) {
    run();
    return py::none();
  } else {
    return py::cast(run());
  }
}

[[gnu::noinline]] void define(py::module_& m, const char* name, Anything function, Call call) {
  m.def(name, [function, call](const py::args& arguments) { return call(function, arguments); });
}

template <typename Result, typename... Arguments>
void define(py::module_& m, const char* name, Result (*function)(Arguments...)) {
  define(m, name, reinterpret_cast<Anything>(function),
         [](Anything function, const py::args& arguments) {
           return call<Result, Arguments...>(function, arguments,
                                             std::index_sequence_for<Arguments...>());
         });
}

}  // namespace
}  // namespace pynar

PYBIND11_MODULE(_C, m) {
  using pynar::define;
  using pynar::LaunchPlan;

  py::class_<LaunchPlan>(m, "LaunchPlan")
      .def_readonly("source", &LaunchPlan::source)
      .def_readonly("stream", &LaunchPlan::stream)
      .def_readonly("device", &LaunchPlan::device)
      .def_property_readonly("parameters",
                             [](const LaunchPlan& plan) { return py::bytes(plan.parameters); })
      .def_property_readonly("kernels", [](const LaunchPlan& plan) {
        py::list kernels;
        for (const auto& [kernel, blocks, threads] : plan.kernels) {
          kernels.append(py::make_tuple(kernel, blocks, threads));
        }
        return kernels;
      });

  define(m, "actnorm", &pynar::actnorm);
  define(m, "actnorm_backward", &pynar::actnorm_backward);
  define(m, "affine_coupling", &pynar::affine_coupling);
  define(m, "affine_coupling_backward", &pynar::affine_coupling_backward);
  define(m, "batched_logdet", &pynar::batched_logdet);
  define(m, "batched_logdet_most_bytes", &pynar::batched_logdet_most_bytes);
  define(m, "divergence_cross_entropy", &pynar::divergence_cross_entropy);
  define(m, "divergence_cross_entropy_backward", &pynar::divergence_cross_entropy_backward);
  define(m, "flow_linear", &pynar::flow_linear);
  define(m, "flow_linear_backward", &pynar::flow_linear_backward);
  define(m, "flow_linear_backward_workspace", &pynar::flow_linear_backward_workspace);
  define(m, "linear_argmax", &pynar::linear_argmax);
  define(m, "linear_argmax_workspace", &pynar::linear_argmax_workspace);
  define(m, "packed_flow", &pynar::packed_flow);
  define(m, "packed_layers", &pynar::packed_layers);
  define(m, "packed_linear", &pynar::packed_linear);
  define(m, "interval_attention", &pynar::interval_attention);
  define(m, "interval_attention_backward", &pynar::interval_attention_backward);
  define(m, "interval_attention_backward_workspace", &pynar::interval_attention_backward_workspace);
  define(m, "mask_predict_step", &pynar::mask_predict_step);
  define(m, "mask_predict_step_workspace", &pynar::mask_predict_step_workspace);
  define(m, "squeeze", &pynar::squeeze);
  define(m, "unsqueeze", &pynar::unsqueeze);

  m.def("build_info", &pynar::build_info);
  m.def("num_threads", &pynar::num_threads);
  m.def("num_cuda_devices", &pynar::num_cuda_devices);
  m.def("simd_level", [] { return pynar::isa_name(pynar::isa()); });
  m.def("simd_levels", [] {
    py::list names;
    for (pynar::Isa isa : pynar::available_isas()) names.append(pynar::isa_name(isa));
    return names;
  });
  m.def("set_simd_level", &pynar::set_isa);
  m.def("set_use_nvrtc", &pynar::set_use_nvrtc);
  define(m, "multiply_in_cache", &pynar::multiply_in_cache);
  define(m, "read_all", &pynar::read_all);
}
