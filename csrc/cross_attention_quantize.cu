// Softmax attention of 16 tokens on a few text keys, all heads in one block, so that the rows' absmax is known in
// it and only INT8 leaves it. A warp has a head or two: its fragments of q, K and V^T come straight from memory
// (cross_attention_maps.h), the softmax runs over blocks of 16 keys, and the outputs stay in registers.
//
// Roundings: q after its RMSNorm and the softmax's numerators are rounded to the type for the tensor cores; the
// denominator is the sum of the rounded ones, so that the weights add up to 1. All else is fp32.
#include <limits>

#include "checks.h"
#include "cross_attention_maps.h"
#include "row_quantizer.h"

namespace {

using namespace cross_attention;

constexpr float INFINITE = std::numeric_limits<float>::infinity();

struct alignas(8) Bytes8 {
  uint32_t word[2];
};
struct alignas(8) Float2 {
  float element[2];
};

// SANA's heads have kernels of their own, all others share one that asks for head_dim at run time
enum Width { EXACT, ANY };

// up to 9 tiles of 8 channels leave registers for 16 warps; more tiles for fewer warps, which have two heads each
template <int TILES>
constexpr int HEADS = TILES <= 9 ? 1 : 2;
template <int TILES>
constexpr int MOST_WARPS = TILES <= 9 ? 16 : TILES <= 14 ? 10 : 8;
constexpr int most_heads(int head_dim) { return head_dim == 112 ? 20 : 16; }

size_t shared_bytes(int warps, int columns) {
  return TOKENS * sizeof(float) * (1 + warps) + size_t(TOKENS) * stage_stride(columns);
}

template <class T>
__device__ __forceinline__ uint32_t pack(float first, float second) {
  return from_float<T>(first).bits | uint32_t(from_float<T>(second).bits) << 16;
}
template <class T>
__device__ __forceinline__ float unpack(uint32_t pair, int i) {
  return to_float(T{uint16_t(pair >> 16 * i)});
}

// 1 / rms of the block's rows of q, to shared memory
template <class T>
__device__ __forceinline__ void find_roots(float* roots, const T* q, int tokens, int columns, float eps) {
  struct alignas(16) Vector {
    T element[8];
  };
  for (int row = threadIdx.x / WARP; row < tokens; row += blockDim.x / WARP) {
    float sum = 0;
    for (int c = threadIdx.x % WARP * 8; c < columns; c += WARP * 8) {
      const Vector vector = load_vector<Vector>(q + int64_t(row) * columns + c);
      for (int i = 0; i < 8; i++) {
        const float value = to_float(vector.element[i]);
        sum = fused_multiply_add(value, value, sum);
      }
    }
    sum = warp_sum(sum);
    if (threadIdx.x % WARP == 0) roots[row] = reciprocal_root(add(divide(sum, float(columns)), eps));
  }
}

// 4 channels of q, normalised and rounded
template <class T>
__device__ __forceinline__ Bytes8 normalise(Bytes8 q, float root, const float* weight) {
  Bytes8 out;
#pragma unroll
  for (int pair = 0; pair < 2; pair++) {
    const Float2 w = load_vector<Float2>(weight + 2 * pair);
    out.word[pair] = pack<T>(multiply(multiply(unpack<T>(q.word[pair], 0), root), w.element[0]),
                             multiply(multiply(unpack<T>(q.word[pair], 1), root), w.element[1]));
  }
  return out;
}

// a head of 16 tokens: pairs of outputs, rounded, of rows token_of(lane, 0 and 1)
template <class T, int TILES, Width WIDTH>
__device__ __forceinline__ void attend(uint32_t (&kept)[TILES][2],
                                       const sana_edge_cross_attention_quantize_args& a, int head,
                                       int64_t first_token, int tokens, const float (&roots)[2]) {
  constexpr int STEPS = (TILES + 1) / 2;
  // V is asked for before the softmax where there are registers to hold it
  constexpr bool EARLY = HEADS<TILES> == 1;
  const int head_dim = WIDTH == EXACT ? 8 * TILES : a.head_dim;
  const int lane = threadIdx.x % WARP, columns = a.heads * head_dim;
  uint32_t q[STEPS][4];
#pragma unroll
  for (int step = 0; step < STEPS; step++) {
    const int channel = channel_of(lane, step);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      Bytes8 pairs{};
      if (channel < head_dim && token_of(lane, half) < tokens) {
        const int64_t at = (first_token + token_of(lane, half)) * columns + head * head_dim + channel;
        pairs = load_vector<Bytes8>(static_cast<const T*>(a.q) + at);
        if (a.norm_q) pairs = normalise<T>(pairs, roots[half], a.norm_q + head * head_dim + channel);
      }
      q[step][half] = pairs.word[0];
      q[step][2 + half] = pairs.word[1];
    }
  }

  const int length = smaller(a.lengths[blockIdx.y], a.capacity);
  const int64_t offset = (int64_t(blockIdx.y) * a.heads + head) * a.capacity * head_dim;
  const T* keys = static_cast<const T*>(a.keys) + offset + key_row_of(lane, 0) * head_dim + channel_of(lane, 0);
  const T* values = static_cast<const T*>(a.values_transposed) + offset + value_row_of(lane, 0) * a.capacity +
                    value_key_of(lane);
  const float scale = divide(1.0f, sqrtf(float(head_dim)));
  const uint32_t one = pack<T>(1.0f, 1.0f), ones[2] = {one, one};

  // the numerators' sums are those of one more column of V, which is all ones
  float out[TILES][4] = {}, sums[4] = {}, most[2] = {-INFINITE, -INFINITE};
  for (int key = 0; key < length; key += KEYS) {
    float scores[2][4] = {};
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
#pragma unroll
      for (int tile = 0; tile < 2; tile++) {
        Bytes8 k{};
        if (channel_of(lane, step) < head_dim)
          k = load_vector<Bytes8>(keys + (key + 2 * tile) * head_dim + 16 * step);
        multiply_16bit<T>(scores[tile], q[step], k.word);
      }
    }
    const auto load_value = [&](int tile) {
      return 8 * tile < head_dim ? load_vector<Bytes8>(values + 8 * tile * a.capacity + key) : Bytes8{};
    };
    Bytes8 early[TILES];
    if (EARLY) {
#pragma unroll
      for (int tile = 0; tile < TILES; tile++) early[tile] = load_value(tile);
    }

    uint32_t p[4];
    float decays[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float now = most[half];
#pragma unroll
      for (int n = 0; n < 4; n++) {
        float& score = scores[n / 2][2 * half + n % 2];
        score = key + score_key_of(lane, n / 2, n % 2) < length ? multiply(score, scale) : -INFINITE;
        now = score > now ? score : now;
      }
      for (int other = 1; other < 4; other *= 2) now = larger(now, shuffle_xor(now, other));
      // a row that has seen only -infinity must not become NaN yet
      const float base = now == -INFINITE ? 0.0f : now;
      decays[half] = exponential(add(most[half], -base));
      most[half] = now;
#pragma unroll
      for (int tile = 0; tile < 2; tile++)
        p[2 * tile + half] = pack<T>(exponential(add(scores[tile][2 * half], -base)),
                                     exponential(add(scores[tile][2 * half + 1], -base)));
    }
#pragma unroll
    for (int i = 0; i < 4; i++) sums[i] = multiply(sums[i], decays[i / 2]);
    multiply_16bit<T>(sums, p, ones);
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
      for (int i = 0; i < 4; i++) out[tile][i] = multiply(out[tile][i], decays[i / 2]);
      const Bytes8 v = EARLY ? early[tile] : load_value(tile);
      multiply_16bit<T>(out[tile], p, v.word);
    }
  }

#pragma unroll
  for (int half = 0; half < 2; half++) {
    const float inverse = divide(1.0f, sums[2 * half]);
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
      kept[tile][half] =
          pack<T>(multiply(out[tile][2 * half], inverse), multiply(out[tile][2 * half + 1], inverse));
  }
}

template <class T, int TILES, Width WIDTH>
__global__ void __launch_bounds__(MOST_WARPS<TILES> * WARP)
    cross_attention_kernel(const sana_edge_cross_attention_quantize_args a) {
  wait_for_kernels();
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
  const int head_dim = WIDTH == EXACT ? 8 * TILES : a.head_dim;
  const int columns = a.heads * head_dim, tokens = smaller(TOKENS, a.tokens - int(blockIdx.x) * TOKENS);
  const int64_t first_token = int64_t(blockIdx.y) * a.tokens + int64_t(blockIdx.x) * TOKENS;
  float* shared_roots = reinterpret_cast<float*>(shared_memory());
  float* maxima = shared_roots + TOKENS;
  char* stage = reinterpret_cast<char*>(maxima + warps * TOKENS);

  float roots[2] = {};
  if (a.norm_q) {
    find_roots(shared_roots, static_cast<const T*>(a.q) + first_token * columns, tokens, columns, a.norm_eps);
    synchronize_block();
    for (int half = 0; half < 2; half++) roots[half] = shared_roots[token_of(lane, half)];
  }

  uint32_t kept[HEADS<TILES>][TILES][2];
  float most[2] = {};
#pragma unroll
  for (int n = 0; n < HEADS<TILES>; n++) {
    const int head = warp + n * warps;
    if (head >= a.heads) continue;
    attend<T, TILES, WIDTH>(kept[n], a, head, first_token, tokens, roots);
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
      if (8 * tile >= head_dim) continue;
#pragma unroll
      for (int half = 0; half < 2; half++)
        for (int i = 0; i < 2; i++) most[half] = larger_or_nan(most[half], unpack<T>(kept[n][tile][half], i));
    }
  }
  for (int half = 0; half < 2; half++) {
    for (int other = 1; other < 4; other *= 2)
      most[half] = larger_or_nan(most[half], shuffle_xor(most[half], other));
    if (lane % 4 == 0) maxima[warp * TOKENS + token_of(lane, half)] = most[half];
  }
  synchronize_block();

#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int token = token_of(lane, half);
    float row = maxima[token];
    for (int n = 1; n < warps; n++) row = larger_or_nan(row, maxima[n * TOKENS + token]);
    const RowScale scale = row_scale(row, a.static_scale);
    if (warp == 0 && lane % 4 == 0 && token < tokens) a.scales[first_token + token] = scale.stored;
#pragma unroll
    for (int n = 0; n < HEADS<TILES>; n++) {
      const int head = warp + n * warps;
      if (head >= a.heads) continue;
#pragma unroll
      for (int tile = 0; tile < TILES; tile++) {
        if (8 * tile >= head_dim) continue;
        const uint32_t pair = kept[n][tile][half];
        const uint16_t both = uint16_t(uint8_t(quantize(unpack<T>(pair, 0), scale)) |
                                       uint8_t(quantize(unpack<T>(pair, 1), scale)) << 8);
        store_vector(stage + token * stage_stride(columns) + head * head_dim + output_of(lane, tile), both);
      }
    }
  }
  synchronize_block();
  const int chunks = columns / 16;
  for (int n = threadIdx.x; n < tokens * chunks; n += blockDim.x) {
    const int row = n / chunks, column = n % chunks * 16;
    store_vector(a.values + (first_token + row) * columns + column,
                 load_vector<Bytes16>(stage + row * stage_stride(columns) + column));
  }
}

template <class T, int TILES, Width WIDTH>
sana_edge_status start(const sana_edge_cross_attention_quantize_args& a, void* stream) {
  const int warps = blocks_of(a.heads, HEADS<TILES>);
  const dim3 grid{unsigned(blocks_of(a.tokens, TOKENS)), unsigned(a.prompts), 1};
  return launch(cross_attention_kernel<T, TILES, WIDTH>, grid, warps * WARP,
                shared_bytes(warps, a.heads * a.head_dim), stream, a, BEGINS_EARLY);
}

template <class T>
sana_edge_status choose(const sana_edge_cross_attention_quantize_args& a, void* stream) {
  if (a.head_dim == 32) return start<T, 4, EXACT>(a, stream);
  if (a.head_dim == 64) return start<T, 8, EXACT>(a, stream);
  if (a.head_dim == 72) return start<T, 9, EXACT>(a, stream);
  if (a.head_dim == 112) return start<T, 14, EXACT>(a, stream);
  return start<T, 16, ANY>(a, stream);
}

}  // namespace

extern "C" SANA_EDGE_API sana_edge_status
sana_edge_cross_attention_quantize(const sana_edge_cross_attention_quantize_args* a, void* stream) {
  SANA_EDGE_CHECK(a, SANA_EDGE_NULL_POINTER);
  SANA_EDGE_CHECK(is_16_bit(a->type), SANA_EDGE_BAD_TYPE);
  SANA_EDGE_CHECK(a->prompts >= 0 && a->prompts < 65536 && a->tokens >= 0 && a->heads > 0 && a->head_dim > 0 &&
                      a->head_dim % 8 == 0 && a->head_dim <= 128 &&
                      a->heads <= most_heads(a->head_dim) && a->heads * a->head_dim % 16 == 0 &&
                      a->capacity > 0 && a->capacity % 16 == 0 && a->capacity < LARGEST / 128,
                  SANA_EDGE_BAD_SHAPE);
  if (a->prompts == 0 || a->tokens == 0) return SANA_EDGE_OK;
  SANA_EDGE_CHECK(given({a->q, a->keys, a->values_transposed, a->lengths, a->values, a->scales}),
                  SANA_EDGE_NULL_POINTER);
  SANA_EDGE_CHECK(aligned({a->q, a->keys, a->values_transposed, a->values, a->norm_q}) &&
                      aligned({a->lengths, a->scales, a->static_scale}, 4),
                  SANA_EDGE_BAD_ALIGNMENT);
  if (a->type == SANA_EDGE_FP16) return choose<Half>(*a, stream);
  sana_edge_device_info device;
  const sana_edge_status status = current_device(&device);
  SANA_EDGE_CHECK(status == SANA_EDGE_OK, status);
  // Turing's tensor cores do not multiply BFloat16
  SANA_EDGE_CHECK(device.capability >= 80, SANA_EDGE_UNSUPPORTED_DEVICE);
  return choose<BFloat16>(*a, stream);
}
