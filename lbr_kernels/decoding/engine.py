"""How a call is run: step by step, as fixed steps, or as replays of a CUDA graph of the fixed step.

Contract
--------
``"eager"`` is ``TreeDecoder``: anything that ``model.generate`` takes, shapes as small as they can be, the host asks
after every step who has ended. ``"static"`` runs :class:`FixedStep`, whose tensors have one shape from the first step
to the last. ``"graph"`` replays that step as one CUDA graph: the host enqueues steps and reads what they did a few
steps later; what was decoded past the end is cut off and counted nowhere (``decoding/replay.py``). All three give the
same text.

A fixed step is made for a number of rows, a tree, and a class of cache sizes, and kept with its model for later calls,
cache and graph included; :func:`release` lets go of them. A graph holds addresses, and what the model's Python did
once: it serves only while parameters and modules are as they were, and a model that runs Python of somebody else at
every step (hooks, sharded parameters) is not captured.
"""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from transformers import LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.cache_utils import Cache
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from lbr_kernels.decoding import adapter as model_adapter
from lbr_kernels.decoding.adapter import ModelAdapter
from lbr_kernels.decoding.cache import TreeCache, layer_window
from lbr_kernels.decoding.config import LBRConfig
from lbr_kernels.decoding.loop import DecodingStats
from lbr_kernels.decoding.routing import Routing
from lbr_kernels.decoding.sampling import builtin_filters
from lbr_kernels.decoding.step import FixedStep
from lbr_kernels.ops.tree_shape import num_slots

_MOST_KEPT = 4  # steps of a model
_WARM_UP_RUNS = 2  # before a capture: libraries choose and load their kernels


class NotFixedError(RuntimeError):
    """A fixed step, or its graph, cannot be had; the message says why."""


class ModelKey(NamedTuple):
    """Changes when a graph of the model's forward no longer stands for it: where its tensors are, and how it is set."""

    places: int
    modes: int


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
    vocabulary: int
    layers: tuple[Any, ...]
    router: tuple[Any, ...]
    backend: str | None
    model: ModelKey | None  # of captured steps

    def serves(self, other: StepKey) -> bool:
        """Whether a step for this is one for ``other``, too."""
        return self.capacity >= other.capacity and replace(self, capacity=other.capacity) == other


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
            try:
                if self.step.device.type == "cuda":
                    torch.cuda.synchronize(self.step.device)  # steps past the end may still be under way
            finally:
                self.step.adapter = None
                self.in_use.release()


# Nothing that is kept refers to its model. A text in the place of a step says why there is none.
_steps: WeakKeyDictionary[nn.Module, dict[StepKey, KeptStep | str]] = WeakKeyDictionary()
_making = threading.RLock()  # one capture at a time, and one look at what is kept


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
    reason = _graph_obstacle(model) if config.engine != "static" else None
    reason = reason or _obstacle(config, routing, processors, criteria)
    if looks_on:
        reason = reason or "on_step wants to see every step"
    if keep_scores:
        reason = reason or "scores or logits of every step are asked for"
    if config.engine is not None and reason is not None:
        raise ValueError(f"generate: engine {config.engine!r} cannot run: {reason}")
    return reason


def _obstacle(
    config: LBRConfig, routing: Routing, processors: LogitsProcessorList, criteria: StoppingCriteriaList
) -> str | None:
    """What changes shapes, or what the host must see or do at every step."""
    if config.trie:
        return "trie is on, whose shapes change from step to step"
    if builtin_filters(processors) is None:
        names = [type(processor).__name__ for processor in processors]
        return f"the logits processors are {names}, more than the built-in filters as transformers orders and sets them"
    others = [type(c).__name__ for c in criteria if type(c) not in (MaxLengthCriteria, EosTokenCriteria)]
    if others:
        return f"the stopping criteria have {others}, which the host evaluates at every step"
    if routing.router is not None and routing.weights is None:
        return "the router is a function"
    return None


def _graph_obstacle(model: PreTrainedModel) -> str | None:
    """What a replay would pass over in silence."""
    if model.device.type != "cuda":
        return f"the model is on {model.device}, and graphs are CUDA's"
    return _python_at_every_step(model)


def _python_at_every_step(model: PreTrainedModel) -> str | None:
    """Code or tensors of somebody else in the model's forward, of which a graph would keep one moment."""
    if torch.is_autocast_enabled(model.device.type):
        return "autocast is on, whose copies of the weights a graph would keep"
    for tensor in (*model.parameters(), *model.buffers()):
        if type(tensor) not in (nn.Parameter, nn.Buffer, torch.Tensor):
            return f"the model has parameters of type {type(tensor).__name__}"
        if tensor.device != model.device:
            return f"the model has parameters on {model.device} and on {tensor.device}"
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return "there are global forward hooks"
    for name, module in model.named_modules():
        hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        # The adapter's own hook is there while another thread decodes.
        if hasattr(module, "_hf_hook") or any(h.__module__ != model_adapter.__name__ for h in hooks):
            return f"there is a hook on the model's {name or type(module).__name__}, which runs at every step"
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
        length: tokens of a text at most.
        stats: gets the seconds of phase ``warm-up``.

    Raises:
        NotFixedError: memory is too small, or the capture fails, for example as the model reads on the host.
    """
    key = StepKey(
        rows, width, depth, capacity_class(length) + num_slots(width, depth), draw_children, draw_choice, num_eos,
        adapter.vocabulary, _layers_key(prefilled), (routing.temperature, routing.weights and routing.weights[1:]),
        routing.backend, _model_key(model) if captured else None,
    )  # fmt: skip
    with _making:
        kept = _steps.setdefault(model, {})
        serving = [other for other in kept if other.serves(key)]
        if serving:
            smallest = min(serving, key=lambda other: other.capacity)
            found = kept[smallest] = kept.pop(smallest)  # the last one used comes last
            if isinstance(found, str):
                raise NotFixedError(found)
            return found
        for stale in [other for other in kept if _is_stale(other, key)]:
            del kept[stale]
        while len(kept) >= _MOST_KEPT:
            del kept[next(iter(kept))]
        with stats.phase("warm-up"):
            made = _make(key, model, adapter, prefilled, routing)
            if made.out_of_memory and kept:
                kept.clear()
                made = _make(key, model, adapter, prefilled, routing)
        if made.step is None:
            if not made.out_of_memory:
                kept[key] = made.reason  # trying again would fail again
            raise NotFixedError(made.reason)
        kept[key] = made.step
        return made.step


def take_step(
    caller: str,
    model: PreTrainedModel,
    config: LBRConfig,
    adapter: ModelAdapter,
    prefilled: Cache,
    stats: DecodingStats,
    stack: ExitStack | None,
    **shape: Any,
) -> KeptStep | None:
    """:func:`kept_step` for whoever calls it by a config, with ``stats`` saying how it is run and why.

    Args:
        caller: begins a message.
        stack: the step is the caller's until it unwinds; None only has it made.
        **shape: as for :func:`kept_step`.

    Returns:
        The step; None if it cannot be had and another engine will do.

    Raises:
        RuntimeError: it cannot be had, and was asked for by name.
    """
    try:
        step = kept_step(model, adapter, prefilled, captured=config.engine != "static", stats=stats, **shape)
        if stack is not None:
            stack.enter_context(step.in_call(adapter))
    except NotFixedError as error:
        if config.engine is not None:
            raise RuntimeError(f"{caller}: engine {config.engine!r} cannot run: {error}") from error
        stats.engine_reason = str(error)
        return None
    stats.engine = config.engine or "graph"
    stats.engine_reason = "engine is 'static'" if config.engine == "static" else None
    return step


class _Made(NamedTuple):
    step: KeptStep | None
    reason: str = ""
    out_of_memory: bool = False


def _make(key: StepKey, model: PreTrainedModel, adapter: ModelAdapter, prefilled: Cache, routing: Routing) -> _Made:
    """A new step, or why there is none; what a failure leaves behind is gone on return."""
    made = _try_to_make(key, model, adapter, prefilled, routing)
    if made.step is None and model.device.type == "cuda":
        torch.cuda.empty_cache()
    return made


def _try_to_make(
    key: StepKey, model: PreTrainedModel, adapter: ModelAdapter, prefilled: Cache, routing: Routing
) -> _Made:
    outer = sys.exc_info()[1]
    device = model.device
    try:
        # In inference mode tensors would be made that no later call outside of it may write to.
        with torch.inference_mode(False), torch.no_grad():
            cache = TreeCache.from_prefill(
                _first_tokens(prefilled), torch.ones(1, dtype=torch.int64), repeats=key.rows,
                tree_nodes=num_slots(key.width, key.depth), max_new_tokens=0, release=False,
                fixed_capacity=key.capacity,
            )  # fmt: skip
            step = FixedStep(
                cache, rows=key.rows, width=key.width, depth=key.depth, routing=routing.copy(),
                draw_children=key.draw_children, draw_choice=key.draw_choice, num_eos=key.num_eos,
                last_position=adapter.last_position, device=device,
            )  # fmt: skip
            new = KeptStep(step)
            with new.in_call(adapter):
                step.measure()
                if key.model is not None:
                    new.graph = _capture(step, device)
            return _Made(new)
    except Exception as error:  # a model's own code can fail in any way, and so can a capture
        root = _root(error, outer)
        # The frames that the error has passed hold what was made.
        error.with_traceback(None)
        root.with_traceback(None)
        return _Made(None, _in_words(root), isinstance(root, torch.OutOfMemoryError))


def _is_stale(kept: StepKey, key: StepKey) -> bool:
    """Whether a step's graph was made for tensors that are no longer there."""
    return kept.model is not None and key.model is not None and kept.model.places != key.model.places


def release(model: nn.Module) -> None:
    """Let go of the decoding steps that ``model`` keeps: their caches, and the memory of their graphs.

    Calls that come later make new ones. Without effect on a call that is under way. ``torch.cuda.empty_cache()`` gives
    the memory back to the device.

    Raises:
        TypeError: that is no model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"release: model is a {type(model).__name__}, expected a model")
    with _making:
        for module in model.modules():  # a wrapper's model is among them
            _steps.pop(module, None)


def _capture(step: FixedStep, device: torch.device) -> torch.cuda.CUDAGraph:
    """Run the step some times, for whatever is loaded or chosen at first use, then record it.

    Whatever the outcome, the device and this thread are as before. (``torch.cuda.graph`` leaves its stream the current
    one, and its pool open, where the end of a capture fails.)
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP_RUNS):
            step.run()
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.synchronize(device)
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    # cuBLAS's workspaces of this stream shall lie in the graph's pool, where nobody frees them.
    torch._C._cuda_clearCublasWorkspaces()
    with torch.cuda.stream(stream):
        try:
            # Other threads may use the device meanwhile.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            step.run()
            graph.capture_end()
        except BaseException:
            _end_capture(graph, device, pool)
            raise
        finally:
            torch._C._cuda_clearCublasWorkspaces()
    return graph


def _end_capture(graph: torch.cuda.CUDAGraph, device: torch.device, pool: Any) -> None:
    """Undo what a capture that failed has begun."""
    with suppress(RuntimeError):
        graph.capture_end()
    with suppress(RuntimeError):
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device() if device.index is None else device.index, pool)
    with suppress(RuntimeError):
        # The random number generators believe that they are being captured until a capture has ended well.
        another = torch.cuda.CUDAGraph()
        another.capture_begin(capture_error_mode="thread_local")
        another.capture_end()


def _root(error: BaseException, outer: BaseException | None) -> BaseException:
    """What an error comes from: what a failed capture reports after it says nothing.

    ``outer`` is what the caller was handling when all this began.
    """
    while error.__context__ is not None and error.__context__ is not outer:
        error = error.__context__
    return error


def _in_words(error: BaseException) -> str:
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


def _layers_key(prefilled: Cache) -> tuple[Any, ...]:
    """What the tree cache's layers are made after."""
    return tuple(
        (layer_window(layer), states.dtype, states.device, states.shape[1], states.shape[3])
        for layer in prefilled.layers
        for states in (layer.keys, layer.values)
    )


def _model_key(model: PreTrainedModel) -> ModelKey:
    places = [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())]
    modes: list[object] = [torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()]
    for module in model.modules():
        modes += [id(module), module.training, id(type(module).forward), id(module.__dict__.get("forward"))]
        # PEFT's layers decide by these what they add.
        for name in ("active_adapters", "disable_adapters", "merged_adapters", "scaling"):
            value = getattr(module, name, None)
            modes.append(None if callable(value) else repr(value))
    return ModelKey(hash(tuple(places)), hash(tuple(modes)))
