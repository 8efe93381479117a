"""Tree attention on a GPU: the shapes, the problems made of them, and every way of computing them.

Contract
--------
A :class:`Side` is made for a :class:`Problem` and then computes ``[B, Hq, N, D]`` from one set of query, keys and
values ``[B, H, S, D]``, of which ``prefix + T`` slots are in use and the rest is NaN. All rows have one length and one
tree, which the other sides may build into their masks; ours are told both in tensors. What a side prepares once for a
shape (a block mask, a plan) it prepares outside of what is timed, and says how long that took. :func:`relative_error`
is against the reference in fp32.

The keys of the tree point where the queries do, so that a node weighs about as much as the whole prefix: of random keys
behind 128k slots nobody would notice that a mask is wrong.
"""

from __future__ import annotations

import functools
import importlib
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from lbr_kernels import ops
from lbr_kernels.ops.tree_shape import num_slots

Compute = Callable[[Tensor, Tensor, Tensor], Tensor]

KIBI = 1024
SPARE_SLOTS = 64  # of a cache, behind the tree
FEW_NODES = 12  # up to which the two-pass sides need no matrix product for the tree
TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 1e-4}
"""The largest relative error of one head's output at one node: bf16 rounds weights and results, to 2^-9 each."""


@dataclass(frozen=True)
class Shape:
    """Batch, committed slots, the full tree (all of its nodes are queries), query heads/key heads, head size."""

    batch: int
    prefix: int
    width: int
    depth: int
    heads: int
    kv_heads: int
    head_size: int = 128

    @property
    def nodes(self) -> int:
        return num_slots(self.width, self.depth)

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def rows(self) -> int:
        """Query rows for each key head: what is computed for each byte that is read."""
        return self.nodes * self.group

    def cache_bytes(self, dtype: torch.dtype) -> int:
        """Keys and values in use, of one layer."""
        slots = self.prefix + self.nodes
        return 2 * self.batch * self.kv_heads * slots * self.head_size * dtype.itemsize

    def bytes(self, dtype: torch.dtype) -> int:
        """What has to be moved at least: keys, values and queries once, and the output."""
        return self.cache_bytes(dtype) + 2 * self.batch * self.heads * self.nodes * self.head_size * dtype.itemsize

    def flops(self) -> int:
        return 4 * self.batch * self.heads * self.nodes * (self.prefix + self.nodes) * self.head_size

    def describe(self) -> dict[str, int]:
        """For a record."""
        return {**asdict(self), "nodes": self.nodes, "rows": self.rows}

    def __str__(self) -> str:
        prefix = f"{self.prefix // KIBI}k" if self.prefix % KIBI == 0 else str(self.prefix)
        return f"batch {self.batch}, prefix {prefix}, nodes {self.nodes}, heads {self.heads}/{self.kv_heads}"


def _shape(batch: int, prefix: int, depth: int, heads: str, *, width: int = 3, head_size: int = 128) -> Shape:
    query_heads, kv_heads = map(int, heads.split("/"))
    return Shape(batch, prefix, width, depth, query_heads, kv_heads, head_size)


# Every pair of values of two axes occurs. The longest run stands last, so that a run that is cut short lacks them.
SHAPES = [
    _shape(1, 1 * KIBI, 1, "32/8"),
    _shape(1, 8 * KIBI, 1, "28/4"),
    _shape(1, 32 * KIBI, 1, "32/8"),
    _shape(8, 8 * KIBI, 1, "32/8"),
    _shape(1, 8 * KIBI, 2, "32/8"),
    _shape(64, 8 * KIBI, 1, "32/8"),
    _shape(8, 32 * KIBI, 2, "32/8"),
    _shape(1, 128 * KIBI, 1, "32/8"),
    _shape(1, 1 * KIBI, 2, "28/4"),
    _shape(1, 1 * KIBI, 3, "32/8"),
    _shape(8, 8 * KIBI, 3, "28/4"),
    _shape(64, 1 * KIBI, 3, "28/4"),
    _shape(64, 8 * KIBI, 2, "28/4"),
    _shape(1, 8 * KIBI, 3, "32/8"),
    _shape(8, 1 * KIBI, 1, "28/4"),
    _shape(8, 1 * KIBI, 2, "32/8"),
    _shape(1, 32 * KIBI, 3, "28/4"),
    _shape(1, 128 * KIBI, 2, "28/4"),
    _shape(1, 128 * KIBI, 3, "32/8"),
    _shape(64, 32 * KIBI, 1, "28/4"),
    _shape(8, 128 * KIBI, 1, "32/8"),
    _shape(64, 128 * KIBI, 1, "32/8"),
]
QUICK = [SHAPES[0], SHAPES[2], SHAPES[3], SHAPES[4]]
DRY = [
    _shape(1, 40, 1, "4/2", head_size=16),
    _shape(2, 33, 2, "7/1", head_size=16),
    _shape(2, 24, 3, "4/4", head_size=32),
]


def full_tree(width: int, depth: int) -> Tensor:
    """Which nodes a node of the full tree sees, itself included: bool ``[T, T]``."""
    T = num_slots(width, depth)
    sees = torch.eye(T, dtype=torch.bool)
    for node in range(width, T):
        sees[node] |= sees[(node - width) // width]
    return sees


def mask_words(sees: Tensor) -> Tensor:
    """A boolean ``[T, T]`` as ``ancestors`` ``[1, T, ceil(T/64)]``."""
    T = sees.shape[0]
    words = torch.zeros(1, T, (T + 63) // 64, dtype=torch.int64)
    for node in range(T):
        words[0, :, node // 64] |= sees[:, node].long() << (node % 64)
    return words


@dataclass(frozen=True)
class Problem:
    """One shape's data: sets of query, keys and values that are used in turn, lengths, and the tree."""

    shape: Shape
    sets: list[tuple[Tensor, Tensor, Tensor]]
    prefix_lens: Tensor
    sees: Tensor
    ancestors: Tensor

    @property
    def device(self) -> torch.device:
        return self.sees.device

    @property
    def dtype(self) -> torch.dtype:
        return self.sets[0][0].dtype

    @property
    def used(self) -> int:
        """The slots in use."""
        return self.shape.prefix + self.shape.nodes

    def visible(self) -> Tensor:
        """The dense mask, bool ``[N, prefix + T]``."""
        prefix = self.sees.new_ones(self.shape.nodes, self.shape.prefix)
        return torch.cat([prefix, self.sees], dim=1)

    def folded(self, query: Tensor) -> Tensor:
        """``[B, Hk, group * N, D]``: the query heads of a key head, one after the other."""
        shape = self.shape
        return query.view(shape.batch, shape.kv_heads, shape.rows, shape.head_size)


def set_bytes(shape: Shape, dtype: torch.dtype) -> int:
    """What one set occupies."""
    slots = shape.prefix + shape.nodes + SPARE_SLOTS
    per_slot = 2 * shape.batch * shape.kv_heads * shape.head_size * dtype.itemsize
    return slots * per_slot + shape.batch * shape.heads * shape.nodes * shape.head_size * dtype.itemsize


def make_problem(shape: Shape, count: int, device: torch.device, dtype: torch.dtype, seed: int) -> Problem:
    """``count`` sets of random data."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=dtype)

    B, Hk, D, N = shape.batch, shape.kv_heads, shape.head_size, shape.nodes
    used = shape.prefix + N
    # exp(length ** 2 * D ** -0.5) is the prefix's length: a node's weight is about that of the whole prefix.
    length = math.sqrt(math.log(shape.prefix) * math.sqrt(D))
    sets = []
    for _ in range(count):
        direction = torch.nn.functional.normalize(normal(B, Hk, 1, D).float(), dim=-1).to(dtype) * length
        query = normal(B, Hk, shape.rows, D).add_(direction).view(B, shape.heads, N, D)
        keys, values = normal(B, Hk, used + SPARE_SLOTS, D), normal(B, Hk, used + SPARE_SLOTS, D)
        keys[:, :, shape.prefix : used] += direction
        keys[:, :, used:] = values[:, :, used:] = torch.nan
        sets.append((query, keys, values))
    sees = full_tree(shape.width, shape.depth)
    lens = torch.full((B,), shape.prefix, dtype=torch.int32, device=device)
    return Problem(shape, sets, lens, sees.to(device), mask_words(sees).to(device))


def reference(problem: Problem) -> dict[int, Tensor]:
    """The first and the last row of the first set, computed in fp32 from what is in the caches."""
    query, keys, values = problem.sets[0]
    found = {}
    for row in sorted({0, problem.shape.batch - 1}):
        here = slice(row, row + 1)
        out = ops.tree_attention(
            query[here].float(), keys[here].float(), values[here].float(), problem.prefix_lens[here],
            problem.ancestors, backend="reference",
        )  # fmt: skip
        assert isinstance(out, Tensor)
        found[row] = out[0]
    return found


def relative_error(problem: Problem, out: Tensor, wanted: Mapping[int, Tensor]) -> float:
    """The largest over rows, heads and nodes of ``|out - wanted| / |wanted|``; infinite where something is not finite.

    Raises:
        ValueError: the output's shape or dtype is not the query's.
    """
    query = problem.sets[0][0]
    if out.shape != query.shape or out.dtype != query.dtype:
        raise ValueError(f"output is {list(out.shape)} in {out.dtype}, expected {list(query.shape)} in {query.dtype}")
    if not bool(out.isfinite().all()):
        return math.inf
    errors = [float(((out[row].float() - rows).norm(dim=-1) / rows.norm(dim=-1)).max()) for row, rows in wanted.items()]
    return max(errors)


@dataclass(frozen=True)
class Prepared:
    """A side that is ready for a problem, and the seconds that it took once to get there, by what it did."""

    compute: Compute
    apart: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Side:
    """A way of computing tree attention."""

    name: str
    prepare: Callable[[Problem], Prepared]
    compiles: bool = False
    """Whether something is compiled for each shape, which takes seconds."""

    @property
    def ours(self) -> bool:
        return self.name.startswith("ours")


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _seconds_apart(work: Callable[[], Any], device: torch.device, runs: int = 3) -> float:
    """Seconds of host and device for what is prepared; the median, after a first run that may compile."""
    taken = []
    for _ in range(1 + runs):
        _synchronize(device)
        start = time.perf_counter()
        work()
        _synchronize(device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def _ours(backend: str | None) -> Callable[[Problem], Prepared]:
    def prepare(problem: Problem) -> Prepared:
        lens, ancestors = problem.prefix_lens, problem.ancestors

        def compute(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            out = ops.tree_attention(query, keys, values, lens, ancestors, backend=backend)
            assert isinstance(out, Tensor)
            return out

        return Prepared(compute)

    return prepare


def _sdpa(problem: Problem) -> Prepared:
    mask, used = problem.visible(), problem.used

    def compute(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return scaled_dot_product_attention(query, keys[:, :, :used], values[:, :, :used], mask, enable_gqa=True)

    return Prepared(compute)


def _sdpa_folded(problem: Problem) -> Prepared:
    """Needs no support for fewer key heads than query heads, so that kernels that take a mask can be chosen."""
    mask, used = problem.visible().repeat(problem.shape.group, 1), problem.used

    def compute(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        folded = problem.folded(query)
        out = scaled_dot_product_attention(folded, keys[:, :, :used], values[:, :, :used], mask)
        unfolded: Tensor = out.reshape(query.shape)
        return unfolded

    return Prepared(compute)


@functools.cache
def _compiled_flex() -> Any:
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def _flex(problem: Problem) -> Prepared:
    prefix, nodes, used, sees = problem.shape.prefix, problem.shape.nodes, problem.used, problem.sees

    def visible(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (kv < prefix) | sees[q, (kv - prefix).clamp(0, nodes - 1)]

    def block_mask() -> Any:
        return create_block_mask(visible, None, None, nodes, used, device=str(problem.device))

    seconds = _seconds_apart(block_mask, problem.device)
    blocks = block_mask()
    flex: Any = _compiled_flex() if problem.device.type == "cuda" else flex_attention

    def compute(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        out: Tensor = flex(query, keys[:, :, :used], values[:, :, :used], block_mask=blocks, enable_gqa=True)
        return out

    return Prepared(compute, {"block mask": seconds})


def tree_and_merge(
    query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, prefix_out: Tensor, prefix_lse: Tensor
) -> Tensor:
    """The tree's part of attention, merged by log-sum-exp with the prefix's; heads folded.

    Scores are kept in fp32: bf16 would round those of the tree, which are large, by some per cent of their weight. Of a
    few nodes the compiler makes two or three kernels without a matrix product.
    """
    few = keys.shape[2] <= FEW_NODES
    wide_query, wide_keys, wide_values = query.float(), keys.float(), values.float()
    products = (wide_query.unsqueeze(3) * wide_keys.unsqueeze(2)).sum(-1) if few else wide_query @ wide_keys.mT
    scores = products * query.shape[-1] ** -0.5 + bias
    tree_lse = scores.logsumexp(-1, keepdim=True)
    weights = (scores - tree_lse).exp()
    tree_out = (weights.unsqueeze(4) * wide_values.unsqueeze(2)).sum(3) if few else weights @ wide_values
    lse = torch.logaddexp(tree_lse, prefix_lse.unsqueeze(-1))
    out = prefix_out.float() * (prefix_lse.unsqueeze(-1) - lse).exp() + tree_out * (tree_lse - lse).exp()
    rounded: Tensor = out.to(query.dtype)
    return rounded


@functools.cache
def _compiled_tree_and_merge() -> Any:
    return torch.compile(tree_and_merge, dynamic=True, fullgraph=True)


PrefixPass = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Folded query and the prefix's keys and values → output and log-sum-exp, as folded."""


def _two_pass(prefix_pass: PrefixPass) -> Callable[[Problem], Prepared]:
    """The prefix masks nothing, so the query heads of a key head are as good as more queries, and any op serves."""

    def prepare(problem: Problem) -> Prepared:
        prefix, used = problem.shape.prefix, problem.used
        hidden = torch.zeros(problem.sees.shape, device=problem.device).masked_fill_(~problem.sees, -torch.inf)
        bias = hidden.repeat(problem.shape.group, 1)
        merge: Any = _compiled_tree_and_merge() if problem.device.type == "cuda" else tree_and_merge

        def compute(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            folded = problem.folded(query)
            out, lse = prefix_pass(folded, keys[:, :, :prefix], values[:, :, :prefix])
            merged: Tensor = merge(folded, keys[:, :, prefix:used], values[:, :, prefix:used], bias, out, lse)
            return merged.reshape(query.shape)

        return Prepared(compute)

    return prepare


def _torch_flash(query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    aten = torch.ops.aten
    on_cuda = query.device.type == "cuda"
    flash = aten._scaled_dot_product_flash_attention if on_cuda else aten._scaled_dot_product_flash_attention_for_cpu
    out, lse, *_ = flash(query, keys, values)
    return out, lse


def _flash_attn(module: Any) -> PrefixPass:
    """flash-attn, 2 or 3. It is given the prefix alone, without lengths."""

    def prefix_pass(query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        out, lse, *_ = module.flash_attn_with_kvcache(
            query.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2),
            causal=False, return_softmax_lse=True,
        )  # fmt: skip
        return out.transpose(1, 2), lse

    return prefix_pass


@functools.cache
def _flashinfer_workspace(device: torch.device) -> Tensor:
    return torch.zeros(512 << 20, dtype=torch.uint8, device=device)


def _flashinfer(module: Any) -> Callable[[Problem], Prepared]:
    """Paged prefill with a custom mask; each row of the cache is one page, so that nothing has to be laid out anew."""

    def prepare(problem: Problem) -> Prepared:
        shape, used = problem.shape, problem.used
        wrapper = module.BatchPrefillWithPagedKVCacheWrapper(_flashinfer_workspace(problem.device), "HND")
        rows = torch.arange(shape.batch + 1, dtype=torch.int32, device=problem.device)
        mask = problem.visible().flatten().repeat(shape.batch)

        def plan() -> None:
            wrapper.plan(
                rows * shape.nodes, rows, rows[:-1], torch.full_like(rows[:-1], used),
                shape.heads, shape.kv_heads, shape.head_size, used,
                custom_mask=mask, q_data_type=problem.dtype, kv_data_type=problem.dtype,
            )  # fmt: skip

        seconds = _seconds_apart(plan, problem.device)
        # Its layout of queries is another one; a model would write them so, and nothing would have to be copied.
        rows_first = {
            query.data_ptr(): query.transpose(1, 2).reshape(-1, shape.heads, shape.head_size)
            for query, _, _ in problem.sets
        }

        def compute(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            out: Tensor = wrapper.run(rows_first[query.data_ptr()], (keys[:, :, :used], values[:, :, :used]))
            return out.view(shape.batch, shape.nodes, shape.heads, shape.head_size).transpose(1, 2)

        return Prepared(compute, {"plan": seconds})

    return prepare


def optional(name: str) -> tuple[Any, str | None]:
    """A package that need not be there, and why it cannot be used."""
    try:
        return importlib.import_module(name), None
    except ModuleNotFoundError as error:
        if error.name == name:
            return None, "not installed"
        return None, f"cannot be imported: {error}"
    except Exception as error:  # a binary package for another torch may raise anything
        return None, f"cannot be imported: {error}"


def sides_for(device: torch.device) -> tuple[list[Side], dict[str, str]]:
    """The sides that can be tried on ``device``, ours first, and for the others the reason why not."""
    sides: list[Side] = []
    missing: dict[str, str] = {}
    if device.type == "cuda":
        known = ops.backends(device)["tree_attention"]
        for backend in ("cuda", "triton"):
            reason = known.get(backend, "this version of lbr_kernels has no such backend")
            if reason is None:
                sides.append(Side(f"ours, {backend}", _ours(backend)))
            else:
                missing[f"ours, {backend}"] = reason
    else:
        sides.append(Side("ours", _ours(None)))
    sides += [
        Side("SDPA, dense mask, enable_gqa", _sdpa),
        Side("SDPA, dense mask, heads folded", _sdpa_folded),
        Side("FlexAttention", _flex, compiles=device.type == "cuda"),
        Side("two-pass, torch", _two_pass(_torch_flash)),
    ]
    packages: Sequence[tuple[str, str, Callable[[Any], Callable[[Problem], Prepared]]]] = [
        ("two-pass, flash-attn 2", "flash_attn", lambda module: _two_pass(_flash_attn(module))),
        ("two-pass, flash-attn 3", "flash_attn_interface", lambda module: _two_pass(_flash_attn(module))),
        ("FlashInfer, paged prefill", "flashinfer", _flashinfer),
    ]
    for name, package, make in packages:
        if device.type != "cuda":
            missing[name] = "runs on CUDA only"
            continue
        module, why_not = optional(package)
        if why_not is None:
            sides.append(Side(name, make(module)))
        else:
            missing[name] = why_not
    return sides, missing
