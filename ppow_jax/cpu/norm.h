// What root-mean-square norms divide by; float32. A row's sum has one order, whatever the number of rows.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "vectors.h"

namespace norm {

// factor[m] = 1 / sqrt(mean of x[m]^2 + eps), as tasks that any thread may take: some rows each.
struct Factor {
  struct Worker {};  // a thread needs nothing of its own

  static constexpr int64_t kTogether = 64;
  const float* x;  // [M, D]
  float* factor;
  int64_t M, D;
  float eps;

  int64_t tasks() const { return (M + kTogether - 1) / kTogether; }
  int64_t helpers() const { return M * D >> 17; }

  void run(int64_t task, Worker&) const {
    for (int64_t m = task * kTogether; m < std::min(M, (task + 1) * kTogether); ++m) factor[m] = of(x + m * D);
  }

  float of(const float* row) const {
    vectors::Lanes squares{};
    int64_t i = 0;
    for (; i + vectors::kLanes <= D; i += vectors::kLanes) {
      const vectors::Lanes part = vectors::lanes(row + i);
      squares += part * part;
    }
    float sum = 0.0f;
    for (int j = 0; j < vectors::kLanes; ++j) sum += squares[j];
    for (; i < D; ++i) sum += row[i] * row[i];
    return 1.0f / std::sqrt(sum / static_cast<float>(D) + eps);
  }
};

}  // namespace norm
