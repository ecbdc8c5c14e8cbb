// Index arithmetic of a convolution: where its pixels, samples and weights are. A host test can check it.
//
// A product's row is a pixel (image, y, x) in the order of memory, its depth the taps of the window, each with
// all channels. Where it upsamples, a product makes one of four corners: pixels of even or odd rows and columns.
#pragma once

#include "device.h"

// division of numbers below 2^31 by one that is known at the launch, by a product
struct Divider {
  uint32_t factor;
  int shift;
  HOST_DEVICE int divide(int number) const {
    return int(uint64_t(uint32_t(number)) * factor >> shift);
  }
};

inline Divider divider(int by) {
  // factor = ceil(2^shift / by) with 2^(shift - 31) >= by: it is 1/by with an error of less than 2^-31 / by
  int shift = 31;
  while (INT64_C(1) << (shift - 31) < by) shift++;
  return {uint32_t(((UINT64_C(1) << shift) + uint64_t(by) - 1) / uint64_t(by)), shift};
}

struct Map {
  int height, width, depth, kernel, columns;
  Divider by_height, by_width, by_depth;
};

inline Map conv_map(int height, int width, int depth, int kernel, int columns) {
  return {height, width, depth, kernel, columns, divider(height), divider(width), divider(depth)};
}

// row of a kernel of 1, 2 or 3 that a tap is in
HOST_DEVICE int tap_row(const Map& map, int tap) {
  return tap * (map.kernel == 1 ? 32 : map.kernel == 2 ? 16 : 11) >> 5;
}

// bit t is set where tap t of a pixel's window is in the map; the first tap is (top, left) from the pixel
HOST_DEVICE uint32_t window_mask(const Map& map, int pixel, int top, int left) {
  const int line = map.by_width.divide(pixel), x = pixel - line * map.width + left;
  const int y = line - map.by_height.divide(line) * map.height + top;
  uint32_t mask = 0;
  for (int i = 0; i < 3; i++)
    for (int j = 0; j < 3; j++)
      if (i < map.kernel && j < map.kernel && unsigned(y + i) < unsigned(map.height) &&
          unsigned(x + j) < unsigned(map.width))
        mask |= 1u << (i * map.kernel + j);
  return mask;
}

// which tap and channel are at ``k`` of a window, and how many pixels from its own the tap's sample is
struct Sample {
  int tap, channel, shift;
};
HOST_DEVICE Sample sample_at(const Map& map, int k, int top, int left) {
  const int tap = map.by_depth.divide(k), row = tap_row(map, tap);
  return {tap, k - tap * map.depth, (top + row) * map.width + left + tap - row * map.kernel};
}

// which pixel of the output a pixel of the input becomes at a corner, rows first
HOST_DEVICE int64_t upsampled_pixel(const Map& map, int pixel, int corner) {
  const int line = map.by_width.divide(pixel), x = pixel - line * map.width;
  return (int64_t(line) * 2 + corner / 2) * (2 * map.width) + 2 * x + corner % 2;
}

// which of the weight's output channels makes a column of a corner
HOST_DEVICE int weight_row(const Map& map, int upsample, int corner, int column) {
  if (upsample == SANA_EDGE_UPSAMPLE_PHASES) return corner * map.columns + column;
  return upsample == SANA_EDGE_UPSAMPLE_SHUFFLE ? column * 4 + corner : column;
}

// from a pixel to the first tap of its window: odd phases begin at the sample itself
HOST_DEVICE int window_start(const Map& map, int upsample, int odd) {
  if (upsample == SANA_EDGE_UPSAMPLE_PHASES) return odd - 1;
  return -(map.kernel / 2);
}

// where an element of a tile of results (rows, columns) is in shared memory, in bytes. The 16-byte pieces of a
// row are permuted so that 8 rows and 4 lanes that write two columns each, and 8 lanes that read pieces, meet
// all banks.
HOST_DEVICE int result_offset(int row, int column, int columns, int element) {
  const int pieces = columns * element / 16, byte = column * element;
  // 128 bytes are all banks: one row of 8 pieces or more, two of 4, four of 2
  const int turn = pieces >= 8 ? row & 7 : pieces == 4 ? row >> 1 & 3 : row >> 2 & 1;
  return row * columns * element + ((byte / 16 ^ turn) * 16 | byte % 16);
}
