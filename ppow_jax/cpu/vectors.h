// y[M, N] = x[M, K] times w[N, K] transposed, or times w[K, N], by fused multiply-adds; x and y float32, w bfloat16.
//
// A panel of w (kPanel outputs, kDepth deep) is widened to float32 and laid out by depth in the first-level cache; all
// rows of x are multiplied by it while the next panel is fetched. Every output is one chain of fused multiply-adds
// along the inner dimension.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace vectors {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kRows = 12;  // of 32 registers
#elif defined(__aarch64__)
constexpr int kLanes = 4, kRows = 12;
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int kLanes = 8, kRows = 6;  // of 16 registers
#else
#error "this processor has neither AVX2 with FMA nor NEON"
#endif
constexpr int kPanel = 2 * kLanes;       // outputs that are made together
constexpr int64_t kDepth = 256;          // a panel this deep stays in the first-level cache
constexpr int64_t kRowBlock = 192;       // rows of x that stay in the second-level cache

typedef float Lanes __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(32), aligned(4), may_alias));  // 8 pairs of bfloat16

inline Lanes lanes(const float* p) { return *reinterpret_cast<const Lanes*>(p); }
inline void put(float* p, Lanes v) { *reinterpret_cast<Lanes*>(p) = v; }
inline Words words(const void* p) { return *reinterpret_cast<const Words*>(p); }
inline void put(float* p, Words v) { *reinterpret_cast<Words*>(p) = v; }

// Keeps two vectors in registers. GCC would load them anew for each row, and loads are what there are too few of.
inline void hold([[maybe_unused]] Lanes& a, [[maybe_unused]] Lanes& b) {
#if defined(__x86_64__)
  asm("" : "+v"(a), "+v"(b));
#endif
}

inline float widen(uint16_t bits) {
  const uint32_t word = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

// 8x8 words, transposed by interleaving words, then pairs, then halves: one instruction each with AVX2.
inline void transpose(Words (&r)[8]) {
  Words t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = __builtin_shufflevector(r[i], r[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    t[i + 1] = __builtin_shufflevector(r[i], r[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      r[i + 2 * j] = __builtin_shufflevector(t[i + j], t[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      r[i + 2 * j + 1] = __builtin_shufflevector(t[i + j], t[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = __builtin_shufflevector(r[i], r[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    t[i + 4] = __builtin_shufflevector(r[i], r[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) r[i] = t[i];
}

// panel[k, j] = w[j, k] for 8 rows of w
inline void pack8(const uint16_t* w, int64_t stride, int64_t depth, float* panel) {
  int64_t k = 0;
  for (; k + 16 <= depth; k += 16) {
    Words r[8];
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) r[j] = words(w + j * stride + k);
    transpose(r);
#pragma GCC unroll 8
    for (int p = 0; p < 8; ++p) {  // a word holds two depths, the earlier one low
      put(panel + (k + 2 * p) * kPanel, r[p] << 16);
      put(panel + (k + 2 * p + 1) * kPanel, r[p] & 0xffff0000u);
    }
  }
  for (; k < depth; ++k)
    for (int j = 0; j < 8; ++j) panel[k * kPanel + j] = widen(w[j * stride + k]);
}

// panel[k, j] = w[j, k]
void pack_rows(const uint16_t* w, int64_t stride, int64_t outputs, int64_t depth, float* panel) {
  for (int j = 0; j < kPanel; j += 8) {
    if (j + 8 <= outputs) {
      pack8(w + j * stride, stride, depth, panel + j);
    } else {
      for (int64_t k = 0; k < depth; ++k)
        for (int i = j; i < j + 8; ++i) panel[k * kPanel + i] = i < outputs ? widen(w[i * stride + k]) : 0.0f;
    }
  }
}

// panel[k, j] = w[k, j]
void pack_columns(const uint16_t* w, int64_t stride, int64_t outputs, int64_t depth, float* panel) {
  for (int64_t k = 0; k < depth; ++k, w += stride, panel += kPanel) {
    if (outputs == kPanel) {
      for (int j = 0; j < kPanel; ++j) panel[j] = widen(w[j]);
    } else {
      for (int j = 0; j < kPanel; ++j) panel[j] = j < outputs ? widen(w[j]) : 0.0f;
    }
  }
}

// y[rows, kPanel] = or += x[rows, depth] times panel[depth, kPanel]
struct Tile {
  const float *x, *panel;
  float* y;
  int64_t x_stride, panel_stride, y_stride, depth;
  bool first;                   // whether y begins at zero, or goes on
  const char* ahead = nullptr;  // what to fetch meanwhile, `hop` bytes further at each depth
  int64_t hop = 0;

  template <int R>
  void multiply() const {
    Lanes sum[R][2];
#pragma GCC unroll 16
    for (int m = 0; m < R; ++m) {
      sum[m][0] = first ? Lanes{} : lanes(y + m * y_stride);
      sum[m][1] = first ? Lanes{} : lanes(y + m * y_stride + kLanes);
    }
    for (int64_t k = 0; k < depth; ++k) {
      Lanes b0 = lanes(panel + k * panel_stride), b1 = lanes(panel + k * panel_stride + kLanes);
      __builtin_prefetch(ahead + k * hop, 0, 2);
      hold(b0, b1);
#pragma GCC unroll 16
      for (int m = 0; m < R; ++m) {
        const float a = x[m * x_stride + k];
        sum[m][0] += a * b0;
        sum[m][1] += a * b1;
      }
    }
#pragma GCC unroll 16
    for (int m = 0; m < R; ++m) {
      put(y + m * y_stride, sum[m][0]);
      put(y + m * y_stride + kLanes, sum[m][1]);
    }
  }

  // At most kRows.
  template <int R = kRows>
  void multiply_rows(int64_t rows) const {
    if (rows == R) return multiply<R>();
    if constexpr (R > 1) multiply_rows<R - 1>(rows);
  }
};

// A product as tasks that any thread may take: a panel of outputs for a block of rows each.
template <bool kTransposed>
struct Product {
  struct Worker {};  // a thread needs nothing of its own

  const float* x;
  const uint16_t* w;
  float* y;
  int64_t M, K, N;

  int64_t panels() const { return (N + kPanel - 1) / kPanel; }
  int64_t tasks() const { return panels() * ((M + kRowBlock - 1) / kRowBlock); }

  // How many further threads pay for being woken; laying out w counts as eight rows.
  int64_t helpers() const { return (M + 8) * K * N >> 17; }

  void run(int64_t task, Worker&) const {
    alignas(64) float panel[kDepth * kPanel];
    alignas(64) float edge[kRowBlock * kPanel];  // the outputs of a panel that is not whole
    const int64_t n = task % panels() * kPanel, m0 = task / panels() * kRowBlock;
    const int64_t rows = std::min(M - m0, kRowBlock), outputs = std::min<int64_t>(kPanel, N - n);
    const bool whole = outputs == kPanel;
    float* out = whole ? y + m0 * N + n : edge;
    const int64_t out_stride = whole ? N : kPanel, blocks = (rows + kRows - 1) / kRows;
    for (int64_t k = 0; k < K; k += kDepth) {
      const int64_t depth = std::min(kDepth, K - k);
      if constexpr (kTransposed)
        pack_columns(w + k * N + n, N, outputs, depth, panel);
      else
        pack_rows(w + n * K + k, K, outputs, depth, panel);
      // The rows of the next panel lie side by side; each block of rows of x fetches its share of them.
      const int64_t bytes = kPanel * depth * sizeof *w;
      const char* next = reinterpret_cast<const char*>(w + (n + kPanel) * K) + kPanel * sizeof *w * k;
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t m = rows * b / blocks, end = rows * (b + 1) / blocks;
        const Tile tile{x + (m0 + m) * K + k, panel, out + m * out_stride, K, kPanel, out_stride, depth, k == 0,
                        kTransposed ? nullptr : next + bytes * b / blocks,
                        kTransposed ? 0 : static_cast<int64_t>(kPanel * sizeof *w) / blocks};
        tile.multiply_rows(end - m);
      }
    }
    if (!whole)
      for (int64_t m = 0; m < rows; ++m) std::memcpy(y + (m0 + m) * N + n, edge + m * kPanel, 4 * outputs);
  }
};

}  // namespace vectors
