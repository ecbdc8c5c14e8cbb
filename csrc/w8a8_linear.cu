// INT8 product with all that follows it: gemm.h, then linear_epilogue.h.
#include "linear_epilogue.h"
#include "linear_start.h"

namespace {

template <class T, class Number, Epilogue EPILOGUE>
__global__ void __launch_bounds__(T::THREADS) w8a8_linear_kernel(const sana_edge_w8a8_linear_args a) {
  wait_for_kernels();
  if constexpr (for_this_architecture<T>()) make_tile<T, Number, EPILOGUE>(a);
}

template <class T, class Number>
sana_edge_status start(const sana_edge_w8a8_linear_args& a, void* stream) {
  const int64_t blocks = blocks_of<int64_t>(a.rows, T::M) * blocks_of<int64_t>(a.columns, T::N);
  SANA_EDGE_CHECK(blocks < LARGEST, SANA_EDGE_BAD_SHAPE);
  const Epilogue epilogue = epilogue_of(a);
  const auto kernel = epilogue == BIAS   ? w8a8_linear_kernel<T, Number, BIAS>
                      : epilogue == SILU ? w8a8_linear_kernel<T, Number, SILU>
                                         : w8a8_linear_kernel<T, Number, ALL>;
  return launch(kernel, dim3{unsigned(blocks), 1, 1}, T::THREADS, T::SHARED, stream, a, BEGINS_EARLY);
}

}  // namespace

extern "C" SANA_EDGE_API sana_edge_status sana_edge_w8a8_linear(const sana_edge_w8a8_linear_args* a,
                                                                void* stream) {
  SANA_EDGE_CHECK(a, SANA_EDGE_NULL_POINTER);
  const sana_edge_status status = check_linear(*a);
  if (status != SANA_EDGE_OK || a->rows == 0) return status;
  return start_with_tile(*a, [&](auto tile, const sana_edge_device_info&) {
    using T = decltype(tile);
    return a->type == SANA_EDGE_FP16 ? start<T, Half>(*a, stream) : start<T, BFloat16>(*a, stream);
  });
}
