"""The machine's roof: what its memory and its multipliers can do at best, measured here and now.

Contract
--------
:class:`Meter` compiles ``roof.cpp`` for this processor and runs it with torch's number of threads. A kernel's roof time
is ``max(bytes / read rate, operations / peak rate)``; nothing that reads these bytes and does these operations can be
faster. Data that a cache holds can be read faster than memory, so what is measured against this roof is kept cold.
Machines that are shared change their speed from minute to minute, so every record has a roof of its own, measured in
turns with the sides and, like them, taken as a median.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

import torch

_READ_BYTES = 1 << 28
_LOOPS = 1_000_000


@dataclass(frozen=True)
class Roof:
    """Bytes per second of reading, floating-point operations per second in fp32 and in bf16 (summed in fp32)."""

    read_bytes: float
    float32: float
    bfloat16: float

    def seconds(self, bytes_read: float, operations: float, dtype: torch.dtype) -> float:
        """The least time for so many bytes and operations."""
        peak = self.bfloat16 if dtype == torch.bfloat16 else self.float32
        return max(bytes_read / self.read_bytes, operations / peak)

    def describe(self) -> dict[str, float]:
        """For a record."""
        return asdict(self)


class Meter:
    """Measures this machine; needs a C++ compiler."""

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as directory:
            library = Path(directory) / "roof.so"
            source = Path(__file__).with_name("roof.cpp")
            compiler = os.environ.get("CXX", "c++")
            flags = ["-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread"]
            subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)
            self._library = ctypes.CDLL(str(library))
        for name in ("read_rate", "float_rate", "bf16_rate"):
            getattr(self._library, name).restype = ctypes.c_double
        # Written once: memory that never was is one page of zeros, over and over, and a cache holds it.
        self._data = torch.ones(_READ_BYTES // 4)

    def read(self) -> Roof:
        """One reading; takes some tens of milliseconds."""
        time.sleep(0.03)  # torch's own threads wait for more work for some milliseconds, and would be in the way
        threads = torch.get_num_threads()
        address, count = ctypes.c_void_p(self._data.data_ptr()), ctypes.c_int64(self._data.numel())
        loops = ctypes.c_int64(_LOOPS)
        read = self._library.read_rate(address, count, threads)
        # Short, so that one of a few runs goes undisturbed.
        single = max(self._library.float_rate(loops, threads) for _ in range(4))
        pairs = max(self._library.bf16_rate(loops, threads) for _ in range(4))
        return Roof(read, single, pairs or single)


def median(readings: Sequence[Roof]) -> Roof:
    """The median of each rate."""
    return Roof(*(statistics.median(rates) for rates in zip(*map(astuple, readings), strict=True)))
