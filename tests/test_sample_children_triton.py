"""sample_children and top_children in Triton, on a GPU where there is one, else in Triton's interpreter.

The shared cases, and what the conformance tests do not ask: the CPU kernel's tokens, flags, guards.
"""

from __future__ import annotations

import math

import pytest
import test_sample_children as shared
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import DTYPES, device_of, to_device
from test_registry import op_arguments
from torch import Tensor
from triton_guards import Guarded, ahead_of_time, flags_of

from lbr_kernels import ops
from lbr_kernels.ops._backends import BACKENDS

DEVICE = device_of("triton")
BAD_LOGITS, BAD_DRAW = 8, 16
ON_CPU = pytest.mark.skipif(DEVICE.type != "cpu", reason="the shared cases make their tensors on the CPU")


def run(op: str, *args, **kwargs) -> tuple[Tensor, Tensor, int]:
    """Tokens, log-probabilities, and the bits that were set."""
    function = getattr(torch.ops.lbr_kernels, f"{op}_triton").default
    args = [to_device(a, DEVICE) for a in args]
    kwargs = {name: to_device(value, DEVICE) for name, value in kwargs.items()}
    assert ops.backends(DEVICE)[op]["triton"] is None
    (tokens, log_probs), bits = flags_of(lambda: function(*args, **kwargs), DEVICE)
    return tokens.cpu(), log_probs.cpu(), bits


def on_cpu(op: str, *args, **kwargs) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = getattr(torch.ops.lbr_kernels, op).default(*args, **kwargs)
    return result


@ON_CPU
@pytest.mark.parametrize(
    "case",
    [
        lambda: shared.test_row_index("triton"),
        lambda: shared.test_rows_without_children("triton"),
        lambda: shared.test_top_children("triton"),
        lambda: shared.test_extreme_uniforms("triton"),
        lambda: shared.test_no_rows("triton"),
    ],
)
def test_shared_cases(case):
    case()


@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_tokens_are_the_cpu_kernels(data):
    """Any vocabulary, dtype, filters per call and per row, rows without children; guards stay as they are."""
    draw = data.draw
    R, K = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 9]))
    V = draw(st.sampled_from([1, 2, 7, 33, 127, 128, 129, 1023, 2048, 2049, 5000]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    logits = torch.randn(R, V, generator=g) * draw(st.sampled_from([0.0, 0.5, 3.0, 30.0]))
    logits = logits.to(draw(st.sampled_from(DTYPES)))
    if V > 2:
        logits[torch.rand(R, V, generator=g) < draw(st.sampled_from([0.0, 0.5]))] = -torch.inf
        logits[:, V // 2] = 0
        logits[:, 0] = -0.0
    one = st.tuples(
        st.sampled_from([1e-300, 0.1, 1.0, 2.0, 1e300]), st.sampled_from([0, 1, 3, 50, V, 10**6, 2**53]),
        st.sampled_from([0.0, 0.2, 0.7, 0.95, math.nextafter(1, 0), 1.0]), st.sampled_from([0.0, 1e-9, 0.05, 1.0]),
    )  # fmt: skip
    filters, kwargs = (1.0, 0, 1.0, 0.0), {}
    if draw(st.booleans()):
        rows = draw(st.lists(one, min_size=R, max_size=R))
        kwargs["row_filters"] = torch.tensor(rows, dtype=torch.float64)
    else:
        filters = draw(one)
    if draw(st.booleans()):
        kwargs["row_index"] = torch.randint(-1, R, (draw(st.integers(1, 4)),), generator=g)
    rows = len(kwargs.get("row_index", logits))
    uniforms = torch.rand(rows, K, dtype=torch.float64, generator=g)
    uniforms[0, 0] = draw(st.sampled_from([0.0, 1 - 2**-53, 0.5]))
    guarded = Guarded()
    given_logits, given_uniforms = guarded(logits, device=DEVICE), guarded(uniforms, device=DEVICE)
    for want, got in (
        (
            on_cpu("sample_children", logits, uniforms, *filters, **kwargs),
            run("sample_children", given_logits, given_uniforms, *filters, **kwargs),
        ),
        (
            on_cpu("top_children", logits, K, *filters, **kwargs),
            run("top_children", given_logits, K, *filters, **kwargs),
        ),
    ):
        assert torch.equal(got[0], want[0])
        torch.testing.assert_close(got[1], want[1], rtol=1e-6, atol=1e-6)
        assert got[2] == 0
    guarded.check()


@pytest.mark.parametrize(
    ("values", "filters"),
    [
        ([1.0, 2.0, 2.0, 2.0, 0.0, 2.0], filters)
        for filters in [
            {"top_k": 2}, {"top_p": 0.15}, {"top_p": 0.3}, {"top_p": 0.55}, {"top_k": 3, "top_p": 0.5}, {"top_p": 0.0},
        ]
    ]
    + [([0.0] * 300, {"top_p": 0.5}), ([-0.0, 0.0] * 150, {"top_p": 0.37}), ([-0.0, 0.0, 1.0], {"top_k": 2})],
)  # fmt: skip
def test_ties_at_the_edges(values, filters):
    """Of equal logits the larger ids are kept; a negative zero equals a positive one."""
    logits = torch.tensor([values])
    grid = ((torch.arange(60, dtype=torch.float64) + 0.5) / 60)[None]
    given_filters = [filters.get(name, off) for name, off in (("temperature", 1.0), ("top_k", 0), ("top_p", 1.0))]
    got, want = (
        run("sample_children", logits, grid, *given_filters),
        on_cpu("sample_children", logits, grid, *given_filters),
    )
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], rtol=1e-6, atol=1e-6)
    got, want = run("top_children", logits, 7, *given_filters), on_cpu("top_children", logits, 7, *given_filters)
    assert torch.equal(got[0], want[0])


def test_a_nucleus_that_is_reached_exactly():
    """A token before which the whole limit lies is left out."""
    logits, half = torch.tensor([[0.0, 0.0, -1.0, -1.0]]), 2**41
    total = half + 2 * round(2**40 * math.exp(-1))
    top_p = half / total
    assert top_p * total == half
    grid = ((torch.arange(20, dtype=torch.float64) + 0.5) / 20)[None]
    for filters in ((1.0, 0, top_p), (1.0, 3, top_p)):
        assert on_cpu("sample_children", logits, grid, *filters)[0].unique().tolist() == [0, 1]
        assert run("sample_children", logits, grid, *filters)[0].unique().tolist() == [0, 1]


@pytest.mark.parametrize("distance", [3, 6, 12, 25])
def test_the_list_reaches_as_far_as_the_filters(distance):
    """At each of the distances from the largest logit at which it may end, counted and weighed."""
    logits = -torch.linspace(0, 30, 301)[None]
    uniforms = 1 - torch.logspace(-12, -1, 20, dtype=torch.float64)[None]
    crowd = torch.full((1, 3000), -float(distance))
    crowd[0, 1234] = 0
    for rows, filters in ((logits, (1.0, 10 * distance)), (logits, (2.0, 10 * distance)), (crowd, (1.0, 0, 0.9999))):
        got, want = (
            run("sample_children", rows, uniforms, *filters),
            on_cpu("sample_children", rows, uniforms, *filters),
        )
        assert torch.equal(got[0], want[0])
        torch.testing.assert_close(got[1], want[1], rtol=1e-6, atol=1e-6)


def test_an_integer_of_every_weight():
    """Weights are the specification's to the last bit: a draw at either side of every token's edge finds it."""
    logits = torch.linspace(-27, 0, 129)[None].clone()
    weights = torch.empty(129, dtype=torch.int64)
    for i, x in enumerate(logits[0].double().tolist()):
        p, n = ops.sample_children_ref.__globals__["exp_fp64"](torch.tensor([x], dtype=torch.float64))
        weights[i] = int(torch.round(torch.ldexp(p, n + 40)).item())
    total = int(weights.sum())
    ends = weights.cumsum(0)
    # The least uniform whose floor(u * total) is t; total < 2^53, so that t / total is near enough to find it.
    for at in (0, 1, 40, 90, 127):
        uniforms = []
        for target in (int(ends[at]) - 1, int(ends[at])):
            u = target / total
            while int(u * total) < target:
                u = math.nextafter(u, 1)
            while int(math.nextafter(u, 0) * total) >= target:
                u = math.nextafter(u, 0)
            uniforms.append(u)
        tokens, _, _ = run("sample_children", logits, torch.tensor([uniforms], dtype=torch.float64))
        assert tokens.tolist() == [[at, at + 1]]


@pytest.mark.parametrize("filters", [(1.0, 0, 1.0, 0.0), (0.8, 50, 0.95, 0.01), (1.0, 0, 0.95, 0.0)])
def test_a_real_vocabulary(filters):
    logits = torch.randn(1, 151_936) * 2.5
    uniforms = torch.rand(1, 5, dtype=torch.float64)
    got, want = (
        run("sample_children", logits, uniforms, *filters),
        on_cpu("sample_children", logits, uniforms, *filters),
    )
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], rtol=1e-6, atol=1e-6)


def table(**change) -> Tensor:
    filters = torch.tensor([[1.0, 0, 1.0, 0.0]] * 3, dtype=torch.float64)
    for name, value in change.items():
        filters[1, ("temperature", "top_k", "top_p", "min_p").index(name)] = value
    return filters


NAN, INF = math.nan, math.inf
BAD_FILTERS = [
    {"temperature": 0.0}, {"temperature": -1.0}, {"temperature": INF}, {"temperature": NAN}, {"top_k": -1.0},
    {"top_k": 0.5}, {"top_k": NAN}, {"top_k": INF}, {"top_k": 2.0**54}, {"top_p": -0.1}, {"top_p": 1.1}, {"top_p": NAN},
    {"min_p": -0.1}, {"min_p": 1.5}, {"min_p": NAN},
]  # fmt: skip


@pytest.mark.parametrize("op", ["sample_children", "top_children"])
@pytest.mark.parametrize(
    ("change", "bit"),
    [({"logit": value}, BAD_LOGITS) for value in (NAN, -NAN, INF, -INF)]
    + [({"filters": filters}, BAD_DRAW) for filters in BAD_FILTERS]
    + [({"index": index}, BAD_DRAW) for index in (-2, 3, 2**40, -(2**63))]
    + [({"uniform": uniform}, BAD_DRAW) for uniform in (1.0, -1e-300, NAN, INF)],
)
def test_a_bad_row_has_no_tokens(op, change, bit):
    """-1 and NaN, the bit is set, and the rows beside it are as ever; nothing is read past the logits."""
    logits = torch.randn(3, 300)
    uniforms = torch.rand(3, 4, dtype=torch.float64)
    if "uniform" in change and op == "top_children":
        return
    index = torch.tensor([0, 1, 2])
    second = (uniforms,) if op == "sample_children" else (4,)
    want = on_cpu(op, logits, *second, row_filters=table(), row_index=index)
    if "logit" in change:
        logits[1, 7] = change["logit"]
        if change["logit"] == -INF:
            logits[1] = -INF
    uniforms[1, 3] = change.get("uniform", 0.5)
    index[1] = change.get("index", 1)
    guarded = Guarded()
    logits = guarded(logits, device=DEVICE)
    second = (guarded(uniforms, device=DEVICE),) if op == "sample_children" else (4,)
    kwargs = {
        "row_filters": guarded(table(**change.get("filters", {})), device=DEVICE),
        "row_index": guarded(index, device=DEVICE),
    }
    tokens, log_probs, bits = run(op, logits, *second, **kwargs)
    assert bits == bit
    assert (tokens[1] == -1).all()
    assert log_probs[1].isnan().all()
    assert torch.equal(tokens[::2], want[0][::2])
    torch.testing.assert_close(log_probs[::2], want[1][::2], rtol=1e-6, atol=1e-6)
    guarded.check()


def test_a_row_without_children_is_not_read():
    """-1 and 0, whatever the filters and logits of the first row are; its uniforms are checked like all."""
    logits, uniforms = torch.full((1, 40), NAN), torch.rand(1, 3, dtype=torch.float64)
    filters = torch.full((1, 4), NAN, dtype=torch.float64)
    nobody = {"row_index": torch.tensor([-1]), "row_filters": filters}
    tokens, log_probs, bits = run("sample_children", logits, uniforms, **nobody)
    assert tokens.tolist() == [[-1, -1, -1]]
    assert log_probs.tolist() == [[0, 0, 0]]
    assert bits == 0
    uniforms[0, 1] = 1.0
    assert run("sample_children", logits, uniforms, **nobody)[2] == BAD_DRAW


def test_strided_rows():
    wide, uniforms = torch.randn(4, 400), torch.rand(2, 9, dtype=torch.float64)
    logits = wide[::2, 17:350]
    want = on_cpu("sample_children", logits, uniforms[:, 2:5], 1.0, 40, 0.9)
    tokens, _, _ = run("sample_children", logits, uniforms[:, 2:5], 1.0, 40, 0.9)
    assert torch.equal(tokens, want[0])


@pytest.mark.parametrize("op", ["sample_children", "top_children"])
def test_opcheck(op):
    args, kwargs = op_arguments(op)
    args = [to_device(a, DEVICE) for a in args]
    kwargs = {name: to_device(value, DEVICE) for name, value in kwargs.items()}
    assert ops.backends(DEVICE)[op]["triton"] is None
    torch.library.opcheck(BACKENDS["triton"].overload(op), args, kwargs)


def test_compiles_without_spills_and_without_fused_exponentials():
    """A fused multiply-add rounds once where the specification rounds twice; only the logarithm at the end has some."""
    pytest.importorskip("rich")
    (record,) = ahead_of_time("r.resources(['sample_children bfloat16, filters: rows'], [90])")
    assert record["spill_bytes"] == 0
    assert record["blocks_per_sm"] >= 1
    kernel = "r.compile_for(r.KERNELS['top_children float32, filters: none'](), 90).asm['ptx']"
    assert ahead_of_time(f"{kernel}.count('mul.rn.f64')") >= 2 * 14
    assert ahead_of_time(f"{kernel}.count('fma.rn.f64')") <= 16
