// Linear attention's read: a block has the q of some tokens of an image in shared memory, 16 bits a number, and
// puts the outputs in their place, where they wait for their rows' absmax. A warp takes a head, of which the state is
// read from L2 once per block.
#include "checks.h"
#include "linear_attention_read.h"
#include "row_quantizer.h"

namespace {

constexpr int THREADS = 384;
constexpr int WARPS = THREADS / WARP;

struct Finish {
  sana_edge_linear_attention_finish_args a;
  int tiles;  // of tokens in an image
};

// rows, each warp's absmax of each of them, and their scales
size_t shared_bytes(int tokens, int heads) {
  return size_t(tokens) * (row_elements(heads) * 2 + WARPS * sizeof(float) + sizeof(RowScale));
}

// a block's rows in pieces, of which this thread has every THREADS-th
struct Piece {
  int token, piece, pieces, tokens_on, pieces_on;
  __device__ __forceinline__ explicit Piece(int of_row)
      : token(threadIdx.x / of_row),
        piece(threadIdx.x % of_row),
        pieces(of_row),
        tokens_on(THREADS / of_row),
        pieces_on(THREADS % of_row) {}
  __device__ __forceinline__ void next() {
    token += tokens_on, piece += pieces_on;
    if (piece >= pieces) piece -= pieces, token++;
  }
};

// q as it is, on its way to shared memory; zeros for tokens that are not there
template <class T, int TOKENS>
__device__ __forceinline__ void load_queries(const Finish& f, int64_t first_row, int tokens, T* shared) {
  const auto& a = f.a;
  const T* const q = static_cast<const T*>(a.q) + first_row * a.q_stride;
#pragma unroll 4
  for (Piece p(a.heads * HEAD / 8); p.token < TOKENS; p.next()) {
    const bool there = p.token < tokens;
    copy_async16(shared + p.token * row_elements(a.heads) + p.piece * 8,
                 q + (there ? p.token : 0) * a.q_stride + p.piece * 8, there);
  }
  copy_async_commit();
}

// Quotients to the place of q, which is the lane's in its first row. most[m][half] becomes the absmax of the lane's
// channels of a token, not rounded.
template <class T, int TOKENS, int TILES>
__device__ __forceinline__ void store_outputs(const Sums<TILES>& sums, const float (&roots)[TILES][2], float down,
                                              float eps, T* out_rows, int row, float (&most)[TILES][2]) {
  const int lane = threadIdx.x % WARP;
#pragma unroll
  for (int m = 0; m < TILES; m++)
    for (int half = 0; half < 2; half++) {
      const int token = 16 * m + 8 * half;
      const float root = multiply(roots[m][half], down);
      const float divisor = add(sums.divisors[m][2 * half], sums.divisors[m][2 * half + 1]);
      const float inverse = divide(root, fused_multiply_add(root, divisor, eps));
      Bytes16 out;
      for (int word = 0; word < 4; word++) {
        float pair[2];
        for (int i = 0; i < 2; i++) {
          pair[i] = multiply(sums.read[m][word % 2 * 2 + i][2 * half + word / 2], inverse);
          most[m][half] = larger_or_nan(most[m][half], pair[i]);
        }
        out.word[word] = pack_floats<T>(pair[0], pair[1]);
      }
      if (TOKENS >= 16 || sum_row(lane, 2 * half) < TOKENS) store_vector(out_rows + token * row, out);
    }
}

// The heads of a warp, whose absmaxima go to ``warps``. The rows of the next state are on their way while the present
// ones are multiplied.
template <class T, bool NORM, int TOKENS>
__device__ __forceinline__ void read_heads(const Finish& f, int image, int64_t first_row, int tokens, T* shared,
                                           float* warps) {
  constexpr int TILES = TOKENS < 16 ? 1 : TOKENS / 16;
  const auto& a = f.a;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const int row = row_elements(a.heads);
  const T* queries = shared + smaller(query_row(lane), TOKENS - 1) * row + query_column(lane) + warp * HEAD;
  T* outputs = shared + sum_row(lane, 0) * row + output_column(lane) + warp * HEAD;
  const float* state = a.state + (int64_t(image) * a.heads + warp) * STATE;
  const float* keys = state + HEAD * HEAD + state_row(lane, 0);
  const float* weights = NORM ? a.norm_q + warp * HEAD + state_row(lane, 0) : nullptr;
  state += state_row(lane, 0) * HEAD + state_column(lane);
  StateRows<NORM> steps[2];
  if (warp < a.heads)
    for (int n = 0; n < 2; n++) steps[n].load(state + n * 16 * HEAD, keys + n * 16, weights + n * 16);
  float roots[TILES][2], most[TILES][2] = {};
  for (int m = 0; m < TILES; m++)
    for (int half = 0; half < 2; half++) {
      const int token = 16 * m + sum_row(lane, 2 * half);
      roots[m][half] = NORM && token < tokens ? a.roots[2 * (first_row + token)] : 1;
    }
  copy_async_wait<0>();
  synchronize_block();
  for (int head = warp; head < a.heads; head += WARPS) {
    state += WARPS * STATE, keys += WARPS * STATE, weights += NORM ? WARPS * HEAD : 0;
    Sums<TILES> sums{};
    if (NORM)
      for (int n = 0; n < 2; n++) steps[n].multiply_by_weights();
    const Power power = power_of<T>(steps);
#pragma unroll
    for (int n = 0; n < 2; n++) {
      Operands<TILES> operands;
      prepare<T>(operands, steps[n], power.up, queries + 16 * n, 16 * row);
      if (head + WARPS < a.heads) steps[n].load(state + n * 16 * HEAD, keys + n * 16, weights + n * 16);
      multiply_operands<T>(sums, operands);
    }
    // all lanes have read the q that outputs take the place of
    synchronize_warp();
    store_outputs<T, TOKENS>(sums, roots, power.down, a.eps, outputs, row, most);
    queries += WARPS * HEAD, outputs += WARPS * HEAD;
  }
  for (int m = 0; m < TILES; m++)
    for (int half = 0; half < 2; half++) {
      const int token = 16 * m + sum_row(lane, 2 * half);
      float& one = most[m][half];
      for (int other = 1; other < 4; other *= 2) one = larger_or_nan(one, shuffle_xor(one, other));
      // the largest of what was rounded is the largest, rounded
      if (lane % 4 == 0 && token < TOKENS) warps[warp * TOKENS + token] = to_float(from_float<T>(one));
    }
}

template <class T, bool NORM, int TOKENS>
__global__ void __launch_bounds__(THREADS) linear_attention_finish_kernel(const Finish f) {
  wait_for_kernels();
  const auto& a = f.a;
  const int image = blockIdx.x / f.tiles, first = blockIdx.x % f.tiles * TOKENS;
  const int tokens = smaller(TOKENS, a.tokens - first);
  const int64_t first_row = int64_t(image) * a.tokens + first;
  T* const shared = reinterpret_cast<T*>(shared_memory());
  float* const warps = reinterpret_cast<float*>(shared + TOKENS * row_elements(a.heads));
  RowScale* const scales = reinterpret_cast<RowScale*>(warps + WARPS * TOKENS);

  load_queries<T, TOKENS>(f, first_row, tokens, shared);
  read_heads<T, NORM, TOKENS>(f, image, first_row, tokens, shared, warps);
  synchronize_block();
  if (int(threadIdx.x) < tokens) {
    float largest = warps[threadIdx.x];
    for (int n = 1; n < WARPS; n++) largest = larger_or_nan(largest, warps[n * TOKENS + threadIdx.x]);
    scales[threadIdx.x] = row_scale(largest, a.static_scale);
    a.scales[first_row + threadIdx.x] = scales[threadIdx.x].stored;
  }
  synchronize_block();
  for (Piece p(a.heads * HEAD / 16); p.token < tokens; p.next()) {
    float values[16];
    load_group(values, shared + p.token * row_elements(a.heads) + p.piece * 16);
    store_vector(a.values + ((first_row + p.token) * a.heads * HEAD + p.piece * 16),
                 quantize_group(values, scales[p.token]));
  }
}

template <class T, int TOKENS>
sana_edge_status start(Finish f, void* stream) {
  f.tiles = blocks_of(f.a.tokens, TOKENS);
  const dim3 grid{unsigned(f.tiles) * unsigned(f.a.images), 1, 1};
  const auto kernel = f.a.roots ? linear_attention_finish_kernel<T, true, TOKENS>
                                : linear_attention_finish_kernel<T, false, TOKENS>;
  return launch(kernel, grid, THREADS, shared_bytes(TOKENS, f.a.heads), stream, f, BEGINS_EARLY);
}

// What the processor that has most blocks of so many tokens reads and writes: each the whole state, which is as much
// as q and outputs of 44 tokens.
int64_t moved(const Finish& f, int tokens, int processors) {
  constexpr int STATE_TOKENS = STATE * int(sizeof(float)) / (3 * HEAD);
  return blocks_of(int64_t(f.a.images) * blocks_of(f.a.tokens, tokens), int64_t(processors)) * (STATE_TOKENS + tokens);
}

template <class T>
sana_edge_status start(const Finish& f, int processors, void* stream) {
  sana_edge_status status = SANA_EDGE_UNSUPPORTED_DEVICE;
  if (moved(f, 32, processors) <= moved(f, 16, processors)) status = start<T, 32>(f, stream);
  // as many as a block has shared memory for
  if (status == SANA_EDGE_UNSUPPORTED_DEVICE) status = start<T, 16>(f, stream);
  if (status == SANA_EDGE_UNSUPPORTED_DEVICE) status = start<T, 8>(f, stream);
  if (status == SANA_EDGE_UNSUPPORTED_DEVICE) status = start<T, 4>(f, stream);
  return status;
}

}  // namespace

extern "C" SANA_EDGE_API sana_edge_status
sana_edge_linear_attention_finish(const sana_edge_linear_attention_finish_args* a, void* stream) {
  SANA_EDGE_CHECK(a, SANA_EDGE_NULL_POINTER);
  SANA_EDGE_CHECK(is_16_bit(a->type), SANA_EDGE_BAD_TYPE);
  SANA_EDGE_CHECK(a->images >= 0 && a->tokens >= 0 && int64_t(a->images) * a->tokens < LARGEST,
                  SANA_EDGE_BAD_SHAPE);
  SANA_EDGE_CHECK(a->heads > 0 && a->heads <= 256 && a->q_stride >= a->heads * HEAD, SANA_EDGE_BAD_SHAPE);
  if (a->images == 0 || a->tokens == 0) return SANA_EDGE_OK;
  SANA_EDGE_CHECK(given({a->q, a->state, a->values, a->scales}) && !a->roots == !a->norm_q,
                  SANA_EDGE_NULL_POINTER);
  SANA_EDGE_CHECK(aligned({a->q, a->norm_q, a->state, a->values}) && a->q_stride % 8 == 0 &&
                      aligned({a->roots, a->static_scale, a->scales}, 4),
                  SANA_EDGE_BAD_ALIGNMENT);
  sana_edge_device_info device;
  const sana_edge_status status = current_device(&device);
  SANA_EDGE_CHECK(status == SANA_EDGE_OK, status);
  const Finish f{*a, 0};
  return a->type == SANA_EDGE_FP16 ? start<Half>(f, device.processors, stream)
                                   : start<BFloat16>(f, device.processors, stream);
}
