// packed_tree_attention on one instruction set, forward and backward.
//
// A worker walks through the query blocks of a slice (packed_tree_plan.h) from left to right and keeps the keys that
// the block sees in one dense list, as floats: those from before that reach into the block, then the block's own. As
// runs nest, keys come and go at its end, and each is converted once; where they do not nest, the list closes its gaps.
// All query heads of a key head use the list before the walk goes on. Softmax runs down the keys with the queries along
// the lanes. Tiles of keys know which of the block's queries see one of them, and the rest is not computed.
//
// The backward pass recomputes the scores from the log-sum-exp, in one walk for all three gradients: those of keys and
// values stand in lists beside the keys', and leave with them. Keys that nobody sees are not read.
#pragma once

#include "../params.h"
#include "attention_tiles.h"
#include "matrix_tiles.h"
#include "online_softmax.h"
#include "packed_tree_plan.h"
#include "simd.h"
#include "support.h"

namespace lbr::LBR_ISA {

constexpr int kChunkKeys = 16 * kProductRows;  // whose scores stand in the cache
constexpr int kChunkTiles = kChunkKeys / kProductRows;

// What one worker needs, whatever its slices.
class PackedTreeScratch {
 public:
  PackedTreeScratch(int64_t most_keys, int64_t dim, int64_t value_dim, bool backward)
      : dim(round_up(dim, kLanes)),
        value_dim(round_up(value_dim, kLanes)),
        capacity(round_up(most_keys, kProductRows)),
        node(capacity),
        end(capacity),
        position(capacity),
        first_row(capacity),
        last_row(capacity),
        key(capacity * this->dim),
        value(capacity * this->value_dim),
        key_grad(backward ? capacity * this->dim : 0),
        value_grad(backward ? capacity * this->value_dim : 0),
        tile(capacity / kProductRows),
        query(kBlockQueries * this->dim),
        query_columns(kBlockQueries * this->dim),
        out(kBlockQueries * this->value_dim),
        grad(kBlockQueries * this->value_dim),
        grad_columns(backward ? kBlockQueries * this->value_dim : 0),
        query_grad(backward ? kBlockQueries * this->dim : 0),
        scores(kChunkKeys * kBlockQueries),
        change(backward ? kChunkKeys * kBlockQueries : 0),
        query_position(kBlockQueries) {}

  const int64_t dim, value_dim, capacity;  // the sizes of rows, in whole vectors
  // The list of keys.
  int64_t count = 0;
  Buffer<int32_t> node, end, position;
  Buffer<int32_t> first_row, last_row;  // of the block's queries, those that may see the key
  Buffer<float> key, value, key_grad, value_grad;
  struct Tile {
    int first_row, last_row;  // of those that see one of its keys
    bool whole;               // every query sees every key
    int first_vector() const { return first_row / kLanes; }
    int last_vector() const { return int(ceil_div(last_row, kLanes)); }
  };
  Buffer<Tile> tile;
  // The block of queries of one head: rows, and the same with the queries along the lanes.
  Buffer<float> query, query_columns, out, grad, grad_columns, query_grad;
  Buffer<float> scores, change;  // [kChunkKeys][kBlockQueries], of a chunk of keys; scores' gradient
  Buffer<int32_t> query_position;
  float top[kBlockQueries], sum[kBlockQueries], delta[kBlockQueries];
  bool sees[kBlockQueries];  // whether a query sees any key
};

template <class T>
class PackedTreeAttention {
  using Scratch = PackedTreeScratch;
  using Tile = Scratch::Tile;
  typedef uint32_t vuint __attribute__((vector_size(4 * kLanes)));

 public:
  PackedTreeAttention(const PackedTreeAttentionParams& params, const PackedTreeAttentionBackwardParams* backward)
      : p(params),
        g(backward),
        plan(params),
        group(params.q_heads / params.kv_heads),
        window(params.window <= INT32_MAX ? int32_t(params.window) : 0),
        factor(float(double(params.scale) * kLog2E64)),
        from_log2(float(1 / (kLog2E64 * params.softcap))),
        to_log2(float(kLog2E64 * params.softcap)) {}

  void run(const ThreadPool& pool) const {
    Buffer<int64_t> first_slice(p.batch + 1), first_share(p.batch + 1);
    first_slice[0] = first_share[0] = 0;
    for (int64_t b = 0; b < p.batch; ++b) {
      const int64_t slices = p.kv_heads * plan.slices(b);
      first_slice[b + 1] = first_slice[b] + slices;
      first_share[b + 1] = first_share[b] + slices * plan.num_shared(b);
    }
    const int64_t share = p.head_dim + p.value_dim;
    Buffer<float> shares(g ? first_share[p.batch] * share : 0);

    pool.parallel_for(first_slice[p.batch], 1, [&](int64_t begin, int64_t end) {
      Scratch s(plan.most_keys(), p.head_dim, p.value_dim, g != nullptr);
      int64_t b = 0;
      for (int64_t i = begin; i < end; ++i) {
        while (i >= first_slice[b + 1]) ++b;
        const int64_t local = i - first_slice[b], slices = plan.slices(b);
        walk({b, local / slices, local % slices, &shares[(first_share[b] + local * plan.num_shared(b)) * share]}, s);
      }
    });
    if (!g || first_share[p.batch] == 0) return;
    constexpr int64_t kWork = 1 << 14;  // elements that are worth another worker
    pool.parallel_for(p.batch * p.kv_heads * p.nodes, ceil_div(kWork, share), [&](int64_t begin, int64_t end) {
      Buffer<float> total(share);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t node = i % p.nodes, head = i / p.nodes % p.kv_heads, b = i / p.nodes / p.kv_heads;
        const int64_t index = plan.shared(b)[node];
        if (index < 0) continue;
        const int64_t first = plan.slice_of(b, node), last = plan.slice_of(b, plan.ends(b)[node] - 1);
        for (int64_t slice = first; slice <= last; ++slice) {
          const int64_t row = first_share[b] + (head * plan.slices(b) + slice) * plan.num_shared(b) + index;
          for (int64_t d = 0; d < share; ++d)
            total[d] = slice == first ? shares[row * share + d] : total[d] + shares[row * share + d];
        }
        write_key_grads(b, head, node, total.data(), total.data() + p.head_dim);
      }
    });
  }

 private:
  static constexpr double kLog2E64 = 1.4426950408889634;

  // Part of the queries of a row of the batch, for one key head. `shares` are the gradients of its shared keys.
  struct Slice {
    int64_t b, head, index;
    float* shares;
  };
  // Queries [first, end), in so many vectors.
  struct Block {
    int64_t first, end;
    int rows() const { return int(end - first); }
    int vectors() const { return int(ceil_div(end - first, kLanes)); }
  };

  void walk(const Slice& slice, Scratch& s) const {
    const int64_t begin = plan.bounds(slice.b)[slice.index], behind = plan.bounds(slice.b)[slice.index + 1];
    const int32_t* end = plan.ends(slice.b);
    s.count = 0;
    for (int64_t k = 0; k < begin; ++k)
      if (end[k] > begin) append(slice, k, s);
    for (int64_t first = begin; first < behind; first += kBlockQueries) {
      const Block block{first, smallest(first + kBlockQueries, behind)};
      leave(slice, first, s);
      // Those that stay come first, so that the others leave from the end of the list.
      for (int64_t k = first; k < block.end; ++k)
        if (end[k] > block.end) append(slice, k, s);
      for (int64_t k = first; k < block.end; ++k) {
        if (end[k] > k && end[k] <= block.end) append(slice, k, s);
        if (end[k] <= k && g) write_nothing(slice, k);
      }
      look(slice, block, s);
      for (int64_t i = 0; i < group; ++i) {
        if (g) {
          differentiate(slice, slice.head * group + i, block, s);
        } else {
          attend(slice, slice.head * group + i, block, s);
        }
      }
    }
    leave(slice, p.nodes, s);
  }

  void append(const Slice& slice, int64_t k, Scratch& s) const {
    const int64_t i = s.count++;
    s.node[i] = int32_t(k);
    s.end[i] = plan.ends(slice.b)[k];
    s.position[i] = p.positions ? p.positions[slice.b * p.positions_stride + k] : 0;
    stage(p.keys, p.keys_stride, slice.b, slice.head, k, p.head_dim, &s.key[i * s.dim]);
    stage(p.values, p.values_stride, slice.b, slice.head, k, p.value_dim, &s.value[i * s.value_dim]);
    if (!g) return;
    std::memset(&s.key_grad[i * s.dim], 0, s.dim * sizeof(float));
    std::memset(&s.value_grad[i * s.value_dim], 0, s.value_dim * sizeof(float));
  }

  // Keys whose subtree ends at `first` or before leave the list.
  void leave(const Slice& slice, int64_t first, Scratch& s) const {
    int64_t kept = 0;
    for (int64_t i = 0; i < s.count; ++i) {
      if (s.end[i] <= first) {
        if (g) hand_in(slice, i, s);
        continue;
      }
      if (kept < i) {
        s.node[kept] = s.node[i], s.end[kept] = s.end[i], s.position[kept] = s.position[i];
        move_row(s.key, s.dim, i, kept);
        move_row(s.value, s.value_dim, i, kept);
        if (g) move_row(s.key_grad, s.dim, i, kept);
        if (g) move_row(s.value_grad, s.value_dim, i, kept);
      }
      ++kept;
    }
    s.count = kept;
  }

  static void move_row(Buffer<float>& rows, int64_t size, int64_t from, int64_t to) {
    std::memcpy(&rows[to * size], &rows[from * size], size * sizeof(float));
  }

  // The gradients of the list's i-th key are complete, as far as this slice is concerned.
  void hand_in(const Slice& slice, int64_t i, Scratch& s) const {
    const int64_t node = s.node[i], index = plan.shared(slice.b)[node];
    const float *key_grad = &s.key_grad[i * s.dim], *value_grad = &s.value_grad[i * s.value_dim];
    if (index < 0) return write_key_grads(slice.b, slice.head, node, key_grad, value_grad);
    float* share = slice.shares + index * (p.head_dim + p.value_dim);
    std::memcpy(share, key_grad, p.head_dim * sizeof(float));
    std::memcpy(share + p.head_dim, value_grad, p.value_dim * sizeof(float));
  }

  void write_key_grads(int64_t b, int64_t head, int64_t node, const float* key_grad, const float* value_grad) const {
    const int64_t row = (b * p.nodes + node) * p.kv_heads + head;
    write(key_grad, p.head_dim, p.scale, (T*)g->key_grad + row * p.head_dim);
    write(value_grad, p.value_dim, 1, (T*)g->value_grad + row * p.value_dim);
  }

  void write_nothing(const Slice& slice, int64_t node) const {
    const int64_t row = (slice.b * p.nodes + node) * p.kv_heads + slice.head;
    std::memset((void*)((T*)g->key_grad + row * p.head_dim), 0, p.head_dim * sizeof(T));
    std::memset((void*)((T*)g->value_grad + row * p.value_dim), 0, p.value_dim * sizeof(T));
  }

  static void write(const float* from, int64_t dim, float scale, T* to) {
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes) store(to + d, load(from + d) * scale);
    for (; d < dim; ++d) narrow(from[d] * scale, to + d);
  }

  static void stage(const void* tensor, const int64_t* stride, int64_t b, int64_t head, int64_t node, int64_t dim,
                    float* to) {
    const Slots<T> row{(const T*)tensor + b * stride[0] + head * stride[1] + node * stride[2]};
    stage_rows(row, 1, dim, 0, to);
  }

  // What the block's queries see of the list.
  void look(const Slice& slice, const Block& block, Scratch& s) const {
    const int rows = block.rows(), padded = block.vectors() * kLanes;
    for (int r = 0; r < rows; ++r)
      s.query_position[r] = p.positions ? p.positions[slice.b * p.positions_stride + block.first + r] : 0;
    for (int r = rows; r < padded; ++r) s.query_position[r] = 0;
    for (int64_t first = 0; first < s.count; first += kProductRows) {
      Tile tile{padded, 0, window == 0};
      for (int64_t i = first; i < smallest(s.count, first + kProductRows); ++i) {
        s.first_row[i] = int32_t(largest(0, s.node[i] - block.first));
        s.last_row[i] = int32_t(smallest(rows, s.end[i] - block.first));
        tile.first_row = int(smallest(tile.first_row, s.first_row[i]));
        tile.last_row = int(largest(tile.last_row, s.last_row[i]));
        tile.whole &= s.first_row[i] == 0 && s.last_row[i] == padded;
      }
      s.tile[first / kProductRows] = tile;
    }
    const int32_t* end = plan.ends(slice.b) + block.first;
    for (int r = 0; r < rows; ++r) {
      s.sees[r] = end[r] > block.first + r;  // itself
      for (int64_t i = 0; i < s.count && !s.sees[r]; ++i)
        s.sees[r] = r >= s.first_row[i] && r < s.last_row[i] &&
                    (window == 0 || int64_t(s.query_position[r]) - s.position[i] < window);
    }
  }

  // Rows of a head's queries, or of what has their shape. Those that see nothing are zero, and so is the padding.
  template <class Stage>
  static void load_rows(const Block& block, int64_t stride, Scratch& s, float* to, const Stage& stage) {
    for (int r = 0; r < block.vectors() * kLanes; ++r) {
      if (r < block.rows() && s.sees[r]) {
        stage(block.first + r, to + r * stride);
      } else {
        std::memset(to + r * stride, 0, stride * sizeof(float));
      }
    }
  }

  // columns[d][row] = factor * rows[row][d].
  static void transpose(const Block& block, const float* rows, int64_t stride, int64_t dim, float factor,
                        float* columns) {
    for (int r = 0; r < block.vectors() * kLanes; r += kLanes)
      for (int64_t d = 0; d < dim; ++d) {
        vfloat column;
        for (int lane = 0; lane < kLanes; ++lane) column[lane] = rows[(r + lane) * stride + d];
        store(columns + d * kBlockQueries + r, column * factor);
      }
  }

  void load_queries(const Slice& slice, int64_t q_head, const Block& block, Scratch& s) const {
    load_rows(block, s.dim, s, s.query.data(),
              [&](int64_t node, float* to) { stage(p.query, p.query_stride, slice.b, q_head, node, p.head_dim, to); });
    transpose(block, s.query.data(), s.dim, p.head_dim, factor, s.query_columns.data());
  }

  // products[key][query] = sum_d keys[key][d] * columns[d][query], where a query of a vector sees a key of a tile.
  static void multiply(const Tile* tiles, int num_tiles, const Block& block, const float* keys, int64_t stride,
                       const float* columns, int64_t dim, float* products) {
    for (int v = 0; v < block.vectors(); v += kProductVectors) {
      for (int t = 0; t < num_tiles; ++t) {
        const int first = int(largest(tiles[t].first_vector(), v));
        const int last = int(smallest(tiles[t].last_vector(), v + kProductVectors));
        if (first >= last) continue;
        product<false>(last - first, {keys + t * kProductRows * stride, stride, 1},
                       {columns + first * kLanes, kBlockQueries}, dim,
                       {products + t * kProductRows * kBlockQueries + first * kLanes, kBlockQueries});
      }
    }
  }

  // sums[query] += sum over keys of weights[key][query] * rows[key].
  static void sum_over_keys(const Tile* tiles, int num_tiles, int keys, const Block& block, const float* weights,
                            const float* rows, int64_t stride, float* sums) {
    const int vectors = int(stride / kLanes);
    for (int v = 0; v < vectors; v += kProductVectors) {
      for (int r = 0; r < block.rows(); r += kProductRows) {
        const auto seen = [&](int t) { return tiles[t].first_row < r + kProductRows && tiles[t].last_row > r; };
        for (int t = 0; t < num_tiles; ++t) {
          if (!seen(t)) continue;
          const int first = t * kProductRows;
          while (t + 1 < num_tiles && seen(t + 1)) ++t;
          const int last = int(smallest(keys, (t + 1) * kProductRows));
          product<true>(
              int(smallest(kProductVectors, vectors - v)), {weights + first * kBlockQueries + r, 1, kBlockQueries},
              {rows + first * stride + v * kLanes, stride}, last - first, {sums + r * stride + v * kLanes, stride});
        }
      }
    }
  }

  // sums[key] += sum over queries of weights[key][query] * rows[query].
  static void sum_over_queries(const Tile* tiles, int num_tiles, const float* weights, const float* rows,
                               int64_t stride, float* sums) {
    const int vectors = int(stride / kLanes);
    for (int v = 0; v < vectors; v += kProductVectors) {
      for (int t = 0; t < num_tiles; ++t) {
        const int first = tiles[t].first_row;
        product<true>(int(smallest(kProductVectors, vectors - v)),
                      {weights + t * kProductRows * kBlockQueries + first, kBlockQueries, 1},
                      {rows + first * stride + v * kLanes, stride}, tiles[t].last_row - first,
                      {sums + t * kProductRows * stride + v * kLanes, stride});
      }
    }
  }

  // Calls f(first key, keys, tiles, number of tiles) on the list, chunk by chunk.
  template <class F>
  static void for_chunks(Scratch& s, const F& f) {
    for (int64_t first = 0; first < s.count; first += kChunkKeys) {
      const int keys = int(smallest(kChunkKeys, s.count - first));
      f(first, keys, &s.tile[first / kProductRows], int(ceil_div(keys, kProductRows)));
    }
  }

  // Lanes of the v-th vector of queries that see the list's i-th key.
  vint visible(int64_t i, int v, const Scratch& s) const {
    vint row;
    for (int lane = 0; lane < kLanes; ++lane) row[lane] = v * kLanes + lane;
    vint sees = (row >= s.first_row[i]) & (row < s.last_row[i]);
    if (window > 0) sees &= distance(i, v, s) < window;
    return sees;
  }

  // From a key's position to the queries'.
  static vint distance(int64_t i, int v, const Scratch& s) {
    return (vint)(load_as<vuint>(&s.query_position[v * kLanes]) - uint32_t(s.position[i]));
  }

  // A product, which is a score in units of ln 2 as long as nothing else is asked for, becomes one.
  // With a soft-cap `damping` is its derivative.
  vfloat adjusted(vfloat score, int64_t i, int v, float slope, const Scratch& s, vfloat* damping) const {
    if (p.softcap > 0) {
      const vfloat t = tanh(score * from_log2);
      score = t * to_log2;
      *damping = splat(1.0f) - t * t;
    }
    if (p.alibi_slopes) score = fma(splat(-slope), __builtin_convertvector(distance(i, v, s), vfloat), score);
    return score;
  }

  bool adjusts() const { return p.softcap > 0 || p.alibi_slopes; }
  float slope_of(int64_t q_head) const { return p.alibi_slopes ? float(p.alibi_slopes[q_head] * kLog2E64) : 0.0f; }

  void attend(const Slice& slice, int64_t q_head, const Block& block, Scratch& s) const {
    load_queries(slice, q_head, block, s);
    for (int r = 0; r < block.vectors() * kLanes; ++r) s.top[r] = -INFINITY, s.sum[r] = 0;
    std::memset(s.out.data(), 0, kBlockQueries * s.value_dim * sizeof(float));
    const float slope = slope_of(q_head);
    for_chunks(s, [&](int64_t first, int keys, const Tile* tiles, int num_tiles) {
      multiply(tiles, num_tiles, block, &s.key[first * s.dim], s.dim, s.query_columns.data(), p.head_dim,
               s.scores.data());
      for (int v = 0; v < block.vectors(); ++v) exponentiate(first, keys, tiles, v, block, slope, s);
      sum_over_keys(tiles, num_tiles, keys, block, s.scores.data(), &s.value[first * s.value_dim], s.value_dim,
                    s.out.data());
    });
    for (int r = 0; r < block.rows(); ++r) {
      OnlineSoftmax total{s.top[r], s.sum[r]};
      float* values = &s.out[r * s.value_dim];
      if (p.sinks) merge_sink(total, values, p.sinks[q_head] * kLog2E, p.value_dim);
      const int64_t node = block.first + r;
      write(values, p.value_dim, normaliser(total),
            (T*)p.out + ((slice.b * p.nodes + node) * p.q_heads + q_head) * p.value_dim);
      p.lse[(slice.b * p.q_heads + q_head) * p.nodes + node] = log_sum_exp(total);
    }
  }

  // One vector of queries: products become 2^(score - top), zero where nothing is seen; top, sum and the values' sums
  // move to a new top, if it is so much larger that it is worth the trouble.
  void exponentiate(int64_t first_key, int keys, const Tile* tiles, int v, const Block& block, float slope,
                    Scratch& s) const {
    float* scores = &s.scores[v * kLanes];
    const auto sees = [&](const Tile& tile) { return v >= tile.first_vector() && v < tile.last_vector(); };
    vfloat best = splat(-INFINITY);
    for (int k = 0; k < keys; k += kProductRows) {
      const Tile& tile = tiles[k / kProductRows];
      if (!sees(tile)) continue;
      const int last = int(smallest(keys, k + kProductRows));
      if (tile.whole && !adjusts()) {
        for (int i = k; i < last; ++i) best = max(best, load(scores + i * kBlockQueries));
        continue;
      }
      for (int i = k; i < last; ++i) {
        vfloat unused{};
        const vfloat score = adjusted(load(scores + i * kBlockQueries), first_key + i, v, slope, s, &unused);
        const vfloat shown = select(visible(first_key + i, v, s), score, splat(-INFINITY));
        store(scores + i * kBlockQueries, shown);
        best = max(best, shown);
      }
    }
    const vfloat old = load(&s.top[v * kLanes]);
    const vfloat top = select(best > old + kSlack, best, old);
    // While a row has seen nothing its top is -inf; any finite stand-in makes 2^(-inf - top) zero.
    const vfloat base = select(top > splat(-INFINITY), top, splat(0.0f));
    const vfloat keep = exp2(old - base);
    vfloat sum = load(&s.sum[v * kLanes]) * keep;
    for (int k = 0; k < keys; k += kProductRows) {
      const int last = int(smallest(keys, k + kProductRows));
      if (!sees(tiles[k / kProductRows])) {
        for (int i = k; i < last; ++i) store(scores + i * kBlockQueries, vfloat{});
        continue;
      }
      for (int i = k; i < last; ++i) {
        const vfloat weight = exp2(load(scores + i * kBlockQueries) - base);
        sum = sum + weight;
        store(scores + i * kBlockQueries, weight);
      }
    }
    store(&s.top[v * kLanes], top);
    store(&s.sum[v * kLanes], sum);
    if (at_least(keep, splat(1.0f)) == kAllLanes) return;
    for (int lane = 0; lane < kLanes && v * kLanes + lane < block.rows(); ++lane) {
      if (keep[lane] == 1.0f) continue;
      float* out = &s.out[(v * kLanes + lane) * s.value_dim];
      for (int64_t d = 0; d < s.value_dim; d += kLanes) store(out + d, load(out + d) * keep[lane]);
    }
  }

  void differentiate(const Slice& slice, int64_t q_head, const Block& block, Scratch& s) const {
    load_queries(slice, q_head, block, s);
    load_rows(block, s.value_dim, s, s.grad.data(),
              [&](int64_t node, float* to) { stage(g->grad, g->grad_stride, slice.b, q_head, node, p.value_dim, to); });
    load_rows(block, s.value_dim, s, s.out.data(),
              [&](int64_t node, float* to) { stage(g->out, g->out_stride, slice.b, q_head, node, p.value_dim, to); });
    transpose(block, s.grad.data(), s.value_dim, p.value_dim, 1, s.grad_columns.data());
    const float* lse = g->lse + slice.b * g->lse_stride[0] + q_head * g->lse_stride[1] + block.first;
    for (int r = 0; r < block.vectors() * kLanes; ++r) {
      s.top[r] = r < block.rows() && s.sees[r] ? lse[r] * kLog2E : 0;
      vfloat sum{};
      for (int64_t d = 0; d < s.value_dim; d += kLanes)
        sum = fma(load(&s.grad[r * s.value_dim + d]), load(&s.out[r * s.value_dim + d]), sum);
      s.delta[r] = sum_of_lanes(sum);
    }
    std::memset(s.query_grad.data(), 0, kBlockQueries * s.dim * sizeof(float));
    const float slope = slope_of(q_head);
    for_chunks(s, [&](int64_t first, int keys, const Tile* tiles, int num_tiles) {
      multiply(tiles, num_tiles, block, &s.key[first * s.dim], s.dim, s.query_columns.data(), p.head_dim,
               s.scores.data());
      multiply(tiles, num_tiles, block, &s.value[first * s.value_dim], s.value_dim, s.grad_columns.data(), p.value_dim,
               s.change.data());
      for (int k = 0; k < keys; ++k)
        if (adjusts()) {
          weigh<true>(first + k, k, tiles[k / kProductRows], block, slope, s);
        } else {
          weigh<false>(first + k, k, tiles[k / kProductRows], block, slope, s);
        }
      sum_over_queries(tiles, num_tiles, s.scores.data(), s.grad.data(), s.value_dim,
                       &s.value_grad[first * s.value_dim]);
      sum_over_queries(tiles, num_tiles, s.change.data(), s.query.data(), s.dim, &s.key_grad[first * s.dim]);
      sum_over_keys(tiles, num_tiles, keys, block, s.change.data(), &s.key[first * s.dim], s.dim, s.query_grad.data());
    });
    for (int r = 0; r < block.rows(); ++r) {
      const int64_t row = (slice.b * p.nodes + block.first + r) * p.q_heads + q_head;
      write(&s.query_grad[r * s.dim], p.head_dim, p.scale, (T*)g->query_grad + row * p.head_dim);
    }
  }

  // One key: products become weights, and the weights' gradients the products'. Zero where nothing is seen.
  template <bool kAdjusts>
  void weigh(int64_t i, int k, const Tile& tile, const Block& block, float slope, Scratch& s) const {
    float *scores = &s.scores[k * kBlockQueries], *change = &s.change[k * kBlockQueries];
    for (int v = 0; v < tile.first_vector(); ++v) store(change + v * kLanes, vfloat{});
    for (int v = tile.last_vector(); v < block.vectors(); ++v) store(change + v * kLanes, vfloat{});
    for (int v = tile.first_vector(); v < tile.last_vector(); ++v) {
      vfloat damping{}, score = load(scores + v * kLanes);
      if constexpr (kAdjusts) score = adjusted(score, i, v, slope, s, &damping);
      vfloat weight = exp2(score - load(&s.top[v * kLanes]));
      vfloat moved = weight * (load(change + v * kLanes) - load(&s.delta[v * kLanes]));
      if constexpr (kAdjusts) moved = p.softcap > 0 ? moved * damping : moved;
      if (!tile.whole) {
        const vint sees = visible(i, v, s);
        weight = select(sees, weight, vfloat{});
        moved = select(sees, moved, vfloat{});
      }
      store(scores + v * kLanes, weight);
      store(change + v * kLanes, moved);
    }
  }

  const PackedTreeAttentionParams& p;
  const PackedTreeAttentionBackwardParams* const g;  // null: forward
  const PackedTreePlan plan;
  const int64_t group;
  const int32_t window;            // 0: none
  const float factor;              // from a product to a score in units of ln 2
  const float from_log2, to_log2;  // from such a score to one in units of the soft-cap, and back
};

static void packed_tree_attention(DType dtype, const PackedTreeAttentionParams& params,
                                  const PackedTreeAttentionBackwardParams* backward, const ThreadPool& pool) {
  switch (dtype) {
    case DType::kFloat32: return PackedTreeAttention<float>(params, backward).run(pool);
    case DType::kFloat16: return PackedTreeAttention<Float16>(params, backward).run(pool);
    case DType::kBFloat16: return PackedTreeAttention<BFloat16>(params, backward).run(pool);
  }
}

static void packed_tree_attention(const PackedTreeAttentionParams& params, const ThreadPool& pool) {
  packed_tree_attention(params.dtype, params, nullptr, pool);
}

static void packed_tree_attention_backward(const PackedTreeAttentionBackwardParams& params, const ThreadPool& pool) {
  packed_tree_attention(params.forward.dtype, params.forward, &params, pool);
}

}  // namespace lbr::LBR_ISA
