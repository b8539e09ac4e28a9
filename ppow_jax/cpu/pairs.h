// y[M, N] = x[M, K] times w[N, K] transposed, or times w[K, N], on processors that multiply pairs of bfloat16: the dot
// products of AVX-512 (dots.h) and the tiles of AMX (tiles.h). x and w bfloat16, y float32.
//
// A panel of w (32 outputs) is laid out as blocks of 16 outputs by 16 pairs of depths, then all rows of x are multiplied
// by it. Every output is one chain of sums along the inner dimension, so other rows do not change it.

#pragma once

#if defined(__AVX512BW__)
#define PPOW_PAIRS 1

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace pairs {

constexpr int kSide = 16;             // outputs, and pairs of depths, of a block
constexpr int kDeep = 2 * kSide;      // depths of a block
constexpr int kBlock = kSide * kDeep; // bfloat16 values in a block
constexpr int kPanel = 2 * kSide;     // outputs that are made together
constexpr int64_t kRowBlock = 256;    // rows of x that stay in the second-level cache

// 16x16 words transposed, by interleaving words, pairs, then quarters.
inline void transpose(__m512i (&r)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {  // row 4i + j holds columns j, 4 + j, 8 + j, 12 + j of rows 4i to 4i + 3
    const __m512i a = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88), b = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
    const __m512i c = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd), d = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
    t[j] = _mm512_shuffle_i32x4(a, b, 0x88);
    t[8 + j] = _mm512_shuffle_i32x4(a, b, 0xdd);
    t[4 + j] = _mm512_shuffle_i32x4(c, d, 0x88);
    t[12 + j] = _mm512_shuffle_i32x4(c, d, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}

// block[p, j] = the pair (w[j, 2p], w[j, 2p + 1]); zero beyond what there is
inline void pack_rows(const uint16_t* w, int64_t stride, int64_t outputs, int64_t depth, uint16_t* block) {
  const __mmask32 mask = depth >= kDeep ? ~0u : (1u << depth) - 1;
  __m512i r[16];
  if (outputs >= kSide && depth >= kDeep) {
#pragma GCC unroll 16
    for (int j = 0; j < 16; ++j) r[j] = _mm512_loadu_si512(w + j * stride);
  } else {
    for (int j = 0; j < 16; ++j) r[j] = _mm512_maskz_loadu_epi16(j < outputs ? mask : 0, w + j * stride);
  }
  transpose(r);
#pragma GCC unroll 16
  for (int p = 0; p < 16; ++p) _mm512_store_si512(block + p * kDeep, r[p]);
}

// left[p, j], right[p, j] = the pair (w[2p, j], w[2p + 1, j]), of the first and the next 16 outputs
inline void pack_columns(const uint16_t* w, int64_t stride, int64_t outputs, int64_t depth, uint16_t* left,
                         uint16_t* right) {
  alignas(64) static constexpr auto order = [] {
    struct { uint16_t of[2][32]; } o{};
    for (int i = 0; i < 32; ++i)
      for (int h = 0; h < 2; ++h) o.of[h][i] = i / 2 + 16 * h + 32 * (i % 2);
    return o;
  }();
  const __mmask32 mask = outputs >= kPanel ? ~0u : (1u << outputs) - 1;
  for (int p = 0; p < 16; ++p, w += 2 * stride) {
    const __m512i a = _mm512_maskz_loadu_epi16(2 * p < depth ? mask : 0, w);
    const __m512i b = _mm512_maskz_loadu_epi16(2 * p + 1 < depth ? mask : 0, w + stride);
    _mm512_store_si512(left + p * kDeep, _mm512_permutex2var_epi16(a, _mm512_load_si512(order.of[0]), b));
    _mm512_store_si512(right + p * kDeep, _mm512_permutex2var_epi16(a, _mm512_load_si512(order.of[1]), b));
  }
}

// Memory for a panel, aligned; kept from call to call: fresh memory costs a page fault every 4 kB.
inline uint16_t* panel_memory(int64_t values) {
  thread_local std::vector<uint16_t> memory;
  if (static_cast<int64_t>(memory.size()) < values + kDeep) memory.resize(values + kDeep);
  return reinterpret_cast<uint16_t*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) & ~uintptr_t{63});
}

// What a machine multiplies: `rows` rows of x by a panel. The last depths, where K is not whole blocks, lie in `tail`,
// with zeros after them; 0 where it is.
struct Part {
  const uint16_t *x, *tail, *panel;
  float* y;
  int64_t x_stride, y_stride, rows, whole;
};

// A product as tasks that any thread may take: a panel of outputs for a block of rows each.
//
// Machine: what a thread holds while it works on one product. It multiplies a Part of at most Machine::kRows rows;
// Machine::kUnit rows cost it as much as one; reading w takes it as long as multiplying by Machine::kReading rows.
template <class Machine, bool kTransposed>
struct Product {
  using Worker = Machine;

  const uint16_t *x, *w;
  float* y;
  int64_t M, K, N;

  int64_t panels() const { return (N + kPanel - 1) / kPanel; }
  int64_t tasks() const { return panels() * ((M + kRowBlock - 1) / kRowBlock); }

  // How many further threads pay for being woken.
  int64_t helpers() const { return (M + Machine::kReading) * K * N >> Machine::kHelperBits; }

  void run(int64_t task, Machine& machine) const {
    const int64_t n = task % panels() * kPanel, m0 = task / panels() * kRowBlock, rows = std::min(M - m0, kRowBlock);
    const int64_t outputs = std::min<int64_t>(kPanel, N - n), steps = (K + kDeep - 1) / kDeep;
    uint16_t* panel = panel_memory(steps * 2 * kBlock);
    for (int64_t s = 0; s < steps; ++s) {
      uint16_t *left = panel + s * 2 * kBlock, *right = left + kBlock;
      const int64_t k = s * kDeep, depth = std::min<int64_t>(kDeep, K - k);
      if constexpr (kTransposed) {
        pack_columns(w + k * N + n, N, outputs, depth, left, right);
      } else {
        // the rows of the next panel lie side by side; each step fetches its share of them
        const char* next = reinterpret_cast<const char*>(w + (n + kPanel) * K + s * kPanel * kDeep);
#pragma GCC unroll 4
        for (int line = 0; line < kPanel; ++line) _mm_prefetch(next + 64 * line, _MM_HINT_T1);
        pack_rows(w + n * K + k, K, outputs, depth, left);
        pack_rows(w + (n + kSide) * K + k, K, outputs - kSide, depth, right);
      }
    }
    const int64_t units = (rows + Machine::kUnit - 1) / Machine::kUnit, parts = (rows + Machine::kRows - 1) / Machine::kRows;
    for (int64_t p = 0; p < parts; ++p) {
      const int64_t m = units * p / parts * Machine::kUnit, end = std::min(rows, units * (p + 1) / parts * Machine::kUnit);
      multiply(m0 + m, end - m, n, panel, machine);
    }
  }

  void multiply(int64_t m, int64_t rows, int64_t n, const uint16_t* panel, Machine& machine) const {
    alignas(64) uint16_t tail[Machine::kRows * kDeep];
    alignas(64) float edge[Machine::kRows * kPanel];  // the outputs of a panel that is not whole
    const int64_t whole = K / kDeep, rest = K % kDeep, outputs = std::min<int64_t>(kPanel, N - n);
    if (rest) {
      std::memset(tail, 0, sizeof tail);
      for (int64_t r = 0; r < rows; ++r) std::memcpy(tail + r * kDeep, x + (m + r) * K + whole * kDeep, 2 * rest);
    }
    float* out = outputs == kPanel ? y + m * N + n : edge;
    machine.multiply({x + m * K, rest ? tail : nullptr, panel, out, K, outputs == kPanel ? N : kPanel, rows, whole});
    if (outputs < kPanel)
      for (int64_t r = 0; r < rows; ++r) std::memcpy(y + (m + r) * N + n, edge + r * kPanel, 4 * outputs);
  }
};

}  // namespace pairs

#endif
