#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

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

}  // namespace
}  // namespace pynar

PYBIND11_MODULE(_C, m) {
  using pynar::LaunchPlan;
  // Other Python threads run while a kernel does.
  using Release = py::call_guard<py::gil_scoped_release>;

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

  m.def("actnorm", &pynar::actnorm, Release());
  m.def("actnorm_backward", &pynar::actnorm_backward, Release());
  m.def("affine_coupling", &pynar::affine_coupling, Release());
  m.def("affine_coupling_backward", &pynar::affine_coupling_backward, Release());
  m.def("batched_logdet", &pynar::batched_logdet, Release());
  m.def("batched_logdet_most_bytes", &pynar::batched_logdet_most_bytes);
  m.def("divergence_cross_entropy", &pynar::divergence_cross_entropy, Release());
  m.def("divergence_cross_entropy_backward", &pynar::divergence_cross_entropy_backward, Release());
  m.def("flow_linear", &pynar::flow_linear, Release());
  m.def("flow_linear_backward", &pynar::flow_linear_backward, Release());
  m.def("flow_linear_backward_workspace", &pynar::flow_linear_backward_workspace);
  m.def("linear_argmax", &pynar::linear_argmax, Release());
  m.def("linear_argmax_workspace", &pynar::linear_argmax_workspace);
  m.def("packed_layer", &pynar::packed_layer, Release());
  m.def("packed_linear", &pynar::packed_linear, Release());
  m.def("interval_attention", &pynar::interval_attention, Release());
  m.def("interval_attention_backward", &pynar::interval_attention_backward, Release());
  m.def("interval_attention_backward_workspace", &pynar::interval_attention_backward_workspace);
  m.def("mask_predict_step", &pynar::mask_predict_step, Release());
  m.def("mask_predict_step_workspace", &pynar::mask_predict_step_workspace);
  m.def("squeeze", &pynar::squeeze, Release());
  m.def("unsqueeze", &pynar::unsqueeze, Release());

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
  m.def("multiply_in_cache", &pynar::multiply_in_cache, Release());
  m.def("read_all", &pynar::read_all, Release());
}
