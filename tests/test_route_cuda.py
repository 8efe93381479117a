"""What is particular to route's CUDA kernel: bad values, what it refuses, that neither device nor schedule matters."""

from __future__ import annotations

import itertools
import math

import pytest
import simt_backend
import torch
from support import assert_within_budget
from test_route import random_router, random_valid

from lbr_kernels import ops
from lbr_kernels.ops.route import RouterWeights, weight_shapes
from lbr_kernels.ops.tree_shape import num_slots

CPU = torch.device("cpu")
SCORE = "route: a row had a score that is not finite"
CANDIDATES = "route: a row's valid named no tree with a candidate, or its uniform was out of range"
KIB = 1024
SMALL = {"shared_bytes_per_block": 4 * KIB, "shared_bytes_per_multiprocessor": 5 * KIB}  # weights stay outside


@pytest.fixture(autouse=True)
def simt():
    """The shim's module, whose device is as usual again afterwards."""
    assert ops.backends("cpu")["route"][simt_backend.NAME] is None
    yield simt_backend.MODULE[0]
    simt_backend.MODULE[0].configure(seed=simt_backend.SEED)


def decide(router, hidden, *, backend=simt_backend.NAME, **arguments):
    return ops.route(hidden, router.packed(), backend=backend, **arguments)


def problem(B=5, width=3, depth=2, dim=32, D=48, **config):
    """A router, hidden states with NaN where there is no node, and the rest of the call."""
    router = random_router(depth, D, dim, **config)
    hidden = torch.randn(B, num_slots(width, depth), D)
    valid = random_valid(B, width, depth)
    hidden[~valid] = torch.nan
    return router, hidden, {"width": width, "depth": depth, "valid": valid, "uniforms": torch.rand(B).double()}


def same(got, want) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("config", [{}, {"score_head": "mlp", "independent": True, "input_norm": True}])
def test_no_device_changes_a_bit(simt, config):
    """However many blocks share the work, wherever the weights lie, in whatever order threads run."""
    router, hidden, rest = problem(dim=16, D=1100, **config)
    want = decide(router, hidden, **rest)
    for seed, (multiprocessors, memory) in enumerate(itertools.product((1, 2, 5, 20), ({}, SMALL))):
        simt.configure(seed=seed, multiprocessors=multiprocessors, **memory)
        assert simt.plan_route(5, 3, 2, 1100, 16, 64)["resident"] == (not memory)
        assert same(decide(router, hidden, **rest), want)


def test_no_neighbour_changes_a_bit():
    router, hidden, rest = problem(B=7)
    want = decide(router, hidden, **rest)
    for rows in ([3], [6, 0], [1, 2, 4, 5, 3]):
        part = {**rest, "valid": rest["valid"][rows], "uniforms": rest["uniforms"][rows]}
        assert same(decide(router, hidden[rows], **part), [result[rows] for result in want])


def test_no_schedule_changes_a_bit(simt):
    router, hidden, rest = problem(score_head="mlp", input_norm=True)
    want = decide(router, hidden, **rest)
    for seed in range(30):
        simt.configure(seed=seed, multiprocessors=4)
        assert same(decide(router, hidden, **rest), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("D", [1, 6, 48, 51, 1030])
def test_every_alignment_of_hidden_states(dtype, D):
    """Rows that can be read four elements at a time, and rows that cannot."""
    router = random_router(1, D, 32, input_norm=D > 6)
    for offset, room in itertools.product((0, 1, 2), (0, 3, 4)):
        hidden = torch.full((2, 3, D + room + offset), torch.nan, dtype=dtype)[..., offset : offset + D]
        hidden.copy_(torch.randn(2, 3, D))
        with torch.no_grad():
            want = router(hidden, 3)
            oracle = router.double()(hidden.double(), 3)
        router.float()
        log_probs, _ = decide(router, hidden, width=3, depth=1)
        assert_within_budget(log_probs, oracle, want, f"offset {offset}, room {room}", roundings=32)


@pytest.mark.parametrize(
    ("dim", "heads", "ffn_mult"), [(4, 1, 1), (8, 2, 3), (12, 3, 50), (128, 1, 1), (132, 33, 4), (256, 2, 1)]
)
def test_every_shape_of_a_layer(simt, dim, heads, ffn_mult):
    for multiprocessors, memory in ((3, {}), (7, SMALL)):
        simt.configure(multiprocessors=multiprocessors, **memory)
        router = random_router(2, 20, dim, num_heads=heads, ffn_mult=ffn_mult)
        for parameter in router.parameters():
            torch.nn.init.normal_(parameter, std=dim**-0.5)
        hidden = torch.randn(2, 12, 20)
        with torch.no_grad():
            want = router(hidden, 3)
            oracle = router.double()(hidden.double(), 3)
        router.float()
        assert_within_budget(decide(router, hidden, width=3, depth=2)[0], oracle, want, roundings=32)


def test_a_batch_in_several_rounds(simt):
    """More nodes than are taken at a time, by one group of blocks and by two that share out the rows."""
    router, hidden, rest = problem(B=100, dim=16, D=20)
    rest.pop("uniforms")
    want = decide(router, hidden, backend="cpu", **rest)
    for multiprocessors, groups in ((3, 1), (32, 2)):
        simt.configure(multiprocessors=multiprocessors)
        plan = simt.plan_route(100, 3, 2, 20, 16, 64)
        assert plan["groups"] == groups
        assert (plan["rows"] < 100 // groups) == (groups == 1)
        log_probs, choice = decide(router, hidden, **rest)
        torch.testing.assert_close(log_probs, want[0], rtol=1e-4, atol=1e-4)
        assert torch.equal(choice, want[1])


def test_the_next_launch_finds_the_workspace_as_it_was(simt):
    """Counters are at zero again; what the last launch has left in fresh memory is not taken for this one's."""
    simt.configure(multiprocessors=5)
    torch.use_deterministic_algorithms(False)  # memory is not poisoned, so that results of the last call remain
    router, hidden, rest = problem()
    for _ in range(6):
        hidden = hidden + torch.randn(hidden.shape)
        want = decide(router, hidden, backend="cpu", **rest)
        got = decide(router, hidden, **rest)
        torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=1e-4)
        for B, width, depth in ((1, 2, 1), (9, 3, 1), (2, 2, 3)):
            other, states, call = problem(B, width, depth)
            assert decide(other, states, **call)[1].ge(0).all()


def raised(message):
    with pytest.raises(RuntimeError, match=message):
        ops.raise_if_flagged(CPU)
    ops.raise_if_flagged(CPU)


@pytest.mark.parametrize(
    ("name", "index", "value", "message"),
    [
        ("uniforms", 2, 1.0, CANDIDATES),
        ("uniforms", 2, -1e-9, CANDIDATES),
        ("uniforms", 2, math.nan, CANDIDATES),
        ("valid", (2, slice(None)), False, CANDIDATES),
        ("valid", (2, slice(0, 3)), False, CANDIDATES),
        ("valid", (2, 1), False, CANDIDATES),  # its children are orphans
        ("valid", (2, 4), False, CANDIDATES),  # a gap between siblings
        ("hidden", (2, 7, 5), math.nan, SCORE),
        ("hidden", (2, 0, 0), math.inf, SCORE),
    ],
)
@pytest.mark.parametrize("draws", [False, True])
def test_a_bad_value_is_nan_and_a_flag(simt, name, index, value, message, draws):
    """No check on the host sees it; the row has no choice, the others are as they were, and it is said once."""
    router = random_router(2)
    p = {"hidden": torch.randn(4, 12, 48), "valid": torch.ones(4, 12, dtype=torch.bool)}
    if draws or name == "uniforms":
        p["uniforms"] = torch.rand(4).double()
    want = decide(router, **p, width=3, depth=2)
    ops.raise_if_flagged(CPU)
    p[name] = p[name].clone()
    p[name][index] = value
    for multiprocessors in (1, 6):
        simt.configure(multiprocessors=multiprocessors)
        log_probs, choice = decide(router, **p, width=3, depth=2)
        assert log_probs[2].isnan().all()
        assert choice[2] == -1
        others = [0, 1, 3]
        assert same((log_probs[others], choice[others]), [result[others] for result in want])
        raised(message)


def test_rows_that_are_not_active_are_not_read():
    """Whatever they hold, nothing is flagged; but a uniform, which the reference looks at in all rows, is."""
    router, hidden, rest = problem(B=4)
    want = decide(router, hidden, **rest)
    active = torch.tensor([True, False, False, True])
    hidden[1:3] = torch.nan
    rest["valid"][1] = False
    rest["valid"][2] = torch.tensor([False, False, False] + [True] * 9)
    log_probs, choice = decide(router, hidden, active=active, **rest)
    ops.raise_if_flagged(CPU)
    assert same((log_probs[[0, 3]], choice[[0, 3]]), [result[[0, 3]] for result in want])
    assert choice[1:3].tolist() == [-1, -1]
    torch.testing.assert_close(log_probs[1:3], torch.full((2, 3), -math.log(3)))
    rest["uniforms"][1] = 1.5
    again = decide(router, hidden, active=active, **rest)
    assert same(again, (log_probs, choice))
    raised(CANDIDATES)


def test_draws_are_the_specification_of_its_own_probabilities(simt):
    """Where the running sum of the probabilities first passes the uniform, to the last bit of both."""
    simt.configure(multiprocessors=2)
    router, hidden, rest = problem(B=1, width=5, depth=1, dim=16, D=20)
    rest["valid"] = torch.tensor([[True, True, False, True, True]])
    hidden = torch.randn(1, 5, 20)
    log_probs, _ = decide(router, hidden, **rest)
    sums = log_probs[0].double().exp().cumsum(0)
    ends = [math.nextafter(x, towards) for x in sums.tolist() for towards in (0, x, 1)]
    uniforms = torch.tensor([u for u in [0.0, 5e-324, *ends, 1 - 2**-53] if u < 1], dtype=torch.float64)
    many = len(uniforms)
    _, choice = decide(
        router, hidden.expand(many, -1, -1), width=5, depth=1, valid=rest["valid"].repeat(many, 1), uniforms=uniforms
    )
    passed = (sums > uniforms[:, None]) & rest["valid"]
    assert torch.equal(choice, torch.where(passed.any(1), passed.int().argmax(1), 4))


def test_ties_go_to_the_first():
    router = random_router(1)
    hidden = torch.randn(1, 1, 48).expand(2, 6, -1)
    valid = torch.tensor([[True] * 6, [False, False, True, True, False, True]])
    assert decide(router, hidden, width=6, depth=1, valid=valid)[1].tolist() == [0, 2]


def test_empty_batches():
    log_probs, choice = decide(random_router(1), torch.randn(0, 3, 48), width=3, depth=1)
    assert (log_probs.shape, choice.shape) == ((0, 3), (0,))


REFUSED = {
    "width": ({"width": 33, "depth": 1}, {}, "width is 33, expected at most 32"),
    "dim": ({"width": 2, "depth": 1}, {"dim": 30, "num_heads": 3}, "dim is 30, expected a multiple of 4 up to 256"),
    "large dim": ({"width": 2, "depth": 1}, {"dim": 260}, "dim is 260, expected a multiple of 4 up to 256"),
    "heads": (
        {"width": 2, "depth": 1},
        {"dim": 24, "num_heads": 2},
        "num_heads is 2, which makes heads of 12, expected a power of two from 4 to 128",
    ),
    "depth": ({"width": 1, "depth": 256}, {}, "depth is 256, expected at most 255"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_does_not_take(case):
    call, config, message = REFUSED[case]
    router = random_router(call["depth"], 20, **{"dim": 16, **config})
    hidden = torch.randn(2, num_slots(call["width"], call["depth"]), 20)
    with pytest.raises(RuntimeError) as error:
        decide(router, hidden, **call)
    assert str(error.value) == f"route: {message} for backend 'cuda'; the nearest accepted backend is 'triton'"
    assert decide(router, hidden, backend="reference", **call)[0].isfinite().all()


def test_a_feed_forward_that_it_does_not_take():
    size = sum(math.prod(shape) for shape in weight_shapes(20, 1, 16, 66, False, False, False).values())
    weights = RouterWeights(torch.randn(size), 20, 1, 16, 4, 66, False, False, False)
    with pytest.raises(RuntimeError, match=r"^route: ffn_dim is 66, expected a multiple of 4 for backend 'cuda'; the"):
        ops.route(torch.randn(2, 3, 20), weights, width=3, depth=1, backend=simt_backend.NAME)


def test_a_tree_too_large_for_a_device(simt):
    simt.configure(shared_bytes_per_block=4 * KIB, shared_bytes_per_multiprocessor=5 * KIB)
    router = random_router(11, 8, 4, num_heads=1)
    hidden = torch.randn(1, num_slots(2, 11), 8)
    with pytest.raises(RuntimeError, match=r"hidden has 4094 nodes in a row, which take \d+ bytes of shared memory"):
        decide(router, hidden, width=2, depth=11)


# Multiprocessors, shared memory of each, and of a block.
DEVICES = {
    "sm_80": (108, 164 * KIB, 163 * KIB),
    "sm_86": (84, 100 * KIB, 99 * KIB),
    "sm_90": (132, 228 * KIB, 227 * KIB),
    "sm_100": (148, 228 * KIB, 227 * KIB),
}


@pytest.mark.parametrize("device", DEVICES)
def test_plans_of_the_papers_sizes(simt, device):
    """Weights stay on chip, but for the widest hidden states where there is little shared memory. A batch large enough
    is shared out among groups, which read them once each."""
    multiprocessors, per_multiprocessor, per_block = DEVICES[device]
    simt.configure(
        multiprocessors=multiprocessors,
        shared_bytes_per_multiprocessor=per_multiprocessor,
        shared_bytes_per_block=per_block,
    )
    for hidden_size, (width, depth), batch in itertools.product(
        (1536, 3584, 8192), ((3, 1), (3, 2), (3, 3), (16, 2), (32, 1)), (1, 8, 300)
    ):
        plan = simt.plan_route(batch, width, depth, hidden_size)
        assert plan["resident"] or (device == "sm_86" and hidden_size == 8192)
        assert plan["shared_bytes"] <= per_block
        assert plan["size"] * plan["groups"] <= min(multiprocessors, 128)
        assert plan["groups"] <= batch
        assert 1 <= plan["rows"] <= batch
        assert plan["workspace"] * 4 < 2**28
        assert (plan["groups"] == 1) if batch == 1 else (plan["groups"] > 1 or batch < 300 or device == "sm_86")
    assert simt.plan_route(8)["size"] == min(multiprocessors, 128)
    assert simt.plan_route(8)["groups"] == 1


def test_plans_of_small_devices(simt):
    """Where the weights do not fit they are read from global memory."""
    simt.configure(multiprocessors=10, shared_bytes_per_multiprocessor=100 * KIB, shared_bytes_per_block=99 * KIB)
    plan = simt.plan_route(8)
    assert not plan["resident"]
    assert plan["shared_bytes"] < KIB
    assert simt.plan_route(8, hidden_size=48, dim=32, ffn_dim=64)["resident"]


def test_the_papers_router_on_chip(simt):
    """As many blocks as hold the paper's weights in their shared memory."""
    simt.configure(multiprocessors=24)
    assert simt.plan_route(2, 3, 2, 1536)["resident"]
    router = random_router(2, 1536, 128)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    hidden = torch.randn(2, 12, 1536).bfloat16()
    with torch.no_grad():
        want = router(hidden, 3)
        oracle = router.double()(hidden.double(), 3)
    router.float()
    assert_within_budget(decide(router, hidden, width=3, depth=2)[0], oracle, want, roundings=32)
