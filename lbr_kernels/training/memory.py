"""What a forward over packed trees needs at least, said before it is too late and when it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel

from lbr_kernels.training.packing import PackedTrees

_GIB = 2**30


@contextmanager
def require_memory(inner: PreTrainedModel, packed: PackedTrees, *, rows: int) -> Iterator[None]:
    """Raise ``ValueError`` if the block would not fit, or did not: both say how many nodes take how much."""
    least, free = least_bytes(inner, len(packed)), free_bytes(inner.device)
    size = (
        f"{rows} rows are {len(packed)} nodes, whose hidden states between the layers alone take {least / _GIB:.3g} GiB"
    )
    advice = "split the trajectory (TreeTrajectory.split), or switch on gradient checkpointing"
    if free is not None and least > free:
        raise ValueError(
            f"trajectory_log_probs: {size}, of {free / _GIB:.3g} GiB that are free on {inner.device}; {advice}"
        )
    try:
        yield
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise ValueError(f"trajectory_log_probs: out of memory on {inner.device}: {size}; {advice}") from error


def out_of_memory(error: BaseException) -> bool:
    """Whether it says that a device, or the host, had no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def least_bytes(inner: PreTrainedModel, nodes: int) -> int:
    """One hidden state per node: for every layer where gradients are wanted, else twice."""
    config = inner.config.get_text_config(decoder=True)
    layers = config.num_hidden_layers if torch.is_grad_enabled() else 2
    return int(nodes * layers * config.hidden_size * inner.dtype.itemsize)


def free_bytes(device: torch.device) -> int | None:
    """Memory that can be had on a device; None where nobody says."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    if device.type == "cpu" and (file := Path("/proc/meminfo")).exists():
        for line in file.read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None
