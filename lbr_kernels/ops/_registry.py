"""One schema per op, and the choice of a backend.

``torch.ops.lbr_kernels.<op>`` is defined from the signature of the op's reference, which also serves as its fake
implementation and as its kernel wherever no faster one is registered. The C++ extension registers itself for the CPU.
Public functions call :func:`call`, which resolves ``backend``:

* ``None``: the best that runs for these tensors;
* ``"reference"``: plain PyTorch, on any device, also in fp64;
* ``"cpu"``: the C++ kernels with the best instruction set of this processor; ``"cpu-portable"``, ``"cpu-avx2"`` and
  ``"cpu-avx512"`` name one.

A backend asked for by name never falls back. Only the reference has gradients: where an argument requires one, it is
what runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lbr_kernels.ops import _extension
from lbr_kernels.ops._checks import FLOATING

LIBRARY = torch.library.Library("lbr_kernels", "DEF")

# The values of the C++ enum Isa; they are the ops' last argument.
CPU_BACKENDS = {"cpu": 0, "cpu-portable": 1, "cpu-avx2": 2, "cpu-avx512": 3, "cpu-avx512-bf16": 4}
BACKENDS = ("reference", *CPU_BACKENDS)

OPS: dict[str, Callable[..., Any]] = {}  # references
_OVERLOADS: dict[str, torch._ops.OpOverload] = {}

LIBRARY.define("has_isa(int isa) -> bool")


def reference(
    op: str, *, mutates: tuple[str, ...] = (), fake: Callable[..., Any] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a plain PyTorch function the definition of an op.

    The function checks its arguments. Traced with fake tensors it must give outputs of the right shapes, or ``fake``
    does so in its place.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        schema = torch.library.infer_schema(function, mutates_args=mutates).replace("SymInt", "int")
        arguments, result = schema.rsplit(" -> ", 1)
        isa = "int isa=0" if "*" in arguments else "*, int isa=0"
        LIBRARY.define(f"{op}{arguments[:-1]}, {isa}) -> {result}", tags=torch.Tag.pt2_compliant_tag)

        def kernel(*args: Any, isa: int = 0, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        def fake_kernel(*args: Any, isa: int = 0, **kwargs: Any) -> Any:
            return (fake or function)(*args, **kwargs)

        LIBRARY.impl(op, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"lbr_kernels::{op}", fake_kernel, lib=LIBRARY)
        OPS[op] = function
        _OVERLOADS[op] = getattr(torch.ops.lbr_kernels, op).default
        return function

    return register


def unavailable(backend: str, device: torch.device, dtype: torch.dtype | None = None) -> str | None:
    """Why ``backend`` cannot run for tensors on ``device`` with ``dtype``; None if it can."""
    if backend == "reference":
        return None
    if backend not in CPU_BACKENDS:
        return f"there is no such backend, known are {', '.join(BACKENDS)}"
    if device.type != "cpu":
        return f"it takes tensors on cpu, got {device}; the nearest accepted backend is 'reference'"
    if dtype is not None and dtype not in FLOATING:
        return f"it takes float32, float16 or bfloat16, got {dtype}; the nearest accepted backend is 'reference'"
    reason: str | None = _unavailable_cpu(backend)
    return reason


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _unavailable_cpu(backend: str) -> str | None:
    if (reason := _extension.load()) is not None:
        return reason
    if backend != "cpu" and not torch.ops.lbr_kernels.has_isa(CPU_BACKENDS[backend]):
        return "this processor lacks the instruction set; the nearest accepted backend is 'cpu'"
    return None


def call(op: str, backend: str | None, lead: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Run ``op`` on the backend for ``lead``, the tensor whose device and dtype decide."""
    dtype = lead.dtype if lead.is_floating_point() else None
    differentiated = torch.is_grad_enabled() and any(
        isinstance(value, Tensor) and value.requires_grad for value in (*args, *kwargs.values())
    )
    if backend is None:
        backend = "reference" if differentiated or unavailable("cpu", lead.device, dtype) else "cpu"
    elif (reason := unavailable(backend, lead.device, dtype)) is not None:
        raise RuntimeError(f"{op}: backend {backend!r} cannot run: {reason}")
    elif differentiated and backend != "reference":
        raise RuntimeError(
            f"{op}: backend {backend!r} cannot run: it has no gradient, and an argument requires one; "
            "the nearest accepted backend is 'reference'"
        )
    if backend == "reference":
        return OPS[op](*args, **kwargs)
    return _OVERLOADS[op](*args, **kwargs, isa=CPU_BACKENDS[backend])
