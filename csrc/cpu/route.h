// route on one instruction set: the whole set-attention router of a row in one go.
//
// Items that do not exist (early ends, missing candidates) are left out of the sequences instead of being masked, so
// every attention here is dense over what is there. Of the path encoder only the [CLS] output is read, so only its
// query and feed-forward are computed. Weights are [in, out]: outputs run along the lanes, inputs are broadcast.
#pragma once

#include <math.h>

#include "../params.h"
#include "simd.h"
#include "support.h"

namespace lbr::LBR_ISA {

// out[t][0..outputs) = bias + sum_i x[t][i] * weight[i][0..outputs)
struct Dense {
  const float* weight;
  const float* bias;  // null: none
  int64_t inputs, outputs, weight_stride;
};

template <int kTokens, int kVectors>
static inline void dense_tile(const Dense& layer, const float* x, int64_t x_stride, float* out, int64_t out_stride,
                              int64_t column) {
  vfloat acc[kTokens][kVectors];
  unroll<kVectors>([&](auto v) LBR_INLINE {
    const vfloat bias = layer.bias ? load(layer.bias + column + v * kLanes) : vfloat{};
    unroll<kTokens>([&](auto t) LBR_INLINE { acc[t][v] = bias; });
  });
  const float* weight = layer.weight + column;
  for (int64_t i = 0; i < layer.inputs; ++i, weight += layer.weight_stride) {
    vfloat w[kVectors];
    unroll<kVectors>([&](auto v) LBR_INLINE { w[v] = load(weight + v * kLanes); });
    unroll<kTokens>([&](auto t) LBR_INLINE {
      const vfloat in = splat(x[t * x_stride + i]);
      unroll<kVectors>([&](auto v) LBR_INLINE { acc[t][v] = fma(in, w[v], acc[t][v]); });
    });
  }
  unroll<kTokens * kVectors>([&](auto i) LBR_INLINE {
    store(out + i / kVectors * out_stride + column + i % kVectors * kLanes, acc[i / kVectors][i % kVectors]);
  });
}

static inline void dense_tail(const Dense& layer, const float* x, int64_t x_stride, int64_t tokens, float* out,
                              int64_t out_stride, int64_t begin, int64_t end) {
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t o = begin; o < end; ++o) {
      float sum = layer.bias ? layer.bias[o] : 0;
      for (int64_t i = 0; i < layer.inputs; ++i) sum += x[t * x_stride + i] * layer.weight[i * layer.weight_stride + o];
      out[t * out_stride + o] = sum;
    }
}

constexpr int kDenseVectors = kLanes == 16 ? 4 : 2;
constexpr int kDenseTokens = kLanes == 16 ? 6 : 4;

static void dense(const Dense& layer, const float* x, int64_t x_stride, int64_t tokens, float* out, int64_t out_stride,
                  const ThreadPool& pool) {
  constexpr int64_t kColumns = kDenseVectors * kLanes;
  // A worker should have some ten microseconds of arithmetic before it is worth waking.
  const int64_t grain = largest(1, (int64_t(1) << 18) / largest(1, tokens * layer.inputs * kColumns));
  const int64_t blocks = layer.outputs / kColumns;
  pool.parallel_for(blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      int64_t t = 0;
      for (; t + kDenseTokens <= tokens; t += kDenseTokens)
        dense_tile<kDenseTokens, kDenseVectors>(layer, x + t * x_stride, x_stride, out + t * out_stride, out_stride,
                                                block * kColumns);
      for (; t + 3 <= tokens; t += 3)
        dense_tile<3, kDenseVectors>(layer, x + t * x_stride, x_stride, out + t * out_stride, out_stride,
                                     block * kColumns);
      for (; t < tokens; ++t)
        dense_tile<1, kDenseVectors>(layer, x + t * x_stride, x_stride, out + t * out_stride, out_stride,
                                     block * kColumns);
    }
  });
  int64_t column = blocks * kColumns;
  for (; column + kLanes <= layer.outputs; column += kLanes)
    for (int64_t t = 0; t < tokens; ++t)
      dense_tile<1, 1>(layer, x + t * x_stride, x_stride, out + t * out_stride, out_stride, column);
  dense_tail(layer, x, x_stride, tokens, out, out_stride, column, layer.outputs);
}

struct LayerNorm {
  const float *weight, *bias;
};

static void layer_norm(const LayerNorm& norm, const float* x, int64_t dim, float* out) {
  double sum = 0, squares = 0;
  for (int64_t i = 0; i < dim; ++i) sum += x[i];
  const float mean = float(sum / double(dim));
  for (int64_t i = 0; i < dim; ++i) squares += double(x[i] - mean) * double(x[i] - mean);
  const float scale = 1.0f / sqrtf(float(squares / double(dim)) + 1e-5f);
  for (int64_t i = 0; i < dim; ++i) out[i] = (x[i] - mean) * scale * norm.weight[i] + norm.bias[i];
}

// x * P(N < x): erf by Abramowitz & Stegun 7.1.26, within 1.5e-7.
static inline vfloat gelu(vfloat x) {
  const vfloat z = x * 0.70710678f, magnitude = max(z, -z);
  const vfloat t = splat(1.0f) / fma(splat(0.3275911f), magnitude, splat(1.0f));
  vfloat p = splat(1.061405429f);
  p = fma(p, t, splat(-1.453152027f));
  p = fma(p, t, splat(1.421413741f));
  p = fma(p, t, splat(-0.284496736f));
  p = fma(p, t, splat(0.254829592f));
  const vfloat tail = p * t * exp(-(magnitude * magnitude)) * 0.5f;  // P(N > |x|)
  return x * select(x < splat(0.0f), tail, splat(1.0f) - tail);
}

static void gelu_inplace(float* x, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(x + i, gelu(load(x + i)));
  for (; i < count; ++i) x[i] = gelu(splat(x[i]))[0];
}

struct EncoderWeights {
  LayerNorm attention_norm;
  Dense query, key_value, out;
  LayerNorm ffn_norm;
  Dense up, down;
  LayerNorm final_norm;
};

struct MlpWeights {
  Dense up, down;
};

// Walks the packed weights in the order in which they were packed.
class WeightReader {
 public:
  explicit WeightReader(const float* data) : next_(data) {}
  const float* take(int64_t count) {
    const float* p = next_;
    next_ += count;
    return p;
  }
  LayerNorm norm(int64_t dim) {
    const float* weight = take(dim);
    return {weight, take(dim)};
  }
  Dense dense(int64_t inputs, int64_t outputs, bool bias = true) {
    const float* weight = take(inputs * outputs);
    return {weight, bias ? take(outputs) : nullptr, inputs, outputs, outputs};
  }
  MlpWeights mlp(int64_t inputs, int64_t hidden, int64_t outputs) {
    const Dense up = dense(inputs, hidden);
    return {up, dense(hidden, outputs)};
  }
  EncoderWeights encoder(int64_t dim, int64_t ffn_dim) {
    EncoderWeights w;
    w.attention_norm = norm(dim);
    const Dense all = dense(dim, 3 * dim);
    w.query = {all.weight, all.bias, dim, dim, 3 * dim};
    w.key_value = {all.weight + dim, all.bias + dim, dim, 2 * dim, 3 * dim};
    w.out = dense(dim, dim);
    w.ffn_norm = norm(dim);
    const MlpWeights ffn = mlp(dim, ffn_dim, dim);
    w.up = ffn.up;
    w.down = ffn.down;
    w.final_norm = norm(dim);
    return w;
  }

 private:
  const float* next_;
};

struct RouterWeights {
  explicit RouterWeights(const RouteParams& p) {
    WeightReader reader(p.weights);
    if (p.input_norm) input_norm = reader.norm(p.hidden_size);
    in_proj = reader.dense(p.hidden_size, p.dim, false);
    depth_embed = reader.take(p.depth * p.dim);
    cls = reader.take(p.dim);
    path = reader.encoder(p.dim, p.ffn_dim);
    subtree = reader.encoder(p.dim, p.ffn_dim);
    pool_query = reader.take(p.dim);
    if (p.independent) {
      candidate_mlp = reader.mlp(p.dim, p.ffn_dim, p.dim);
    } else {
      candidate = reader.encoder(p.dim, p.ffn_dim);
    }
    if (p.mlp_score) {
      score_mlp = reader.mlp(p.dim, p.dim, 1);
    } else {
      score = reader.dense(p.dim, 1, false);
    }
  }

  LayerNorm input_norm{};
  Dense in_proj{};
  const float *depth_embed, *cls, *pool_query;
  EncoderWeights path, subtree, candidate;
  MlpWeights candidate_mlp{}, score_mlp{};
  Dense score{};
};

// The router for one row of the batch.
template <class T>
class RowRouter {
 public:
  RowRouter(const RouteParams& params, const RouterWeights& weights, const ThreadPool& pool)
      : p(params), w(weights), pool_(pool), paths_per_candidate_(power(params.width, params.depth - 1)) {
    const int64_t paths = p.width * paths_per_candidate_, tokens = paths * (p.depth + 1);
    states_.resize(p.nodes * p.hidden_size);
    embedded_.resize(p.nodes * p.dim);
    tokens_.resize(tokens * p.dim);
    normed_.resize(tokens * p.dim);
    key_value_.resize(tokens * 2 * p.dim);
    query_.resize(tokens * p.dim);
    mixed_.resize(tokens * p.dim);
    ffn_.resize(tokens * largest(p.ffn_dim, p.dim));
    rollouts_.resize(paths * p.dim);
    candidates_.resize(p.width * p.dim);
    sequence_ends_.resize(paths + 1);
    first_path_.resize(p.width + 1);
  }

  void run(int64_t b) {
    float* log_probs = p.log_probs + b * p.width;
    p.choice[b] = -1;
    for (int64_t k = 0; k < p.width; ++k) log_probs[k] = -logf(float(p.width));
    if (p.active && !p.active[b]) return;
    embed(b);
    const int64_t paths = encode_paths(b);
    if (paths == 0) return;
    pool_subtrees(paths);
    score(b, log_probs);
    choose(b, log_probs);
  }

 private:
  static int64_t power(int64_t base, int64_t exponent) {
    int64_t result = 1;
    while (exponent-- > 0) result *= base;
    return result;
  }
  bool exists(int64_t b, int64_t node) const { return !p.valid || p.valid[b * p.nodes + node]; }

  // In-projection of every node that exists; the others are left alone.
  void embed(int64_t b) {
    const T* hidden = (const T*)p.hidden + b * p.hidden_stride[0];
    // Runs of nodes that exist are projected together, so that a weight is read once for them.
    for (int64_t begin = 0; begin < p.nodes;) {
      int64_t end = begin;
      for (; end < p.nodes && exists(b, end); ++end) {
        float* state = states_.data() + end * p.hidden_size;
        const T* from = hidden + end * p.hidden_stride[1];
        int64_t i = 0;
        for (; i + kLanes <= p.hidden_size; i += kLanes) store(state + i, load(from + i));
        for (; i < p.hidden_size; ++i) state[i] = widen(from[i]);
        if (p.input_norm) layer_norm(w.input_norm, state, p.hidden_size, state);
      }
      dense(w.in_proj, states_.data() + begin * p.hidden_size, p.hidden_size, end - begin,
            embedded_.data() + begin * p.dim, p.dim, pool_);
      begin = end + 1;
    }
  }

  // One sequence [CLS], h_1 .. h_l per path that exists; leaves the [CLS] outputs in rollouts_, in order of candidate.
  int64_t encode_paths(int64_t b) {
    int64_t sequences = 0, tokens = 0;
    sequence_ends_[0] = 0;
    for (int64_t k = 0; k < p.width; ++k) {
      first_path_[k] = sequences;
      for (int64_t m = 0; m < paths_per_candidate_; ++m) {
        // Digits of m in base `width`, most significant first, say which child is taken at each layer.
        int64_t node = k, length = 0, digits = m, scale = paths_per_candidate_;
        for (int64_t layer = 0; layer < p.depth; ++layer) {
          if (layer > 0) {
            scale /= p.width;
            node = p.width + p.width * node + digits / scale;
            digits %= scale;
          }
          if (!exists(b, node)) {
            // An early end stands for one path, at the first of the leaf slots below it.
            if (layer == 0 || (node - p.width) % p.width != 0 || digits != 0) length = 0;
            break;
          }
          float* token = tokens_.data() + (tokens + 1 + length) * p.dim;
          for (int64_t i = 0; i < p.dim; ++i) token[i] = embedded_[node * p.dim + i] + w.depth_embed[layer * p.dim + i];
          ++length;
        }
        if (length == 0) continue;
        std::memcpy(tokens_.data() + tokens * p.dim, w.cls, p.dim * sizeof(float));
        tokens += 1 + length;
        sequence_ends_[++sequences] = tokens;
      }
    }
    first_path_[p.width] = sequences;
    encode(w.path, sequences, true, rollouts_.data());
    return sequences;
  }

  // Set attention among each candidate's paths, then attention pooling: one vector per candidate that exists.
  void pool_subtrees(int64_t paths) {
    std::memcpy(tokens_.data(), rollouts_.data(), paths * p.dim * sizeof(float));
    int64_t sequences = 0;
    for (int64_t k = 0; k < p.width; ++k)
      if (first_path_[k + 1] > first_path_[k]) sequence_ends_[++sequences] = first_path_[k + 1];
    encode(w.subtree, sequences, false, rollouts_.data());
    for (int64_t s = 0; s < sequences; ++s) {
      const int64_t begin = sequence_ends_[s], end = sequence_ends_[s + 1];
      attend(w.pool_query, rollouts_.data() + begin * p.dim, rollouts_.data() + begin * p.dim, p.dim, end - begin,
             p.dim, candidates_.data() + s * p.dim);
    }
    num_candidates_ = sequences;
  }

  void score(int64_t b, float* log_probs) {
    const int64_t count = num_candidates_;
    float* candidates = candidates_.data();
    if (p.independent) {
      mlp(w.candidate_mlp, candidates, count, normed_.data());
      candidates = normed_.data();
    } else {
      std::memcpy(tokens_.data(), candidates, count * p.dim * sizeof(float));
      sequence_ends_[1] = count;
      encode(w.candidate, 1, false, candidates);
    }
    float* scores = mixed_.data();
    if (p.mlp_score) {
      mlp(w.score_mlp, candidates, count, scores);
    } else {
      dense(w.score, candidates, p.dim, count, scores, 1, pool_);
    }
    float top = -INFINITY;
    for (int64_t s = 0; s < count; ++s) {
      top = scores[s] > top ? scores[s] : top;
      p.finite[b] &= isfinite(scores[s]);
    }
    double sum = 0;
    for (int64_t s = 0; s < count; ++s) sum += ::exp(double(scores[s] - top) / p.temperature);
    for (int64_t k = 0, s = 0; k < p.width; ++k)
      log_probs[k] = exists(b, k) ? float(double(scores[s++] - top) / p.temperature - ::log(sum)) : -INFINITY;
  }

  void choose(int64_t b, const float* log_probs) {
    int64_t best = -1;
    if (!p.uniforms) {
      for (int64_t k = 0; k < p.width; ++k)
        if (exists(b, k) && (best < 0 || log_probs[k] > log_probs[best])) best = k;
    } else {
      double rest = p.uniforms[b];
      for (int64_t k = 0; k < p.width; ++k) {
        const double probability = exists(b, k) ? ::exp(double(log_probs[k])) : 0;
        if (probability <= 0) continue;
        best = k;  // the last candidate of positive probability, should rounding leave a rest
        rest -= probability;
        if (rest < 0) break;
      }
    }
    p.choice[b] = best;
  }

  void mlp(const MlpWeights& weights, const float* x, int64_t tokens, float* out) {
    dense(weights.up, x, p.dim, tokens, ffn_.data(), weights.up.outputs, pool_);
    gelu_inplace(ffn_.data(), tokens * weights.up.outputs);
    dense(weights.down, ffn_.data(), weights.up.outputs, tokens, out, weights.down.outputs, pool_);
  }

  // One pre-LN encoder layer and its closing norm over the ragged sequences in tokens_. With `first_only`, out gets
  // one vector per sequence, else one per token.
  void encode(const EncoderWeights& weights, int64_t sequences, bool first_only, float* out) {
    const int64_t dim = p.dim, tokens = sequence_ends_[sequences], outputs = first_only ? sequences : tokens;
    const int64_t head_dim = dim / p.num_heads;
    for (int64_t t = 0; t < tokens; ++t)
      layer_norm(weights.attention_norm, tokens_.data() + t * dim, dim, normed_.data() + t * dim);
    dense(weights.key_value, normed_.data(), dim, tokens, key_value_.data(), 2 * dim, pool_);
    if (first_only) {
      for (int64_t s = 0; s < sequences; ++s) {
        move_row(normed_.data(), s, sequence_ends_[s]);
        move_row(tokens_.data(), s, sequence_ends_[s]);
      }
    }
    dense(weights.query, normed_.data(), dim, outputs, query_.data(), dim, pool_);
    for (int64_t s = 0, o = 0; s < sequences; ++s) {
      const int64_t begin = sequence_ends_[s], length = sequence_ends_[s + 1] - begin;
      for (int64_t i = 0; i < (first_only ? 1 : length); ++i, ++o)
        for (int64_t h = 0; h < p.num_heads; ++h) {
          const float* keys = key_value_.data() + begin * 2 * dim + h * head_dim;
          attend(query_.data() + o * dim + h * head_dim, keys, keys + dim, 2 * dim, length, head_dim,
                 mixed_.data() + o * dim + h * head_dim);
        }
    }
    dense(weights.out, mixed_.data(), dim, outputs, query_.data(), dim, pool_);
    for (int64_t i = 0; i < outputs * dim; ++i) tokens_[i] += query_[i];
    for (int64_t o = 0; o < outputs; ++o)
      layer_norm(weights.ffn_norm, tokens_.data() + o * dim, dim, normed_.data() + o * dim);
    mlp({weights.up, weights.down}, normed_.data(), outputs, query_.data());
    for (int64_t i = 0; i < outputs * dim; ++i) tokens_[i] += query_[i];
    for (int64_t o = 0; o < outputs; ++o) layer_norm(weights.final_norm, tokens_.data() + o * dim, dim, out + o * dim);
  }

  void move_row(float* rows, int64_t to, int64_t from) const {
    if (to != from) std::memcpy(rows + to * p.dim, rows + from * p.dim, p.dim * sizeof(float));
  }

  // softmax(query . keys / sqrt(dim)) . values for one query; `stride` separates keys, and values.
  static void attend(const float* query, const float* keys, const float* values, int64_t stride, int64_t count,
                     int64_t dim, float* out) {
    const double scale = 1.0 / sqrt(double(dim));
    double top = -INFINITY, sum = 0;
    for (int64_t j = 0; j < count; ++j) {
      const double score = dot(query, keys + j * stride, dim) * scale;
      top = score > top ? score : top;
    }
    for (int64_t d = 0; d < dim; ++d) out[d] = 0;
    for (int64_t j = 0; j < count; ++j) {
      const double weight = ::exp(dot(query, keys + j * stride, dim) * scale - top);
      sum += weight;
      for (int64_t d = 0; d < dim; ++d) out[d] += float(weight) * values[j * stride + d];
    }
    for (int64_t d = 0; d < dim; ++d) out[d] /= float(sum);
  }

  static double dot(const float* a, const float* b, int64_t dim) {
    vfloat sum = {};
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes) sum = fma(load(a + d), load(b + d), sum);
    float total = horizontal_sum(sum);
    for (; d < dim; ++d) total += a[d] * b[d];
    return total;
  }

  const RouteParams& p;
  const RouterWeights& w;
  const ThreadPool& pool_;
  const int64_t paths_per_candidate_;
  int64_t num_candidates_ = 0;
  Buffer<float> states_, embedded_, tokens_, normed_, key_value_, query_, mixed_, ffn_, rollouts_, candidates_;
  Buffer<int64_t> sequence_ends_;  // sequence s is tokens [sequence_ends_[s], sequence_ends_[s + 1])
  Buffer<int64_t> first_path_;     // candidate k's paths are rollouts [first_path_[k], first_path_[k + 1])
};

template <class T>
static void route_rows(const RouteParams& p, const ThreadPool& pool) {
  const RouterWeights weights(p);
  pool.parallel_for(p.batch, 1, [&](int64_t begin, int64_t end) {
    RowRouter<T> router(p, weights, pool);
    for (int64_t b = begin; b < end; ++b) router.run(b);
  });
}

static void route(const RouteParams& params, const ThreadPool& pool) {
  switch (params.dtype) {
    case DType::kFloat32: return route_rows<float>(params, pool);
    case DType::kFloat16: return route_rows<Float16>(params, pool);
    case DType::kBFloat16: return route_rows<BFloat16>(params, pool);
  }
}

}  // namespace lbr::LBR_ISA
