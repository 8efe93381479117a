"""The router module: symmetries (I4), missing nodes, saving and loading."""

from __future__ import annotations

import json

import pytest
import torch
from models import tiny_llama
from test_route import SHAPES, VARIANTS, random_router, random_valid

from lbr_kernels import Router, RouterConfig
from lbr_kernels.ops.tree_shape import num_slots, path_masks, path_slots


def subtree_slots(width: int, depth: int, candidate: int) -> list[int]:
    slots, layer = [candidate], [candidate]
    for _ in range(depth - 1):
        layer = [width + width * slot + k for slot in layer for k in range(width)]
        slots += layer
    return slots


@pytest.mark.parametrize(("width", "depth"), SHAPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_equivariant_under_candidates(width, depth, variant):
    """I4: permuting the candidates permutes the log-probabilities."""
    router = random_router(depth, **variant)
    hidden = torch.randn(2, num_slots(width, depth), 48)
    order = torch.randperm(width).tolist()
    permuted = hidden.clone()
    for new, old in enumerate(order):
        permuted[:, subtree_slots(width, depth, new)] = hidden[:, subtree_slots(width, depth, old)]
    with torch.no_grad():
        torch.testing.assert_close(router(permuted, width), router(hidden, width)[:, order], rtol=0, atol=2e-6)


@pytest.mark.parametrize(("width", "depth"), [(3, 2), (2, 3), (4, 2)])
def test_invariant_under_paths(width, depth):
    """I4: permuting the children of any node inside a subtree changes nothing."""
    router = random_router(depth)
    hidden = torch.randn(2, num_slots(width, depth), 48)
    permuted = hidden.clone()
    parent = int(torch.randint(0, num_slots(width, depth - 1), ()))
    children = [width + width * parent + k for k in range(width)]

    def below(slot: int) -> list[int]:
        out = [slot]
        for found in out:
            child = width + width * found
            if child < num_slots(width, depth):
                out += range(child, child + width)
        return out

    for new, old in zip(children, reversed(children), strict=True):
        permuted[:, below(new)] = hidden[:, below(old)]
    with torch.no_grad():
        torch.testing.assert_close(router(permuted, width), router(hidden, width), rtol=0, atol=2e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_early_end_is_one_shorter_path(variant):
    """A subtree that ends at its candidate is encoded as the single path of that one node."""
    router = random_router(2, **variant)
    hidden = torch.randn(1, 12, 48)
    valid = torch.ones(1, 12, dtype=torch.bool)
    valid[0, 3:6] = False  # candidate 0 has no children
    on_path, exists = path_masks(valid, 3, 2)
    assert exists[0].tolist() == [[True, False, False], [True, True, True], [True, True, True]]
    assert on_path[0, 0, 0].tolist() == [True, False]
    with torch.no_grad():
        want = router(hidden, 3, valid=valid)
        hidden[0, 3:6] = torch.nan
        assert torch.equal(router(hidden, 3, valid=valid), want)


def test_positions_that_do_not_exist_are_not_attended_to():
    """Candidates without children: their sequences are [CLS], h and no more, put together here by hand."""
    router = random_router(3)
    hidden = torch.randn(1, num_slots(2, 3), 48)
    valid = torch.zeros(1, num_slots(2, 3), dtype=torch.bool)
    valid[:, :2] = True
    with torch.no_grad():
        first = router.in_proj(hidden[0, :2]) + router.depth_embed[0]
        sequence = torch.stack([router.cls.expand(2, -1), first], dim=1)
        there = torch.ones(2, 2, dtype=torch.bool)
        rollouts = router.path_encoder(sequence, there)[:, :1]
        pooled = router.subtree_attention(rollouts, there[:, :1])[:, 0]  # one item: pooling gives it back
        compared = router.candidate_attention(pooled[None], there[:1])
        want = router.score(compared)[..., 0].log_softmax(-1)
        torch.testing.assert_close(router(hidden, 2, valid=valid), want)


def test_missing_candidates_are_left_out_of_the_comparison():
    router = random_router(1)
    hidden = torch.randn(1, 4, 48)
    valid = torch.tensor([[True, False, True, True]])
    with torch.no_grad():
        masked = router(hidden, 4, valid=valid)
        smaller = router(hidden[:, [0, 2, 3]], 3)
    torch.testing.assert_close(masked[:, [0, 2, 3]], smaller)
    assert masked[0, 1] == -torch.inf


@pytest.mark.parametrize(("width", "depth"), SHAPES)
def test_gradients_are_finite(width, depth):
    """Also with missing nodes, and into the hidden states: training sees through the router into the model."""
    router = random_router(depth)
    hidden = torch.randn(3, num_slots(width, depth), 48, requires_grad=True)
    valid = random_valid(3, width, depth)
    log_probs = router(hidden, width, valid=valid)
    log_probs[valid[:, :width]].sum().backward()
    assert torch.isfinite(hidden.grad).all()
    assert (hidden.grad[~valid] == 0).all()
    assert all(torch.isfinite(p.grad).all() for p in router.parameters() if p.grad is not None)


def test_parameter_count_of_the_paper():
    """Appendix A.4.1 at D = 1536: about 0.79 M."""
    assert sum(p.numel() for p in Router(RouterConfig(1536)).parameters()) == 792_704


@pytest.mark.parametrize("variant", VARIANTS)
def test_save_and_load(tmp_path, variant):
    router = random_router(2, **variant)
    router.save_pretrained(tmp_path / "router")
    again = Router.from_pretrained(tmp_path / "router")
    assert again.config == router.config
    for name, tensor in router.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def test_half_precision_files_are_widened(tmp_path):
    router = random_router(1).half()
    router.save_pretrained(tmp_path)
    assert all(p.dtype == torch.float32 for p in Router.from_pretrained(tmp_path).parameters())


def test_unknown_entries_and_missing_files_are_refused(tmp_path):
    random_router(1).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "router_config.json").read_text(encoding="utf-8"))
    (tmp_path / "router_config.json").write_text(json.dumps(config | {"heads": 3}), encoding="utf-8")
    with pytest.raises(ValueError, match="unknown entries \\['heads'\\]"):
        Router.from_pretrained(tmp_path)
    (tmp_path / "router.safetensors").unlink()
    (tmp_path / "router_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(FileNotFoundError):
        Router.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"hidden_size": 8, "depth": 0}, "depth is 0"),
        ({"hidden_size": 8, "dim": 10, "num_heads": 4}, "dim is 10, expected a multiple of num_heads \\(4\\)"),
        ({"hidden_size": 8, "score_head": "cosine"}, "score_head is 'cosine'"),
    ],
)
def test_bad_configurations(config, message):
    with pytest.raises(ValueError, match=message):
        RouterConfig(**config)


def test_bad_inputs():
    router = random_router(2)
    with pytest.raises(ValueError, match=r"hidden has shape \[1, 3, 48\], expected \[B, 12, 48\]"):
        router(torch.randn(1, 3, 48), 3)
    with pytest.raises(ValueError, match="width is 0, expected an integer >= 1"):
        router(torch.randn(1, 12, 48), 0)
    sharp = router(torch.randn(1, 12, 48, requires_grad=True), 3, temperature=1e-40)
    assert not sharp.isnan().any()
    with pytest.raises(ValueError, match="temperature is 0"):
        router(torch.randn(1, 12, 48), 3, temperature=0)


def test_for_model():
    model = tiny_llama()
    router = Router.for_model(model, depth=2, dim=16)
    assert router.config == RouterConfig(hidden_size=32, depth=2, dim=16)


def test_path_slots():
    assert path_slots(2, 2).tolist() == [[[0, 2], [0, 3]], [[1, 4], [1, 5]]]
    assert path_slots(3, 1).tolist() == [[[0]], [[1]], [[2]]]


@pytest.mark.parametrize("name", ["router_config.json", "router.safetensors"])
def test_a_broken_file_is_named(tmp_path, name):
    random_router(1).save_pretrained(tmp_path)
    (tmp_path / name).write_text("{ no", encoding="utf-8")
    with pytest.raises(ValueError, match=name):
        Router.from_pretrained(tmp_path)


def test_weights_for_another_configuration_are_refused(tmp_path):
    random_router(1).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "router_config.json").read_text(encoding="utf-8"))
    (tmp_path / "router_config.json").write_text(json.dumps({**config, "hidden_size": 7}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"(?s)router\.safetensors: .*size mismatch"):
        Router.from_pretrained(tmp_path)
    del config["depth"]
    (tmp_path / "router_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match="depth is missing"):
        Router.from_pretrained(tmp_path)
