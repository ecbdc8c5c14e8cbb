// Tiles of the INT8 products: which there are, which an architecture chooses from, and the choice. Host only.
//
// Reasoned from registers, shared memory and rates, checked for spilled registers; not measured.
// - SANA's widths are odd multiples of 64 or 128 and its token counts multiples of 256: so 256 x 128 rather than
//   128 x 256. Its 128 sums per thread of 8 warps are the most that fit into 255 registers with the fragments.
// - 128 x 128 with 4 warps holds as many per thread. Two of these are on an SM, one multiplying while the other
//   writes its results: so at most half of an SM's shared memory, which is 100 KiB on 8.6, 8.9 and 12.0.
// - 64 deep divides 1152, 2240, 2880 and 5600 best, and four stages of it are as much ahead as two of 128.
// - Turing has 64 KiB per SM and copies through registers: two stages, and two blocks on an SM.
#pragma once

#include "gemm_maps.h"

using TileLarge = Tile<256, 128, 64, 4, 2, 4>;
using TileMiddle = Tile<128, 128, 64, 2, 2, 3>;
using TileNarrow = Tile<128, 64, 64, 2, 2, 4>;
using TileSmall = Tile<64, 64, 64, 2, 2, 4>;
using TileTuring = Tile<128, 128, 64, 2, 2, 2>;
using TileTuringSmall = Tile<64, 64, 64, 2, 2, 2>;

enum TileName { LARGE, MIDDLE, NARROW, SMALL, TURING, TURING_SMALL };

// so many products of two int8 add up within int32: 131071 x 128^2 < 2^31
constexpr int EXACT_DEPTH = 131071;

struct TileFacts {
  TileName name;
  int m, n, shared;
  int reads;  // bytes that its warps read from shared memory for each step of depth
};

template <class T>
constexpr TileFacts facts_of(TileName name) {
  return {name, T::M, T::N, T::SHARED, T::M * T::WARPS_N + T::N * T::WARPS_M};
}

struct TileTable {
  int capability;  // of this and those up to the next table's
  // products per clock and SM over the bytes that L2 gives it in this time, 64: what a byte costs
  int balance;
  TileFacts tiles[4];
  int count;
};

constexpr TileFacts AMPERE_TILES[] = {facts_of<TileLarge>(LARGE), facts_of<TileMiddle>(MIDDLE),
                                      facts_of<TileNarrow>(NARROW), facts_of<TileSmall>(SMALL)};
constexpr TileTable TILE_TABLES[] = {
    // 1024 products per clock and SM
    {75, 16, {facts_of<TileTuring>(TURING), facts_of<TileTuringSmall>(TURING_SMALL), {}, {}}, 2},
    // 2048
    {80, 32, {AMPERE_TILES[0], AMPERE_TILES[1], AMPERE_TILES[2], AMPERE_TILES[3]}, 4},
    // 1024: 8.6, 8.7, 8.9
    {86, 16, {AMPERE_TILES[0], AMPERE_TILES[1], AMPERE_TILES[2], AMPERE_TILES[3]}, 4},
    // 4096 with wgmma; mma.sync, which is what runs here, reaches about 5/8 of it
    {90, 40, {AMPERE_TILES[0], AMPERE_TILES[1], AMPERE_TILES[2], AMPERE_TILES[3]}, 4},
    // 1024
    {120, 16, {AMPERE_TILES[0], AMPERE_TILES[1], AMPERE_TILES[2], AMPERE_TILES[3]}, 4},
};

inline const TileTable* tile_table(int capability) {
  const TileTable* found = nullptr;
  for (const TileTable& table : TILE_TABLES)
    if (table.capability <= capability) found = &table;
  return found;
}

// The tile with which (rows, columns) sums take the least time on a device, by counting: rounds, in which every SM
// has one tile, times what a round takes for the same depth. That is a tile's products or, if more, what its warps
// read from shared memory, 128 bytes per clock; and its bytes' cost. nullptr where no tile fits.
inline const TileFacts* pick_tile(int64_t rows, int64_t columns, const sana_edge_device_info& device) {
  const TileTable* table = tile_table(device.capability);
  const TileFacts* best = nullptr;
  int64_t least = 0;
  for (int n = 0; table && n < table->count; n++) {
    const TileFacts& tile = table->tiles[n];
    if (tile.shared > device.shared_memory) continue;
    const int64_t count = blocks_of<int64_t>(rows, tile.m) * blocks_of<int64_t>(columns, tile.n);
    const int busy = larger(tile.m * tile.n, tile.reads * table->balance / 2);
    const int round = busy + table->balance * (tile.m + tile.n);
    const int64_t cost = blocks_of<int64_t>(count, device.processors) * round;
    if (!best || cost < least) best = &tile, least = cost;
  }
  return best;
}
