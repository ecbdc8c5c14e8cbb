// How long a product takes on a device with each tile, by counting, and so the choice of the tile. Host only.
//
// The SM that has the most tiles is counted, in clocks. Of a tile: its products on tensor cores, what it reads from
// L2, what its warps read from shared memory, and behind them the epilogue's instructions and bytes. Limits that are
// near each other slow each other: the 4-norm of them. Two blocks on an SM hide each other's starts and all
// epilogues but the last; one alone waits for both, and at each barrier. benchmarks/roofline.py asks the same functions, by sana_edge.h.
//
// ASSUMED, not measured: every number of DEVICE_RATES but products, FILL, BARRIER, the 4-norm, and that a scheduler
// with w warps issues in w of w + 1 clocks.
#pragma once

#include <math.h>

#include "gemm_tiles.h"

struct DeviceRates {
  int capability;  // of this and those up to the next
  int products;    // of INT8 with their sums, per clock and SM, by mma.sync
  int l2;          // bytes per clock and SM
};
constexpr DeviceRates DEVICE_RATES[] = {
    // T4: 1.27 TB/s of 40 SMs at 1.59 GHz
    {75, 1024, 20},
    // of 47 by the data sheet
    {80, 2048, 32},
    // 8.6, 8.7, 8.9; 14.7 were measured on an L40
    {86, 1024, 16},
    // 4096 with wgmma, of which mma.sync reaches about 5/8; 5.6 TB/s of 114 SMs at 1.755 GHz
    {90, 2560, 28},
    // as 8.9
    {120, 1024, 16},
};
constexpr double FILL = 1500;     // from a block's start to its first product: 700 instructions, and L2
constexpr double BARRIER = 40;    // that a block alone on its SM waits for each 64 of depth
constexpr int REGISTERS = 65536;  // of an SM
constexpr int SCHEDULERS = 4;

inline const DeviceRates& rates_of(int capability) {
  const DeviceRates* found = DEVICE_RATES;
  for (const DeviceRates& rates : DEVICE_RATES)
    if (rates.capability <= capability) found = &rates;
  return *found;
}

inline double four_norm(double a, double b) { return sqrt(sqrt(a * a * a * a + b * b * b * b)); }

// blocks that an SM has room for: a thread takes half as many registers again as it has sums, and 64
inline int resident_blocks(const sana_edge_tile& tile, int shared_memory) {
  const int threads = WARP * tile.warps_down * tile.warps_across;
  const int sums = tile.rows * tile.columns / threads;
  const int shared = tile.stages * (tile.rows + tile.columns) * 64;
  // 1 KiB of each is the system's
  return larger(1, smaller((shared_memory + 1024) / (shared + 1024), REGISTERS / (threads * (64 + sums * 3 / 2))));
}

inline sana_edge_tile_time time_of(const sana_edge_tile& tile, const sana_edge_device_info& device) {
  const DeviceRates& rates = rates_of(device.capability);
  const double depth = 64.0 * blocks_of(tile.depth, 64), results = double(tile.rows) * tile.columns;
  const double warps = double(tile.warps_down) * tile.warps_across / SCHEDULERS;  // of a scheduler
  sana_edge_tile_time time{};
  time.rounds = blocks_of(tile.count, int64_t(larger(device.processors, 1)));
  time.resident = int32_t(smaller<int64_t>(time.rounds, resident_blocks(tile, device.shared_memory)));
  time.products = results * depth / rates.products;
  time.l2 = (tile.rows + tile.columns) * depth / rates.l2;
  const int read = tile.rows * tile.warps_across + tile.columns * tile.warps_down;
  time.shared = (read + tile.rows + tile.columns) * depth / 128;
  // those of all blocks on the SM together
  const double busy_warps = warps * time.resident, behind = results * time.resident;
  const double issued = behind / WARP * tile.instructions / (SCHEDULERS * busy_warps / (busy_warps + 1));
  time.epilogue = four_norm(issued, behind * tile.moved / rates.l2) / time.resident;
  double busy = four_norm(time.products, four_norm(time.l2, time.shared));
  if (time.resident < 2) {
    busy += depth / 64 * BARRIER;
    time.total = time.rounds * (FILL + busy + time.epilogue);
  } else {
    time.total = FILL + time.rounds * larger(busy, time.epilogue) + time.resident * time.epilogue;
  }
  return time;
}

// ---- the tiles of w8a8_linear ----

// Instructions of a warp for 32 results behind the sums, by Epilogue: what a tile of 128 columns has in its machine
// code for 8.9 beyond one of 64, which tests/kernels/cuda/test_build.py counts. ALL is without SiLU, which SANA never
// has together with the rest.
constexpr int INSTRUCTIONS[] = {11, 16, 15, 21, 23, 30};

inline sana_edge_tile tile_of(const TileFacts& tile, const sana_edge_w8a8_linear_args& a) {
  const int64_t count = blocks_of<int64_t>(a.rows, tile.m) * blocks_of<int64_t>(a.columns, tile.n);
  return {count, tile.m, tile.n, a.depth, tile.warps_m, tile.warps_n, tile.stages, INSTRUCTIONS[epilogue_of(a)],
          a.residual ? 4 : 2};
}

// times of the tiles that a device has room for, to ``out``, in the order of their table; how many
inline int linear_tiles(const sana_edge_w8a8_linear_args& a, const sana_edge_device_info& device,
                        sana_edge_tile_time (&out)[MOST_TILES]) {
  const TileTable* table = tile_table(device.capability);
  int count = 0;
  for (int n = 0; table && n < table->count; n++) {
    const TileFacts& tile = table->tiles[n];
    if (tile.shared > device.shared_memory) continue;
    out[count] = time_of(tile_of(tile, a), device);
    out[count].tile = tile.name + 1;
    out[count].rows = tile.m;
    out[count].columns = tile.n;
    count++;
  }
  return count;
}

// whether a device has room for the tile of a number, and kernels with it
inline bool has_tile(const sana_edge_device_info& device, int number) {
  const TileTable* table = tile_table(device.capability);
  for (int n = 0; table && n < table->count; n++)
    if (table->tiles[n].name + 1 == number) return table->tiles[n].shared <= device.shared_memory;
  return false;
}

// the number of the tile that takes the least time, of equal ones the larger; 0 where none fits
inline int pick_tile(const sana_edge_w8a8_linear_args& a, const sana_edge_device_info& device) {
  sana_edge_tile_time times[MOST_TILES];
  const int count = linear_tiles(a, device, times);
  const sana_edge_tile_time* best = nullptr;
  for (int n = 0; n < count; n++)
    if (!best || times[n].total < best->total) best = &times[n];
  return best ? best->tile : 0;
}
