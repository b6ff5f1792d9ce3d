// The implementation of cuda_host.h: fibers, and the shared memory that they see.
#include "cuda_host.h"

#include <sys/mman.h>

#include <cstdlib>
#include <deque>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace cuda_host {

Index thread, block, block_size, grid_size;

namespace {

// ---- switching from one stack to another ----

#if defined(__x86_64__)
// Saves the registers that a call must preserve on this stack and its pointer in `from`, and
// continues on the stack `to`, where that was left.
extern "C" void cuda_host_switch(void** from, void* to);
asm(R"(
  .text
  .hidden cuda_host_switch
cuda_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

struct Context {
  void* stack_pointer = nullptr;

  void start(char* stack, size_t size, void (*entry)()) {
    auto* top = reinterpret_cast<void**>(stack + size) - 1;
    *top = nullptr;  // return address of `entry`, which never returns, where a call would store it
    *--top = reinterpret_cast<void*>(entry);
    stack_pointer = top - 6;
  }
  void switch_to(Context& other) { cuda_host_switch(&stack_pointer, other.stack_pointer); }
};
#else
struct Context {  // the same interface, by functions of the C library
  ucontext_t context;

  void start(char* stack, size_t size, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = size;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  void switch_to(Context& other) { swapcontext(&context, &other.context); }
};
#endif

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStack = size_t{1} << 18;
#else
constexpr size_t kStack = size_t{1} << 16;
#endif
constexpr int kMaxThreads = 1024;
constexpr int64_t kMargin = 4096;  // bytes on either side of shared memory
constexpr int64_t kMaxShared = 163 << 10;
constexpr unsigned char kMarginByte = 0xA5, kPoison = 0xFF;  // kPoison: a NaN of every type

enum class State { ready, block, warp, done };

struct Copy {
  void* shared;
  const void* global;
  bool valid;
};

struct Fiber {
  Context context;
  std::vector<Copy> copies;              // copies since the last copy_commit
  std::deque<std::vector<Copy>> groups;  // committed groups that have not been waited for
  State state = State::done;
  void* fake_stack = nullptr;  // belongs to AddressSanitizer
};

struct Warp {
  uint32_t mask = 0, arrived = 0;
  void* slots[32];
  void (*op)(void* const*, uint32_t) = nullptr;
};

char* stacks() {
  static char* memory =
      static_cast<char*>(mmap(nullptr, kStack * kMaxThreads, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  return memory;
}

Fiber fibers[kMaxThreads];
// whether a thread gave true to the sync_block under way, and to the one before
bool any_given, any_of_last;
Warp warps[kMaxThreads / 32];
Context scheduler;
#if defined(__SANITIZE_ADDRESS__)
void* scheduler_fake_stack;
const void* scheduler_stack;
size_t scheduler_stack_size;
#endif
const std::function<void()>* body;
const char* failure;
int order = std::getenv("TFKERN_CUDA_ORDER") ? std::atoi(std::getenv("TFKERN_CUDA_ORDER")) : 0;
alignas(128) unsigned char shared[kMaxShared + 2 * kMargin];
int64_t shared_size;

// Switches to the scheduler, and returns when it gives this thread its next turn.
void pause() {
  Fiber& fiber = fibers[thread.x];
  const Index self = thread;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fiber.state == State::done ? nullptr : &fiber.fake_stack,
                                 scheduler_stack, scheduler_stack_size);
#endif
  fiber.context.switch_to(scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
#endif
  thread = self;
}

void enter() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
  (*body)();
  for (const auto& group : fibers[thread.x].groups) {
    if (!group.empty()) fail("a thread ends before a copy of its own");
  }
  if (!fibers[thread.x].copies.empty()) fail("a thread ends before a copy of its own");
  fibers[thread.x].state = State::done;
  pause();
}

void resume(int t) {
  thread.x = t;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, stacks() + t * kStack, kStack);
#endif
  scheduler.switch_to(fibers[t].context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
}

// The bytes before and after shared memory.
unsigned char* const* margins() {
  static unsigned char* both[2];
  both[0] = shared;
  both[1] = shared + kMargin + shared_size;
  return both;
}

void prepare_shared() {
  std::memset(shared + kMargin, kPoison, shared_size);
  for (int i = 0; i < 2; ++i) {
    std::memset(margins()[i], kMarginByte, kMargin);
#if defined(__SANITIZE_ADDRESS__)
    __asan_poison_memory_region(margins()[i], kMargin);
#endif
  }
}

void check_margins() {
  for (int i = 0; i < 2; ++i) {
    unsigned char* margin = margins()[i];
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(margin, kMargin);
#endif
    if (std::any_of(margin, margin + kMargin, [](auto byte) { return byte != kMarginByte; })) {
      failure = "a store outside of shared memory";
    }
  }
}

// The numbers 0 to n - 1 in the order of turns.
std::vector<int> turns(int n, uint32_t state) {
  std::vector<int> result(n);
  std::iota(result.begin(), result.end(), 0);
  if (order == 1) std::reverse(result.begin(), result.end());
  for (int i = n - 1; order > 1 && i > 0; --i) {
    state = state * 1664525 + 1013904223;
    std::swap(result[i], result[(state >> 8) % (i + 1)]);
  }
  return result;
}

// Lets every lane of a warp run until it waits for other warps. Returns whether any could run.
bool run_warp(int warp, int lanes, const std::vector<int>& turns, int& done) {
  for (bool progress = false, any = false;; any |= progress, progress = false) {
    for (int lane : turns) {
      const int t = 32 * warp + lane;
      if (lane >= lanes || fibers[t].state != State::ready || failure) continue;
      progress = true;
      resume(t);
      done += fibers[t].state == State::done;
    }
    if (!progress) return any;
  }
}

void run_block(int threads) {
  const auto warp_turns = turns((threads + 31) / 32, order + block.x);
  const auto lane_turns = turns(32, order + 2 * block.x + 1);
  prepare_shared();
  any_given = false;
  for (int t = 0; t < threads; ++t) {
    fibers[t].state = State::ready;
    fibers[t].fake_stack = nullptr;
    fibers[t].copies.clear();
    fibers[t].groups.clear();
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stacks() + t * kStack, kStack);  // old frames
#endif
    fibers[t].context.start(stacks() + t * kStack, kStack, enter);
    warps[t / 32].arrived = 0;
  }
  // A warp runs as far as it can before the next one starts: this shows best whether it relies on
  // results of other warps.
  for (int done = 0; done < threads && !failure;) {
    bool progress = false;
    for (int warp : warp_turns) progress |= run_warp(warp, threads - 32 * warp, lane_turns, done);
    if (progress || done == threads || failure) continue;
    int waiting = 0;
    for (int t = 0; t < threads; ++t) waiting += fibers[t].state == State::block;
    if (waiting != threads) {
      failure = "threads wait at __syncthreads or in a warp for others that never come";
    }
    for (int t = 0; t < threads; ++t) fibers[t].state = State::ready;
    any_of_last = std::exchange(any_given, false);
  }
  check_margins();
}

}  // namespace

void set_order(int value) { order = value; }

void* shared_memory() { return shared + kMargin; }

void fail(const char* what) {
  failure = what;
  fibers[thread.x].state = State::done;
  pause();
  __builtin_unreachable();
}

void check_shared(const void* p) {
  const auto at = static_cast<const unsigned char*>(p) - (shared + kMargin);
  if (at < 0 || at + 16 > shared_size) fail("an access outside of shared memory");
  if (reinterpret_cast<uintptr_t>(p) % 16) fail("an access to shared memory that is not aligned");
}

void copy_async(void* shared, const void* global, bool valid) {
  check_shared(shared);
  if (reinterpret_cast<uintptr_t>(global) % 16) fail("a copy from an odd address");
  std::memset(shared, kPoison, 16);
  fibers[thread.x].copies.push_back({shared, global, valid});
}

void copy_commit() {
  Fiber& fiber = fibers[thread.x];
  fiber.groups.push_back(std::move(fiber.copies));
  fiber.copies.clear();
}

void copy_wait(size_t groups) {
  for (auto& waiting = fibers[thread.x].groups; waiting.size() > groups; waiting.pop_front()) {
    for (const Copy& copy : waiting.front()) {
      copy.valid ? std::memcpy(copy.shared, copy.global, 16) : std::memset(copy.shared, 0, 16);
    }
  }
}

bool sync_block(bool given) {
  any_given |= given;
  fibers[thread.x].state = State::block;
  pause();
  return any_of_last;
}

void sync_warp(uint32_t mask, void* slot, void (*op)(void* const*, uint32_t)) {
  Warp& warp = warps[thread.x / 32];
  const int first = thread.x / 32 * 32, lane = thread.x % 32;
  if (!(mask >> lane & 1)) fail("a lane takes part in an operation without being in its mask");
  if (warp.arrived && (warp.op != op || warp.mask != mask)) {
    fail("the lanes of a warp take part in different operations");
  }
  warp.op = op;
  warp.mask = mask;
  warp.slots[lane] = slot;
  warp.arrived |= uint32_t{1} << lane;
  if (warp.arrived != mask) {
    fibers[thread.x].state = State::warp;
    pause();
    return;
  }
  warp.arrived = 0;
  for (int i = 0; i < 32; ++i) {
    if (mask >> i & 1) fibers[first + i].state = State::ready;
  }
  op(warp.slots, mask);
}

void run(int64_t blocks, int threads, int64_t shared_bytes, const std::function<void()>& run_body) {
  failure = nullptr;
  if (threads < 1 || threads > kMaxThreads)
    throw std::runtime_error("a block of no or 1025 threads");
  if (shared_bytes > kMaxShared) throw std::runtime_error("more than 163 KiB of shared memory");
  body = &run_body;
  shared_size = shared_bytes;
  block_size.x = threads;
  grid_size.x = static_cast<unsigned>(blocks);
  for (int64_t b = 0; b < blocks && !failure; ++b) {
    block.x = static_cast<unsigned>(b);
    run_block(threads);
  }
  if (failure) {
    throw std::runtime_error(std::string("in a CUDA kernel, block ") + std::to_string(block.x) +
                             ", thread " + std::to_string(thread.x) + ": " + failure);
  }
}

}  // namespace cuda_host

extern "C" __attribute__((visibility("default"))) void cuda_host_set_order(int order) {
  cuda_host::set_order(order);
}
