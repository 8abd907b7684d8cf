// A small thread pool: tasks of one parallel region are handed out by a counter, the caller works too.
//
// Workers spin for a moment between regions, since a decode step has hundreds of them, then sleep. A
// region never waits for a worker that has not joined it, so one that the system keeps off its core
// delays nothing but its own task.
#pragma once
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace aprium {

// Grow-only memory aligned to a cache line; what it held is lost when it grows.
class Buffer {
   public:
    uint8_t* bytes(int64_t size) {
        if (size > size_) {
            free(data_);
            size_ = (size + size / 4 + 4095) / 4096 * 4096;
            data_ = (uint8_t*)aligned_alloc(4096, (size_t)size_);
            if (!data_) throw std::bad_alloc();
        }
        return data_;
    }
    float* floats(int64_t count) { return (float*)bytes(count * 4); }
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    Buffer(Buffer&& other) noexcept : data_(other.data_), size_(other.size_) { other.data_ = nullptr, other.size_ = 0; }
    ~Buffer() { free(data_); }

   private:
    uint8_t* data_ = nullptr;
    int64_t size_ = 0;
};

class Pool {
   public:
    explicit Pool(int num_threads) : scratch_(num_threads) {
        for (int i = 1; i < num_threads; i++) workers_.emplace_back([this, i] { work(i); });
    }
    ~Pool() {
        stop_ = true;
        state_ += kEpoch;
        state_.notify_all();
        for (auto& worker : workers_) worker.join();
    }
    int num_threads() const { return (int)scratch_.size(); }
    Buffer& scratch(int thread) { return scratch_[thread]; }

    // Call f(task, thread) for every task below `count`; returns when all are done.
    template <class F>
    void run(int64_t count, const F& f) {
        if (count <= 1 || workers_.empty()) {
            for (int64_t i = 0; i < count; i++) f(i, 0);
            return;
        }
        call_ = [](void* f, int64_t task, int thread) { (*(const F*)f)(task, thread); };
        function_ = (void*)&f, count_ = count;
        next_.store(0, std::memory_order_relaxed);
        state_.fetch_add(kEpoch | kOpen, std::memory_order_acq_rel);
        state_.notify_all();
        take(0);
        state_.fetch_sub(kOpen, std::memory_order_acq_rel);
        while (state_.load(std::memory_order_acquire) & kJoined) pause();
    }

   private:
    // The state: bits 0..15 workers inside the region, bit 16 whether it is open, then its number.
    static constexpr uint64_t kJoined = 0xFFFF, kOpen = 1 << 16, kEpoch = 1 << 17;
    static constexpr int kSpins = 20000;

    static void pause() {
#ifdef __x86_64__
        __builtin_ia32_pause();
#else
        std::this_thread::yield();
#endif
    }
    void take(int thread) {
        for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) call_(function_, i, thread);
    }
    void work(int thread) {
        uint64_t seen = 0;
        for (;;) {
            uint64_t state = state_.load(std::memory_order_acquire);
            for (int spins = 0; (state & ~kJoined) == seen || !(state & kOpen); spins++) {
                if (stop_) return;
                if (spins < kSpins) pause();
                else state_.wait(state, std::memory_order_acquire);
                state = state_.load(std::memory_order_acquire);
            }
            if (!state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel)) continue;
            seen = state & ~kJoined;
            take(thread);
            state_.fetch_sub(1, std::memory_order_acq_rel);
        }
    }

    std::vector<Buffer> scratch_;
    std::atomic<uint64_t> state_{0};
    std::atomic<int64_t> next_{0};
    std::atomic<bool> stop_{false};
    void (*call_)(void*, int64_t, int) = nullptr;
    void* function_ = nullptr;
    int64_t count_ = 0;
    std::vector<std::thread> workers_;
};

}  // namespace aprium
