"""What the tests of the Triton kernels share: memory with guards around it, and the flags of a call."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lbr_kernels import ops
from lbr_kernels.ops import _flags

ROOT = Path(__file__).resolve().parent.parent
GUARD = 64  # elements before and after


class Guarded:
    """Copies of tensors inside larger buffers, whose rest must not change; NaN, or an absurd number, stands there."""

    def __init__(self) -> None:
        self._buffers: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, tensor: Tensor, *, device: torch.device) -> Tensor:
        buffer = torch.empty(tensor.numel() + 2 * GUARD, dtype=tensor.dtype)
        if tensor.dtype == torch.bool:
            buffer.fill_(True)
        else:
            buffer.fill_(torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)
        buffer = buffer.to(device)
        inside = buffer[GUARD : GUARD + tensor.numel()].view(tensor.shape)
        inside.copy_(tensor)
        self._buffers.append((buffer, buffer.clone(), inside))
        return inside

    def check(self, *, written: bool = False) -> None:
        """Nothing around the tensors was written to, nor in them unless they are ``written``."""
        for buffer, before, _ in self._buffers:
            now, was = (b.view(torch.uint8) if b.dtype == torch.bool else b for b in (buffer, before))
            same = (now == was) | ((now != now) & (was != was))
            if written:
                same[GUARD:-GUARD] = True
            assert same.all()


def flags_of(call: Callable[[], Any], device: torch.device) -> tuple[Any, int]:
    """What a call returns, and the bits that it set; they are cleared."""
    ops.raise_if_flagged(device)
    result = call()
    word = _flags.word(_flags.with_index(device))
    bits = int(word.item())
    word.zero_()
    return result, bits


def ahead_of_time(expression: str) -> Any:
    """What an expression of ``bench/triton_resources.py``, there called ``r``, is worth.

    For GPUs that need not be here; in a process of its own, in which nothing is interpreted.
    """
    code = f"import json, triton_resources as r\nprint(json.dumps({expression}))"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT / "bench", env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
