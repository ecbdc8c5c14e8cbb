#include "emulator.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <deque>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_THREAD__)
#define UNWATCHED __attribute__((no_sanitize_thread))
#else
#define UNWATCHED
#endif

namespace emulator {

Index thread_index, block_index, block_size, grid_size;
Counters counters;

namespace {

constexpr size_t STACK = 256 << 10;
constexpr size_t SHARED = 256 << 10;
enum State { READY, AT_BARRIER, IN_COLLECTIVE, DONE };

struct Copy {
  void* to;
  const void* from;
  bool valid;
};

struct Fiber {
  char* stack = nullptr;
#if defined(__x86_64__)
  void* context = nullptr;
#else
  ucontext_t context;
#endif
  State state = DONE;
  unsigned number = 0;
  Work work = nullptr;
  void* data = nullptr;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
};

std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<unsigned> order;
Fiber* current = nullptr;
Fiber scheduler;
void (*kernel)(const void*);
const void* kernel_argument;
unsigned threads, waiting, done;
// ends where unreadable memory begins; FENCE bytes on both sides hold a pattern that must stay
constexpr size_t FENCE = 128;
constexpr unsigned char UNTOUCHED = 0xff;
char* shared_end = nullptr;
char* shared = nullptr;
size_t shared_size;
unsigned shuffle_seed;
std::mutex one_at_a_time;
// an RTX 4060 Laptop
int capability = SANA_EDGE_EMULATED / 10, processors = 24;
int shared_most = SANA_EDGE_EMULATED < 800 ? 64 << 10 : 99 << 10;
std::mt19937 generator;

// What is known of a byte of shared memory, to find accesses that nothing orders: epochs count barriers of blocks,
// warp epochs those of a warp.
enum Readers : uint8_t { ONE, ONE_WARP, MANY };
struct Access {
  uint32_t epoch, warp_epoch;
  uint16_t thread;
};
struct Byte {
  Access write, read;
  Readers readers;
  bool copying;  // by a copy that nobody has waited for
};
Byte bytes[SHARED];
uint32_t epoch = 0, warp_epochs[32] = {};
bool in_kernel = false;

UNWATCHED inline bool unordered(const Access& before, unsigned thread) {
  if (before.epoch != epoch || before.thread == thread) return false;
  return before.thread / 32 != thread / 32 || before.warp_epoch == warp_epochs[thread / 32];
}

// an access of the thread that runs; what lies outside shared memory is no concern
UNWATCHED void watch(const void* address, size_t size, bool writes, bool copies) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(address), from = reinterpret_cast<uintptr_t>(shared);
  if (!in_kernel || at - from + FENCE >= shared_size + 2 * FENCE) return;
  if (at < from || at + size > from + shared_size)
    fail("an access is beyond the shared memory that was asked for");
  const unsigned thread = thread_index.x;
  const Access now{epoch, warp_epochs[thread / 32], uint16_t(thread)};
  for (Byte* byte = bytes + (at - from); size; size--, byte++) {
    if (byte->copying && !copies) fail("shared memory is used while an asynchronous copy to it may be on its way");
    if (unordered(byte->write, thread))
      fail(writes ? "two threads write to the same shared memory, with no barrier between"
                  : "a thread reads from shared memory what another one wrote, with no barrier between");
    Access& read = byte->read;
    if (writes) {
      const bool alone = byte->readers == ONE && read.thread == thread;
      const bool others = byte->readers == MANY || read.thread / 32 != thread / 32 ||
                          (read.warp_epoch == now.warp_epoch && !alone);
      if (read.epoch == epoch && others)
        fail("a thread writes to shared memory what another one has read, with no barrier between");
      byte->write = now;
    } else {
      if (read.epoch != epoch || (byte->readers != MANY && read.thread / 32 == thread / 32 &&
                                  read.warp_epoch != now.warp_epoch))
        byte->readers = ONE;
      else if (read.thread / 32 != thread / 32)
        byte->readers = MANY;
      else if (read.thread != thread && byte->readers == ONE)
        byte->readers = ONE_WARP;
      read = now;
    }
  }
}

#if defined(__x86_64__)
extern "C" void sana_edge_switch(void** from, void* to);
asm(R"(
.text
.globl sana_edge_switch
.hidden sana_edge_switch
sana_edge_switch:
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
void change(Fiber& from, Fiber& to) { sana_edge_switch(&from.context, to.context); }
#else
void change(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }
#endif

void enter(Fiber& fiber) {
  current = &fiber;
  thread_index = {fiber.number, 0, 0};
  in_kernel = true;
}

void leave() {
  Fiber& from = *current;
  in_kernel = false;
  change(from, scheduler);
}

bool any(const std::vector<Copy>& group) { return !group.empty(); }

void body() {
  kernel(kernel_argument);
  if (any(current->open) || std::any_of(current->groups.begin(), current->groups.end(), any))
    fail("a thread ends without having waited for its asynchronous copies");
  current->state = DONE;
  done++;
  leave();
  abort();
}

void prepare(Fiber& fiber, unsigned number) {
  if (!fiber.stack) {
    void* memory = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) fail("no memory for the stacks of the threads");
    mprotect(memory, 4096, PROT_NONE);
    fiber.stack = static_cast<char*>(memory);
  }
  fiber.number = number;
  fiber.state = READY;
  fiber.open.clear();
  fiber.groups.clear();
#if defined(__x86_64__)
  // six registers and the address to return to, so that the stack is aligned as after a call
  void** top = reinterpret_cast<void**>(fiber.stack + STACK) - 2;
  *top = reinterpret_cast<void*>(body);
  fiber.context = top - 6;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = STACK;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, body, 0);
#endif
}

UNWATCHED void mark_copies(const void* to, bool copying) {
  Byte* byte = bytes + (static_cast<const char*>(to) - shared);
  for (int n = 0; n < 16; n++) byte[n].copying = copying;
}

void perform(const std::vector<Copy>& group) {
  for (const Copy& copy : group) {
    mark_copies(copy.to, false);
    watch(copy.to, 16, true, true);
    if (copy.valid)
      memcpy(copy.to, copy.from, 16);
    else
      memset(copy.to, 0, 16);
  }
}

// bytes of both fences, in which nothing may have been written
void check_fences() {
  for (const char* p = shared - FENCE; p < shared_end; p++) {
    if (p == shared) p += shared_size;
    if (p < shared_end && static_cast<unsigned char>(*p) != UNTOUCHED)
      fail("the block wrote beyond the shared memory that was asked for");
  }
}

// memory whose end is that of its last page before an unreadable one, with one more before it
void ask_for_shared(size_t size) {
  constexpr size_t PAGE = 4096, ALL = SHARED + 3 * PAGE;
  if (!shared_end) {
    void* mapped = mmap(nullptr, ALL, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) fail("no memory for a block's shared memory");
    char* memory = static_cast<char*>(mapped);
    shared_end = memory + ALL - PAGE;
    mprotect(memory, PAGE, PROT_NONE);
    mprotect(shared_end, PAGE, PROT_NONE);
  }
  shared_size = size;
  shared = shared_end - (size + 127) / 128 * 128;
  memset(shared - FENCE, UNTOUCHED, shared_end - shared + FENCE);
}

void run_block() {
  // as NaN
  memset(shared, 0xff, shared_size);
  epoch++;
  waiting = done = 0;
  for (unsigned n = 0; n < threads; n++) prepare(*fibers[n], n);
  while (done < threads) {
    if (shuffle_seed) std::shuffle(order.begin(), order.begin() + threads, generator);
    bool progress = false;
    for (unsigned n = 0; n < threads; n++) {
      Fiber& fiber = *fibers[order[n]];
      if (fiber.state != READY) continue;
      progress = true;
      enter(fiber);
      change(scheduler, fiber);
    }
    if (waiting == threads) {
      waiting = 0;
      epoch++;
      for (unsigned n = 0; n < threads; n++) fibers[n]->state = READY;
    } else if (!progress && done < threads) {
      fail("a barrier or a collective is not reached by all of its threads");
    }
  }
  check_fences();
}

}  // namespace

void fail(const char* message) {
  char text[256];
  snprintf(text, sizeof text, "emulator: block (%u, %u, %u), thread %u: %s\n", block_index.x, block_index.y,
           block_index.z, thread_index.x, message);
  fputs(text, stderr);
  // "process:descriptor" of another stderr, for who captures the first and would lose it with the process
  int process = 0, other = -1;
  const char* named = getenv("SANA_EDGE_EMULATOR_STDERR");
  if (named && sscanf(named, "%d:%d", &process, &other) == 2 && process == getpid()) dprintf(other, "%s", text);
  abort();
}

void run(Index grid, unsigned count, size_t asked, void (*entry)(const void*), const void* argument) {
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  if (count % 32 || count > 1024 || !count) fail("a block has whole warps, up to 1024 threads");
  if (asked > SHARED) fail("a block asks for more shared memory than there is");
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535)
    fail("no such grid");
  counters.launches++;
  threads = count;
  ask_for_shared(asked);
  kernel = entry;
  kernel_argument = argument;
  grid_size = grid;
  block_size = {count, 1, 1};
  while (fibers.size() < count) fibers.push_back(std::make_unique<Fiber>());
  order.resize(fibers.size());
  std::iota(order.begin(), order.end(), 0u);
  generator.seed(shuffle_seed);
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  std::vector<uint64_t> sequence(blocks);
  std::iota(sequence.begin(), sequence.end(), uint64_t(0));
  if (shuffle_seed) std::shuffle(sequence.begin(), sequence.end(), generator);
  for (uint64_t block : sequence) {
    counters.blocks++;
    block_index = {unsigned(block % grid.x), unsigned(block / grid.x % grid.y),
                   unsigned(block / grid.x / grid.y)};
    run_block();
  }
}

char* shared_memory() { return shared; }

int shared_limit() { return shared_most; }

void synchronize_block() {
  current->state = AT_BARRIER;
  waiting++;
  leave();
}

void collective(Work work, void* data) {
  Fiber& self = *current;
  self.work = work;
  self.data = data;
  self.state = IN_COLLECTIVE;
  void* lanes[32];
  const unsigned first = self.number / 32 * 32;
  for (unsigned lane = 0; lane < 32; lane++) {
    const Fiber& other = *fibers[first + lane];
    if (other.state != IN_COLLECTIVE) return leave();
    if (other.work != work) fail("lanes of a warp are in different collectives");
    lanes[lane] = other.data;
  }
  work(lanes);
  for (unsigned lane = 0; lane < 32; lane++) fibers[first + lane]->state = READY;
}

void order_warp() { warp_epochs[current->number / 32]++; }

void touch(const void* address, size_t size, bool writes) { watch(address, size, writes, false); }

void copy_async16(void* to, const void* from, bool valid) {
  check_address(to, 16, true);
  if (valid) check_address(from, 16, false);
  // it may be written from now on until it is waited for
  watch(to, 16, true, false);
  mark_copies(to, true);
  current->open.push_back({to, from, valid});
}

void copy_async_commit() {
  current->groups.push_back(std::move(current->open));
  current->open.clear();
}

void copy_async_wait(int pending) {
  auto& groups = current->groups;
  while (groups.size() > size_t(pending)) {
    perform(groups.front());
    groups.pop_front();
  }
}

void check_address(const void* address, size_t size, bool in_shared) {
  const char* p = static_cast<const char*>(address);
  if (reinterpret_cast<uintptr_t>(p) % size) fail("an address is not a multiple of the size of the access");
  if (in_shared && (p < shared || p + size > shared + shared_size)) fail("an address is not in shared memory");
}

#if defined(__SANITIZE_THREAD__)
// Compiled with -fsanitize=thread every access in memory announces itself; without its library, to these.
#define WATCHED_AS(NAME, SIZE, WRITES) \
  extern "C" UNWATCHED void __tsan_##NAME(void* address) { watch(address, SIZE, WRITES, false); }
#define WATCHED(SIZE)                               \
  WATCHED_AS(read##SIZE, SIZE, false)               \
  WATCHED_AS(write##SIZE, SIZE, true)               \
  WATCHED_AS(unaligned_read##SIZE, SIZE, false)     \
  WATCHED_AS(unaligned_write##SIZE, SIZE, true)
WATCHED(1)
WATCHED(2)
WATCHED(4)
WATCHED(8)
WATCHED(16)
extern "C" UNWATCHED void __tsan_read_range(void* address, size_t size) { watch(address, size, false, false); }
extern "C" UNWATCHED void __tsan_write_range(void* address, size_t size) { watch(address, size, true, false); }
extern "C" UNWATCHED void __tsan_init() {}
extern "C" UNWATCHED void __tsan_func_entry(void*) {}
extern "C" UNWATCHED void __tsan_func_exit() {}
extern "C" UNWATCHED void __tsan_vptr_update(void*, void*) {}
extern "C" UNWATCHED void __tsan_vptr_read(void*) {}
#endif

}  // namespace emulator

extern "C" void sana_edge_emulator_shuffle(unsigned seed) { emulator::shuffle_seed = seed; }

extern "C" void sana_edge_emulator_device(int sm, int count, int bytes) {
  emulator::capability = sm;
  emulator::processors = count;
  emulator::shared_most = bytes;
}

extern "C" int sana_edge_emulated(void) { return SANA_EDGE_EMULATED; }

extern "C" sana_edge_status sana_edge_device(int, sana_edge_device_info* out) {
  if (!out) return SANA_EDGE_NULL_POINTER;
  *out = {emulator::capability, emulator::processors, emulator::shared_most};
  return SANA_EDGE_OK;
}

extern "C" void sana_edge_emulator_counters(int64_t* out) {
  memcpy(out, &emulator::counters, sizeof emulator::counters);
  emulator::counters = {};
}
