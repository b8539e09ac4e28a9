// Products of bfloat16 by AMX tiles of 16 rows, straight from memory.

#pragma once

#include "pairs.h"

#if defined(PPOW_PAIRS) && defined(__AMX_BF16__) && defined(__linux__)
#define PPOW_TILES 1

#include <sys/syscall.h>
#include <unistd.h>

namespace tiles {

// Linux lends the tile registers on request, to the whole process.
inline bool permitted() {
  static const bool granted = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0;
  return granted;
}

class Machine {
 public:
  static constexpr int kRows = 32, kUnit = 16;  // two tiles
  static constexpr int kReading = 64, kHelperBits = 22;

  ~Machine() {
    if (configured_) _tile_release();
  }

  void multiply(const pairs::Part& part) {
    const bool both = part.rows > kUnit;
    configure(std::min<int>(part.rows, kUnit), part.rows - kUnit);
    asm volatile("" ::: "memory");  // the compiler does not know that tiles read memory
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    auto step = [&](const uint16_t* x, int64_t stride, const uint16_t* block) {
      _tile_loadd(6, block, 64);
      _tile_loadd(7, block + pairs::kBlock, 64);
      _tile_loadd(4, x, 2 * stride);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if (both) {
        _tile_loadd(5, x + kUnit * stride, 2 * stride);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    };
    for (int64_t s = 0; s < part.whole; ++s)
      step(part.x + s * pairs::kDeep, part.x_stride, part.panel + s * 2 * pairs::kBlock);
    if (part.tail) step(part.tail, pairs::kDeep, part.panel + part.whole * 2 * pairs::kBlock);
    _tile_stored(0, part.y, 4 * part.y_stride);
    _tile_stored(1, part.y + pairs::kSide, 4 * part.y_stride);
    if (both) {
      float* second = part.y + kUnit * part.y_stride;
      _tile_stored(2, second, 4 * part.y_stride);
      _tile_stored(3, second + pairs::kSide, 4 * part.y_stride);
    }
    asm volatile("" ::: "memory");
  }

 private:
  bool configured_ = false;
  int first_ = 0, second_ = 0;

  // Rows of x in the two halves of a part; 0 or less for a half that is not there.
  void configure(int first, int second) {
    if (configured_ && first == first_ && second == second_) return;
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    const int there = std::max(second, 1);
    const int rows[8] = {first, first, there, there, first, there, pairs::kSide, pairs::kSide};
    for (int t = 0; t < 8; ++t) {
      config.bytes[t] = 64;
      config.rows[t] = rows[t];
    }
    asm volatile("" : : "r"(&config) : "memory");  // all of it is read, GCC believes a part
    _tile_loadconfig(&config);
    configured_ = true, first_ = first, second_ = second;
  }
};

}  // namespace tiles

#endif
