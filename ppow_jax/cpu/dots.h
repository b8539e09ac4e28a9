// Products of bfloat16 by the dot products of AVX-512 (vdpbf16ps): 32 of them an instruction, twice what float32 gives.

#pragma once

#include "pairs.h"

#if defined(PPOW_PAIRS) && defined(__AVX512BF16__)
#define PPOW_DOTS 1

namespace dots {

class Machine {
 public:
  static constexpr int kRows = 12, kUnit = 1;  // 2 sums a row, of 32 registers
  static constexpr int kReading = 16, kHelperBits = 18;

  void multiply(const pairs::Part& part) { multiply_rows(part); }

 private:
  // At most kRows.
  template <int R = kRows>
  static void multiply_rows(const pairs::Part& part) {
    if (part.rows == R) return multiply_all<R>(part);
    if constexpr (R > 1) multiply_rows<R - 1>(part);
  }

  template <int R>
  static void multiply_all(const pairs::Part& part) {
    __m512 sum[R][2];
#pragma GCC unroll 16
    for (int m = 0; m < R; ++m) sum[m][0] = sum[m][1] = _mm512_setzero_ps();
    auto step = [&](const uint16_t* x, int64_t stride, const uint16_t* block) {
      for (int p = 0; p < pairs::kSide; ++p) {
        const auto left = (__m512bh)_mm512_load_si512(block + p * pairs::kDeep);
        const auto right = (__m512bh)_mm512_load_si512(block + pairs::kBlock + p * pairs::kDeep);
#pragma GCC unroll 16
        for (int m = 0; m < R; ++m) {
          int32_t pair;
          std::memcpy(&pair, x + m * stride + 2 * p, sizeof pair);
          const auto a = (__m512bh)_mm512_set1_epi32(pair);
          sum[m][0] = _mm512_dpbf16_ps(sum[m][0], a, left);
          sum[m][1] = _mm512_dpbf16_ps(sum[m][1], a, right);
        }
      }
    };
    for (int64_t s = 0; s < part.whole; ++s)
      step(part.x + s * pairs::kDeep, part.x_stride, part.panel + s * 2 * pairs::kBlock);
    if (part.tail) step(part.tail, pairs::kDeep, part.panel + part.whole * 2 * pairs::kBlock);
#pragma GCC unroll 16
    for (int m = 0; m < R; ++m) {
      _mm512_storeu_ps(part.y + m * part.y_stride, sum[m][0]);
      _mm512_storeu_ps(part.y + m * part.y_stride + pairs::kSide, sum[m][1]);
    }
  }
};

}  // namespace dots

#endif
