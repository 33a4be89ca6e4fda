#pragma once

#if !defined(_WIN32)
#include <sched.h>
#endif

#include <atomic>

namespace bnrnn {

// A barrier for all threads. Between `arrive` and `wait`, a thread does work that the others do not
// wait for, so that none is idle because another was a little slower. It spins only briefly and
// then yields: on a shared machine, a waiting thread must not take the processor from the thread it
// waits for.
class Barrier {
 public:
  void expect(int threads) { threads_ = threads; }

  // Returns the argument of `wait`.
  unsigned arrive() {
    const unsigned round = round_.load(std::memory_order_relaxed);
    if (waiting_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
      waiting_.store(0, std::memory_order_relaxed);
      round_.fetch_add(1, std::memory_order_release);
    }
    return round;
  }

  void wait() { wait(arrive()); }

  void wait(unsigned round) const {
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins) {
      if (spins < kSpins) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
      } else {
#if !defined(_WIN32)
        sched_yield();
#endif
      }
    }
  }

 private:
  static constexpr int kSpins = 2000;
  int threads_ = 1;
  alignas(64) std::atomic<int> waiting_{0};
  alignas(64) std::atomic<unsigned> round_{0};
};

}  // namespace bnrnn
