"""The model's linear layers during a forward of the tree: which are served, and that they are left as they were."""

from __future__ import annotations

import threading

import pytest
import torch
from models import tiny_llama
from torch import nn

from lbr_kernels import generate, ops
from lbr_kernels.decoding import linears
from lbr_kernels.decoding.linears import few_row_layers, few_row_linears

FAST = any(ops.backends("cpu")["linear"][name] is None for name in ("cpu-avx2", "cpu-avx512"))
pytestmark = pytest.mark.skipif(not FAST, reason="no instruction set here for which ops.linear is served")


@pytest.fixture
def calls(monkeypatch):
    """How many rows every call of ops.linear had."""
    seen = []

    def counted(x, weight, bias=None, **kwargs):
        seen.append(x.shape[:-1].numel())
        return ops.linear(x, weight, bias, **kwargs)

    fake = type("Ops", (), {"linear": staticmethod(counted), "backends": staticmethod(ops.backends)})
    monkeypatch.setattr(linears, "ops", fake)
    return seen


def untouched(model):
    return all("forward" not in module.__dict__ for module in model.modules())


def test_a_tree_is_served_and_the_prompt_is_not(calls):
    model, ids = tiny_llama(), torch.randint(1, 50, (2, 9))
    generate(model, ids, max_new_tokens=1, do_sample=False)  # the model's check is over
    calls.clear()
    generate(model, ids, width=3, depth=1, trie=False, max_new_tokens=4, do_sample=True)
    layers = sum(type(module) is nn.Linear for module in model.modules())
    # Four steps; the head runs on the two new roots alone, and after the last step on one row that nobody reads.
    assert len(calls) == 4 * layers
    assert set(calls) == {6, 2, 1}
    assert untouched(model)


def test_the_reference_backend_leaves_the_models_own(calls):
    model = tiny_llama()
    generate(model, torch.randint(1, 50, (2, 9)), max_new_tokens=1, do_sample=False)
    calls.clear()
    generate(model, torch.randint(1, 50, (1, 9)), backend="reference", max_new_tokens=3)
    assert not calls


def test_what_is_not_served(calls):
    """Many rows, autocast, another dtype, and plain forwards in a callback."""
    model, ids = tiny_llama(), torch.randint(1, 50, (30, 9))
    settings = {"width": 3, "depth": 1, "trie": False, "max_new_tokens": 2, "do_sample": True}
    generate(model, ids[:1], max_new_tokens=1, do_sample=False)
    calls.clear()
    generate(model, ids, **settings)
    assert set(calls) == {30, 1}  # 90 nodes are too many, their 30 roots are not
    calls.clear()
    with torch.autocast("cpu", torch.bfloat16):
        generate(model, ids[:1], **settings)
    assert not calls
    layers = few_row_layers(model, None)
    with few_row_linears(layers):
        model(ids[:1, :3])
    assert not calls


def test_layers_of_other_kinds_are_left_alone():
    class Own(nn.Linear):
        pass

    hooked = nn.Linear(4, 4)
    hooked.forward = lambda x: x
    parts = nn.ModuleList([
        nn.Linear(4, 4), Own(4, 4), hooked, nn.Linear(4, 4, dtype=torch.float64), nn.Linear(4, 4, device="meta"),
    ])  # fmt: skip
    assert few_row_layers(parts, None) == [parts[0]]
    assert few_row_layers(parts, "reference") == few_row_layers(parts, "cpu-portable") == []


def test_left_as_found_after_an_interrupt_and_by_the_last_of_several():
    model = tiny_llama()
    layers = few_row_layers(model, None)
    with pytest.raises(KeyboardInterrupt), few_row_linears(layers):
        raise KeyboardInterrupt
    assert untouched(model)
    inside, leave = threading.Event(), threading.Event()

    def hold():
        with few_row_linears(layers):
            inside.set()
            leave.wait(10)

    other = threading.Thread(target=hold)
    other.start()
    inside.wait(10)
    with few_row_linears(layers):
        pass
    assert not untouched(model)
    leave.set()
    other.join()
    assert untouched(model)


def test_layers_that_serve_another_thread_are_served_here_too():
    """Which product a call uses must not depend on what other threads do meanwhile."""
    model = tiny_llama()
    layers = few_row_layers(model, None)
    with few_row_linears(layers):
        assert few_row_layers(model, None) == layers
        with few_row_linears(few_row_layers(model, None)):
            pass
        assert not untouched(model)
    assert untouched(model)


def test_a_text_does_not_depend_on_its_batch_bit_for_bit():
    """Hidden states too: what the router and the head see is the same whatever rows are decoded beside it."""
    model, ids = tiny_llama(), torch.randint(1, 50, (5, 9))
    seen = {}

    def router(hidden, valid):
        seen[len(hidden)] = [*seen.get(len(hidden), []), hidden[0].clone()]
        return torch.zeros(len(hidden), 3)

    for rows in (1, 2, 5):
        generate(
            model, ids[:rows], width=3, depth=1, router=router, max_new_tokens=5, do_sample=True, trie=False,
            generator=torch.Generator().manual_seed(1),
        )  # fmt: skip
    # The prompt is read by the framework's own products, which may round otherwise for more rows.
    for rows in (2, 5):
        torch.testing.assert_close(torch.stack(seen[rows]), torch.stack(seen[1]), rtol=1e-5, atol=1e-6)
