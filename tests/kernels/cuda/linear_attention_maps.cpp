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
    CLAIM(tile.row(0) >= 0 && tile.first % HEAD == 0 && tile.channels % HEAD == 0);
    for (int column = 0; column < N; column++) {
      const int row = tile.row(column);
      if (row < 0) continue;
      times[row]++;
      if (tile.keys && column < N / 2) CLAIM(tile.row(column + N / 2) == row + width);
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

// every number of q and of a head's state in one product, every output in one place
int test_read() {
  std::set<int> queries, state, outputs;
  for (int lane = 0; lane < WARP; lane++) {
    for (int step = 0; step < 2; step++) {
      for (int i = 0; i < 8; i++) queries.insert(query_row(lane) * HEAD + 16 * step + query_column(lane) + i);
      for (int i = 0; i < 4; i++)
        for (int n = 0; n < 4; n++)
          state.insert((16 * step + state_row(lane, i)) * HEAD + state_column(lane) + n);
    }
    for (int n = 0; n < 4; n++)
      for (int i = 0; i < 4; i++) {
        const int column = output_column(lane) + i % 2 * 4 + n;
        outputs.insert(sum_row(lane, i) * HEAD + column);
        // column j of the n-th product is that of the lanes that have the state's column for it
        const int j = sum_column(lane, 0, i);
        CLAIM(column == state_column(4 * j) + n);
      }
  }
  CLAIM(queries.size() == 16 * HEAD && state.size() == HEAD * HEAD && outputs.size() == 16 * HEAD);
  // 8 rows of one piece are in all banks
  for (int heads = 1; heads <= 256; heads++) {
    std::set<int> pieces;
    for (int row = 0; row < 8; row++) pieces.insert(row * row_elements(heads) / 8 % 8);
    CLAIM(pieces.size() == 8 && row_elements(heads) % 8 == 0);
  }
  return 0;
}

int main() {
  if (const int line = test_read()) return line;
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
