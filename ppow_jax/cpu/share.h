// Work that threads share.

#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>

namespace ppow {

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

// Threads that help with whatever was offered last. After each piece of work they look for more for a while before they
// sleep: decoding makes a call every few microseconds, and waking a thread takes longer than many of them.
class Helpers {
 public:
  static constexpr int64_t kMost = 15;
  static constexpr auto kPatience = std::chrono::microseconds(50);

  // Lives as long as the process: its threads never end.
  static Helpers& get() {
    static Helpers* helpers = new Helpers;
    return *helpers;
  }

  // Up to `number` threads will call `work` once, or not at all where they are busy: nobody may wait for them to begin.
  void offer(int64_t number, std::function<void()> work) {
    std::lock_guard<std::mutex> lock(mutex_);
    for (; threads_ < std::min(number, kMost); ++threads_) std::thread([this] { help(); }).detach();
    work_ = std::move(work);
    places_ = number;
    offers_.fetch_add(1, std::memory_order_release);
    if (asleep_ > 0) wake_.notify_all();
  }

 private:
  void help() {
    for (int64_t seen = 0;;) {
      const auto begin = std::chrono::steady_clock::now();
      while (offers_.load(std::memory_order_acquire) == seen && std::chrono::steady_clock::now() - begin < kPatience)
        for (int i = 0; i < 8; ++i) pause();
      std::function<void()> work;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        ++asleep_;
        wake_.wait(lock, [&] { return offers_.load(std::memory_order_relaxed) != seen; });
        --asleep_;
        seen = offers_.load(std::memory_order_relaxed);
        if (places_-- > 0) work = work_;
      }
      if (work) work();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::function<void()> work_;
  std::atomic<int64_t> offers_{0};
  int64_t places_ = 0, threads_ = 0, asleep_ = 0;
};

// Does P's tasks, together with up to `threads` - 1 helpers: whoever is free takes the next ones. The caller waits only
// for tasks that somebody has taken.
template <class P>
void share(const P& product, int64_t threads) {
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
  const int64_t helpers = std::min({threads - 1, (tasks - 1) / stride, product.helpers()});
  if (helpers > 0) Helpers::get().offer(helpers, [state, work] { work(*state); });
  work(*state);
  for (int i = 0; state->done.load(std::memory_order_acquire) < tasks; ++i) i < 4096 ? pause() : std::this_thread::yield();
}

}  // namespace ppow
