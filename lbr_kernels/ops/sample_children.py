"""sample_children and top_children: K tokens for a node, from its logits.

Contract
--------
The distribution is the one ``model.generate`` samples from: logits / temperature, then top-k, top-p and min-p, each on
what the one before has left. Children are independent draws with replacement; tokens of probability zero are never
drawn. Sampling is exact arithmetic, so that every backend draws the same tokens from the same logits and uniforms:

* ``weight(i) = round(2**40 * exp(x_i))`` with ``x_i = (logit_i - max) / temperature`` in fp64, where exp is
  ``exp_fp64`` below, operation for operation;
* filters compare logits and sums of weights; sums are integers, whose order does not matter;
* child k is the first token whose running sum of weights, in token order, exceeds ``floor(uniform * total)``.

Of equal logits at the edge of the nucleus (top-p) the larger ids are kept; transformers leaves their order open.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lbr_kernels.ops import _registry
from lbr_kernels.ops._checks import Axis, Checker, has_values, number

WEIGHT_BITS = 40
MAX_VOCABULARY = 2**22  # sums of weights stay below 2**62


def sample_children(
    logits: Tensor,
    uniforms: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    row_index: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """K independent draws per row from the filtered distribution (paper, section 3, stage 1).

    Args:
        logits: ``[R, V]``, fp32, fp16 or bf16, finite or -inf; last axis contiguous.
        uniforms: fp64 ``[R, K]`` in [0, 1); ``keyed_uniforms`` makes them.
        temperature: > 0. This and the other filters are numbers, or tensors ``[R]`` with one value per row.
        top_k: keep the k largest logits and whatever equals the last of them; 0 is off.
        top_p: keep the smallest set of most likely tokens whose probability reaches it; 1 is off.
        min_p: keep tokens at least ``min_p`` times as likely as the most likely one; 0 is off.
        row_index: int64 ``[rows]``: row r of ``uniforms`` (and of the results) draws from ``logits[row_index[r]]``.
            -1 stands for no children: tokens -1, log-probabilities 0. Rows of logits that nothing refers to are not
            read.
        backend: see ``ops.backends()``.

    Returns:
        Tokens int64 ``[R, K]`` and their fp32 log-probabilities ``[R, K]`` under the filtered distribution.

    Raises:
        RuntimeError: a shape, dtype, device, stride or value is not as above; NaN or +inf in a row; a row that is
            -inf everywhere.
    """
    filters, row_filters = _pack_filters("sample_children", temperature, top_k, top_p, min_p, logits)
    result: tuple[Tensor, Tensor] = _registry.call(
        "sample_children", backend, logits, logits, uniforms, *filters, row_filters=row_filters, row_index=row_index
    )
    return result


def top_children(
    logits: Tensor,
    width: int,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    row_index: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The up to ``width`` most likely distinct tokens that the filters leave, ties to the lowest id.

    The deterministic twin of :func:`sample_children`, with the same arguments otherwise. Where fewer tokens are left,
    the rest are -1 with log-probability 0.
    """
    filters, row_filters = _pack_filters("top_children", temperature, top_k, top_p, min_p, logits)
    result: tuple[Tensor, Tensor] = _registry.call(
        "top_children", backend, logits, logits, width, *filters, row_filters=row_filters, row_index=row_index
    )
    return result


def _pack_filters(
    op: str,
    temperature: float | Tensor,
    top_k: int | Tensor,
    top_p: float | Tensor,
    min_p: float | Tensor,
    logits: Tensor,
) -> tuple[tuple[float, int, float, float], Tensor | None]:
    """Four numbers, or if any filter differs by row a ``[R, 4]`` table of them in fp64."""
    values = (temperature, top_k, top_p, min_p)
    if not any(isinstance(value, Tensor) for value in values):
        return values, None  # type: ignore[return-value]
    check = Checker(op)
    for name, value in zip(("temperature", "top_k", "top_p", "min_p"), values, strict=True):
        if isinstance(value, Tensor) and value.dim() > 0:
            check.shape(name, value, (Axis("R", logits.shape[0]),))
    columns = [
        torch.as_tensor(value, dtype=torch.float64, device=logits.device).expand(logits.shape[0]) for value in values
    ]
    return (1.0, 0, 1.0, 0.0), torch.stack(columns, dim=1)


@_registry.reference("sample_children")
def sample_children_ref(
    logits: Tensor,
    uniforms: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    *,
    row_filters: Tensor | None = None,
    row_index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The specification, in plain PyTorch, by sorting."""
    check_sampling_arguments(
        logits, uniforms, temperature, top_k, top_p, min_p, row_filters=row_filters, row_index=row_index
    )
    check = Checker("sample_children")
    filters = _check_values(check, logits, (temperature, top_k, top_p, min_p), row_filters, row_index)
    check.in_range("uniforms", uniforms, 0, math.nextafter(1, 0), "0 <= u < 1")
    logits, filters, reads = _select_rows(check, logits, filters, row_index)
    exponents, weights = _filtered_weights(logits, filters)
    total = weights.sum(-1, keepdim=True)
    target = torch.minimum((uniforms * total.double()).long(), total - 1)
    tokens = torch.searchsorted(weights.cumsum(-1), target, right=True)
    log_probs = _log_probs(exponents, total, tokens)
    return torch.where(reads, tokens, -1), torch.where(reads, log_probs, 0)


@_registry.reference("top_children")
def top_children_ref(
    logits: Tensor,
    width: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    *,
    row_filters: Tensor | None = None,
    row_index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The specification, in plain PyTorch, by sorting."""
    check_top_arguments(logits, width, temperature, top_k, top_p, min_p, row_filters=row_filters, row_index=row_index)
    check = Checker("top_children")
    filters = _check_values(check, logits, (temperature, top_k, top_p, min_p), row_filters, row_index)
    logits, filters, reads = _select_rows(check, logits, filters, row_index)
    exponents, weights = _filtered_weights(logits, filters)
    total = weights.sum(-1, keepdim=True)
    order = torch.where(weights > 0, logits, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    tokens = torch.nn.functional.pad(order[:, :width], (0, max(0, width - logits.shape[1])))
    left = (torch.arange(width, device=logits.device) < (weights > 0).sum(-1, keepdim=True)) & reads
    log_probs = _log_probs(exponents, total, tokens)
    return torch.where(left, tokens, -1), torch.where(left, log_probs, 0)


def check_sampling_arguments(
    logits: Tensor,
    uniforms: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    *,
    row_filters: Tensor | None = None,
    row_index: Tensor | None = None,
) -> None:
    """All that sample_children refuses but for values of tensors; in C++ that is csrc/sample_children.h."""
    check = Checker("sample_children")
    rows = _check_rows(check, logits, row_index)
    check.side_input("uniforms", uniforms, torch.float64, (Axis("rows", rows), Axis("K")), logits.device)
    _check_settings(check, logits, uniforms.shape[1], (temperature, top_k, top_p, min_p), row_filters)


def check_top_arguments(
    logits: Tensor,
    width: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    *,
    row_filters: Tensor | None = None,
    row_index: Tensor | None = None,
) -> None:
    """The same for top_children."""
    check = Checker("top_children")
    _check_rows(check, logits, row_index)
    _check_settings(check, logits, width, (temperature, top_k, top_p, min_p), row_filters)


def _check_rows(check: Checker, logits: Tensor, row_index: Tensor | None) -> int:
    check.shape("logits", logits, (Axis("R"), Axis("V")))
    check.floating("logits", logits)
    check.last_contiguous("logits", logits)
    R, V = logits.shape
    check(1 <= V <= MAX_VOCABULARY, f"logits has a vocabulary of {V}, expected 1 <= V <= {MAX_VOCABULARY}")
    check.side_input("row_index", row_index, torch.int64, (Axis("rows"),), logits.device)
    return R if row_index is None else row_index.shape[0]


def _check_settings(
    check: Checker, logits: Tensor, width: int, filters: tuple[float, ...], row_filters: Tensor | None
) -> None:
    check(width >= 1, f"width is {width}, expected an integer >= 1")
    _check_filters(check, "", filters)
    check.side_input(
        "row_filters", row_filters, torch.float64, (Axis("R", logits.shape[0]), Axis("4", 4)), logits.device
    )
    dense = row_filters is None or row_filters.is_contiguous()
    check(dense, "row_filters is not contiguous, expected a dense tensor")


def _check_filters(check: Checker, where: str, filters: Sequence[float]) -> None:
    temperature, top_k, top_p, min_p = filters
    ok = 0 < temperature < math.inf
    check(ok, f"temperature{where} is {number(float(temperature))}, expected a finite number > 0")
    whole = 0 <= top_k <= 2**53 and top_k == int(top_k)
    check(whole, f"top_k{where} is {number(top_k)}, expected an integer >= 0")
    check(0 <= top_p <= 1, f"top_p{where} is {number(float(top_p))}, expected 0 <= top_p <= 1")
    check(0 <= min_p <= 1, f"min_p{where} is {number(float(min_p))}, expected 0 <= min_p <= 1")


def _check_values(
    check: Checker,
    logits: Tensor,
    filters: tuple[float, int, float, float],
    row_filters: Tensor | None,
    row_index: Tensor | None,
) -> Tensor:
    """The filters as fp64 ``[R, 4]``, once they and the index are known to be good."""
    R = logits.shape[0]
    if row_filters is None:
        row_filters = torch.tensor([filters], dtype=torch.float64, device=logits.device).expand(R, 4)
    elif has_values(row_filters):
        for row, values in enumerate(row_filters.tolist()):
            _check_filters(check, f"[{row}]", values)
    check.in_range("row_index", row_index, -1, R - 1, f"-1 <= index < R = {R}")
    return row_filters


def _select_rows(
    check: Checker, logits: Tensor, filters: Tensor, row_index: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of logits that are drawn from, as fp64, their values checked; and bool ``[rows, 1]``, which are.

    In the others zeros stand for logits, and whatever filters there are.
    """
    names = torch.arange(len(logits), device=logits.device) if row_index is None else row_index
    reads = names[:, None] >= 0
    if row_index is not None:
        index = row_index.clamp(min=0)
        logits, filters = torch.where(reads, logits[index], 0), filters[index]
    logits = logits.double()
    if has_values(logits):
        for bad, message in (
            (logits.isnan().any(-1), "holds NaN, expected finite numbers or -inf"),
            ((logits == torch.inf).any(-1), "holds +inf, expected finite numbers or -inf"),
            (
                (logits == -torch.inf).all(-1),
                "is -inf everywhere, expected at least one token that is not filtered out",
            ),
        ):
            if bad.any():
                check(False, f"logits row {int(names[bad].min())} {message}")
    return logits, filters, reads


def exp_fp64(x: Tensor) -> tuple[Tensor, Tensor]:
    """e**x for fp64 ``-64 <= x <= 0`` as ``(p, n)`` with e**x = p * 2**n: the arithmetic all backends share.

    Every line is one correctly rounded fp64 operation; fused multiply-adds are not allowed.
    """
    n = torch.round(x * 1.4426950408889634)
    r = x - n * float.fromhex("0x1.62e42feep-1")
    r = r - n * float.fromhex("0x1.a39ef35793c76p-33")
    p = torch.full_like(x, 1 / math.factorial(11))
    for k in range(10, -1, -1):
        p = p * r
        p = p + 1 / math.factorial(k)
    return p, n


def _filtered_weights(logits: Tensor, filters: Tensor) -> tuple[Tensor, Tensor]:
    """``x_i`` in fp64 and the integer weights after all filters, both ``[rows, V]``; zero is filtered out."""
    temperature, top_k, top_p, min_p = (column[:, None] for column in filters.unbind(-1))
    V = logits.shape[1]
    exponents = (logits - logits.max(-1, keepdim=True).values) / temperature
    p, n = exp_fp64(exponents.clamp(min=-64))
    # p * 2**(n + 40), exactly, and rounded to the nearest integer (ties to even).
    weights = torch.round(torch.ldexp(p, n + WEIGHT_BITS)).long()

    # Descending, of equal logits the larger id first.
    order = logits.flip(-1).sort(dim=-1, descending=True, stable=True).indices
    order = V - 1 - order
    ranked = logits.gather(-1, order)
    last = torch.where((top_k > 0) & (top_k < V), top_k, V).long() - 1
    weights = torch.where(logits < ranked.gather(-1, last), 0, weights)
    ranked_weights = weights.gather(-1, order)
    before = ranked_weights.cumsum(-1) - ranked_weights
    limit = top_p * ranked_weights.sum(-1, keepdim=True).double()
    keep = (before.double() < limit) | (top_p >= 1)
    keep[:, 0] = True
    weights = weights * torch.zeros_like(keep).scatter(-1, order, keep)
    return exponents, torch.where(weights.double() < min_p * 2.0**WEIGHT_BITS, 0, weights)


def _log_probs(exponents: Tensor, total: Tensor, tokens: Tensor) -> Tensor:
    log_total = total.double().log() - WEIGHT_BITS * math.log(2)
    return (exponents.gather(-1, tokens) - log_total).float()
