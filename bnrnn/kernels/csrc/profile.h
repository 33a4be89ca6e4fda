// Where the time of the threads goes, in a build with -DBNRNN_PROFILE (bench/profile.py). Otherwise
// a `Laps` does nothing.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>

namespace bnrnn {

enum class Part : size_t {
  kPacking,
  kInputTerm,
  kProduct,
  kMoments,
  kCell,
  kState,
  kOutput,
  kBackwardState,
  kBackwardCell,
  kBackwardTerms,
  kGradInput,
  kBackwardProduct,
  kWeightGradient,
  kBarrier,
  kCount
};
constexpr auto kParts = static_cast<size_t>(Part::kCount);

constexpr std::array<const char*, kParts> kPartNames = {
    "packing the weights",
    "forward and backward: the input term",
    "forward: W_h h_{t-1}",
    "forward: moments",
    "forward: gates, c_t",
    "forward: BN(c_t), h_t",
    "layout of the output and its gradient",
    "backward: the gates again, to the gradient of BN(c_t)",
    "backward: to the gradients of the gates",
    "backward: to the gradients of the products",
    "backward: gradients of the input and of W_x",
    "backward: W_h^T times the gradient",
    "backward: the gradient of W_h",
    "waiting for other threads",
};

#if defined(BNRNN_PROFILE)

inline std::array<std::atomic<int64_t>, kParts> spent;  // nanoseconds of all threads

class Laps {
 public:
  // Attribute the time since the previous lap to `part`.
  void lap(Part part) {
    const auto now = std::chrono::steady_clock::now();
    of[static_cast<size_t>(part)] += std::chrono::nanoseconds(now - last).count();
    last = now;
  }
  ~Laps() {
    for (size_t i = 0; i < kParts; ++i) spent[i] += of[i];
  }

 private:
  std::chrono::steady_clock::time_point last = std::chrono::steady_clock::now();
  std::array<int64_t, kParts> of = {};
};

#else

struct Laps {
  void lap(Part) {}
};

#endif

}  // namespace bnrnn
