"""Attention within packed trees on a GPU, forward and backward: the shapes, the sides, and how they are measured.

Contract
--------
A side computes output and gradients ``(out, dq, dk, dv)`` of a :class:`Problem`; every call begins with the trees as
tensors, so what a side makes of them is in its time, unless its name says that it was made before. Before anything is
timed each side is held against the reference in fp32 on a small problem of the same kind; at the shape itself, whose
dense mask would be too large, all sides are held against the first that ran. Errors are of whole tensors, relative.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import gpu_machine
import torch
from gpu_machine import BrokenDeviceError, Machine, Ready, alternate, first_line, say
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from lbr_kernels import ops

Results = tuple[Tensor, ...]
Entry = dict[str, Any]

TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}
SECTION = 45.0  # seconds for a shape, compilation of the others' kernels included
FLEX = "FlexAttention, block mask made in every call"
FLEX_BEFORE = "FlexAttention, block mask made before"
TENSORS = ("output", "dq", "dk", "dv")


@dataclass(frozen=True)
class Shape:
    """So many packs of a trajectory each, with ``committed`` tokens and all branches that were not taken."""

    committed: int
    width: int
    depth: int
    heads: int
    kv_heads: int
    packs: int = 1
    head_size: int = 128

    @property
    def nodes(self) -> int:
        return self.packs * self.committed * int(self.width**self.depth)

    def pairs(self) -> int:
        """What has to be computed at least: pairs of a query and a key that it sees."""
        ends, bounds = self.trees()
        first = torch.repeat_interleave(bounds[:-1], bounds.diff())
        return int((first + ends - torch.arange(self.nodes)).sum())

    def flops(self) -> int:
        """Of two products forward and five backward."""
        return 7 * 2 * self.heads * self.head_size * self.pairs()

    def trees(self) -> tuple[Tensor, Tensor]:
        """``subtree_end`` and ``cu_seqlens``, int64."""
        one = trajectory(self.committed, self.width, self.depth)
        return one.repeat(self.packs), torch.arange(self.packs + 1) * len(one)

    def describe(self) -> dict[str, int]:
        return {**asdict(self), "nodes": self.nodes}

    def __str__(self) -> str:
        packs = f"{self.packs} packs of " if self.packs > 1 else ""
        return (
            f"{packs}{self.committed} committed, K={self.width}, L={self.depth}, {self.nodes} nodes, "
            f"heads {self.heads}/{self.kv_heads}"
        )


SHAPES = [
    Shape(4096, 3, 1, 32, 8),
    Shape(4096, 3, 1, 12, 2),
    Shape(1365, 3, 2, 32, 8),
    Shape(1024, 3, 1, 32, 8, packs=4),
    Shape(4096, 3, 2, 12, 2),
]
QUICK = SHAPES[:2]
DRY = [Shape(20, 3, 1, 4, 2, head_size=16), Shape(6, 3, 2, 7, 1, packs=3, head_size=16)]


def trajectory(committed: int, width: int, depth: int) -> Tensor:
    """The ends of subtrees: ``width - 1`` full trees of ``depth`` layers, then the committed token, and so on."""

    def full(layers: int) -> list[int]:
        below = full(layers - 1) if layers > 1 else []
        size = 1 + width * len(below)
        return [size, *(1 + child * len(below) + end for child in range(width) for end in below)]

    side = full(depth)
    step = [branch * len(side) + end for branch in range(width - 1) for end in side]
    T = committed * (len(step) + 1)
    ends = torch.tensor([*step, T]) + torch.arange(committed)[:, None] * (len(step) + 1)
    ends[:, -1] = T
    return ends.flatten()


@dataclass(frozen=True)
class Problem:
    """One shape's data."""

    shape: Shape
    query: Tensor
    key: Tensor
    value: Tensor
    grad: Tensor
    subtree_end: Tensor
    cu_seqlens: Tensor
    ends: Tensor
    """Of subtrees, counted from the first node of all: the mask is ``k <= q < ends[k]``."""


def make_problem(shape: Shape, device: torch.device, dtype: torch.dtype, seed: int) -> Problem:
    generator = torch.Generator(device).manual_seed(seed)
    T = shape.nodes

    def normal(heads: int) -> Tensor:
        size = (1, T, heads, shape.head_size)
        return torch.randn(size, generator=generator, device=device, dtype=dtype).transpose(1, 2)

    query, key, value = (normal(heads).requires_grad_() for heads in (shape.heads, shape.kv_heads, shape.kv_heads))
    ends, bounds = shape.trees()
    absolute = ends + torch.repeat_interleave(bounds[:-1], bounds.diff())
    return Problem(
        shape, query, key, value, normal(shape.heads), ends[None].int().to(device), bounds.int().to(device),
        absolute.to(device),
    )  # fmt: skip


def _differentiated(problem: Problem, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Results:
    leaves = (problem.query, problem.key, problem.value)
    out = attend(*leaves)
    return (out.detach(), *torch.autograd.grad(out, leaves, problem.grad))


def ours(problem: Problem, backend: str | None) -> Results:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = ops.packed_tree_attention(
            query, key, value, problem.subtree_end, cu_seqlens=problem.cu_seqlens, backend=backend
        )
        assert isinstance(out, Tensor)
        return out

    return _differentiated(problem, attend)


class Flex:
    """Compiled once for a shape; ``before`` keeps the block mask."""

    def __init__(self, *, before: bool) -> None:
        self._before = before
        self._kept: tuple[Problem, Any] | None = None
        self._flex: Any = torch.compile(flex_attention, dynamic=False, fullgraph=True)
        self._mask: Any = torch.compile(create_block_mask, dynamic=False)

    def _block_mask(self, problem: Problem) -> Any:
        ends, T = problem.ends, problem.shape.nodes

        def visible(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return (kv <= q) & (q < ends[kv])

        return self._mask(visible, None, None, T, T, device=str(ends.device))

    def __call__(self, problem: Problem) -> Results:
        if not self._before:
            blocks = self._block_mask(problem)
        else:
            if self._kept is None or self._kept[0] is not problem:
                self._kept = problem, self._block_mask(problem)
            blocks = self._kept[1]
        return _differentiated(problem, partial(self._flex, block_mask=blocks, enable_gqa=True))


def dense(problem: Problem) -> Results:
    """For small problems."""
    node = torch.arange(problem.shape.nodes, device=problem.ends.device)
    mask = (node <= node[:, None]) & (node[:, None] < problem.ends)
    return _differentiated(problem, partial(scaled_dot_product_attention, attn_mask=mask, enable_gqa=True))


Side = Callable[[Problem], Results]


def sides_for(device: torch.device) -> dict[str, Side]:
    """On a CPU, where FlexAttention has no gradient, a dense mask stands for it."""
    if device.type != "cuda":
        return {"ours": partial(ours, backend=None), "SDPA, dense mask": dense}
    return {
        "ours, triton": partial(ours, backend="triton"),
        FLEX: Flex(before=False),
        FLEX_BEFORE: Flex(before=True),
    }


def errors(found: Results, wanted: Results) -> dict[str, float]:
    """Of each tensor as a whole, relative; infinite where something is not finite."""
    result = {}
    for name, one, other in zip(TENSORS, found, wanted, strict=True):
        if one.shape != other.shape:
            raise ValueError(f"{name} is {list(one.shape)}, expected {list(other.shape)}")
        error = float((one.float() - other.float()).norm() / other.float().norm())
        result[name] = error if error == error else float("inf")
    return result


def _checked(found: Results, wanted: Results, tolerance: float) -> dict[str, Any]:
    known = errors(found, wanted)
    worst = max(known, key=known.__getitem__)
    record: dict[str, Any] = {"error": known[worst] if known[worst] < float("inf") else None, "tolerance": tolerance}
    if not known[worst] <= tolerance:
        record |= {"status": "wrong", "why": f"{worst}: relative error {known[worst]:.3g}, allowed {tolerance:g}"}
    return record


def _small(shape: Shape) -> Shape:
    return replace(shape, committed=min(shape.committed, 700 // shape.width**shape.depth // shape.packs))


def _against_reference(machine: Machine, shape: Shape, side: Side, seed: int) -> dict[str, Any]:
    problem = make_problem(_small(shape), machine.device, machine.dtype, seed)
    wide = replace(problem, **{
        name: getattr(problem, name).detach().float().requires_grad_() for name in ("query", "key", "value")
    }, grad=problem.grad.float())  # fmt: skip
    return _checked(side(problem), ours(wide, "reference"), TOLERANCE[machine.dtype])


def _make_ready(
    machine: Machine, work: Callable[[], Results], compare: Callable[[Results], dict[str, Any]]
) -> tuple[dict[str, Any], Ready | None]:
    return gpu_machine.make_ready(machine, lambda turn: work(), 1, lambda run, turns: compare(run()), least_calls=1)


def time_shape(machine: Machine, shape: Shape, sides: dict[str, Side], seed: int, end: float) -> dict[str, Entry]:
    """The records of all sides at one shape."""
    problem = make_problem(shape, machine.device, machine.dtype, seed)
    records: dict[str, Entry] = {}
    ready: dict[str, Ready] = {}
    wanted: Results | None = None
    for name, side in sides.items():
        start = time.monotonic()
        try:
            record = _against_reference(machine, shape, side, seed)
            if "status" in record:
                records[name] = {**record, "why": f"small problem: {record['why']}"}
                continue
            if wanted is None:
                wanted = tuple(tensor.clone() for tensor in machine.first(partial(side, problem)))
            compare = partial(_checked, wanted=wanted, tolerance=TOLERANCE[machine.dtype])
            found, one = _make_ready(machine, partial(side, problem), compare)
        except Exception as error:
            why = first_line(error)
            if not machine.healthy():
                raise BrokenDeviceError(f"{shape}; {name}: {why}") from None
            records[name] = {"status": "failed", "why": why}
            continue
        records[name] = {"small_error": record["error"], **found, "prepared_seconds": time.monotonic() - start}
        if one is not None:
            ready[name] = one
    for name, seconds in alternate(machine, ready, end).items():
        records[name] |= {"replays": ready[name].times, "seconds": seconds}
    return records


def measure(
    machine: Machine,
    shapes: Sequence[Shape],
    sides: dict[str, Side],
    seconds: float,
    data: dict[str, Any],
    keep: Callable[[dict[str, Any]], object],
) -> None:
    """The whole run, into ``data``; ``keep`` is given what is known after every shape."""
    stop = time.monotonic() + seconds
    data |= {"roof": [machine.roof()], "skipped": [], "shapes": []}
    for seed, shape in enumerate(shapes):
        now = time.monotonic()
        if now + SECTION / 2 > stop and not data["dry_run"]:
            data["skipped"].append({"shape": str(shape), "why": "the time was used up"})
            say(f"{shape}: skipped: the time was used up")
            continue
        machine.free_bytes()
        try:
            records = time_shape(machine, shape, sides, seed, min(stop, now + SECTION))
        except Exception as error:
            data["aborted"] = f"{shape}: {first_line(error)}"
            break
        entry = {"shape": {**shape.describe(), "name": str(shape)}, "flops": shape.flops(), "sides": records}
        data["shapes"].append(entry)
        keep(data)
        say(f"{shape}: " + "; ".join(f"{name} {side['status']}" for name, side in records.items()))
    if data["aborted"] is None:
        data["roof"].append(machine.roof())
        data["complete"] = True


def troubles(data: dict[str, Any]) -> list[str]:
    """What makes the command end with 1: wrong sides, failures of ours, an abort."""
    found = [f"aborted: {data['aborted']}"] if data["aborted"] else []
    for entry in data["shapes"]:
        for name, side in entry["sides"].items():
            if side["status"] == "wrong" or (side["status"] == "failed" and name.startswith("ours")):
                found.append(f"{entry['shape']['name']}; {name}: {side['status']}: {side['why']}")
    return found
