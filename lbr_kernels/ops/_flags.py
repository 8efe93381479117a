"""Bad values that kernels have met on a GPU.

Contract
--------
Lengths and counts lie in a GPU's memory, where no check can look at them without waiting for the device. A kernel that
meets one which cannot be reads and writes nothing out of bounds, gives that row a result which cannot be taken for one
(NaN, or -1), and sets a bit of its device's word. :func:`raise_if_flagged` waits for the device, reads the word, clears
it and raises.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import _disable_current_modes

# The bits of csrc/cuda/flags.h.
_MEANINGS = {
    1: "tree_attention: a row's prefix_lens was not in 0 <= length <= S - T; its results are NaN",
    2: "tree_attention: a row's num_nodes was not in 0 <= count <= N; its results are NaN",
    4: "commit_: a row's sources did not ascend inside the caches, or its num_moves, advance or prefix_lens was out of "
    "range; it stayed as it was",
    8: "sample_children: a row of logits held NaN or +inf, or was -inf everywhere; its tokens are -1",
    16: "sample_children: a row's uniforms, filters or row_index were out of range; its tokens are -1",
    32: "route: a row had a score that is not finite; its choice is -1",
    64: "route: a row's valid named no tree with a candidate, or its uniform was out of range; its choice is -1",
    128: "packed_tree_attention: a row's subtree_end or the cu_seqlens were out of range; its results are NaN",
}

_words: dict[torch.device, Tensor] = {}


def word(device: torch.device) -> Tensor:
    """The word of ``device``, an int32 tensor of one element, made when it is first asked for.

    Raises:
        RuntimeError: that is inside a graph capture, where nothing can be made to last.
    """
    if device not in _words:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"the first call of a kernel on {device} is captured, expected one call before the capture"
            )
        _words[device] = lasting_zeros(1, device)
    return _words[device]


def lasting_zeros(count: int, device: torch.device) -> Tensor:
    """int32 ``[count]`` that all later calls may use: a plain tensor, whatever modes the first one is in."""
    with torch.inference_mode(False), unset_fake_temporarily(), _disable_current_modes():
        zeros = torch.zeros(count, dtype=torch.int32, device=device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # they are zero for the kernels of all streams
    return zeros


def with_index(device: torch.device) -> torch.device:
    """``cuda`` alone stands for the current device."""
    bare = torch.device("cuda")
    return torch.device("cuda", torch.cuda.current_device()) if device == bare and torch.cuda.is_available() else device


def raise_if_flagged(device: torch.device | str) -> None:
    """Wait for ``device`` and say whether a kernel has met a bad value on it since the last call.

    The CPU's kernels check values in every call: there this has something to say only after kernels for GPUs have run
    on the CPU, in tests.

    Raises:
        RuntimeError: it has; says what became of the rows concerned.
    """
    device = with_index(torch.device(device))
    if device not in _words:
        return
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    bits = int(_words[device].item())
    if bits:
        _words[device].zero_()
        raise RuntimeError(in_words(bits))


def in_words(bits: int) -> str:
    """What the bits of a word say."""
    return "; ".join(text for bit, text in _MEANINGS.items() if bits & bit)
