"""What several test files share: backends that run here, the error budget, trees, and poison."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lbr_kernels import ops
from lbr_kernels.ops._backends import BACKENDS as ALL_BACKENDS

ON_GPU = ("cuda", "triton")  # backends that are tested on a GPU where there is one


def device_of(backend: str | None) -> torch.device:
    """Where tensors for ``backend`` have to be. Without a GPU, Triton's kernels run in its interpreter."""
    return torch.device("cuda" if backend in ON_GPU and torch.cuda.is_available() else "cpu")


def backends_of(op: str, *, interpreted: bool = True) -> list:
    """The backends that have ``op``, as parameters; those that do not run here are skipped, saying why.

    Without a GPU ``"cuda-simt"`` stands for ``"cuda"``. Triton's interpreter takes seconds for a launch of a large
    problem: where ``interpreted`` is False, ``"triton"`` is there on a GPU only, and has smaller problems in tests of
    its own.
    """
    params = []
    for name, backend in ALL_BACKENDS.items():
        if not torch.cuda.is_available() and (name == "cuda" or (name == "triton" and not interpreted)):
            continue
        if backend.ops is None or op in backend.ops:
            reason = ops.backends(device_of(name))[op][name]
            params.append(pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=f"{name}: {reason}")))
    return params


def gpu_backends_of(op: str) -> list:
    """Those of :func:`backends_of` that are for GPUs, in tests that are for GPUs alone."""
    return [param for param in backends_of(op) if param.values[0] in ON_GPU]


BACKENDS = backends_of("linear")  # for the CPU
KERNELS = [param for param in BACKENDS if param.values[0] not in ("reference", "cpu")]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def dtypes_of(op: str, backend: str) -> list[torch.dtype]:
    """What ``backend`` computes ``op`` in, but for fp64."""
    return list(ALL_BACKENDS[backend].fewer_dtypes.get(op, DTYPES))


def to_device(value: object, device: torch.device) -> object:
    """Tensors go to ``device``, strides and all; everything else stays."""
    if not isinstance(value, Tensor) or value.device == device:
        return value
    if 0 in value.stride():  # expanded: the copy is not, and could not be written to if it were
        return value.to(device)
    moved = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
    return moved.copy_(value)


def assert_close(actual: Tensor, want: Tensor) -> None:
    """For single results of about 1, in the place of an error budget."""
    tolerance = {torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}[actual.dtype]
    torch.testing.assert_close(actual.double(), want.double(), rtol=0, atol=tolerance)


def assert_within_budget(actual: Tensor, oracle: Tensor, plain: Tensor, what: str = "", *, roundings: int = 2) -> None:
    """``actual`` may be twice as far from the fp64 oracle as plain PyTorch in the same dtype, and some roundings more.

    Where few numbers are compared plain PyTorch can be near the oracle by luck; ``roundings`` makes up for it.
    """
    assert oracle.dtype == torch.float64
    assert actual.shape == oracle.shape
    assert torch.isfinite(actual).all(), f"{what}: {actual.isfinite().logical_not().sum()} values are not finite"
    error = (actual.double() - oracle).abs().max().item()
    allowed = 2 * (plain.double() - oracle).abs().max().item()
    allowed += roundings * torch.finfo(plain.dtype).eps * oracle.abs().max().item()
    assert error <= allowed, f"{what}: error {error:.3e}, budget {allowed:.3e}"


def pack_mask(sees: Tensor) -> Tensor:
    """bool ``[B, T, T]`` as mask words ``[B, T, ceil(T/64)]``."""
    B, T, _ = sees.shape
    words = torch.zeros(B, T, (T + 63) // 64, dtype=torch.int64)
    for j in range(T):
        words[:, :, j // 64] |= sees[:, :, j].long() << (j % 64)
    return words


def random_trees(B: int, T: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random trees of T nodes: parents ``[B, T]`` (-1: the prefix) and ancestors (itself too) bool ``[B, T, T]``."""
    parents = torch.stack([(torch.rand(B, generator=generator) * (j + 1)).long() - 1 for j in range(T)], dim=1)
    sees = torch.zeros(B, T, T, dtype=torch.bool)
    for b in range(B):
        for j in range(T):
            parent = int(parents[b, j])
            if parent >= 0:
                sees[b, j] = sees[b, parent]
            sees[b, j, j] = True
    return parents, sees


def poison_(cache: Tensor, prefix_lens: Tensor, used_nodes: Tensor) -> None:
    """NaN in every slot of ``[B, H, S, D]`` that is neither prefix nor one of the nodes in bool ``[B, T]``."""
    for b, length in enumerate(prefix_lens.tolist()):
        live = torch.zeros(cache.shape[2], dtype=torch.bool)
        live[:length] = True
        live[length : length + used_nodes.shape[1]] = used_nodes[b]
        cache[b, :, ~live] = torch.nan
