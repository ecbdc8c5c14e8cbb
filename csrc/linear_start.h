// The host's part of an INT8 product: what is refused, and which tile it takes.
#pragma once

#include "checks.h"
#include "tile_times.h"

// the status of a product's arguments; of one without rows OK
inline sana_edge_status check_linear(const sana_edge_w8a8_linear_args& a) {
  SANA_EDGE_CHECK(is_16_bit(a.type), SANA_EDGE_BAD_TYPE);
  SANA_EDGE_CHECK(a.rows >= 0 && a.rows < LARGEST, SANA_EDGE_BAD_SHAPE);
  SANA_EDGE_CHECK(a.columns > 0 && a.columns % 8 == 0 && a.columns < LARGEST / 2, SANA_EDGE_BAD_SHAPE);
  SANA_EDGE_CHECK(a.depth > 0 && a.depth % 16 == 0 && a.depth <= EXACT_DEPTH && a.limit >= 0, SANA_EDGE_BAD_SHAPE);
  SANA_EDGE_CHECK(a.tokens > 0 || !(a.gate || a.constant), SANA_EDGE_BAD_SHAPE);
  if (a.rows == 0) return SANA_EDGE_OK;
  SANA_EDGE_CHECK(given({a.values, a.scales, a.weight, a.weight_scales, a.out}), SANA_EDGE_NULL_POINTER);
  SANA_EDGE_CHECK(aligned({a.values, a.weight, a.gate, a.residual, a.constant, a.out}) && a.gate_stride % 4 == 0 &&
                      a.constant_stride % 4 == 0 && aligned({a.scales, a.weight_scales, a.bias}, 4),
                  SANA_EDGE_BAD_ALIGNMENT);
  return SANA_EDGE_OK;
}

// start(tile, device) with the tile of a product that is asked for, or the best
template <class Start>
sana_edge_status start_with_tile(const sana_edge_w8a8_linear_args& a, const Start& start) {
  sana_edge_device_info device;
  const sana_edge_status status = current_device(&device);
  SANA_EDGE_CHECK(status == SANA_EDGE_OK, status);
  const int picked = pick_tile(a, device);
  SANA_EDGE_CHECK(picked, SANA_EDGE_UNSUPPORTED_DEVICE);
  SANA_EDGE_CHECK(a.tile == 0 || has_tile(device, a.tile), SANA_EDGE_BAD_SHAPE);
  switch (TileName((a.tile ? a.tile : picked) - 1)) {
    case LARGE:
      return start(TileLarge{}, device);
    case MIDDLE:
      return start(TileMiddle{}, device);
    case NARROW:
      return start(TileNarrow{}, device);
    case SMALL:
      return start(TileSmall{}, device);
    case TURING:
      return start(TileTuring{}, device);
    default:
      return start(TileTuringSmall{}, device);
  }
}
