// Index arithmetic of multiscale_linear_attention: the patches of a block, where their pixels are, and who sums what.
#pragma once

#include "linear_attention_maps.h"

// channels of a head: its q, k and v
constexpr int GROUP = 3 * HEAD;
constexpr int KERNEL = 5;
constexpr int HALO = KERNEL / 2;
constexpr int PATCH = 8;
constexpr int PIXELS = PATCH * PATCH;
// side of a patch with its surroundings
constexpr int SPAN = PATCH + 2 * HALO;
// floats of a mixed pixel: pixels next to each other begin in other banks
constexpr int MIXED = GROUP + 4;
constexpr int WINDOW_BYTES = SPAN * SPAN * GROUP * 2;
static_assert(PIXELS * MIXED * 4 <= WINDOW_BYTES, "the mixed patch takes the window's place");
static_assert(PIXELS >= PART_TOKENS, "the workspace is for parts of PART_TOKENS");

// a patch within its image
struct PatchPlace {
  int row, column, rows, columns;

  HOST_DEVICE bool has(int pixel) const { return pixel / PATCH < rows && pixel % PATCH < columns; }
};

// an image's patches, ``each`` of which a block takes, in the order of memory
struct PatchRows {
  int down, across, each;

  HOST_DEVICE int count() const { return down * across; }
  HOST_DEVICE int parts() const { return blocks_of(count(), each); }
  HOST_DEVICE PatchPlace place(int patch, int height, int width) const {
    const int row = patch / across * PATCH, column = patch % across * PATCH;
    return {row, column, smaller(PATCH, height - row), smaller(PATCH, width - column)};
  }
};

// the workspace has a part for 64 tokens, and no more than for these
constexpr int MOST_PARTS = 32;
constexpr int64_t MOST_TOKENS = MOST_PARTS * PART_TOKENS;

HOST_DEVICE PatchRows patch_rows(int height, int width) {
  const int down = blocks_of(height, PATCH), across = blocks_of(width, PATCH);
  const int64_t most = blocks_of(smaller(int64_t(height) * width, MOST_TOKENS), int64_t(PART_TOKENS));
  return {down, across, int(blocks_of(int64_t(down) * across, most))};
}

// pixel of a window that is one of the patch
HOST_DEVICE int centre(int pixel) { return (pixel / PATCH + HALO) * SPAN + pixel % PATCH + HALO; }

// where q of a pixel and a head begins, of the map itself (0) or of the second scale (1)
HOST_DEVICE int64_t query_place(const sana_edge_multiscale_linear_attention_args& a, const PatchPlace& at, int image,
                                int head, int pixel, int scale) {
  const int64_t row = int64_t(image) * a.height + at.row + pixel / PATCH, scales = a.depthwise ? 2 : 1;
  return ((row * a.width + at.column + pixel % PATCH) * scales + scale) * a.heads * HEAD + head * HEAD;
}

// first row and column of a thread's sums of K^T V
HOST_DEVICE int sum_rows(int thread) { return thread / (HEAD / 2) * 4; }
HOST_DEVICE int sum_columns(int thread) { return thread % (HEAD / 2) * 2; }

// where a weight (output, input) of a head's q, k or v is in shared memory: inputs first
HOST_DEVICE int transposed_weight(int n) {
  return n / (HEAD * HEAD) * HEAD * HEAD + n % HEAD * HEAD + n / HEAD % HEAD;
}
