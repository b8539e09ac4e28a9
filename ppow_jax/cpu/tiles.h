// y[M, N] = x[M, K] times w[N, K] transposed, or times w[K, N], by AMX tiles; x and w bfloat16, y float32.
//
// A panel of w (32 outputs) is laid out as tiles of 16 outputs by 16 pairs of depths; up to 32 rows of x at a time are
// multiplied by it, straight from memory, and y is written straight from the tiles. Every output is one chain of tile
// products along the inner dimension, so other rows do not change it.

#pragma once

#if defined(__AMX_BF16__) && defined(__AVX512BW__) && defined(__linux__)
#define PPOW_TILES 1

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace tiles {

constexpr int kSide = 16;               // rows of a tile; its rows are 64 bytes
constexpr int kDeep = 2 * kSide;        // bfloat16 values in a row of a tile
constexpr int kPanel = 2 * kSide;       // outputs that are made together
constexpr int kTile = kSide * kDeep;    // bfloat16 values in a tile
constexpr int kPair = 2 * kSide;        // rows of x that are multiplied together
constexpr int64_t kRowBlock = 256;      // rows of x that stay in the second-level cache

// Linux lends the tile registers on request, to the whole process.
inline bool permitted() {
  static const bool granted = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0;
  return granted;
}

// What a thread needs while it works on one product: tile registers of its own, and a panel.
class Worker {
 public:
  ~Worker() {
    if (configured_) _tile_release();
  }

  uint16_t* panel(int64_t values) {
    // kept from call to call: fresh memory costs a page fault every 4 kB
    thread_local std::vector<uint16_t> memory;
    if (static_cast<int64_t>(memory.size()) < values + kDeep) memory.resize(values + kDeep);
    return reinterpret_cast<uint16_t*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) & ~uintptr_t{63});
  }

  // Rows of x in the two halves of a pair; 0 for a half that is not there.
  void configure(int first, int second) {
    if (configured_ && first == first_ && second == second_) return;
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    const int rows[8] = {first, first, std::max(second, 1), std::max(second, 1), first, std::max(second, 1), kSide, kSide};
    for (int t = 0; t < 8; ++t) {
      config.bytes[t] = 64;
      config.rows[t] = rows[t];
    }
    asm volatile("" : : "r"(&config) : "memory");  // all of it is read, GCC believes a part
    _tile_loadconfig(&config);
    configured_ = true, first_ = first, second_ = second;
  }

 private:
  bool configured_ = false;
  int first_ = 0, second_ = 0;
};

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

// tile[p, j] = the pair (w[j, 2p], w[j, 2p + 1]); zero beyond what there is
inline void pack_rows(const uint16_t* w, int64_t stride, int64_t outputs, int64_t depth, uint16_t* tile) {
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
  for (int p = 0; p < 16; ++p) _mm512_store_si512(tile + p * kDeep, r[p]);
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

// A product as tasks that any thread may take: a panel of outputs for a block of rows each.
template <bool kTransposed>
struct Product {
  using Worker = tiles::Worker;

  const uint16_t *x, *w;
  float* y;
  int64_t M, K, N;

  int64_t panels() const { return (N + kPanel - 1) / kPanel; }
  int64_t tasks() const { return panels() * ((M + kRowBlock - 1) / kRowBlock); }

  // How many further threads pay for being woken: reading w takes as long as multiplying it by 64 rows.
  int64_t helpers() const { return (M + 64) * K * N >> 22; }

  void run(int64_t task, Worker& worker) const {
    const int64_t n = task % panels() * kPanel, m0 = task / panels() * kRowBlock, rows = std::min(M - m0, kRowBlock);
    const int64_t outputs = std::min<int64_t>(kPanel, N - n), steps = (K + kDeep - 1) / kDeep;
    uint16_t* panel = worker.panel(steps * 2 * kTile);
    for (int64_t s = 0; s < steps; ++s) {
      uint16_t *left = panel + s * 2 * kTile, *right = left + kTile;
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
    for (int64_t m = 0; m < rows; m += kPair) multiply(m0 + m, std::min<int64_t>(kPair, rows - m), n, panel, worker);
  }

  void multiply(int64_t m, int64_t rows, int64_t n, const uint16_t* panel, Worker& worker) const {
    alignas(64) uint16_t tail[kPair * kDeep];  // the last depths of x, with zeros after them
    alignas(64) float edge[kPair * kPanel];    // the outputs of a panel that is not whole
    const int64_t whole = K / kDeep, rest = K % kDeep, outputs = std::min<int64_t>(kPanel, N - n);
    const bool both = rows > kSide;
    if (rest) {
      std::memset(tail, 0, sizeof tail);
      for (int64_t r = 0; r < rows; ++r) std::memcpy(tail + r * kDeep, x + (m + r) * K + whole * kDeep, 2 * rest);
    }
    worker.configure(std::min<int64_t>(rows, kSide), rows - kSide);
    asm volatile("" ::: "memory");  // the compiler does not know that tiles read memory
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    auto step = [&](const uint16_t* a, int64_t stride, const uint16_t* b) {
      _tile_loadd(6, b, 64);
      _tile_loadd(7, b + kTile, 64);
      _tile_loadd(4, a, 2 * stride);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if (both) {
        _tile_loadd(5, a + kSide * stride, 2 * stride);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    };
    for (int64_t s = 0; s < whole; ++s) step(x + m * K + s * kDeep, K, panel + s * 2 * kTile);
    if (rest) step(tail, kDeep, panel + whole * 2 * kTile);

    float* out = outputs == kPanel ? y + m * N + n : edge;
    const int64_t out_stride = outputs == kPanel ? N : kPanel;
    _tile_stored(0, out, 4 * out_stride);
    _tile_stored(1, out + kSide, 4 * out_stride);
    if (both) {
      _tile_stored(2, out + kSide * out_stride, 4 * out_stride);
      _tile_stored(3, out + kSide * out_stride + kSide, 4 * out_stride);
    }
    asm volatile("" ::: "memory");
    if (outputs < kPanel)
      for (int64_t r = 0; r < rows; ++r) std::memcpy(y + (m + r) * N + n, edge + r * kPanel, 4 * outputs);
  }
};

}  // namespace tiles

#endif
