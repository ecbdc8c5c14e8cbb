// Host test of csrc/linear_attention_maps.h: ends with the line of the first claim that does not hold.
#include "linear_attention_maps.h"

#include <set>
#include <vector>

#define CLAIM(condition) \
  if (!(condition)) return __LINE__

// every row of the weight is in one tile, and K of a head is with its V
template <int N>
int test_weight_tiles(int heads) {
  const int width = heads * HEAD;
  std::vector<int> times(3 * width);
  for (int n = 0; n < weight_tiles<N>(heads); n++) {
    const WeightTile<N> tile = weight_tile<N>(n, heads);
    CLAIM(tile.keys == (n < key_tiles<N>(heads)));
    CLAIM(tile.row(0, width) >= 0 && tile.first % HEAD == 0 && tile.channels % HEAD == 0);
    for (int column = 0; column < N; column++) {
      const int row = tile.row(column, width);
      if (row < 0) continue;
      times[row]++;
      if (tile.keys && column < N / 2) CLAIM(tile.row(column + N / 2, width) == row + width);
      if (!tile.keys) CLAIM(row == tile.first + column);
    }
  }
  for (int count : times) CLAIM(count == 1);
  return 0;
}

template <int N>
int test_staged() {
  std::set<int> places;
  for (int row = 0; row < 64; row++)
    for (int column = 0; column < N; column++) {
      places.insert(staged<N>(row, column));
      CLAIM(staged<N>(row, column) / N == row);
      CLAIM(staged<N>(row + 16, column) == staged<N>(row, column) + 16 * N);
      // pieces stay whole
      CLAIM(staged<N>(row, column) % 8 == column % 8);
      CLAIM(staged<N>(row, column) / 8 == staged<N>(row, column / 8 * 8) / 8);
    }
  CLAIM(places.size() == 64 * N);
  // 8 rows of one piece are in all banks, for whatever lanes give load_matrices_transposed
  for (int matrix = 0; matrix < 4; matrix++) {
    std::set<int> keys, values;
    for (int lane = 8 * matrix; lane < 8 * matrix + 8; lane++) {
      keys.insert(staged<N>(key_row(lane), key_column(lane)) / 8 % 8);
      values.insert(staged<N>(value_row(lane), value_column(lane)) / 8 % 8);
    }
    CLAIM(keys.size() == 8 && values.size() == 8);
  }
  return 0;
}

int main() {
  for (int heads = 1; heads <= 72; heads++) {
    if (const int line = test_weight_tiles<64>(heads)) return line;
    if (const int line = test_weight_tiles<128>(heads)) return line;
  }
  if (const int line = test_staged<64>()) return line;
  if (const int line = test_staged<128>()) return line;
  std::set<int> sums;
  for (int lane = 0; lane < WARP; lane++)
    for (int n = 0; n < 2; n++)
      for (int i = 0; i < 4; i++) sums.insert(sum_row(lane, i) * 16 + sum_column(lane, n, i));
  CLAIM(sums.size() == 256 && *sums.begin() == 0 && *sums.rbegin() == 255);
  return 0;
}
