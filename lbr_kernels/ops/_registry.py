"""One schema per op, and the choice of a backend.

``torch.ops.lbr_kernels.<op>`` is defined from the signature of the op's reference, which also serves as its fake
implementation and as its kernel wherever no faster one is registered. The compiled extensions register themselves for
the CPU and for CUDA. Public functions call :func:`call`, which resolves ``backend``: None stands for the best that runs
for these tensors, a name for one of ``_backends.BACKENDS``.

A backend asked for by name never falls back. Kernels have gradients for the ops in :data:`DIFFERENTIABLE` only: for
any other, where an argument requires one, the reference is what runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lbr_kernels.ops import _preferences
from lbr_kernels.ops._backends import BACKENDS, unavailable

LIBRARY = torch.library.Library("lbr_kernels", "DEF")

OPS: dict[str, Callable[..., Any]] = {}  # references
SCHEMAS: dict[str, str] = {}  # "(arguments) -> result", without the op's last argument, isa
FAKES: dict[str, Callable[..., Any]] = {}
DIFFERENTIABLE = frozenset({"packed_tree_attention"})

LIBRARY.define("has_isa(int isa) -> bool")
LIBRARY.define("prepare(Tensor(a!) word) -> ()")


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
        OPS[op], SCHEMAS[op], FAKES[op] = function, schema, fake or function
        return function

    return register


def default_backend(op: str, device: torch.device, dtype: torch.dtype | None, prefer: Sequence[str]) -> str:
    """The first of ``prefer`` that runs, else the reference."""
    return next((name for name in prefer if unavailable(name, op, device, dtype) is None), "reference")


def call(
    op: str, backend: str | None, lead: Tensor, *args: Any, prefer: Callable[[], Sequence[str]] | None = None, **kw: Any
) -> Any:
    """Run ``op`` on the backend for ``lead``, the tensor whose device and dtype decide.

    ``prefer`` names the backends to try on a GPU, the best first, where that depends on the tensors.
    """
    dtype = lead.dtype if lead.is_floating_point() else None
    differentiated = (
        op not in DIFFERENTIABLE
        and torch.is_grad_enabled()
        and any(isinstance(value, Tensor) and value.requires_grad for value in (*args, *kw.values()))
    )
    if backend is None:
        order: Sequence[str] = ("cpu",)
        if lead.device.type != "cpu":
            order = prefer() if prefer is not None else _preferences.of_op(op)
        backend = "reference" if differentiated else default_backend(op, lead.device, dtype, order)
    elif (reason := unavailable(backend, op, lead.device, dtype)) is not None:
        raise RuntimeError(f"{op}: backend {backend!r} cannot run: {reason}")
    elif differentiated and backend != "reference":
        raise RuntimeError(
            f"{op}: backend {backend!r} cannot run: it has no gradient, and an argument requires one; "
            "the nearest accepted backend is 'reference'"
        )
    if backend == "reference":
        return OPS[op](*args, **kw)
    chosen = BACKENDS[backend]
    return chosen.overload(op)(*args, **kw, **chosen.extra)
