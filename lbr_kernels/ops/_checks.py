"""The argument checks of the reference: what is wrong, said as "op: argument has value, expected ...".

The bindings in ``csrc/bindings.cpp`` check the same things in the same words, and ``tests/test_bad_input.py`` holds
them together. Errors are ``RuntimeError``, as of every torch op, and come before anything is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

FLOATING = (torch.float32, torch.float16, torch.bfloat16)


class Axis:
    """One axis of an expected shape: its letter, its size where that is known, and whether 1 may stand for it."""

    def __init__(self, name: str, size: int | None = None, *, or_one: bool = False) -> None:
        self.name, self.size, self.or_one = name, size, or_one

    def accepts(self, size: int) -> bool:
        return self.size is None or size == self.size or (self.or_one and size == 1)

    def __str__(self) -> str:
        if self.size is None:
            return self.name
        return f"1 or {self.size}" if self.or_one and self.size != 1 else str(self.size)


class Checker:
    """Checks the arguments of one op."""

    def __init__(self, op: str) -> None:
        self.op = op

    def __call__(self, ok: bool, message: str) -> None:
        if not ok:
            raise RuntimeError(f"{self.op}: {message}")

    def shape(self, name: str, tensor: Tensor, axes: Sequence[Axis]) -> None:
        ok = tensor.dim() == len(axes) and all(a.accepts(n) for a, n in zip(axes, tensor.shape, strict=True))
        expected = ", ".join(str(axis) for axis in axes)
        self(ok, f"{name} has shape {list(tensor.shape)}, expected [{expected}]")

    def dtype(self, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
        self(tensor.dtype == dtype, f"{name} has dtype {tensor.dtype}, expected {dtype}")

    def floating(self, name: str, tensor: Tensor) -> None:
        # The reference also computes in fp64, for use as an oracle.
        self(
            tensor.dtype in (*FLOATING, torch.float64),
            f"{name} has dtype {tensor.dtype}, expected torch.float32, torch.float16 or torch.bfloat16",
        )

    def device(self, name: str, tensor: Tensor, device: torch.device) -> None:
        self(tensor.device == device, f"{name} is not on {device}, expected all tensors on one device")

    def last_contiguous(self, name: str, tensor: Tensor) -> None:
        ok = tensor.shape[-1] <= 1 or tensor.stride(-1) == 1
        self(ok, f"{name} has stride {tensor.stride(-1)} along its last axis, expected 1")

    def side_input(
        self, name: str, tensor: Tensor | None, dtype: torch.dtype, axes: Sequence[Axis], device: torch.device
    ) -> None:
        if tensor is None:
            return
        self.device(name, tensor, device)
        self.dtype(name, tensor, dtype)
        self.shape(name, tensor, axes)
        self.last_contiguous(name, tensor)

    def in_range(self, name: str, values: Tensor | None, low: float, high: float, expected: str) -> None:
        """Every element must satisfy ``low <= value <= high``; names the first that does not."""
        if values is None or not has_values(values):
            return
        bad = ((values < low) | (values > high) | values.isnan()).nonzero()
        if len(bad):
            index = bad[0].tolist()
            value: Any = values[tuple(index)].item()
            where = ", ".join(str(i) for i in index)
            self(False, f"{name}[{where}] is {number(value)}, expected {expected}")


def has_values(tensor: Tensor) -> bool:
    """Whether elements can be looked at: not while a graph is being traced."""
    return not (isinstance(tensor, FakeTensor) or tensor.is_meta or torch.compiler.is_compiling())


def number(value: float) -> str:
    """A number as C++ streams print it, so that both sides say the same."""
    return f"{value:g}" if isinstance(value, float) else str(value)
