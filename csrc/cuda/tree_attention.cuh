// The kernel of tree_attention: one pass over a key head's slots for all query rows that share it.
//
// A row is a query node and one of the query heads that read this key head, so that any ratio of heads fills the same
// matrix tile. A block of threads takes up to TileShape::rows rows of one sequence and one key head, and a part of the
// slots that they see; the parts' results are merged by the last blocks to arrive, in the order of the parts, whoever
// they are. Lengths, masks and counts are read here and nowhere on the host: a captured launch stays right when they
// change.
//
// Keys and values come in tiles of TileShape::keys slots, copied asynchronously, `stages` - 1 tiles ahead of the one
// that is computed. Most tiles lie inside the prefix, where every row sees every slot. The others, which hold the tree,
// end the sequence, or are cut by a window, are "masked": before they are loaded, one word per row is made that says
// which of the tile's slots the row sees. Slots that no row sees are not read; zeros stand for them, so that nothing
// they may hold (NaN, say) can meet a probability of zero.
#pragma once

#include "online_softmax.cuh"
#include "tree_attention.h"

namespace lbr::gpu {

// 16 bytes of output.
struct alignas(16) Chunk {
  uint32_t words[4];
};

// kExact: keys and values fill all kHead columns, which lets the compiler overlap the steps of a product.
template <class T, int kHead, int kRows, bool kExact>
class TreeAttentionBlock {
 public:
  static constexpr TileShape kTile = tile_shape(kHead, kRows);

  LBR_DEVICE explicit TreeAttentionBlock(const TreeAttentionLaunch& launch)
      : launch_(launch), p_(launch.params), memory_(shared_memory()) {
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) top_[m][0] = top_[m][1] = -kInfinity;
  }

  LBR_DEVICE void run() {
    locate();
    const int length = p_.prefix_lens[batch_];
    const int nodes = p_.num_nodes ? p_.num_nodes[batch_] : int(p_.num_queries);
    const bool bad_length = length < 0 || length > p_.slots - p_.tree_nodes;
    if (bad_length || nodes < 0 || nodes > p_.num_queries) {
      if (split_ > 0) return;
      if (thread_index() == 0) atomic_or(launch_.workspace.flags, bad_length ? kBadLength : kBadCount);
      return fill(0, __builtin_nanf(""));
    }
    length_ = length;
    rows_ = min(launch_.tile_rows, nodes * group_ - first_row_);
    if (split_ == 0) fill(max(rows_, 0), 0.0f);
    if (rows_ <= 0) return;
    if (!choose_tiles()) return;

    load_query();
    constexpr int kAhead = kTile.stages - 1;
    for (int ahead = 0; ahead < kAhead; ++ahead) {
      if (ahead < tiles_) load(ahead, ahead);
      copy_async_commit();
    }
    for (int tile = 0, stage = 0; tile < tiles_; ++tile) {
      copy_async_wait<kAhead - 1>();
      block_barrier();  // this tile has arrived for all, and all have done with the one before
      if (tile + kAhead < tiles_) load(tile + kAhead, (stage + kAhead) % kTile.stages);
      copy_async_commit();
      compute(tile, stage);
      stage = stage + 1 == kTile.stages ? 0 : stage + 1;
    }
    finish();
  }

 private:
  static constexpr int kThreads = kTile.threads();
  static constexpr int kKeys = kTile.keys;
  static constexpr int kWarpKeys = kKeys / kTile.warps_n;
  static constexpr int kTilesM = kTile.tiles_m;
  static constexpr int kChunks = kHead / 8;  // of 16 bytes in a row

  // --- Who this block and this thread are.

  LBR_DEVICE void locate() {
    // Neighbouring blocks read the same slots for different rows, out of L2.
    unsigned block = block_index().x;
    first_row_ = int(block % launch_.row_tiles) * launch_.tile_rows;
    block /= launch_.row_tiles;
    split_ = int(block % launch_.splits);
    block /= launch_.splits;
    kv_head_ = int(block % unsigned(p_.kv_heads));
    batch_ = int(block / unsigned(p_.kv_heads));
    group_ = int(p_.q_heads / p_.kv_heads);
  }
  // Of all sequences and heads.
  LBR_DEVICE int row_tile() const {
    return (batch_ * int(p_.kv_heads) + kv_head_) * launch_.row_tiles + first_row_ / launch_.tile_rows;
  }

  LBR_DEVICE static int lane() { return thread_index() % kWarpSize; }
  LBR_DEVICE static int warp() { return thread_index() / kWarpSize; }
  LBR_DEVICE static int warp_row() { return warp() % kTile.warps_m * (16 * kTilesM); }
  LBR_DEVICE static int warp_n() { return warp() / kTile.warps_m; }

  LBR_DEVICE static int min(int a, int b) { return a < b ? a : b; }
  LBR_DEVICE static int max(int a, int b) { return a > b ? a : b; }

  LBR_DEVICE int query_of(int row) const { return (first_row_ + row) / group_; }
  LBR_DEVICE int q_head_of(int row) const { return kv_head_ * group_ + (first_row_ + row) % group_; }
  LBR_DEVICE int node_of(int row) const { return int(p_.tree_nodes - p_.num_queries) + query_of(row); }
  LBR_DEVICE int64_t output_of(int row) const {
    return (batch_ * p_.q_heads + q_head_of(row)) * p_.num_queries + query_of(row);
  }

  // --- Shared memory: query, stages of keys and values; in the end the sums of values. Behind them what is small.

  LBR_DEVICE T* query() const { return reinterpret_cast<T*>(memory_); }
  LBR_DEVICE T* keys(int stage) const {
    return reinterpret_cast<T*>(memory_ + kTile.query_bytes() + stage * kTile.stage_bytes());
  }
  LBR_DEVICE T* values(int stage) const { return keys(stage) + kKeys * kHead; }
  LBR_DEVICE float* sums(int warp_n, int row) const {
    return reinterpret_cast<float*>(memory_) + (warp_n * kRows + row) * kTile.sums_stride();
  }
  LBR_DEVICE uint64_t* visible(int stage) const {
    return reinterpret_cast<uint64_t*>(memory_ + kTile.tiles_bytes()) + stage * kRows;
  }
  LBR_DEVICE uint64_t* seen(int stage) const { return visible(kTile.stages) + stage * TileShape::kWarps; }
  LBR_DEVICE OnlineSoftmax* states(int warp_n) const {
    return reinterpret_cast<OnlineSoftmax*>(seen(kTile.stages)) + warp_n * kRows;
  }
  LBR_DEVICE int* key_positions(int stage) const {
    return reinterpret_cast<int*>(states(kTile.warps_n)) + stage * kKeys;
  }
  LBR_DEVICE int* row_positions() const { return key_positions(kTile.stages); }
  LBR_DEVICE int* is_last() const { return row_positions() + kRows; }

  // Where chunk `chunk` of a row lies. Eight rows' chunks of one column fall into different banks.
  LBR_DEVICE static int swizzled(int row, int chunk) { return row * kHead + ((chunk ^ (row & 7)) * 8); }

  // --- The tree.

  // Word `word` of a node's mask, without the bits of nodes that are not there.
  LBR_DEVICE uint64_t mask_word(int node, int word) const {
    if (word >= p_.words) return 0;
    const int64_t* words = p_.ancestors + batch_ * p_.ancestors_stride[0] + node * p_.ancestors_stride[1];
    const uint64_t bits = uint64_t(words[word]);
    const int last = int(p_.tree_nodes) - word * 64;
    return last >= 64 ? bits : bits & ((uint64_t(1) << last) - 1);
  }

  LBR_DEVICE int position_of_node(int node) const {
    int depth = 0;
    if (p_.depths) {
      depth = p_.depths[batch_ * p_.depths_stride + node];
    } else {
      for (int word = 0; word < p_.words; ++word) depth += count_bits(mask_word(node, word));
    }
    return length_ + depth - 1;
  }

  // The first slot of the prefix that a window lets a query at `position` see.
  LBR_DEVICE int first_seen_from(int position) const { return max(position - int(p_.window) + 1, 0); }

  // Which of the slots from `slot` on a row sees, one bit each.
  LBR_DEVICE uint64_t visible_slots(int row, int slot) const {
    const int position = p_.window ? row_positions()[row] : 0;
    const int from = p_.window ? max(first_seen_from(position) - slot, 0) : 0, to = min(length_ - slot, kKeys);
    uint64_t prefix = 0;
    if (from < to) prefix = (to - from == 64 ? ~uint64_t(0) : (uint64_t(1) << (to - from)) - 1) << from;

    // Nodes first .. first + 63, of which those below 0 are slots of the prefix.
    const int first = slot - length_, node = node_of(row);
    uint64_t tree = 0;
    if (first >= 0) {
      const int word = first / 64, shift = first % 64;
      tree = mask_word(node, word) >> shift;
      if (shift) tree |= mask_word(node, word + 1) << (64 - shift);
    } else if (first > -64) {
      tree = mask_word(node, 0) << -first;
    }
    if (kKeys < 64) tree &= (uint64_t(1) << (kKeys % 64)) - 1;
    if (p_.window) {
      for (uint64_t rest = tree; rest; rest &= rest - 1) {
        const int bit = lowest_bit(rest);
        if (position - position_of_node(first + bit) >= p_.window) tree &= ~(uint64_t(1) << bit);
      }
    }
    return prefix | tree;
  }

  // --- Which slots this block reads.

  // Sets first_slot_ and tiles_, and what of them is masked. False if there is nothing for this block to do.
  LBR_DEVICE bool choose_tiles() {
    int begin = 0;
    full_from_ = 0;
    if (p_.window || p_.alibi_slopes) {
      for (int row = thread_index(); row < rows_; row += kThreads)
        row_positions()[row] = position_of_node(node_of(row));
      block_barrier();  // rows' positions are there
    }
    if (p_.window) {
      begin = length_;
      for (int row = 0; row < rows_; ++row) {
        const int first = first_seen_from(row_positions()[row]);
        begin = min(begin, first);
        full_from_ = max(full_from_, first);
      }
    }
    const int first_tile = begin / kKeys, end_tile = (length_ + int(p_.tree_nodes) + kKeys - 1) / kKeys;
    const int all = end_tile - first_tile;
    const int longest = max((all + launch_.splits - 1) / launch_.splits, kLeastTiles);
    parts_ = (all + longest - 1) / longest;
    first_slot_ = (first_tile + split_ * longest) * kKeys;
    tiles_ = min(longest, all - split_ * longest);
    return split_ < parts_;
  }

  LBR_DEVICE bool is_masked(int slot) const { return slot < full_from_ || slot + kKeys > length_; }

  // --- Loading.

  LBR_DEVICE void load_query() const {
    const T* base = static_cast<const T*>(p_.query) + batch_ * p_.query_stride[0];
    for (int i = thread_index(); i < kRows * kChunks; i += kThreads) {
      const int row = i / kChunks, chunk = i % kChunks;
      const bool real = row < rows_ && chunk * 8 < p_.head_dim;
      const T* from = base;
      if (real) from += q_head_of(row) * p_.query_stride[1] + query_of(row) * p_.query_stride[2] + chunk * 8;
      copy_async_16(query() + swizzled(row, chunk), from, real);
    }
  }

  // Starts the copies of a tile's keys and values.
  LBR_DEVICE void load(int tile, int stage) const {
    const int slot = first_slot_ + tile * kKeys;
    uint64_t seen_slots = ~uint64_t(0);
    if (is_masked(slot)) seen_slots = prepare_mask(slot, stage);
    copy_slots(keys(stage), p_.keys, p_.keys_stride, int(p_.head_dim), slot, seen_slots);
    copy_slots(values(stage), p_.values, p_.values_stride, int(p_.value_dim), slot, seen_slots);
  }

  // Writes which slots of a tile every row sees, and where they stand; returns which of them any row sees.
  LBR_DEVICE uint64_t prepare_mask(int slot, int stage) const {
    uint64_t any = 0;
    if (thread_index() < kRows) {
      const int row = thread_index();
      any = row < rows_ ? visible_slots(row, slot) : 0;
      visible(stage)[row] = any;
    }
    for (int step = kWarpSize / 2; step > 0; step /= 2) any |= shuffle_xor(any, step);
    if (lane() == 0) seen(stage)[warp()] = any;
    if (p_.alibi_slopes && thread_index() < kKeys) {
      const int at = slot + thread_index(), node = at - length_;
      const bool in_tree = node >= 0 && node < p_.tree_nodes;
      key_positions(stage)[thread_index()] = in_tree ? position_of_node(node) : at;
    }
    block_barrier();  // all warps have said what they see
    any = 0;
    for (int w = 0; w < TileShape::kWarps; ++w) any |= seen(stage)[w];
    return any;
  }

  // A thread copies one column of chunks, every kStep-th row of it.
  LBR_DEVICE void copy_slots(T* to, const void* cache, const int64_t (&stride)[3], int dim, int slot,
                             uint64_t seen_slots) const {
    constexpr int kStep = kThreads / kChunks;
    const int first = thread_index() / kChunks, chunk = thread_index() % kChunks;
    if (!kExact && chunk >= (dim + 15) / 16 * 2) return;  // products take 16 columns at a time
    if (!kExact && chunk * 8 >= dim) seen_slots = 0;
    const T* from = static_cast<const T*>(cache) + batch_ * stride[0] + kv_head_ * stride[1];
    from += (slot + first) * stride[2] + chunk * 8;
    seen_slots >>= first;
#pragma unroll
    for (int i = 0; i < kKeys / kStep; ++i) {
      copy_async_16(to + swizzled(first + i * kStep, chunk), from, seen_slots & 1);
      from += kStep * stride[2];
      seen_slots >>= kStep;
    }
  }

  // --- One tile: scores, their softmax so far, and the sums of values.

  LBR_DEVICE void compute(int tile, int stage) {
    if (warp_row() >= rows_) return;
    const int slot = first_slot_ + tile * kKeys;
    float scores[kTilesM][kWarpKeys / 8][4] = {};
    multiply_keys(scores, keys(stage));
#pragma unroll
    for (int m = 0; m < kTilesM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) soften(scores[m], m, half, slot, stage);
    multiply_values(scores, values(stage));
  }

  LBR_DEVICE void multiply_keys(float (&scores)[kTilesM][kWarpKeys / 8][4], const T* keys) const {
    const int steps = kExact ? kHead / 16 : int(p_.head_dim + 15) / 16;
#pragma unroll(kExact ? kHead / 16 : 2)
    for (int k = 0; k < steps; ++k) {
      uint32_t rows[kTilesM][4];
#pragma unroll
      for (int m = 0; m < kTilesM; ++m)
        load_matrices(rows[m], query() + swizzled(warp_row() + m * 16 + lane() % 16, 2 * k + lane() / 16));
#pragma unroll
      for (int j = 0; j < kWarpKeys / 16; ++j) {
        uint32_t columns[4];
        const int key = warp_n() * kWarpKeys + j * 16 + lane() / 16 * 8 + lane() % 8;
        load_matrices(columns, keys + swizzled(key, 2 * k + lane() / 8 % 2));
#pragma unroll
        for (int m = 0; m < kTilesM; ++m) {
          multiply_accumulate<T>(scores[m][2 * j], rows[m], columns[0], columns[1]);
          multiply_accumulate<T>(scores[m][2 * j + 1], rows[m], columns[2], columns[3]);
        }
      }
    }
  }

  // Makes probabilities, relative to the row's top so far, of the scores of row `half` * 8 + lane / 4 of an m tile.
  LBR_DEVICE void soften(float (&scores)[kWarpKeys / 8][4], int m, int half, int slot, int stage) {
    const int row = warp_row() + m * 16 + half * 8 + lane() / 4;
    const int first_key = warp_n() * kWarpKeys + lane() % 4 * 2;
    const bool masked = is_masked(slot);
    const float scale = p_.softcap ? p_.scale / p_.softcap : p_.scale * kLog2E;
#pragma unroll
    for (int j = 0; j < kWarpKeys / 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) scores[j][2 * half + e] *= scale;
    if (p_.softcap) {
      const float cap = p_.softcap * kLog2E;
#pragma unroll
      for (int j = 0; j < kWarpKeys / 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) scores[j][2 * half + e] = cap * tanh(scores[j][2 * half + e]);
    }
    if (p_.alibi_slopes && row < rows_) {
      const float slope = p_.alibi_slopes[q_head_of(row)] * kLog2E;
      const int position = row_positions()[row];
#pragma unroll
      for (int j = 0; j < kWarpKeys / 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int key = first_key + j * 8 + e;
          scores[j][2 * half + e] += slope * float((masked ? key_positions(stage)[key] : slot + key) - position);
        }
    }
    if (masked) {
      const uint64_t bits = visible(stage)[row] >> first_key;
#pragma unroll
      for (int j = 0; j < kWarpKeys / 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (!(bits >> (j * 8 + e) & 1)) scores[j][2 * half + e] = -kInfinity;
    }

    float top = top_[m][half];
#pragma unroll
    for (int j = 0; j < kWarpKeys / 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) top = gpu::max(top, scores[j][2 * half + e]);
    top = gpu::max(top, shuffle_xor(top, 1));
    top = gpu::max(top, shuffle_xor(top, 2));
    const float base = base_of(top), keep = exp2(top_[m][half] - base);
    float sum = 0;
#pragma unroll
    for (int j = 0; j < kWarpKeys / 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float probability = exp2(scores[j][2 * half + e] - base);
        scores[j][2 * half + e] = probability;
        sum += probability;
      }
    top_[m][half] = top;
    sum_[m][half] = sum_[m][half] * keep + sum;  // this thread's columns alone, until finish()
#pragma unroll
    for (int n = 0; n < kHead / 8; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) sums_[m][n][2 * half + e] *= keep;
  }

  LBR_DEVICE void multiply_values(const float (&probabilities)[kTilesM][kWarpKeys / 8][4], const T* values) {
#pragma unroll
    for (int k = 0; k < kWarpKeys / 16; ++k) {
      uint32_t rows[kTilesM][4];
#pragma unroll
      for (int m = 0; m < kTilesM; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* pair = &probabilities[m][2 * k + i / 2][i % 2 * 2];
          rows[m][i] = pack<T>(pair[0], pair[1]);
        }
#pragma unroll
      for (int n = 0; n < kHead / 16; ++n) {
        if (!kExact && n * 16 >= p_.value_dim) break;
        uint32_t columns[4];
        const int key = warp_n() * kWarpKeys + k * 16 + lane() % 16;
        load_matrices_transposed(columns, values + swizzled(key, 2 * n + lane() / 16));
#pragma unroll
        for (int m = 0; m < kTilesM; ++m) {
          multiply_accumulate<T>(sums_[m][2 * n], rows[m], columns[0], columns[1]);
          multiply_accumulate<T>(sums_[m][2 * n + 1], rows[m], columns[2], columns[3]);
        }
      }
    }
  }

  // --- The end: warps are merged, then blocks.

  LBR_DEVICE void finish() {
    block_barrier();  // all have done with the tiles, whose memory is taken now
    if (warp_row() < rows_) store_warp();
    block_barrier();  // all warps' states and sums are there
    if (parts_ == 1) {
      for_each_chunk([&](int row, int column) {
        float values[8];
        const OnlineSoftmax state = merge_warps(row, column, values);
        write(row, column, state, values);
      });
      return;
    }
    for_each_chunk([&](int row, int column) {
      float values[8];
      const OnlineSoftmax state = merge_warps(row, column, values);
      store_part(split_, row, column, state, values);
    });
    // In each round neighbouring parts are merged in groups, by the block of the group that arrives last; it goes on
    // with the result in the next round, until one part is left.
    int part = split_, parts = parts_, round = 0;  // `round` is where this round's parts begin in the workspace
    while (true) {
      const int group = part / kFanIn, first = group * kFanIn, members = min(kFanIn, parts - first);
      block_barrier();  // this block's part is written
      if (thread_index() == 0) {
        unsigned* const arrivals = launch_.workspace.arrivals + row_tile() * parts_of(launch_.splits) + round + group;
        fence();
        *is_last() = atomic_add(arrivals, 1) == unsigned(members - 1);
        fence();
        if (*is_last()) *arrivals = 0;  // for the next launch
      }
      block_barrier();  // all know whether the group's other parts are there
      if (!*is_last()) return;
      const bool done = parts <= kFanIn;
      const int next = round + parts + group;
      for_each_chunk([&](int row, int column) {
        float values[8];
        const OnlineSoftmax state = merge_parts(round + first, members, row, column, values);
        if (done) {
          write(row, column, state, values);
        } else {
          store_part(next, row, column, state, values);
        }
      });
      if (done) return;
      round += parts;
      part = group;
      parts = (parts + kFanIn - 1) / kFanIn;
    }
  }

  // Calls f(row, column) for every eighth column of the results of this block's rows.
  template <class F>
  LBR_DEVICE void for_each_chunk(const F& f) const {
    const int chunks = int(p_.value_dim) / 8;
    for (int i = thread_index(); i < rows_ * chunks; i += kThreads) f(i / chunks, i % chunks * 8);
  }

  LBR_DEVICE void store_warp() {
#pragma unroll
    for (int m = 0; m < kTilesM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float sum = sum_[m][half];
        sum += shuffle_xor(sum, 1);
        sum += shuffle_xor(sum, 2);
        const int row = warp_row() + m * 16 + half * 8 + lane() / 4;
        if (lane() % 4 == 0) states(warp_n())[row] = {top_[m][half], sum};
#pragma unroll
        for (int n = 0; n < kHead / 8; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) sums(warp_n(), row)[n * 8 + lane() % 4 * 2 + e] = sums_[m][n][2 * half + e];
      }
  }

  LBR_DEVICE OnlineSoftmax merge_warps(int row, int column, float (&values)[8]) const {
    OnlineSoftmax state = states(0)[row];
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = sums(0, row)[column + i];
#pragma unroll
    for (int w = 1; w < kTile.warps_n; ++w) {
      float keep, add;
      merge(state, states(w)[row], keep, add);
#pragma unroll
      for (int i = 0; i < 8; ++i) values[i] = values[i] * keep + sums(w, row)[column + i] * add;
    }
    return state;
  }

  // A part's results in the workspace: all states first, then all sums.
  LBR_DEVICE int64_t part_row(int part, int row) const {
    return (int64_t(row_tile()) * parts_of(launch_.splits) + part) * kRows + row;
  }
  LBR_DEVICE float* part_state(int part, int row) const { return launch_.workspace.partials + part_row(part, row) * 2; }
  LBR_DEVICE Float4* part_values(int part, int row, int column) const {
    const int64_t all = p_.batch * p_.kv_heads * launch_.row_tiles * parts_of(launch_.splits) * kRows;
    float* const values = launch_.workspace.partials + 2 * all;
    return reinterpret_cast<Float4*>(values + part_row(part, row) * p_.value_dim + column);
  }

  LBR_DEVICE void store_part(int part, int row, int column, OnlineSoftmax state, const float (&values)[8]) const {
    Float4* to = part_values(part, row, column);
    to[0] = {{values[0], values[1], values[2], values[3]}};
    to[1] = {{values[4], values[5], values[6], values[7]}};
    if (column > 0) return;
    part_state(part, row)[0] = state.top;
    part_state(part, row)[1] = state.sum;
  }

  // The union of parts first .. first + members - 1. All of them are on their way before the first is needed.
  LBR_DEVICE OnlineSoftmax merge_parts(int first, int members, int row, int column, float (&values)[8]) const {
    Float4 others[kFanIn][2];
    OnlineSoftmax states[kFanIn];
#pragma unroll
    for (int i = 0; i < kFanIn; ++i) {
      if (i >= members) continue;
      const Float4* from = part_values(first + i, row, column);
      others[i][0] = load_shared_by_blocks(from);
      others[i][1] = load_shared_by_blocks(from + 1);
      const float* state = part_state(first + i, row);
      states[i] = {load_shared_by_blocks(state), load_shared_by_blocks(state + 1)};
    }
    OnlineSoftmax all;
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = 0;
#pragma unroll
    for (int i = 0; i < kFanIn; ++i) {
      if (i >= members) continue;
      float keep, add;
      merge(all, states[i], keep, add);
#pragma unroll
      for (int j = 0; j < 8; ++j) values[j] = values[j] * keep + others[i][j / 4].v[j % 4] * add;
    }
    return all;
  }

  LBR_DEVICE void write(int row, int column, OnlineSoftmax state, float (&values)[8]) const {
    float factor = 1;
    if (p_.sinks) {
      float unused;
      merge(state, {p_.sinks[q_head_of(row)] * kLog2E, 1.0f}, factor, unused);
    }
    factor *= normaliser(state);
    Chunk chunk;
#pragma unroll
    for (int i = 0; i < 4; ++i) chunk.words[i] = pack<T>(values[2 * i] * factor, values[2 * i + 1] * factor);
    const int64_t at = output_of(row);
    *reinterpret_cast<Chunk*>(static_cast<T*>(p_.out) + at * p_.value_dim + column) = chunk;
    if (column == 0) p_.lse[at] = log_sum_exp(state);
  }

  // The results of rows that are not real, from `row` on; `value` is 0 or NaN.
  LBR_DEVICE void fill(int row, float value) const {
    const int chunks = int(p_.value_dim) / 8;
    const int end = min(launch_.tile_rows, int(p_.num_queries) * group_ - first_row_);
    const uint32_t two = pack<T>(value, value);
    for (int i = row * chunks + thread_index(); i < end * chunks; i += kThreads) {
      const int64_t at = output_of(i / chunks);
      reinterpret_cast<Chunk*>(static_cast<T*>(p_.out) + at * p_.value_dim)[i % chunks] = {{two, two, two, two}};
      if (i % chunks == 0) p_.lse[at] = value == 0 ? -kInfinity : value;
    }
  }

  const TreeAttentionLaunch& launch_;
  const TreeAttentionParams& p_;
  char* const memory_;

  int batch_, kv_head_, group_, split_, first_row_;  // the same in all threads
  int rows_;                                         // real ones in this tile
  int length_;                                       // of the prefix
  int first_slot_, tiles_;                           // what this block reads
  int full_from_;                                    // the first slot of the prefix that all rows see
  int parts_;                                        // how many blocks share these rows' slots

  // Fragments of 16 x 8: elements 0 and 1 belong to row lane / 4, 2 and 3 to row lane / 4 + 8.
  float sums_[kTilesM][kHead / 8][4] = {};
  float top_[kTilesM][2];
  float sum_[kTilesM][2] = {};
};

template <class T, int kHead, int kRows, bool kExact>
LBR_KERNEL(tile_shape(kHead, kRows).threads(), tile_shape(kHead, kRows).resident_blocks)
tree_attention_kernel(LBR_PARAMETER TreeAttentionLaunch launch) {
  TreeAttentionBlock<T, kHead, kRows, kExact>(launch).run();
}

template <class T, int kHead, int kRows, bool kExact>
void launch_kernel(const TreeAttentionLaunch& launch, Stream stream) {
  constexpr TileShape kTile = tile_shape(kHead, kRows);
  const TreeAttentionParams& p = launch.params;
  const unsigned blocks = unsigned(p.batch * p.kv_heads * launch.splits * launch.row_tiles);
  gpu::launch(tree_attention_kernel<T, kHead, kRows, kExact>, Grid{blocks}, kTile.threads(), kTile.shared_bytes(),
              stream, launch);
}

template <int kHead, int kRows>
void launch_rows(const TreeAttentionLaunch& launch, Stream stream) {
  const bool half = launch.params.dtype == DType::kFloat16;
  // In the largest tiles the overlap would not fit the registers.
  if constexpr (kRows < 128 && kHead < 256) {
    if (launch.params.head_dim == kHead && launch.params.value_dim == kHead) {
      if (half) return launch_kernel<Half, kHead, kRows, true>(launch, stream);
      return launch_kernel<BFloat16, kHead, kRows, true>(launch, stream);
    }
  }
  if (half) return launch_kernel<Half, kHead, kRows, false>(launch, stream);
  launch_kernel<BFloat16, kHead, kRows, false>(launch, stream);
}

template <int kHead>
void launch_head_class(const TreeAttentionLaunch& launch, const TileShape& tile, Stream stream) {
  if (tile.rows == 16) return launch_rows<kHead, 16>(launch, stream);
  if constexpr (kHead < 256) {
    if (tile.rows == 32) return launch_rows<kHead, 32>(launch, stream);
    if (tile.rows == 128) return launch_rows<kHead, 128>(launch, stream);
  }
  launch_rows<kHead, 64>(launch, stream);
}

}  // namespace lbr::gpu
