// Loops over rows on the threads of OpenMP, which are torch's when torch was imported first.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace pynar {

// Calls body(first, last) on disjoint ranges that cover [0, n), each at least `grain` long where
// possible. Which thread takes what never changes a result: a row is the work of one thread.
template <typename Body>
void parallel_for(int64_t n, int64_t grain, const Body& body) {
  if (n <= 0) return;
#ifdef _OPENMP
  const int64_t wanted = std::min<int64_t>(omp_get_max_threads(), (n + grain - 1) / grain);
  if (wanted > 1 && !omp_in_parallel()) {
    std::exception_ptr error;
#pragma omp parallel num_threads(static_cast<int>(wanted))
    {
      const int64_t threads = omp_get_num_threads();
      const int64_t thread = omp_get_thread_num();
      try {
        const int64_t first = n * thread / threads;
        const int64_t last = n * (thread + 1) / threads;
        if (first < last) body(first, last);
      } catch (...) {
#pragma omp critical(pynar_parallel_for)
        error = std::current_exception();
      }
    }
    if (error) std::rethrow_exception(error);
    return;
  }
#endif
  body(int64_t{0}, n);
}

}  // namespace pynar
