"""route: the kernels and the reference against the router module, for every variant, with missing nodes."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import chisquare
from support import DTYPES, assert_within_budget, backends_of, device_of, to_device

from lbr_kernels import Router, RouterConfig, ops
from lbr_kernels.ops.tree_shape import num_slots

BACKENDS = backends_of("route", interpreted=False)
# (2, 4) is the smallest tree in which a path that ends early could be counted twice beside others.
SHAPES = [(1, 1), (2, 1), (3, 1), (16, 1), (1, 3), (3, 2), (4, 2), (2, 3), (2, 4)]
VARIANTS = [
    {}, {"score_head": "mlp"}, {"independent": True}, {"input_norm": True},
    {"score_head": "mlp", "independent": True, "input_norm": True},
]  # fmt: skip


def random_router(depth: int, hidden_size: int = 48, dim: int = 32, **config) -> Router:
    router = Router(RouterConfig(hidden_size, depth, dim=dim, **config)).eval()
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return router


def random_valid(B: int, width: int, depth: int) -> torch.Tensor:
    """Trees with early ends and missing children: prefix-closed, siblings filled from the first on."""
    valid = torch.zeros(B, num_slots(width, depth), dtype=torch.bool)
    for b in range(B):
        valid[b, : torch.randint(1, width + 1, ()) if b else width] = True
        for parent in range(num_slots(width, depth - 1)):
            if valid[b, parent]:
                first = width + width * parent
                valid[b, first : first + int(torch.randint(0, width + 1, ()))] = True
    return valid


def route(hidden, router, *, backend, **arguments):
    """ops.route on the backend's device; what it gives comes back."""
    device = device_of(backend)
    weights = router.packed()
    weights = weights._replace(data=weights.data.to(device))
    arguments = {name: to_device(value, device) for name, value in arguments.items()}
    log_probs, choice = ops.route(to_device(hidden, device), weights, backend=backend, **arguments)
    ops.raise_if_flagged(device)
    return log_probs.cpu(), choice.cpu()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("width", "depth"), SHAPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_module(backend, width, depth, variant):
    """Log-probabilities of the trained module, whatever nodes are missing; those may hold NaN."""
    router = random_router(depth, **variant)
    hidden = torch.randn(6, num_slots(width, depth), 48)
    valid = random_valid(6, width, depth)
    with torch.no_grad():
        want = router(hidden, width, valid=valid, temperature=0.7)
        oracle = router.double()(hidden.double(), width, valid=valid, temperature=0.7)
    router.float()
    hidden[~valid] = torch.nan
    log_probs, choice = route(hidden, router, width=width, depth=depth, temperature=0.7, valid=valid, backend=backend)
    exists = valid[:, :width]
    assert (log_probs[~exists] == -torch.inf).all()
    assert_within_budget(log_probs[exists], oracle[exists], want[exists], roundings=32)
    assert torch.equal(choice, want.argmax(-1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_paper_size(backend, dtype):
    """The paper's router (p = 128, 4 heads) on hidden states of 1536, in every dtype."""
    for depth in (1, 2):
        router = random_router(depth, 1536, 128)
        for parameter in router.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        hidden = torch.randn(3, num_slots(3, depth), 1536).to(dtype)
        with torch.no_grad():
            want = router(hidden, 3)
            oracle = router.double()(hidden.double(), 3)
        router.float()
        log_probs, _ = route(hidden, router, width=3, depth=depth, backend=backend)
        assert_within_budget(log_probs, oracle, want, roundings=32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_choice_is_drawn(backend):
    """The draw follows the probabilities; candidates that do not exist are never chosen."""
    router = random_router(1)
    rows = 1000
    hidden = torch.randn(1, 4, 48).expand(rows, -1, -1)
    valid = torch.tensor([True, False, True, True]).repeat(rows, 1)
    uniforms = (torch.arange(rows, dtype=torch.float64) + torch.rand(rows, dtype=torch.float64)) / rows
    log_probs, choice = route(hidden, router, width=4, depth=1, valid=valid, uniforms=uniforms, backend=backend)
    counts = choice.bincount(minlength=4).double()
    assert counts[1] == 0
    left = [0, 2, 3]
    probability = log_probs[0].double().softmax(0)[left]
    assert chisquare(counts[left].numpy(), (probability * rows).numpy()).pvalue > 0.01
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    _, choice = route(hidden[:2], router, width=4, depth=1, valid=valid[:2], uniforms=ends, backend=backend)
    assert choice.tolist() == [0, 3]


@pytest.mark.parametrize("backend", BACKENDS)
def test_rounding_never_chooses_what_is_not_there(backend):
    """With a uniform number just below 1 and the last candidate missing, rounding may leave a rest; it goes to the last
    candidate that exists."""
    router = random_router(1)
    hidden = torch.randn(500, 4, 48)
    valid = torch.tensor([True, True, True, False]).repeat(500, 1)
    uniforms = torch.full((500,), 1 - 2**-53, dtype=torch.float64)
    _, choice = route(hidden, router, width=4, depth=1, valid=valid, uniforms=uniforms, backend=backend)
    assert (choice == 2).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_inactive_rows(backend):
    """A row that is not active is not read: choice -1, uniform log-probabilities, and no check of its nodes."""
    router = random_router(2)
    hidden = torch.randn(3, 12, 48)
    hidden[1] = torch.nan
    valid = torch.ones(3, 12, dtype=torch.bool)
    valid[1] = False
    log_probs, choice = route(
        hidden, router, width=3, depth=2, valid=valid, active=torch.tensor([True, False, True]),
        backend=backend,
    )  # fmt: skip
    assert choice[1] == -1
    assert (choice[[0, 2]] >= 0).all()
    torch.testing.assert_close(log_probs[1].exp(), torch.full((3,), 1 / 3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_untrained_router_is_uniform(backend):
    router = Router(RouterConfig(20, 2, dim=16))
    log_probs, choice = route(torch.randn(2, 12, 20), router, width=3, depth=2, backend=backend)
    torch.testing.assert_close(log_probs.exp(), torch.full((2, 3), 1 / 3))
    assert choice.tolist() == [0, 0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_hidden(backend):
    router = random_router(1)
    hidden = torch.randn(4, 3, 48)
    want = route(hidden, router, width=3, depth=1, backend=backend)
    view = torch.full((8, 6, 60), torch.nan)[::2, 1:4, 5:53]
    view.copy_(hidden)
    got = route(view, router, width=3, depth=1, backend=backend)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [1e-9, 1e-40, 1e-300])
def test_small_temperatures_make_the_best_certain(backend, temperature):
    router = random_router(2, 20, 16)
    hidden = torch.randn(4, 12, 20, generator=torch.Generator().manual_seed(0))
    _, best = route(hidden, router, width=3, depth=2, backend=backend)
    for uniform in (0.0, 0.5, 1 - 2**-53):
        uniforms = torch.full((4,), uniform, dtype=torch.float64)
        log_probs, choice = route(
            hidden, router, width=3, depth=2, temperature=temperature, uniforms=uniforms, backend=backend
        )
        assert torch.equal(choice, best)
        assert (log_probs.gather(1, best[:, None]).abs() < 1e-6).all()
        assert not log_probs.isnan().any()
