// Stands in for nvcc and a GPU: included first, it lets g++ compile the kernels of csrc/ and run them on the
// CPU.
//
//   g++ -std=c++17 -include cuda_host_shim.h -x c++ rms_norm.cu
//
// Every CUDA thread is a fiber with a stack of its own. Blocks run one after another, and within a block one
// warp at a time runs until all its threads wait: HOST_ORDER says which warp is next and in which order its
// lanes go on.
//   forward, reverse: the first or the last warp that can go on, as far as it gets, so that warps are as far
//   apart as barriers allow;
//   random:SEED: any warp, for any number of turns.
// Results must not depend on it: where they do, a barrier is missing. Shared memory is NaN when a block
// begins, and a block whose threads wait for each other for ever is a launch failure.
//
// It knows what the kernels use, no more: one-dimensional grids of whole warps, __syncthreads, shuffles of a
// full warp, and shared memory in functions that are static and no templates (g++ ignores a section for
// templates).
#pragma once

#include <cuda_runtime_api.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>
// NVIDIA's headers before the keywords mean something else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#undef __global__
#undef __device__
#undef __shared__
#undef __launch_bounds__
#define __global__
#define __device__
#define __shared__ static __attribute__((section("shared_memory")))
#define __launch_bounds__(...)

extern char __start_shared_memory[] __attribute__((weak));  // from the linker
extern char __stop_shared_memory[] __attribute__((weak));

inline uint3 threadIdx, blockIdx;  // of the fiber that runs
inline dim3 blockDim, gridDim;

#define HART_READ(from, bytes) host::note(0, from, bytes)
#define HART_WRITE(to, bytes) host::note(1, to, bytes)

namespace host {

// What was read and what was written since host_count(1): each access from where to where.
inline bool counting = false;
inline std::vector<std::pair<uintptr_t, uintptr_t>> accesses[2];

inline void note(int written, const void* at, size_t bytes) {
    const auto from = reinterpret_cast<uintptr_t>(at);
    if (counting) accesses[written].emplace_back(from, from + bytes);
}

constexpr unsigned LANES = 32;
constexpr size_t STACK = 128 << 10;

struct Fiber {
    ucontext_t context;
    uint3 index{};
    bool done = false;
};

struct Warp {  // whose lanes meet in a shuffle
    unsigned arrived = 0, meeting = 0;
    uint64_t given[2][LANES];  // by parity: the next meeting may begin before all have left the last
};

struct Block {
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    std::unique_ptr<char[]> stacks;
    unsigned stack_count = 0;
    ucontext_t scheduler;
    Fiber* running = nullptr;
    std::function<void()> body;
    unsigned arrived = 0, barrier = 0, alive = 0;
    bool moved = false;  // whether a thread got past something since this was last cleared
};

inline Block block;  // one at a time

inline void wait() { swapcontext(&block.running->context, &block.scheduler); }

inline void start() {
    block.body();
    block.running->done = true;
    block.alive--;
    block.moved = true;
    wait();
}

inline void synchronise() {
    const unsigned mine = block.barrier;
    block.moved = true;
    if (++block.arrived == block.alive) {
        block.arrived = 0;
        block.barrier++;
    }
    while (block.barrier == mine) wait();
    block.moved = true;
}

// Every lane's number to every lane.
inline const uint64_t* meet(uint64_t number) {
    Warp& warp = block.warps[threadIdx.x / LANES];
    const unsigned mine = warp.meeting;
    warp.given[mine % 2][threadIdx.x % LANES] = number;
    block.moved = true;
    if (++warp.arrived == LANES) {
        warp.arrived = 0;
        warp.meeting++;
    }
    while (warp.meeting == mine) wait();
    block.moved = true;
    return warp.given[mine % 2];
}

// Let each waiting lane of a warp go on once; whether any got past something.
inline bool turn(unsigned warp, bool backwards) {
    block.moved = false;
    for (unsigned i = 0; i < LANES; ++i) {
        Fiber& fiber = block.fibers[warp * LANES + (backwards ? LANES - 1 - i : i)];
        if (fiber.done) continue;
        block.running = &fiber;
        threadIdx = fiber.index;
        swapcontext(&block.scheduler, &fiber.context);
    }
    return block.moved;
}

struct Order {
    std::string name;
    std::mt19937 random;
    bool is_random;
    Order() {
        const char* asked = getenv("HOST_ORDER");
        name = asked == nullptr ? "forward" : asked;
        is_random = name.rfind("random:", 0) == 0;
        if (is_random) random.seed(std::stoul(name.substr(7)));
        else if (name != "forward" && name != "reverse") abort();
    }
    unsigned warp(unsigned i, unsigned warps) { return name == "reverse" ? warps - 1 - i : i; }
};

// Run all threads of a block to their end, or return false if they wait for ever.
inline bool finish(Order& order) {
    const unsigned warps = block.warps.size();
    while (block.alive != 0) {
        bool moved = false;
        if (order.is_random) {
            for (unsigned i = 0; i < 4 * warps; ++i) {
                const unsigned warp = order.random() % warps;
                for (unsigned turns = order.random() % 32; turns > 0; --turns)
                    moved |= turn(warp, order.random() % 2);
            }
        }
        for (unsigned i = 0; i < warps && !moved; ++i) {
            while (turn(order.warp(i, warps), order.name == "reverse")) moved = true;
        }
        if (!moved) return false;
    }
    return true;
}

inline void prepare(unsigned threads) {
    block.fibers.assign(threads, Fiber());
    block.warps.assign(threads / LANES, Warp());
    if (block.stack_count < threads)
        block.stacks.reset(new char[threads * STACK]), block.stack_count = threads;
    block.alive = threads;
    block.arrived = 0;
    if (__start_shared_memory != nullptr)
        memset(__start_shared_memory, 0xff, __stop_shared_memory - __start_shared_memory);
    for (unsigned i = 0; i < threads; ++i) {
        Fiber& fiber = block.fibers[i];
        fiber.index.x = i;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = block.stacks.get() + i * STACK;
        fiber.context.uc_stack.ss_size = STACK;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, start, 0);
    }
}

template <typename T>
T shuffled(T value, unsigned source) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    bits = meet(bits)[source % LANES];
    memcpy(&value, &bits, sizeof(T));
    return value;
}

}  // namespace host

inline void __syncthreads() { host::synchronise(); }

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, unsigned distance) {
    if (mask != ~0u) std::abort();  // not supported
    return host::shuffled(value, threadIdx.x % host::LANES ^ distance);
}

inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
inline float __fmul_rn(float x, float y) { return x * y; }  // -ffp-contract=off keeps them apart
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fdiv_rn(float x, float y) { return x / y; }

template <typename... Expected, typename... Given>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...),
                               Given&&... arguments) {
    const unsigned threads = config->blockDim.x;
    if (threads == 0 || threads % host::LANES || threads > 1024 || config->gridDim.x == 0)
        return cudaErrorInvalidConfiguration;
    host::Order order;
    blockDim = config->blockDim;
    gridDim = config->gridDim;
    host::block.body = [&] { kernel(arguments...); };
    for (unsigned i = 0; i < config->gridDim.x; ++i) {
        blockIdx.x = i;
        host::prepare(threads);
        if (!host::finish(order)) return cudaErrorLaunchFailure;
    }
    return cudaSuccess;
}

template <typename... Expected>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, void (*)(Expected...)) {
    return cudaSuccess;
}

extern "C" {
__attribute__((weak)) cudaError_t cudaGetLastError() { return cudaSuccess; }
__attribute__((weak)) const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorLaunchFailure ? "threads wait for each other for ever" : "invalid configuration";
}
}

#define HOST_EXPORT extern "C" __attribute__((visibility("default"), used))

HOST_EXPORT inline void host_count(int on) {
    host::counting = on;
    for (auto& list : host::accesses) list.clear();
}

// Bytes of all accesses, or of all places, read and written counted apart.
HOST_EXPORT inline int64_t host_moved(int distinct) {
    int64_t bytes = 0;
    for (auto& list : host::accesses) {
        std::sort(list.begin(), list.end());
        uintptr_t reached = 0;
        for (const auto& [from, to] : list) {
            const uintptr_t begin = distinct ? std::max(from, reached) : from;
            if (to > begin) bytes += to - begin;
            reached = std::max(reached, to);
        }
    }
    return bytes;
}
