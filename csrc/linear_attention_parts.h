// The last of those that made parts of a state adds them, in the order of their tokens, whoever comes last: same
// bytes on every run.
#pragma once

#include "linear_attention_maps.h"

struct alignas(16) Float4 {
  float at[4];
};
struct alignas(8) Float2 {
  float at[2];
};

// Whether the caller is the last of ``count`` that come to a counter, which is zero again then. What they all
// wrote, before they called fence_device and met the one thread that calls this, may be read after fence_device.
__device__ __forceinline__ bool last_to_come(int* counter, int count) {
  const bool last = atomic_add(counter, 1) == count - 1;
  if (last) *counter = 0;
  return last;
}

// state = the sum of a head's parts, by ``threads`` threads of which this is one
__device__ __forceinline__ void add_parts(const Parts& parts, int64_t head, float* state, int thread,
                                          int threads) {
  for (int place = thread * 4; place < STATE; place += threads * 4) {
    const float* from = parts.part(head, 0) + place;
    Float4 sum = load_vector<Float4>(from);
#pragma unroll 4
    for (int n = 1; n < parts.count; n++) {
      const Float4 next = load_vector<Float4>(from + int64_t(n) * STATE);
      for (int i = 0; i < 4; i++) sum.at[i] = add(sum.at[i], next.at[i]);
    }
    store_vector(state + head * STATE + place, sum);
  }
}
