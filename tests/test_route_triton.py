"""route in Triton, on a GPU where there is one, else in Triton's interpreter: the shared cases, flags, guards."""

from __future__ import annotations

import math

import pytest
import test_route as shared
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import DTYPES, assert_within_budget, device_of, to_device
from test_registry import op_arguments
from test_route import VARIANTS, random_router, random_valid
from torch import Tensor
from triton_guards import Guarded, ahead_of_time, flags_of

from lbr_kernels import Router, ops
from lbr_kernels.ops import route_triton
from lbr_kernels.ops._backends import BACKENDS
from lbr_kernels.ops.tree_shape import num_slots

DEVICE = device_of("triton")
BAD_SCORE, BAD_CANDIDATES = 32, 64
ON_CPU = pytest.mark.skipif(DEVICE.type != "cpu", reason="the shared cases make their tensors on the CPU")


def route(hidden: Tensor, router: Router, **kwargs) -> tuple[Tensor, Tensor, int]:
    """Log-probabilities, choices, and the bits that were set."""
    weights = router.packed()
    weights = weights._replace(data=weights.data.to(DEVICE))
    kwargs = {name: to_device(value, DEVICE) for name, value in kwargs.items()}
    call = {"width": kwargs.pop("width"), "depth": weights.depth, **kwargs, "backend": "triton"}
    (log_probs, choice), bits = flags_of(lambda: ops.route(to_device(hidden, DEVICE), weights, **call), DEVICE)
    return log_probs.cpu(), choice.cpu(), bits


@ON_CPU
@pytest.mark.parametrize(
    "case",
    [
        lambda: shared.test_inactive_rows("triton"),
        lambda: shared.test_untrained_router_is_uniform("triton"),
        lambda: shared.test_strided_hidden("triton"),
        lambda: shared.test_small_temperatures_make_the_best_certain("triton", 1e-300),
    ],
)
def test_shared_cases(case):
    case()


@given(data=st.data())
@settings(max_examples=10, deadline=None)
def test_any_router(data):
    """Any tree, variant, size and dtype, with missing nodes whose slots hold NaN, and draws; guards stay."""
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 999)))
    width, depth = draw(st.sampled_from([(1, 1), (2, 1), (3, 1), (16, 1), (1, 3), (3, 2), (5, 2), (2, 3), (2, 4)]))
    dim, heads = draw(st.sampled_from([(32, 4), (12, 3), (5, 1), (24, 2), (16, 16), (40, 5)]))
    variant = draw(st.sampled_from(VARIANTS))
    D, dtype = draw(st.sampled_from([7, 16, 48, 65])), draw(st.sampled_from(DTYPES))
    router = random_router(depth, D, dim, num_heads=heads, **variant)
    B = 3
    hidden, valid = torch.randn(B, num_slots(width, depth), D).to(dtype), random_valid(B, width, depth)
    temperature = draw(st.sampled_from([0.7, 1.0, 5.0]))
    kwargs = {"width": width, "temperature": temperature}
    with torch.no_grad():
        plain = router(hidden.float(), width, valid=valid, temperature=temperature)
        oracle = router.double()(hidden.double(), width, valid=valid, temperature=temperature)
    router.float()
    hidden[~valid] = torch.nan
    kwargs["active"] = torch.tensor([True, draw(st.booleans()), True])
    if draw(st.booleans()):
        kwargs["uniforms"] = torch.rand(B, dtype=torch.float64)
    guarded = Guarded()
    kwargs["valid"] = guarded(valid, device=DEVICE)
    log_probs, choice, bits = route(guarded(hidden, device=DEVICE), router, **kwargs)
    guarded.check()
    assert bits == 0
    exists, active = valid[:, :width], kwargs["active"]
    assert (log_probs[active][~exists[active]] == -torch.inf).all()
    used = exists & active[:, None]
    assert_within_budget(log_probs[used], oracle[used], plain[used], roundings=64)
    torch.testing.assert_close(log_probs[~active].exp(), torch.full_like(log_probs[~active], 1 / width))
    assert (choice[~active] == -1).all()
    for b in active.nonzero()[:, 0].tolist():
        probability = log_probs[b].double().exp()
        want = int(log_probs[b].argmax())
        if "uniforms" in kwargs:
            last = int((probability > 0).nonzero()[-1])
            want = min(int((probability.cumsum(0) <= kwargs["uniforms"][b]).sum()), last)
        assert choice[b] == want


@pytest.mark.parametrize("dtype", DTYPES)
def test_paper_size(dtype):
    """The paper's router (p = 128, 4 heads) on hidden states of 1536."""
    router = random_router(2, 1536, 128)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    hidden = torch.randn(2, 12, 1536).to(dtype)
    with torch.no_grad():
        want = router(hidden.float(), 3)
        oracle = router.double()(hidden.double(), 3)
    router.float()
    log_probs, choice, _ = route(hidden, router, width=3)
    assert_within_budget(log_probs, oracle, want, roundings=32)
    assert torch.equal(choice, want.argmax(-1))


def test_draws_follow_the_probabilities():
    """The ends of the unit interval, missing candidates, and both sides of every candidate's edge."""
    router = random_router(1, 20, 16)
    rows = 8
    hidden = torch.randn(1, 4, 20).expand(rows, -1, -1)
    valid = torch.tensor([True, False, True, True]).repeat(rows, 1)
    log_probs, _, _ = route(hidden[:1], router, width=4, valid=valid[:1])
    ends = log_probs[0].double().exp().cumsum(0)
    edges = [0.0, ends[0] - 1e-12, ends[0] + 1e-12, ends[2] - 1e-12, ends[2] + 1e-12, 1 - 2**-53, 0.0, 1 - 2**-53]
    valid[6:] = torch.tensor([False, True, True, False])
    _, choice, bits = route(hidden, router, width=4, valid=valid, uniforms=torch.tensor(edges, dtype=torch.float64))
    assert choice.tolist() == [0, 0, 2, 2, 3, 3, 1, 2]
    assert bits == 0


@pytest.mark.parametrize(
    ("change", "bit"),
    [({"hidden": value}, BAD_SCORE) for value in (math.nan, math.inf)]
    + [({"uniform": uniform}, BAD_CANDIDATES) for uniform in (1.0, -1e-300, math.nan, math.inf)]
    + [({"missing": nodes}, BAD_CANDIDATES) for nodes in (range(12), [0, 1, 2], [1], [3], [10])],
)
def test_a_bad_row_has_no_choice(change, bit):
    """-1 and NaN, the bit is set, and the rows beside it are as ever."""
    router = random_router(2, 20, 16)
    hidden, valid = torch.randn(3, 12, 20), torch.ones(3, 12, dtype=torch.bool)
    uniforms = torch.tensor([0.3, 0.5, 0.9], dtype=torch.float64)
    want = ops.route(hidden, router.packed(), width=3, depth=2, valid=valid, uniforms=uniforms)
    hidden[1, 5, 3] = change.get("hidden", 0.0)
    uniforms[1] = change.get("uniform", 0.5)
    valid[1, list(change.get("missing", []))] = False
    guarded = Guarded()
    hidden, valid, uniforms = (guarded(t, device=DEVICE) for t in (hidden, valid, uniforms))
    log_probs, choice, bits = route(hidden, router, width=3, valid=valid, uniforms=uniforms)
    guarded.check()
    assert bits == bit
    assert choice[1] == -1
    assert log_probs[1].isnan().all()
    assert torch.equal(choice[::2], want[1][::2])
    torch.testing.assert_close(log_probs[::2], want[0][::2], rtol=0, atol=1e-5)
    inactive = route(hidden, router, width=3, valid=valid, uniforms=uniforms, active=torch.tensor([True, False, True]))
    assert inactive[2] == 0
    assert inactive[1][1] == -1


def test_counters_are_left_at_zero_and_results_in_bounds():
    """Twice the same from the same launch; with 16 paths scratch is used to its end, where a guard stands."""
    router = random_router(2, 20, 24, num_heads=3).packed()
    counters = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    call = route_triton.launch(
        torch.randn(3, 20, 20, device=DEVICE), router.data.to(DEVICE), 4, 2, *router[3:], counters
    )
    assert call.programs == 3 * 2  # columns of the projection in two parts
    guarded = Guarded()
    for name in ("scratch", "exists", "log_probs", "choices"):
        call.arguments[name] = guarded(call.arguments[name], device=DEVICE)
    call.arguments["scratch"].fill_(torch.nan)
    results = []
    for _ in range(2):
        call.run(DEVICE)
        assert counters.tolist() == [0, 0, 0]
        results.append((call.arguments["log_probs"].clone(), call.arguments["choices"].clone()))
    guarded.check(written=True)
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)
        assert not first.isnan().any()


def test_no_rows():
    log_probs, choice, bits = route(torch.zeros(0, 3, 48), random_router(1), width=3)
    assert log_probs.shape == (0, 3)
    assert choice.shape == (0,)
    assert bits == 0


def test_opcheck():
    args, kwargs = op_arguments("route")
    args = [to_device(a, DEVICE) for a in args]
    kwargs = {name: to_device(value, DEVICE) for name, value in kwargs.items()}
    assert ops.backends(DEVICE)["route"]["triton"] is None
    torch.library.opcheck(BACKENDS["triton"].overload("route"), args, kwargs)


@pytest.mark.full  # as `make gpu-check` sees
def test_compiles_without_spills():
    pytest.importorskip("rich")
    (record,) = ahead_of_time("r.resources(['route bfloat16 p128 K3 L2'], [90])")
    assert record["spill_bytes"] == 0
    assert record["blocks_per_sm"] >= 1
