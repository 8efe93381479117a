"""The policy loss: against a scalar loop over the tree, and for K = 1 against TRL's own GRPO loss."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_invariants import padded, random_prompts, seeded

from lbr_kernels import Router, TreeTrajectory, generate
from lbr_kernels.training.likelihood import TrajectoryLogProbs, trajectory_log_probs
from lbr_kernels.training.loss import decisions, group_advantages, grpo_loss, policy_loss, step_of_nodes

SHAPES = [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (3, 2), (1, 3), (2, 3), (3, 3)]


@pytest.fixture(scope="module")
def trajectories(llama) -> dict[tuple[int, int], TreeTrajectory]:
    """Four rows each that end at different steps, by an end token or by the length cap."""
    out = {}
    for width, depth in SHAPES:
        for seed in range(100):
            trajectory = generate(
                llama, **padded(random_prompts([4, 7, 5, 4])), width=width, depth=depth, max_new_tokens=6,
                do_sample=True, top_k=0, eos_token_id=[3, 17, 5, 40, 41, 42, 43, 44], generator=seeded(seed),
                return_dict_in_generate=True,
            ).trajectory  # fmt: skip
            if len(trajectory.num_committed.unique()) > 1 and trajectory.num_committed.max() >= 4:
                break
        out[width, depth] = trajectory
    return out


def near(trajectory: TreeTrajectory, seed: int, scale: float = 0.3, *, entropies: bool = False) -> TrajectoryLogProbs:
    """Log-probabilities not far from the recorded ones, with garbage where nothing exists."""
    torch.manual_seed(seed)
    nodes, choices = trajectory.node_log_probs, trajectory.router_log_probs
    nodes = torch.where(trajectory.node_tokens >= 0, nodes + scale * torch.randn_like(nodes), float("nan"))
    choices = torch.where(trajectory.choices >= 0, choices + scale * torch.randn_like(choices), float("inf"))
    return TrajectoryLogProbs(
        node_log_probs=nodes.requires_grad_(),
        router_log_probs=choices.requires_grad_(),
        node_entropies=torch.rand_like(nodes).requires_grad_() if entropies else None,
        router_entropies=torch.rand_like(choices).requires_grad_() if entropies else None,
        forwarded_nodes=0,
    )


def walk(trajectory: TreeTrajectory, row: int) -> list[tuple[list[int], bool]]:
    """Per committed position the indices of its grown nodes and whether there was a decision: the tree, replayed."""
    width, depth = trajectory.settings.width, trajectory.settings.depth
    tokens = trajectory.node_tokens[row].tolist()
    layers: list[list[int]] = []  # of the tree: indices along the node axis
    positions, grown, start = [], [], 0
    for layer in range(1, depth):
        layers.append(list(range(start, start + width**layer)))
        grown += layers[-1]
        start += width**layer
    for choice in trajectory.choices[row].tolist():
        if choice < 0:
            break
        layers.append(list(range(start, start + width**depth)))
        grown += layers[-1]
        start += width**depth
        candidates = [index for index in layers[0] if tokens[index] >= 0]
        positions.append(([index for index in grown if tokens[index] >= 0], len(candidates) > 1))
        layers = [layer[choice * len(layer) // width : (choice + 1) * len(layer) // width] for layer in layers[1:]]
        grown = []
    return positions


def by_hand(
    log_probs, trajectory, advantages, *, behaviour=None, clip=(0.2, 0.2), dual_clip=3.0, reduction="token-mean",
    max_length=None, normaliser=None, nodes="sum", reference=None, kl_coef=0.0, correct_kl=False,
    node_entropy_coef=0.0, router_entropy_coef=0.0,
):  # fmt: skip
    """method.md, section 5, one number at a time."""
    drawn = behaviour or trajectory

    def term(name, index, advantage):
        new, old = getattr(log_probs, name)[index], getattr(drawn, name)[index].item()
        ratio = torch.exp(new - old)
        surrogate = min(ratio * advantage, ratio.clamp(1 - clip[0], 1 + clip[1]) * advantage)
        if advantage < 0 and dual_clip is not None:
            surrogate = max(surrogate, torch.tensor(dual_clip * advantage))
        value = -surrogate
        if kl_coef:
            difference = getattr(reference, name)[index].item() - new
            value = value + kl_coef * (torch.exp(difference) - difference - 1) * (ratio if correct_kl else 1)
        return value

    rows = []
    for row in range(len(trajectory)):
        losses = []
        for step, (grown, decided) in enumerate(walk(trajectory, row)):
            loss = sum(term("node_log_probs", (row, index), advantages[row].item()) for index in grown)
            loss = loss / len(grown) if nodes == "mean" and grown else loss
            if node_entropy_coef and grown:
                loss = loss - node_entropy_coef * sum(log_probs.node_entropies[row, i] for i in grown) / len(grown)
            if decided:
                loss = loss + term("router_log_probs", (row, step), advantages[row].item())
                if router_entropy_coef:
                    loss = loss - router_entropy_coef * log_probs.router_entropies[row, step]
            losses.append(loss)
        rows.append(losses)
    if reduction == "row-mean":
        return sum(sum(losses) / len(losses) for losses in rows) / (normaliser or len(rows))
    denominator = sum(map(len, rows)) if reduction == "token-mean" else len(rows) * (max_length or 0)
    return sum(map(sum, rows)) / (normaliser or denominator)


CHOICES = {
    "defaults": {},
    "wide clip": {"clip": (0.1, 0.4), "dual_clip": None},
    "one-sided": {"clip": (1.0, 0.0), "dual_clip": 1.1},
    "row-mean": {"reduction": "row-mean"},
    "constant": {"reduction": "constant", "max_length": 9},
    "normaliser": {"normaliser": 37.0},
    "row normaliser": {"reduction": "row-mean", "normaliser": torch.tensor(11)},
    "node mean": {"nodes": "mean"},
    "kl": {"kl_coef": 0.3},
    "kl, corrected": {"kl_coef": 0.3, "correct_kl": True},
    "kl, node mean": {"kl_coef": 0.3, "nodes": "mean", "reduction": "row-mean"},
    "entropies": {"node_entropy_coef": 0.7, "router_entropy_coef": -0.4},
}
ADVANTAGES = torch.tensor([1.3, -0.7, 0.2, -2.0])


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize(("width", "depth"), SHAPES)
def test_value_and_gradient(trajectories, width, depth, name):
    trajectory, choices = trajectories[width, depth], dict(CHOICES[name])
    log_probs = near(trajectory, 1, entropies="entropies" in name)
    if name not in ("defaults", "row-mean"):
        choices["behaviour"] = near(trajectory, 2)
    if "kl_coef" in choices:
        choices["reference"] = near(trajectory, 3)
    leaves = [
        leaf
        for leaf in (log_probs.node_log_probs, log_probs.router_log_probs, log_probs.node_entropies)
        if leaf is not None
    ]
    expected = by_hand(log_probs, trajectory, ADVANTAGES, **choices)
    gradients = torch.autograd.grad(expected, leaves, allow_unused=True, materialize_grads=True)
    result = policy_loss(log_probs, trajectory, ADVANTAGES, **choices)
    torch.testing.assert_close(result.loss, expected.float(), rtol=1e-5, atol=1e-6)
    found = torch.autograd.grad(result.loss, leaves, allow_unused=True, materialize_grads=True)
    for got, want in zip(found, gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("width", "depth"), SHAPES)
def test_which_nodes_and_decisions_there_are(trajectories, width, depth):
    trajectory = trajectories[width, depth]
    step_of, decided = step_of_nodes(trajectory), decisions(trajectory)
    total = 0
    for row in range(len(trajectory)):
        positions = walk(trajectory, row)
        assert len(positions) == trajectory.num_committed[row]
        for step, (grown, there) in enumerate(positions):
            assert grown == ((step_of == step) & (trajectory.node_tokens[row] >= 0)).nonzero()[:, 0].tolist()
            assert decided[row, step] == there == (width > 1)
            total += len(grown)
        assert not decided[row, len(positions) :].any()
    assert total == (trajectory.node_tokens >= 0).sum()  # every grown node once, those of the warm-up too
    metrics = policy_loss(near(trajectory, 0), trajectory, ADVANTAGES).metrics
    assert metrics["nodes"] == total
    assert metrics["positions"] == trajectory.num_committed.sum()
    assert metrics["decisions"] == (metrics["positions"] if width > 1 else 0)


def test_a_single_candidate_is_no_decision(trajectories):
    """Missing siblings, at the root's first layer, deeper in the warm-up, and in a layer grown later."""
    trajectory = trajectories[2, 3]
    tokens = trajectory.node_tokens.clone()
    first, second = trajectory.choices[:, 0], trajectory.choices[:, 1]
    row = int((trajectory.num_committed >= 4).nonzero()[0])
    tokens[row, 1 - first[row]] = -1  # the other candidate of step 0
    tokens[row, 2 + 2 * first[row] + 1 - second[row]] = -1  # the other one of step 1, below the winner
    path = 4 * first[row] + 2 * second[row] + 1 - trajectory.choices[row, 2]
    tokens[row, 6 + path] = -1  # of step 2, grown at step 0
    changed = replace(trajectory, node_tokens=tokens)
    assert decisions(changed)[row, :4].tolist() == [False, False, False, True]
    assert [there for _, there in walk(changed, row)][:4] == [False, False, False, True]


def test_on_policy_the_ratio_is_one(trajectories):
    for trajectory in trajectories.values():
        log_probs = TrajectoryLogProbs(
            trajectory.node_log_probs.clone().requires_grad_(), trajectory.router_log_probs.clone().requires_grad_(),
            None, None, 0,
        )  # fmt: skip
        result = policy_loss(log_probs, trajectory, ADVANTAGES)
        assert result.metrics["ratio/mean"] == result.metrics["ratio/max"] == 1
        assert result.metrics["kl"] == result.metrics["router_kl"] == 0
        # The gradient of -A log p(F), Eq. 1, over the number of committed positions.
        nodes, choices = torch.autograd.grad(result.loss, [log_probs.node_log_probs, log_probs.router_log_probs])
        per_row = -ADVANTAGES[:, None] / trajectory.num_committed.sum()
        torch.testing.assert_close(nodes, per_row * (trajectory.node_tokens >= 0))
        torch.testing.assert_close(choices, per_row * ((trajectory.choices >= 0) & (trajectory.settings.width > 1)))


def test_parts_of_a_batch_add_up(trajectories):
    """With the whole batch's normaliser the losses of micro-batches sum to the loss of the batch."""
    trajectory = trajectories[3, 2]
    log_probs, behaviour = near(trajectory, 1), near(trajectory, 2)

    def part(values: TrajectoryLogProbs, rows: slice) -> TrajectoryLogProbs:
        return replace(
            values, node_log_probs=values.node_log_probs[rows], router_log_probs=values.router_log_probs[rows]
        )

    for choices, normaliser in (
        ({}, trajectory.num_committed.sum()),
        ({"reduction": "row-mean"}, 4),
        ({"reduction": "constant", "max_length": 6}, 24),
    ):
        whole = policy_loss(log_probs, trajectory, ADVANTAGES, behaviour=behaviour, **choices).loss
        pieces = [
            policy_loss(
                part(log_probs, rows), trajectory[rows], ADVANTAGES[rows], behaviour=part(behaviour, rows),
                normaliser=normaliser, **choices,
            ).loss
            for rows in (slice(0, 1), slice(1, 4))
        ]  # fmt: skip
        torch.testing.assert_close(sum(pieces), whole)


def test_rows_that_shall_not_count(trajectories):
    """Choices of -1 take a row out, nodes and all: as if it were not there."""
    trajectory = trajectories[2, 2]
    choices = trajectory.choices.clone()
    choices[1] = -1
    log_probs, rest = near(trajectory, 1), torch.tensor([0, 2, 3])
    masked = policy_loss(log_probs, replace(trajectory, choices=choices), ADVANTAGES, behaviour=near(trajectory, 2))

    def three(values: TrajectoryLogProbs) -> TrajectoryLogProbs:
        return replace(
            values, node_log_probs=values.node_log_probs[rest], router_log_probs=values.router_log_probs[rest]
        )

    without = policy_loss(three(log_probs), trajectory[rest], ADVANTAGES[rest], behaviour=three(near(trajectory, 2)))
    torch.testing.assert_close(masked.loss, without.loss)
    for name, value in without.metrics.items():
        torch.testing.assert_close(masked.metrics[name], value, msg=name)


def test_metrics(trajectories):
    trajectory = trajectories[3, 2]
    log_probs, behaviour, reference = near(trajectory, 1, entropies=True), near(trajectory, 2), near(trajectory, 3)
    metrics = policy_loss(
        log_probs, trajectory, ADVANTAGES, behaviour=behaviour, reference=reference, dual_clip=1.5
    ).metrics
    for prefix, name, there in (
        ("", "node", trajectory.node_tokens >= 0),
        ("router_", "router", trajectory.choices >= 0),
    ):
        new, old, ref = (getattr(values, f"{name}_log_probs")[there] for values in (log_probs, behaviour, reference))
        advantage = ADVANTAGES[:, None].expand(there.shape)[there]
        ratio = (new - old).exp()
        expected = {
            "ratio/mean": ratio.mean(),
            "ratio/max": ratio.max(),
            "clip/low": ((ratio < 0.8) & (advantage < 0)).float().mean(),
            "clip/high": ((ratio > 1.2) & (advantage > 0)).float().mean(),
            "clip/dual": ((ratio > 1.5) & (advantage < 0)).float().mean(),
            "kl": (ratio - 1 - (new - old)).mean(),
            "reference_kl": ((ref - new).exp() - 1 - (ref - new)).mean(),
            "entropy": getattr(log_probs, f"{name}_entropies")[there].mean(),
        }
        assert expected["clip/dual"] > 0
        for key, value in expected.items():
            torch.testing.assert_close(metrics[prefix + key], value.detach(), msg=prefix + key)
            assert not metrics[prefix + key].requires_grad


def test_dual_clip_bounds_the_loss(trajectories):
    """A token that has become far more likely costs a bad row no more than the bound, and has no gradient there."""
    trajectory = trajectories[1, 1]
    recorded = trajectory.node_log_probs
    log_probs = TrajectoryLogProbs(
        (recorded + 5).requires_grad_(), trajectory.router_log_probs.clone().requires_grad_(), None, None, 0
    )
    bad = -torch.ones(4)
    result = policy_loss(log_probs, trajectory, bad, dual_clip=2.5)
    torch.testing.assert_close(result.loss, torch.tensor(2.5))
    assert not torch.autograd.grad(result.loss, log_probs.node_log_probs)[0].any()
    torch.testing.assert_close(
        policy_loss(log_probs, trajectory, bad, dual_clip=None).loss, torch.tensor(5.0).exp(), rtol=1e-4, atol=0
    )
    # A good row is not bounded by it, but by the clip.
    torch.testing.assert_close(policy_loss(log_probs, trajectory, -bad, dual_clip=2.5).loss, torch.tensor(-1.2))


# --- K = 1 is GRPO ----------------------------------------------------------------------------------------------------


def trl_loss(
    trajectory, log_probs, advantages, *, loss_type, behaviour, reference, beta, delta, entropy_coef, corrected
):
    """TRL's own ``GRPOTrainer._compute_loss`` on the same numbers.

    The method is TRL's; the trainer around it is a stub with the attributes that it reads, and what would run the model
    returns ``log_probs``. One process, no accumulation, epsilon 0.2 below and 0.3 above.
    """
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    num_items = trajectory.num_committed.sum()
    stub = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (
            log_probs.node_log_probs, log_probs.node_entropies, None,
        ),
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x, sync_gradients=True
        ),
        args=SimpleNamespace(delta=delta, use_bias_correction_kl=corrected, steps_per_generation=1),
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        importance_sampling_level="token", loss_type=loss_type, beta=beta, epsilon_low=0.2, epsilon_high=0.3,
        use_vllm=False, vllm_importance_sampling_correction=False, current_gradient_accumulation_steps=1,
        max_completion_length=9, _entropy_bonus_enabled=entropy_coef != 0, entropy_coef=entropy_coef,
        use_adaptive_entropy=False, _metrics={"train": defaultdict(list)},
    )  # fmt: skip
    mask = (trajectory.choices >= 0).long()
    inputs = {
        "prompt_ids": trajectory.prompt_ids, "prompt_mask": trajectory.prompt_mask.long(),
        "completion_ids": trajectory.node_tokens[:, : mask.shape[1]], "completion_mask": mask,
        "advantages": advantages, "num_items_in_batch": num_items, "old_per_token_logps": behaviour.node_log_probs,
    }  # fmt: skip
    if beta:
        inputs["ref_per_token_logps"] = reference.node_log_probs
    return trl.GRPOTrainer._compute_loss(stub, None, inputs), stub._metrics["train"]


@pytest.mark.parametrize(
    "extras", [{}, {"beta": 0.1}, {"beta": 0.1, "corrected": True}, {"entropy_coef": 0.05}, {"delta": 2.0}], ids=str
)
@pytest.mark.parametrize(
    ("loss_type", "choices"),
    [
        ("grpo", {"reduction": "row-mean"}),
        ("bnpo", {"reduction": "token-mean"}),
        ("dapo", {"reduction": "token-mean"}),
        ("dr_grpo", {"reduction": "constant", "max_length": 9}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_width_1_equals_trl(trajectories, loss_type, choices, extras):
    trajectory = trajectories[1, 1]
    there = trajectory.node_tokens >= 0

    def finite(values: TrajectoryLogProbs) -> TrajectoryLogProbs:
        # TRL multiplies by its mask, so what it pads with has to be a number.
        return replace(values, node_log_probs=torch.where(there, values.node_log_probs, 0).detach().requires_grad_())

    log_probs = finite(near(trajectory, 1, entropies=True))
    behaviour, reference = finite(near(trajectory, 2)), finite(near(trajectory, 3))
    beta, corrected = extras.get("beta", 0.0), extras.get("corrected", False)
    delta, entropy_coef = extras.get("delta"), extras.get("entropy_coef", 0.0)
    if loss_type in ("grpo", "dr_grpo"):
        entropy_coef = 0.0  # TRL's bonus is a mean over tokens whatever the reduction; here it is reduced like the loss
    expected, trl_metrics = trl_loss(
        trajectory, log_probs, ADVANTAGES, loss_type=loss_type, behaviour=behaviour, reference=reference, beta=beta,
        delta=delta, entropy_coef=entropy_coef, corrected=corrected,
    )  # fmt: skip
    result = policy_loss(
        log_probs, trajectory, ADVANTAGES, behaviour=behaviour, reference=reference, clip=(0.2, 0.3), dual_clip=delta,
        kl_coef=beta, correct_kl=corrected, node_entropy_coef=entropy_coef, **choices,
    )  # fmt: skip
    torch.testing.assert_close(result.loss, expected)
    leaves = [log_probs.node_log_probs, log_probs.node_entropies]
    want = torch.autograd.grad(expected, leaves, allow_unused=True, materialize_grads=True)
    got = torch.autograd.grad(result.loss, leaves, allow_unused=True, materialize_grads=True)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    for ours, theirs in (("clip/low", "clip_ratio/low_mean"), ("clip/high", "clip_ratio/high_mean")):
        assert result.metrics[ours].item() == pytest.approx(trl_metrics[theirs][0])
    assert result.metrics["entropy"].item() == pytest.approx(trl_metrics["entropy"][0])
    if beta:
        assert result.metrics["reference_kl"].item() == pytest.approx(trl_metrics["kl"][0], rel=1e-5)


# --- advantages -------------------------------------------------------------------------------------------------------


def test_advantages():
    rewards = [1.0, 0.0, 0.0, 1.0, 2.0, -1.0]
    values, undecided = group_advantages(rewards, 3)
    first = torch.tensor(rewards[:3])
    torch.testing.assert_close(values[:3], (first - first.mean()) / (first.std() + 1e-6))
    assert undecided == 0
    torch.testing.assert_close(group_advantages(rewards, 3, normalise="none").values[:3], first - first.mean())
    torch.testing.assert_close(
        group_advantages(rewards, 3, normalise="batch-std", eps=0.5).values[:3],
        (first - first.mean()) / (torch.tensor(rewards).std() + 0.5),
    )


@pytest.mark.parametrize("normalise", ["std", "none", "batch-std"])
def test_undecided_groups(normalise):
    """Equal rewards decide nothing, also where their mean is not quite what they are."""
    rewards = torch.tensor([0.1] * 6 + [0.0, 1.0] * 3 + [0.7] * 6, dtype=torch.float64)
    assert rewards[:6].mean() != rewards[0]
    values, undecided = group_advantages(rewards, 6, normalise=normalise, eps=1e-30)
    assert undecided == 2
    assert not values[:6].any()
    assert not values[12:].any()
    assert values[6:12].all()
    assert not group_advantages([5.0, 2.0], 1, normalise=normalise).values.any()


def test_advantages_equal_trl_s():
    """TRL's scaling, on its own helper, for both of its standard deviations (its eps is 1e-4)."""
    utils = pytest.importorskip("trl.trainer.utils", reason="TRL is not installed")
    rewards = torch.randn(12)
    grouped = rewards.view(3, 4)
    centred = (grouped - grouped.mean(1, keepdim=True)).flatten()
    per_group = utils.nanstd(grouped, dim=1).repeat_interleave(4)
    torch.testing.assert_close(group_advantages(rewards, 4, eps=1e-4).values, centred / (per_group + 1e-4))
    torch.testing.assert_close(
        group_advantages(rewards, 4, normalise="batch-std", eps=1e-4).values, centred / (utils.nanstd(rewards) + 1e-4)
    )


@pytest.mark.parametrize(
    ("rewards", "change", "message"),
    [
        ([1.0, float("nan")], {}, r"rewards\[1\] is nan, expected a finite number"),
        ([float("-inf"), 1.0], {}, r"rewards\[0\] is -inf"),
        ([], {}, r"rewards has shape \[0\]"),
        ([[1.0, 2.0]], {}, r"rewards has shape \[1, 2\]"),
        ([1.0, 2.0, 3.0], {}, "3 rewards, expected a multiple of group_size, which is 2"),
        ([1.0, 2.0], {"group_size": 0}, "group_size is 0"),
        ([1.0, 2.0], {"normalise": "group"}, "normalise is 'group'"),
        ([1.0, 2.0], {"eps": -1.0}, "eps is -1.0"),
    ],
)
def test_bad_rewards(rewards, change, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(rewards, **{"group_size": 2, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"advantages": torch.ones(3)}, r"advantages has shape \[3\], expected \[4\]"),
        ({"advantages": torch.tensor([0, 1, float("nan"), 0])}, r"advantages\[2\] is nan"),
        ({"clip": (-0.1, 0.2)}, "clip is"),
        ({"clip": (1.1, 0.2)}, "clip is"),
        ({"dual_clip": 1.2}, r"dual_clip is 1.2, expected more than 1 \+ clip\[1\], 1.2"),
        ({"reduction": "mean"}, "reduction is 'mean', expected 'token-mean', 'row-mean', 'constant'"),
        ({"reduction": "constant"}, "max_length is None with reduction 'constant'"),
        ({"max_length": 5}, "max_length is 5 with reduction 'token-mean'"),
        ({"reduction": "constant", "max_length": 2}, "max_length is 2, expected at least the longest row's"),
        ({"nodes": "max"}, "nodes is 'max'"),
        ({"normaliser": 0}, "normaliser is 0"),
        ({"kl_coef": 0.1}, "kl_coef is 0.1 without a reference"),
        ({"kl_coef": float("inf")}, "kl_coef is inf"),
        ({"node_entropy_coef": 0.1}, "node_entropy_coef is 0.1 and log_probs.node_entropies is None"),
    ],
)
def test_bad_arguments(trajectories, change, message):
    trajectory = trajectories[2, 1]
    with pytest.raises(ValueError, match=message):
        policy_loss(near(trajectory, 0), trajectory, **{"advantages": ADVANTAGES, **change})


def test_what_has_no_likelihood_is_refused(trajectories):
    trajectory = trajectories[2, 2]
    for change in ({"mode": "deterministic"}, {"router_do_sample": False}):
        changed = replace(trajectory, settings=replace(trajectory.settings, **change))
        with pytest.raises(ValueError, match="nothing else has a likelihood"):
            policy_loss(near(trajectory, 0), changed, ADVANTAGES)
    with pytest.raises(ValueError, match=r"behaviour.node_log_probs has shape .* expected the trajectory's"):
        policy_loss(near(trajectory, 0), trajectory, ADVANTAGES, behaviour=near(trajectories[2, 1], 0))
    plain = replace(near(trajectory, 0), node_entropies=torch.zeros_like(trajectory.node_log_probs))
    with pytest.raises(ValueError, match=r"log_probs.node_entropies is without gradient"):
        policy_loss(plain, trajectory, ADVANTAGES, node_entropy_coef=1.0)


# --- the whole --------------------------------------------------------------------------------------------------------


def test_grpo_loss(llama):
    """Advantages, likelihood and policy loss in one call; on policy its gradient is that of -A log p(F)."""
    torch.manual_seed(2)
    router = Router.for_model(llama, depth=2, dim=16, num_heads=2)
    torch.nn.init.normal_(router.score.weight)
    trajectory = generate(
        llama, **padded(random_prompts([4, 4, 6, 6])), width=2, depth=2, router=router, max_new_tokens=4,
        do_sample=True, top_k=0, eos_token_id=[3, 17, 5], generator=seeded(3), return_dict_in_generate=True,
    ).trajectory  # fmt: skip
    rewards, parameters = [1.0, 0.0, 0.25, 0.25], [*llama.parameters(), *router.parameters()]
    result = grpo_loss(llama, router, trajectory, rewards, group_size=2, entropies=True)
    assert result.metrics["undecided_groups"] == 1
    assert result.metrics["forwarded_nodes"] > 0
    assert result.metrics["router_entropy"] > 0
    torch.testing.assert_close(result.metrics["ratio/max"], torch.tensor(1.0), rtol=1e-4, atol=0)
    log_probs = trajectory_log_probs(llama, router, trajectory)
    per_row = log_probs.node_log_probs.sum(1) + log_probs.router_log_probs.sum(1)
    advantages = group_advantages(rewards, 2).values
    expected = -(advantages * per_row).sum() / trajectory.num_committed.sum()
    want = torch.autograd.grad(expected, parameters, allow_unused=True, materialize_grads=True)
    got = torch.autograd.grad(result.loss, parameters, allow_unused=True, materialize_grads=True)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    apart = grpo_loss(llama, router, trajectory, rewards, group_size=2, detach_router_input=True, node_entropy_coef=0.1)
    detached = torch.autograd.grad(apart.loss, parameters, allow_unused=True, materialize_grads=True)
    assert any(not torch.allclose(a, b, atol=1e-5) for a, b in zip(detached, got, strict=True))
    with pytest.raises(ValueError, match=r"rewards\[1\] is nan"):
        grpo_loss(llama, router, trajectory, [0.0, float("nan"), 0.0, 0.0], group_size=2)
    filtered = replace(trajectory, settings=replace(trajectory.settings, filters={"temperature": 0.5}))
    with pytest.raises(ValueError, match="allow_filters=True"):
        grpo_loss(llama, router, filtered, rewards, group_size=2)
