// A sampler's update of a latent, in place and with the roundings of the loop on the host: each product and each sum
// by itself.
#include "checks.h"
#include "device.h"

namespace {

constexpr int THREADS = 256;

using Arguments = sana_edge_sampler_step_args;

__global__ void __launch_bounds__(THREADS) sampler_step_kernel(const Arguments a) {
  wait_for_kernels();
  const int64_t at = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (at >= a.size) return;
  const float* c = a.coefficients;
  const float x = a.x[at], clean = add(multiply(c[1], x), multiply(c[2], a.velocity[at]));
  float out = add(multiply(c[3], x), multiply(c[4], clean));
  if (c[5] != 0) out = add(out, multiply(c[5], a.before[at]));
  if (c[6] != 0) out = add(out, multiply(c[6], a.noise[at]));
  a.clean[at] = clean;
  a.out[at] = out;
}

}  // namespace

extern "C" SANA_EDGE_API sana_edge_status sana_edge_sampler_step(const sana_edge_sampler_step_args* a,
                                                                  void* stream) {
  SANA_EDGE_CHECK(a, SANA_EDGE_NULL_POINTER);
  SANA_EDGE_CHECK(a->size >= 0 && a->size < LARGEST, SANA_EDGE_BAD_SHAPE);
  if (a->size == 0) return SANA_EDGE_OK;
  SANA_EDGE_CHECK(given({a->x, a->velocity, a->before, a->noise, a->coefficients, a->out, a->clean}),
                  SANA_EDGE_NULL_POINTER);
  SANA_EDGE_CHECK(aligned({a->x, a->velocity, a->before, a->noise, a->coefficients, a->out, a->clean}, 4),
                  SANA_EDGE_BAD_ALIGNMENT);
  const auto blocks = unsigned(blocks_of<int64_t>(a->size, THREADS));
  return launch(sampler_step_kernel, dim3{blocks, 1, 1}, THREADS, 0, stream, *a, BEGINS_EARLY);
}
