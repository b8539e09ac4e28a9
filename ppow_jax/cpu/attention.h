// Softmax attention over several blocks of keys as if they were one; float32. See attention.py.
//
// Scores of a piece of keys, their exponentials and their share of the output are made while the piece is in the
// caches, with a running maximum (Flash attention, 2205.14135); a piece that no query sees is not read. A query's result
// does not depend on the others.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "vectors.h"

namespace attention {

using vectors::kPanel;
using vectors::Lanes;
using vectors::kLanes;

constexpr int64_t kKeys = 128;    // keys of a piece; a multiple of kPanel
// Queries of all heads of a group that are answered together, if the group allows: many read the keys less often, few
// leave something for every thread.
constexpr int64_t kMany = 48, kFew = 12;
constexpr float kNothing = -std::numeric_limits<float>::infinity();

typedef int32_t Integers __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef uint8_t Bytes __attribute__((vector_size(kLanes), aligned(1), may_alias));

// e^x for x <= 0, to about a unit in the last place; 0 below -87, nan of nan.
inline Lanes exponential(Lanes x) {
  const Lanes low = Lanes{} - 87.0f;
  const Lanes bounded = x < low ? low : x;
  const Lanes shifted = bounded * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer in the low bits
  const Lanes n = shifted - 12582912.0f;
  const Lanes r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  Lanes p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Integers power = ((Integers)shifted + 127) << 23;  // the low bits of `shifted` hold n
  return x < low ? Lanes{} : p * (Lanes)power;
}

struct Block {
  const float *k, *v;  // [B, Kv, d, L], [B, Kv, L, d]
  const bool* mask;    // [B, S, L]
  int64_t L;
};

// As tasks that any thread may take: one head of keys, and some queries of one row of the batch.
struct Attention {
  const float* q;  // [B, S, H, d]
  float* out;
  int64_t B, S, H, d, Kv;
  const std::vector<Block>* blocks;

  // A thread's memory, kept from call to call.
  class Worker {
   public:
    void reserve(int64_t floats) {
      used_ = 0;
      if (static_cast<int64_t>(memory().size()) < floats) memory().resize(floats);
    }
    float* take(int64_t floats) { return memory().data() + std::exchange(used_, used_ + floats); }

   private:
    static std::vector<float>& memory() {
      thread_local std::vector<float> memory;
      return memory;
    }
    int64_t used_ = 0;
  };

  int64_t group() const { return H / Kv; }
  int64_t together() const { return std::max<int64_t>(1, (B * S * group() > 4 * kMany ? kMany : kFew) / group()); }
  int64_t query_blocks() const { return (S + together() - 1) / together(); }
  int64_t tasks() const { return B * Kv * query_blocks(); }
  int64_t keys() const {
    int64_t sum = 0;
    for (const Block& block : *blocks) sum += block.L;
    return sum;
  }
  // How many further threads pay for being woken.
  int64_t helpers() const { return B * Kv * keys() * d * (S * group() + 4) >> 18; }

  void run(int64_t task, Worker& worker) const {
    const int64_t b = task / query_blocks() / Kv, head = task / query_blocks() % Kv;
    const int64_t s0 = task % query_blocks() * together(), queries = std::min(together(), S - s0), g = group();
    const int64_t rows = queries * g, width = (d + kPanel - 1) / kPanel * kPanel;
    worker.reserve(rows * (d + width + kKeys + 2) + kPanel * std::max(d, kKeys));
    float *asked = worker.take(rows * d), *sums = worker.take(rows * width), *weights = worker.take(rows * kKeys);
    float *top = worker.take(rows), *total = worker.take(rows), *edge = worker.take(kPanel * std::max(d, kKeys));

    const float scale = 1.0f / std::sqrt(static_cast<float>(d));
    for (int64_t r = 0; r < rows; ++r) {
      const float* from = q + ((b * S + s0 + r / g) * H + head * g + r % g) * d;
      for (int64_t i = 0; i < d; ++i) asked[r * d + i] = from[i] * scale;
    }
    std::fill(sums, sums + rows * width, 0.0f);
    std::fill(top, top + rows, kNothing);
    std::fill(total, total + rows, 0.0f);
    for (const Block& block : *blocks) {
      const float* k = block.k + (b * Kv + head) * d * block.L;
      const float* v = block.v + (b * Kv + head) * block.L * d;
      for (int64_t l = 0; l < block.L; l += kKeys) {
        const int64_t keys = std::min(kKeys, block.L - l);
        const bool* mask = block.mask + (b * S + s0) * block.L + l;
        if (!any(mask, queries, block.L, keys)) continue;
        score(asked, k + l, block.L, rows, keys, weights, edge);
        for (int64_t r = 0; r < rows; ++r)
          weigh(weights + r * kKeys, mask + r / g * block.L, keys, top[r], total[r], sums + r * width, width);
        add_values(weights, v + l * d, rows, keys, sums, width, edge);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      float* to = out + ((b * S + s0 + r / g) * H + head * g + r % g) * d;
      const float share = total[r] == 0.0f ? 0.0f : 1.0f / total[r];  // 0: sees nothing
      for (int64_t i = 0; i < d; ++i) to[i] = sums[r * width + i] * share;
    }
  }

  static bool any(const bool* mask, int64_t queries, int64_t stride, int64_t keys) {
    for (int64_t s = 0; s < queries; ++s)
      if (std::memchr(mask + s * stride, 1, keys)) return true;
    return false;
  }

  // scores[r, j] = asked[r] . k[:, j]
  void score(const float* asked, const float* k, int64_t stride, int64_t rows, int64_t keys, float* scores,
             float* edge) const {
    for (int64_t j = 0; j < keys; j += kPanel) {
      const bool whole = keys - j >= kPanel;
      if (!whole) copy(k + j, stride, d, keys - j, edge);
      multiply(asked, d, whole ? k + j : edge, whole ? stride : kPanel, d, rows, true, scores + j, kKeys);
    }
  }

  // sums[r] += weights[r] . v
  void add_values(const float* weights, const float* v, int64_t rows, int64_t keys, float* sums, int64_t width,
                  float* edge) const {
    for (int64_t i = 0; i < d; i += kPanel) {
      const bool whole = d - i >= kPanel;
      if (!whole) copy(v + i, d, keys, d - i, edge);
      multiply(weights, kKeys, whole ? v + i : edge, whole ? d : kPanel, keys, rows, false, sums + i, width);
    }
  }

  // A panel that is not whole, with zeros beside it.
  static void copy(const float* from, int64_t stride, int64_t depth, int64_t columns, float* to) {
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t j = 0; j < kPanel; ++j) to[k * kPanel + j] = j < columns ? from[k * stride + j] : 0.0f;
  }

  static void multiply(const float* x, int64_t x_stride, const float* panel, int64_t panel_stride, int64_t depth,
                       int64_t rows, bool first, float* y, int64_t y_stride) {
    const int64_t blocks = (rows + vectors::kRows - 1) / vectors::kRows;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t m = rows * b / blocks, end = rows * (b + 1) / blocks;
      vectors::Tile{x + m * x_stride, panel, y + m * y_stride, x_stride, panel_stride, y_stride, depth, first}
          .multiply_rows(end - m);
    }
  }

  // Scores become exponentials; what was summed before is scaled to the new maximum.
  static void weigh(float* scores, const bool* mask, int64_t keys, float& top, float& total, float* sums,
                    int64_t width) {
    uint8_t sees[kKeys] = {};
    std::memcpy(sees, mask, keys);
    Lanes most = Lanes{} + top;
    for (int64_t j = 0; j < kKeys; j += kLanes) {
      const auto seen = __builtin_convertvector(*reinterpret_cast<const Bytes*>(sees + j), Integers) != 0;
      const Lanes score = seen ? vectors::lanes(scores + j) : Lanes{} + kNothing;
      vectors::put(scores + j, score);
      most = score > most ? score : most;
    }
    float highest = most[0];
    for (int i = 1; i < kLanes; ++i) highest = most[i] > highest ? most[i] : highest;
    const float scale = top == highest ? 1.0f : std::exp(top - highest);
    const Lanes offset = Lanes{} + (highest == kNothing ? 0.0f : highest);  // where nothing is seen yet
    Lanes sum{};
    for (int64_t j = 0; j < kKeys; j += kLanes) {
      const Lanes e = exponential(vectors::lanes(scores + j) - offset);
      vectors::put(scores + j, e);
      sum += e;
    }
    float added = 0.0f;
    for (int i = 0; i < kLanes; ++i) added += sum[i];
    total = total * scale + added;
    if (scale != 1.0f)
      for (int64_t i = 0; i < width; ++i) sums[i] *= scale;
    top = highest;
  }
};

}  // namespace attention
