"""The bridge to a transformers causal LM: prefill, forwards of a tree, and the check that both are exact.

Contract
--------
A forward of a tree is a plain call of the model with the tree's tokens, their positions and the tree cache, attention
going through ``decoding.attention``. The hidden states are read where the output head receives them; a hook hands the
head only the rows it is wanted for, so whatever follows the head (soft-cap, scale) stays exact. The model is left as
it was found, also after an exception or an interrupt.

Whether a model can be decoded this way is not a list of names: :func:`check_model` looks at its structure and then
compares a tree of random tokens with plain forwards of every path, once per model.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from lbr_kernels.decoding.attention import (
    TreeForward,
    attention_implementation,
    configs_of,
    own_attention_name,
    plain_forwards,
    prefill_implementation,
    tree_forward,
)
from lbr_kernels.decoding.cache import CACHE_NAME, TreeCache, layer_window
from lbr_kernels.decoding.linears import few_row_layers, few_row_linears
from lbr_kernels.decoding.tree import LookaheadTree
from lbr_kernels.ops.tree_shape import path_slots

Select = Callable[[Tensor], Tensor]
"""From the head's input ``[B, N, D]`` to the rows that the head shall see, ``[1, U, D]``."""


class UnsupportedModelError(ValueError):
    """A model that cannot be decoded with a tree; the message says why."""


def unwrapped(model: Any, *, caller: str = "generate") -> PreTrainedModel:
    """The transformers model inside wrappers: DDP, DeepSpeed, ``torch.compile``, PEFT.

    Raises ``TypeError`` if there is none, or one that generates no text.
    """
    found = model
    while not isinstance(found, PreTrainedModel):
        if hasattr(found, "_orig_mod"):
            found = found._orig_mod
        elif hasattr(found, "get_base_model"):
            found = found.get_base_model()
        elif isinstance(getattr(found, "module", None), nn.Module):
            found = found.module
        else:
            raise TypeError(f"{caller}: model is a {type(model).__name__}, expected a transformers PreTrainedModel")
    if not hasattr(found, "generate"):
        raise TypeError(
            f"{caller}: model is a {type(found).__name__}, which generates no text; AutoModelForCausalLM loads one "
            "that does"
        )
    return found


class ModelAdapter:
    """One model, as the decoding loop sees it; ``backend`` is what its matrix products may use (see ``ops``)."""

    def __init__(self, model: PreTrainedModel, *, backend: str | None = None) -> None:
        head = model.get_output_embeddings()
        if head is None:
            raise UnsupportedModelError(f"{_name(model)} has no output head (get_output_embeddings() is None)")
        self.model = model
        self.head: nn.Module = head
        self._configs = configs_of(model)
        self._linears = few_row_layers(model, backend)
        parameters = inspect.signature(model.forward).parameters
        self._takes_logits_to_keep = "logits_to_keep" in parameters
        # A model's own code may be older than the transformers that runs it.
        self._cache_name = CACHE_NAME if CACHE_NAME in parameters else "past_key_values"

    @property
    def hidden_size(self) -> int:
        """Width of the head's input."""
        weight = self.head.weight
        assert isinstance(weight, Tensor)
        return weight.shape[-1]

    @property
    def vocabulary(self) -> int:
        """Width of the head's output."""
        weight = self.head.weight
        assert isinstance(weight, Tensor)
        return weight.shape[0]

    @property
    def last_position(self) -> int | None:
        """The last position that the model can embed; None if its positions have no end (rotary, ALiBi, none)."""
        config = self.model.config.get_text_config(decoder=True)
        rotary = getattr(config, "rope_parameters", None) is not None or hasattr(config, "rope_theta")
        limit = getattr(config, "max_position_embeddings", None)
        return None if rotary or limit is None or getattr(config, "alibi", False) else int(limit) - 1

    def prefill(
        self, input_ids: Tensor, generation_config: GenerationConfig, model_kwargs: dict[str, Any]
    ) -> tuple[Tensor, Cache]:
        """Read the prompts as ``model.generate`` does; returns logits of the last position ``[B, V]`` and the cache."""
        implementation = prefill_implementation(self.model)
        if implementation is None:
            outputs = self.model._prefill(input_ids, generation_config, model_kwargs)
        else:
            with attention_implementation(self._configs, implementation, wait=False):
                outputs = self.model._prefill(input_ids, generation_config, model_kwargs)
        return outputs.logits[:, -1], getattr(outputs, CACHE_NAME)

    def forward_tree(
        self, tokens: Tensor, positions: Tensor, forward: TreeForward, select: Select
    ) -> tuple[Tensor, Tensor]:
        """Forward a layer of nodes.

        Args:
            tokens: ids, int64 ``[B, N]``, or embeddings ``[B, N, D]`` in their place.
            positions: int64 ``[B, N]``.
            forward: the cache and the masks.
            select: is given the nodes' hidden states ``[B, N, D]`` and says what the head shall see.

        Returns:
            The hidden states, and the head's logits after whatever the model does to them.
        """
        with tree_forward(forward, self._configs), few_row_linears(self._linears):
            return self._call(select, forward.cache, **_named(tokens), position_ids=positions)

    def head_inputs(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """The hidden states ``[B, N, D]`` of a plain forward of ids or embeddings, as the head would receive them."""
        return self._call(lambda states: states[:, -1:], cache, **_named(tokens))[0]

    def logits_of(self, states: Tensor) -> Tensor:
        """The logits ``[N, V]`` that head inputs ``[N, D]`` lead to, with whatever the model does to them.

        Costs a forward of one token, in which the head is given these in the place of its own input.
        """
        ids = torch.zeros((1, 1), dtype=torch.int64, device=states.device)
        return self._call(lambda _: states[None], None, input_ids=ids)[1][0]

    def _call(self, select: Select, cache: Cache | None, **inputs: Any) -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []
        caller, selecting, finished = threading.get_ident(), False, False

        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            nonlocal selecting
            if finished or selecting or threading.get_ident() != caller:
                # A forward of the same model by another thread, or by what `select` calls; or an interrupt came between
                # the hook and its handle.
                return None
            seen.append(args[0])
            selecting = True
            try:
                with plain_forwards():
                    return (select(args[0]), *args[1:])
            finally:
                selecting = False

        if self._takes_logits_to_keep:
            inputs["logits_to_keep"] = 0
        inputs["use_cache"] = cache is not None
        if cache is not None:
            inputs[self._cache_name] = cache
        handle = None
        try:
            handle = self.head.register_forward_pre_hook(hook)
            outputs = self.model(**inputs, return_dict=True)
        finally:
            finished = True
            if handle is not None:
                handle.remove()
        if len(seen) != 1:
            raise UnsupportedModelError(f"{_name(self.model)} calls its output head {len(seen)} times per forward")
        return seen[0], outputs.logits


def _named(tokens: Tensor) -> dict[str, Tensor]:
    return {"inputs_embeds" if tokens.is_floating_point() else "input_ids": tokens}


# What has passed, by what the outcome depends on; a refusal may have had a cause that goes away.
_reports: WeakKeyDictionary[nn.Module, dict[tuple[object, ...], ModelReport]] = WeakKeyDictionary()


def _name(model: nn.Module) -> str:
    return type(model).__name__


@dataclass(frozen=True)
class ModelReport:
    """What the check found: None for ``reason`` if trees are exact on this model, else why it is refused."""

    reason: str | None
    tree_error: float = 0.0
    noise: float = 0.0
    prefix_length: int = 0


_Module = TypeVar("_Module", bound=nn.Module)


def shell_of(module: _Module, **replaced: nn.Module) -> _Module:
    """A module with the attributes and the parts of another, some of which are replaced, and its class's forward.

    Nobody who uses the other one meanwhile sees a change.
    """
    shell = object.__new__(type(module))
    shell.__dict__.update(module.__dict__)
    shell.__dict__.pop("forward", None)
    shell.__dict__["_modules"] = {**module._modules, **replaced}
    return shell


def check_model(model: PreTrainedModel) -> ModelReport:
    """Whether trees are exact on ``model``; once it passes, that holds for its dtype, device and attention.

    Structure first, then numbers: a random prefix (longer than the model's windows where that is affordable) and a
    random tree behind it, grown, committed and grown again, against plain forwards of every path without a cache. The
    error allowed is relative to what rounding does to this model: the difference between its own cached and fresh
    forwards, and how far one rounding of the embeddings moves it.
    """
    key = (model.dtype, model.device, *(own_attention_name(config) for config in configs_of(model)))
    passed = _reports.setdefault(model, {})
    if key in passed:
        return passed[key]
    with at_rest(model) as resting:
        report = _check(resting)
    if report.reason is None:
        passed[key] = report
    return report


@contextmanager
def at_rest(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The model as checks run it: in evaluation mode, in its own arithmetic; afterwards it is as it was found."""
    training = [module for module in model.modules() if module.training]
    try:
        with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
            yield shell_of(model.eval())  # without the autocast that accelerate puts around a model's forward
    finally:
        for module in training:
            module.training = True


def require_supported(model: PreTrainedModel, *, caller: str = "generate") -> None:
    """Raise :class:`UnsupportedModelError` if trees are not exact on ``model``."""
    report = check_model(model)
    if report.reason is not None:
        raise UnsupportedModelError(f"{caller}: {_name(model)} cannot be decoded with a tree: {report.reason}")


def structural_reason(model: PreTrainedModel) -> str | None:
    """What a model's structure says against trees; None if nothing does."""
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder model; Local Branch Routing is for decoder-only models"
    if model.get_output_embeddings() is None:
        return "it has no output head (get_output_embeddings() is None)"
    if getattr(model, "_is_stateful", False):
        return "its state is recurrent and cannot be shared by the branches of a tree"
    parameters = inspect.signature(model.forward).parameters
    if "position_ids" not in parameters:
        return "its forward takes no position_ids, which siblings in a tree share"
    text_config = config.get_text_config(decoder=True)
    if "chunked_attention" in (getattr(text_config, "layer_types", None) or ()):
        return "its attention is chunked, which the tree kernels do not do"
    try:
        for layer in DynamicCache(config=text_config).layers:
            layer_window(layer)
    except TypeError as error:
        return str(error)
    return None


# A tree and a path of plain forwards sum in different orders; this much of a difference is never held against a model.
# In fp32 it is what method and tests ask of every node.
# (Models of doubles compute their norms and rotations in fp32 all the same.)
_FLOOR = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
_NOISE_FACTOR = 8
# The rounding of every layer is seen to weigh 0.1 to 0.9 times as much as one of the embeddings does.
_ROUNDING_FACTOR = 2
# A model whose own cached decoding is further than this from a fresh forward is not causal.
_MOST_NOISE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.2}
_WIDTH, _DEPTH = 2, 2


def _check(model: PreTrainedModel) -> ModelReport:
    reason = structural_reason(model)
    if reason is not None:
        return ModelReport(reason)
    try:
        return _compare(model)
    except Exception as error:  # a model's own code can fail in any way, and each is a reason
        return ModelReport(f"a forward of a tree failed ({type(error).__name__}: {error})")


def check_length(model: PreTrainedModel) -> int:
    """As long as the longest window and a little more, as far as some 10^10 multiplications per row allow it."""
    text_config = model.config.get_text_config(decoder=True)
    windows = [layer_window(layer) or 0 for layer in DynamicCache(config=text_config).layers]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    budget = int((2e10 if model.device.type == "cpu" else 2e13) / max(parameters, 1))
    length = min(max(12, max(windows, default=0) + 5), max(12, budget))
    last = ModelAdapter(model).last_position
    return length if last is None else min(length, last - _DEPTH)


def _compare(model: PreTrainedModel) -> ModelReport:
    adapter = ModelAdapter(model)
    device = model.device
    generator = torch.Generator().manual_seed(0)
    text_config = model.config.get_text_config(decoder=True)
    vocabulary = text_config.vocab_size
    length = check_length(model)

    def random_tokens(count: int) -> Tensor:
        return torch.randint(vocabulary, (1, count), generator=generator).to(device)

    prefix = random_tokens(length)
    tree = LookaheadTree(1, _WIDTH, _DEPTH, trie=False, device=device)
    prefilled = DynamicCache(config=model.config)
    adapter.head_inputs(prefix, prefilled)
    cache = TreeCache.from_prefill(
        prefilled, torch.tensor([length]), repeats=1, tree_nodes=tree.num_slots, max_new_tokens=2
    )
    hidden: dict[tuple[int, ...], Tensor] = {}
    committed: tuple[int, ...] = ()

    def grow(layer: int) -> str | None:
        growth = tree.grow(layer, random_tokens(_WIDTH**layer))
        cache.set_base(growth.base)
        forward = TreeForward(cache, growth.ancestors, None, None)
        positions = torch.full_like(growth.tokens, length + len(committed) + layer - 1)
        states, _ = adapter.forward_tree(growth.tokens, positions, forward, lambda states: states[:, :1])
        paths = tree.tokens[0, path_slots(_WIDTH, layer).flatten(0, 1)].tolist()
        # Of two equal paths the later slot stands for both.
        hidden.update({(*committed, *path): states[0, slot] for slot, path in enumerate(paths)})
        return _interface_mismatch(cache, forward.windows)

    # Two layers, a commit, one more layer: nodes of every age, and survivors that have moved.
    mismatch = grow(1) or grow(2)
    if mismatch is None:
        committed = (int(tree.tokens[0, 1]),)
        sources, num_moves = tree.commit(torch.ones(1, dtype=torch.int64, device=device), all_active=True)
        cache.commit(sources, num_moves, backend=None)
        cache.committed(all_rows=True)
        mismatch = grow(2)
    if mismatch is not None:
        return ModelReport(mismatch)

    deepest = max(map(len, hidden))
    padded = torch.tensor([[*path, *[0] * (deepest - len(path))] for path in hidden], device=device)
    ids = torch.cat([prefix.expand(len(padded), -1), padded], 1)
    fresh = adapter.head_inputs(ids)
    expected = torch.stack([fresh[row, length + len(path) - 1] for row, path in enumerate(hidden)])
    error = relative_error(torch.stack(list(hidden.values())), expected)
    noise = _cached_noise(adapter, prefix, padded[:1], fresh[:1, length:])
    rounding = _rounding_noise(adapter, ids, fresh, generator)
    allowed = max(_NOISE_FACTOR * noise, _ROUNDING_FACTOR * rounding, _FLOOR[fresh.dtype])
    reason = None
    if not noise <= _MOST_NOISE[fresh.dtype]:
        reason = f"its own decoding with a cache differs from a fresh forward by {noise:.1e}: it is not causal"
    elif not error <= allowed:
        reason = (
            f"nodes of a tree differ from plain forwards of their paths: relative error {error:.1e}, "
            f"where {allowed:.1e} is rounding"
        )
        if getattr(text_config, "attn_logit_softcapping", None) and text_config._attn_implementation == "sdpa":
            reason += "; SDPA passes over its soft-cap, load it with attn_implementation='eager'"
    return ModelReport(reason, error, noise, length)


def _interface_mismatch(cache: TreeCache, asked: list[int | None]) -> str | None:
    """Every layer must come through the plug-in, with the window that its cache, and so its usual mask, goes by."""
    windows = [layer.window for layer in cache.layers]
    if len(asked) < len(windows):
        return "its attention does not go through transformers' attention interface"
    if len(asked) == len(windows) and asked != windows:
        return f"its layers ask for sliding windows {asked}, its masks go by {windows}"
    return None


@torch.no_grad()
def rounding_tolerance(model: PreTrainedModel, ids: Tensor) -> float:
    """The relative error of a node's state that is rounding, on this model, for tokens like ``ids [1, n]``."""
    adapter = ModelAdapter(model)
    fresh = adapter.head_inputs(ids)
    rounding = _rounding_noise(adapter, ids, fresh, torch.Generator().manual_seed(0))
    return max(_ROUNDING_FACTOR * rounding, _FLOOR[fresh.dtype])


def _cached_noise(adapter: ModelAdapter, prefix: Tensor, path: Tensor, fresh: Tensor) -> float:
    """How far the model's own cached decoding of a path ``[1, n]`` is from its fresh forward."""
    cache = DynamicCache(config=adapter.model.config)
    adapter.head_inputs(prefix, cache)
    states = [adapter.head_inputs(token, cache) for token in path.split(1, dim=1)]
    return relative_error(torch.cat(states, dim=1), fresh)


def _rounding_noise(adapter: ModelAdapter, ids: Tensor, fresh: Tensor, generator: torch.Generator) -> float:
    """How far a forward moves when every number of the embeddings is rounded once more, up or down at random."""

    def nudge(module: nn.Module, args: tuple[Any, ...], embedded: Tensor) -> Tensor:
        return rounded_once_more(embedded, generator)

    handle = adapter.model.get_input_embeddings().register_forward_hook(nudge)
    try:
        nudged = adapter.head_inputs(ids)
    finally:
        handle.remove()
    return relative_error(nudged, fresh)


def rounded_once_more(embedded: Tensor, generator: torch.Generator) -> Tensor:
    """Every number rounded once more, up or down at random."""
    sign = torch.randint(2, embedded.shape, generator=generator).to(embedded.device) * 2 - 1
    return (embedded.double() * (1 + sign * torch.finfo(embedded.dtype).eps / 2)).to(embedded.dtype)


def relative_error(states: Tensor, expected: Tensor) -> float:
    """The largest relative error of a node, in the Euclidean norm."""
    states, expected = states.double(), expected.double()
    return float(((states - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-30)).max())
