"""sample_children and top_children: transformers' filtered distribution, exact frequencies, equal tokens everywhere."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from support import DTYPES, ON_GPU, backends_of, device_of, to_device
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lbr_kernels import ops

BACKENDS = backends_of("sample_children", interpreted=False)
KERNELS = [param for param in BACKENDS if param.values[0] not in ("reference", "cpu")]
SIMT = "cuda-simt"  # takes its time

FILTERS = {
    "none": {},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "all": {"temperature": 1.4, "top_k": 12, "top_p": 0.9, "min_p": 0.05},
}


def warped(logits: torch.Tensor, filters: dict) -> torch.Tensor:
    """Log-probabilities as transformers' warpers leave them, in fp64."""
    kinds = {
        "temperature": TemperatureLogitsWarper, "top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper,
        "min_p": MinPLogitsWarper,
    }  # fmt: skip
    chain = LogitsProcessorList([kind(filters[name]) for name, kind in kinds.items() if name in filters])
    return chain(torch.zeros(len(logits), 0), logits.double()).log_softmax(-1)


def on(backend: str, op, *args, **kwargs):
    """The op's results, back on the CPU, from tensors where the backend takes them. Bad values raise as on a CPU."""
    device = device_of(backend)
    moved = {name: to_device(value, device) for name, value in kwargs.items()}
    results = op(*(to_device(value, device) for value in args), **moved, backend=backend)
    ops.raise_if_flagged(device)
    return tuple(result.cpu() for result in results)


def sample(backend, *args, **kwargs):
    return on(backend, ops.sample_children, *args, **kwargs)


def top(backend, *args, **kwargs):
    return on(backend, ops.top_children, *args, **kwargs)


def every_token(logits, filters, backend):
    """The filtered log-probabilities, asked for one token after the other through a fine grid of uniforms."""
    grid = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    tokens, log_probs = sample(backend, logits, grid.expand(len(logits), -1).contiguous(), **filters)
    found = torch.full(logits.shape, -torch.inf, dtype=torch.float64)
    return found.scatter(1, tokens, log_probs.double())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FILTERS)
def test_distribution_is_transformers(backend, name):
    """Tokens that are left, and their log-probabilities, are what model.generate would sample from."""
    logits = torch.randn(8, 40) * 2
    logits[3, ::2] = -torch.inf
    want = warped(logits, FILTERS[name])
    found = every_token(logits, FILTERS[name], backend)
    seen = found > -torch.inf
    assert (want[seen] > -torch.inf).all(), "a token was drawn that transformers filters out"
    torch.testing.assert_close(found[seen], want[seen], rtol=0, atol=2e-6)
    # The grid meets every token of probability 1e-4 or more.
    assert seen[want > -9].all(), "a likely token was never drawn"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("filters", "left"),
    [
        ({"top_k": 2}, [1, 2, 3, 5]),  # all that equal the last of the k
        ({"top_p": 0.15}, [5]),
        ({"top_p": 0.3}, [3, 5]),  # the larger ids of equal logits
        ({"top_p": 0.55}, [2, 3, 5]),
        ({"top_k": 3, "top_p": 0.5}, [3, 5]),
        ({"top_p": 0.0}, [5]),
    ],
)
def test_ties_at_the_edges(backend, filters, left):
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0, 2.0]])
    found = every_token(logits, filters, backend)[0]
    assert (found > -torch.inf).nonzero()[:, 0].tolist() == left
    torch.testing.assert_close(found[left].exp().sum(), torch.tensor(1.0, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FILTERS)
def test_frequencies(backend, name):
    """Chi-square of independent draws against the filtered distribution; probability zero is never drawn."""
    draws = 20_000 if backend in ("reference", SIMT) else 200_000
    logits = torch.randn(1, 50)
    logits[0, 7] = -torch.inf
    uniforms = torch.rand(draws // 100, 100, dtype=torch.float64)
    index = torch.zeros(len(uniforms), dtype=torch.int64)
    tokens, _ = sample(backend, logits, uniforms, row_index=index, **FILTERS[name])
    probability = warped(logits, FILTERS[name])[0].exp().numpy()
    counts = tokens.flatten().bincount(minlength=50).numpy()
    assert (counts[probability == 0] == 0).all()
    left = probability > 0
    assert chisquare(counts[left], probability[left] * draws).pvalue > 1e-4


@pytest.mark.parametrize("backend", KERNELS)
@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_same_tokens_as_the_reference(backend, data):
    """Whatever the vocabulary, dtype and filters, a row each: token for token the reference's."""
    draw = data.draw
    R, K = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    V = draw(st.sampled_from([1, 2, 7, 15, 16, 17, 33, 100, 1023, 1025, 5000]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    logits = torch.randn(R, V + 3, generator=g)[:, :V] * draw(st.sampled_from([0.0, 0.5, 3.0, 30.0]))
    logits = logits.to(draw(st.sampled_from(DTYPES)))
    if V > 2:
        logits[torch.rand(R, V, generator=g) < draw(st.sampled_from([0.0, 0.5]))] = -torch.inf
        logits[:, V // 2] = 0
    per_row = st.lists(
        st.tuples(
            st.sampled_from([0.1, 1.0, 2.0]), st.sampled_from([0, 1, 3, 50, V, 10**6]),
            st.sampled_from([0.0, 0.2, 0.7, 0.95, 1.0]), st.sampled_from([0.0, 1e-9, 0.05, 1.0]),
        ), min_size=R, max_size=R,
    )  # fmt: skip
    table = torch.tensor(draw(per_row), dtype=torch.float64)
    filters = dict(zip(("temperature", "top_k", "top_p", "min_p"), table.unbind(1), strict=True))
    uniforms = torch.rand(R, K, dtype=torch.float64, generator=g)
    uniforms[0, 0] = draw(st.sampled_from([0.0, 1 - 2**-53, 0.5]))
    want = ops.sample_children(logits, uniforms, backend="reference", **filters)
    got = sample(backend, logits, uniforms, **filters)
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], rtol=1e-6, atol=1e-6)
    want = ops.top_children(logits, K, backend="reference", **filters)
    got = top(backend, logits, K, **filters)
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", [param for param in BACKENDS if param.values[0] in ("cpu", SIMT, *ON_GPU)])
def test_probability_zero_is_never_drawn(backend):
    draws = 20_000 if backend == SIMT else 10_000_000
    logits = torch.randn(1, 64)
    logits[0, ::2] = -torch.inf
    logits[0, 1::8] = -30  # its weight is zero, too
    uniforms = torch.rand(1, draws, dtype=torch.float64)
    uniforms[0, :2] = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    counts = sample(backend, logits, uniforms)[0].flatten().bincount(minlength=64)
    assert (counts[logits[0] < -29] == 0).all()
    assert (counts[logits[0] > -29] > 0).all()


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("filters", [{}, {"top_k": 50, "top_p": 0.95}, {"top_p": 0.95}, {"min_p": 0.05}])
def test_a_real_vocabulary(backend, filters, dtype):
    """V = 151936: the sizes at which candidates are gathered in rounds, and at which several blocks share a row."""
    logits = (torch.randn(2, 151_936) * 2.5).to(dtype)
    uniforms = torch.rand(2, 50, dtype=torch.float64)
    want = ops.sample_children(logits, uniforms, backend="reference", **filters)
    got = sample(backend, logits, uniforms, **filters)
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_row_index(backend):
    """Several children rows read one logits row; rows that nobody refers to may hold anything."""
    logits = torch.randn(4, 30)
    logits[2] = torch.nan
    index = torch.tensor([3, 0, 0, 1])
    uniforms = torch.rand(4, 6, dtype=torch.float64)
    tokens, log_probs = sample(backend, logits, uniforms, row_index=index, top_k=7)
    want = sample(backend, logits[index], uniforms, top_k=7)
    assert torch.equal(tokens, want[0])
    assert torch.equal(log_probs, want[1])
    best, _ = top(backend, logits, 3, row_index=index)
    assert torch.equal(best, logits[index].topk(3).indices)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_children(backend):
    """Index -1 asks for none: -1 and 0, and no row of logits is read for it, not even the first."""
    logits = torch.randn(3, 30)
    logits[0] = torch.nan
    index = torch.tensor([-1, 2, -1, 1])
    uniforms = torch.rand(4, 6, dtype=torch.float64)
    for draw in (
        lambda i, u: sample(backend, logits, u, row_index=i, top_k=7),
        lambda i, u: top(backend, logits, 3, row_index=i),
    ):
        tokens, log_probs = draw(index, uniforms)
        want = draw(index[index >= 0], uniforms[index >= 0])
        assert (tokens[index < 0] == -1).all()
        assert (log_probs[index < 0] == 0).all()
        assert torch.equal(tokens[index >= 0], want[0])
        assert torch.equal(log_probs[index >= 0], want[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_top_children(backend):
    """Distinct, most likely first, ties to the lowest id; missing ones are -1 with log-probability 0."""
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0, -torch.inf, 3.0], [5.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    tokens, log_probs = top(backend, logits, 5)
    assert tokens.tolist() == [[1, 2, 5, 3, 0], [0, 1, 2, 3, 4]]
    torch.testing.assert_close(log_probs[0], logits[0].log_softmax(0)[tokens[0]])
    tokens, log_probs = top(backend, logits, 4, min_p=0.05)
    assert tokens.tolist() == [[1, 2, 5, 3], [0, -1, -1, -1]]
    assert log_probs[1].tolist() == [0, 0, 0, 0]
    assert top(backend, logits[:, :2], 3)[0].tolist() == [[1, 0, -1], [0, 1, -1]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_uniforms(backend):
    """u = 0 is the first token with probability, u just below 1 the last; never one without."""
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]])
    uniforms = torch.tensor([[0.0, 1 - 2**-53]], dtype=torch.float64)
    assert sample(backend, logits, uniforms)[0].tolist() == [[1, 2]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend):
    """An empty index asks for no rows; it is not the same as none given."""
    logits, index = torch.randn(4, 9), torch.empty(0, dtype=torch.int64)
    tokens, log_probs = top(backend, logits, 2, row_index=index)
    assert tokens.shape == log_probs.shape == (0, 2)
    uniforms = torch.empty(0, 3, dtype=torch.float64)
    tokens, log_probs = sample(backend, logits, uniforms, row_index=index)
    assert tokens.shape == log_probs.shape == (0, 3)
