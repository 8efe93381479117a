// The host's side of route: what is supported, where everything lies, and how many blocks share the work.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <sstream>

#include "route.cuh"
#include "route.h"

namespace lbr::gpu {
namespace {

constexpr int kMostBlocks = 128;   // as many as the narrowest layers of the paper's router have columns
constexpr int kFewestBlocks = 16;  // of a group, where there are several
constexpr int kMostGroups = 8;
constexpr int64_t kGroupPaths = 64;  // that make another group worth reading the weights once more
constexpr int64_t kRoundNodes = 1024;
constexpr int64_t kMostFloats = INT32_MAX;
constexpr int kMostWidth = kWarpSize, kMostDepth = UINT8_MAX;
constexpr int kMostDim = 2 * kRouteInputs;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Ranges follow from the hidden size alone, so that neither batch nor device changes a bit of a row's result.
int num_ranges(int64_t hidden_size) { return hidden_size >= 1024 ? 4 : 1; }

// Hands out what comes one after the other: parameters, shared memory, the workspace.
class Cursor {
 public:
  int take(int64_t count) {
    const int64_t at = next_;
    next_ += count;
    return int(at);
  }
  int64_t end() const { return next_; }

 private:
  int64_t next_ = 0;
};

struct Sized {
  RouteLayout layout;
  int64_t weights, floats, shared_bytes;
  bool resident;
};

// Everything for groups of `size` blocks that take `rows` rows at a time. Sizes are right even where offsets overflow.
class Layouter {
 public:
  Layouter(const RouteParams& p, const Device& device, int64_t size, int64_t rows) : p_(p), size_(size) {
    l_.nodes = int(p.nodes);
    l_.paths = 1;
    for (int64_t layer = 0; layer < p.depth; ++layer) l_.paths *= int(p.width);
    l_.leaves = l_.paths / int(p.width);
    read_weights();
    lay_out_workspace(rows * l_.nodes, rows * l_.paths, rows * p.width);
    l_.slices = int(shared_.end());
    // Whether a node exists, how long a path is, a row's state, the mean and scale of a node's hidden state.
    const int64_t tables = rows * (4 + l_.nodes + l_.paths) + (p.input_norm ? 8 * rows * l_.nodes : 0);
    l_.flag_bytes = int(ceil_div(tables, 16) * 16);
    resident_ = shared_.end() * 4 + l_.flag_bytes <= device.shared_bytes_per_block;
    if (!resident_) l_.slices = 0;
  }

  Sized result() const {
    const int64_t shared = (resident_ ? shared_.end() * 4 : 0) + l_.flag_bytes;
    return {l_, weights_.end(), workspace_.end(), shared, resident_};
  }

 private:
  RouteNorm norm(int64_t size) {
    const int weight = weights_.take(size);
    return {weight, weights_.take(size)};
  }
  // `outputs` of the `stride` columns of a matrix, from `first` on.
  RouteLayer part(int weight, int bias, int64_t first, int64_t inputs, int64_t outputs, int64_t stride) {
    const int64_t columns = ceil_div(outputs, size_);
    return {int(weight + first), bias < 0 ? -1 : int(bias + first), int(stride), int(inputs), int(outputs),
            int(columns),        shared_.take(columns * inputs)};
  }
  RouteLayer dense(int64_t inputs, int64_t outputs) {
    const int weight = weights_.take(inputs * outputs);
    return part(weight, weights_.take(outputs), 0, inputs, outputs, outputs);
  }
  RouteEncoder encoder(RouteLayer* query) {
    RouteEncoder e{};
    e.attention_norm = norm(p_.dim);
    const int weight = weights_.take(3 * p_.dim * p_.dim), bias = weights_.take(3 * p_.dim);
    const int64_t apart = query ? p_.dim : 0;
    if (query) *query = part(weight, bias, 0, p_.dim, p_.dim, 3 * p_.dim);
    e.project = part(weight, bias, apart, p_.dim, 3 * p_.dim - apart, 3 * p_.dim);
    e.out = dense(p_.dim, p_.dim);
    e.ffn_norm = norm(p_.dim);
    e.up = dense(p_.dim, p_.ffn_dim);
    e.down = dense(p_.ffn_dim, p_.dim);
    e.final_norm = norm(p_.dim);
    return e;
  }

  void read_weights() {
    RouteProjection& in = l_.in;
    if (p_.input_norm) in.norm = norm(p_.hidden_size);
    in.weight = weights_.take(p_.hidden_size * p_.dim);
    in.ranges = num_ranges(p_.hidden_size);
    in.range_inputs = int(ceil_div(ceil_div(p_.hidden_size, in.ranges), 4) * 4);
    in.column_tiles = int(ceil_div(p_.dim, kRouteColumns));
    in.pieces = int(ceil_div(int64_t(in.column_tiles) * in.ranges, size_));
    in.slice = shared_.take(int64_t(in.pieces) * kRouteColumns * in.range_inputs);
    l_.depth_embed = weights_.take(p_.depth * p_.dim);
    l_.cls = weights_.take(p_.dim);
    l_.path = encoder(&l_.cls_query);
    l_.subtree = encoder(nullptr);
    l_.pool_query = weights_.take(p_.dim);
    if (p_.independent) {
      l_.candidate.up = dense(p_.dim, p_.ffn_dim);
      l_.candidate.down = dense(p_.ffn_dim, p_.dim);
    } else {
      l_.candidate = encoder(nullptr);
    }
    if (p_.mlp_score) l_.score_up = dense(p_.dim, p_.dim);
    l_.score_weight = weights_.take(p_.dim);
    l_.score_bias = p_.mlp_score ? weights_.take(1) : -1;
  }

  void buffers(RouteEncoder& e, int64_t items, bool attends) {
    if (attends) {
      e.tokens = workspace_.take(items * p_.dim);
      e.projected = workspace_.take(items * 3 * p_.dim);
      e.attended = workspace_.take(items * p_.dim);
    }
    e.inner = workspace_.take(items * p_.ffn_dim);
    e.result = workspace_.take(items * p_.dim);
  }

  void lay_out_workspace(int64_t nodes, int64_t paths, int64_t candidates) {
    l_.in.partial = workspace_.take(l_.in.ranges * nodes * p_.dim);
    l_.awaited = int(workspace_.end());
    l_.cls_projected = workspace_.take(p_.dim);
    l_.path.projected = workspace_.take((nodes + 1) * 2 * p_.dim);
    l_.path.attended = workspace_.take(paths * p_.dim);
    buffers(l_.path, paths, false);
    buffers(l_.subtree, paths, true);
    buffers(l_.candidate, candidates, !p_.independent);
    if (p_.mlp_score) l_.score_inner = workspace_.take(candidates * p_.dim);
    l_.floats = int(workspace_.end());
  }

  const RouteParams& p_;
  const int64_t size_;
  RouteLayout l_{};
  Cursor weights_, shared_, workspace_;
  bool resident_ = false;
};

int most_blocks(const Device& device) { return std::min(device.multiprocessors, kMostBlocks); }

int64_t rows_at_a_time(const RouteParams& p, int64_t rows) {
  return std::clamp<int64_t>(kRoundNodes / p.nodes, 1, std::max<int64_t>(rows, 1));
}

bool aligned_to_four(const RouteParams& p) {
  const int64_t bytes = p.dtype == DType::kFloat32 ? 16 : 8;
  return reinterpret_cast<uintptr_t>(p.hidden) % bytes == 0 && p.hidden_size % 4 == 0 && p.hidden_stride[0] % 4 == 0 &&
         p.hidden_stride[1] % 4 == 0;
}

template <bool kResident, int kChunks>
void launch_kernel(const RouteLaunch& launch, const RoutePlan& plan, Stream stream) {
  launch_cooperative(route_kernel<kResident, kChunks>, Grid{unsigned(plan.size * plan.groups)}, kRouteThreads,
                     plan.shared_bytes, stream, launch);
}

}  // namespace

std::string route_unsupported(const RouteParams& p, const Device& device) {
  std::ostringstream text;
  const int64_t head = p.dim / p.num_heads;
  if (p.width > kMostWidth) {
    text << "width is " << p.width << ", expected at most " << kMostWidth;
  } else if (p.dim % 4 != 0 || p.dim > kMostDim) {
    text << "dim is " << p.dim << ", expected a multiple of 4 up to " << kMostDim;
  } else if (head % 4 != 0 || (head & (head - 1)) != 0 || head > kRouteInputs) {
    text << "num_heads is " << p.num_heads << ", which makes heads of " << head
         << ", expected a power of two from 4 to " << kRouteInputs;
  } else if (p.ffn_dim % 4 != 0) {
    text << "ffn_dim is " << p.ffn_dim << ", expected a multiple of 4";
  } else if (p.depth > kMostDepth) {
    text << "depth is " << p.depth << ", expected at most " << kMostDepth;
  } else if (p.nodes > device.shared_bytes_per_block) {
    text << "hidden has " << p.nodes << " nodes in a row, expected at most " << device.shared_bytes_per_block
         << " on this device";
  } else {
    const Sized sized = Layouter(p, device, most_blocks(device), 1).result();
    if (sized.shared_bytes > device.shared_bytes_per_block) {
      text << "hidden has " << p.nodes << " nodes in a row, which take " << sized.shared_bytes
           << " bytes of shared memory, expected at most " << device.shared_bytes_per_block << " on this device";
    } else if (sized.weights > kMostFloats || sized.floats > kMostFloats) {
      text << "weights has " << sized.weights << " elements and a row's activations " << sized.floats
           << ", expected at most " << kMostFloats;
    }
  }
  return text.str();
}

RoutePlan plan_route(const RouteParams& p, const Device& device) {
  const int blocks = most_blocks(device);
  int64_t paths = p.batch;
  for (int64_t layer = 0; layer < p.depth; ++layer) paths *= p.width;
  for (int groups = kMostGroups; true; groups /= 2) {
    const int size = blocks / groups;
    const bool worth_it = paths >= groups * kGroupPaths && p.batch >= groups && size >= kFewestBlocks;
    if (groups > 1 && !worth_it) continue;
    const int64_t rows = rows_at_a_time(p, ceil_div(p.batch, groups));
    const Sized sized = Layouter(p, device, size, rows).result();
    // More rows at a time than a device's shared memory has tables for are no reason to refuse.
    if (sized.shared_bytes > device.shared_bytes_per_block || sized.floats > kMostFloats) {
      if (groups > 1) continue;
      const Sized one = Layouter(p, device, size, 1).result();
      return {size, 1, 1, one.resident, int(one.shared_bytes), one.floats, one.layout};
    }
    if (groups > 1 && !sized.resident) continue;
    return {size, groups, int(rows), sized.resident, int(sized.shared_bytes), sized.floats * groups, sized.layout};
  }
}

void require_route() {
  require_kernel(route_kernel<true, 1>);
  require_kernel(route_kernel<false, 1>);
  require_kernel(route_kernel<true, 2>);
  require_kernel(route_kernel<false, 2>);
}

void route(const RouteParams& params, const RoutePlan& plan, const RouteWorkspace& workspace, Stream stream) {
  RouteLaunch launch{};
  launch.params = params;
  launch.workspace = workspace;
  launch.size = plan.size;
  launch.group_rows = int(ceil_div(params.batch, plan.groups));
  launch.rows = plan.rows;
  launch.workspace_stride = plan.layout.floats;
  launch.uniform_log_prob = -std::log(float(params.width));
  launch.hidden_aligned = aligned_to_four(params);
  launch.layout = plan.layout;
  const bool narrow = params.dim <= kRouteInputs;
  if (plan.resident)
    return narrow ? launch_kernel<true, 1>(launch, plan, stream) : launch_kernel<true, 2>(launch, plan, stream);
  return narrow ? launch_kernel<false, 1>(launch, plan, stream) : launch_kernel<false, 2>(launch, plan, stream);
}

}  // namespace lbr::gpu
