// The kernels' host side, for tests: the shapes of tree_attention's tiles, and how launches are split.
#include <pybind11/pybind11.h>

#include "sample_children.h"
#include "tree_attention.h"

namespace lbr::gpu::simt {

void bind(pybind11::module_& m) {
  m.def("choose_splits", &choose_splits, pybind11::arg("tiles"), pybind11::arg("key_tiles"), pybind11::arg("slots"),
        pybind11::arg("merge_cost"));
  m.def("choose_blocks", &choose_blocks, pybind11::arg("rows"), pybind11::arg("vocabulary"), pybind11::arg("resident"),
        pybind11::arg("most"));
  m.def("shared_bytes", [](int head, int rows) { return tile_shape(head, rows).shared_bytes(); });
}

}  // namespace lbr::gpu::simt
