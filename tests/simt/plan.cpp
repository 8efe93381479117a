// The host's side of tree_attention, for tests: the shapes of tiles, and how a launch is split.
#include <pybind11/pybind11.h>

#include "tree_attention.h"

namespace lbr::gpu::simt {

void bind(pybind11::module_& m) {
  m.def("choose_splits", &choose_splits, pybind11::arg("tiles"), pybind11::arg("key_tiles"), pybind11::arg("slots"),
        pybind11::arg("merge_cost"));
  m.def("shared_bytes", [](int head, int rows) { return tile_shape(head, rows).shared_bytes(); });
}

}  // namespace lbr::gpu::simt
