// Index arithmetic of linear attention, whose sums several blocks make: where each of them puts its part, and which
// tile of the weight has what.
//
// The workspace has counters in a place of their own, which are zero between launches, whatever the shapes of
// these are; behind them the parts of a head lie one after the other.
#pragma once

#include "device.h"

constexpr int HEAD = 32;
// floats of a head's state: 32 rows of sum ReLU(k_d) v, and sum ReLU(k)
constexpr int STATE = (HEAD + 1) * HEAD;
// no part is of fewer tokens, but for an image's last one
constexpr int PART_TOKENS = 64;
constexpr int COUNTERS = 1 << 14;

struct Parts {
  int* counters;
  float* sums;
  int count;  // of a head

  HOST_DEVICE float* part(int64_t head, int n) const { return sums + (head * count + n) * STATE; }
};

HOST_DEVICE Parts parts_of(void* workspace, int count) {
  int* counters = static_cast<int*>(workspace);
  return {counters, reinterpret_cast<float*>(counters + COUNTERS), count};
}

// Rows of the weight (3 C, depth) in a tile of N: K and V of N / 64 heads, or N columns of q where that is all.
// Tiles of K and V come first, since they take longer.
template <int N>
struct WeightTile {
  static constexpr int HEADS = N / 2 / HEAD;
  bool keys;        // of K and V
  int first;        // channel of the first column, and of column N / 2
  int channels;     // that are there: all N, or of each half the first ones
  int split;        // columns from here on are of V
  int to_keys;      // from a row of Q to that of K, and on to V's; 0 of a tile of Q

  // channel 0 to 3 C of a column, -1 where there is none
  HOST_DEVICE int row(int column) const {
    const bool value = column >= split;
    const int channel = value ? column - split : column;
    if (channel >= channels) return -1;
    return (value ? 2 : 1) * to_keys + first + channel;
  }
};

template <int N>
HOST_DEVICE int key_tiles(int heads) {
  return blocks_of(heads, WeightTile<N>::HEADS);
}
template <int N>
HOST_DEVICE int weight_tiles(int heads) {
  return key_tiles<N>(heads) + blocks_of(heads * HEAD, N);
}
template <int N>
HOST_DEVICE WeightTile<N> weight_tile(int tile, int heads) {
  const int keys = key_tiles<N>(heads), width = heads * HEAD;
  const bool key = tile < keys;
  const int size = key ? N / 2 : N, first = (key ? tile : tile - keys) * size;
  return {key, first, smaller(size, width - first), size, key ? width : 0};
}

// A tile's 16-bit numbers in shared memory: the 16-byte pieces of a row are permuted so that 8 rows of one piece
// are in all banks. Rows 8 apart are 8 N apart.
template <int N>
HOST_DEVICE int staged(int row, int column) {
  static_assert(N % 64 == 0, "8 pieces");
  return row * N + ((column / 8) ^ (row % 8)) * 8 + column % 8;
}

// K^T V of a head is made in quarters of (16, 16): what a lane gives load_matrices_transposed for 16 tokens
HOST_DEVICE int key_row(int lane) { return lane / 16 * 8 + lane % 8; }
HOST_DEVICE int key_column(int lane) { return lane / 8 % 2 * 8; }
HOST_DEVICE int value_row(int lane) { return lane / 8 % 2 * 8 + lane % 8; }
HOST_DEVICE int value_column(int lane) { return lane / 16 * 8; }
// The read of a head: q (16, 32) times its state in two steps of 16 channels. What a lane gives load_matrices for one
// of them; rows are 16 bytes longer than they need be, so that those of 8 tokens begin in other banks.
HOST_DEVICE int row_elements(int heads) { return heads * HEAD + 8; }
HOST_DEVICE int query_row(int lane) { return lane % 16; }
HOST_DEVICE int query_column(int lane) { return lane / 16 * 8; }
// The i-th of 4 rows of the state that a lane has for a step, and the first of its 4 columns, of which each is of
// another product (16, 8). So a lane's sums of all four are 8 columns beside each other, the n-th product's
// sums[i] column output_column + 4 (i % 2) + n.
HOST_DEVICE int state_row(int lane, int i) { return lane % 4 * 2 + i % 2 + i / 2 * 8; }
HOST_DEVICE int state_column(int lane) { return lane / 4 * 4; }
HOST_DEVICE int output_column(int lane) { return lane % 4 * 8; }

// row and column of sums[i] of the n-th (16, 8) in a quarter
HOST_DEVICE int sum_row(int lane, int i) { return lane / 4 + i / 2 * 8; }
HOST_DEVICE int sum_column(int lane, int n, int i) { return n * 8 + lane % 4 * 2 + i % 2; }
