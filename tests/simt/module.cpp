// The Python module around kernels that are built on the shim: `configure`, and what the kernels' own sources add.
//
// Ops that the other sources register with torch are there once the module is imported. A source that wants functions
// in the module itself defines lbr::gpu::simt::bind.
#include <pybind11/pybind11.h>

#include "primitives.cuh"

namespace lbr::gpu::simt {
__attribute__((weak)) void bind(pybind11::module_& module);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  using namespace pybind11::literals;
  namespace simt = lbr::gpu::simt;
  module.def(
      "configure",
      [](uint64_t seed, int multiprocessors, int resident_blocks, int shared_bytes_per_multiprocessor,
         int shared_bytes_per_block, uint64_t first_launch, int without) {
        if (resident_blocks < 1) throw pybind11::value_error("configure: resident_blocks must be at least 1");
        simt::configure({seed,
                         first_launch,
                         resident_blocks,
                         {multiprocessors, shared_bytes_per_multiprocessor, shared_bytes_per_block},
                         without});
      },
      "seed"_a = 0, "multiprocessors"_a = 3, "resident_blocks"_a = 3, "shared_bytes_per_multiprocessor"_a = 233472,
      "shared_bytes_per_block"_a = 232448, "first_launch"_a = 0, "without"_a = 0,
      "Sets the device that kernels see and what all randomness is drawn from; launches count from first_launch "
      "again. Barriers, commits and waits of copies on line `without` of a kernel do nothing.");
  if (simt::bind != nullptr) simt::bind(module);
}
