"""The decoding step on a GPU: a model of 7 billion random weights, its engines, plain decoding, ``model.generate``.

Contract
--------
A side is one way to decode a batch: a width, a depth and an engine of ``lbr_kernels.generate``, or ``model.generate``.
All of them read the same prompts and draw the same number of tokens with the same filter; nothing ends a text. Plain
decoding is the same engine with K = 1, L = 1. A call is timed on the host's clock, from a device that is idle to one
that is again, with few and with many new tokens: the difference of the two, over the difference in tokens, is the time
of a step, in which every row commits one token; reading the prompt cancels out. What graphs need once is done before,
and said apart (``warm_up``).

An engine is timed only if it passed :func:`check_engines`, on a small model in fp32: its greedy texts are those of
``model.generate`` (K = 1) and of naive branch routing (``naive_lbr.py``), and its sampled ones those of the engine that
runs step by step. Of the large model, in bf16, the committed tokens' recorded log-probabilities are compared with those
of one plain forward of the finished text (:func:`check_model_forward`). A call that another engine has run than was
asked for is a failure.

Where time goes within a step is read from the engine ``static``, whose kernels are those of the graph, by marks on the
device between the phases; the device waits while the host launches a step, so that the host's part is in no phase.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, cast
from unittest.mock import patch

import gpu_ops
import torch
from gpu_machine import BrokenDeviceError, Machine, Record, first_line, say
from naive_lbr import NaiveDecoder
from report import number
from torch import Tensor
from transformers import AutoModelForCausalLM, LogitsProcessorList, PreTrainedModel, Qwen2Config

import lbr_kernels
from lbr_kernels import DecodingStats, Router, TreeTrajectory
from lbr_kernels.decoding.step import FixedStep

T = TypeVar("T")
Run = Callable[[int], Any]
"""Decodes so many new tokens."""

SETTINGS = ((1, 1), (3, 1), (3, 2))
"""Width and depth; the first is plain decoding."""
TOP_K = 50  # the default of model.generate
ROUNDS = (3, 7)
PLAIN = "model.generate"
LOG_PROB_TOLERANCE = 0.05
"""The mean difference of committed tokens' log-probabilities from a plain forward's that bf16 may make."""


@dataclass(frozen=True)
class Scale:
    """The sizes of a run.

    ``batches`` are compared with ``model.generate`` and between engines, ``more_batches`` only decoded. The lengths are
    few and many new tokens: of fast sides, of the batches that only say how throughput grows, and of slow engines.
    """

    model: dict[str, Any]
    prompt: int
    batches: tuple[int, ...]
    more_batches: tuple[int, ...]
    engine: str
    engines: tuple[str, ...]
    lengths: tuple[int, int]
    batch_lengths: tuple[int, int]
    engine_lengths: tuple[int, int]
    phase_steps: int
    rounds: tuple[int, int]


QWEN2_7B = {
    "vocab_size": 152_064, "hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4,
}  # fmt: skip
SMALL = {
    "vocab_size": 500, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.1,
}  # fmt: skip
"""What engines are checked on; its weights are large, so that a text depends on all that stands before it."""
FULL = Scale(
    model=QWEN2_7B, prompt=512, batches=(1, 8), more_batches=(2, 4, 16, 32, 64), engine="graph",
    engines=("graph", "static", "eager"), lengths=(16, 112), batch_lengths=(8, 56), engine_lengths=(4, 20),
    phase_steps=24, rounds=ROUNDS,
)  # fmt: skip
DRY = Scale(
    model={**SMALL, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}, prompt=9, batches=(1, 2),
    more_batches=(3,), engine="static", engines=("static", "eager"), lengths=(2, 5), batch_lengths=(2, 4),
    engine_lengths=(2, 4), phase_steps=4, rounds=(3, 3),
)  # fmt: skip


def quick(scale: Scale) -> Scale:
    """One batch, and no others."""
    return Scale(**{**vars(scale), "batches": scale.batches[:1], "more_batches": ()})


def setting_name(width: int, depth: int) -> str:
    return f"K={width}, L={depth}"


def make_model(config: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Random weights, made where they are to be; no token ends a text."""
    torch.manual_seed(0)
    with torch.device(device):
        made: PreTrainedModel = AutoModelForCausalLM.from_config(
            Qwen2Config(**config, bos_token_id=None, eos_token_id=None, pad_token_id=0), dtype=dtype
        )
    return made.eval()


class Told(NamedTuple):
    """What a call of ours has done."""

    sequences: Tensor
    trajectory: TreeTrajectory
    stats: DecodingStats


class Decoding:
    """A model with its routers and prompts, and the sides that decode with it."""

    def __init__(self, machine: Machine, model: PreTrainedModel, prompt: int) -> None:
        self.machine, self.model, self.prompt = machine, model, prompt
        self.routers = {depth: Router.for_model(model, depth=depth) for depth in {depth for _, depth in SETTINGS}}
        for router in self.routers.values():
            # An untrained router scores all alike, and what it does would not be seen in any text.
            for parameter in router.score.parameters():
                torch.nn.init.normal_(parameter)

    def prompts(self, batch: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(batch)
        ids = torch.randint(self.model.config.vocab_size, (batch, self.prompt), generator=generator)
        ids = ids.to(self.machine.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def ours(self, batch: int, width: int, depth: int, engine: str, count: int, **settings: Any) -> Any:
        """One call of ``lbr_kernels.generate``."""
        settings = {"do_sample": True, "top_k": TOP_K, **settings}
        out = lbr_kernels.generate(
            self.model, **self.prompts(batch), width=width, depth=depth, router=self.routers[depth],
            engine=cast(Any, engine), max_new_tokens=count, **settings,
        )  # fmt: skip
        _require_length(out if isinstance(out, Tensor) else out.sequences, batch, self.prompt + count)
        return out

    def told(self, batch: int, width: int, depth: int, engine: str, count: int, **settings: Any) -> Told:
        """One call of ours that says what it has done.

        Raises:
            RuntimeError: another engine has run.
        """
        out = self.ours(batch, width, depth, engine, count, return_dict_in_generate=True, **settings)
        assert out.stats is not None
        assert out.trajectory is not None
        if out.stats.engine != engine:
            raise RuntimeError(f"engine {out.stats.engine!r} has run: {out.stats.engine_reason}")
        return Told(out.sequences, out.trajectory, out.stats)

    def plain(self, batch: int, count: int, **settings: Any) -> Tensor:
        """One call of ``model.generate``."""
        settings = {"do_sample": True, "top_k": TOP_K, **settings}
        out = self.model.generate(**self.prompts(batch), max_new_tokens=count, **settings)
        _require_length(out, batch, self.prompt + count)
        found: Tensor = out
        return found

    def warm_up(self, batch: int, width: int, depth: int, engine: str, count: int) -> None:
        """Have made what calls of up to so many new tokens need."""
        lbr_kernels.warmup(
            self.model, batch_size=batch, max_length=self.prompt + count, width=width, depth=depth,
            router=self.routers[depth], engine=engine,
        )  # fmt: skip

    def release(self) -> None:
        """Give back what graphs hold."""
        lbr_kernels.release(self.model)
        self.machine.free_bytes()


def _require_length(sequences: Tensor, batch: int, length: int) -> None:
    if sequences.shape != (batch, length):
        raise RuntimeError(f"texts are {list(sequences.shape)}, expected {[batch, length]}")


def _outcome(machine: Machine, check: Callable[[], str | None]) -> Record:
    """For the record: passed, wrong or failed."""
    try:
        why = check()
    except Exception as error:
        if not machine.healthy():
            raise BrokenDeviceError(first_line(error)) from None
        return {"status": "failed", "why": first_line(error)}
    return {"status": "passed"} if why is None else {"status": "wrong", "why": why}


def check_engines(machine: Machine, engines: Sequence[str]) -> list[Record]:
    """Every engine at every setting, in fp32: ``[{"engine", "what", "status", "why"}]``."""
    decoding = Decoding(machine, make_model(SMALL, machine.device, torch.float32), prompt=21)
    count = 12
    greedy: dict[str, Any] = {"do_sample": False, "top_k": None}

    def first_difference(ours: Tensor, wanted: Tensor) -> str | None:
        if torch.equal(ours, wanted):
            return None
        return f"texts differ from token {int((ours != wanted).any(0).nonzero()[0]) - decoding.prompt} on"

    def greedily(engine: str, width: int, depth: int) -> str | None:
        ours = decoding.told(1, width, depth, engine, count, candidate_min_p=0.0, **greedy).sequences
        if width == 1:
            return first_difference(ours, decoding.plain(1, count, **greedy))
        naive = NaiveDecoder(
            decoding.model, decoding.routers[depth], width=width, depth=depth, warpers=LogitsProcessorList(),
            do_sample=False,
        )  # fmt: skip
        return first_difference(ours, naive(decoding.prompts(1)["input_ids"], count))

    def sampled(engine: str, width: int, depth: int) -> str | None:
        texts = [
            decoding.told(3, width, depth, one, count, generator=torch.Generator().manual_seed(1)).sequences
            for one in (engine, "eager")
        ]
        return first_difference(*texts)

    found = []
    for engine in engines:
        for width, depth in SETTINGS:
            for what, check in (("greedy", greedily), ("sampled", sampled)):
                if what == "sampled" and engine == "eager":
                    continue  # is what the others are compared with
                outcome = _outcome(machine, functools.partial(check, engine, width, depth))
                found.append({"engine": engine, "what": f"{setting_name(width, depth)}, {what}", **outcome})
    decoding.release()
    return found


def check_model_forward(decoding: Decoding, engine: str, count: int) -> Record:
    """The log-probabilities that decoding recorded for committed tokens, against one plain forward of the texts."""
    width, depth = 3, 1

    def check() -> str | None:
        out = decoding.told(2, width, depth, engine, count, top_k=0)
        choices = out.trajectory.choices
        steps = torch.arange(count, device=choices.device)
        recorded = out.trajectory.node_log_probs.gather(1, steps * width + choices)
        with torch.no_grad():
            logits = decoding.model(out.sequences[:, :-1]).logits[:, decoding.prompt - 1 :]
        new = out.sequences[:, decoding.prompt :, None]
        wanted = logits.float().log_softmax(-1).gather(2, new)[..., 0]
        error = float((recorded - wanted).abs().mean())
        if not error <= LOG_PROB_TOLERANCE:
            return f"log-probabilities differ by {error:.3g} in the mean, allowed {LOG_PROB_TOLERANCE:g}"
        return None

    what = f"{setting_name(width, depth)}, {decoding.machine.dtype}, against a plain forward".replace("torch.", "")
    return {"engine": engine, "what": what, **_outcome(decoding.machine, check)}


def refused(checks: Sequence[Record]) -> dict[str | None, str]:
    """The engines that did not pass, and why."""
    return {
        one["engine"]: f"{one['what']}: {one['status']}: {one['why']}" for one in checks if one["status"] != "passed"
    }


@dataclass(frozen=True)
class Side:
    """A way of decoding, as the module's contract says; ``engine`` None is ``model.generate``."""

    width: int
    depth: int
    engine: str | None

    @property
    def name(self) -> str:
        return PLAIN if self.engine is None else f"{setting_name(self.width, self.depth)}, {self.engine}"


def time_sides(
    decoding: Decoding, batch: int, sides: Sequence[Side], lengths: tuple[int, int], bad: Mapping[str | None, str],
    rounds: tuple[int, int], end: float,
) -> Record:  # fmt: skip
    """The entry of one batch: every side's seconds with few and with many tokens, in turns."""
    machine, (short, long) = decoding.machine, lengths
    records: dict[str, Record] = {}
    runs: dict[str, Run] = {}
    whole = 0.0
    for side in sides:
        engine = side.engine
        record: Record = {"width": side.width, "depth": side.depth, "engine": engine}
        records[side.name] = record
        if engine in bad:
            record |= {"status": "wrong", "why": bad[engine]}
            continue
        run: Run = functools.partial(decoding.plain, batch)
        try:
            if engine is not None:
                shape = (batch, side.width, side.depth, engine)
                run = functools.partial(decoding.ours, *shape)
                if engine != "eager":
                    record["warm_up"] = machine.wall(functools.partial(decoding.warm_up, *shape, long))
                decoding.told(*shape, long)
            run(short)
            whole += sum(machine.wall(functools.partial(run, count)) for count in lengths)
        except Exception as error:
            if not machine.healthy():
                raise BrokenDeviceError(f"batch {batch}, {side.name}: {first_line(error)}") from None
            record |= {"status": "failed", "why": first_line(error)}
            continue
        runs[side.name] = run
    names = list(runs)
    samples: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in names}
    least, most = rounds
    for turn in range(max(least, min(most, int((end - time.monotonic()) / whole))) if names else 0):
        if turn >= least and time.monotonic() > end:
            break
        for place in range(len(names)):
            name = names[(turn + place) % len(names)]
            for count, taken in zip(lengths, samples[name], strict=True):
                taken.append(machine.wall(functools.partial(runs[name], count)))
    for side in sides:
        if side.name not in runs:
            continue
        few, many = samples[side.name]
        record = records[side.name]
        record |= {"status": "timed", "short": few, "long": many}
        if side.engine is not None:
            stats = decoding.told(batch, side.width, side.depth, side.engine, long).stats
            record |= {"stats": dict(stats.seconds), "nodes_per_token": stats.nodes_per_token}
            if "warm-up" in stats.seconds:
                # What was made before had been let go of, and each round's call made it again.
                record |= {"status": "failed", "why": "what warming up had made did not last"}
    return {"batch": batch, "prompt": decoding.prompt, "new": [short, long], "sides": records}


def peak_memory(
    decoding: Decoding, batch: int, sides: Sequence[Side], count: int, bad: Mapping[str | None, str]
) -> Record:
    """The entry of one batch: bytes at the peak of a first call, what warming up takes included."""
    records: dict[str, Record] = {}
    for side in sides:
        if side.engine in bad:
            records[side.name] = {"status": "wrong", "why": bad[side.engine]}
            continue
        decoding.release()

        def work(side: Side = side) -> None:
            if side.engine is None:
                decoding.plain(batch, count)
            else:
                decoding.ours(batch, side.width, side.depth, side.engine, count)

        try:
            records[side.name] = {"status": "measured", **decoding.machine.peak(work)}
        except Exception as error:
            if not decoding.machine.healthy():
                raise BrokenDeviceError(f"memory, batch {batch}, {side.name}: {first_line(error)}") from None
            records[side.name] = {"status": "failed", "why": first_line(error)}
    decoding.release()
    return {"batch": batch, "new": count, "sides": records}


class PhaseClock:
    """Takes the place of a step's ``phase``; time within a phase belongs to the innermost one alone."""

    FIRST = "sample"

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._open: list[str] = []
        self._marks: list[tuple[Any, str | None, int]] = []  # the phase that begins there, and its step
        self._step = -1

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if name == self.FIRST and not self._open:
            self._machine.let_host_run_ahead()
            self._step += 1
        self._open.append(name)
        self._mark()
        try:
            yield
        finally:
            self._open.pop()
            self._mark()

    def _mark(self) -> None:
        self._marks.append((self._machine.mark(), self._open[-1] if self._open else None, self._step))

    def seconds(self) -> dict[str, float]:
        """The median over steps of every phase; the device has come to the last mark."""
        steps: dict[str, dict[int, float]] = {}
        for (one, phase, step), (other, _, _) in zip(self._marks, self._marks[1:], strict=False):
            if phase is not None:
                of_phase = steps.setdefault(phase, {})
                of_phase[step] = of_phase.get(step, 0.0) + self._machine.between(one, other)
        return {phase: statistics.median(taken.values()) for phase, taken in steps.items()}


@contextlib.contextmanager
def phases_given_to(clock: PhaseClock) -> Iterator[None]:
    """Every fixed step that runs inside the block has ``clock`` for its ``phase``."""
    run = FixedStep.run

    def run_with_marks(step: FixedStep) -> None:
        own, step.phase = step.phase, clock
        try:
            run(step)
        finally:
            step.phase = own

    with patch.object(FixedStep, "run", run_with_marks):
        yield


def phases(decoding: Decoding, batch: int, bad: Mapping[str | None, str], count: int) -> Record:
    """The entry of one batch: seconds of every phase of a step, at every setting."""
    records: dict[str, Record] = {}
    for width, depth in SETTINGS:
        name = setting_name(width, depth)
        if "static" in bad:
            records[name] = {"status": "wrong", "why": bad["static"]}
            continue
        try:
            decoding.told(batch, width, depth, "static", count)
            clock = PhaseClock(decoding.machine)
            with phases_given_to(clock):
                decoding.machine.wall(functools.partial(decoding.ours, batch, width, depth, "static", count))
            records[name] = {"status": "timed", "seconds": clock.seconds()}
        except Exception as error:
            if not decoding.machine.healthy():
                raise BrokenDeviceError(f"phases, batch {batch}, {name}: {first_line(error)}") from None
            records[name] = {"status": "failed", "why": first_line(error)}
    return {"batch": batch, "steps": count, "settings": records}


SECTIONS = {
    "checks": 70.0,
    "ops": 90.0,
    "step": 120.0,
    "memory": 25.0,
    "phases": 25.0,
    "batches": 100.0,
    "engines": 80.0,
}
"""What a run does, in order, and the seconds that each part is meant to take; 510 in all."""
RESERVE = 15.0  # seconds for the roof's second reading, tables and plot


class Plan:
    """Shares the time that is left among the sections that are left, by the seconds that they are meant to take."""

    def __init__(self, seconds: float, sections: Mapping[str, float]) -> None:
        self._end = time.monotonic() + seconds - min(RESERVE, seconds / 10)
        self._left = dict(sections)

    def begin(self, section: str) -> float:
        """When the section has to be done."""
        now = time.monotonic()
        share = self._left[section] / sum(self._left.values())
        del self._left[section]
        return now + max(0.0, self._end - now) * share


@torch.no_grad()
def measure(
    machine: Machine, scale: Scale, cases: Sequence[gpu_ops.Case], seconds: float, data: Record,
    keep: Callable[[Record], object],
) -> None:  # fmt: skip
    """Fill ``data`` with the whole run; ``keep`` is given what is known after every entry."""
    plan = Plan(seconds, SECTIONS)
    data |= {
        "engine": scale.engine, "method": method(scale), "roof": [machine.roof()], "sections": {}, "skipped": [],
        "checks": [], "ops": [], "preference": {}, "model": {}, "steps": [], "memory": [], "phases": [], "engines": [],
    }  # fmt: skip

    @contextlib.contextmanager
    def section(name: str) -> Iterator[float]:
        start = time.monotonic()
        end = plan.begin(name)
        say(f"{name}: {end - start:.0f} s")
        yield end
        data["sections"][name] = {"allotted": end - start, "taken": time.monotonic() - start}
        keep(data)

    def each(kind: str, what: Mapping[str, T], end: float, entry: Callable[[T, float], Record]) -> None:
        # An equal share of what is left until `end` for each of them.
        for index, (name, one) in enumerate(what.items()):
            now = time.monotonic()
            if now > end:
                data["skipped"].append({"what": f"{kind}, {name}", "why": "the time was used up"})
                continue
            data[kind].append(entry(one, now + (end - now) / (len(what) - index)))
            say(_shown(kind, data[kind][-1]))
            keep(data)

    def add_op(entry: Record) -> None:
        data["ops"].append(entry)
        data["preference"] = gpu_ops.preference(data["ops"])
        keep(data)

    fast = [Side(width, depth, scale.engine) for width, depth in SETTINGS]
    plain = Side(1, 1, None)
    try:
        with section("checks"):
            data["checks"] = check_engines(machine, scale.engines)
            decoding = Decoding(machine, make_model(scale.model, machine.device, machine.dtype), scale.prompt)
            data["model"] = {**scale.model, "parameters": decoding.model.num_parameters(), "prompt": scale.prompt}
            bad = refused(data["checks"])
            data["checks"] += [
                check_model_forward(decoding, engine, scale.lengths[0]) for engine in scale.engines if engine not in bad
            ]
            bad = refused(data["checks"])
            decoding.release()
        with section("ops") as end:
            data["skipped"] += gpu_ops.measure_ops(machine, cases, end, add_op)
            machine.free_bytes()

        def timed(
            batch: int, sides: Sequence[Side], lengths: tuple[int, int], rounds: tuple[int, int], end: float
        ) -> Record:
            found = time_sides(decoding, batch, sides, lengths, bad, rounds, end)
            decoding.release()
            return found

        few = (scale.rounds[0], scale.rounds[0])
        batches, more = ({f"batch {b}": b for b in some} for some in (scale.batches, scale.more_batches))
        with section("step") as end:
            each("steps", batches, end, lambda b, end: timed(b, [*fast, plain], scale.lengths, scale.rounds, end))
        with section("memory") as end:
            new = scale.lengths[1]
            each("memory", batches, end, lambda b, _: peak_memory(decoding, b, [*fast, plain], new, bad))
        with section("phases") as end:
            each("phases", batches, end, lambda b, _: phases(decoding, b, bad, scale.phase_steps))
        with section("batches") as end:
            each("steps", more, end, lambda b, end: timed(b, fast, scale.batch_lengths, few, end))
        with section("engines") as end:
            # One setting at a time: a model keeps few fixed steps.
            compared = {
                f"{name}, {setting_name(*setting)}": (b, [Side(*setting, engine) for engine in scale.engines])
                for name, b in batches.items()
                for setting in SETTINGS
            }
            each("engines", compared, end, lambda one, end: timed(*one, scale.engine_lengths, few, end))
    except Exception as error:
        data["aborted"] = first_line(error)
        say(f"aborted: {data['aborted']}")
        return
    machine.free_bytes()
    data["roof"].append(machine.roof())
    data["complete"] = True


def method(scale: Scale) -> str:
    """How it was measured, for the record and the tables."""
    (few, many), (batch_few, batch_many), (slow_few, slow_many) = (
        scale.lengths, scale.batch_lengths, scale.engine_lengths
    )  # fmt: skip
    batches = " and ".join(map(str, scale.batches))
    return (
        f"Prompts of {scale.prompt} random tokens, draws from the {TOP_K} likeliest tokens, no end token. The time of "
        f"a step is that of {many} new tokens less that of {few}, over the difference ({batch_many} and {batch_few} at "
        f"batches other than {batches}, {slow_many} and {slow_few} where engines are compared). The ops run in CUDA "
        "graphs, cold or warm in the L2 as each case says."
    )


def _shown(kind: str, entry: Record) -> str:
    parts = []
    for name, side in entry["settings" if kind == "phases" else "sides"].items():
        what = str(side["status"])
        if "short" in side:
            what = f"{number(1e3 * statistics.median(step_seconds(entry, name)))} ms a step"
        elif side["status"] == "timed":
            what = ", ".join(f"{phase} {number(1e3 * taken)} ms" for phase, taken in side["seconds"].items())
        parts.append(f"{name}: {what}")
    return f"{kind}, batch {entry['batch']}: {'; '.join(parts)}"


def step_seconds(entry: Record, name: str) -> list[float]:
    """Of one side, a step's time in every round."""
    few, many = entry["new"]
    side = entry["sides"][name]
    return [(long - short) / (many - few) for short, long in zip(side["short"], side["long"], strict=True)]


def entries(data: Record) -> Iterator[tuple[str, dict[str, Record]]]:
    """Every entry of a run: its name, and its sides."""
    for entry in data["ops"]:
        yield f"{entry['op']}, {entry['case']}", entry["sides"]
    for kind in ("steps", "memory", "phases", "engines"):
        for entry in data[kind]:
            yield f"{kind}, batch {entry['batch']}", entry["settings" if kind == "phases" else "sides"]


def troubles(data: Record) -> list[str]:
    """What makes the command end with 1: an abort, and whatever was wrong or failed."""
    found = [f"aborted: {data['aborted']}"] if data["aborted"] else []
    found += [
        f"engine {one['engine']}, {one['what']}: {one['status']}: {one['why']}"
        for one in data["checks"]
        if one["status"] != "passed"
    ]
    found += [f"{one['what']}: {one['why']}" for one in data["skipped"] if one["why"].startswith("failed")]
    for where, sides in entries(data):
        found += [
            f"{where}; {name}: {side['status']}: {side['why']}"
            for name, side in sides.items()
            if side["status"] in ("wrong", "failed")
        ]
    return found
