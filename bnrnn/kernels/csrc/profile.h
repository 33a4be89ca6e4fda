// Where the time of a thread goes, in a build with -DBNRNN_PROFILE (bench/profile.py). Otherwise
// nothing of this is compiled.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>

namespace bnrnn {

enum class Part {
  kPacking, kInputTerm, kProduct, kCell, kState, kOutput, kBackwardState, kBackwardCell,
  kBackwardTerms, kGradInput, kBackwardProduct, kWeightGradient, kBarrier, kCount
};

#if defined(BNRNN_PROFILE)

// Nanoseconds of all threads.
inline std::array<std::atomic<int64_t>, static_cast<size_t>(Part::kCount)> spent;

class Laps {
 public:
  // Attribute the time since the previous lap to `part`.
  void lap(Part part) {
    const auto now = std::chrono::steady_clock::now();
    of[static_cast<size_t>(part)] += std::chrono::nanoseconds(now - last).count();
    last = now;
  }
  ~Laps() {
    for (size_t i = 0; i < of.size(); ++i) spent[i] += of[i];
  }

 private:
  std::chrono::steady_clock::time_point last = std::chrono::steady_clock::now();
  std::array<int64_t, static_cast<size_t>(Part::kCount)> of = {};
};

#else

struct Laps {
  void lap(Part) {}
};

#endif

}  // namespace bnrnn
