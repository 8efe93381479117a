// The kernel of route: the whole router of all rows in one cooperative launch.
//
// Each layer's outputs are shared out among the blocks of a group: a block computes its columns of a layer for all rows
// of the group. Its columns of all layers are copied to its shared memory at the very start, so that the group reads
// the weights once, while it waits for something else. A warp takes two rows and four columns at a time, and its lanes
// share the inputs; norms and the small attentions between two layers are recomputed by every warp that needs them.
//
// What one layer leaves for the next lies in the workspace, where each value says by itself that it is there
// (primitives.cuh, publish and poll): a warp goes on as soon as its own rows' inputs have come, and no barrier
// separates the layers. All of that part of the workspace is made absent first; the one barrier of the group in between
// also completes the input projection, whose partial sums are plain data.
//
// Items that do not exist (early ends, missing candidates) have rows in the workspace that nobody reads or writes. Of
// the path encoder only the [CLS] output is read, so only its query is computed, once for all; keys and values belong
// to a node, not to the paths through it. All sums are made in an order that depends on nothing but the router's sizes:
// a row's result is the same to the bit in any batch, on any number of blocks.
#pragma once

#include "block_group.cuh"
#include "route.h"

namespace lbr::gpu {

// kChunks: what a lane holds of a row of `dim` values, four from every 128.
template <bool kResident, int kChunks>
class RouteBlock {
 public:
  LBR_DEVICE explicit RouteBlock(const RouteLaunch& launch)
      : launch_(launch),
        p_(launch.params),
        l_(launch.layout),
        weights_(launch.params.weights),
        slices_(reinterpret_cast<float*>(shared_memory())),
        dim_(int(launch.params.dim)),
        width_(int(launch.params.width)),
        member_(int(block_index().x) % launch.size),
        group_(int(block_index().x) / launch.size),
        floats_(launch.workspace.floats + int64_t(group_) * launch.workspace_stride) {}

  LBR_DEVICE void run() {
    const int begin = group_ * launch_.group_rows, end = min(begin + launch_.group_rows, int(p_.batch));
    if (begin >= end) return;
    BlockGroup group(launch_.workspace.counters + group_, launch_.size);
    copy_weights();
    for (first_row_ = begin; first_row_ < end; first_row_ += launch_.rows) {
      if (first_row_ > begin) {
        // All have done with the rows before, in the workspace and in shared memory.
        group.barrier();
      }
      rows_ = min(launch_.rows, end - first_row_);
      read_rows();
      clear();
      switch (p_.dtype) {
        case DType::kFloat32: project_in<float>(); break;
        case DType::kFloat16: project_in<Half>(); break;
        case DType::kBFloat16: project_in<BFloat16>(); break;
      }
      copy_async_wait<0>();
      // The projections are complete, and nothing is there that was not published since.
      group.barrier();
      encode_paths();
      attend_in_subtrees();
      compare_candidates();
      choose();
    }
    group.leave();
  }

 private:
  static constexpr int kThreads = kRouteThreads, kWarps = kThreads / kWarpSize;
  static constexpr int kRows = kRouteRows, kColumns = kRouteColumns;
  static constexpr int kBatch = kChunks == 1 ? 3 : 1;  // keys of a row that are waited for together
  static constexpr int kInner = 4;                     // chunks of a feed-forward's inner values, likewise
  static constexpr int kMostRanges = 4;
  static constexpr float kLog2E = 1.4426950408889634f;

  enum State : int { kInactive, kGood, kBad };

  LBR_DEVICE static int min(int a, int b) { return a < b ? a : b; }
  LBR_DEVICE static int lane() { return thread_index() % kWarpSize; }
  LBR_DEVICE static int warp() { return thread_index() / kWarpSize; }
  LBR_DEVICE static float infinity() { return __builtin_inff(); }
  LBR_DEVICE static float nan() { return __builtin_nanf(""); }

  // --- Shared memory: columns of weights, then what is known of the rows.

  LBR_DEVICE int* states() const { return reinterpret_cast<int*>(slices_ + l_.slices); }
  LBR_DEVICE float* moments() const { return reinterpret_cast<float*>(states() + launch_.rows); }
  LBR_DEVICE uint8_t* node_exists() const {
    return reinterpret_cast<uint8_t*>(moments() + (p_.input_norm ? 2 * launch_.rows * l_.nodes : 0));
  }
  LBR_DEVICE uint8_t* path_lengths() const { return node_exists() + launch_.rows * l_.nodes; }

  LBR_DEVICE int nodes() const { return rows_ * l_.nodes; }
  LBR_DEVICE int paths() const { return rows_ * l_.paths; }
  LBR_DEVICE int candidates() const { return rows_ * width_; }
  LBR_DEVICE bool has_path(int path) const { return path_lengths()[path] > 0; }
  LBR_DEVICE bool has_candidate(int c) const { return node_exists()[c / width_ * l_.nodes + c % width_]; }

  // --- Weights.

  LBR_DEVICE void copy_weights() {
    if constexpr (kResident) {
      const RouteProjection& in = l_.in;
      for (int n = 0; n < in.pieces; ++n) {
        const Piece piece(*this, n);
        float* const to = slices_ + in.slice + n * kColumns * in.range_inputs;
        for (int i = thread_index(); i < piece.columns * in.range_inputs; i += kThreads) {
          const int column = i % piece.columns, input = i / piece.columns;
          const bool is_there = piece.first + input < piece.end;
          const float* from = weights_ + in.weight;
          if (is_there) from += (piece.first + input) * dim_ + piece.column + column;
          copy_async_4(to + column * in.range_inputs + input, from, is_there);
        }
      }
    }
    copy_async_commit();
    if constexpr (kResident) {
      copy(l_.cls_query);
      copy(l_.path.project);
      copy_encoder(l_.path);
      copy(l_.subtree.project);
      copy_encoder(l_.subtree);
      if (!p_.independent) copy(l_.candidate.project);
      copy_encoder(l_.candidate);
      if (p_.mlp_score) copy(l_.score_up);
    }
    copy_async_commit();
  }

  LBR_DEVICE void copy_encoder(const RouteEncoder& encoder) {
    copy(encoder.out);
    copy(encoder.up);
    copy(encoder.down);
  }

  LBR_DEVICE void copy(const RouteLayer& layer) {
    const int first = member_ * layer.columns, count = min(layer.columns, layer.outputs - first);
    for (int i = thread_index(); i < count * layer.inputs; i += kThreads) {
      const int column = i % count, input = i / count;
      copy_async_4(slices_ + layer.slice + column * layer.inputs + input,
                   weights_ + layer.weight + input * layer.stride + first + column, true);
    }
  }

  LBR_DEVICE static Float4 load(const float* p) { return {{p[0], p[1], p[2], p[3]}}; }

  // Four inputs' weights of a column, `count` of them at most; the others are zero.
  LBR_DEVICE static Float4 load_strided(const float* p, int stride, int count) {
    Float4 w;
#pragma unroll
    for (int e = 0; e < 4; ++e) w.v[e] = e < count ? p[e * stride] : 0;
    return w;
  }

  LBR_DEVICE static void multiply_add(float& sum, const Float4& x, const Float4& w) {
#pragma unroll
    for (int e = 0; e < 4; ++e) sum += x.v[e] * w.v[e];
  }

  // --- Sums over the warp.

  // All lanes get each sum.
  template <int N>
  LBR_DEVICE static void add_lanes(float (&sums)[N], int lanes = kWarpSize) {
    for (int mask = 1; mask < lanes; mask *= 2)
#pragma unroll
      for (int n = 0; n < N; ++n) sums[n] += shuffle_xor(sums[n], mask);
  }

  // Lane i gets the sum of row i / 16 and column i / 4 % 4: each step halves what a lane still has to add.
  LBR_DEVICE static float add_lanes(float (&sums)[kRows][kColumns]) {
    float of_row[kColumns], pair[2];
    const bool row = lane() & 16, upper = lane() & 8, odd = lane() & 4;
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
      of_row[c] = (row ? sums[1][c] : sums[0][c]) + shuffle_xor(row ? sums[0][c] : sums[1][c], 16);
#pragma unroll
    for (int c = 0; c < 2; ++c)
      pair[c] = (upper ? of_row[c + 2] : of_row[c]) + shuffle_xor(upper ? of_row[c] : of_row[c + 2], 8);
    float sum = (odd ? pair[1] : pair[0]) + shuffle_xor(odd ? pair[0] : pair[1], 4);
    sum += shuffle_xor(sum, 2);
    sum += shuffle_xor(sum, 1);
    return sum;
  }

  // --- Rows of the workspace. A lane holds four values from every 128.

  LBR_DEVICE static int element(int chunk) { return chunk * kRouteInputs + 4 * lane(); }

  LBR_DEVICE void put(int at, float value) const { publish(floats_ + at, bits_of(value) == kAbsent ? nan() : value); }
  LBR_DEVICE float wait_for(int at) const {
    while (true) {
      const float value = poll(floats_ + at);
      if (bits_of(value) != kAbsent) return value;
      pause();
    }
  }

  // Waits for N rows of `size` values that begin at `at`; where that is negative, they are zero. All are asked for
  // before the first is looked at.
  template <int N, int C>
  LBR_DEVICE void wait_for(Float4 (&rows)[N][C], const int (&at)[N], int size) const {
    unsigned absent = 0;
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int c = 0; c < C; ++c) {
        rows[n][c] = {};
        if (at[n] >= 0 && element(c) < size) absent |= 1u << (n * C + c);
      }
    while (absent) {
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int c = 0; c < C; ++c)
          if (absent >> (n * C + c) & 1)
            rows[n][c] = poll(reinterpret_cast<const Float4*>(floats_ + at[n] + element(c)));
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int c = 0; c < C; ++c) {
          bool arrived = true;
#pragma unroll
          for (int e = 0; e < 4; ++e) arrived &= bits_of(rows[n][c].v[e]) != kAbsent;
          if (arrived) absent &= ~(1u << (n * C + c));
        }
      if (absent) pause();
    }
  }

  LBR_DEVICE void clear() const {
    const float absent = absent_value();
    Float4* const to = reinterpret_cast<Float4*>(floats_);
    for (int i = l_.awaited / 4 + member_ * kThreads + thread_index(); i < l_.floats / 4; i += launch_.size * kThreads)
      to[i] = {{absent, absent, absent, absent}};
  }

  // --- Norms.

  struct Scale {
    Float4 weight[kChunks], bias[kChunks];
  };

  LBR_DEVICE Scale load(const RouteNorm& norm) const {
    Scale scale{};
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if (element(c) >= dim_) continue;
      scale.weight[c] = load(weights_ + norm.weight + element(c));
      scale.bias[c] = load(weights_ + norm.bias + element(c));
    }
    return scale;
  }

  template <int N>
  LBR_DEVICE void normalise(Float4 (&rows)[N][kChunks], const Scale& scale) const {
    float mean[N], squares[N];
#pragma unroll
    for (int n = 0; n < N; ++n) {
      mean[n] = squares[n] = 0;
#pragma unroll
      for (int c = 0; c < kChunks; ++c)
#pragma unroll
        for (int e = 0; e < 4; ++e) mean[n] += rows[n][c].v[e];
    }
    add_lanes(mean);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      mean[n] /= float(dim_);
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        if (element(c) >= dim_) continue;
#pragma unroll
        for (int e = 0; e < 4; ++e) squares[n] += (rows[n][c].v[e] - mean[n]) * (rows[n][c].v[e] - mean[n]);
      }
    }
    add_lanes(squares);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const float factor = inverse_deviation(squares[n] / float(dim_));
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        if (element(c) >= dim_) continue;
#pragma unroll
        for (int e = 0; e < 4; ++e)
          rows[n][c].v[e] = (rows[n][c].v[e] - mean[n]) * factor * scale.weight[c].v[e] + scale.bias[c].v[e];
      }
    }
  }

  LBR_DEVICE static float inverse_deviation(float variance) { return 1.0f / gpu::sqrt(variance + 1e-5f); }

  // x * P(N < x).
  LBR_DEVICE static float gelu(float x) { return x * 0.5f * (1.0f + gpu::erf(x * 0.70710678f)); }

  // --- The rows: which are to be decided, which of their nodes and paths exist.

  LBR_DEVICE void read_rows() const {
    for (int r = thread_index(); r < rows_; r += kThreads) {
      const int b = first_row_ + r;
      const bool bad = p_.uniforms && !(p_.uniforms[b] >= 0 && p_.uniforms[b] < 1);
      if (bad && member_ == 0) atomic_or(launch_.workspace.flags, kBadCandidates);
      states()[r] = p_.active && !p_.active[b] ? kInactive : bad ? kBad : kGood;
    }
    if (p_.valid) {
      block_barrier();  // all states are known
      for (int i = thread_index(); i < nodes(); i += kThreads) {
        const int r = i / l_.nodes;
        if (states()[r] != kInactive && !fits(r, i % l_.nodes)) states()[r] = kBad;
      }
    }
    block_barrier();  // and which of them are bad
    for (int i = thread_index(); i < nodes(); i += kThreads)
      node_exists()[i] = states()[i / l_.nodes] == kGood && is_valid(i / l_.nodes, i % l_.nodes);
    for (int i = thread_index(); i < paths(); i += kThreads)
      path_lengths()[i] = uint8_t(states()[i / l_.paths] == kGood ? length_of(i / l_.paths, i % l_.paths) : 0);
    if (member_ == 0) {
      for (int i = thread_index(); i < candidates(); i += kThreads) {
        const int r = i / width_, b = first_row_ + r;
        if (states()[r] == kGood) continue;
        if (states()[r] == kBad) atomic_or(launch_.workspace.flags, kBadCandidates);
        p_.log_probs[int64_t(b) * width_ + i % width_] = states()[r] == kBad ? nan() : launch_.uniform_log_prob;
        p_.choice[b] = -1;
      }
    }
    copy_async_wait<1>();
    block_barrier();  // the tables are complete, and the input projection's weights are there
  }

  LBR_DEVICE bool is_valid(int r, int node) const { return !p_.valid || p_.valid[(first_row_ + r) * p_.nodes + node]; }

  // Whether a node is where `valid` allows one to be. The first answers for all candidates together.
  LBR_DEVICE bool fits(int r, int node) const {
    if (node < width_) {
      bool any = node > 0;
      for (int k = 0; k < width_; ++k) any |= is_valid(r, k);
      return any;
    }
    if (!is_valid(r, node)) return true;
    return is_valid(r, (node - width_) / width_) && (node % width_ == 0 || is_valid(r, node - 1));
  }

  // The node of a path at a layer, 0 for the first.
  LBR_DEVICE int node_of(int path, int layer) const {
    int first = 0, in_layer = width_, below = l_.leaves;
    for (int i = 0; i < layer; ++i) {
      first += in_layer;
      in_layer *= width_;
      below /= width_;
    }
    return first + path / below;
  }
  LBR_DEVICE int layer_of(int node) const {
    int layer = 0;
    for (int in_layer = width_; node >= in_layer; in_layer *= width_) {
      node -= in_layer;
      ++layer;
    }
    return layer;
  }

  // How many nodes a path has. One that ends early is there once, as the first of the paths that could go on from it.
  LBR_DEVICE int length_of(int r, int path) const {
    int leaves = l_.paths;  // below the node before
    for (int layer = 0; layer < p_.depth; ++layer) {
      if (!is_valid(r, node_of(path, layer))) return path % leaves == 0 ? layer : 0;
      leaves /= width_;
    }
    return int(p_.depth);
  }

  // --- The input projection.

  struct Piece {
    LBR_DEVICE Piece(const RouteBlock& block, int n) {
      const RouteProjection& in = block.l_.in;
      const int piece = n * block.launch_.size + block.member_;
      range = piece / in.column_tiles;
      column = piece % in.column_tiles * kColumns;
      columns = range < in.ranges ? min(kColumns, block.dim_ - column) : 0;
      first = range * in.range_inputs;
      end = min(first + in.range_inputs, int(block.p_.hidden_size));
    }
    int range, column, columns, first, end;
  };

  template <class T>
  struct alignas(4 * sizeof(T)) Four {
    T v[4];
  };
  // Four values of a node's hidden state from `input` on; beyond the end they are zero.
  template <class T>
  LBR_DEVICE Float4 hidden(int node, int input) const {
    const T* from = static_cast<const T*>(p_.hidden) + (first_row_ + node / l_.nodes) * p_.hidden_stride[0] +
                    node % l_.nodes * p_.hidden_stride[1] + input;
    Float4 x;
    if (launch_.hidden_aligned) {
      const Four<T> four = *reinterpret_cast<const Four<T>*>(from);
#pragma unroll
      for (int e = 0; e < 4; ++e) x.v[e] = widen(four.v[e]);
    } else {
#pragma unroll
      for (int e = 0; e < 4; ++e) x.v[e] = input + e < p_.hidden_size ? widen(from[e]) : 0;
    }
    return x;
  }

  // Mean and inverse deviation of every node's hidden state.
  template <class T>
  LBR_DEVICE void measure() const {
    const int size = int(p_.hidden_size);
    for (int node = warp(); node < nodes(); node += kWarps) {
      if (!node_exists()[node]) continue;
      float sum[1] = {}, squares[1] = {};
      for (int i = 4 * lane(); i < size; i += kRouteInputs) {
        const Float4 x = hidden<T>(node, i);
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[0] += x.v[e];
      }
      add_lanes(sum);
      const float mean = sum[0] / float(size);
      for (int i = 4 * lane(); i < size; i += kRouteInputs) {
        const Float4 x = hidden<T>(node, i);
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (i + e < size) squares[0] += (x.v[e] - mean) * (x.v[e] - mean);
      }
      add_lanes(squares);
      if (lane() == 0) {
        moments()[2 * node] = mean;
        moments()[2 * node + 1] = inverse_deviation(squares[0] / float(size));
      }
    }
    block_barrier();  // all warps need them
  }

  LBR_DEVICE void normalise_hidden(Float4& x, int node, int input) const {
    const float mean = moments()[2 * node], factor = moments()[2 * node + 1];
    const float *weight = weights_ + l_.in.norm.weight + input, *bias = weights_ + l_.in.norm.bias + input;
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (input + e < p_.hidden_size) x.v[e] = (x.v[e] - mean) * factor * weight[e] + bias[e];
  }

  template <class T>
  LBR_DEVICE void project_in() const {
    if (p_.input_norm) measure<T>();
    const RouteProjection& in = l_.in;
    const int tiles = (nodes() + kRows - 1) / kRows;
    for (int item = warp(); item < tiles * in.pieces; item += kWarps) {
      const int n = item / tiles, row = item % tiles * kRows;
      const Piece piece(*this, n);
      const bool here[kRows] = {node_exists()[row] != 0, row + 1 < nodes() && node_exists()[row + 1]};
      if (piece.columns <= 0 || !(here[0] || here[1])) continue;
      float sums[kRows][kColumns] = {};
#pragma unroll 2
      for (int i = piece.first + 4 * lane(); i < piece.end; i += kRouteInputs) {
        Float4 x[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          x[r] = {};
          if (here[r]) x[r] = hidden<T>(row + r, i);
          if (here[r] && p_.input_norm) normalise_hidden(x[r], row + r, i);
        }
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          if (c >= piece.columns) continue;
          Float4 w;
          if constexpr (kResident) {
            const int slice = in.slice + (n * kColumns + c) * in.range_inputs;
            w = *reinterpret_cast<const Float4*>(slices_ + slice + i - piece.first);
          } else {
            w = load_strided(weights_ + in.weight + i * dim_ + piece.column + c, dim_, piece.end - i);
          }
#pragma unroll
          for (int r = 0; r < kRows; ++r) multiply_add(sums[r][c], x[r], w);
        }
      }
      const float sum = add_lanes(sums);
      const int r = lane() / 16, column = lane() / 4 % 4;
      if (lane() % 4 == 0 && (r == 0 ? here[0] : here[1]) && column < piece.columns)
        floats_[in.partial + (piece.range * nodes() + row + r) * dim_ + piece.column + column] = sum;
    }
  }

  // Two nodes' embeddings. Behind the last node stands [CLS].
  LBR_DEVICE void embed(int row, const bool (&here)[kRows], Float4 (&x)[kRows][kChunks]) const {
    const RouteProjection& in = l_.in;
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const int node = row + r;
        const bool is_node = node < nodes(), inside = here[r] && element(c) < dim_;
        x[r][c] = {};
        if (!inside) continue;
        Float4 parts[kMostRanges] = {};
        const int more = is_node ? l_.depth_embed + layer_of(node % l_.nodes) * dim_ : l_.cls;
        const Float4 own = load(weights_ + more + element(c));
#pragma unroll
        for (int range = 0; range < kMostRanges; ++range)
          if (is_node && range < in.ranges)
            parts[range] = load_shared_by_blocks(
                reinterpret_cast<const Float4*>(floats_ + in.partial + (range * nodes() + node) * dim_ + element(c)));
#pragma unroll
        for (int e = 0; e < 4; ++e) {
#pragma unroll
          for (int range = 0; range < kMostRanges; ++range) x[r][c].v[e] += parts[range].v[e];
          x[r][c].v[e] += own.v[e];
        }
      }
  }

  // --- A layer: `gather` brings two rows of inputs, `finish` takes what this block's columns make of them.

  // Of the layer that a warp computes, which rows and columns.
  struct Tile {
    const RouteLayer& layer;
    int row, first, column, columns;  // columns first + column .. of the block's `columns`
    bool here[kRows];
    float sums[kRows][kColumns];
  };

  // exists(row); before(row, column) is added to a sum and asked for early; gather(tile) calls multiply;
  // finish(row, column, sum).
  template <class Exists, class Before, class Gather, class Finish>
  LBR_DEVICE void compute(const RouteLayer& layer, int rows, const Exists& exists, const Before& before,
                          const Gather& gather, const Finish& finish) const {
    const int first = member_ * layer.columns, columns = min(layer.columns, layer.outputs - first);
    if (columns <= 0) return;
    const int column_tiles = (columns + kColumns - 1) / kColumns, tiles = (rows + kRows - 1) / kRows * column_tiles;
    for (int item = warp(); item < tiles; item += kWarps) {
      const int row = item / column_tiles * kRows;
      Tile tile{
          layer, row, first, item % column_tiles * kColumns, columns, {exists(row), row + 1 < rows && exists(row + 1)},
          {}};
      if (!tile.here[0] && !tile.here[1]) continue;
      const int my_row = lane() / 16, my_column = tile.column + lane() / 4 % 4;
      const bool here = my_row == 0 ? tile.here[0] : tile.here[1];
      const bool mine = here && lane() % 4 == 0 && my_column < columns;
      const float start = mine ? before(row + my_row, first + my_column) : 0;
      gather(tile);
      const float sum = add_lanes(tile.sums);
      if (mine) finish(row + my_row, first + my_column, sum + start);
    }
  }

  LBR_DEVICE void multiply(Tile& tile, int input, const Float4& x0, const Float4& x1) const {
    const RouteLayer& layer = tile.layer;
    if (input >= layer.inputs) return;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int column = tile.column + c;
      if (column >= tile.columns) continue;
      Float4 w;
      if constexpr (kResident) {
        w = *reinterpret_cast<const Float4*>(slices_ + layer.slice + column * layer.inputs + input);
      } else {
        w = load_strided(weights_ + layer.weight + input * layer.stride + tile.first + column, layer.stride, 4);
      }
      multiply_add(tile.sums[0][c], x0, w);
      multiply_add(tile.sums[1][c], x1, w);
    }
  }
  LBR_DEVICE void multiply(Tile& tile, const Float4 (&x)[kRows][kChunks]) const {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) multiply(tile, element(c), x[0][c], x[1][c]);
  }

  LBR_DEVICE float bias_of(const RouteLayer& layer, int column) const { return weights_[layer.bias + column]; }

  // Waits for the tile's rows of a buffer of `dim` values.
  LBR_DEVICE void wait_for_rows(const Tile& tile, int buffer, Float4 (&x)[kRows][kChunks]) const {
    int at[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) at[r] = tile.here[r] ? buffer + (tile.row + r) * dim_ : -1;
    wait_for(x, at, dim_);
  }

  // --- Attention of two rows to `count` keys each: key(r, j) says where it lies in the workspace, the value `dim`
  // behind it; -1: there is none. Every row that is here has one at least.
  template <class Key>
  LBR_DEVICE void attend(const int (&query_at)[kRows], int count, const Key& key, Float4 (&out)[kRows][kChunks]) const {
    const int head = dim_ / int(p_.num_heads);
    const float scale = kLog2E / gpu::sqrt(float(head));
    Float4 query[kRows][kChunks];
    wait_for(query, query_at, dim_);
    float top[kRows * kChunks], sum[kRows * kChunks];
#pragma unroll
    for (int i = 0; i < kRows * kChunks; ++i) {
      top[i] = -infinity();
      sum[i] = 0;
      out[i / kChunks][i % kChunks] = {};
    }
    for (int first = 0; first < count; first += kBatch) {
      constexpr int kPairs = kRows * kBatch;
      int at[2 * kPairs];
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        const int j = first + i % kBatch;
        at[i] = query_at[i / kBatch] >= 0 && j < count ? key(i / kBatch, j) : -1;
        at[kPairs + i] = at[i] < 0 ? -1 : at[i] + dim_;
      }
      Float4 keys_values[2 * kPairs][kChunks];
      wait_for(keys_values, at, dim_);
      float scores[kPairs * kChunks];
#pragma unroll
      for (int i = 0; i < kPairs; ++i)
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
          scores[i * kChunks + c] = 0;
          multiply_add(scores[i * kChunks + c], query[i / kBatch][c], keys_values[i][c]);
        }
      add_lanes(scores, head / 4);
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
          const int s = r * kChunks + c;
          float next = top[s];
#pragma unroll
          for (int j = 0; j < kBatch; ++j) {
            float& score = scores[(r * kBatch + j) * kChunks + c];
            score = at[r * kBatch + j] < 0 ? -infinity() : score * scale;
            next = gpu::max(next, score);
          }
          const float base = next == -infinity() ? 0 : next, keep = exp2(top[s] - base);
          top[s] = next;
          sum[s] *= keep;
#pragma unroll
          for (int e = 0; e < 4; ++e) out[r][c].v[e] *= keep;
#pragma unroll
          for (int j = 0; j < kBatch; ++j) {
            const float probability = exp2(scores[(r * kBatch + j) * kChunks + c] - base);
            sum[s] += probability;
#pragma unroll
            for (int e = 0; e < 4; ++e) out[r][c].v[e] += probability * keys_values[kPairs + r * kBatch + j][c].v[e];
          }
        }
    }
#pragma unroll
    for (int i = 0; i < kRows * kChunks; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) out[i / kChunks][i % kChunks].v[e] /= sum[i];
  }

  // --- The router, layer by layer.

  LBR_DEVICE void encode_paths() const {
    const RouteEncoder& path = l_.path;
    const auto gather_embedded = [&](Tile& tile, int row) {
      const Scale scale = load(path.attention_norm);
      Float4 x[kRows][kChunks];
      embed(row, tile.here, x);
      normalise(x, scale);
      multiply(tile, x);
    };
    compute(
        l_.cls_query, 1, [](int) { return true; }, [&](int, int column) { return bias_of(l_.cls_query, column); },
        [&](Tile& tile) { gather_embedded(tile, nodes()); },
        [&](int, int column, float sum) { put(l_.cls_projected + column, sum); });
    compute(
        path.project, nodes() + 1, [&](int row) { return row == nodes() || node_exists()[row]; },
        [&](int, int column) { return bias_of(path.project, column); },
        [&](Tile& tile) { gather_embedded(tile, tile.row); },
        [&](int row, int column, float sum) { put(path.projected + row * 2 * dim_ + column, sum); });
    compute(
        path.out, paths(), [&](int row) { return has_path(row); },
        [&](int, int column) { return bias_of(path.out, column) + weights_[l_.cls + column]; },
        [&](Tile& tile) {
          int query[kRows];
#pragma unroll
          for (int r = 0; r < kRows; ++r) query[r] = tile.here[r] ? l_.cls_projected : -1;
          Float4 x[kRows][kChunks];
          attend(
              query, int(p_.depth) + 1,
              [&](int r, int j) {
                const int row = tile.row + r, length = path_lengths()[row];
                if (j > length) return -1;
                const int node = row / l_.paths * l_.nodes + (j > 0 ? node_of(row % l_.paths, j - 1) : 0);
                return path.projected + (j > 0 ? node : nodes()) * 2 * dim_;
              },
              x);
          multiply(tile, x);
        },
        [&](int row, int column, float sum) { put(path.attended + row * dim_ + column, sum); });
    feed_forward(path, paths(), [&](int row) { return has_path(row); });
  }

  template <class Exists>
  LBR_DEVICE void feed_forward(const RouteEncoder& encoder, int rows, const Exists& exists) const {
    compute(
        encoder.up, rows, exists, [&](int, int column) { return bias_of(encoder.up, column); },
        [&](Tile& tile) {
          const Scale scale = load(encoder.ffn_norm);
          Float4 x[kRows][kChunks];
          wait_for_rows(tile, encoder.attended, x);
          normalise(x, scale);
          multiply(tile, x);
        },
        [&](int row, int column, float sum) { put(encoder.inner + row * int(p_.ffn_dim) + column, gelu(sum)); });
    // What goes in has gone through this block's columns of `out`, which are those of `down`.
    contract(encoder, rows, exists,
             [&](int row, int column) { return wait_for(encoder.attended + row * dim_ + column); });
  }

  // The second half of a feed-forward, and `residual`.
  template <class Exists, class Residual>
  LBR_DEVICE void contract(const RouteEncoder& encoder, int rows, const Exists& exists,
                           const Residual& residual) const {
    const int ffn_dim = int(p_.ffn_dim);
    compute(
        encoder.down, rows, exists,
        [&](int row, int column) { return bias_of(encoder.down, column) + residual(row, column); },
        [&](Tile& tile) {
          for (int first = 0; first < ffn_dim; first += kInner * kRouteInputs) {
            int at[kRows];
#pragma unroll
            for (int r = 0; r < kRows; ++r)
              at[r] = tile.here[r] ? encoder.inner + (tile.row + r) * ffn_dim + first : -1;
            Float4 x[kRows][kInner];
            wait_for(x, at, ffn_dim - first);
#pragma unroll
            for (int c = 0; c < kInner; ++c) multiply(tile, first + element(c), x[0][c], x[1][c]);
          }
        },
        [&](int row, int column, float sum) { put(encoder.result + row * dim_ + column, sum); });
  }

  // A set attention: `tokens(tile, x)` brings the items, key(row, j) says which row of the projections is the j-th of
  // `count` that a row attends to, or -1.
  template <class Exists, class Tokens, class Key>
  LBR_DEVICE void encode_set(const RouteEncoder& encoder, int rows, const Exists& exists, const Tokens& tokens,
                             int count, const Key& key) const {
    compute(
        encoder.project, rows, exists, [&](int, int column) { return bias_of(encoder.project, column); },
        [&](Tile& tile) {
          const Scale scale = load(encoder.attention_norm);
          Float4 x[kRows][kChunks];
          tokens(tile, x);
          if (tile.column == 0) put_own(tile, encoder, x);
          normalise(x, scale);
          multiply(tile, x);
        },
        [&](int row, int column, float sum) { put(encoder.projected + row * 3 * dim_ + column, sum); });
    compute(
        encoder.out, rows, exists,
        [&](int row, int column) {
          return bias_of(encoder.out, column) + wait_for(encoder.tokens + row * dim_ + column);
        },
        [&](Tile& tile) {
          int query[kRows];
#pragma unroll
          for (int r = 0; r < kRows; ++r) query[r] = tile.here[r] ? encoder.projected + (tile.row + r) * 3 * dim_ : -1;
          Float4 x[kRows][kChunks];
          attend(
              query, count,
              [&](int r, int j) {
                const int row = key(tile.row + r, j);
                return row < 0 ? -1 : encoder.projected + row * 3 * dim_ + dim_;
              },
              x);
          multiply(tile, x);
        },
        [&](int row, int column, float sum) { put(encoder.attended + row * dim_ + column, sum); });
    feed_forward(encoder, rows, exists);
  }

  // Leaves the tile's items for the residual sum, as far as this block will need them: its columns of `out`.
  LBR_DEVICE void put_own(const Tile& tile, const RouteEncoder& encoder, const Float4 (&x)[kRows][kChunks]) const {
    const int first = member_ * encoder.out.columns, end = min(first + encoder.out.columns, dim_);
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int c = 0; c < kChunks; ++c)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int column = element(c) + e;
          if (tile.here[r] && column >= first && column < end)
            put(encoder.tokens + (tile.row + r) * dim_ + column, x[r][c].v[e]);
        }
  }

  LBR_DEVICE void attend_in_subtrees() const {
    encode_set(
        l_.subtree, paths(), [&](int row) { return has_path(row); },
        [&](const Tile& tile, Float4(&x)[kRows][kChunks]) {
          const Scale scale = load(l_.path.final_norm);
          wait_for_rows(tile, l_.path.result, x);
          normalise(x, scale);
        },
        l_.leaves,
        [&](int row, int j) {
          const int path = row / l_.leaves * l_.leaves + j;
          return has_path(path) ? path : -1;
        });
  }

  // Two candidates, each pooled from its paths by one learned query.
  LBR_DEVICE void pool(const Tile& tile, Float4 (&out)[kRows][kChunks]) const {
    const Scale norm = load(l_.subtree.final_norm);
    const float scale = kLog2E / gpu::sqrt(float(dim_));
    Float4 query[kChunks];
    float top[kRows], sum[kRows];
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      query[c] = {};
      if (element(c) < dim_) query[c] = load(weights_ + l_.pool_query + element(c));
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      top[r] = -infinity();
      sum[r] = 0;
#pragma unroll
      for (int c = 0; c < kChunks; ++c) out[r][c] = {};
    }
    for (int first = 0; first < l_.leaves; first += kBatch) {
      int at[kRows * kBatch];
#pragma unroll
      for (int i = 0; i < kRows * kBatch; ++i) {
        const int r = i / kBatch, j = first + i % kBatch, path = (tile.row + r) * l_.leaves + j;
        at[i] = tile.here[r] && j < l_.leaves && has_path(path) ? l_.subtree.result + path * dim_ : -1;
      }
      Float4 items[kRows * kBatch][kChunks];
      wait_for(items, at, dim_);
      normalise(items, norm);
      float scores[kRows * kBatch];
#pragma unroll
      for (int i = 0; i < kRows * kBatch; ++i) {
        scores[i] = 0;
#pragma unroll
        for (int c = 0; c < kChunks; ++c) multiply_add(scores[i], query[c], items[i][c]);
      }
      add_lanes(scores);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        float next = top[r];
#pragma unroll
        for (int i = r * kBatch; i < (r + 1) * kBatch; ++i) {
          scores[i] = at[i] < 0 ? -infinity() : scores[i] * scale;
          next = gpu::max(next, scores[i]);
        }
        const float base = next == -infinity() ? 0 : next, keep = exp2(top[r] - base);
        top[r] = next;
        sum[r] *= keep;
#pragma unroll
        for (int c = 0; c < kChunks; ++c)
#pragma unroll
          for (int e = 0; e < 4; ++e) out[r][c].v[e] *= keep;
#pragma unroll
        for (int i = r * kBatch; i < (r + 1) * kBatch; ++i) {
          const float probability = exp2(scores[i] - base);
          sum[r] += probability;
#pragma unroll
          for (int c = 0; c < kChunks; ++c)
#pragma unroll
            for (int e = 0; e < 4; ++e) out[r][c].v[e] += probability * items[i][c].v[e];
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int c = 0; c < kChunks; ++c)
#pragma unroll
        for (int e = 0; e < 4; ++e) out[r][c].v[e] /= sum[r];
  }

  LBR_DEVICE void compare_candidates() const {
    const RouteEncoder& candidate = l_.candidate;
    const auto exists = [&](int row) { return has_candidate(row); };
    if (p_.independent) {
      compute(
          candidate.up, candidates(), exists, [&](int, int column) { return bias_of(candidate.up, column); },
          [&](Tile& tile) {
            Float4 x[kRows][kChunks];
            pool(tile, x);
            multiply(tile, x);
          },
          [&](int row, int column, float sum) { put(candidate.inner + row * int(p_.ffn_dim) + column, gelu(sum)); });
      contract(candidate, candidates(), exists, [](int, int) { return 0.0f; });
    } else {
      encode_set(
          candidate, candidates(), exists, [&](const Tile& tile, Float4(&x)[kRows][kChunks]) { pool(tile, x); }, width_,
          [&](int row, int j) {
            const int other = row / width_ * width_ + j;
            return has_candidate(other) ? other : -1;
          });
    }
    if (!p_.mlp_score) return;
    compute(
        l_.score_up, candidates(), exists, [&](int, int column) { return bias_of(l_.score_up, column); },
        [&](Tile& tile) {
          Float4 x[kRows][kChunks];
          wait_for_rows(tile, candidate.result, x);
          if (!p_.independent) normalise(x, load(candidate.final_norm));
          multiply(tile, x);
        },
        [&](int row, int column, float sum) { put(l_.score_inner + row * dim_ + column, gelu(sum)); });
  }

  // --- Scores, log-probabilities, choices: a row to each warp, the rows dealt out to the blocks first.

  LBR_DEVICE void choose() const {
    for (int r = warp() * launch_.size + member_; r < rows_; r += kWarps * launch_.size) {
      if (states()[r] != kGood) continue;
      const int64_t b = first_row_ + r;
      const float score = score_of(r);
      const bool exists = lane() < width_ && has_candidate(r * width_ + lane());
      const unsigned all = ballot(exists);
      float log_prob = nan();
      int choice = -1;
      if (ballot(exists && score - score != 0) != 0) {
        if (lane() == 0) atomic_or(launch_.workspace.flags, kBadScore);
      } else {
        log_prob = soften(score, exists);
        choice = p_.uniforms ? draw(log_prob, all, p_.uniforms[b]) : best(log_prob, all);
      }
      if (lane() < width_) p_.log_probs[b * width_ + lane()] = log_prob;
      if (lane() == 0) p_.choice[b] = choice;
    }
  }

  // Lane k gets the score of candidate k of a row.
  LBR_DEVICE float score_of(int r) const {
    const bool normed = !p_.mlp_score && !p_.independent;
    const int buffer = p_.mlp_score ? l_.score_inner : l_.candidate.result;
    const float bias = p_.mlp_score ? weights_[l_.score_bias] : 0;
    Scale scale{};
    if (normed) scale = load(l_.candidate.final_norm);
    Float4 w[kChunks];
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      w[c] = {};
      if (element(c) < dim_) w[c] = load(weights_ + l_.score_weight + element(c));
    }
    float score = 0;
    for (int first = 0; first < width_; first += kBatch) {
      int at[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int candidate = r * width_ + first + i;
        at[i] = first + i < width_ && has_candidate(candidate) ? buffer + candidate * dim_ : -1;
      }
      Float4 items[kBatch][kChunks];
      wait_for(items, at, dim_);
      if (normed) normalise(items, scale);
      float scores[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        scores[i] = 0;
#pragma unroll
        for (int c = 0; c < kChunks; ++c) multiply_add(scores[i], w[c], items[i][c]);
      }
      add_lanes(scores);
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
        if (lane() == first + i) score = scores[i] + bias;
    }
    return score;
  }

  LBR_DEVICE float soften(float score, bool exists) const {
    float top = exists ? score : -infinity();
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) top = gpu::max(top, shuffle_xor(top, mask));
    const double difference = double(score - top) / p_.temperature;
    const double mine = exists ? gpu::exp(difference) : 0;
    double sum = 0;
    for (int k = 0; k < width_; ++k) sum = add(sum, broadcast(mine, k));
    return exists ? float(difference - gpu::log(sum)) : -infinity();
  }

  // The first of the most likely.
  LBR_DEVICE int best(float log_prob, unsigned exists) const {
    int best = -1;
    float top = 0;
    for (int k = 0; k < width_; ++k) {
      const float other = broadcast(log_prob, k);
      if (!(exists >> k & 1) || (best >= 0 && !(other > top))) continue;
      best = k;
      top = other;
    }
    return best;
  }

  // Where the sum of the probabilities first passes the uniform; if rounding keeps it from that, the last candidate of
  // positive probability.
  LBR_DEVICE int draw(float log_prob, unsigned exists, double uniform) const {
    const double mine = exists >> lane() & 1 ? gpu::exp(double(log_prob)) : 0;
    int choice = -1;
    double sum = 0;
    for (int k = 0; k < width_; ++k) {
      const double probability = broadcast(mine, k);
      if (probability <= 0 || sum > uniform) continue;
      choice = k;
      sum = add(sum, probability);
    }
    return choice;
  }

  LBR_DEVICE static float absent_value() { return float_of(kAbsent); }

  const RouteLaunch& launch_;
  const RouteParams& p_;
  const RouteLayout& l_;
  const float* const weights_;
  float* const slices_;
  const int dim_, width_, member_, group_;
  float* const floats_;           // the group's workspace
  int first_row_ = 0, rows_ = 0;  // of the batch: those at work
};

template <bool kResident, int kChunks>
LBR_KERNEL(kRouteThreads, 1)
route_kernel(LBR_PARAMETER RouteLaunch launch) {
  RouteBlock<kResident, kChunks>(launch).run();
}

}  // namespace lbr::gpu
