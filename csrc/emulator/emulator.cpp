#include "emulator.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

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
alignas(128) char shared[SHARED];
size_t shared_size;
unsigned shuffle_seed;
std::mutex one_at_a_time;
// an RTX 4060 Laptop
int capability = SANA_EDGE_EMULATED / 10, processors = 24, shared_most = 99 << 10;
std::mt19937 generator;

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
}

void leave() {
  Fiber& from = *current;
  change(from, scheduler);
}

void body() {
  kernel(kernel_argument);
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

void perform(const std::vector<Copy>& group) {
  for (const Copy& copy : group) {
    if (copy.valid)
      memcpy(copy.to, copy.from, 16);
    else
      memset(copy.to, 0, 16);
  }
}

void run_block() {
  memset(shared, 0xff, shared_size);
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
      for (unsigned n = 0; n < threads; n++) fibers[n]->state = READY;
    } else if (!progress && done < threads) {
      fail("a barrier or a collective is not reached by all of its threads");
    }
  }
}

}  // namespace

void fail(const char* message) {
  fprintf(stderr, "emulator: block (%u, %u, %u), thread %u: %s\n", block_index.x, block_index.y, block_index.z,
          thread_index.x, message);
  abort();
}

void run(Index grid, unsigned count, size_t bytes, void (*entry)(const void*), const void* argument) {
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  if (count % 32 || count > 1024 || !count) fail("a block has whole warps, up to 1024 threads");
  if (bytes > SHARED) fail("a block asks for more shared memory than there is");
  if (!grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535) fail("no such grid");
  counters.launches++;
  threads = count;
  shared_size = bytes;
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

void copy_async16(void* to, const void* from, bool valid) {
  check_address(to, 16, true);
  if (valid) check_address(from, 16, false);
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
