"""The ops of a decoding step beside tree attention, on a GPU: the cases, and what makes a result right.

Contract
--------
A :class:`Case` makes a :class:`Problem`: sets of data that are taken in turn, a call on one of them, and a check.
``checked(run, turns)`` lets ``run`` do the work of these turns and says for the record whether the result is right:

* ``commit_``: every slot of every cache is what indexing in plain PyTorch makes of what was there before;
* ``sample_children``, ``top_children``: the tokens are the CPU reference's, one by one, log-probabilities to 1e-5;
* ``route``: log-probabilities are those of the reference in fp64 to 1e-3, and the choice is the drawn candidate, each
  uniform number standing in the middle of a candidate's share.

A case whose name says ``cold`` has so many sets that more than three times the L2's bytes pass before one is used
again. A ``warm`` one has one set, which the call before has read: so do logits come, fresh from the head.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from gpu_machine import BrokenDeviceError, Machine, Ready, Record, alternate, first_line, make_ready, say
from gpu_report import ratio, timed
from report import number
from torch import Tensor

from lbr_kernels import Router, RouterConfig, ops
from lbr_kernels.ops.route import RouterWeights
from lbr_kernels.ops.tree_shape import num_slots

COLD = 3  # times the L2's bytes
LEAST_CALLS = 50  # of a graph: what starts and ends one is shared by so many
LONGEST_RUN = 0.1  # seconds of a slow side's run, which then takes fewer turns
SLOTS_APART = 16  # of one turn's tree from the next one's, more than a tree of width 3 and depth 2 has
SOURCES = {1: [2], 2: [2, 9, 10, 11]}
"""The last candidate, and at depth 2 its three children: what has the longest way to go, at width 3."""
WIDTH = 3
LOG_PROB_TOLERANCE = {"sample_children": 1e-5, "top_children": 1e-5, "route": 1e-3}
FILTERS: dict[str, dict[str, Any]] = {
    "no filter": {},
    "top-k 50, top-p 0.95, min-p 0.05": {"top_k": 50, "top_p": 0.95, "min_p": 0.05},
}


class Problem(Protocol):
    """One case's data."""

    turns: int

    def call(self, backend: str, turn: int) -> Any:
        """The op, on the data of a turn."""

    def checked(self, run: Callable[[], Any], turns: Sequence[int]) -> Record:
        """Let it run; for the record what was compared, with ``status`` and ``why`` if it is wrong."""


@dataclass(frozen=True)
class Case:
    """An op at one shape.

    Attributes:
        op: its name.
        name: which case of the op, for people.
        bar: seconds that it is to take at most; None where there is no goal.
        bytes: what has to be moved at least.
        set_bytes: what one set of data occupies in the L2, by which cold cases have as many as they need.
        make: device, dtype, number of sets → the problem.
    """

    op: str
    name: str
    bar: float | None
    bytes: int
    set_bytes: int
    cold: bool
    make: Callable[[torch.device, torch.dtype, int], Problem] = field(repr=False)

    def sets(self, cache_bytes: int) -> int:
        """Two of a cold case's, where there is no cache to speak of."""
        return max(2, COLD * cache_bytes // self.set_bytes + 1) if self.cold else 1

    def __str__(self) -> str:
        return f"{self.op}: {self.name}"


def _wrong(why: str) -> Record:
    return {"status": "wrong", "why": why}


class Commit:
    """``commit_`` on random caches; every turn has lengths of its own, far from those of the others.

    ``advance`` is 0, so that lengths stay and a graph can be replayed; the kernel writes them all the same.
    """

    def __init__(
        self, device: torch.device, dtype: torch.dtype, turns: int,
        *, batch: int, layers: int, heads: int, head_size: int, depth: int, one_arena: bool,
    ) -> None:  # fmt: skip
        self.turns = turns
        slots = SLOTS_APART * (turns + 1)
        sizes = (batch, 2 * layers * heads) if one_arena else (2 * layers, batch, heads)
        memory = torch.empty(*sizes, slots, head_size, device=device, dtype=dtype)  # every check fills it
        self.caches = [memory] if one_arena else list(memory.unbind(0))
        self.memory = memory.unsqueeze(0) if one_arena else memory
        self.moves = SOURCES[depth]
        self.sources = torch.tensor([self.moves] * batch, dtype=torch.int32, device=device)
        # Rows of a batch are not equally long.
        self.starts = [[SLOTS_APART * turn + row % 4 for row in range(batch)] for turn in range(turns)]
        self.lens = [torch.tensor(starts, dtype=torch.int32, device=device) for starts in self.starts]

    def call(self, backend: str, turn: int) -> None:
        ops.commit_(self.caches, self.lens[turn], self.sources, advance=0, backend=backend)

    def checked(self, run: Callable[[], Any], turns: Sequence[int]) -> Record:
        # The second of two equal commits changes nothing: without new data it could be left out unseen.
        self.memory.normal_()
        want = self.memory.clone()
        run()
        device = self.sources.device
        moves = torch.tensor(self.moves, device=device)
        to = torch.arange(len(self.moves), device=device)
        for turn in turns:
            for row, start in enumerate(self.starts[turn]):
                tree = want[:, row]
                tree[:, :, start + to] = tree[:, :, start + moves]
        if not torch.equal(self.memory, want):
            return _wrong(f"{int((self.memory != want).sum())} numbers are not where indexing puts them")
        if any(lens.tolist() != starts for lens, starts in zip(self.lens, self.starts, strict=True)):
            return _wrong("lengths have changed")
        return {"compared": "every slot"}


def _compared(op: str, out: Any, tokens: Tensor, log_probs: Tensor) -> Record:
    """Indices as they are, log-probabilities within the op's tolerance."""
    if op == "route":
        out = (out[1], out[0])
    found, found_log_probs = out[0].cpu(), out[1].cpu()
    if not torch.equal(found, tokens):
        return _wrong(f"{int((found != tokens).sum())} of {tokens.numel()} indices differ from the reference's")
    error = float((found_log_probs.double() - log_probs.double()).abs().max())
    tolerance = LOG_PROB_TOLERANCE[op]
    record: Record = {"error": error if math.isfinite(error) else None, "tolerance": tolerance}
    if not error <= tolerance:
        record |= _wrong(f"a log-probability is off by {error:.3g}, allowed {tolerance:g}")
    return record


class Children:
    """``sample_children`` or ``top_children``, on random logits as a language model's head gives them."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype, turns: int,
        *, op: str, rows: int, vocabulary: int, filters: dict[str, Any],
    ) -> None:  # fmt: skip
        self.op, self.turns, self.filters = op, turns, filters
        generator = torch.Generator(device).manual_seed(1)
        self.logits = [
            (torch.randn(rows, vocabulary, generator=generator, device=device) * 2.5).to(dtype) for _ in range(turns)
        ]
        self.uniforms = torch.rand(rows, WIDTH, generator=generator, device=device, dtype=torch.float64)
        self.wanted: dict[int, tuple[Tensor, Tensor]] = {}

    def _run(self, logits: Tensor, uniforms: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        if self.op == "top_children":
            return ops.top_children(logits, WIDTH, **self.filters, backend=backend)
        return ops.sample_children(logits, uniforms, **self.filters, backend=backend)

    def call(self, backend: str, turn: int) -> tuple[Tensor, Tensor]:
        return self._run(self.logits[turn], self.uniforms, backend)

    def checked(self, run: Callable[[], Any], turns: Sequence[int]) -> Record:
        last = turns[-1]
        if last not in self.wanted:
            self.wanted[last] = self._run(self.logits[last].cpu(), self.uniforms.cpu(), "reference")
        return _compared(self.op, run(), *self.wanted[last])


class Route:
    """``route`` with a router that makes a difference: an untrained one gives all candidates the same score."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype, turns: int, *, rows: int, hidden_size: int, depth: int
    ) -> None:
        self.turns, self.depth = turns, depth
        generator = torch.Generator().manual_seed(2)
        router = Router(RouterConfig(hidden_size, depth)).eval()
        with torch.no_grad():
            for parameter in router.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
            for parameter in router.score.parameters():
                parameter.normal_(std=0.3, generator=generator)
        packed = router.packed()
        hidden = torch.randn(rows, num_slots(WIDTH, depth), hidden_size, generator=generator).to(dtype)
        wide = RouterWeights(packed.data.double(), *packed[1:])
        log_probs, _ = ops.route(hidden, wide, width=WIDTH, depth=depth, backend="reference")
        shares = log_probs.exp()
        # In the middle of a candidate's share no rounding changes the choice; candidates with hardly any are left out.
        wished = torch.arange(rows) % WIDTH
        likely = shares.gather(1, wished[:, None])[:, 0] > 0.01
        drawn = torch.where(likely, wished, shares.argmax(-1))
        middles = shares.cumsum(-1) - shares / 2
        self.wanted = drawn, log_probs
        self.hidden = hidden.to(device)
        self.uniforms = middles.gather(1, drawn[:, None])[:, 0].to(device)
        self.weights = RouterWeights(packed.data.to(device), *packed[1:])

    def call(self, backend: str, turn: int) -> tuple[Tensor, Tensor]:
        return ops.route(
            self.hidden, self.weights, width=WIDTH, depth=self.depth, uniforms=self.uniforms, backend=backend
        )

    def checked(self, run: Callable[[], Any], turns: Sequence[int]) -> Record:
        return _compared("route", run(), *self.wanted)


def _cases(
    itemsize: int, *, batch: int, layers: int, heads: int, head_size: int, vocabulary: int, hidden_size: int
) -> list[Case]:
    """The goals of every op, at a model's sizes."""
    cases = []
    for one_arena in (False, True):
        for depth, moves in SOURCES.items():
            moved = 2 * layers * batch * heads * head_size * itemsize * len(moves)
            stored = "one arena" if one_arena else f"{2 * layers} tensors"
            make = functools.partial(
                Commit, batch=batch, layers=layers, heads=heads, head_size=head_size, depth=depth, one_arena=one_arena
            )
            name = f"{layers} layers, {stored}, batch {batch}, K={WIDTH}, L={depth}, cold"
            cases.append(Case("commit_", name, 10e-6, 2 * moved, 2 * moved, True, make))
    size = batch * vocabulary * itemsize
    for op, bar, states in (("sample_children", 20e-6, ("warm", "cold")), ("top_children", None, ("warm",))):
        for shown, filters in FILTERS.items():
            for state in states:
                children = functools.partial(Children, op=op, rows=batch, vocabulary=vocabulary, filters=filters)
                name = f"V={vocabulary}, R={batch}, K={WIDTH}, {shown}, {state}"
                cases.append(Case(op, name, bar if state == "warm" else None, size, size, state == "cold", children))
    for depth in SOURCES:
        route = functools.partial(Route, rows=batch, hidden_size=hidden_size, depth=depth)
        weights = 4 * Router(RouterConfig(hidden_size, depth)).packed().data.numel()
        size = weights + batch * num_slots(WIDTH, depth) * hidden_size * itemsize
        name = f"D={hidden_size}, batch {batch}, K={WIDTH}, L={depth}, warm"
        cases.append(Case("route", name, 20e-6, size, size, False, route))
    return cases


def cases(dry_run: bool) -> list[Case]:
    """Those of the run, or as many tiny ones."""
    if dry_run:
        return _cases(4, batch=2, layers=2, heads=2, head_size=8, vocabulary=300, hidden_size=32)
    return _cases(2, batch=8, layers=32, heads=8, head_size=128, vocabulary=151_936, hidden_size=3584)


def backends_for(device: torch.device) -> tuple[str, ...]:
    """What is tried on a device; the reference comes last."""
    return ("cuda", "triton", "reference") if device.type == "cuda" else ("cpu", "reference")


def time_case(machine: Machine, case: Case, end: float) -> Record:
    """One case's entry: every backend that runs, checked, then timed in turns until ``end``."""
    sets = case.sets(machine.cache_bytes)
    problem = case.make(machine.device, machine.dtype, sets)
    known = ops.backends(machine.device)[case.op]
    sides: dict[str, Record] = {}
    ready: dict[str, Ready] = {}
    for backend in backends_for(machine.device):
        reason = known.get(backend, "there is no such backend")
        if reason is not None:
            sides[backend] = {"status": "not available", "why": reason}
            continue
        try:
            sides[backend], one = make_ready(
                machine, functools.partial(problem.call, backend), problem.turns, problem.checked,
                least_calls=LEAST_CALLS, most_seconds=LONGEST_RUN,
            )  # fmt: skip
            ops.raise_if_flagged(machine.device)
        except Exception as error:
            why = first_line(error)
            if not machine.healthy():
                raise BrokenDeviceError(f"{case}; {backend}: {why}") from None
            sides[backend] = {"status": "failed", "why": why}
            continue
        if one is not None:
            ready[backend] = one
    for backend, seconds in alternate(machine, ready, end).items():
        sides[backend] |= {"replays": ready[backend].times, "seconds": seconds}
    return {
        "op": case.op, "case": case.name, "bar": case.bar, "bytes": case.bytes, "sets": sets, "cold": case.cold,
        "sides": sides,
    }  # fmt: skip


def measure_ops(
    machine: Machine, wanted: Sequence[Case], end: float, keep: Callable[[Record], object]
) -> list[dict[str, str]]:
    """Every case in an equal share of the time until ``end``; ``keep`` is given the entries.

    Returns:
        What was left out, and why.
    """
    skipped = []
    for index, case in enumerate(wanted):
        now = time.monotonic()
        if now > end:
            skipped.append({"what": str(case), "why": "the time was used up"})
            continue
        machine.free_bytes()
        try:
            entry = time_case(machine, case, now + (end - now) / (len(wanted) - index))
        except Exception as error:
            if not machine.healthy():
                raise
            skipped.append({"what": str(case), "why": f"failed: {first_line(error)}"})
            continue
        say(f"{case}: {_shown(entry['sides'])}")
        keep(entry)
    return skipped


def preference(entries: Iterable[Record]) -> dict[str, dict[str, Any]]:
    """For every op which of our two backends is faster: by the geometric mean over cases of triton / cuda.

    Only cases at which both were timed count.
    """
    found: dict[str, list[float]] = {}
    for entry in entries:
        if {"cuda", "triton"} <= set(timed(entry)):
            found.setdefault(entry["op"], []).append(ratio(entry, "triton", "cuda")[1])
    return {
        op: {
            "backend": "cuda" if statistics.fmean(map(math.log, ratios)) >= 0 else "triton",
            "triton_over_cuda": ratios,
        }
        for op, ratios in found.items()
    }


def _shown(sides: Mapping[str, Record]) -> str:
    parts = []
    for name, side in sides.items():
        timed = side["status"] == "timed"
        what = f"{number(1e6 * statistics.median(side['seconds']))} µs" if timed else side["status"]
        parts.append(f"{name} {what}")
    return "; ".join(parts)
