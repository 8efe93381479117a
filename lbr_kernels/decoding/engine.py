"""How a call is run: step by step, as fixed steps, or as replays of a CUDA graph of the fixed step.

Contract
--------
``"eager"`` is ``TreeDecoder``: anything that ``model.generate`` takes, shapes as small as they can be, the host asks
after every step who has ended. ``"static"`` runs :class:`FixedStep`, whose tensors have one shape from the first step
to the last. ``"graph"`` replays that step as one CUDA graph: the host enqueues steps and reads what they did a few
steps later; what was decoded past the end is cut off and counted nowhere. All three give the same text.

A fixed step is made for a number of rows, a tree, and a class of cache sizes, and kept with its model for later calls,
cache and graph included; :func:`release` lets go of them. A graph holds addresses: it serves only while the model's
parameters are where they were, and its modules as they were.
"""

from __future__ import annotations

import copy
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.cache_utils import Cache
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer

from lbr_kernels import ops
from lbr_kernels.decoding.adapter import ModelAdapter
from lbr_kernels.decoding.cache import TreeCache
from lbr_kernels.decoding.config import LBRConfig
from lbr_kernels.decoding.loop import DecodingStats, Limits
from lbr_kernels.decoding.routing import Routing
from lbr_kernels.decoding.sampling import DRAWN_TOGETHER, Draws, builtin_filters
from lbr_kernels.decoding.step import FixedStep, StepRecord
from lbr_kernels.decoding.tracing import named_range
from lbr_kernels.ops._flags import word
from lbr_kernels.ops.tree_shape import num_slots

MOST_STEPS_LATE = 3
"""So many steps are enqueued before the host reads what the first of them did."""

_MOST_KEPT = 4  # steps that a model keeps
_WARM_UP_RUNS = 2  # before a capture: libraries choose and load their kernels


class NotFixedError(RuntimeError):
    """A fixed step, or its graph, cannot be had; the message says why."""


@dataclass(frozen=True)
class StepKey:
    """What a fixed step is made for: calls for which all of this is equal can share one."""

    rows: int
    width: int
    depth: int
    capacity: int
    draw_children: bool
    draw_choice: bool
    num_eos: int
    router: tuple[Any, ...]
    backend: str | None
    model: int
    captured: bool


@dataclass
class KeptStep:
    """A fixed step, its graph if it has one, and whether a call is using it."""

    step: FixedStep
    graph: torch.cuda.CUDAGraph | None = None
    in_use: threading.Lock = field(default_factory=threading.Lock)

    def run(self) -> None:
        if self.graph is None:
            self.step.run()
        else:
            self.graph.replay()

    @contextmanager
    def in_call(self, adapter: ModelAdapter) -> Iterator[None]:
        """The step belongs to one call inside the block, and has its model there only.

        Raises ``NotFixedError`` while it belongs to another one.
        """
        if not self.in_use.acquire(blocking=False):
            raise NotFixedError("another call is using the step that this model keeps")
        try:
            self.step.adapter = adapter
            yield
        finally:
            if self.step.device.type == "cuda":
                torch.cuda.synchronize(self.step.device)  # steps past the end may still be under way
            self.step.adapter = None
            self.in_use.release()


# Nothing that is kept refers to its model.
_steps: WeakKeyDictionary[nn.Module, dict[StepKey, KeptStep]] = WeakKeyDictionary()


def engine_obstacle(
    model: PreTrainedModel,
    config: LBRConfig,
    *,
    routing: Routing,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    keep_scores: bool,
    looks_on: bool,
) -> str | None:
    """Why a call is run step by step; None if fixed steps can do it.

    Raises:
        ValueError: another engine was asked for by name.
    """
    if config.engine == "eager":
        return "engine is 'eager'"
    reason = _obstacle(model, config, routing, processors, criteria)
    if looks_on:
        reason = reason or "on_step wants to see every step"
    if keep_scores:
        reason = reason or "scores or logits of every step are asked for"
    if config.engine is not None and reason is not None:
        raise ValueError(f"generate: engine {config.engine!r} cannot run: {reason}")
    return reason


def _obstacle(
    model: PreTrainedModel,
    config: LBRConfig,
    routing: Routing,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
) -> str | None:
    """Whatever the host must see or do at every step is one, and whatever changes shapes or places."""
    if config.engine != "static" and model.device.type != "cuda":
        return f"the model is on {model.device}, and graphs are CUDA's"
    if config.trie:
        return "trie is on, whose shapes change from step to step"
    if builtin_filters(processors) is None:
        return f"the logits processors are {[type(p).__name__ for p in processors]}, more than the built-in filters"
    others = [type(c).__name__ for c in criteria if type(c) not in (MaxLengthCriteria, EosTokenCriteria)]
    if others:
        return f"the stopping criteria have {others}, which the host evaluates at every step"
    if routing.router is not None and routing.weights is None:
        return "the router is a function"
    devices = {parameter.device for parameter in model.parameters()}
    if devices != {model.device}:
        return f"the model's parameters are on {', '.join(sorted(map(str, devices)))}"
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        return "accelerate's hooks move the model's parameters or inputs"
    return None


def capacity_class(length: int) -> int:
    """The number of slots that a cache for ``length`` of them gets: of four classes between two powers of two.

    >>> [capacity_class(length) for length in (1, 257, 1024, 1025)]
    [256, 320, 1024, 1280]
    """
    power = 1 << (max(length, 257) - 1).bit_length() - 1
    quarter = power // 4
    return max(power, -(-length // quarter) * quarter)


def kept_step(
    model: PreTrainedModel,
    adapter: ModelAdapter,
    prefilled: Cache,
    *,
    rows: int,
    width: int,
    depth: int,
    length: int,
    draw_children: bool,
    draw_choice: bool,
    num_eos: int,
    routing: Routing,
    captured: bool,
    stats: DecodingStats,
) -> KeptStep:
    """A step for such a call: one that the model keeps, or a new one, which is captured if it shall be.

    Args:
        prefilled: any cache of the model with at least one token in one row, for the layers' shapes; it is only read.
        length: slots that a text and a tree take at most.
        stats: gets the seconds of phase ``warm-up``.

    Raises:
        NotFixedError: memory is too small, or the capture fails, for example as the model reads on the host.
    """
    key = StepKey(
        rows, width, depth, capacity_class(length), draw_children, draw_choice, num_eos, _router_key(routing),
        routing.backend, _model_key(model), captured,
    )  # fmt: skip
    kept = _steps.setdefault(model, {})
    if key in kept:
        kept[key] = kept.pop(key)  # the last one used comes last
        return kept[key]
    # Steps for parameters that are gone would never be used again.
    for stale in [other for other in kept if other.model != key.model]:
        del kept[stale]
    while len(kept) >= _MOST_KEPT:
        del kept[next(iter(kept))]
    # In inference mode tensors would be made that no later call outside of it may write to.
    with stats.phase("warm-up"), torch.inference_mode(False), torch.no_grad():
        device = model.device
        try:
            one = torch.ones(1, dtype=torch.int64)
            cache = TreeCache.from_prefill(
                _first_tokens(prefilled), one, repeats=rows, tree_nodes=num_slots(width, depth), max_new_tokens=0,
                release=False, fixed_capacity=key.capacity,
            )  # fmt: skip
            step = FixedStep(
                cache, rows=rows, width=width, depth=depth, routing=routing.copy(), draw_children=draw_children,
                draw_choice=draw_choice, num_eos=num_eos, last_position=adapter.last_position, device=device,
            )  # fmt: skip
            new = KeptStep(step)
            with new.in_call(adapter):
                step.measure()
                if captured:
                    new.graph = _capture(step, device)
        except Exception as error:  # a model's own code can fail in any way, and so can a capture
            if device.type == "cuda":
                torch.cuda.empty_cache()
            raise NotFixedError(_in_words(error)) from error
    kept[key] = new
    return new


def release(model: nn.Module) -> None:
    """Let go of the decoding steps that ``model`` keeps: their caches, and the memory of their graphs.

    Calls that come later make new ones. Without effect on a call that is under way.
    """
    for module in model.modules():  # a wrapper's model is among them
        _steps.pop(module, None)


def _capture(step: FixedStep, device: torch.device) -> torch.cuda.CUDAGraph:
    """Run the step some times, for whatever is loaded or chosen at first use, then record it."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP_RUNS):
            step.run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Other threads may use the device meanwhile.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        step.run()
    return graph


def _in_words(error: BaseException) -> str:
    """The root of an error: what a failed capture reports after it says nothing."""
    while error.__context__ is not None:
        error = error.__context__
    first_line = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first_line}"


def _first_tokens(prefilled: Cache) -> Cache:
    """A view of a prefilled cache with one token of one row, for its shapes."""
    layers = []
    for layer in prefilled.layers:
        view = copy.copy(layer)
        view.keys, view.values = layer.keys[:1, :, -1:], layer.values[:1, :, -1:]
        layers.append(view)
    first = copy.copy(prefilled)
    first.layers = layers
    return first


def _router_key(routing: Routing) -> tuple[Any, ...]:
    """The router's shape, and what is not a tensor of it."""
    return (routing.temperature, None if routing.weights is None else routing.weights[1:])


def _model_key(model: PreTrainedModel) -> int:
    """Changes when a graph of the model's forward no longer stands for it."""
    parts: list[object] = [torch.is_autocast_enabled(model.device.type), torch.get_autocast_dtype(model.device.type)]
    parts += [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())]
    for module in model.modules():
        hooks = (*module._forward_pre_hooks, *module._forward_hooks)
        # PEFT's layers decide by these what they add.
        adapters = [repr(getattr(module, name, None)) for name in ("active_adapters", "disable_adapters", "scaling")]
        parts.append((id(module), module.training, hooks, *adapters))
    return hash(tuple(parts))


class RecordReader:
    """What steps have done, on the host, some steps later: copies that nobody waits for until they are needed.

    The flags that kernels set when they meet bad values travel along.
    """

    def __init__(self, record: StepRecord, device: torch.device, most_late: int) -> None:
        self._device = device
        self._from = (record.numbers, record.log_probs, word(device))
        self._free = [
            tuple(torch.empty(t.shape, dtype=t.dtype, pin_memory=device.type == "cuda") for t in self._from)
            for _ in range(most_late + 1)
        ]
        self._under_way: deque[tuple[tuple[Tensor, ...], torch.cuda.Event | None]] = deque()

    def __len__(self) -> int:
        return len(self._under_way)

    def enqueue(self) -> None:
        """Have the record of the step that was enqueued last copied."""
        to = self._free.pop()
        for source, target in zip(self._from, to, strict=True):
            target.copy_(source, non_blocking=True)
        event = None
        if self._device.type == "cuda":
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self._device))
        self._under_way.append((to, event))

    def read(self) -> StepRecord:
        """The oldest record that was not read yet. Raises ``RuntimeError`` if a kernel had met a bad value by then."""
        copies, event = self._under_way.popleft()
        if event is not None:
            event.synchronize()
        numbers, log_probs, flags = copies
        if flags.any():
            ops.raise_if_flagged(self._device)
        self._free.append(copies)
        return StepRecord(numbers.clone(), log_probs.clone())


class FixedDecoder:
    """Decodes one batch of rows by fixed steps; its results have the names of ``TreeDecoder``'s.

    Args:
        kept: the step, which the caller has locked; the prompts are in its cache.
        draws: the random numbers, needed where something is drawn.
        limits: where texts end.
        streamer: gets every committed token, as soon as the host knows of it.
        stats: is added to.
    """

    def __init__(
        self,
        kept: KeptStep,
        sequences: Tensor,
        *,
        draws: Draws | None,
        limits: Limits,
        streamer: BaseStreamer | None,
        stats: DecodingStats,
    ) -> None:
        self._kept, self._draws, self._limits, self._streamer, self._stats = kept, draws, limits, streamer, stats
        self.cache = kept.step.cache
        self.sequences = sequences
        self.num_committed = torch.zeros(len(sequences), dtype=torch.int64, device=sequences.device)
        self.node_tokens: list[Tensor] = []
        self.node_log_probs: list[Tensor] = []
        self.choices: list[Tensor] = []
        self.router_log_probs: list[Tensor] = []
        self.raw_logits: list[Tensor] = []
        self.scores: list[Tensor] = []

    def run(self, root_logits: Tensor, next_positions: Tensor, *, routing: Routing, filters: dict[str, float]) -> None:
        """From the logits ``[B, V]`` behind the prompts to the end of the last text."""
        step, stats, limits, device = self._kept.step, self._stats, self._limits, self.sequences.device
        with stats.phase("step"):
            layers = step.begin(
                root_logits, next_positions, routing=routing, filters=filters, limit=limits.max_new_tokens,
                eos_token_ids=limits.eos_token_ids, pad_token_id=limits.pad_token_id, draws=self._draws,
            )  # fmt: skip
            late = MOST_STEPS_LATE if self._kept.graph is not None else 0
            reader = RecordReader(step.record, device, late)
            records: list[StepRecord] = []
            goes_on, enqueued = True, 0
            while goes_on:
                if enqueued < limits.max_new_tokens:
                    self._enqueue(enqueued)
                    reader.enqueue()
                    enqueued += 1
                    if len(reader) <= late and enqueued < limits.max_new_tokens:
                        continue
                records.append(reader.read())
                goes_on = bool(records[-1].goes_on.any())
                if self._streamer is not None:
                    self._streamer.put(records[-1].committed)
        self._gather(layers, records)

    def _enqueue(self, number: int) -> None:
        if self._draws is not None and number % DRAWN_TOGETHER == 0:
            self._kept.step.draw(self._draws, number)
        with named_range("step"):
            self._kept.run()
        self.cache.committed(all_rows=False)

    def _gather(self, layers: list[tuple[Tensor, Tensor]], records: list[StepRecord]) -> None:
        """The results on the device, and what they cost."""
        numbers = torch.stack([record.numbers for record in records]).to(self.sequences.device)
        log_probs = torch.stack([record.log_probs for record in records]).to(self.sequences.device)
        done = [StepRecord(*pair) for pair in zip(numbers, log_probs, strict=True)]
        self.node_tokens = [*(tokens for tokens, _ in layers), *(record.tokens for record in done)]
        self.node_log_probs = [*(values for _, values in layers), *(record.token_log_probs for record in done)]
        self.choices = [record.choice for record in done]
        self.router_log_probs = [record.router_log_probs for record in done]
        self.sequences = torch.cat([self.sequences, numbers[:, :, -2].T], dim=1)
        self.num_committed = (numbers[:, :, -3] >= 0).sum(0)
        forwarded = [int((tokens >= 0).sum()) for tokens in self.node_tokens]
        self._stats.committed_tokens += int(self.num_committed.sum())
        self._stats.forwarded_nodes += sum(forwarded)
        self._stats.model_calls += sum(count > 0 for count in forwarded)
