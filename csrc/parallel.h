// parallel_for: the only file that knows OpenMP. torch's own runtime serves it, so torch.set_num_threads counts.
#pragma once
#include <omp.h>
#include <stdint.h>

// Runs body(task) for task in [0, tasks). Serial when `worth_it` is false, inside another parallel region, or with
// one thread. Tasks are handed out one at a time: a core that is taken away for a while costs one task, not half.
template <class Body>
inline void parallel_for(int64_t tasks, bool worth_it, const Body& body) {
  int threads = worth_it && tasks > 1 && !omp_in_parallel() ? omp_get_max_threads() : 1;
  if (threads == 1) {
    for (int64_t i = 0; i < tasks; ++i) body(i);
    return;
  }
  if (threads > tasks) threads = static_cast<int>(tasks);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t i = 0; i < tasks; ++i) body(i);
}

inline int max_threads() { return omp_in_parallel() ? 1 : omp_get_max_threads(); }

// The caller's number in the running parallel_for: 0 <= thread_index() < max_threads().
inline int thread_index() { return omp_get_thread_num(); }
