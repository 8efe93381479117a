"""route: the whole set-attention router of one decoding step, from hidden states to a choice.

Contract
--------
The function of :class:`lbr_kernels.router.Router`, on its packed weights, for inference: scores of the candidates that
exist, softmax at a temperature, and one draw (or the argmax). fp32 throughout, whatever the hidden states' dtype.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lbr_kernels.ops import _preferences, _registry
from lbr_kernels.ops._checks import Axis, Checker, has_values, number
from lbr_kernels.ops.tree_shape import num_slots, path_masks, path_slots


class RouterWeights(NamedTuple):
    """A router's parameters in one fp32 vector, in the order of :func:`weight_shapes`, and its shape."""

    data: Tensor
    hidden_size: int
    depth: int
    dim: int
    num_heads: int
    ffn_dim: int
    mlp_score: bool
    independent: bool
    input_norm: bool


def weight_shapes(
    hidden_size: int, depth: int, dim: int, ffn_dim: int, mlp_score: bool, independent: bool, input_norm: bool
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the packed parameters, in order. Matrices are ``[in, out]``, each followed by its bias."""

    def linear(name: str, d_in: int, d_out: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (d_in, d_out), f"{name}.bias": (d_out,)}

    def norm(name: str, size: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (size,), f"{name}.bias": (size,)}

    def mlp(name: str, d_hidden: int, d_out: int) -> dict[str, tuple[int, ...]]:
        return linear(f"{name}.0", dim, d_hidden) | linear(f"{name}.2", d_hidden, d_out)

    def encoder(name: str) -> dict[str, tuple[int, ...]]:
        return (
            norm(f"{name}.layer.norm1", dim)
            | linear(f"{name}.layer.self_attn.in_proj", dim, 3 * dim)
            | linear(f"{name}.layer.self_attn.out_proj", dim, dim)
            | norm(f"{name}.layer.norm2", dim)
            | linear(f"{name}.layer.linear1", dim, ffn_dim)
            | linear(f"{name}.layer.linear2", ffn_dim, dim)
            | norm(f"{name}.norm", dim)
        )

    return (
        (norm("input_norm", hidden_size) if input_norm else {})
        | {"in_proj.weight": (hidden_size, dim), "depth_embed": (depth, dim), "cls": (dim,)}
        | encoder("path_encoder")
        | encoder("subtree_attention")
        | {"pool_query": (dim,)}
        | (mlp("candidate_mlp", ffn_dim, dim) if independent else encoder("candidate_attention"))
        | (mlp("score", dim, 1) if mlp_score else {"score.weight": (dim, 1)})
    )


def route(
    hidden: Tensor,
    weights: RouterWeights,
    *,
    width: int,
    depth: int,
    temperature: float = 1.0,
    uniforms: Tensor | None = None,
    valid: Tensor | None = None,
    active: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose a depth-1 subtree in every row (paper, section 3, stage 2, and appendix A.4).

    Args:
        hidden: ``[B, T, D]``, fp32, fp16 or bf16: the tree's T = sum width**l slots in level order.
        weights: ``Router.packed()``, made for this hidden size D and this depth.
        width, depth: the tree's K and L.
        temperature: the routing temperature, > 0.
        uniforms: fp64 ``[B]`` in [0, 1), the draw; without it the most likely candidate, ties to the first.
        valid: bool ``[B, T]``, dense: slots that hold a node. A node needs its parent, and a parent's children fill
            its slots from the first on. Other slots are not read.
        active: bool ``[B]``: rows to decide; the others are not read.
        backend: see ``ops.backends()``.

    Returns:
        fp32 log-probabilities ``[B, K]`` (-inf for candidates that do not exist, uniform for inactive rows) and the
        choice, int64 ``[B]``, -1 for inactive rows.

    Raises:
        RuntimeError: a shape, dtype, device, stride or value is not as above, or the weights are for another hidden
            size or depth.
    """
    check = Checker("route")
    packed = isinstance(weights, RouterWeights)
    check(packed, f"weights is a {type(weights).__name__}, expected RouterWeights: what Router.packed() gives")
    check(
        hidden.dim() != 3 or hidden.shape[2] == weights.hidden_size,
        f"hidden has shape {list(hidden.shape)}, expected [B, T, {weights.hidden_size}]: "
        f"the router was made for hidden size {weights.hidden_size}",
    )
    check(depth == weights.depth, f"depth is {depth}, expected {weights.depth}: the router was made for that depth")
    result: tuple[Tensor, Tensor] = _registry.call(
        "route", backend, hidden, hidden, weights.data, width, depth, *weights[3:],
        temperature=temperature, uniforms=uniforms, valid=valid, active=active,
        prefer=lambda: gpu_backends(weights, width, depth),
    )  # fmt: skip
    return result


def gpu_backends(weights: RouterWeights, width: int, depth: int) -> tuple[str, ...]:
    """The backends that take such a router on a GPU, the fastest first; csrc/cuda/route.cu refuses in words."""
    head = weights.dim // weights.num_heads
    taken = (
        width <= 32
        and depth <= 255
        and weights.dim % 4 == 0
        and weights.dim <= 256
        and head in (4, 8, 16, 32, 64, 128)
        and weights.ffn_dim % 4 == 0
        and num_slots(width, depth) <= _MOST_SLOTS
    )
    return tuple(name for name in _preferences.of_op("route") if name != "cuda" or taken)


# A row's tables, ten bytes for a slot and as many paths, fit the shared memory of every GPU with compute capability 8.
_MOST_SLOTS = 8192


@_registry.reference("route")
def route_ref(
    hidden: Tensor,
    weights: Tensor,
    width: int,
    depth: int,
    dim: int,
    num_heads: int,
    ffn_dim: int,
    mlp_score: bool,
    independent: bool,
    input_norm: bool,
    *,
    temperature: float = 1.0,
    uniforms: Tensor | None = None,
    valid: Tensor | None = None,
    active: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The specification, in plain PyTorch: fp32 inside, fp64 for fp64 weights."""
    check_arguments(
        hidden, weights, width, depth, dim, num_heads, ffn_dim, mlp_score, independent, input_norm,
        temperature=temperature, uniforms=uniforms, valid=valid, active=active,
    )  # fmt: skip
    check = Checker("route")
    device = hidden.device
    B, T, D = hidden.shape
    shapes = weight_shapes(D, depth, dim, ffn_dim, mlp_score, independent, input_norm)
    sizes = [math.prod(shape) for shape in shapes.values()]
    dtype = torch.float64 if weights.dtype == torch.float64 else torch.float32
    check.in_range("uniforms", uniforms, 0, math.nextafter(1, 0), "0 <= u < 1")
    if active is None:
        active = torch.ones(B, dtype=torch.bool, device=device)
    if valid is None:
        valid = torch.ones(B, T, dtype=torch.bool, device=device)
    _check_valid(check, valid, active, width)

    parts = [part.view(shape) for part, shape in zip(weights.split(sizes), shapes.values(), strict=True)]
    w = dict(zip(shapes, parts, strict=True))
    on_path, path_exists = path_masks(valid & active[:, None], width, depth)
    candidate_exists = on_path[:, :, 0, 0]
    paths = path_slots(width, depth, device)
    M = paths.shape[1]

    states = torch.where((valid & active[:, None])[..., None], hidden, 0).to(dtype)
    if input_norm:
        states = torch.nn.functional.layer_norm(states, (D,), w["input_norm.weight"], w["input_norm.bias"])
    embedded = (states @ w["in_proj.weight"])[:, paths] + w["depth_embed"]
    sequence = torch.cat([w["cls"].expand(B, width, M, 1, dim), embedded], dim=3)
    seen = torch.cat([torch.ones_like(on_path[..., :1]), on_path], dim=3)
    rollouts = _encode(w, "path_encoder", num_heads, sequence, seen)[..., 0, :]
    rollouts = _encode(w, "subtree_attention", num_heads, rollouts, path_exists)
    pool = (rollouts @ w["pool_query"] / dim**0.5).masked_fill(~path_exists, -torch.inf).softmax(-1).nan_to_num(0)
    candidates = (pool[..., None, :] @ rollouts)[..., 0, :]
    if independent:
        candidates = _mlp(w, "candidate_mlp", candidates)
    else:
        candidates = _encode(w, "candidate_attention", num_heads, candidates, candidate_exists)
    scores = _mlp(w, "score", candidates) if mlp_score else candidates @ w["score.weight"]
    scores = scores[..., 0]
    if has_values(scores):
        bad = (candidate_exists & ~scores.isfinite()).any(-1).nonzero()
        row = int(bad[0]) if len(bad) else None
        check(
            row is None, f"hidden row {row} has a score that is not finite, expected finite hidden states and weights"
        )
    log_probs = routing_log_probs(scores, candidate_exists, active, temperature)

    probability = log_probs.double().exp()
    if uniforms is None:
        choice = log_probs.argmax(-1)
    else:
        reached = (probability.cumsum(-1) > uniforms[:, None]) & (probability > 0)
        index = torch.arange(width, device=device)
        last = torch.where(probability > 0, index, -1).amax(-1)
        choice = torch.where(reached.any(-1), reached.int().argmax(-1), last)
    return log_probs, torch.where(active, choice, -1)


def check_arguments(
    hidden: Tensor,
    weights: Tensor,
    width: int,
    depth: int,
    dim: int,
    num_heads: int,
    ffn_dim: int,
    mlp_score: bool,
    independent: bool,
    input_norm: bool,
    *,
    temperature: float = 1.0,
    uniforms: Tensor | None = None,
    valid: Tensor | None = None,
    active: Tensor | None = None,
) -> None:
    """All that is refused but for values of tensors; in C++ that is csrc/route.h."""
    check = Checker("route")
    device = hidden.device
    check(width >= 1, f"width is {width}, expected an integer >= 1")
    check(depth >= 1, f"depth is {depth}, expected an integer >= 1")
    T = num_slots(width, depth)
    check.shape("hidden", hidden, (Axis("B"), Axis("T", T), Axis("D")))
    check.floating("hidden", hidden)
    check.last_contiguous("hidden", hidden)
    B, _, D = hidden.shape
    check(
        dim >= 1 and ffn_dim >= 1 and num_heads >= 1 and dim % num_heads == 0,
        f"dim is {dim}, expected a multiple of num_heads = {num_heads}",
    )
    shapes = weight_shapes(D, depth, dim, ffn_dim, mlp_score, independent, input_norm)
    sizes = [math.prod(shape) for shape in shapes.values()]
    dtype = torch.float64 if weights.dtype == torch.float64 else torch.float32
    check.side_input("weights", weights, dtype, (Axis("parameters", sum(sizes)),), device)
    check(
        0 < temperature < math.inf,
        f"temperature is {number(float(temperature))}, expected a finite number > 0",
    )
    check.side_input("uniforms", uniforms, torch.float64, (Axis("B", B),), device)
    check.side_input("valid", valid, torch.bool, (Axis("B", B), Axis("T", T)), device)
    check(valid is None or valid.is_contiguous(), "valid is not contiguous, expected a dense tensor")
    check.side_input("active", active, torch.bool, (Axis("B", B),), device)


def routing_log_probs(scores: Tensor, exists: Tensor, active: Tensor, temperature: float) -> Tensor:
    """Log-softmax of ``scores / temperature`` over the candidates that exist; all arguments but the last ``[B, K]``.

    Differences are divided, in fp64, so that a small temperature makes the best candidate certain and not NaN. Rows
    that are not active are uniform.
    """
    scores = scores.masked_fill(~exists, -torch.inf)
    scores = torch.where(active[:, None], scores, 0)
    differences = (scores - scores.detach().amax(-1, keepdim=True)).double()
    return (differences / temperature).log_softmax(-1).to(scores.dtype)


def _check_valid(check: Checker, valid: Tensor, active: Tensor, width: int) -> None:
    if not has_values(valid):
        return
    for b in active.nonzero()[:, 0].tolist():
        row = valid[b].tolist()
        check(any(row[:width]), f"valid row {b} has no candidate, expected at least one in an active row")
        for node in range(width, len(row)):
            if not row[node]:
                continue
            parent = (node - width) // width
            check(row[parent], f"valid[{b}, {node}] is set, expected its parent's to be set too")
            first = (node - width) % width == 0
            check(first or row[node - 1], f"valid[{b}, {node}] is set, expected the sibling before it to be set too")


def _linear(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"] + w[f"{name}.bias"]


def _mlp(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return _linear(w, f"{name}.2", torch.nn.functional.gelu(_linear(w, f"{name}.0", x)))


def _norm(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return torch.nn.functional.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])


def _encode(w: dict[str, Tensor], name: str, num_heads: int, x: Tensor, exists: Tensor) -> Tensor:
    """A pre-LN encoder layer and its closing LayerNorm; ``x`` ``[..., items, dim]``, ``exists`` ``[..., items]``."""
    dim = x.shape[-1]
    qkv = _linear(w, f"{name}.layer.self_attn.in_proj", _norm(w, f"{name}.layer.norm1", x))
    q, k, v = qkv.unflatten(-1, (3, num_heads, dim // num_heads)).movedim(-2, -4).unbind(-2)
    scores = (q @ k.mT / (dim // num_heads) ** 0.5).masked_fill(~exists[..., None, None, :], -torch.inf)
    mixed = (scores.softmax(-1).nan_to_num(0) @ v).movedim(-3, -2).flatten(-2)
    x = x + _linear(w, f"{name}.layer.self_attn.out_proj", mixed)
    ffn = torch.nn.functional.gelu(_linear(w, f"{name}.layer.linear1", _norm(w, f"{name}.layer.norm2", x)))
    return _norm(w, f"{name}.norm", x + _linear(w, f"{name}.layer.linear2", ffn))
