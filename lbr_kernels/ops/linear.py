"""linear: a few rows times a large matrix, as fast as the matrix can be read.

Contract
--------
``torch.nn.functional.linear`` for the few rows that a decoding step has: the nodes of a tree. On a CPU a framework's
matrix products are made for many rows, or for one; in between they are far from memory speed. Sums run in fp32, and in
the kernels in an order that depends on the length of a row alone: a row's result is the same bits whatever rows stand
beside it. A processor's bf16 dot products take subnormal numbers for zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lbr_kernels.ops import _registry
from lbr_kernels.ops._checks import Axis, Checker


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:  # noqa: A002
    """``input @ weight.T + bias``, as ``torch.nn.functional.linear``.

    Args:
        input: ``[..., I]``, fp32, fp16 or bf16. Any strides, last axis contiguous. Any number of rows is right; up to
            some dozens are fast.
        weight: ``[O, I]`` of the same dtype, last axis contiguous.
        bias: ``[O]`` of the same dtype.
        backend: see ``ops.backends()``.

    Returns:
        ``[..., O]`` in that dtype, rounded once.

    Raises:
        RuntimeError: a shape, dtype, device or stride is not as above.
    """
    out: Tensor = _registry.call("linear", backend, weight, input, weight, bias)
    return out


@_registry.reference("linear")
def linear_ref(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: A002
    """The specification, in plain PyTorch: fp32 inside, fp64 for fp64 inputs."""
    check = Checker("linear")
    device = weight.device
    check.shape("weight", weight, (Axis("O"), Axis("I")))
    check.floating("weight", weight)
    check.last_contiguous("weight", weight)
    outputs, inputs = weight.shape
    check.device("input", input, device)
    check.dtype("input", input, weight.dtype)
    ok = input.dim() >= 1 and input.shape[-1] == inputs
    check(ok, f"input has shape {list(input.shape)}, expected [..., {inputs}]")
    check.last_contiguous("input", input)
    check.side_input("bias", bias, weight.dtype, (Axis("O", outputs),), device)

    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    out = input.to(dtype) @ weight.to(dtype).T
    return (out if bias is None else out + bias.to(dtype)).to(weight.dtype)
