// What tile_times.h counts, for those who want to know.
#include "checks.h"
#include "tile_times.h"

extern "C" SANA_EDGE_API sana_edge_status sana_edge_time_tile(const sana_edge_tile* tile,
                                                              const sana_edge_device_info* device,
                                                              sana_edge_tile_time* out) {
  SANA_EDGE_CHECK(given({tile, device, out}), SANA_EDGE_NULL_POINTER);
  SANA_EDGE_CHECK(tile->count >= 0 && tile->rows > 0 && tile->columns > 0 && tile->depth > 0 &&
                      tile->warps_down > 0 && tile->warps_across > 0 && tile->stages > 0,
                  SANA_EDGE_BAD_SHAPE);
  *out = time_of(*tile, *device);
  out->rows = tile->rows;
  out->columns = tile->columns;
  return SANA_EDGE_OK;
}

extern "C" SANA_EDGE_API int32_t sana_edge_w8a8_linear_tiles(const sana_edge_w8a8_linear_args* a,
                                                             const sana_edge_device_info* device,
                                                             sana_edge_tile_time* out) {
  if (!a || !device || !out || a->rows <= 0 || a->columns <= 0 || a->depth <= 0) return 0;
  sana_edge_tile_time times[MOST_TILES];
  const int count = linear_tiles(*a, *device, times);
  const int best = pick_tile(*a, *device);
  int written = 0;
  for (int turn = 0; turn < 2; turn++)
    for (int n = 0; n < count; n++)
      if ((times[n].tile == best) == (turn == 0)) out[written++] = times[n];
  return written;
}
