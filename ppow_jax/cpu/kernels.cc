// What XLA:CPU does slowly, as calls that it can make: products with bfloat16 weights (product.py), attention
// (attention.py), norms (norm.py).
//
// A row's result depends neither on the other rows nor on their number: decoding one token and verifying a window
// round alike.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#include "attention.h"
#include "dots.h"
#include "norm.h"
#include "pairs.h"
#include "tiles.h"
#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// Whoever is free takes the next tasks. The caller waits only for tasks that a running thread has taken: calls that
// hold every thread of the pool cannot wait for helpers that never begin.
template <class P>
void share(const P& product, ffi::ThreadPool& pool) {
  struct State {
    std::atomic<int64_t> next{0}, done{0};
  };
  const int64_t tasks = product.tasks(), stride = std::clamp<int64_t>(tasks / 8, 1, 8);
  auto work = [product, tasks, stride](State& state) {
    typename P::Worker worker;
    for (int64_t begin; (begin = state.next.fetch_add(stride)) < tasks;) {
      const int64_t end = std::min(tasks, begin + stride);
      for (int64_t task = begin; task < end; ++task) product.run(task, worker);
      state.done.fetch_add(end - begin, std::memory_order_release);
    }
  };
  auto state = std::make_shared<State>();
  const int64_t helpers = std::min({pool.num_threads() - 1, (tasks - 1) / stride, product.helpers()});
  for (int64_t h = 0; h < helpers; ++h) pool.Schedule([state, work] { work(*state); });
  work(*state);
  while (state->done.load(std::memory_order_acquire) < tasks) std::this_thread::yield();
}

// P: a Product of vectors.h or pairs.h; kX: the type of x that it takes.
template <class P, ffi::DataType kX, bool kTransposed>
ffi::Error multiply(ffi::ThreadPool pool, ffi::Buffer<kX> x, ffi::Buffer<ffi::BF16> w,
                    ffi::ResultBuffer<ffi::F32> y) {
  const int64_t M = x.dimensions()[0], K = x.dimensions()[1], N = y->dimensions()[1];
  if (w.dimensions()[kTransposed ? 0 : 1] != K) return ffi::Error::InvalidArgument("inner dimensions differ");
  const auto* values = reinterpret_cast<decltype(P::x)>(x.untyped_data());
  share(P{values, reinterpret_cast<const uint16_t*>(w.untyped_data()), y->typed_data(), M, K, N}, pool);
  return ffi::Error::Success();
}

#ifdef PPOW_DOTS
template <bool kTransposed>
using DotProduct = pairs::Product<dots::Machine, kTransposed>;
#endif
#ifdef PPOW_TILES
template <bool kTransposed>
using TileProduct = pairs::Product<tiles::Machine, kTransposed>;
#endif

template <ffi::DataType kX>
auto binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .template Arg<ffi::Buffer<kX>>()
      .template Arg<ffi::Buffer<ffi::BF16>>()
      .template Ret<ffi::Buffer<ffi::F32>>();
}

// rest: k, v and mask of each block of keys.
ffi::Error attend(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::RemainingArgs rest,
                  ffi::ResultBuffer<ffi::F32> out) {
  std::vector<attention::Block> blocks;
  int64_t heads_of_keys = 0;
  for (size_t i = 0; i + 2 < rest.size(); i += 3) {
    const auto k = rest.get<ffi::Buffer<ffi::F32>>(i), v = rest.get<ffi::Buffer<ffi::F32>>(i + 1);
    const auto mask = rest.get<ffi::Buffer<ffi::PRED>>(i + 2);
    if (!k || !v || !mask) return ffi::Error::InvalidArgument("a block of keys is float32 k and v and a mask");
    blocks.push_back({k->typed_data(), v->typed_data(), mask->typed_data(), k->dimensions()[3]});
    heads_of_keys = k->dimensions()[1];
  }
  const auto shape = q.dimensions();
  share(attention::Attention{q.typed_data(), out->typed_data(), shape[0], shape[1], shape[2], shape[3], heads_of_keys,
                             &blocks},
        pool);
  return ffi::Error::Success();
}

ffi::Error norm_factor(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::ResultBuffer<ffi::F32> factor, float eps) {
  const int64_t D = x.dimensions().back(), M = factor->element_count();
  share(norm::Factor{x.typed_data(), factor->typed_data(), M, D, eps}, pool);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(ppow_norm_factor, norm_factor,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<float>("eps"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(ppow_attention, attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .RemainingArgs()
                                  .Ret<ffi::Buffer<ffi::F32>>());
#define PPOW_PRODUCT(kind, P, X)                                                                       \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(ppow_product_##kind, (multiply<P<false>, X, false>), binding<X>());    \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(ppow_product_##kind##_transposed, (multiply<P<true>, X, true>), binding<X>())

PPOW_PRODUCT(vectors, vectors::Product, ffi::F32);
#ifdef PPOW_DOTS
PPOW_PRODUCT(dots, DotProduct, ffi::BF16);
#endif
#ifdef PPOW_TILES
PPOW_PRODUCT(tiles, TileProduct, ffi::BF16);
#endif

// The kinds of product that this processor has, slowest first.
extern "C" const char* ppow_kinds() {
#ifdef PPOW_TILES
  if (tiles::permitted()) return "vectors dots tiles";
#endif
#ifdef PPOW_DOTS
  return "vectors dots";
#endif
  return "vectors";
}
