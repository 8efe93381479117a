// tree_attention on one instruction set.
//
// One pass over the cache per key head: the num_nodes * q_heads / kv_heads query rows that share a key head are packed
// into the tiles of attention_tiles.h, and softmax runs down the keys of a block with the rows along the lanes.
//
// A row's prefix is cut into pieces whose length depends on that row's length alone, and the pieces are merged in
// order: the result of a row depends neither on the batch around it nor on the number of threads. Slots that no query
// of the row sees are never read.
#pragma once

#include "../params.h"
#include "attention_tiles.h"
#include "online_softmax.h"
#include "simd.h"
#include "support.h"

namespace lbr::LBR_ISA {

constexpr int64_t kMinPiece = 256;  // slots in the shortest piece of a prefix
constexpr int64_t kMaxPieces = 8;
constexpr int64_t kPieceStep = 128;  // pieces are whole blocks for every type

static inline int64_t piece_length(int64_t prefix_len) {
  return round_up(largest(kMinPiece, ceil_div(prefix_len, kMaxPieces)), kPieceStep);
}

// What one worker needs for one (row of the batch, key head), whatever its length.
template <class Element>
class TreeAttentionScratch {
 public:
  static constexpr int kPack = Dot<Element>::kPack;
  // Keys per block; their scores for one row tile stay in the L1 cache, and sums are loaded and stored once a block.
  static constexpr int kBlockKeys = 64 * kPack;

  TreeAttentionScratch(int64_t rows, int64_t dim, int64_t value_dim)
      : tiles(ceil_div(rows, kTileRows)),
        steps(ceil_div(dim, kPack)),
        padded_dim(round_up(dim, kLanes * kPack)),
        padded_value_dim(round_up(value_dim, kLanes)),
        query(tiles * steps * kTileRows * kPack),
        key(kBlockKeys * padded_dim),
        value(kBlockKeys * padded_value_dim),
        scores(kBlockKeys * kTileRows),
        top(tiles * kTileRows),
        sum(tiles * kTileRows),
        position(tiles * kTileRows),
        slope(tiles * kTileRows),
        acc(rows * padded_value_dim) {}

  const int64_t tiles, steps, padded_dim, padded_value_dim;
  Buffer<Element> query;          // [tiles][steps][kTileRows][kPack]
  Buffer<Element> key;            // [kBlockKeys][padded_dim], where keys cannot be used as they lie
  Buffer<Element> value;          // [kBlockKeys / kPack][padded_value_dim][kPack]
  Buffer<float> scores;           // [kBlockKeys][kTileRows], then probabilities [kBlockKeys / kPack][kTileRows][kPack]
  Buffer<float> top, sum;         // [tiles * kTileRows] the state of every row
  Buffer<float> position, slope;  // [tiles * kTileRows] of the query; ALiBi's
  Buffer<float> acc;              // [rows][padded_value_dim]
  int64_t row = -1, head = -1;    // whose queries are loaded
};

template <class T>
class TreeAttention {
  using Element = typename Dot<T>::Element;
  using Scratch = TreeAttentionScratch<Element>;
  static constexpr int kPack = Scratch::kPack, kBlockKeys = Scratch::kBlockKeys;

 public:
  explicit TreeAttention(const TreeAttentionParams& params)
      : p(params), group(params.q_heads / params.kv_heads), scale(fabsf(params.scale)) {}

  void run(const ThreadPool& pool) const {
    // One task per piece of prefix (the tree goes with the last piece) of each row and key head.
    Buffer<int64_t> first_task(p.batch + 1);
    first_task[0] = 0;
    for (int64_t b = 0; b < p.batch; ++b) first_task[b + 1] = first_task[b] + p.kv_heads * num_pieces(b);
    const int64_t tasks = first_task[p.batch];
    const int64_t state_size = max_rows() * (p.value_dim + 2);
    Buffer<float> states(tasks * state_size);

    pool.parallel_for(tasks, 1, [&](int64_t begin, int64_t end) {
      Scratch scratch(max_rows(), p.head_dim, p.value_dim);
      const auto at = [&](int64_t task, int64_t b) {
        while (task >= first_task[b + 1]) ++b;
        const int64_t local = task - first_task[b], pieces = num_pieces(b);
        return Piece{b, local / pieces, local % pieces};
      };
      Piece piece = at(begin, 0);
      for (int64_t task = begin; task < end; ++task) {
        const Piece next = task + 1 < end ? at(task + 1, piece.row) : Piece{-1};
        attend_piece(piece, next, scratch, &states[task * state_size]);
        piece = next;
      }
    });
    constexpr int64_t kWork = 1 << 14;  // multiplications that are worth another worker
    pool.parallel_for(p.batch * p.kv_heads * max_rows(), largest(1, kWork / largest(1, p.value_dim)),
                      [&](int64_t begin, int64_t end) {
                        for (int64_t i = begin; i < end; ++i) {
                          const int64_t b = i / max_rows() / p.kv_heads, head = i / max_rows() % p.kv_heads;
                          const int64_t first = first_task[b] + head * num_pieces(b);
                          finish(b, head, i % max_rows(), &states[first * state_size], state_size);
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

  // A piece of one row's prefix, for one key head.
  struct Piece {
    int64_t row, head = 0, index = 0;
  };

  // The keys and values that are attended to together.
  struct Block {
    Slots<T> keys, values;
    int count = 0;
  };

  // Row r of a packed tile is query r / group, head r % group of the key head's group. `next` is what this worker
  // attends to afterwards, if any.
  void attend_piece(Piece piece, Piece next, Scratch& s, float* state) const {
    const int64_t b = piece.row, head = piece.head;
    const int64_t rows = num_rows(b), prefix = p.prefix_lens[b], length = piece_length(prefix);
    const bool last = piece.index == num_pieces(b) - 1;
    if (s.row != b || s.head != head) load_queries(b, head, rows, s);
    clear(rows, s);
    int64_t begin = piece.index * length;
    const int64_t end = smallest(prefix, begin + length);
    if (p.window > 0) {
      // Nothing before the earliest window is read.
      int64_t earliest = prefix + p.tree_nodes;
      for (int64_t r = 0; r < rows; ++r) earliest = smallest(earliest, int64_t(s.position[r]));
      const int64_t first = earliest - p.window + 1;
      begin = largest(begin, smallest(first, end));
    }
    for (int64_t slot = begin; slot < end; slot += kBlockKeys) {
      const Block here = prefix_block(piece, slot, end);
      const Block ahead = slot + kBlockKeys < end ? prefix_block(piece, slot + kBlockKeys, end) : first_block(next);
      float positions[kBlockKeys];
      for (int k = 0; k < here.count && uses_positions(); ++k) positions[k] = float(slot + k);
      attend(here, positions, rows, s, ahead, nullptr);
    }
    if (last) tree_blocks(b, head, rows, s);

    // Layout of a state: per row its top, then its sum, then its values.
    for (int64_t r = 0; r < rows; ++r) {
      state[r] = s.top[r];
      state[max_rows() + r] = s.sum[r];
      std::memcpy(state + 2 * max_rows() + r * p.value_dim, &s.acc[r * s.padded_value_dim],
                  p.value_dim * sizeof(float));
    }
  }

  void load_queries(int64_t b, int64_t head, int64_t rows, Scratch& s) const {
    s.row = b, s.head = head;
    for (int64_t r = 0; r < s.tiles * kTileRows; ++r) {
      s.position[r] = 0;
      s.slope[r] = 0;
      const auto column = [&](int64_t d) -> Element& {
        return s.query[((r / kTileRows * s.steps + d / kPack) * kTileRows + r % kTileRows) * kPack + d % kPack];
      };
      for (int64_t d = r < rows ? p.head_dim : 0; d < s.steps * kPack; ++d) column(d) = Element{};
      if (r >= rows) continue;
      const int64_t n = r / group, q_head = head * group + r % group;
      const T* query = (const T*)p.query + b * p.query_stride[0] + q_head * p.query_stride[1] + n * p.query_stride[2];
      // The scale's sign goes into the query, so that the largest product stays the largest score.
      for (int64_t d = 0; d < p.head_dim; ++d) column(d) = signed_element(query[d]);
      if (uses_positions()) s.position[r] = position_of(b, first_query_node() + n);
      if (p.alibi_slopes) s.slope[r] = p.alibi_slopes[q_head];
    }
  }

  Element signed_element(T x) const {
    const float value = p.scale < 0 ? -widen(x) : widen(x);
    Element element;
    narrow(value, &element);
    return element;
  }

  static void clear(int64_t rows, Scratch& s) {
    for (int64_t r = 0; r < s.tiles * kTileRows; ++r) {
      s.top[r] = -INFINITY;
      s.sum[r] = 0;
    }
    std::memset(s.acc.data(), 0, rows * s.padded_value_dim * sizeof(float));
  }

  bool uses_positions() const { return p.window > 0 || p.alibi_slopes; }
  float position_of(int64_t b, int64_t node) const { return float(p.prefix_lens[b] + depth(b, node) - 1); }

  // The slots of one head from `slot` on.
  static Slots<T> slots_of(const void* cache, const int64_t* stride, int64_t b, int64_t head, int64_t slot) {
    return {(const T*)cache + b * stride[0] + head * stride[1] + slot * stride[2], stride[2]};
  }

  // The block that begins at `slot`, up to `end`.
  Block prefix_block(Piece piece, int64_t slot, int64_t end) const {
    return {slots_of(p.keys, p.keys_stride, piece.row, piece.head, slot),
            slots_of(p.values, p.values_stride, piece.row, piece.head, slot), int(smallest(kBlockKeys, end - slot))};
  }

  // What a piece begins with; nothing if there is none, or if a window may exclude it.
  Block first_block(Piece piece) const {
    if (piece.row < 0 || p.window > 0) return {};
    const int64_t prefix = p.prefix_lens[piece.row];
    return prefix_block(piece, piece.index * piece_length(prefix), prefix);
  }

  // The tree's slots, gathered: only those that some query of this row sees.
  void tree_blocks(int64_t b, int64_t head, int64_t rows, Scratch& s) const {
    int64_t nodes[kBlockKeys];
    float positions[kBlockKeys];
    int count = 0;
    const auto flush = [&] {
      const Visible visible{this, b, nodes};
      Block block = prefix_block({b, head}, p.prefix_lens[b], p.prefix_lens[b] + count);
      block.keys.index = block.values.index = nodes;
      if (count > 0) attend(block, positions, rows, s, {}, &visible);
      count = 0;
    };
    for (int64_t j = 0; j < p.tree_nodes; ++j) {
      bool seen = false;
      for (int64_t n = 0; n < rows / group && !seen; ++n) seen = bit(mask(b, first_query_node() + n), j);
      if (!seen) continue;
      nodes[count] = j;
      if (uses_positions()) positions[count] = position_of(b, j);
      if (++count == kBlockKeys) flush();
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

  // All rows attend to one block, while the next one is fetched.
  void attend(const Block& block, const float* key_positions, int64_t rows, Scratch& s, const Block& next,
              const Visible* visible) const {
    const auto& [keys, values, count] = block;
    const int steps = int(ceil_div(count, kPack));
    const Element* key = s.key.data();
    int64_t key_stride = s.padded_dim;
    if (sizeof(T) == sizeof(Element) && !keys.index && p.head_dim % kPack == 0) {
      key = (const Element*)keys.first;
      key_stride = keys.stride;
    } else {
      stage_rows(keys, count, p.head_dim, s.padded_dim, s.key.data());
    }
    const Element* value = s.value.data();
    int64_t value_stride = s.padded_value_dim * kPack;
    const bool stage = sizeof(T) != sizeof(float) || values.index || s.padded_value_dim != p.value_dim;
    if (!stage) {
      value = (const Element*)values.first;
      value_stride = values.stride;
    }
    for (int64_t first = 0; first < rows; first += kTileRows) {
      const int tile_rows = int(smallest(kTileRows, rows - first));
      const TileShape shape(tile_rows);
      const Element* query = &s.query[first * s.steps * kPack];
      // Values come closer while scores are computed, and the next block's keys while values are summed up.
      // Once for all tiles: values come closer while scores are computed, the next keys while values are summed up.
      Ahead values_ahead, keys_ahead;
      if (first == 0 && !values.index) values_ahead = {(const char*)values.first, values.stride * int64_t(sizeof(T))};
      if (first == 0 && next.count >= count)
        keys_ahead = {(const char*)next.keys.first, next.keys.stride * int64_t(sizeof(T)) * kPack};
      score_block(shape, key, key_stride, count, query, s.steps, s.scores.data(), values_ahead);
      if (first == 0 && stage) stage_values(values, count, p.value_dim, s.padded_value_dim, s.value.data());
      for (int v = 0; v < shape.vectors; ++v) {
        const bool adjusted = p.softcap > 0 || uses_positions() || visible;
        const float factor = (adjusted ? 1.0f : scale) * kLog2E;
        if (adjusted) adjust_scores(v, first, tile_rows, count, key_positions, s, visible);
#if defined(LBR_AVX512)
        if (shape.half && v == shape.vectors - 1) {
          exponentiate<HalfLanes<Element>>(v, first, tile_rows, count, factor, s);
          break;
        }
#endif
        exponentiate<WholeLanes<Element>>(v, first, tile_rows, count, factor, s);
      }
      value_block((const Element*)s.scores.data(), tile_rows, value, value_stride, steps, s.padded_value_dim,
                  &s.acc[first * s.padded_value_dim], keys_ahead);
    }
  }

  // Products become scores: scale, soft-cap, ALiBi, window and tree mask, in the order in which models apply them.
  void adjust_scores(int v, int64_t first, int tile_rows, int keys, const float* key_positions, Scratch& s,
                     const Visible* visible) const {
    const int lane0 = v * kLanes;
    const vfloat position = load(&s.position[first + lane0]), slope = load(&s.slope[first + lane0]);
    const vfloat nothing = splat(-INFINITY);
    for (int k = 0; k < keys; ++k) {
      float* at = &s.scores[k * kTileRows + lane0];
      vfloat score = load(at) * scale;
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

  // Scores (in units of ln 2 `factor` times what is stored) become 2^(score - top); top, sum and the values' sums move
  // to the new top, if that is so much larger that it is worth the trouble.
  template <class Lanes>
  void exponentiate(int v, int64_t first, int tile_rows, int keys, float factor, Scratch& s) const {
    float* scores = &s.scores[v * kLanes];
    const int64_t row0 = first + v * kLanes;
    const vfloat old_max = load(&s.top[row0]), scaling = splat(factor);
    const vfloat largest = Lanes::over_keys(largest_score<Lanes>(scores, keys), max) * scaling;
    const vfloat top = select(largest > old_max + kSlack, largest, old_max);
    // While a row has seen nothing its top is -inf; any finite stand-in makes 2^(-inf - top) zero.
    const vfloat base = select(top > splat(-INFINITY), top, splat(0.0f));
    const vfloat keep = exp2(old_max - base);
    vfloat sum = Lanes::first_of(load(&s.sum[row0]) * keep);
    const auto probability = [&](int k) LBR_INLINE {
      const vfloat p = Lanes::counted(exp2(fma(Lanes::scores(scores, k, keys), scaling, -base)), k, keys);
      sum = sum + p;
      return p;
    };
    Lanes::store_probabilities(scores, keys, probability);
    store(&s.top[row0], top);
    store(&s.sum[row0], Lanes::over_keys(sum, add));
    if (at_least(keep, splat(1.0f)) == kAllLanes) return;
    for (int lane = 0; lane < kLanes && v * kLanes + lane < tile_rows; ++lane) {
      if (keep[lane] == 1.0f) continue;
      float* acc = &s.acc[(row0 + lane) * s.padded_value_dim];
      const vfloat rescale = splat(keep[lane]);
      for (int64_t d = 0; d < s.padded_value_dim; d += kLanes) store(acc + d, load(acc + d) * rescale);
    }
  }

  static vfloat add(vfloat a, vfloat b) { return a + b; }

  // In four chains, which hide each other's latency. A NaN may get lost here: it makes the sum NaN.
  template <class Lanes>
  static vfloat largest_score(const float* scores, int keys) {
    vfloat top[4];
    unroll<4>([&](auto i) LBR_INLINE { top[i] = splat(-INFINITY); });
    int k = 0;
    for (; k + 4 * Lanes::kKeys <= keys; k += 4 * Lanes::kKeys)
      unroll<4>([&](auto i) LBR_INLINE { top[i] = max(top[i], Lanes::scores(scores, k + i * Lanes::kKeys, keys)); });
    for (; k < keys; k += Lanes::kKeys) top[0] = max(top[0], Lanes::scores(scores, k, keys));
    return max(max(top[0], top[1]), max(top[2], top[3]));
  }

  // Merges the pieces of one query row in order and writes the result.
  void finish(int64_t b, int64_t head, int64_t r, float* states, int64_t state_size) const {
    const int64_t n = r / group, q_head = head * group + r % group;
    T* out = (T*)p.out + ((b * p.q_heads + q_head) * p.num_queries + n) * p.value_dim;
    float* lse = p.lse + (b * p.q_heads + q_head) * p.num_queries + n;
    if (r >= num_rows(b)) {
      std::memset((void*)out, 0, p.value_dim * sizeof(T));
      *lse = -INFINITY;
      return;
    }
    const auto at = [&](int64_t piece) {
      const float* state = states + piece * state_size;
      return OnlineSoftmax{state[r], state[max_rows() + r]};
    };
    OnlineSoftmax total = at(0);
    float* values = states + 2 * max_rows() + r * p.value_dim;
    for (int64_t piece = 1; piece < num_pieces(b); ++piece)
      merge(total, values, at(piece), values + piece * state_size, p.value_dim);
    if (p.sinks) merge_sink(total, values, p.sinks[q_head] * kLog2E, p.value_dim);
    const float factor = normaliser(total);
    for (int64_t d = 0; d < p.value_dim; ++d) narrow(values[d] * factor, out + d);
    *lse = log_sum_exp(total);
  }

  const TreeAttentionParams& p;
  const int64_t group;
  const float scale;  // without its sign
};

static void tree_attention(const TreeAttentionParams& params, const ThreadPool& pool) {
  switch (params.dtype) {
    case DType::kFloat32: return TreeAttention<float>(params).run(pool);
    case DType::kFloat16: return TreeAttention<Float16>(params).run(pool);
    case DType::kBFloat16: return TreeAttention<BFloat16>(params).run(pool);
  }
}

}  // namespace lbr::LBR_ISA
