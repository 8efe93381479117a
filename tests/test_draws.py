"""Counter-based uniforms: the published Philox, and one place for every draw."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import kstest

from lbr_kernels.decoding.sampling import Draws
from lbr_kernels.ops import keyed_uniforms
from lbr_kernels.ops.draws import philox

# Known answers of the Random123 distribution: counter, key, result.
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "want"), VECTORS)
def test_philox_known_answers(counter, key, want):
    words = philox(tuple(torch.tensor(word) for word in counter), key)
    assert tuple(int(word) for word in words) == want


def test_uniform_and_in_range():
    u = keyed_uniforms(-5, torch.arange(50)[:, None, None], torch.arange(40)[:, None], torch.arange(20)).flatten()
    assert (u >= 0).all()
    assert (u < 1).all()
    assert u.unique().numel() == u.numel()
    assert kstest(u.numpy(), "uniform").pvalue > 1e-3


def test_every_coordinate_counts():
    """Seed (both halves), stream (both halves), step and slot all change the number."""
    base = {"seed": 1, "streams": torch.tensor(2), "steps": torch.tensor(3), "slots": torch.tensor(4)}
    changes = [
        {"seed": 2}, {"seed": 1 + (1 << 32)}, {"seed": -1}, {"streams": torch.tensor(5)},
        {"streams": torch.tensor(2 + (1 << 32))}, {"steps": torch.tensor(4)}, {"slots": torch.tensor(3)},
    ]  # fmt: skip
    values = {float(keyed_uniforms(**{**base, **change})) for change in [{}, *changes]}
    assert len(values) == len(changes) + 1


def test_blocks_of_steps_are_one_sequence():
    """What the decoding loop reads, step by step and across blocks, is keyed_uniforms."""
    streams = torch.tensor([7, 0, 2**40])
    draws = Draws(11, streams, 12)
    for step in (0, 1, 63, 64, 65, 200, 3):
        want = keyed_uniforms(11, streams[:, None], torch.tensor(step), torch.arange(13))
        assert torch.equal(draws.at(step), want)
