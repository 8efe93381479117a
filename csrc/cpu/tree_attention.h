// tree_attention on one instruction set.
//
// One pass over the cache per key head: the num_nodes * q_heads / kv_heads query rows that share a key head are packed
// along the vector lanes. A block of keys is multiplied as scores[key][row] = sum_d query[d][row] * key[d], with the
// key's element broadcast, so keys are used as they lie in memory and no sum ever runs across lanes; softmax is then
// vertical too. The second product puts the value's axis along the lanes and broadcasts the probability.
//
// A row's prefix is cut into pieces whose length depends on that row's length alone, and the pieces are merged in
// order: the result of a row depends neither on the batch around it nor on the number of threads. Slots that no query
// of the row sees are never read.
#pragma once

#include "../params.h"
#include "online_softmax.h"
#include "simd.h"
#include "support.h"

namespace lbr::LBR_ISA {

constexpr int kBlockKeys = 64;   // keys per block; their scores for one row tile stay in the L1 cache
constexpr int kTileVectors = 3;  // vectors of rows per tile: 3 * kTileKeys accumulators fit the register file
constexpr int kTileKeys = kLanes == 16 ? 8 : 4;
constexpr int kTileRows = kTileVectors * kLanes;
constexpr int64_t kMinPiece = 256;  // slots in the shortest piece of a prefix
constexpr int64_t kMaxPieces = 16;

static inline int64_t piece_length(int64_t prefix_len) {
  return round_up(largest(kMinPiece, ceil_div(prefix_len, kMaxPieces)), kBlockKeys);
}

// scores[key][row] for kTileKeys (or `keys`, the rest) keys and kVectors vectors of rows.
template <int kKeys, int kVectors>
static inline void score_tile(const float* key, int64_t key_stride, const float* query, int64_t dim, float* scores) {
  vfloat acc[kKeys][kVectors];
  for (int k = 0; k < kKeys; ++k)
    for (int v = 0; v < kVectors; ++v) acc[k][v] = vfloat{};
  for (int64_t d = 0; d < dim; ++d) {
    vfloat q[kVectors];
    for (int v = 0; v < kVectors; ++v) q[v] = load(query + d * kTileRows + v * kLanes);
    for (int k = 0; k < kKeys; ++k) {
      const vfloat x = splat(key[k * key_stride + d]);
      for (int v = 0; v < kVectors; ++v) acc[k][v] = fma(x, q[v], acc[k][v]);
    }
  }
  for (int k = 0; k < kKeys; ++k)
    for (int v = 0; v < kVectors; ++v) store(scores + k * kTileRows + v * kLanes, acc[k][v]);
}

template <int kVectors>
static void score_block(const float* key, int64_t key_stride, int keys, const float* query, int64_t dim,
                        float* scores) {
  int k = 0;
  for (; k + kTileKeys <= keys; k += kTileKeys)
    score_tile<kTileKeys, kVectors>(key + k * key_stride, key_stride, query, dim, scores + k * kTileRows);
  for (; k < keys; ++k) score_tile<1, kVectors>(key + k * key_stride, key_stride, query, dim, scores + k * kTileRows);
}

// acc[row][0 .. kVectors * kLanes) += sum over keys of probability[key][row] * value[key][..]
template <int kRows, int kVectors>
static inline void value_tile(const float* probability, const float* value, int64_t value_stride, int keys, float* acc,
                              int64_t acc_stride) {
  vfloat sum[kRows][kVectors];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) sum[r][v] = load(acc + r * acc_stride + v * kLanes);
  for (int k = 0; k < keys; ++k) {
    vfloat x[kVectors];
    for (int v = 0; v < kVectors; ++v) x[v] = load(value + k * value_stride + v * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const vfloat p = splat(probability[k * kTileRows + r]);
      for (int v = 0; v < kVectors; ++v) sum[r][v] = fma(p, x[v], sum[r][v]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) store(acc + r * acc_stride + v * kLanes, sum[r][v]);
}

constexpr int kValueRows = kLanes == 16 ? 6 : 3;
constexpr int kValueVectors = kLanes == 16 ? 4 : 3;

template <int kVectors>
static void value_columns(const float* probability, int rows, const float* value, int64_t value_stride, int keys,
                          float* acc, int64_t acc_stride) {
  int r = 0;
  for (; r + kValueRows <= rows; r += kValueRows)
    value_tile<kValueRows, kVectors>(probability + r, value, value_stride, keys, acc + r * acc_stride, acc_stride);
  for (; r < rows; ++r)
    value_tile<1, kVectors>(probability + r, value, value_stride, keys, acc + r * acc_stride, acc_stride);
}

static void value_block(const float* probability, int rows, const float* value, int64_t value_stride, int keys,
                        int64_t padded_dim, float* acc) {
  int64_t d = 0;
  for (; d + kValueVectors * kLanes <= padded_dim; d += kValueVectors * kLanes)
    value_columns<kValueVectors>(probability, rows, value + d, value_stride, keys, acc + d, padded_dim);
  for (; d < padded_dim; d += kLanes)
    value_columns<1>(probability, rows, value + d, value_stride, keys, acc + d, padded_dim);
}

// Copies `keys` slots as floats, rows padded with zeros to a whole number of vectors.
template <class T>
static void stage(const T* from, int64_t from_stride, int keys, int64_t dim, int64_t padded_dim, float* to) {
  for (int k = 0; k < keys; ++k) {
    const T* row = from + k * from_stride;
    float* out = to + k * padded_dim;
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes) store(out + d, load(row + d));
    for (; d < dim; ++d) out[d] = widen(row[d]);
    for (; d < padded_dim; ++d) out[d] = 0;
  }
}

// What one worker needs for one (row of the batch, key head), whatever its length.
class TreeAttentionScratch {
 public:
  TreeAttentionScratch(int64_t rows, int64_t dim, int64_t value_dim)
      : tiles(ceil_div(rows, kTileRows)),
        padded_dim(round_up(dim, kLanes)),
        padded_value_dim(round_up(value_dim, kLanes)) {
    const int64_t sizes[] = {tiles * dim * kTileRows, kBlockKeys * padded_dim, kBlockKeys * padded_value_dim,
                             kBlockKeys * kTileRows,  tiles * kTileRows,       tiles * kTileRows,
                             tiles * kTileRows,       tiles * kTileRows,       rows * padded_value_dim};
    float** parts[] = {&query, &key, &value, &scores, &max, &sum, &position, &slope, &acc};
    int64_t total = 0;
    for (int64_t size : sizes) total += round_up(size, kCacheLineFloats);
    buffer_.resize(total);
    float* next = buffer_.data();
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; ++i) {
      *parts[i] = next;
      next += round_up(sizes[i], kCacheLineFloats);
    }
  }

  const int64_t tiles, padded_dim, padded_value_dim;
  float* query;     // [tiles][dim][kTileRows], scaled
  float* key;       // [kBlockKeys][padded_dim], where keys are not fp32
  float* value;     // [kBlockKeys][padded_value_dim]
  float* scores;    // [kBlockKeys][kTileRows]
  float* max;       // [tiles * kTileRows]
  float* sum;       // [tiles * kTileRows]
  float* position;  // [tiles * kTileRows] the query's position
  float* slope;     // [tiles * kTileRows] ALiBi
  float* acc;       // [rows][padded_value_dim]

 private:
  static constexpr int64_t kCacheLineFloats = 16;
  Buffer<float> buffer_;
};

template <class T>
class TreeAttention {
 public:
  explicit TreeAttention(const TreeAttentionParams& params) : p(params), group(params.q_heads / params.kv_heads) {}

  void run(const ThreadPool& pool) const {
    // One task per piece of prefix (the tree goes with the last piece) of each row and key head.
    Buffer<int64_t> first_task(p.batch + 1);
    first_task[0] = 0;
    for (int64_t b = 0; b < p.batch; ++b) first_task[b + 1] = first_task[b] + p.kv_heads * num_pieces(b);
    const int64_t tasks = first_task[p.batch];
    const int64_t state_size = max_rows() * (p.value_dim + 2);
    Buffer<float> states(tasks * state_size);

    pool.parallel_for(tasks, 1, [&](int64_t begin, int64_t end) {
      TreeAttentionScratch scratch(max_rows(), p.head_dim, p.value_dim);
      int64_t b = 0;
      for (int64_t task = begin; task < end; ++task) {
        while (task >= first_task[b + 1]) ++b;
        const int64_t local = task - first_task[b], pieces = num_pieces(b);
        attend_piece(b, local / pieces, local % pieces, scratch, &states[task * state_size]);
      }
    });
    pool.parallel_for(p.batch * p.kv_heads, 8, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / p.kv_heads, head = i % p.kv_heads, pieces = num_pieces(b);
        finish(b, head, &states[(first_task[b] + head * pieces) * state_size], pieces, state_size);
      }
    });
  }

 private:
  int64_t max_rows() const { return p.num_queries * group; }
  int64_t num_rows(int64_t b) const { return (p.num_nodes ? p.num_nodes[b] : p.num_queries) * group; }
  int64_t num_pieces(int64_t b) const {
    const int64_t len = p.prefix_lens[b];
    return largest(1, ceil_div(len, piece_length(len)));
  }
  int64_t first_query_node() const { return p.tree_nodes - p.num_queries; }
  const int64_t* mask(int64_t b, int64_t node) const {
    return p.ancestors + b * p.ancestors_stride[0] + node * p.ancestors_stride[1];
  }
  static bool bit(const int64_t* words, int64_t i) { return (uint64_t(words[i / 64]) >> (i % 64)) & 1; }

  // Depth of a node, 1 for a child of the prefix.
  int64_t depth(int64_t b, int64_t node) const {
    if (p.depths) return p.depths[b * p.depths_stride + node];
    int64_t count = 0;
    for (int64_t word = 0; word < p.words; ++word) {
      const int64_t bits = smallest(64, p.tree_nodes - 64 * word);
      count += __builtin_popcountll(uint64_t(mask(b, node)[word]) << (64 - bits));
    }
    return count;
  }

  // Row r of a packed tile is query r / group, head r % group of the key head's group.
  void attend_piece(int64_t b, int64_t head, int64_t piece, TreeAttentionScratch& s, float* state) const {
    const int64_t rows = num_rows(b), prefix = p.prefix_lens[b], length = piece_length(prefix);
    const bool last = piece == num_pieces(b) - 1;
    load_queries(b, head, rows, s);
    int64_t begin = piece * length;
    const int64_t end = smallest(prefix, begin + length);
    if (p.window > 0) {
      // Nothing before the earliest window is read.
      int64_t earliest = prefix + p.tree_nodes;
      for (int64_t r = 0; r < rows; ++r) earliest = smallest(earliest, int64_t(s.position[r]));
      const int64_t first = earliest - p.window + 1;
      begin = largest(begin, smallest(first, end));
    }
    for (int64_t slot = begin; slot < end; slot += kBlockKeys)
      prefix_block(b, head, slot, int(smallest(kBlockKeys, end - slot)), rows, s);
    if (last) tree_blocks(b, head, rows, s);

    // Layout of a state: per row its max, then its sum, then its values.
    for (int64_t r = 0; r < rows; ++r) {
      state[r] = s.max[r];
      state[max_rows() + r] = s.sum[r];
      std::memcpy(state + 2 * max_rows() + r * p.value_dim, s.acc + r * s.padded_value_dim,
                  p.value_dim * sizeof(float));
    }
  }

  void load_queries(int64_t b, int64_t head, int64_t rows, TreeAttentionScratch& s) const {
    const int64_t padded_rows = s.tiles * kTileRows;
    for (int64_t r = 0; r < padded_rows; ++r) {
      s.max[r] = -INFINITY;
      s.sum[r] = 0;
      s.position[r] = 0;
      s.slope[r] = 0;
      float* column = s.query + (r / kTileRows * p.head_dim) * kTileRows + r % kTileRows;
      if (r >= rows) {
        for (int64_t d = 0; d < p.head_dim; ++d) column[d * kTileRows] = 0;
        continue;
      }
      const int64_t n = r / group, q_head = head * group + r % group;
      const T* query = (const T*)p.query + b * p.query_stride[0] + q_head * p.query_stride[1] + n * p.query_stride[2];
      for (int64_t d = 0; d < p.head_dim; ++d) column[d * kTileRows] = widen(query[d]) * p.scale;
      if (p.window > 0 || p.alibi_slopes) s.position[r] = position_of(b, first_query_node() + n);
      if (p.alibi_slopes) s.slope[r] = p.alibi_slopes[q_head];
    }
    std::memset(s.acc, 0, rows * s.padded_value_dim * sizeof(float));
  }

  float position_of(int64_t b, int64_t node) const { return float(p.prefix_lens[b] + depth(b, node) - 1); }

  const T* slot_of(const void* cache, const int64_t* stride, int64_t b, int64_t head, int64_t slot) const {
    return (const T*)cache + b * stride[0] + head * stride[1] + slot * stride[2];
  }

  void prefix_block(int64_t b, int64_t head, int64_t slot, int keys, int64_t rows, TreeAttentionScratch& s) const {
    const T* key = slot_of(p.keys, p.keys_stride, b, head, slot);
    const T* value = slot_of(p.values, p.values_stride, b, head, slot);
    const float* key_floats = s.key;
    int64_t key_stride = s.padded_dim;
    if constexpr (sizeof(T) == sizeof(float)) {
      key_floats = (const float*)key;
      key_stride = p.keys_stride[2];
    } else {
      stage(key, p.keys_stride[2], keys, p.head_dim, s.padded_dim, s.key);
    }
    const float* value_floats = s.value;
    int64_t value_stride = s.padded_value_dim;
    if (sizeof(T) == sizeof(float) && s.padded_value_dim == p.value_dim) {
      value_floats = (const float*)value;
      value_stride = p.values_stride[2];
    } else {
      stage(value, p.values_stride[2], keys, p.value_dim, s.padded_value_dim, s.value);
    }
    float key_positions[kBlockKeys];
    for (int k = 0; k < keys; ++k) key_positions[k] = float(slot + k);
    block(key_floats, key_stride, value_floats, value_stride, keys, key_positions, rows, s, nullptr);
  }

  // The tree's slots, gathered: only those that some query of this row sees.
  void tree_blocks(int64_t b, int64_t head, int64_t rows, TreeAttentionScratch& s) const {
    int64_t nodes[kBlockKeys];
    float positions[kBlockKeys];
    int keys = 0;
    const auto flush = [&] {
      const Visible visible{this, b, nodes};
      if (keys > 0) block(s.key, s.padded_dim, s.value, s.padded_value_dim, keys, positions, rows, s, &visible);
      keys = 0;
    };
    for (int64_t j = 0; j < p.tree_nodes; ++j) {
      bool seen = false;
      for (int64_t n = 0; n < rows / group && !seen; ++n) seen = bit(mask(b, first_query_node() + n), j);
      if (!seen) continue;
      const int64_t slot = p.prefix_lens[b] + j;
      stage(slot_of(p.keys, p.keys_stride, b, head, slot), 0, 1, p.head_dim, s.padded_dim, s.key + keys * s.padded_dim);
      stage(slot_of(p.values, p.values_stride, b, head, slot), 0, 1, p.value_dim, s.padded_value_dim,
            s.value + keys * s.padded_value_dim);
      nodes[keys] = j;
      positions[keys] = p.window > 0 || p.alibi_slopes ? position_of(b, j) : 0;
      if (++keys == kBlockKeys) flush();
    }
    flush();
  }

  // Which queries see which nodes of a gathered block.
  struct Visible {
    const TreeAttention* attention;
    int64_t b;
    const int64_t* nodes;
    bool operator()(int key, int64_t row) const {
      const int64_t query_node = attention->first_query_node() + row / attention->group;
      return bit(attention->mask(b, query_node), nodes[key]);
    }
  };

  void block(const float* key, int64_t key_stride, const float* value, int64_t value_stride, int keys,
             const float* key_positions, int64_t rows, TreeAttentionScratch& s, const Visible* visible) const {
    for (int64_t tile = 0; tile * kTileRows < rows; ++tile) {
      const int64_t first = tile * kTileRows;
      const int tile_rows = int(smallest(kTileRows, rows - first));
      const int vectors = int(ceil_div(tile_rows, kLanes));
      const float* query = s.query + tile * p.head_dim * kTileRows;
      if (vectors == 1) {
        score_block<1>(key, key_stride, keys, query, p.head_dim, s.scores);
      } else if (vectors == 2) {
        score_block<2>(key, key_stride, keys, query, p.head_dim, s.scores);
      } else {
        score_block<3>(key, key_stride, keys, query, p.head_dim, s.scores);
      }
      for (int v = 0; v < vectors; ++v) {
        adjust_scores(v, first, tile_rows, keys, key_positions, s, visible);
        exponentiate(v, first, tile_rows, keys, s);
      }
      value_block(s.scores, tile_rows, value, value_stride, keys, s.padded_value_dim,
                  s.acc + first * s.padded_value_dim);
    }
  }

  // Soft-cap, ALiBi, window and tree mask, in the order in which models apply them.
  void adjust_scores(int v, int64_t first, int tile_rows, int keys, const float* key_positions, TreeAttentionScratch& s,
                     const Visible* visible) const {
    if (p.softcap == 0 && p.window == 0 && !p.alibi_slopes && !visible) return;
    const int lane0 = v * kLanes;
    const vfloat position = load(s.position + first + lane0), slope = load(s.slope + first + lane0);
    const vfloat nothing = splat(-INFINITY);
    for (int k = 0; k < keys; ++k) {
      float* at = s.scores + k * kTileRows + lane0;
      vfloat score = load(at);
      if (p.softcap > 0) score = tanh(score / p.softcap) * p.softcap;
      if (p.alibi_slopes) score = fma(slope, splat(key_positions[k]) - position, score);
      if (p.window > 0) score = select(position - key_positions[k] < splat(float(p.window)), score, nothing);
      if (visible) {
        for (int lane = 0; lane < kLanes; ++lane)
          if (lane0 + lane >= tile_rows || !(*visible)(k, first + lane0 + lane)) score[lane] = -INFINITY;
      }
      store(at, score);
    }
  }

  // Scores become exp(score - max); max, sum and the values' sums move to the new max.
  void exponentiate(int v, int64_t first, int tile_rows, int keys, TreeAttentionScratch& s) const {
    float* scores = s.scores + v * kLanes;
    const int64_t row0 = first + v * kLanes;
    const vfloat old_max = load(s.max + row0);
    vfloat top = old_max;
    for (int k = 0; k < keys; ++k) top = max(top, load(scores + k * kTileRows));
    // While a row has seen nothing its max is -inf; any finite stand-in makes exp(-inf - top) zero.
    const vfloat base = select(top > splat(-INFINITY), top, splat(0.0f));
    const vfloat keep = exp(old_max - base);
    vfloat sum = load(s.sum + row0) * keep;
    for (int k = 0; k < keys; ++k) {
      const vfloat probability = exp(load(scores + k * kTileRows) - base);
      sum = sum + probability;
      store(scores + k * kTileRows, probability);
    }
    store(s.max + row0, top);
    store(s.sum + row0, sum);
    for (int lane = 0; lane < kLanes && v * kLanes + lane < tile_rows; ++lane) {
      if (keep[lane] == 1.0f) continue;
      float* acc = s.acc + (row0 + lane) * s.padded_value_dim;
      const vfloat factor = splat(keep[lane]);
      for (int64_t d = 0; d < s.padded_value_dim; d += kLanes) store(acc + d, load(acc + d) * factor);
    }
  }

  // Merges the pieces of one (row, key head) in order and writes the result.
  void finish(int64_t b, int64_t head, float* states, int64_t pieces, int64_t state_size) const {
    const int64_t rows = num_rows(b);
    for (int64_t r = 0; r < max_rows(); ++r) {
      const int64_t n = r / group, q_head = head * group + r % group;
      T* out = (T*)p.out + ((b * p.q_heads + q_head) * p.num_queries + n) * p.value_dim;
      float* lse = p.lse + (b * p.q_heads + q_head) * p.num_queries + n;
      if (r >= rows) {
        std::memset((void*)out, 0, p.value_dim * sizeof(T));
        *lse = -INFINITY;
        continue;
      }
      const auto at = [&](int64_t piece) {
        const float* state = states + piece * state_size;
        return OnlineSoftmax{state[r], state[max_rows() + r]};
      };
      OnlineSoftmax total = at(0);
      float* values = states + 2 * max_rows() + r * p.value_dim;
      for (int64_t piece = 1; piece < pieces; ++piece)
        merge(total, values, at(piece), values + piece * state_size, p.value_dim);
      if (p.sinks) merge_sink(total, values, p.sinks[q_head], p.value_dim);
      const float factor = normaliser(total);
      for (int64_t d = 0; d < p.value_dim; ++d) narrow(values[d] * factor, out + d);
      *lse = log_sum_exp(total);
    }
  }

  const TreeAttentionParams& p;
  const int64_t group;
};

static void tree_attention(const TreeAttentionParams& params, const ThreadPool& pool) {
  switch (params.dtype) {
    case DType::kFloat32: return TreeAttention<float>(params).run(pool);
    case DType::kFloat16: return TreeAttention<Float16>(params).run(pool);
    case DType::kBFloat16: return TreeAttention<BFloat16>(params).run(pool);
  }
}

}  // namespace lbr::LBR_ISA
