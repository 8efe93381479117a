"""linear against torch's own, for few rows; the weights are cold, as those of a model are."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from compare import Cost, compare, rotating
from pytest_benchmark.fixture import BenchmarkFixture
from roof import Meter
from torch import Tensor
from torch.nn import functional

from lbr_kernels import ops

QUICK = {(3, torch.float32), (9, torch.float32), (3, torch.bfloat16), (9, torch.bfloat16)}


@pytest.mark.parametrize(
    ("rows", "dtype", "outputs", "inputs"),
    [
        pytest.param(
            rows, dtype, *shape, marks=[pytest.mark.quick] if (rows, dtype) in QUICK and shape[0] > shape[1] else []
        )
        for rows, dtype, shape in product(
            [1, 3, 9, 16, 32, 64], [torch.float32, torch.bfloat16, torch.float16], [(4864, 896), (896, 4864)]
        )
    ],
)
def bench_linear(
    benchmark: BenchmarkFixture, meter: Meter, rows: int, dtype: torch.dtype, outputs: int, inputs: int
) -> None:
    x = torch.randn(rows, inputs).to(dtype)
    size = outputs * inputs * dtype.itemsize
    weights = rotating(lambda: (torch.randn(outputs, inputs).to(dtype),), size)

    def check(ours: Tensor, theirs: Tensor) -> None:
        assert ours.shape == theirs.shape

    (weight,) = weights()
    wide = functional.linear(x.double(), weight.double())
    limit = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype] * float(wide.abs().max())
    torch.testing.assert_close(ops.linear(x, weight).double(), wide, rtol=0, atol=limit)
    compare(
        benchmark,
        lambda: ops.linear(x, *weights()),
        {"torch": lambda: functional.linear(x, *weights())},
        op="linear",
        shape={"rows": rows, "outputs": outputs, "inputs": inputs},
        dtype=dtype,
        check=check,
        cost=Cost(size, 2 * rows * outputs * inputs),
        meter=meter,
        cold=True,
    )
