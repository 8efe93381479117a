"""``warmup``: pay beforehand for what the first call would have to wait for."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.cache_utils import DynamicCache

from lbr_kernels.decoding.adapter import ModelAdapter, require_supported, unwrapped
from lbr_kernels.decoding.config import LBRConfig
from lbr_kernels.decoding.engine import engine_obstacle, take_step
from lbr_kernels.decoding.loop import DecodingStats
from lbr_kernels.decoding.routing import RouterLike, Routing
from lbr_kernels.ops._backends import unavailable


@dataclass(frozen=True)
class WarmUp:
    """What calls of that shape will find: their engine, why it is not a graph (None if it is), and what it took."""

    engine: str
    engine_reason: str | None
    seconds: float


@torch.no_grad()
def warmup(
    model: PreTrainedModel,
    *,
    batch_size: int = 1,
    max_length: int,
    router: RouterLike | None = None,
    do_sample: bool = True,
    eos_token_id: int | Sequence[int] | None = None,
    config: LBRConfig | None = None,
    **settings: Any,
) -> WarmUp:
    """Make ready for calls of :func:`generate` of one shape: compile the kernels, check the model, capture the graph.

    Args:
        model: as for ``generate``.
        batch_size: rows, return sequences counted.
        max_length: the most tokens of a text, prompt included; shorter ones are served too. Graphs are made for
            classes of lengths, a quarter of a power of two apart.
        router, do_sample: as in those calls. Of a router only the shape matters.
        eos_token_id: as in those calls, by default what the model's own generation config says.
        config, **settings: as for ``generate`` (``width``, ``depth``, ...).

    Returns:
        A :class:`WarmUp`.

    Raises:
        ValueError: an argument out of its range, or the model, or an engine asked for by name, cannot be had.
        RuntimeError: an engine or a backend asked for by name cannot run.
    """
    start = time.perf_counter()
    model = unwrapped(model)
    for name, value in (("batch_size", batch_size), ("max_length", max_length)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"warmup: {name} is {value!r}, expected an integer >= 1")
    if config is not None and settings:
        raise ValueError(f"warmup: config and {sorted(settings)[0]} are given; give one")
    try:
        config = config or LBRConfig(**settings)
    except TypeError as error:
        known = ", ".join(LBRConfig.__dataclass_fields__)
        raise TypeError(f"warmup: {sorted(settings)} has an unknown setting, expected some of {known}") from error
    ends = model.generation_config.eos_token_id if eos_token_id is None else eos_token_id
    ends = [ends] if isinstance(ends, int) else [] if ends is None else ends
    if isinstance(ends, str) or not all(isinstance(end, int) for end in ends):
        raise ValueError(f"warmup: eos_token_id is {eos_token_id!r}, expected an integer or several")
    for op in ("tree_attention", "commit_", "sample_children"):
        reason = None if config.backend is None else unavailable(config.backend, op, model.device)
        if reason is not None:
            raise RuntimeError(f"warmup: {op}: backend {config.backend!r} cannot run: {reason}")
    require_supported(model)
    adapter, stats = ModelAdapter(model, backend=config.backend), DecodingStats()
    routing = Routing(
        router, width=config.width, depth=config.depth, hidden_size=adapter.hidden_size,
        temperature=config.router_temperature, device=model.device, backend=config.backend,
    )  # fmt: skip
    stats.engine_reason = engine_obstacle(
        model, config, routing=routing, processors=LogitsProcessorList(), criteria=StoppingCriteriaList(),
        keep_scores=False, looks_on=False,
    )  # fmt: skip
    if stats.engine_reason is None:
        prefilled = DynamicCache(config=model.config)
        adapter.head_inputs(torch.zeros((1, 1), dtype=torch.int64, device=model.device), prefilled)
        take_step(
            "warmup", model, config, adapter, prefilled, stats, None, rows=batch_size, width=config.width,
            depth=config.depth, length=max_length, draw_children=do_sample, draw_choice=config.draws_choice(do_sample),
            num_eos=len(ends), routing=routing,
        )  # fmt: skip
    return WarmUp(stats.engine, stats.engine_reason, time.perf_counter() - start)
