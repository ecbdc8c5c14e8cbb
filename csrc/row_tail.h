// What follows a product and needs whole rows, in the same launch: a block that has written its tile says so, and
// when all tiles of some rows are there, the blocks that made them turn these rows to INT8.
//
// A block waits a bounded time for the others, which may not have begun: whoever comes last finds all rows that
// nobody took. So nothing depends on blocks being at work together; where they are, all share the work.
#pragma once

#include "linear_attention_maps.h"
#include "row_norm.h"

// of the rows of a row of tiles; zeros between launches
struct TailCounters {
  int written;  // tiles
  int taken;    // groups of rows
  int left;     // blocks
};
constexpr int TAIL_ROWS = 4;  // that a warp takes at a time
// columns of a row that a warp can have: 72 numbers a lane
constexpr int TAIL_CHUNKS = 9;
constexpr int TAIL_COLUMNS = TAIL_CHUNKS * CHUNK * WARP;
// they are those of linear attention, which are zeros then
constexpr int MOST_TAILS = COUNTERS * int(sizeof(int)) / int(sizeof(TailCounters));

// whether all tiles of this block's rows are there, the same on every thread
__device__ __forceinline__ bool all_written(TailCounters* counters, int tiles, int patience) {
  int* const flag = reinterpret_cast<int*>(shared_memory());
  fence_device();
  // also: nobody needs the shared memory any more
  synchronize_block();
  if (threadIdx.x == 0) {
    bool all = atomic_add(&counters->written, 1) == tiles - 1;
    for (int n = 0; n < patience && !all; n++) all = load_volatile(&counters->written) == tiles;
    *flag = all;
  }
  synchronize_block();
  const bool all = *flag;
  if (all) fence_device();
  return all;
}

// each of ``rows`` rows by ``each``, on a warp; all threads of all blocks that made them call it
template <class Each>
__device__ __forceinline__ void share_rows(TailCounters* counters, int tiles, int patience, int rows,
                                           const Each& each) {
  if (all_written(counters, tiles, patience)) {
    for (;;) {
      int group = threadIdx.x % WARP == 0 ? atomic_add(&counters->taken, 1) : 0;
      group = shuffle(group, 0);
      if (group * TAIL_ROWS >= rows) break;
      const int end = smaller(rows, (group + 1) * TAIL_ROWS);
      for (int row = group * TAIL_ROWS; row < end; row++) each(row);
    }
  }
  synchronize_block();
  if (threadIdx.x == 0 && atomic_add(&counters->left, 1) == tiles - 1) *counters = TailCounters{};
}
