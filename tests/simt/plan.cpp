// The kernels' host side, for tests: the shapes of tree_attention's tiles, and how launches are split.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "route.h"
#include "sample_children.h"
#include "tree_attention.h"

namespace lbr::gpu::simt {

void bind(pybind11::module_& m) {
  m.def("choose_splits", &choose_splits, pybind11::arg("tiles"), pybind11::arg("key_tiles"), pybind11::arg("slots"),
        pybind11::arg("merge_cost"));
  m.def(
      "plan_route",
      [](int64_t batch, int64_t width, int64_t depth, int64_t hidden_size, int64_t dim, int64_t ffn_dim) {
        RouteParams p{};
        p.batch = batch, p.width = width, p.depth = depth, p.hidden_size = hidden_size, p.dim = dim;
        p.num_heads = 4, p.ffn_dim = ffn_dim;
        for (int64_t l = 0, layer = 1; l < depth; ++l) p.nodes += layer *= width;
        const std::string unsupported = route_unsupported(p, current_device());
        if (!unsupported.empty()) throw std::runtime_error(unsupported);
        const RoutePlan plan = plan_route(p, current_device());
        pybind11::dict result;
        result["size"] = plan.size, result["groups"] = plan.groups, result["rows"] = plan.rows;
        result["resident"] = plan.resident, result["shared_bytes"] = plan.shared_bytes;
        result["workspace"] = plan.workspace;
        return result;
      },
      pybind11::arg("batch"), pybind11::arg("width") = 3, pybind11::arg("depth") = 1,
      pybind11::arg("hidden_size") = 3584, pybind11::arg("dim") = 128, pybind11::arg("ffn_dim") = 512);
  m.def("choose_blocks", &choose_blocks, pybind11::arg("rows"), pybind11::arg("vocabulary"), pybind11::arg("resident"),
        pybind11::arg("most"));
  m.def("shared_bytes", [](int head, int rows) { return tile_shape(head, rows).shared_bytes(); });
}

}  // namespace lbr::gpu::simt
