// A GPU's execution model on one CPU thread: each thread of a block is a fiber, blocks run one after the other.
//
// It is stricter than a GPU, to show what a GPU may hide: lanes of a warp run apart until a collective, the order
// of threads and blocks can be shuffled, shared memory starts as NaN, and asynchronous copies happen when they are
// waited for, no sooner. A barrier that a thread misses, a collective with different lanes, a misaligned access,
// a write beyond the shared memory, a copy that nobody waits for and accesses of shared memory by two threads
// that no barrier orders end the process with a message. Of accesses those by load_vector and the like are
// watched, and plain ones where -fsanitize=thread announces them.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "../sana_edge.h"

namespace emulator {

struct Index {
  unsigned x = 1, y = 1, z = 1;
};

// of the fiber that runs
extern Index thread_index, block_index, block_size, grid_size;

// what was counted since reset()
struct Counters {
  int64_t launches, blocks, int8_products, half_products;
  // reads of 8 rows by load_matrices, and how many more cycles they took since rows shared banks
  int64_t matrix_reads, bank_conflicts;
};
extern Counters counters;

// runs entry(argument) in every thread of every block
void run(Index grid, unsigned threads, size_t shared, void (*entry)(const void*), const void* argument);

char* shared_memory();
// bytes that a block may have, of the device that is emulated
int shared_limit();
void synchronize_block();

// waits until all lanes of the warp have come with the same ``work``, which is done once, on what they all gave
using Work = void (*)(void* const lanes[32]);
void collective(Work work, void* data);

// in a collective: what the warp's lanes did in shared memory comes before what they do next
void order_warp();
// ends the process where another thread's access of these bytes of shared memory is not ordered with this one
void touch(const void* address, size_t size, bool writes);

void copy_async16(void* to, const void* from, bool valid);
void copy_async_commit();
void copy_async_wait(int pending);

// ends the process where an address is not a multiple of its size, or, if ``shared``, not in shared memory
void check_address(const void* address, size_t size, bool shared);

[[noreturn]] void fail(const char* message);

}  // namespace emulator

extern "C" {
// 0: threads and blocks in their order, else shuffled by this seed
SANA_EDGE_API void sana_edge_emulator_shuffle(unsigned seed);
// the device that is told to callers: compute capability (89), multiprocessors, shared memory of a block in bytes
SANA_EDGE_API void sana_edge_emulator_device(int capability, int processors, int shared);
// the emulator's Counters as six int64, and sets them to zero
SANA_EDGE_API void sana_edge_emulator_counters(int64_t* out);
}
