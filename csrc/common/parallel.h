// Loops over rows on the threads of OpenMP, which are torch's when torch was imported first.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>
#include <memory>
#include <new>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace pynar {

inline int64_t max_threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

// Threads that a loop may use: one where it runs on a thread of another.
inline int64_t free_threads() {
#ifdef _OPENMP
  if (omp_in_parallel()) return 1;
#endif
  return max_threads();
}

// Calls body(first, last) on disjoint ranges that cover [0, n), each at least `grain` long where
// possible. Which thread takes what never changes a result: a row is the work of one thread.
template <typename Body>
void parallel_for(int64_t n, int64_t grain, const Body& body) {
  if (n <= 0) return;
#ifdef _OPENMP
  const int64_t wanted = std::min<int64_t>(max_threads(), (n + grain - 1) / grain);
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

// One thread's share of a parallel phase.
struct Part {
  int64_t index;
  int64_t count;

  struct Range {
    int64_t first, last;
  };
  Range of(int64_t n) const { return {n * index / count, n * (index + 1) / count}; }
};

// Runs phases one after another on at most `tasks` threads; a phase begins when all threads have
// ended the one before. Phases must not throw.
template <typename... Phases>
void parallel_phases(int64_t tasks, const Phases&... phases) {
#ifdef _OPENMP
  const int64_t wanted = std::min<int64_t>(max_threads(), tasks);
  if (wanted > 1 && !omp_in_parallel()) {
#pragma omp parallel num_threads(static_cast<int>(wanted))
    {
      const Part part{omp_get_thread_num(), omp_get_num_threads()};
      const auto run = [&](const auto& phase) {
        phase(part);
#pragma omp barrier
      };
      (run(phases), ...);
    }
    return;
  }
#else
  (void)tasks;
#endif
  (phases(Part{0, 1}), ...);
}

// Threads that go through work of several steps side by side, each with its share.
class Team {
 public:
  Team(const Part& part, std::exception_ptr& error) : part_(part), error_(error) {}

  // Calls body(first, last) with this thread's share of [0, n). What it throws is kept, since the
  // others would wait for a thread that leaves.
  template <typename Body>
  void each(int64_t n, const Body& body) const {
    const auto [first, last] = part_.of(n);
    if (first >= last) return;
    try {
      body(first, last);
    } catch (...) {
#ifdef _OPENMP
#pragma omp critical(pynar_team)
#endif
      error_ = std::current_exception();
    }
  }
  // Until all threads have come here.
  void wait() const {
#ifdef _OPENMP
    if (part_.count > 1) {
#pragma omp barrier
    }
#endif
  }

 private:
  Part part_;
  std::exception_ptr& error_;
};

// Calls work(team) on every thread, or on this one alone if not `shared`; then what it calls may
// have threads of its own.
template <typename Work>
void in_team(bool shared, const Work& work) {
  std::exception_ptr error;
#ifdef _OPENMP
  if (shared && max_threads() > 1 && !omp_in_parallel()) {
#pragma omp parallel
    work(Team(Part{omp_get_thread_num(), omp_get_num_threads()}, error));
  } else {
    work(Team(Part{0, 1}, error));
  }
#else
  work(Team(Part{0, 1}, error));
#endif
  if (error) std::rethrow_exception(error);
}

// Memory that a thread keeps from call to call, at multiples of 64 bytes and with whatever was in
// it.
class Scratch {
 public:
  template <typename T>
  T* get(int64_t count) {
    const size_t bytes = static_cast<size_t>(count) * sizeof(T);
    if (bytes > bytes_) {
      data_.reset();
      bytes_ = 0;  // nothing is there if what follows throws
      data_.reset(static_cast<char*>(::operator new(bytes, kAlignment)));
      bytes_ = bytes;
    }
    return reinterpret_cast<T*>(data_.get());
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(char* p) const { ::operator delete(p, kAlignment); }
  };
  std::unique_ptr<char, Free> data_;
  size_t bytes_ = 0;
};

}  // namespace pynar
