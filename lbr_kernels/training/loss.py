"""GRPO on trajectories: one advantage for every grown node and every routing decision of a row (paper, section 5).

Contract
--------
Everything here is tensors in, one scalar out. The random quantities of a row are the nodes of its trajectory and the
router's choices (Eq. 1). Each has its own ratio of current to behaviour probability, and each ratio is clipped by
itself. The terms of a committed position t are its grown nodes G_t (the warm-up's nodes belong to the first) and its
decision; a decision among a single candidate is none, so that for K = 1 the loss and its gradient are GRPO's. What does
not exist (token or choice -1) counts in no sum, no mean and no metric, whatever stands in its place.

The paper gives the objective, L = -A log p(F|q) with one advantage for every term [P]. It gives neither ratios, clip
range, reduction, normalisation of the advantages nor bonuses: these are this project's choices [C], all of them
arguments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict

import torch
from torch import Tensor, nn

from lbr_kernels.decoding.trajectory import TreeTrajectory
from lbr_kernels.ops.tree_shape import layer_offset, num_slots
from lbr_kernels.router import Router
from lbr_kernels.training.likelihood import TrajectoryLogProbs, trajectory_log_probs

if TYPE_CHECKING:
    from typing_extensions import Unpack

Normalise = Literal["std", "none", "batch-std"]
Reduction = Literal["token-mean", "row-mean", "constant"]


class Advantages(NamedTuple):
    """``values`` fp32 ``[rows]``, and how many groups have equal rewards and so decide nothing."""

    values: Tensor
    undecided_groups: int


@dataclass(frozen=True)
class PolicyLoss:
    """``loss`` is a scalar with gradient; ``metrics`` are detached scalars, named in :func:`policy_loss`."""

    loss: Tensor
    metrics: dict[str, Tensor]


class LossChoices(TypedDict, total=False):
    """The keyword arguments of :func:`policy_loss`, for those who pass them on."""

    behaviour: TrajectoryLogProbs | None
    clip: tuple[float, float]
    dual_clip: float | None
    reduction: Reduction
    max_length: int | None
    normaliser: float | Tensor | None
    nodes: Literal["sum", "mean"]
    reference: TrajectoryLogProbs | None
    kl_coef: float
    correct_kl: bool
    node_entropy_coef: float
    router_entropy_coef: float


def group_advantages(
    rewards: Tensor | Sequence[float], group_size: int, *, normalise: Normalise = "std", eps: float = 1e-6
) -> Advantages:
    """Rewards relative to their group's mean.

    Args:
        rewards: ``[rows]``; the rows of a group stand side by side.
        group_size: rows per group (the paper's 8 rollouts of a question [P]).
        normalise: what the difference is divided by [C]: ``"std"``, the group's standard deviation plus ``eps`` (the
            default; TRL's ``scale_rewards="group"``); ``"batch-std"``, that of all rewards (``"batch"``); ``"none"``.
            Standard deviations have Bessel's correction, as torch's and TRL's.
        eps: is added to the standard deviation [C]; TRL's own is 1e-4.

    Returns:
        The advantages. A group of equal rewards gets zeros, exactly, and is counted.

    Raises:
        ValueError: no rewards, a reward that is NaN or infinite, or rewards that do not divide into groups.
    """
    values = torch.as_tensor(rewards, dtype=torch.float64)
    if values.dim() != 1 or not len(values):
        raise ValueError(f"group_advantages: rewards has shape {list(values.shape)}, expected [rows] with rows >= 1")
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1:
        raise ValueError(f"group_advantages: group_size is {group_size!r}, expected an integer >= 1")
    if len(values) % group_size:
        raise ValueError(
            f"group_advantages: {len(values)} rewards, expected a multiple of group_size, which is {group_size}"
        )
    if normalise not in ("std", "none", "batch-std"):
        raise ValueError(f"group_advantages: normalise is {normalise!r}, expected 'std', 'batch-std' or 'none'")
    if not 0 <= eps < math.inf:
        raise ValueError(f"group_advantages: eps is {eps!r}, expected a finite number >= 0")
    values = values.detach()
    if not bool((finite := values.isfinite()).all()):
        row = int(finite.logical_not().nonzero()[0])
        raise ValueError(f"group_advantages: rewards[{row}] is {values[row].item()}, expected a finite number")
    groups = values.view(-1, group_size)
    undecided = groups.amax(dim=1) == groups.amin(dim=1)
    centred = groups - groups.mean(dim=1, keepdim=True)
    if normalise == "std" and group_size > 1:
        centred = centred / (groups.std(dim=1, keepdim=True) + eps)
    elif normalise == "batch-std" and len(values) > 1:
        centred = centred / (values.std() + eps)
    # Not left to rounding: the mean of equal numbers need not be that number, nor eps more than zero.
    centred = torch.where(undecided[:, None], 0, centred)
    return Advantages(centred.flatten().float(), int(undecided.sum()))


def policy_loss(
    log_probs: TrajectoryLogProbs,
    trajectory: TreeTrajectory,
    advantages: Tensor,
    *,
    behaviour: TrajectoryLogProbs | None = None,
    clip: tuple[float, float] = (0.2, 0.2),
    dual_clip: float | None = 3.0,
    reduction: Reduction = "token-mean",
    max_length: int | None = None,
    normaliser: float | Tensor | None = None,
    nodes: Literal["sum", "mean"] = "sum",
    reference: TrajectoryLogProbs | None = None,
    kl_coef: float = 0.0,
    correct_kl: bool = False,
    node_entropy_coef: float = 0.0,
    router_entropy_coef: float = 0.0,
) -> PolicyLoss:
    """The clipped policy-gradient loss of a batch of trajectories.

    With ratio r and advantage A a node's or decision's term is ``max(-A r, -A clamp(r, 1 - low, 1 + high))``, and for
    A < 0 not more than ``-A dual_clip``.

    Args:
        log_probs: under the current parameters, with gradient.
        trajectory: what was drawn; says which nodes and decisions exist.
        advantages: ``[rows]``, of every term of a row alike [P].
        behaviour: under the parameters that drew; None takes what the trajectory recorded, so that with one update per
            batch of rollouts the ratio is 1 up to rounding [C]. ``log_probs`` itself makes it exactly 1.
        clip: how far a ratio may fall below and rise above 1 and still have a gradient [C].
        dual_clip: bound of the loss of rows with A < 0, as a ratio, more than ``1 + clip[1]``; None for none [C]. For
            such values it is TRL's ``delta``.
        reduction: of the positions' losses to one number [C]. ``"token-mean"``, the mean over all committed positions
            (TRL's ``loss_type`` "bnpo", and "dapo" with the whole batch as the normaliser); ``"row-mean"``, the mean
            over rows of each row's mean ("grpo"); ``"constant"``, the sum over rows times ``max_length`` ("dr_grpo").
        max_length: the most tokens that a row may commit, for ``"constant"``.
        normaliser: the denominator of the whole batch, where this is a part of one (a micro-batch, a process): its
            committed positions, its rows, or its rows times ``max_length``. By default that of this batch.
        nodes: a position's loss takes the sum of the terms of its G_t (Eq. 1 [P]), or their mean [C]; the decision's
            term is added to either.
        reference: log-probabilities under the reference model and router, needed with ``kl_coef``.
        kl_coef: weight of KL(current || reference) [C], estimated per node and per decision as
            ``exp(d) - d - 1`` with d = reference - current (k3), and put together like the terms.
        correct_kl: multiply that estimate by the ratio, which makes it unbiased for draws of the behaviour [C] (TRL's
            ``use_bias_correction_kl``, on by default there).
        node_entropy_coef, router_entropy_coef: weights of an entropy bonus [C]: per position the mean over G_t of the
            entropies of the distributions that the nodes were drawn from, and the decision's. ``log_probs`` must have
            them, with gradient.

    Returns:
        The loss. Metrics: ``positions``, ``nodes``, ``decisions`` (how many); over nodes and, named ``router_...``,
        over decisions: ``ratio/mean``, ``ratio/max``, ``clip/low`` and ``clip/high`` (fraction of ratios whose
        gradient is cut below and above), ``clip/dual`` (by ``dual_clip``), ``kl`` (k3 of behaviour to current),
        ``reference_kl``, ``entropy``.

    Raises:
        ValueError: shapes that do not fit the trajectory's, an argument out of its range or without one that it
            needs, a trajectory that was not sampled.
    """
    rows, steps = trajectory.choices.shape
    _check(locals())
    width, depth = trajectory.settings.width, trajectory.settings.depth
    committed = trajectory.choices >= 0
    exists = (trajectory.node_tokens >= 0) & committed[:, step_of_nodes(trajectory)]
    decides = decisions(trajectory)
    metrics: dict[str, Tensor] = {}
    per_row = advantages.to(log_probs.node_log_probs.dtype)[:, None]

    def per_position(values: Tensor, mean: bool) -> Tensor:
        """``[rows, nodes]``, zero where there is no node, to ``[rows, steps]``."""
        sums = _by_step(values, width, depth, steps)
        return sums / _by_step(exists.to(values.dtype), width, depth, steps).clamp(min=1) if mean else sums

    def terms(current: Tensor, drawn: Tensor, anchor: Tensor | None, there: Tensor, prefix: str) -> Tensor:
        """The loss of every node or every decision."""
        # What does not exist is cut out here: nothing behind this line sees it.
        log_ratio = torch.where(there, current - drawn.detach(), 0)
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1 - clip[0], 1 + clip[1])
        loss = torch.maximum(-per_row * ratio, -per_row * clipped)
        bounded = torch.zeros_like(there)
        if dual_clip is not None:
            bound = -per_row * dual_clip
            bounded = (per_row < 0) & (loss > bound)
            loss = torch.where(per_row < 0, torch.minimum(loss, bound), loss)
        with torch.no_grad():
            few = there.sum().clamp(min=1)
            metrics[f"{prefix}ratio/mean"] = torch.where(there, ratio, 0).sum() / few
            metrics[f"{prefix}ratio/max"] = torch.where(there, ratio, 0).amax()
            metrics[f"{prefix}clip/low"] = (there & (per_row < 0) & (ratio < 1 - clip[0])).sum() / few
            metrics[f"{prefix}clip/high"] = (there & (per_row > 0) & (ratio > 1 + clip[1])).sum() / few
            metrics[f"{prefix}clip/dual"] = (there & bounded).sum() / few
            metrics[f"{prefix}kl"] = (log_ratio.expm1() - log_ratio).sum() / few
        if anchor is not None:
            difference = torch.where(there, anchor.detach() - current, 0)
            divergence = difference.expm1() - difference
            if correct_kl:
                divergence = divergence * ratio
            metrics[f"{prefix}reference_kl"] = divergence.detach().sum() / few
            if kl_coef:
                loss = loss + kl_coef * divergence
        return torch.where(there, loss, 0)

    def entropy(values: Tensor | None, there: Tensor, prefix: str) -> Tensor:
        if values is None:
            return torch.zeros_like(there, dtype=torch.float32)
        values = torch.where(there, values, 0)
        metrics[f"{prefix}entropy"] = values.detach().sum() / there.sum().clamp(min=1)
        return values

    drawn = trajectory if behaviour is None else behaviour
    anchors = (None, None) if reference is None else (reference.node_log_probs, reference.router_log_probs)
    node_terms = terms(log_probs.node_log_probs, drawn.node_log_probs, anchors[0], exists, "")
    router_terms = terms(log_probs.router_log_probs, drawn.router_log_probs, anchors[1], decides, "router_")
    positions = per_position(node_terms, nodes == "mean") + router_terms
    node_entropies = entropy(log_probs.node_entropies, exists, "")
    router_entropies = entropy(log_probs.router_entropies, decides, "router_")
    if node_entropy_coef:
        # Siblings were drawn from one distribution: it counts once, whatever `nodes` says.
        positions = positions - node_entropy_coef * per_position(node_entropies, True)
    if router_entropy_coef:
        positions = positions - router_entropy_coef * router_entropies
    positions = torch.where(committed, positions, 0)
    metrics |= {"positions": committed.sum(), "nodes": exists.sum(), "decisions": decides.sum()}

    lengths = committed.sum(dim=1).clamp(min=1)
    denominator: float | Tensor
    if reduction == "token-mean":
        total, denominator = positions.sum(), committed.sum().clamp(min=1)
    elif reduction == "row-mean":
        total, denominator = (positions.sum(dim=1) / lengths).sum(), rows
    else:
        assert max_length is not None
        total, denominator = positions.sum(), rows * max_length
    return PolicyLoss(total / (denominator if normaliser is None else normaliser), metrics)


def grpo_loss(
    model: nn.Module,
    router: Router | None,
    trajectory: TreeTrajectory,
    rewards: Tensor | Sequence[float],
    *,
    group_size: int,
    normalise: Normalise = "std",
    eps: float = 1e-6,
    detach_router_input: bool = False,
    entropies: bool = False,
    allow_filters: bool = False,
    on_policy: bool = True,
    **choices: Unpack[LossChoices],
) -> PolicyLoss:
    """GRPO's loss of a batch of rollouts: advantages, likelihood and policy loss in one call.

    Args:
        model, router: the policy, as it is now.
        trajectory: the rollouts; the rows of a group stand side by side.
        rewards: ``[rows]``.
        group_size, normalise, eps: see :func:`group_advantages`.
        detach_router_input: no gradient of the decisions reaches the model [C]; by default it does.
        entropies: log the entropies, which the bonuses need and turn on.
        allow_filters, on_policy: see :func:`trajectory_log_probs`.
        **choices: see :func:`policy_loss`.

    Returns:
        The loss; metrics as :func:`policy_loss` has them, with ``undecided_groups`` and ``forwarded_nodes``.

    Raises:
        ValueError: see :func:`group_advantages`, :func:`trajectory_log_probs` and :func:`policy_loss`.
    """
    advantages = group_advantages(rewards, group_size, normalise=normalise, eps=eps)
    device = trajectory.choices.device
    bonus = bool(choices.get("node_entropy_coef") or choices.get("router_entropy_coef"))
    log_probs = trajectory_log_probs(
        model,
        router,
        trajectory,
        entropies=entropies or bonus,
        detach_router_input=detach_router_input,
        allow_filters=allow_filters,
        on_policy=on_policy,
    )
    result = policy_loss(log_probs, trajectory, advantages.values.to(device), **choices)
    result.metrics["undecided_groups"] = torch.tensor(advantages.undecided_groups, device=device)
    result.metrics["forwarded_nodes"] = torch.tensor(log_probs.forwarded_nodes, device=device)
    return result


def step_of_nodes(trajectory: TreeTrajectory) -> Tensor:
    """int64 ``[nodes]``, the step whose G_t a node belongs to; the warm-up's belong to step 0 [C]."""
    width, depth, device = trajectory.settings.width, trajectory.settings.depth, trajectory.choices.device
    warmup = torch.zeros(num_slots(width, depth - 1), dtype=torch.int64, device=device)
    return torch.cat([warmup, torch.arange(trajectory.num_steps, device=device).repeat_interleave(width**depth)])


def decisions(trajectory: TreeTrajectory) -> Tensor:
    """Where the router chose among more than one candidate, bool ``[rows, steps]``."""
    width, depth = trajectory.settings.width, trajectory.settings.depth
    choices, tokens = trajectory.choices, trajectory.node_tokens
    if width == 1:
        return torch.zeros_like(choices, dtype=torch.bool)
    # The candidates of a step were grown L - 1 commits before, in layer L, or with the warm-up in the layer that has
    # come to the top; the winners of the commits between lead to them.
    chosen, parent = choices.clamp(min=0), torch.zeros_like(choices)
    for commits in range(1, min(depth, trajectory.num_steps)):
        parent[:, commits:] += chosen[:, :-commits] * width ** (commits - 1)
    layers = [layer_offset(width, step + 1) for step in range(depth - 1)][: trajectory.num_steps]
    starts = [trajectory.step_nodes(step).start for step in range(trajectory.num_steps - len(layers))]
    first = torch.tensor(layers + starts, device=tokens.device) + parent * width
    siblings = first[..., None] + torch.arange(width, device=tokens.device)
    existing = (tokens.gather(1, siblings.flatten(1)) >= 0).view(siblings.shape).sum(dim=-1)
    return (choices >= 0) & (existing > 1)


def _by_step(values: Tensor, width: int, depth: int, steps: int) -> Tensor:
    """Sums over every G_t: ``[rows, nodes]`` to ``[rows, steps]``."""
    warmup = num_slots(width, depth - 1)
    sums = values[:, warmup:].unflatten(1, (steps, width**depth)).sum(dim=-1)
    return torch.cat([sums[:, :1] + values[:, :warmup].sum(dim=1, keepdim=True), sums[:, 1:]], dim=1)


def _check(given: dict[str, Any]) -> None:
    """Refuse what cannot be meant, by the names of :func:`policy_loss`."""
    trajectory, log_probs = given["trajectory"], given["log_probs"]
    settings = trajectory.settings
    if settings.mode != "sampled" or (settings.width > 1 and not settings.router_do_sample):
        raise ValueError(
            f"policy_loss: trajectory has mode {settings.mode!r} and router_do_sample {settings.router_do_sample}, "
            "expected 'sampled' and True: nothing else has a likelihood"
        )
    shapes = {"node_log_probs": trajectory.node_tokens.shape, "router_log_probs": trajectory.choices.shape}
    shapes |= {"node_entropies": trajectory.node_tokens.shape, "router_entropies": trajectory.choices.shape}
    for name in ("log_probs", "behaviour", "reference"):
        for part, shape in shapes.items():
            value = getattr(given[name], part, None)
            if value is not None and value.shape != shape:
                raise ValueError(
                    f"policy_loss: {name}.{part} has shape {list(value.shape)}, expected the trajectory's {list(shape)}"
                )
    rows = len(trajectory)
    if given["advantages"].shape != (rows,):
        raise ValueError(f"policy_loss: advantages has shape {list(given['advantages'].shape)}, expected [{rows}]")
    if not bool((finite := given["advantages"].isfinite()).all()):
        row = int(finite.logical_not().nonzero()[0])
        raise ValueError(f"policy_loss: advantages[{row}] is {given['advantages'][row]}, expected a finite number")
    for name, options in (("reduction", ("token-mean", "row-mean", "constant")), ("nodes", ("sum", "mean"))):
        if given[name] not in options:
            raise ValueError(f"policy_loss: {name} is {given[name]!r}, expected {', '.join(map(repr, options))}")
    low, high = given["clip"]
    if not (0 <= low <= 1 and high >= 0):
        raise ValueError(f"policy_loss: clip is {given['clip']!r}, expected (low, high) with 0 <= low <= 1, high >= 0")
    if given["dual_clip"] is not None and not given["dual_clip"] > 1 + high:
        raise ValueError(
            f"policy_loss: dual_clip is {given['dual_clip']!r}, expected more than 1 + clip[1], {1 + high}, or None"
        )
    if (given["reduction"] == "constant") != (given["max_length"] is not None):
        raise ValueError(
            f"policy_loss: max_length is {given['max_length']!r} with reduction {given['reduction']!r}, expected an "
            "integer with 'constant' and None without"
        )
    if given["max_length"] is not None and given["max_length"] < trajectory.num_committed.max():
        raise ValueError(
            f"policy_loss: max_length is {given['max_length']}, expected at least the longest row's "
            f"{int(trajectory.num_committed.max())} committed tokens"
        )
    if given["normaliser"] is not None and not given["normaliser"] > 0:
        raise ValueError(f"policy_loss: normaliser is {given['normaliser']!r}, expected a number > 0")
    for name in ("kl_coef", "node_entropy_coef", "router_entropy_coef"):
        if not math.isfinite(given[name]):
            raise ValueError(f"policy_loss: {name} is {given[name]!r}, expected a finite number")
    if given["kl_coef"] and given["reference"] is None:
        raise ValueError(f"policy_loss: kl_coef is {given['kl_coef']!r} without a reference, expected one, or 0")
    for name, part in (("node_entropy_coef", "node_entropies"), ("router_entropy_coef", "router_entropies")):
        value = getattr(log_probs, part)
        lacks_gradient = value is not None and log_probs.node_log_probs.requires_grad and not value.requires_grad
        if given[name] and (value is None or lacks_gradient):
            what = "without gradient" if lacks_gradient else "None"
            raise ValueError(f"policy_loss: {name} is {given[name]!r} and log_probs.{part} is {what}")
