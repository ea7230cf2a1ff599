// parallel_for: the only file that knows OpenMP. torch's own runtime serves it, so torch.set_num_threads counts.
#pragma once
#include <omp.h>
#include <stdint.h>

constexpr int kMostThreads = 256;  // bounds the stack that the tasks' counters take: 16 KiB

// Not OpenMP's number of the thread: a loop inside someone else's parallel region is serial, whichever thread runs it.
static thread_local int number_in_loop = 0;

// Runs body(task) for task in [0, tasks). Serial when `worth_it` is false, inside another parallel region, or with
// one thread. Each thread has a range of tasks of its own, so that it finds in its cache what it had there the last
// time, and takes them one at a time; then it helps the others: a core that is taken away for a while costs one task.
template <class Body>
inline void parallel_for(int64_t tasks, bool worth_it, const Body& body) {
  int threads = worth_it && tasks > 1 && !omp_in_parallel() ? omp_get_max_threads() : 1;
  if (threads > tasks) threads = static_cast<int>(tasks);
  if (threads > kMostThreads) threads = kMostThreads;
  if (threads == 1) {
    for (int64_t i = 0; i < tasks; ++i) body(i);
    return;
  }
  struct alignas(64) Next {
    int64_t task;
  } next[kMostThreads];
  for (int t = 0; t < threads; ++t) next[t].task = t * tasks / threads;
#pragma omp parallel num_threads(threads)
  {
    int mine = number_in_loop = omp_get_thread_num();
    for (int i = 0; i < threads; ++i) {
      int owner = (mine + i) % threads;
      int64_t end = (owner + 1) * tasks / threads;
      for (int64_t task; (task = __atomic_fetch_add(&next[owner].task, 1, __ATOMIC_RELAXED)) < end;) body(task);
    }
    number_in_loop = 0;
  }
}

inline int max_threads() { return omp_in_parallel() ? 1 : omp_get_max_threads(); }

// The caller's number in the running parallel_for: 0 <= thread_index() < max_threads().
inline int thread_index() { return number_in_loop; }
