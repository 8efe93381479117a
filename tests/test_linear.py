"""linear against torch's own in fp64, and the promise that a row's bits do not depend on its company."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import BACKENDS, DTYPES, KERNELS, assert_within_budget
from torch.nn import functional

from lbr_kernels import ops


def problem(rows=3, outputs=40, inputs=70, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=g).to(dtype) for shape in ((rows, inputs), (outputs, inputs), (outputs,)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [*range(1, 14), 64])
def test_error_budget(backend, dtype, rows):
    """Every number of rows: the tiles differ by it."""
    x, weight, bias = problem(rows, dtype=dtype)
    want = functional.linear(x.double(), weight.double(), bias.double())
    out = ops.linear(x, weight, bias, backend=backend)
    assert out.dtype == dtype
    assert_within_budget(out, want, functional.linear(x, weight, bias))


@pytest.mark.parametrize("backend", KERNELS)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_shape(backend, data):
    draw = data.draw
    x, weight, bias = problem(
        draw(st.integers(0, 20)), draw(st.integers(0, 70)), draw(st.integers(0, 200)), draw(st.sampled_from(DTYPES)),
        draw(st.integers(0, 99)),
    )  # fmt: skip
    bias = bias if draw(st.booleans()) else None
    want = functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    out = ops.linear(x, weight, bias, backend=backend)
    if want.numel():
        assert_within_budget(out, want, ops.linear(x, weight, bias, backend="reference"), roundings=8)
    assert out.shape == want.shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_lies_between_rows_is_not_read(backend):
    """Inputs of any rank and stride, weights as slices of something larger; NaN all around."""
    x, weight, bias = problem(12, 10, 37)
    want = ops.linear(x, weight, bias, backend=backend)
    wide = torch.full((5, 4, 3, 80), torch.nan)
    view = wide[1:5:2, :3, ::2, 9:46]
    view.copy_(x.view(2, 3, 2, 37))
    big = torch.full((23, 60), torch.nan)
    big[2:22:2, 5:42] = weight
    out = ops.linear(view, big[2:22:2, 5:42], bias, backend=backend)
    assert out.shape == (2, 3, 2, 10)
    torch.testing.assert_close(out.view(12, 10), want)
    flat = ops.linear(x[3], weight, bias, backend=backend)
    assert flat.shape == (10,)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_batch(backend, dtype):
    """Bit for bit the same alone, among others, and with one, two or four threads."""
    x, weight, bias = problem(17, 333, 517, dtype)
    threads = torch.get_num_threads()
    want = torch.cat([ops.linear(x[r : r + 1], weight, bias, backend=backend) for r in range(17)])
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            for rows in (2, 3, 6, 7, 17):
                assert torch.equal(ops.linear(x[:rows], weight, bias, backend=backend), want[:rows])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_infinity_are_passed_on(backend):
    x, weight, bias = problem(3, 20, 35)
    x[1, 34] = torch.nan
    weight[7, 0] = torch.inf
    out = ops.linear(x, weight, bias, backend=backend)
    assert out[1].isnan().all()
    assert out[0, 7].isinf()
    assert out[2, :7].isfinite().all()


def test_gradient_is_the_references():
    x, weight, bias = (t.requires_grad_() for t in problem())
    ops.linear(x, weight, bias).square().sum().backward()
    grads = [t.grad.clone() for t in (x, weight, bias)]
    for t in (x, weight, bias):
        t.grad = None
    functional.linear(x, weight, bias).square().sum().backward()
    for grad, t in zip(grads, (x, weight, bias), strict=True):
        torch.testing.assert_close(grad, t.grad)
