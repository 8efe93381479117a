"""The machine's roof: what its memory and its multipliers can do at best, measured here and now.

Contract
--------
:class:`Meter` compiles ``roof.cpp`` for this processor and runs it with torch's number of threads. A kernel's roof time
is ``max(bytes / read rate, operations / peak rate)``; nothing that reads these bytes and does these operations can be
faster. Data that a cache holds can be read faster than memory, so what is measured against this roof is kept cold.
Machines that are shared change their speed from minute to minute, so every record has a roof of its own.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

_REPEATS = 9
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
        self._data = torch.zeros(_READ_BYTES // 4)

    def measure(self) -> Roof:
        """The best of some runs of each; takes a fraction of a second."""
        threads = torch.get_num_threads()
        address, count = ctypes.c_void_p(self._data.data_ptr()), ctypes.c_int64(self._data.numel())
        loops = ctypes.c_int64(_LOOPS)
        read = max(self._library.read_rate(address, count, threads) for _ in range(_REPEATS))
        single = max(self._library.float_rate(loops, threads) for _ in range(_REPEATS))
        pairs = max(self._library.bf16_rate(loops, threads) for _ in range(_REPEATS))
        return Roof(read, single, pairs or single)
