// The threads of the emulation: fibers, and who may go on. Compiled without sanitizers, which then see what the kernels
// do and nothing of the bookkeeping; what they must know (stacks, order, the ends of arrays) they are told.
#include "cuda_runtime.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <mutex>
#include <new>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

// whether the kernels are compiled with one of these sanitizers
#ifndef FASTAPD_UNDER_ADDRESS
#define FASTAPD_UNDER_ADDRESS 0
#endif
#ifndef FASTAPD_UNDER_THREAD
#define FASTAPD_UNDER_THREAD 0
#endif
#if FASTAPD_UNDER_ADDRESS
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if FASTAPD_UNDER_THREAD
#include <sanitizer/tsan_interface.h>
#endif

namespace emulation {

unsigned thread_index, block_index, block_size, grid_size;
int current_device = 0;

namespace {

constexpr unsigned kMostThreads = 1024, kWarp = 32;
constexpr size_t kStackBytes = 256 << 10, kGuardBytes = 64 << 10;
constexpr size_t kMostShared = 227 << 10;  // of a block, on sm_90 and sm_100
// An address that a thread of one block has used is not new to the thread sanitizer, so there no two blocks share one.
constexpr size_t kArenaBytes = FASTAPD_UNDER_THREAD ? size_t{1} << 32 : size_t{1} << 20;

enum class Wait { kNothing, kSyncThreads, kSyncWarp, kShuffle, kBallot, kSum };
constexpr const char* kNames[] = {"nothing", "__syncthreads", "__syncwarp", "a shuffle", "a ballot", "a sum"};

struct Fiber {
  ucontext_t context;
  char* stack = nullptr;
  void* sanitizer = nullptr;  // the thread sanitizer's thread, or the address sanitizer's fake stack
  bool begun = false;
};

struct Thread {
  Fiber* fiber;
  bool left;
  Wait waits;
  unsigned barriers, collectives;  // passed so far
};

struct Warp {
  unsigned arrived;
  Wait kind;
  uint64_t given[2][kWarp];  // of this collective, and of the one before, which a slow lane may still read
};

struct Array {
  const void* key;
  void* at;
};

std::mutex one_launch;
Fiber fibers[2][kMostThreads];
unsigned parity;  // of the block
Thread threads[kMostThreads];
Warp warps[kMostThreads / kWarp];
unsigned at_barrier, n_left;
std::vector<Array> arrays;
char* arena = nullptr;
size_t arena_used, shared_used, dynamic_bytes;
void* dynamic_array;
void (*body)(const void*);
const void* closure;
std::string wrong;
int order = 0;  // of blocks and threads: 0 forward, 1 backward, else mixed by this seed
int64_t n_launches = 0, n_blocks = 0;
int device_of_last;
void* stream_of_last;

ucontext_t scheduler;
[[maybe_unused]] void* scheduler_sanitizer;
[[maybe_unused]] const void* scheduler_stack;
[[maybe_unused]] size_t scheduler_stack_bytes;

// What the thread sanitizer orders by. Barriers alternate between two: a fast thread may come to the next barrier
// before a slow one has gone on from this one, and would tell it what it is not to know. So do blocks, whose fibers
// alternate, too: what two neighbours do is never ordered, what a block and the one after the next do may be.
char begin_tag, end_tag, fence_tag, barrier_tags[2][2], warp_tags[2][kMostThreads / kWarp][2];

#if FASTAPD_UNDER_THREAD
void acquire(char& tag) {
  __tsan_acquire(&tag);
}
void release(char& tag) {
  __tsan_release(&tag);
}
#else
void acquire(char&) {}
void release(char&) {}
#endif

void to_scheduler() {
  Fiber& me = *threads[thread_index].fiber;
#if FASTAPD_UNDER_ADDRESS
  __sanitizer_start_switch_fiber(&me.sanitizer, scheduler_stack, scheduler_stack_bytes);
#elif FASTAPD_UNDER_THREAD
  __tsan_switch_to_fiber(scheduler_sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
  swapcontext(&me.context, &scheduler);
#if FASTAPD_UNDER_ADDRESS
  __sanitizer_finish_switch_fiber(me.sanitizer, &scheduler_stack, &scheduler_stack_bytes);
#endif
}

void to_thread(unsigned t) {
  thread_index = t;
  Fiber& fiber = *threads[t].fiber;
#if FASTAPD_UNDER_ADDRESS
  __sanitizer_start_switch_fiber(&scheduler_sanitizer, fiber.stack + kGuardBytes, kStackBytes);
#elif FASTAPD_UNDER_THREAD
  __tsan_switch_to_fiber(fiber.sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
  swapcontext(&scheduler, &fiber.context);
#if FASTAPD_UNDER_ADDRESS
  __sanitizer_finish_switch_fiber(scheduler_sanitizer, nullptr, nullptr);
#endif
}

// A fiber runs one thread of a block after another.
void run_threads() {
#if FASTAPD_UNDER_ADDRESS
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
  for (;;) {
    acquire(begin_tag);
    body(closure);
    release(end_tag);
    threads[thread_index].left = true;
    ++n_left;
    to_scheduler();
  }
}

void begin(Fiber& fiber) {
  if (fiber.begun) return;
  if (fiber.stack == nullptr) {
    void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    fiber.stack = static_cast<char*>(memory);
    mprotect(fiber.stack, kGuardBytes, PROT_NONE);
  }
#if FASTAPD_UNDER_THREAD
  if (fiber.sanitizer != nullptr) __tsan_destroy_fiber(fiber.sanitizer);
  fiber.sanitizer = __tsan_create_fiber(0);
#endif
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack + kGuardBytes;
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, &run_threads, 0);
  fiber.begun = true;
}

// Ends the launch: run() throws, and no fiber of it is gone on with.
[[noreturn]] void fail(const std::string& what) {
  wrong = "block " + std::to_string(block_index) + ", thread " + std::to_string(thread_index) + ": " + what;
  for (;;) to_scheduler();
}

void go_on(unsigned first, unsigned n) {
  for (unsigned t = first; t < first + n; ++t) threads[t].waits = Wait::kNothing;
}

void wait(Wait kind) {
  threads[thread_index].waits = kind;
  while (threads[thread_index].waits != Wait::kNothing) to_scheduler();
}

// Waits until all lanes of the warp have come; returns which of the two buffers is this collective's.
unsigned meet(Wait kind, uint64_t mine) {
  Warp& warp = warps[thread_index / kWarp];
  const unsigned buffer = threads[thread_index].collectives++ % 2;
  warp.given[buffer][thread_index % kWarp] = mine;
  if (warp.arrived == 0) warp.kind = kind;
  if (warp.kind != kind)
    fail(std::string(kNames[int(kind)]) + " while other lanes of the warp wait at " + kNames[int(warp.kind)]);
  if (++warp.arrived < kWarp) {
    wait(kind);
  } else {
    warp.arrived = 0;
    go_on(thread_index / kWarp * kWarp, kWarp);
  }
  return buffer;
}

std::string stuck() {
  std::string said = "block " + std::to_string(block_index) + " cannot go on: " + std::to_string(n_left) + " of its " +
                     std::to_string(block_size) + " threads have returned";
  for (int kind = 1; kind <= int(Wait::kSum); ++kind) {
    unsigned n = 0;
    for (unsigned t = 0; t < block_size; ++t) n += !threads[t].left && int(threads[t].waits) == kind;
    if (n > 0) said += ", " + std::to_string(n) + " wait at " + kNames[kind];
  }
  return said;
}

// Memory of exactly so many bytes, which hold NaN.
void* take(size_t bytes) {
  const size_t gap = 64, whole = (bytes + 15) / 16 * 16 + gap;
  if (arena_used + whole > kArenaBytes) fail("the emulation has no shared memory left; launch fewer blocks");
  char* memory = arena + arena_used;
  arena_used += whole;
#if FASTAPD_UNDER_ADDRESS
  __asan_unpoison_memory_region(memory, bytes);
#endif
  volatile char* at = memory;  // by hand, as the sanitizers would see a memset
  for (size_t i = 0; i < bytes; ++i) at[i] = static_cast<char>(0xff);
  return memory;
}

int64_t permuted(int64_t i, int64_t n) {
  if (order == 0) return i;
  if (order == 1) return n - 1 - i;
  int64_t step = order % n;
  while (std::gcd(step, n) != 1) ++step;
  return (i % n * step + order) % n;
}

void run_block(int64_t number) {
  block_index = static_cast<unsigned>(permuted(number, grid_size));
  parity = static_cast<unsigned>(number % 2);
  at_barrier = n_left = 0;
  arrays.clear();
  shared_used = dynamic_bytes;
  if (!FASTAPD_UNDER_THREAD) arena_used = 0;
#if FASTAPD_UNDER_ADDRESS
  __asan_poison_memory_region(arena, kArenaBytes);
#endif
  dynamic_array = take(dynamic_bytes);
  for (unsigned t = 0; t < block_size; ++t) {
    threads[t] = {&fibers[parity][t], false, Wait::kNothing, 0, 0};
    begin(*threads[t].fiber);
  }
  for (Warp& warp : warps) warp.arrived = 0;
  while (n_left < block_size) {
    bool moved = false;
    for (unsigned i = 0; i < block_size; ++i) {
      const unsigned t = static_cast<unsigned>(permuted(i, block_size));
      if (threads[t].left || threads[t].waits != Wait::kNothing) continue;
      moved = true;
      to_thread(t);
      if (!wrong.empty()) return;
    }
    if (!moved) {
      wrong = stuck();
      return;
    }
  }
}

}  // namespace

void sync_threads() {
  char& tag = barrier_tags[parity][threads[thread_index].barriers++ % 2];
  release(tag);
  if (++at_barrier < block_size) {
    wait(Wait::kSyncThreads);
  } else {
    at_barrier = 0;
    go_on(0, block_size);
  }
  acquire(tag);
}

void sync_warp() {
  char* tags = warp_tags[parity][thread_index / kWarp];
  const unsigned turn = threads[thread_index].collectives % 2;
  release(tags[turn]);
  meet(Wait::kSyncWarp, 0);
  acquire(tags[turn]);
}

uint64_t exchange(uint64_t mine, unsigned from) {
  const unsigned buffer = meet(Wait::kShuffle, mine);
  return warps[thread_index / kWarp].given[buffer][from % kWarp];
}

unsigned ballot(bool mine) {
  const unsigned buffer = meet(Wait::kBallot, mine);
  unsigned bits = 0;
  for (unsigned lane = 0; lane < kWarp; ++lane)
    bits |= static_cast<unsigned>(warps[thread_index / kWarp].given[buffer][lane]) << lane;
  return bits;
}

unsigned sum(unsigned mine) {
  const unsigned buffer = meet(Wait::kSum, mine);
  unsigned total = 0;
  for (uint64_t given : warps[thread_index / kWarp].given[buffer]) total += static_cast<unsigned>(given);
  return total;
}

void whole_warp(unsigned mask) {
  if (mask != ~0u) fail("a collective of a part of a warp, which is not emulated");
}

void fence() {
  release(fence_tag);
  acquire(fence_tag);
}

void* shared(const void* key, size_t bytes) {
  for (const Array& array : arrays)
    if (array.key == key) return array.at;
  shared_used += bytes;
  if (shared_used > kMostShared) fail(std::to_string(shared_used) + " bytes of shared memory, more than a card has");
  arrays.push_back({key, take(bytes)});
  return arrays.back().at;
}

void* dynamic_shared() {
  return dynamic_array;
}

void run(int64_t blocks, unsigned threads_of_each, size_t dynamic, void* stream, void (*what)(const void*),
         const void* with) {
  const std::lock_guard<std::mutex> lock(one_launch);
  if (threads_of_each == 0 || threads_of_each % kWarp != 0 || threads_of_each > kMostThreads || dynamic > kMostShared)
    throw std::runtime_error("a launch of " + std::to_string(threads_of_each) + " threads with " +
                             std::to_string(dynamic) +
                             " bytes of shared memory, which is no whole number of warps or " + "more than a card has");
  if (arena == nullptr) {
    void* memory =
        mmap(nullptr, kArenaBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    arena = static_cast<char*>(memory);
  }
  block_size = threads_of_each;
  grid_size = static_cast<unsigned>(blocks);
  dynamic_bytes = dynamic;
  arena_used = 0;
  body = what;
  device_of_last = current_device;
  stream_of_last = stream;
  closure = with;
  wrong.clear();
#if FASTAPD_UNDER_THREAD
  scheduler_sanitizer = __tsan_get_current_fiber();
#endif
  release(begin_tag);
  for (int64_t i = 0; i < blocks && wrong.empty(); ++i, ++n_blocks) run_block(i);
  acquire(end_tag);
  ++n_launches;
  if (wrong.empty()) return;
  for (unsigned t = 0; t < block_size; ++t)
    threads[t].fiber->begun = false;  // what is in the middle of something stays there
  throw std::runtime_error(wrong);
}

}  // namespace emulation

// For tests, through ctypes.
#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED void fastapd_emulation_order(int order) {
  emulation::order = order;
}
EXPORTED int fastapd_emulation_launches() {
  return static_cast<int>(emulation::n_launches);
}
EXPORTED int fastapd_emulation_blocks() {
  return static_cast<int>(emulation::n_blocks);
}
EXPORTED int fastapd_emulation_current_device() {
  return emulation::current_device;
}
EXPORTED int fastapd_emulation_device_of_last() {
  return emulation::device_of_last;
}
EXPORTED unsigned long long fastapd_emulation_stream_of_last() {
  return reinterpret_cast<unsigned long long>(emulation::stream_of_last);
}
