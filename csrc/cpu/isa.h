// The body of each isa_*.cpp: every kernel, compiled for the instruction set that the file chose.
#include "kernels.h"
#include "linear.h"
#include "packed_tree_attention.h"
#include "route.h"
#include "sample_children.h"
#include "tree_attention.h"

namespace lbr {

extern const CpuKernels LBR_KERNELS;
const CpuKernels LBR_KERNELS = {LBR_ISA::linear,
                                LBR_ISA::tree_attention,
                                LBR_ISA::packed_tree_attention,
                                LBR_ISA::packed_tree_attention_backward,
                                LBR_ISA::sample_children,
                                LBR_ISA::route};

}  // namespace lbr
