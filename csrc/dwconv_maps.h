// Index arithmetic of dwconv_glu_quantize: which pixels a block has, and how many pixels that should be.
#pragma once

#include "device.h"

// rows of pixels of a patch, unless the image ends before
constexpr int PATCH_ROWS = 4;

// an image cut into ``strips`` of PATCH_ROWS rows and ``segments`` of ``columns`` columns
struct PatchGrid {
  int columns;
  int segments;
  int strips;
};

struct Patch {
  int image;
  int row, column;    // its first pixel
  int rows, columns;  // its size within the image
};

HOST_DEVICE PatchGrid patch_grid(int height, int width, int columns) {
  return {columns, blocks_of(width, columns), blocks_of(height, PATCH_ROWS)};
}

// neighbours along a row come one after the other, for the sake of the columns that they share
HOST_DEVICE Patch patch_of(const PatchGrid& grid, int height, int width, unsigned block) {
  const int segment = block % grid.segments, strip = block / grid.segments % grid.strips;
  const int row = strip * PATCH_ROWS, column = segment * grid.columns;
  return {int(block / grid.segments / grid.strips), row, column, smaller(PATCH_ROWS, height - row),
          smaller(grid.columns, width - column)};
}

// the grid that takes the least time of those with 1, 2 and 4 columns in a patch, at most ``most``: a patch takes
// the time of its columns and about 4 more, for their neighbours, the weights and the rest; ``processors``
// patches go at a time
HOST_DEVICE PatchGrid best_patch_grid(int images, int height, int width, int most, int processors) {
  PatchGrid best = patch_grid(height, width, 1);
  int64_t least = 0;
  for (int columns = 1; columns <= smaller(most, 4); columns *= 2) {
    const PatchGrid grid = patch_grid(height, width, columns);
    const int64_t blocks = int64_t(images) * grid.strips * grid.segments;
    const int64_t time = blocks_of(blocks, int64_t(processors)) * (columns + 4);
    if (columns == 1 || time <= least) {
      least = time;
      best = grid;
    }
  }
  return best;
}
