// Host test of csrc/cross_attention_maps.h: ends with the line of the first claim that does not hold.
#include "cross_attention_maps.h"

#include <set>

using namespace cross_attention;

#define CLAIM(condition) \
  if (!(condition)) return __LINE__

int main() {
  std::set<int> channels, keys, value_keys, outputs, rows, tokens;
  for (int lane = 0; lane < WARP; lane++) {
    for (int half = 0; half < 2; half++) tokens.insert(token_of(lane, half));
    for (int step = 0; step < 8; step++) {
      CLAIM(channel_of(lane, step) % 4 == 0);
      channels.insert(channel_of(lane, step));
    }
    for (int tile = 0; tile < 16; tile++) {
      rows.insert(value_row_of(lane, tile));
      outputs.insert(output_of(lane, tile));
      // V^T row n of a tile is column n of the outputs, lanes n / 2 of each group of 4
      CLAIM(output_of(lane, tile) == value_row_of(lane % 4 * 2 * 4, tile));
    }
    value_keys.insert(value_key_of(lane));
    for (int tile = 0; tile < 2; tile++) {
      keys.insert(key_row_of(lane, tile));
      for (int i = 0; i < 2; i++) {
        // column n of a tile of scores is row n of b, which lanes 4 n to 4 n + 3 load
        const int column = lane % 4 * 2 + i;
        CLAIM(score_key_of(lane, tile, i) == key_row_of(4 * column, tile));
        // scores as a fragment of P meet the same keys of V: tile 0 has the first pair, tile 1 the second
        CLAIM(score_key_of(lane, tile, i) == value_key_of(lane) + 2 * tile + i);
      }
      // as a row of b all 4 lanes of a group load the same key
      CLAIM(key_row_of(lane, tile) == key_row_of(lane / 4 * 4, tile));
      CLAIM(key_row_of(lane, tile) == key_row_of(lane, 0) + 2 * tile);
    }
  }
  CLAIM(tokens.size() == TOKENS && *tokens.rbegin() == TOKENS - 1);
  CLAIM(channels.size() == 32 && *channels.rbegin() == 124);
  CLAIM(keys.size() == KEYS && *keys.rbegin() == KEYS - 1);
  CLAIM(value_keys.size() == 4 && *value_keys.rbegin() == 12);
  CLAIM(rows.size() == 128 && *rows.rbegin() == 127);
  CLAIM(outputs.size() == 64 && *outputs.rbegin() == 126);
  // a warp's 2 bytes of 8 rows and 4 lanes lie in 16 of the 32 banks, two lanes in each word
  for (int columns = 16; columns <= 2560; columns += 16) {
    CLAIM(stage_stride(columns) >= columns && stage_stride(columns) % 16 == 0);
    for (int tile = 0; tile < columns / 8; tile++) {
      std::set<int> banks;
      for (int lane = 0; lane < WARP; lane++)
        banks.insert((token_of(lane, 0) * stage_stride(columns) + output_of(lane, tile)) / 4 % 32);
      CLAIM(banks.size() == 16);
    }
  }
  return 0;
}
