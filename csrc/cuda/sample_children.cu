// The host's side of sample_children and top_children: how a launch is cut into blocks.
#include <algorithm>

#include "sample_children.cuh"

namespace lbr::gpu {
namespace {

using Shape = SampleChildrenBlockShape;
using Kernel = void (*)(SampleChildrenLaunch);

Kernel kernel_for(DType dtype) {
  switch (dtype) {
    case DType::kFloat16: return sample_children_kernel<Half>;
    case DType::kBFloat16: return sample_children_kernel<BFloat16>;
    default: return sample_children_kernel<float>;
  }
}

}  // namespace

int choose_blocks(int64_t rows, int64_t vocabulary, int resident, int64_t most) {
  // Time in tokens of one block: those of its part, what a row costs whatever its size, and for blocks that meet what
  // waiting for each other takes, a little more with each of them.
  constexpr int64_t kLeastTokens = 2048, kRowCost = 4096, kMeetingCost = 4096, kMemberCost = 64;
  const int64_t parts = (vocabulary + kLeastTokens - 1) / kLeastTokens;
  int best = 1;
  int64_t least = 0;
  for (int blocks = 1; blocks <= std::max<int64_t>(std::min<int64_t>({parts, resident, most}), 1); ++blocks) {
    const int64_t groups = resident / blocks, rounds = (rows + groups - 1) / groups;
    const int64_t part = (vocabulary + blocks - 1) / blocks, meeting = kMeetingCost + kMemberCost * blocks;
    const int64_t time = rounds * (part + kRowCost + (blocks > 1 ? meeting : 0));
    if (blocks > 1 && time >= least) continue;
    best = blocks;
    least = time;
  }
  return best;
}

SampleChildrenPlan plan_sample_children(const SampleChildrenParams& p) {
  const int resident = resident_blocks(kernel_for(p.dtype), Shape::kThreads, int(sizeof(Shape::Shared)));
  const bool top = p.uniforms == nullptr;
  const int64_t most = top ? Shape::kCandidates / p.width : resident;
  SampleChildrenPlan plan{choose_blocks(p.rows, p.vocab, resident, most), 0, 0, 0};
  plan.groups = int(std::min<int64_t>(p.rows, resident / plan.blocks));
  if (plan.blocks > 1) {
    const bool cut = p.row_filters || p.filters.top_k > 0 || p.filters.top_p < 1;
    plan.words = 2 + (top ? int(p.width) : 0);
    plan.counters = Shape::kCounterLine + (cut ? Shape::kHistograms * Shape::kBins * 2 : 0);
  }
  return plan;
}

void require_sample_children() {
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) require_kernel(kernel_for(dtype));
}

void sample_children(const SampleChildrenParams& params, const SampleChildrenPlan& plan,
                     const SampleChildrenWorkspace& workspace, Stream stream) {
  const SampleChildrenLaunch launch{params, plan, workspace};
  const Grid grid{unsigned(plan.blocks * plan.groups)};
  const Kernel kernel = kernel_for(params.dtype);
  const int shared_bytes = int(sizeof(Shape::Shared));
  if (plan.blocks > 1) {
    launch_cooperative(kernel, grid, Shape::kThreads, shared_bytes, stream, launch);
  } else {
    gpu::launch(kernel, grid, Shape::kThreads, shared_bytes, stream, launch);
  }
}

}  // namespace lbr::gpu
