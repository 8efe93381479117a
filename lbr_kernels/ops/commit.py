"""commit_: prune the tree and shift the survivors, in place, for all layers at once.

Contract
--------
Row b's slot ``prefix_lens[b] + i`` receives slot ``prefix_lens[b] + sources[b, i]``; then ``prefix_lens[b]`` grows by
``advance``. Sources ascend strictly, so every slot moves down or stays, and a copy that walks upwards needs no staging.
A row with no moves stays as it is, length included. The cost does not depend on the prefix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lbr_kernels.ops import _registry
from lbr_kernels.ops._checks import Axis, Checker


def commit_(
    caches: Sequence[Tensor],
    prefix_lens: Tensor,
    sources: Tensor,
    *,
    advance: int | Tensor = 1,
    num_moves: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Keep the chosen nodes and move them to the front of the tree (paper, section 3, stages 3 and 4).

    For Local Branch Routing the sources are the winner and its descendants in level order, and ``advance`` is 1. The
    accepted path of any other tree decoder is such a list too, with ``advance`` its length.

    Args:
        caches: key and value tensors ``[B, H, S, D]`` of any dtype, written in place; H, S and D may differ. None
            may share memory with another, or require a gradient.
        prefix_lens: int32 ``[B]``, written in place.
        sources: int32 ``[B, M]``, node indices, strictly ascending in each row.
        advance: by how much a row's prefix grows, at most its number of moves: a number, or int32 ``[B]``.
        num_moves: int32 ``[B]``, how many of a row's sources count; all M by default.
        backend: see ``ops.backends()``.

    Raises:
        RuntimeError: a shape, dtype, device, stride or value is not as above, or a source lies outside a buffer.
            Nothing is written then.
    """
    per_row = isinstance(advance, Tensor)
    check = Checker("commit_")
    for index, cache in enumerate(caches if torch.is_grad_enabled() else ()):
        check(not cache.requires_grad, f"caches[{index}] requires a gradient, expected buffers without one")
    _registry.call(
        "commit_", backend, prefix_lens, list(caches), prefix_lens, sources,
        num_moves=num_moves, advance=0 if per_row else advance, row_advance=advance if per_row else None,
    )  # fmt: skip
    if not torch.compiler.is_compiling():
        # So that a backward pass which has kept a cache finds out that it was overwritten.
        torch.autograd.graph.increment_version([t for t in (*caches, prefix_lens) if not t.is_inference()])


@_registry.reference("commit_", mutates=("caches", "prefix_lens"), fake=lambda *args, **kwargs: None)
def commit_ref_(
    caches: Sequence[Tensor],
    prefix_lens: Tensor,
    sources: Tensor,
    *,
    num_moves: Tensor | None = None,
    advance: int = 1,
    row_advance: Tensor | None = None,
) -> None:
    """The specification, in plain PyTorch."""
    check_arguments(caches, prefix_lens, sources, num_moves=num_moves, advance=advance, row_advance=row_advance)
    check = Checker("commit_")
    (B,), M = prefix_lens.shape, sources.shape[1]
    slots = min((cache.shape[2] for cache in caches), default=None)
    lens = prefix_lens.tolist()
    moves = [M] * B if num_moves is None else num_moves.tolist()
    steps = [advance] * B if row_advance is None else row_advance.tolist()
    for b in range(B):
        check(0 <= moves[b] <= M, f"num_moves[{b}] is {moves[b]}, expected 0 <= count <= M = {M}")
        if moves[b] == 0:
            continue
        check(
            0 <= steps[b] <= moves[b],
            f"advance for row {b} is {steps[b]}, expected 0 <= advance <= its moves = {moves[b]}",
        )
        check(lens[b] >= 0, f"prefix_lens[{b}] is {lens[b]}, expected >= 0")
        least = 0
        for i, source in enumerate(sources[b, : moves[b]].tolist()):
            check(source >= least, f"sources[{b}, {i}] is {source}, expected ascending sources, here >= {least}")
            check(
                slots is None or lens[b] + source < slots,
                f"sources[{b}, {i}] is {source}, expected prefix_lens + source < S = {slots} "
                f"with prefix_lens = {lens[b]}",
            )
            least = source + 1

    for b in range(B):
        if moves[b] == 0:
            continue
        for cache in caches:
            tree = cache[b, :, lens[b] :]
            tree[:, : moves[b]] = tree[:, sources[b, : moves[b]].long()].clone()
        prefix_lens[b] += steps[b]


def check_arguments(
    caches: Sequence[Tensor],
    prefix_lens: Tensor,
    sources: Tensor,
    *,
    num_moves: Tensor | None = None,
    advance: int = 1,
    row_advance: Tensor | None = None,
) -> None:
    """All that is refused but for values of tensors; in C++ that is csrc/commit.h."""
    check = Checker("commit_")
    device = prefix_lens.device
    check.shape("prefix_lens", prefix_lens, (Axis("B"),))
    check.dtype("prefix_lens", prefix_lens, torch.int32)
    check.last_contiguous("prefix_lens", prefix_lens)
    (B,) = prefix_lens.shape
    check.side_input("sources", sources, torch.int32, (Axis("B", B), Axis("M")), device)
    check.side_input("num_moves", num_moves, torch.int32, (Axis("B", B),), device)
    check.side_input("advance", row_advance, torch.int32, (Axis("B", B),), device)
    for index, cache in enumerate(caches):
        name = f"caches[{index}]"
        check.device(name, cache, device)
        check.shape(name, cache, (Axis("B", B), Axis("H"), Axis("S"), Axis("D")))
        check.last_contiguous(name, cache)
        spread = all(size <= 1 or step != 0 for size, step in zip(cache.shape, cache.stride(), strict=True))
        check(spread, f"{name} is expanded, expected memory of its own")
        for other in range(index if cache.numel() else 0):
            again = cache.data_ptr() == caches[other].data_ptr()
            check(not again, f"{name} is caches[{other}] again, expected each buffer once")
