// parallel_for: the only file that knows OpenMP. torch's own runtime serves it, so torch.set_num_threads counts.
#pragma once
#include <omp.h>
#include <stdint.h>

constexpr int kMostThreads = 256;  // bounds the stack that a loop's counters take: 16 KiB

// Not OpenMP's number of the thread: a loop inside someone else's parallel region is serial, whichever thread runs it.
static thread_local int number_in_loop = 0;

// A loop's tasks in a parallel region. Each thread has a range of tasks of its own, so that it finds in its cache what
// it had there the last time, and takes them one at a time; then it helps the others: a core that is taken away for a
// while costs one task.
class SharedTasks {
 public:
  SharedTasks(int64_t tasks, int threads) : tasks_(tasks), threads_(threads) {
    for (int t = 0; t < threads; ++t) next_[t].task = t * tasks / threads;
  }

  template <class Body>
  void run(int thread, const Body& body) {
    for (int i = 0; i < threads_; ++i) {
      int owner = (thread + i) % threads_;
      int64_t end = (owner + 1) * tasks_ / threads_;
      for (int64_t task; (task = __atomic_fetch_add(&next_[owner].task, 1, __ATOMIC_RELAXED)) < end;) body(task);
    }
  }

 private:
  struct alignas(64) Next {
    int64_t task;
  };
  int64_t tasks_;
  int threads_;
  Next next_[kMostThreads];
};

// Runs first(task) for task in [0, first_tasks) and then, when all of those are done, body(task) for task in [0,
// tasks), in one parallel region. Serial when `worth_it` is false, inside another parallel region, or with one thread.
template <class First, class Body>
inline void parallel_for_after(int64_t first_tasks, const First& first, int64_t tasks, bool worth_it,
                               const Body& body) {
  int64_t most = first_tasks > tasks ? first_tasks : tasks;
  int threads = worth_it && most > 1 && !omp_in_parallel() ? omp_get_max_threads() : 1;
  if (threads > most) threads = static_cast<int>(most);
  if (threads > kMostThreads) threads = kMostThreads;
  if (threads == 1) {
    for (int64_t i = 0; i < first_tasks; ++i) first(i);
    for (int64_t i = 0; i < tasks; ++i) body(i);
    return;
  }
  SharedTasks before(first_tasks, threads), after(tasks, threads);
#pragma omp parallel num_threads(threads)
  {
    number_in_loop = omp_get_thread_num();
    if (first_tasks > 0) {  // a counter without tasks still costs its line, from another core 0.2 us
      before.run(number_in_loop, first);
#pragma omp barrier
    }
    after.run(number_in_loop, body);
    number_in_loop = 0;
  }
}

// Runs body(task) for task in [0, tasks); the rest as for parallel_for_after.
template <class Body>
inline void parallel_for(int64_t tasks, bool worth_it, const Body& body) {
  parallel_for_after(0, [](int64_t) {}, tasks, worth_it, body);
}

inline int max_threads() { return omp_in_parallel() ? 1 : omp_get_max_threads(); }

// The caller's number in the running parallel_for: 0 <= thread_index() < max_threads().
inline int thread_index() { return number_in_loop; }
