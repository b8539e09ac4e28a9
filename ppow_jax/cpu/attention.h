// Softmax attention over several blocks of keys as if they were one; float32. See attention.py.
//
// Pieces of keys that no query sees are not read. A query's result depends neither on other queries, nor on how its keys
// are cut into blocks, nor on keys between them that it does not see: the maximum is that of all scores, the sum of the
// weights is exact (in multiples of 2^-40), and each output is one chain of fused multiply-adds in the order of the keys,
// in which an unseen key adds nothing. So a token gets the same bits whether its predecessors lie in the cache, in a
// window that is being verified, or on a path of a tree.

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

constexpr int64_t kKeys = 128;  // keys of a piece; a multiple of kPanel
// Queries of all heads of a group that are answered together, if the group allows: many read the keys less often, few
// leave something for every thread. Their weights are to stay in the second-level cache.
constexpr int64_t kMany = 48, kFew = 12, kWeights = 1 << 18;
constexpr float kNothing = -std::numeric_limits<float>::infinity();

typedef int32_t Integers __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef double Doubles __attribute__((vector_size(8 * kLanes), aligned(8), may_alias));
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
  int64_t together() const {
    const int64_t rows = B * S * group() > 4 * kMany ? std::min(kMany, kWeights / keys()) : kFew;
    return std::max<int64_t>(1, rows / group());
  }
  int64_t query_blocks() const { return (S + together() - 1) / together(); }
  int64_t tasks() const { return B * Kv * query_blocks(); }
  int64_t keys() const {  // rounded up to whole pieces
    int64_t sum = 0;
    for (const Block& block : *blocks) sum += (block.L + kKeys - 1) / kKeys * kKeys;
    return sum;
  }
  // How many further threads pay for being woken.
  int64_t helpers() const { return B * Kv * keys() * d * (S * group() + 4) >> 18; }

  void run(int64_t task, Worker& worker) const {
    const int64_t b = task / query_blocks() / Kv, head = task / query_blocks() % Kv;
    const int64_t s0 = task % query_blocks() * together(), queries = std::min(together(), S - s0), g = group();
    const int64_t rows = queries * g, width = (d + kPanel - 1) / kPanel * kPanel;
    const int64_t stride = keys();
    worker.reserve(rows * (d + width + stride + 1) + kPanel * std::max(d, kKeys));
    float *asked = worker.take(rows * d), *sums = worker.take(rows * width), *weights = worker.take(rows * stride);
    float *top = worker.take(rows), *edge = worker.take(kPanel * std::max(d, kKeys));

    const float scale = 1.0f / std::sqrt(static_cast<float>(d));
    for (int64_t r = 0; r < rows; ++r) {
      const float* from = q + ((b * S + s0 + r / g) * H + head * g + r % g) * d;
      for (int64_t i = 0; i < d; ++i) asked[r * d + i] = from[i] * scale;
    }
    std::fill(sums, sums + rows * width, 0.0f);
    std::fill(top, top + rows, kNothing);
    // calls f(block, first key, keys, mask, place among the weights) for each piece that is seen
    auto pieces = [&](auto f) {
      int64_t place = 0;
      for (const Block& block : *blocks) {
        for (int64_t l = 0; l < block.L; l += kKeys) {
          const bool* mask = block.mask + (b * S + s0) * block.L + l;
          const int64_t keys = std::min(kKeys, block.L - l);
          if (!any(mask, queries, block.L, keys)) continue;
          f(block, l, keys, mask, weights + place);
          place += kKeys;
        }
      }
      return place;
    };
    const int64_t used = pieces([&](const Block& block, int64_t l, int64_t keys, const bool* mask, float* scores) {
      const float* k = block.k + (b * Kv + head) * d * block.L + l;
      for (int64_t j = 0; j < keys; j += kPanel) {
        const bool whole = keys - j >= kPanel;
        if (!whole) copy(k + j, block.L, d, keys - j, edge);
        multiply(asked, d, whole ? k + j : edge, whole ? block.L : kPanel, d, rows, true, scores + j, stride);
      }
      for (int64_t r = 0; r < rows; ++r) top[r] = hide(scores + r * stride, mask + r / g * block.L, keys, top[r]);
    });
    for (int64_t r = 0; r < rows; ++r) top[r] = weigh(weights + r * stride, used, top[r]);  // now 1 / sum of weights
    pieces([&](const Block& block, int64_t l, int64_t keys, const bool*, float* weights) {
      const float* v = block.v + ((b * Kv + head) * block.L + l) * d;
      for (int64_t i = 0; i < d; i += kPanel) {
        const bool whole = d - i >= kPanel;
        if (!whole) copy(v + i, d, keys, d - i, edge);
        multiply(weights, stride, whole ? v + i : edge, whole ? d : kPanel, keys, rows, false, sums + i, width);
      }
    });
    for (int64_t r = 0; r < rows; ++r) {
      float* to = out + ((b * S + s0 + r / g) * H + head * g + r % g) * d;
      for (int64_t i = 0; i < d; ++i) to[i] = sums[r * width + i] * top[r];
    }
  }

  static bool any(const bool* mask, int64_t queries, int64_t stride, int64_t keys) {
    for (int64_t s = 0; s < queries; ++s)
      if (std::memchr(mask + s * stride, 1, keys)) return true;
    return false;
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

  // Scores of keys that are not seen become -inf; the highest of the others, and `top`.
  static float hide(float* scores, const bool* mask, int64_t keys, float top) {
    uint8_t sees[kKeys] = {};
    std::memcpy(sees, mask, keys);
    Lanes most = Lanes{} + top;
    for (int64_t j = 0; j < kKeys; j += kLanes) {
      const auto seen = __builtin_convertvector(*reinterpret_cast<const Bytes*>(sees + j), Integers) != 0;
      const Lanes score = seen ? vectors::lanes(scores + j) : Lanes{} + kNothing;
      vectors::put(scores + j, score);
      most = score > most ? score : most;
    }
    for (int i = 0; i < kLanes; ++i) top = most[i] > top ? most[i] : top;
    return top;
  }

  // Scores become weights e^(score - top); 1 / their sum, or 0 where there is none.
  static float weigh(float* scores, int64_t used, float top) {
    const Lanes offset = Lanes{} + (top == kNothing ? 0.0f : top);
    const Doubles coarse = Doubles{} + 6144.0;  // 1.5 * 2^12: what is added to it is rounded to a multiple of 2^-40
    Doubles sum{};
    for (int64_t j = 0; j < used; j += kLanes) {
      const Lanes e = exponential(vectors::lanes(scores + j) - offset);
      vectors::put(scores + j, e);
      sum += (__builtin_convertvector(e, Doubles) + coarse) - coarse;
    }
    double total = 0.0;
    for (int i = 0; i < kLanes; ++i) total += sum[i];
    return total == 0.0 ? 0.0f : static_cast<float>(1.0 / total);
  }
};

}  // namespace attention
