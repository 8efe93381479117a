"""What figures depend on: processor, threads, versions. It says what a machine is, not whose."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch
import transformers

import lbr_kernels


def processor() -> str:
    """The processor's name as the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """For a record of measurements."""
    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "lbr_kernels": lbr_kernels.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
    }
