// Checks csrc/gemm_maps.h, csrc/gemm_tiles.h and the choice of csrc/tile_times.h on the host, for
// test_gemm_maps.py: says what is wrong, or "ok".
#include <stdio.h>

#include <algorithm>
#include <map>
#include <set>
#include <utility>
#include <vector>

#include "tile_times.h"

int wrong = 0;

void expect(bool right, const char* tile, const char* what) {
  if (!right) printf("%s: %s\n", tile, what), wrong++;
}

// whether accesses of ``size`` bytes, which lanes make together, meet each of the 32 banks once
bool free_of_conflicts(const std::vector<int>& offsets, int size) {
  std::set<int> banks;
  for (int offset : offsets)
    for (int byte = 0; byte < size; byte += 4)
      if (!banks.insert((offset + byte) / 4 % 32).second) return false;
  return true;
}

// whether every number below ``count`` is there ``times`` times, and no other
bool each(const std::map<int, int>& seen, int count, int times) {
  if (int(seen.size()) != count) return false;
  for (auto [number, found] : seen)
    if (number < 0 || number >= count || found != times) return false;
  return true;
}

template <class T>
void check_copies(const char* tile, int rows, int copies) {
  std::map<int, int> sources, places;
  for (int n = 0; n < copies; n++)
    for (int first = 0; first < T::THREADS; first += 8) {
      std::vector<int> together;
      for (int thread = first; thread < first + 8; thread++) {
        const int row = copied_row<T>(thread, n), piece = copied_piece<T>(thread);
        sources[row * T::PIECES + piece]++;
        together.push_back(piece_offset<T>(row, piece));
        places[together.back() / 16]++;
      }
      expect(free_of_conflicts(together, 16), tile, "copies write to a bank twice");
    }
  expect(each(sources, rows * T::PIECES, 1), tile, "copies do not cover an operand once");
  expect(each(places, rows * T::PIECES, 1), tile, "two pieces are in one place");
}

// what a load gets: rows and pieces of lanes 8 i to 8 i + 7 must be those of matrix i
template <class T>
void check_fragments(const char* tile) {
  for (int thread = 0; thread < T::THREADS; thread += 8)
    for (int step = 0; step < T::STEPS; step++) {
      const int matrix = thread % 32 / 8;
      for (int m = 0; m < T::MT; m++) {
        std::vector<int> together;
        for (int lane = 0; lane < 8; lane++) {
          together.push_back(left_offset<T>(thread + lane, m, step));
          const int row = tile_row<T>(thread / 32 * 32 + lane * 4, m, matrix % 2 * 2);
          expect(together.back() == piece_offset<T>(row, 2 * step + matrix / 2), tile, "another row of the left");
        }
        expect(free_of_conflicts(together, 16), tile, "fragments of the left meet a bank twice");
      }
      for (int pair = 0; pair < T::NT / 2; pair++) {
        std::vector<int> together;
        for (int lane = 0; lane < 8; lane++) {
          together.push_back(right_offset<T>(thread + lane, pair, step));
          const int column = warp_column<T>(thread) + (2 * pair + matrix / 2) * 8 + lane;
          expect(together.back() == piece_offset<T>(column, 2 * step + matrix % 2), tile, "another column");
        }
        expect(free_of_conflicts(together, 16), tile, "fragments of the right meet a bank twice");
      }
    }
}

template <class T>
void check_sums(const char* tile) {
  std::map<int, int> sums;
  for (int thread = 0; thread < T::THREADS; thread++)
    for (int m = 0; m < T::MT; m++)
      for (int n = 0; n < T::NT; n++)
        for (int i = 0; i < 4; i++) sums[tile_row<T>(thread, m, i) * T::N + tile_column<T>(thread, n, i)]++;
  expect(each(sums, T::M * T::N, 1), tile, "sums do not cover the tile once");
}

template <class T>
void check_staging(const char* tile) {
  constexpr int WIDTH = T::N / T::WARPS_N;
  std::map<int, int> places, read;
  for (int row = 0; row < 16; row++)
    for (int column = 0; column < WIDTH; column++) places[staged_place<T>(row, column)]++;
  expect(each(places, 16 * WIDTH, 1), tile, "two sums are staged in one place");
  // writes of 8 bytes are made by half a warp at a time, reads of 16 by a quarter
  for (int n = 0; n < T::NT; n++)
    for (int half = 0; half < 2; half++)
      for (int first = 0; first < 32; first += 16) {
        std::vector<int> together;
        for (int lane = first; lane < first + 16; lane++)
          together.push_back(4 * staged_place<T>(lane / 4 + half * 8, lane % 4 * 2 + n * 8));
        expect(free_of_conflicts(together, 8), tile, "staging writes to a bank twice");
      }
  for (int pass = 0; pass < staged_passes<T>(); pass++)
    for (int half = 0; half < 2; half++)
      for (int first = 0; first < 32; first += 8) {
        std::vector<int> together;
        for (int lane = first; lane < first + 8; lane++) {
          const int row = staged_row<T>(lane, pass), column = staged_column<T>(lane) + half * 4;
          together.push_back(4 * staged_place<T>(row, column));
          read[(row * WIDTH + column) / 4]++;
        }
        expect(free_of_conflicts(together, 16), tile, "staging reads a bank twice");
      }
  expect(each(read, 16 * WIDTH / 4, 1), tile, "staged sums are not read once");
}

template <class T>
void check_tile(const char* tile, int most) {
  check_copies<T>(tile, T::M, T::LEFT_COPIES);
  check_copies<T>(tile, T::N, T::RIGHT_COPIES);
  check_fragments<T>(tile);
  check_sums<T>(tile);
  check_staging<T>(tile);
  expect(T::SHARED <= most << 10, tile, "too much shared memory");
}

void check_order_of_blocks() {
  for (unsigned rows : {1u, 7u, 8u, 9u, 20u})
    for (unsigned columns : {1u, 5u, 45u}) {
      std::map<int, int> places;
      for (unsigned block = 0; block < rows * columns; block++) {
        const TilePlace place = tile_of_block(block, rows, columns);
        places[place.row * int(columns) + place.column]++;
        expect(place.row < int(rows) && place.column < int(columns), "blocks", "a tile outside of the result");
      }
      expect(each(places, int(rows * columns), 1), "blocks", "tiles are not made once");
    }
  // as many tiles as there can be
  const TilePlace last = tile_of_block(2147483639u, 33554432u, 64);
  expect(last.row < 33554432 && last.row >= 33554424 && last.column <= 63, "blocks", "a place overflows");
}

void check_choice() {
  const struct {
    int64_t rows, columns;
    sana_edge_device_info device;
    int tile;
  } cases[] = {
      // a 4090 Laptop, 1024 px with guidance: 72 tiles of 256 x 128 for 76 SMs; without it 72 of 128 x 128
      {2048, 1152, {89, 76, 99 << 10}, LARGE},
      {1024, 1152, {89, 76, 99 << 10}, MIDDLE},
      // sana-tiny: few tiles, so small ones
      {256, 192, {89, 76, 99 << 10}, SMALL},
      {1, 8, {120, 60, 99 << 10}, SMALL},
      {1 << 30, 11200, {90, 132, 227 << 10}, MIDDLE},
      {2048, 1152, {75, 40, 64 << 10}, TURING},
      {1, 1152, {75, 40, 64 << 10}, TURING_SMALL},
      // codes without a table of their own
      {2048, 1152, {87, 16, 163 << 10}, MIDDLE},
      {2048, 1152, {103, 132, 227 << 10}, LARGE},
      // little shared memory, and a GPU that is too old
      {2048, 1152, {89, 76, 33 << 10}, SMALL},
      {2048, 1152, {89, 76, 31 << 10}, -1},
      {2048, 1152, {70, 80, 96 << 10}, -1},
  };
  for (const auto& one : cases) {
    sana_edge_w8a8_linear_args a{};
    a.rows = one.rows, a.columns = int32_t(one.columns), a.depth = 1152;
    const int found = pick_tile(a, one.device) - 1;
    if (found != one.tile)
      printf("%lld x %lld on %d: tile %d, not %d\n", static_cast<long long>(one.rows),
             static_cast<long long>(one.columns), one.device.capability, found, one.tile),
          wrong++;
  }
}

int main() {
  // each within what the smallest of its architectures has, and those of which two share an SM within half of it
  check_tile<TileLarge>("large", 99);
  check_tile<TileMiddle>("middle", 49);
  check_tile<TileNarrow>("narrow", 49);
  check_tile<TileSmall>("small", 49);
  check_tile<TileTuring>("turing", 32);
  check_tile<TileTuringSmall>("turing small", 32);
  // what other operations may ask for
  check_tile<Tile<128, 64, 128, 2, 2, 3>>("128 deep", 99);
  check_tile<Tile<64, 128, 128, 1, 2, 2>>("wide warps", 99);
  check_order_of_blocks();
  check_choice();
  if (!wrong) printf("ok\n");
  return wrong != 0;
}
