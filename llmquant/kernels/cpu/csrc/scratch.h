// Memory that a thread keeps from call to call, so that small products do not pay for allocation.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {

// Hands out pieces, each on a cache line. `slot` tells apart buffers that live at the same time in one thread.
template <typename T>
T* scratch(int slot, int64_t count) {
    struct Buffer {
        void* data = nullptr;
        int64_t size = 0;
        ~Buffer() { std::free(data); }
    };
    static thread_local Buffer buffers[8];
    Buffer& buffer = buffers[slot];
    const int64_t need = (count * static_cast<int64_t>(sizeof(T)) + 4095) / 4096 * 4096;
#ifdef LLMQUANT_POISON  // for tests: what nobody wrote is NaN, and no buffer is larger than was asked for
    const bool fits = need == buffer.size;
#else
    const bool fits = need <= buffer.size;
#endif
    if (!fits) {
        std::free(buffer.data);
        buffer.data = std::aligned_alloc(4096, need);
        if (!buffer.data) std::abort();
        buffer.size = need;
#ifdef LLMQUANT_POISON
        std::memset(buffer.data, 0xff, need);
#endif
    }
    return static_cast<T*>(buffer.data);
}

}  // namespace
