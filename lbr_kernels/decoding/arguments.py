"""The arguments of a decoding method that takes the place of ``model.generate``: checks, and the call itself.

Contract
--------
``GenerateArguments`` is given what a caller would give ``model.generate``. Whatever the method cannot honour is refused
here, by name, before anything is computed; what is left goes through ``model.generate`` itself, which prepares prompts,
processors and criteria, and hands them back as a :class:`Request`. Padding may stand anywhere: it is moved to the left,
and prompts are returned as they were given.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.cache_utils import Cache
from transformers.generation.stopping_criteria import StopStringCriteria
from transformers.utils.generic import TransformersKwargs

from lbr_kernels.decoding.adapter import require_supported, unwrapped
from lbr_kernels.decoding.cache import CACHE_NAME

# Settings of model.generate that our loops cannot honour, each with the values that ask for nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "assistant_early_exit": (None,),
    "assistant_model": (None,),
    "cache_implementation": (None, "dynamic", "dynamic_full", "hybrid"),
    "compile_config": (None,),
    "constraints": (None,),
    "custom_generate": (None,),
    "dola_layers": (None,),
    "force_words_ids": (None,),
    "guidance_scale": (None, 1),
    "low_memory": (None, False),
    "negative_prompt_attention_mask": (None,),
    "negative_prompt_ids": (None,),
    "num_beam_groups": (None, 1),
    "num_beams": (None, 1),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "penalty_alpha": (None, 0),
    "prompt_lookup_num_tokens": (None,),
    "synced_gpus": (None, False),
    "token_healing": (None, False),
    "use_cache": (None, True),
}

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Caller:
    """The public function that speaks in errors: its name, what it decodes with, and itself, for its parameters."""

    name: str
    method: str
    function: Callable[..., Any]


@dataclass
class Request:
    """What ``model.generate`` has prepared for a decoding method, and what it keeps from one that is not its own.

    ``input_ids [rows, P]`` and the tensors of ``model_kwargs`` are repeated for ``num_return_sequences``.
    ``shown_prompt [B, P]`` has the prompts as the caller gave them, where their padding was moved.
    """

    caller: Caller
    model: PreTrainedModel
    input_ids: Tensor
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    config: GenerationConfig
    model_kwargs: dict[str, Any]
    streamer: Any
    shown_prompt: Tensor | None

    @property
    def wants_dict(self) -> bool:
        """Whether an output object is returned, and not ids alone."""
        return bool(self.config.return_dict_in_generate)

    @property
    def keeps_scores(self) -> bool:
        """Whether scores or logits are returned."""
        return self.wants_dict and bool(self.config.output_scores or self.config.output_logits)


class GenerateArguments:
    """Checked arguments of one call.

    Args:
        caller: who is called.
        model: as for :func:`lbr_kernels.generate`, wrappers included.
        inputs, kwargs: as for ``model.generate``; ``kwargs`` belongs to this object from here on.

    Raises:
        ValueError: a setting that cannot be honoured, prompts that are none, an unsupported model.
        TypeError: an unknown keyword argument, something that is no model or no ids.
    """

    def __init__(self, caller: Caller, model: Any, inputs: Tensor | None, kwargs: dict[str, Any]) -> None:
        if "past_key_values" in kwargs and CACHE_NAME not in kwargs:
            kwargs[CACHE_NAME] = kwargs.pop("past_key_values")  # the old name is good everywhere
        self.caller, self.kwargs = caller, kwargs
        self._wrapped: Any = model.module if isinstance(model, DistributedDataParallel) else model
        self.model = unwrapped(model, caller=caller.name)
        self._check_keywords()
        self._check_settings()
        _check_prompts(caller.name, inputs, kwargs)
        require_supported(self.model, caller=caller.name)
        if self.model.training and any(getattr(m, "gradient_checkpointing", False) for m in self.model.modules()):
            raise ValueError(
                f"{caller.name}: the model is in training mode with gradient checkpointing, which allows no cache; "
                "call model.eval() or model.gradient_checkpointing_disable() first"
            )
        self._inputs = inputs

    def setting(self, name: str) -> Any:
        """A setting as ``model.generate`` reads it: from the call, its ``generation_config``, or the model's own."""
        value = self.kwargs.get(name)
        for source in (self.kwargs.get("generation_config"), self.model.generation_config):
            if value is None:
                value = getattr(source, name, None)
        return value

    def generate(self, run: Callable[[Request], _Result]) -> _Result:
        """Call ``model.generate`` with ``run`` as its decoding method."""
        # Bound here because model.generate keeps these from a decoding method that is not its own.
        streamer, tokenizer = self.kwargs.get("streamer"), self.kwargs.pop("tokenizer", None)
        inputs, shown_prompt = _left_align_arguments(self.caller.name, self._inputs, self.kwargs)

        def decode(
            model: PreTrainedModel,
            input_ids: Tensor,
            logits_processor: LogitsProcessorList,
            stopping_criteria: StoppingCriteriaList,
            generation_config: GenerationConfig,
            **model_kwargs: Any,
        ) -> _Result:
            request = Request(
                self.caller, model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs,
                streamer, shown_prompt,
            )  # fmt: skip
            return run(request)

        with _stop_strings(self.caller.name, self.model, self.kwargs, tokenizer):
            return cast("_Result", self._wrapped.generate(inputs, custom_generate=decode, **self.kwargs))

    def _check_keywords(self) -> None:
        """Refuse what neither ``model.generate`` nor the model's forward knows, with the nearest name."""
        model = self.model
        known = {name for name in vars(GenerationConfig()) if not name.startswith("_")} | {"tokenizer"}
        for function in (model.generate, model.forward, model.prepare_inputs_for_generation, self.caller.function):
            known |= set(inspect.signature(function).parameters)
        known |= set(TransformersKwargs.__optional_keys__)
        for name in self.kwargs:
            if name not in known:
                nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
                hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
                raise TypeError(f"{self.caller.name}: unknown argument {name!r}{hint}")

    def _check_settings(self) -> None:
        """Refuse settings that the method cannot honour, wherever they come from."""
        for name, accepted in _UNSUPPORTED.items():
            value = self.setting(name)
            if not any(value is x or (x is not None and value == x) for x in accepted):
                options = " or ".join(repr(x) for x in accepted)
                bulky = isinstance(value, torch.nn.Module | Tensor)
                shown = f"a {type(value).__name__}" if bulky else repr(value)
                raise ValueError(
                    f"{self.caller.name}: {name} is {shown}, which {self.caller.method} cannot honour; "
                    f"expected {options}"
                )
        sequences = self.kwargs.get("num_return_sequences")
        if sequences is not None and (not isinstance(sequences, int) or sequences < 1):
            raise ValueError(f"{self.caller.name}: num_return_sequences is {sequences!r}, expected an integer >= 1")


def require_type(caller: str, name: str, value: Any, kind: type) -> None:
    """Raise ``TypeError`` unless ``value`` is a ``kind`` or None."""
    if value is not None and not isinstance(value, kind):
        raise TypeError(f"{caller}: {name} is a {type(value).__name__}, expected a {kind.__name__} or None")


def whole_number(caller: str, name: str, value: Any, *, least: int) -> int:
    """``value`` as an int; raises ``ValueError`` unless it is an integer of at least ``least``."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < least:
        raise ValueError(f"{caller}: {name} is {value!r}, expected an integer >= {least}")
    return int(value)


def _check_prompts(caller: str, inputs: Tensor | None, kwargs: dict[str, Any]) -> None:
    """Refuse what is no batch of prompts, prompts without tokens, and a mask for other prompts."""
    mask: Any = kwargs.get("attention_mask")
    ids: Any = inputs if inputs is not None else kwargs.get("input_ids")
    embeds = kwargs.get("inputs_embeds")
    if ids is None:
        return
    if not isinstance(ids, Tensor):
        raise TypeError(f"{caller}: input_ids is a {type(ids).__name__}, expected an integer tensor [B, P]")
    if ids.dim() != 2 or ids.is_floating_point():
        raise ValueError(
            f"{caller}: input_ids has shape {list(ids.shape)} and dtype {ids.dtype}, expected integers [B, P]"
        )
    if len(ids) == 0 or (ids.shape[1] == 0 and embeds is None):
        raise ValueError(f"{caller}: input_ids has shape {list(ids.shape)}, expected at least one row and one token")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or embeds is not None:
        return
    # With a cache the mask also covers what it holds.
    fits = mask.shape[1] == ids.shape[1] or (mask.shape[1] > ids.shape[1] and kwargs.get(CACHE_NAME) is not None)
    if len(mask) != len(ids) or not fits:
        raise ValueError(
            f"{caller}: attention_mask has shape {list(mask.shape)}, expected the prompts' {list(ids.shape)}"
        )


@contextmanager
def _stop_strings(caller: str, model: PreTrainedModel, kwargs: dict[str, Any], tokenizer: Any) -> Iterator[None]:
    """Turn stop strings into a criterion: ``model.generate`` would look for the tokenizer that it has dropped."""
    config = kwargs.get("generation_config")
    default = model.generation_config.stop_strings
    strings = kwargs.pop("stop_strings", None) or getattr(config, "stop_strings", None) or default
    if strings is None:
        yield
        return
    if tokenizer is None:
        raise ValueError(f"{caller}: stop_strings need the model's tokenizer, pass tokenizer=...")
    criterion = StopStringCriteria(stop_strings=strings, tokenizer=tokenizer)
    kwargs["stopping_criteria"] = StoppingCriteriaList([*(kwargs.get("stopping_criteria") or []), criterion])
    if config is not None:
        kwargs["generation_config"] = config = GenerationConfig.from_dict(config.to_dict())
        config.stop_strings = None
    model.generation_config.stop_strings = None
    try:
        yield
    finally:
        model.generation_config.stop_strings = default


def _left_align_arguments(
    caller: str, inputs: Tensor | None, kwargs: dict[str, Any]
) -> tuple[Tensor | None, Tensor | None]:
    """Move padding to the left in the caller's arguments, before ``model.generate`` warns about it.

    Returns the new ``inputs`` and, if anything moved, the ids as they were.
    """
    order = alignment(kwargs.get("attention_mask"))
    if order is None:
        return inputs, None
    if kwargs.get(CACHE_NAME) is not None:
        raise ValueError(_left_padded_cache(caller))
    shown = inputs if inputs is not None else kwargs.get("input_ids")
    for name in ("input_ids", "inputs_embeds", "attention_mask", "position_ids"):
        if name in kwargs:
            kwargs[name] = reorder(caller, kwargs[name], order)
    return reorder(caller, inputs, order), shown


def _left_padded_cache(caller: str) -> str:
    return f"{caller}: {CACHE_NAME} needs an attention_mask whose padding is on the left"


def alignment(mask: Tensor | None) -> Tensor | None:
    """The order of columns ``[B, P]`` that brings a 2-D mask's padding to the left; None if it is there already."""
    if mask is None or mask.dim() != 2 or bool((mask[:, 1:] >= mask[:, :-1]).all()):
        return None
    return mask.ne(0).to(torch.int8).argsort(dim=1, stable=True)


def reorder(caller: str, value: Any, order: Tensor) -> Any:
    """A tensor ``[B, P, ...]`` with its columns in a new order; anything else as it is."""
    if isinstance(value, Cache) and getattr(value, "_is_user_defined", False):
        raise ValueError(_left_padded_cache(caller))
    if not isinstance(value, Tensor) or value.shape[:2] != order.shape:
        return value
    index = order.view(*order.shape, *[1] * (value.dim() - 2)).expand(value.shape)
    return value.gather(1, index)
