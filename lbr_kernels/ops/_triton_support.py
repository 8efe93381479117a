# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: ANN001, ANN202 -- a kernel's arguments are pointers and numbers; the launch says which
"""What the Triton kernels share: who of several programs comes last, launches, and counters that stay at zero.

Contract
--------
Import this file only where a Triton kernel is asked for: it needs ``triton``, which is an extra. Where
``TRITON_INTERPRET=1`` was set before Triton was imported, kernels run on CPU tensors, slowly, for tests.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lbr_kernels.ops import _flags
from lbr_kernels.ops._backends import OLDEST_GPU

_BLOCK = 1 << 16  # counters that are allocated at a time
_LINE = 32  # counters in 128 bytes, a line of the cache


@triton.jit
def arrive(counter, size):
    """Whether this program is the last of ``size`` to come here; the counter is then left as it was found, at zero.

    What any of them stored before, the last one may load, past its level-1 cache (``.cg``): that is not kept up to date
    with other multiprocessors' stores.
    """
    # The atomic is one thread's. The barrier puts all threads' accesses before it; release, at the scope of the device,
    # makes stores visible to whoever sees the count; acquire does so for the one who reads.
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == size - 1
    if last:
        tl.store(counter, 0)
    return last


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors, instead of its compiler."""
    return not isinstance(arrive, triton.JITFunction)


@dataclass(frozen=True)
class Launch:
    """A grid, the kernel's arguments by name, and the options that are not arguments."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    options: dict[str, Any]

    def run(self, device: torch.device) -> None:
        """Start it on the current stream of ``device``."""
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            self.kernel[(self.programs,)](**self.arguments, **self.options)


@dataclass
class _Piece:
    memory: Tensor
    used: int = 0


_pieces: dict[torch.device, list[_Piece]] = {}  # only the last is cut from; graphs may use the others still
_of_streams: dict[tuple[torch.device, int], Tensor] = {}
_lock = threading.Lock()


def counters(device: torch.device, count: int) -> Tensor:
    """int32 ``[count]`` at zero, for a launch on the device's current stream that leaves them at zero.

    A stream has counters of its own, so that nothing has to be cleared. A captured launch has some that nobody else
    ever gets, since its graph may run beside anything; where none are left, the graph clears its own in every replay.
    """
    with _lock:
        pieces = _pieces.setdefault(device, [])
        is_short = not pieces or pieces[-1].used + count > pieces[-1].memory.numel()
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return torch.zeros(count, dtype=torch.int32, device=device) if is_short else _cut(pieces[-1], count)
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        own = _of_streams.get((device, stream))
        if own is None or own.numel() < count:
            if is_short:
                pieces.append(_Piece(_flags.lasting_zeros(max(count, _BLOCK), device)))
            own = _of_streams[device, stream] = _cut(pieces[-1], count)
        return own[:count]


def _cut(piece: _Piece, count: int) -> Tensor:
    begin = piece.used
    piece.used += -(-count // _LINE) * _LINE
    return piece.memory[begin : begin + count]


def stride(tensor: Tensor, axis: int) -> int:
    """That of an axis of size 1 may be anything; 0 keeps it from asking for a kernel of its own."""
    return tensor.stride(axis) if tensor.shape[axis] > 1 else 0


@functools.cache
def multiprocessors_of(device: torch.device) -> int:
    """How many a GPU has; 1 for a CPU that interprets."""
    if device.type != "cuda":
        return 1
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


@functools.cache
def capability_of(device: torch.device) -> int:
    """That of a GPU, as in ``sm_90``; the oldest for a CPU that interprets."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else OLDEST_GPU
    return 10 * major + minor
