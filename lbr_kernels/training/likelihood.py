"""The likelihood of a trajectory, with gradients, from one forward of the model (paper, Eq. 1).

Contract
--------
``log p(F | q)`` is the sum of the log-probabilities of every grown node, each under the model's distribution behind its
parent, and of every choice, under the router's distribution given the hidden states of the tree it saw. All of a row's
nodes are one packed tree (``training.packing``), which the model reads in one forward; the head is run on the nodes
that have children and the router on every decision, chunk by chunk, each chunk computed again in the backward pass, so
that no more than one chunk of logits is alive. The gradient of the router's part flows into the model through the
hidden states, unless ``detach_router_input`` cuts it off.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lbr_kernels.decoding.adapter import ModelAdapter
from lbr_kernels.decoding.sampling import FILTERS
from lbr_kernels.decoding.trajectory import TreeTrajectory, fingerprint
from lbr_kernels.ops.route import routing_log_probs
from lbr_kernels.ops.tree_shape import num_slots
from lbr_kernels.router import Router
from lbr_kernels.training.forward import (
    PackedStates,
    forward_packed,
    forward_paths,
    inner_model,
    packing_obstacle,
)
from lbr_kernels.training.memory import require_memory
from lbr_kernels.training.packing import PackedTrees, pack


@dataclass(frozen=True)
class TrajectoryLogProbs:
    """Log-probabilities under the current parameters, in the shapes of the trajectory's own.

    Attributes:
        node_log_probs: fp32 ``[rows, nodes]`` of every grown node's token, 0 where there is no node.
        router_log_probs: fp32 ``[rows, steps]`` of every choice, 0 where there is none.
        node_entropies: fp32 ``[rows, nodes]``, in nats, of the distribution that a node was drawn from; None if not
            asked for.
        router_entropies: fp32 ``[rows, steps]``, the same of the router's.
        forwarded_nodes: how many nodes the model was run on, prompts included.
    """

    node_log_probs: Tensor
    router_log_probs: Tensor
    node_entropies: Tensor | None
    router_entropies: Tensor | None
    forwarded_nodes: int


def trajectory_log_probs(
    model: nn.Module,
    router: nn.Module | None,
    trajectory: TreeTrajectory,
    *,
    entropies: bool = False,
    detach_router_input: bool = False,
    allow_filters: bool = False,
    on_policy: bool = True,
    share_prompts: bool = True,
    chunk_size: int = 1024,
    backend: str | None = None,
) -> TrajectoryLogProbs:
    """Every term of Eq. 1 for a batch of trajectories, from one forward of the model.

    Args:
        model: the transformers model that decoded, or what wraps it: DDP, FSDP, PEFT, ``torch.compile``. Autocast and
            gradient checkpointing work as in any other forward.
        router: the :class:`lbr_kernels.Router` that chose; None for the uniform choice.
        trajectory: rows may differ in length; on any device.
        entropies: also return entropies, with gradients.
        detach_router_input: the router's gradient does not reach the model (the paper says nothing; here it does by
            default).
        allow_filters: take trajectories that were drawn with filters. Temperatures are applied; what top-k, top-p,
            min-p and processors cut off is not, so the result is the unfiltered model's, and the trajectory's own
            ``node_log_probs`` are the filtered distribution's.
        on_policy: refuse a trajectory that other parameters have drawn. False for several updates per rollout.
        share_prompts: rows with one prompt read it once.
        chunk_size: rows of logits, and decisions of the router, that are in memory at a time.
        backend: of ``ops.packed_tree_attention``.

    Returns:
        :class:`TrajectoryLogProbs` on the model's device.

    Raises:
        ValueError: a trajectory of another model, router, vocabulary or shape, or without a likelihood of its own; one
            that would not fit into memory or passes the model's last position; a model with attention dropout.
        TypeError: an argument of another type.
    """
    inner = inner_model(model)
    _check_trajectory(inner, router, trajectory, allow_filters=allow_filters, on_policy=on_policy)
    _check_dropout(inner)
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"trajectory_log_probs: chunk_size is {chunk_size!r}, expected an integer >= 1")
    device = inner.device
    packed = pack(trajectory, share_prompts=share_prompts).to(device)
    _check_positions(inner, packed)
    embeds = trajectory.prompt_embeds
    if embeds is not None:
        embeds = embeds.to(device)[trajectory.prompt_mask.to(device)]
    with require_memory(inner, packed, rows=len(trajectory)):
        obstacle = packing_obstacle(inner)
        if obstacle is None:
            states = forward_packed(model, packed, prompt_embeds=embeds, backend=backend)
        else:
            _say_once(inner, obstacle)
            states = forward_paths(model, packed, prompt_embeds=embeds)
        packed = packed.to(states.body.device)
        node_log_probs, node_entropies = _nodes(trajectory, packed, states, chunk_size, entropies)
        router_log_probs, router_entropies = _decisions(
            trajectory, packed, states.hidden.detach() if detach_router_input else states.hidden, router, chunk_size,
            entropies,
        )  # fmt: skip
    return TrajectoryLogProbs(node_log_probs, router_log_probs, node_entropies, router_entropies, len(packed))


def _nodes(
    trajectory: TreeTrajectory, packed: PackedTrees, states: PackedStates, chunk_size: int, entropies: bool
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities ``[rows, nodes]`` of the tokens, and entropies of what they were drawn from."""
    device = packed.tokens.device
    temperature = float(trajectory.settings.filters.get("temperature", 1.0))
    # Every drawn node once, sorted by the node that it was drawn behind.
    drawn = packed.node_index[packed.node_index >= 0].unique()
    behind, row_of = packed.parents[drawn].unique(return_inverse=True)
    row_of, order = row_of.sort(stable=True)
    drawn = drawn[order]
    tokens, body = packed.tokens[drawn], states.body[behind]

    def chunk(rows: Tensor, row_of: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        logits = states.head(rows)
        logits = (logits if logits.dtype == torch.float64 else logits.float()) / temperature
        total = logits.logsumexp(-1)
        entropy = torch.zeros_like(total)
        if entropies:
            # A token that is ruled out has a score of -inf and adds nothing.
            finite = logits.clamp(min=torch.finfo(logits.dtype).min)
            entropy = total - ((finite - total[:, None]).exp() * finite).sum(-1)
        return logits[row_of, tokens] - total[row_of], entropy

    bounds = [*range(0, len(behind), chunk_size), len(behind)]
    starts = torch.searchsorted(row_of, torch.tensor(bounds, device=device)).tolist()
    parts = []
    for number, first in enumerate(bounds[:-1]):
        rows, pairs = slice(first, bounds[number + 1]), slice(starts[number], starts[number + 1])
        parts.append(_again(len(bounds) > 2, chunk, body[rows], row_of[pairs] - first, tokens[pairs]))
    place = torch.zeros(len(packed), dtype=torch.int64, device=device)
    place[drawn] = torch.arange(len(drawn), device=device)
    log_probs = torch.cat([log_probs for log_probs, _ in parts])
    there, place = packed.node_index >= 0, place[packed.node_index.clamp(min=0)]
    node_log_probs = torch.where(there, _rows(log_probs, place), 0)
    if not entropies:
        return node_log_probs, None
    entropy = torch.cat([entropy for _, entropy in parts])
    return node_log_probs, torch.where(there, _rows(entropy, row_of[place]), 0)


def _decisions(
    trajectory: TreeTrajectory, packed: PackedTrees, hidden: Tensor, router: nn.Module | None, chunk_size: int,
    entropies: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Log-probabilities ``[rows, steps]`` of the choices, and entropies of what they were drawn from."""
    settings, choices = trajectory.settings, trajectory.choices.to(hidden.device)
    made = choices >= 0
    slots, chosen = packed.slot_index[made], choices[made]

    def chunk(slots: Tensor, chosen: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        valid = slots >= 0
        exists = valid[:, : settings.width]
        if router is None:
            scores = torch.zeros(exists.shape, dtype=torch.float32, device=exists.device)
            log_probs = routing_log_probs(scores, exists, exists.any(1), 1.0)
        else:
            states = _rows(hidden, slots.clamp(min=0))
            # The router's arithmetic is its own, whatever the model's is.
            with torch.autocast(hidden.device.type, enabled=False):
                log_probs = router(states, settings.width, valid=valid, temperature=settings.router_temperature)
        entropy = -(log_probs.exp() * log_probs.clamp(min=torch.finfo(log_probs.dtype).min)).sum(-1)
        return log_probs.gather(1, chosen[:, None])[:, 0], entropy

    parts = [
        _again(len(slots) > chunk_size, chunk, *part, hidden)
        for part in zip(slots.split(chunk_size), chosen.split(chunk_size), strict=True)
    ]
    log_probs = torch.cat([log_probs for log_probs, _ in parts])
    router_log_probs = log_probs.new_zeros(choices.shape).masked_scatter(made, log_probs)
    if not entropies:
        return router_log_probs, None
    entropy = torch.cat([entropy for _, entropy in parts])
    return router_log_probs, entropy.new_zeros(choices.shape).masked_scatter(made, entropy)


def _rows(values: Tensor, index: Tensor) -> Tensor:
    """``values[index]``, whose gradient sums equal indices in a fixed order on every device."""
    rows = nn.functional.embedding(index, values if values.dim() == 2 else values[:, None])
    return rows if values.dim() == 2 else rows[..., 0]


_Result = TypeVar("_Result")


def _again(wanted: bool, function: Callable[..., _Result], *args: Any) -> _Result:
    """Call a function, and forget what it computed until the backward pass, which calls it again."""
    if not (wanted and torch.is_grad_enabled()):
        return function(*args)
    result: _Result = checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
    return result


_said: WeakSet[nn.Module] = WeakSet()  # models of which has been said that they are slow


def _say_once(inner: PreTrainedModel, obstacle: str) -> None:
    if inner not in _said:
        _said.add(inner)
        warnings.warn(
            f"trajectory_log_probs: {type(inner).__name__} forwards every path by itself, since {obstacle}",
            stacklevel=3,
        )


def _check_trajectory(
    inner: PreTrainedModel,
    router: nn.Module | None,
    trajectory: TreeTrajectory,
    *,
    allow_filters: bool,
    on_policy: bool,
) -> None:
    """Refuse what was not drawn by this model and this router, or has no likelihood."""
    name = "trajectory_log_probs"
    if router is not None and not isinstance(router, nn.Module):
        raise TypeError(f"{name}: router is a {type(router).__name__}, expected a Router or None")
    router = _inner_router(router)
    if not isinstance(trajectory, TreeTrajectory):
        raise TypeError(f"{name}: trajectory is a {type(trajectory).__name__}, expected a TreeTrajectory")
    settings = trajectory.settings
    K, L = settings.width, settings.depth
    nodes = num_slots(K, L - 1) + trajectory.num_steps * K**L
    if trajectory.node_tokens.shape != (len(trajectory), nodes):
        raise ValueError(
            f"{name}: trajectory has node_tokens of shape {list(trajectory.node_tokens.shape)}, expected "
            f"{[len(trajectory), nodes]} for width {K}, depth {L} and {trajectory.num_steps} steps"
        )
    if len(trajectory) == 0 or trajectory.num_steps == 0:
        raise ValueError(
            f"{name}: trajectory has {len(trajectory)} rows of {trajectory.num_steps} steps, expected some"
        )
    if settings.mode != "sampled":
        raise ValueError(
            f"{name}: trajectory was decoded with do_sample=False; the most likely children are no draws and have no "
            "likelihood in the sense of Eq. 1"
        )
    filters = {key: value for key, value in settings.filters.items() if value != FILTERS.get(key)}
    if not settings.router_do_sample:
        filters["router_do_sample"] = False
    if filters and not allow_filters:
        raise ValueError(
            f"{name}: trajectory was drawn with {filters}, expected none of it (generate: temperature=1.0, top_k=0, "
            "top_p=1.0), or allow_filters=True"
        )
    if bool((trajectory.prompt_mask.sum(1) == 0).any()):
        row = int((trajectory.prompt_mask.sum(1) == 0).nonzero()[0])
        raise ValueError(f"{name}: trajectory has an empty prompt in row {row}, expected at least one token")
    made = (trajectory.choices >= 0).sum(1)
    if not torch.equal(made, trajectory.num_committed) or int(made.min()) < 1:
        raise ValueError(
            f"{name}: trajectory has num_committed {trajectory.num_committed.tolist()} and {made.tolist()} choices, "
            "expected as many, one at least"
        )
    largest = max(
        int(trajectory.node_tokens.max()), int(trajectory.prompt_ids.max()) if trajectory.prompt_ids.numel() else 0
    )
    vocabulary = inner.get_output_embeddings().weight.shape[0]
    if largest >= vocabulary:
        raise ValueError(f"{name}: trajectory holds token {largest}, expected less than the vocabulary's {vocabulary}")
    if int(trajectory.choices.max()) >= K:
        raise ValueError(f"{name}: trajectory holds choice {int(trajectory.choices.max())}, expected less than its {K}")
    if isinstance(router, Router):
        hidden_size = inner.get_output_embeddings().weight.shape[1]
        for what, made_for, here in (
            ("depth", router.config.depth, L),
            ("hidden size", router.config.hidden_size, hidden_size),
        ):
            if made_for != here:
                raise ValueError(f"{name}: router was made for {what} {made_for}, the trajectory has {what} {here}")
    if on_policy:
        for what, module, drawn_by in (
            ("model", inner, settings.model_fingerprint),
            ("router", router, settings.router_fingerprint),
        ):
            if module is not None and any(isinstance(parameter, DTensor) for parameter in module.parameters()):
                continue  # a shard's numbers are not the whole's
            if (found := fingerprint(module)) != drawn_by:
                raise ValueError(
                    f"{name}: trajectory was drawn by a {what} with fingerprint {drawn_by}, this one has {found}; "
                    "on_policy=False takes trajectories from before an update"
                )


def _inner_router(router: nn.Module | None) -> nn.Module | None:
    """The router inside the wrappers of DDP and ``torch.compile``."""
    found: Any = router
    while not isinstance(found, Router) and (hasattr(found, "module") or hasattr(found, "_orig_mod")):
        found = found.module if hasattr(found, "module") else found._orig_mod
    assert found is None or isinstance(found, nn.Module)
    return found


def _check_dropout(inner: PreTrainedModel) -> None:
    """A network that is drawn anew in every forward gives a trajectory no likelihood."""
    for path, module in inner.named_modules():
        names = ("p",) if isinstance(module, nn.modules.dropout._DropoutNd) else ("dropout", "attention_dropout")
        shares = [share for name in names if isinstance(share := getattr(module, name, 0.0), float)]
        if module.training and (share := max(shares, default=0.0)) > 0:
            raise ValueError(
                f"trajectory_log_probs: the model trains with dropout {share:g} ({path}), expected 0: under it a "
                "trajectory has no likelihood; call model.eval(), which keeps gradients, or set it to 0"
            )


def _check_positions(inner: PreTrainedModel, packed: PackedTrees) -> None:
    last, longest = ModelAdapter(inner).last_position, int(packed.positions.max())
    if last is not None and longest > last:
        raise ValueError(
            f"trajectory_log_probs: trajectory reaches position {longest}, expected at most the model's last, {last}"
        )
