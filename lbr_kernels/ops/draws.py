"""Counter-based random numbers: every draw of a decoding call has its own place, so nothing depends on an order.

Contract
--------
A uniform is Philox4x32-10 (Salmon et al., 2011) of key = seed and counter = (slot, step, stream): the row's own
stream, the number of tokens the row had committed, and the slot of the full tree that is drawn for (one past the last
for the router's choice). A row's draws therefore do not depend on its neighbours, on the batch size, on how the tree
is stored, or on the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10 on int64 tensors that hold unsigned 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The product wraps around in int64; its 64 bits are right, and the shift's sign bits are masked away.
        a, b = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (b >> 32) & _MASK ^ c1 ^ k0, b & _MASK, (a >> 32) & _MASK ^ c3 ^ k1, a & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def keyed_uniforms(seed: int, streams: Tensor, steps: Tensor, slots: Tensor) -> Tensor:
    """Uniform numbers in [0, 1) with 53 random bits.

    Args:
        seed: the key, any 64-bit integer.
        streams: int64, a row's own number.
        steps: int64, how many tokens the row has committed.
        slots: int64, what is drawn for. The three are broadcast against each other.

    Returns:
        fp64 of the broadcast shape.
    """
    streams, steps, slots = torch.broadcast_tensors(streams, steps, slots)
    counter = (slots & _MASK, steps & _MASK, streams & _MASK, (streams >> 32) & _MASK)
    high, low, _, _ = philox(counter, (seed & _MASK, (seed >> 32) & _MASK))
    return ((high << 21) | (low >> 11)).double() * 2.0**-53
