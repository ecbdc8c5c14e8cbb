// Gemma-2's causal attention of a prompt behind a prefix whose keys and values are kept, in fp32.
//
// A warp has one token and head; 4 warps share its keys where there are few tokens, and so do groups of lanes
// where heads are short. A lane has 8 neighbouring channels of q, k and v, and a softmax of its own, which are put
// together in shared memory at the end. Warps of a block have neighbouring tokens of the heads that share k and v,
// which they find in L1. Few tokens on few keys: this is less work than the products beside it, and in fp32 it
// needs no tensor cores.
#include <limits>

#include "checks.h"
#include "row_quantizer.h"

namespace {

using Arguments = sana_edge_soft_capped_attention_args;

constexpr int WARPS = 16, THREADS = WARPS * WARP;
constexpr int CHANNELS = 8;  // of a lane
constexpr int KEYS = 4;      // at a time
constexpr float INFINITE = std::numeric_limits<float>::infinity();

// a lane's softmax over its share of the keys
struct Softmax {
  float most = -INFINITE, sum = 0, out[CHANNELS] = {};

  __device__ __forceinline__ void decay(float now) {
    // a share that has seen only -infinity must not become NaN yet
    const float factor = exponential(add(most, -(now == -INFINITE ? 0.0f : now)));
    most = now;
    sum = multiply(sum, factor);
    for (int i = 0; i < CHANNELS; i++) out[i] = multiply(out[i], factor);
  }
};

constexpr int PARTS = 2 + CHANNELS;
constexpr size_t SHARED = PARTS * THREADS * sizeof(float);

__device__ __forceinline__ void leave(const Softmax& own) {
  float* const shared = reinterpret_cast<float*>(shared_memory()) + threadIdx.x;
  shared[0] = own.most;
  shared[THREADS] = own.sum;
  for (int i = 0; i < CHANNELS; i++) shared[(2 + i) * THREADS] = own.out[i];
}

__device__ __forceinline__ Softmax found(int thread) {
  const float* const shared = reinterpret_cast<const float*>(shared_memory()) + thread;
  Softmax other;
  other.most = shared[0];
  other.sum = shared[THREADS];
  for (int i = 0; i < CHANNELS; i++) other.out[i] = shared[(2 + i) * THREADS];
  return other;
}

// where keys and values of a head are, from a lane's channels on
template <class T>
struct Memory {
  const T* prefix;
  const float* own;
  int known, head_dim, width;

  __device__ __forceinline__ void load(float (&to)[CHANNELS], int at) const {
    if (at < known)
      load_group(to, prefix + int64_t(at) * head_dim);
    else
      load_group(to, own + int64_t(at - known) * width);
  }
};

template <class T>
__device__ __forceinline__ void read_keys(Softmax& softmax, const float (&q)[CHANNELS], const Memory<T>& keys,
                                          const Memory<T>& values, const Arguments& a, int first, int last,
                                          int split, int splits) {
  const int lanes = a.head_dim / CHANNELS;
  const float inverse_cap = a.cap > 0 ? divide(1.0f, a.cap) : 0.0f;
  for (int base = first; base <= last; base += KEYS * splits) {
    float scores[KEYS], v[KEYS][CHANNELS];
#pragma unroll
    for (int n = 0; n < KEYS; n++) {
      const int at = base + n * splits + split;
      float k[CHANNELS] = {};
      for (int i = 0; i < CHANNELS; i++) v[n][i] = 0;
      if (at <= last) {
        keys.load(k, at);
        values.load(v[n], at);
      }
      scores[n] = 0;
      for (int i = 0; i < CHANNELS; i++) scores[n] = fused_multiply_add(q[i], k[i], scores[n]);
    }
    for (int other = 1; other < lanes; other *= 2)
#pragma unroll
      for (int n = 0; n < KEYS; n++) scores[n] = add(scores[n], shuffle_xor(scores[n], other));
    float now = softmax.most;
#pragma unroll
    for (int n = 0; n < KEYS; n++) {
      float score = multiply(scores[n], a.scale);
      if (a.cap > 0) score = multiply(tanhf(multiply(score, inverse_cap)), a.cap);
      scores[n] = base + n * splits + split <= last ? score : -INFINITE;
      now = scores[n] > now ? scores[n] : now;
    }
    softmax.decay(now);
#pragma unroll
    for (int n = 0; n < KEYS; n++) {
      const float weight = exponential(add(scores[n], -(now == -INFINITE ? 0.0f : now)));
      softmax.sum = add(softmax.sum, weight);
      for (int i = 0; i < CHANNELS; i++) softmax.out[i] = fused_multiply_add(weight, v[n][i], softmax.out[i]);
    }
  }
}

template <class T, int SPLITS>
__global__ void __launch_bounds__(THREADS) soft_capped_attention_kernel(const Arguments a) {
  wait_for_kernels();
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, lanes = a.head_dim / CHANNELS;
  const int groups = WARP / lanes, shared_by = a.heads / a.kv_heads, kv_head = blockIdx.y;
  const int width = (a.heads + 2 * a.kv_heads) * a.head_dim, channel = lane % lanes * CHANNELS;
  const int row = blockIdx.x * (WARPS / SPLITS) + warp / SPLITS;
  const int token = row / shared_by, head = kv_head * shared_by + row % shared_by;
  const bool there = token < a.tokens;
  const int known = smaller(larger(*a.known, 0), a.capacity), last = there ? known + token : -1;
  const int first = a.window > 0 ? larger(last - a.window + 1, 0) : 0;
  const float* const prompt = a.qkv + int64_t(blockIdx.z) * a.tokens * width + channel;
  const int64_t prefix = int64_t(kv_head) * a.capacity * a.head_dim + channel;
  const Memory<T> keys{static_cast<const T*>(a.prefix_keys) + prefix, prompt + (a.heads + kv_head) * a.head_dim,
                       known, a.head_dim, width};
  const Memory<T> values{static_cast<const T*>(a.prefix_values) + prefix,
                         prompt + (a.heads + a.kv_heads + kv_head) * a.head_dim, known, a.head_dim, width};
  float q[CHANNELS] = {};
  if (there) load_group(q, prompt + int64_t(token) * width + head * a.head_dim);
  Softmax softmax;
  read_keys(softmax, q, keys, values, a, first, last, warp % SPLITS * groups + lane / lanes, SPLITS * groups);
  leave(softmax);
  synchronize_block();
  if (!there || warp % SPLITS > 0 || lane >= lanes) return;
  // the row's shares in their order
  for (int n = 1; n < SPLITS * groups; n++) {
    const Softmax other = found((warp + n / groups) * WARP + n % groups * lanes + lane);
    const float now = other.most > softmax.most ? other.most : softmax.most;
    softmax.decay(now);
    const float factor = exponential(add(other.most, -(now == -INFINITE ? 0.0f : now)));
    softmax.sum = fused_multiply_add(other.sum, factor, softmax.sum);
    for (int i = 0; i < CHANNELS; i++)
      softmax.out[i] = fused_multiply_add(other.out[i], factor, softmax.out[i]);
  }
  struct alignas(16) Four {
    float element[4];
  };
  float* const out = a.out + ((int64_t(blockIdx.z) * a.tokens + token) * a.heads + head) * a.head_dim + channel;
  for (int half = 0; half < 2; half++) {
    Four four;
    for (int i = 0; i < 4; i++) four.element[i] = divide(softmax.out[4 * half + i], softmax.sum);
    store_vector(out + 4 * half, four);
  }
}

template <class T, int SPLITS>
sana_edge_status start(const Arguments& a, void* stream) {
  const int rows = a.tokens * (a.heads / a.kv_heads);
  const dim3 grid{unsigned(blocks_of(rows, WARPS / SPLITS)), unsigned(a.kv_heads), unsigned(a.prompts)};
  return launch(soft_capped_attention_kernel<T, SPLITS>, grid, THREADS, SHARED, stream, a, BEGINS_EARLY);
}

template <class T>
sana_edge_status choose(const Arguments& a, void* stream, int processors) {
  const int64_t rows = int64_t(a.tokens) * (a.heads / a.kv_heads);
  const bool few = blocks_of<int64_t>(rows, WARPS) * a.kv_heads * a.prompts < processors;
  return few ? start<T, 4>(a, stream) : start<T, 1>(a, stream);
}

}  // namespace

extern "C" SANA_EDGE_API sana_edge_status
sana_edge_soft_capped_attention(const sana_edge_soft_capped_attention_args* a, void* stream) {
  SANA_EDGE_CHECK(a, SANA_EDGE_NULL_POINTER);
  SANA_EDGE_CHECK(is_float(a->type), SANA_EDGE_BAD_TYPE);
  SANA_EDGE_CHECK(a->prompts >= 0 && a->prompts < 65536 && a->tokens >= 0 && a->tokens < (1 << 20) &&
                      a->capacity > 0 && a->capacity < (1 << 20) && a->window >= 0,
                  SANA_EDGE_BAD_SHAPE);
  SANA_EDGE_CHECK(a->heads > 0 && a->kv_heads > 0 && a->heads <= 256 && a->heads % a->kv_heads == 0 &&
                      a->head_dim >= CHANNELS && a->head_dim <= CHANNELS * WARP &&
                      (a->head_dim & (a->head_dim - 1)) == 0 && a->cap >= 0,
                  SANA_EDGE_BAD_SHAPE);
  if (a->prompts == 0 || a->tokens == 0) return SANA_EDGE_OK;
  SANA_EDGE_CHECK(given({a->qkv, a->prefix_keys, a->prefix_values, a->known, a->out}), SANA_EDGE_NULL_POINTER);
  SANA_EDGE_CHECK(aligned({a->qkv, a->prefix_keys, a->prefix_values, a->out}) && aligned({a->known}, 4),
                  SANA_EDGE_BAD_ALIGNMENT);
  sana_edge_device_info device;
  const sana_edge_status status = current_device(&device);
  SANA_EDGE_CHECK(status == SANA_EDGE_OK, status);
  if (a->type == SANA_EDGE_FP16) return choose<Half>(*a, stream, device.processors);
  if (a->type == SANA_EDGE_BF16) return choose<BFloat16>(*a, stream, device.processors);
  return choose<float>(*a, stream, device.processors);
}
