// Root-mean-square norm of rows; float32. A row's sum has one order, whatever the number of rows.

#pragma once

#include <cmath>
#include <cstdint>

#include "vectors.h"

namespace norm {

// As tasks that any thread may take: some rows each.
struct Norm {
  struct Worker {};  // a thread needs nothing of its own

  static constexpr int64_t kTogether = 64;
  const float *x, *scale;  // [M, D], [D]
  float* y;
  int64_t M, D;
  float eps;

  int64_t tasks() const { return (M + kTogether - 1) / kTogether; }
  int64_t helpers() const { return M * D >> 16; }

  void run(int64_t task, Worker&) const {
    for (int64_t m = task * kTogether; m < std::min(M, (task + 1) * kTogether); ++m) one(x + m * D, y + m * D);
  }

  void one(const float* from, float* to) const {
    using namespace vectors;
    Lanes squares{};
    int64_t i = 0;
    for (; i + kLanes <= D; i += kLanes) squares += lanes(from + i) * lanes(from + i);
    float sum = 0.0f;
    for (int j = 0; j < kLanes; ++j) sum += squares[j];
    for (; i < D; ++i) sum += from[i] * from[i];
    const float factor = 1.0f / std::sqrt(sum / static_cast<float>(D) + eps);
    for (i = 0; i < D; ++i) to[i] = from[i] * factor * scale[i];
  }
};

}  // namespace norm
