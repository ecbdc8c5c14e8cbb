// INT8 product whose results' rows go to INT8 in the same launch, most of them normalised: row_tail.h.
#include "linear_epilogue.h"
#include "linear_start.h"
#include "row_tail.h"

namespace {

struct Arguments {
  sana_edge_w8a8_linear_args linear;
  sana_edge_w8a8_linear_quantize_args a;
  int patience;  // how often a block looks for the others
};

template <class T, class Number>
__device__ __forceinline__ void quantize_row(const Arguments& p, int64_t row) {
  const auto& a = p.a;
  const int64_t image = uint32_t(row) / uint32_t(a.tokens);
  const bool plain = !a.scale || (image >= a.plain_first && image < a.plain_end);
  const RowNorm norm = plain ? RowNorm{nullptr, nullptr, a.plain_static_scale, a.eps}
                             : RowNorm{a.scale + image * a.scale_stride, a.shift + image * a.shift_stride,
                                       a.static_scale, a.eps};
  row_to_int8<Number, 1, T::THREADS / WARP, TAIL_CHUNKS, true>(static_cast<const Number*>(a.out) + row * a.columns,
                                                               a.columns, norm, a.next_values + row * a.columns,
                                                               a.next_scales + row);
}

// one block on an SM: the registers that a row takes, which would else be fewer
template <class T, class Number, Epilogue EPILOGUE>
__global__ void __launch_bounds__(T::THREADS, 1) w8a8_linear_quantize_kernel(const Arguments p) {
  wait_for_kernels();
  if constexpr (for_this_architecture<T>()) {
    const TilePlace place = make_tile<T, Number, EPILOGUE>(p.linear);
    const int64_t first = int64_t(place.row) * T::M;
    const int rows = int(smaller<int64_t>(T::M, p.a.rows - first)), tiles = blocks_of(p.a.columns, T::N);
    share_rows(static_cast<TailCounters*>(p.a.workspace) + place.row, tiles, p.patience, rows,
               [&](int row) { quantize_row<T, Number>(p, first + row); });
  }
}

template <class T, class Number>
sana_edge_status start(Arguments p, const sana_edge_device_info& device, void* stream) {
  const int64_t down = blocks_of<int64_t>(p.a.rows, T::M), blocks = down * blocks_of<int64_t>(p.a.columns, T::N);
  SANA_EDGE_CHECK(blocks < LARGEST && down <= MOST_TAILS, SANA_EDGE_BAD_SHAPE);
  // Blocks that are all at work together wait for each other; an SM has two, or one large. Where some begin when
  // others end, that would keep them from beginning.
  constexpr int TOGETHER = T::THREADS > 128 ? 1 : 2, PATIENCE = 64;
  p.patience = blocks <= int64_t(device.processors) * TOGETHER ? PATIENCE : 0;
  const Epilogue epilogue = epilogue_of(p.linear);
  const auto kernel = epilogue == RESIDUAL   ? w8a8_linear_quantize_kernel<T, Number, RESIDUAL>
                      : epilogue == GATED    ? w8a8_linear_quantize_kernel<T, Number, GATED>
                      : epilogue == CONSTANT ? w8a8_linear_quantize_kernel<T, Number, CONSTANT>
                                             : w8a8_linear_quantize_kernel<T, Number, ALL>;
  return launch(kernel, dim3{unsigned(blocks), 1, 1}, T::THREADS, T::SHARED, stream, p, BEGINS_EARLY);
}

}  // namespace

extern "C" SANA_EDGE_API sana_edge_status
sana_edge_w8a8_linear_quantize(const sana_edge_w8a8_linear_quantize_args* a, void* stream) {
  SANA_EDGE_CHECK(a, SANA_EDGE_NULL_POINTER);
  const sana_edge_w8a8_linear_args linear{a->values, a->scales,   a->weight, a->weight_scales, a->bias,
                                          a->gate,   a->residual, a->constant, a->out,         a->rows,
                                          a->columns, a->depth,   a->tokens, a->type,          a->gate_stride,
                                          a->constant_stride, a->limit, 0, a->tile};
  SANA_EDGE_CHECK(a->columns % 16 == 0 && a->columns <= TAIL_COLUMNS && (a->tokens > 0 || a->rows == 0) &&
                      a->scale_stride >= 0 && a->shift_stride >= 0,
                  SANA_EDGE_BAD_SHAPE);
  const sana_edge_status status = check_linear(linear);
  if (status != SANA_EDGE_OK || a->rows == 0) return status;
  SANA_EDGE_CHECK(given({a->next_values, a->next_scales, a->workspace}) && !a->scale == !a->shift,
                  SANA_EDGE_NULL_POINTER);
  SANA_EDGE_CHECK(aligned({a->scale, a->shift, a->next_values, a->workspace}) && a->scale_stride % 4 == 0 &&
                      a->shift_stride % 4 == 0 &&
                      aligned({a->static_scale, a->plain_static_scale, a->next_scales}, 4),
                  SANA_EDGE_BAD_ALIGNMENT);
  SANA_EDGE_CHECK(a->workspace_bytes >= COUNTERS * int64_t(sizeof(int)), SANA_EDGE_WORKSPACE);
  return start_with_tile(linear, [&](auto tile, const sana_edge_device_info& device) {
    using T = decltype(tile);
    const Arguments p{linear, *a, 0};
    return a->type == SANA_EDGE_FP16 ? start<T, Half>(p, device, stream) : start<T, BFloat16>(p, device, stream);
  });
}
