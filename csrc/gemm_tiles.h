// Tiles of the INT8 products: which there are, and which an architecture chooses from. tile_times.h chooses.
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

// sana_edge_w8a8_linear_args.tile is one more
enum TileName { LARGE, MIDDLE, NARROW, SMALL, TURING, TURING_SMALL };
constexpr int MOST_TILES = 4;

// so many products of two int8 add up within int32: 131071 x 128^2 < 2^31
constexpr int EXACT_DEPTH = 131071;

// what follows scales and bias: nothing; SiLU; the residual; gate and residual; these and a constant; or what is asked
// for of all there is
enum Epilogue { BIAS, SILU, RESIDUAL, GATED, CONSTANT, ALL };

inline Epilogue epilogue_of(const sana_edge_w8a8_linear_args& a) {
  const bool gated = a.gate && a.residual;
  if (a.limit > 0 || (a.silu && (a.gate || a.residual)) || ((a.gate || a.constant) && !gated)) return ALL;
  if (a.constant) return a.silu ? ALL : CONSTANT;
  return a.silu ? SILU : gated ? GATED : a.residual ? RESIDUAL : BIAS;
}

struct TileFacts {
  TileName name;
  int m, n, warps_m, warps_n, stages, shared;
};

template <class T>
constexpr TileFacts facts_of(TileName name) {
  return {name, T::M, T::N, T::WARPS_M, T::WARPS_N, T::STAGES, T::SHARED};
}

struct TileTable {
  int capability;  // of this and those up to the next table's
  TileFacts tiles[MOST_TILES];
  int count;
};
constexpr TileTable TILE_TABLES[] = {
    {75, {facts_of<TileTuring>(TURING), facts_of<TileTuringSmall>(TURING_SMALL), {}, {}}, 2},
    {80,
     {facts_of<TileLarge>(LARGE), facts_of<TileMiddle>(MIDDLE), facts_of<TileNarrow>(NARROW),
      facts_of<TileSmall>(SMALL)},
     4},
};

inline const TileTable* tile_table(int capability) {
  const TileTable* found = nullptr;
  for (const TileTable& table : TILE_TABLES)
    if (table.capability <= capability) found = &table;
  return found;
}
