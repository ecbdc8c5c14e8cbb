// Index arithmetic of a tile of an INT8 product: which thread copies, reads and sums what, as functions that a host
// test can check.
//
// An operand's tile in shared memory is rows of K bytes in pieces of 16, and the pieces of a row are permuted
// (piece ^ row) so that 8 threads which write a row, and 8 which read one piece of 8 rows, meet all 32 banks.
#pragma once

#include "device.h"

// (M, K) by (N, K), K deep, by WARPS_M x WARPS_N warps, with STAGES tiles in shared memory
template <int M_, int N_, int K_, int WARPS_M_, int WARPS_N_, int STAGES_>
struct Tile {
  static constexpr int M = M_, N = N_, K = K_, WARPS_M = WARPS_M_, WARPS_N = WARPS_N_, STAGES = STAGES_;
  static constexpr int THREADS = WARP * WARPS_M * WARPS_N;
  static constexpr int STAGE = (M + N) * K;
  static constexpr int SHARED = STAGES * STAGE;
  // products of 16 rows and of 8 columns that a warp makes, 32 deep
  static constexpr int MT = M / WARPS_M / 16, NT = N / WARPS_N / 8, STEPS = K / 32;
  static constexpr int PIECES = K / 16;
  // pieces of either operand that a thread copies
  static constexpr int LEFT_COPIES = M * PIECES / THREADS, RIGHT_COPIES = N * PIECES / THREADS;
  static_assert(K == 64 || K == 128, "rows of 4 or 8 pieces are what the permutation is made for");
  static_assert(MT * WARPS_M * 16 == M && NT * WARPS_N * 8 == N && NT % 2 == 0 && STAGES >= 2);
  static_assert(LEFT_COPIES * THREADS == M * PIECES && RIGHT_COPIES * THREADS == N * PIECES);
};

// two stages are Turing's, more are for all others: kernels are empty where the tile is not theirs
template <class T>
HOST_DEVICE constexpr bool for_this_architecture() {
  return (T::STAGES == 2) == (SANA_EDGE_ARCH < 800);
}

// where piece ``piece`` of a row is in its operand's tile, in bytes
template <class T>
HOST_DEVICE int piece_offset(int row, int piece) {
  // 128 bytes are all banks: one row of 8 pieces, or two of 4
  const int permuted = T::PIECES == 8 ? piece ^ (row & 7) : piece ^ (row >> 1 & 3);
  return row * T::K + permuted * 16;
}

// row and piece of a thread's n-th copy; the piece is the same for all of them
template <class T>
HOST_DEVICE int copied_row(int thread, int n) {
  return thread / T::PIECES + n * (T::THREADS / T::PIECES);
}
template <class T>
HOST_DEVICE int copied_piece(int thread) {
  return thread % T::PIECES;
}

template <class T>
HOST_DEVICE int warp_row(int thread) {
  return thread / WARP % T::WARPS_M * (T::M / T::WARPS_M);
}
template <class T>
HOST_DEVICE int warp_column(int thread) {
  return thread / WARP / T::WARPS_M * (T::N / T::WARPS_N);
}

// what a thread gives load_matrices for the m-th 16 rows: rows 0-7 and 8-15 of one piece, then of the next
template <class T>
HOST_DEVICE int left_offset(int thread, int m, int step) {
  return piece_offset<T>(warp_row<T>(thread) + m * 16 + thread % 16, step * 2 + thread % WARP / 16);
}
// for the pair-th 16 columns: two pieces of columns 0-7, then of 8-15
template <class T>
HOST_DEVICE int right_offset(int thread, int pair, int step) {
  return piece_offset<T>(warp_column<T>(thread) + pair * 16 + thread % WARP / 16 * 8 + thread % 8,
                         step * 2 + thread / 8 % 2);
}

// where in the tile sums[m][n][i] of a thread is
template <class T>
HOST_DEVICE int tile_row(int thread, int m, int i) {
  return warp_row<T>(thread) + m * 16 + i / 2 * 8 + thread % WARP / 4;
}
template <class T>
HOST_DEVICE int tile_column(int thread, int n, int i) {
  return warp_column<T>(thread) + n * 8 + thread % 4 * 2 + i % 2;
}

// Sums go out by way of 16 rows of a warp in shared memory, 4 bytes each, so that a lane gets 8 of one row. Where
// row and column are of these, in numbers: written by lanes 2 each of 4 rows and 4 x 2 columns, read 4 each of
// 32 or 64 columns, both times from all banks, as pieces of 4 are permuted.
template <class T>
HOST_DEVICE int staged_place(int row, int column) {
  constexpr int WIDTH = T::N / T::WARPS_N;
  static_assert(WIDTH % 32 == 0 && T::WARPS_M * T::WARPS_N * 16 * WIDTH * 4 <= T::SHARED);
  const int piece = column / 4, odd = WIDTH == 32 ? row & 1 : piece >> 3 & 1;
  return row * WIDTH + (piece ^ row % 4 * 2 ^ odd) * 4 + column % 4;
}
// row and first of the 8 columns that a thread gets in a pass
template <class T>
HOST_DEVICE int staged_row(int thread, int pass) {
  constexpr int LANES = T::N / T::WARPS_N / 8;
  return pass * (WARP / LANES) + thread % WARP / LANES;
}
template <class T>
HOST_DEVICE int staged_column(int thread) {
  return thread % (T::N / T::WARPS_N / 8) * 8;
}
template <class T>
HOST_DEVICE constexpr int staged_passes() {
  return T::N / T::WARPS_N / 16;
}

struct TilePlace {
  int row, column;  // in tiles
};
// the tile of a block: down 8 tiles, then one to the right, so that blocks at work together share rows of both
// operands in L2
HOST_DEVICE TilePlace tile_of_block(unsigned block, unsigned rows, unsigned columns) {
  constexpr unsigned GROUP = 8;
  const unsigned first = block / (GROUP * columns) * GROUP, within = block - first * columns;
  const unsigned height = smaller(rows - first, GROUP);
  return {int(first + within % height), int(within / height)};
}
