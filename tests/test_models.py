"""Which models hold a tree: the check, and decoding of every family that passes, against the oracle."""

from __future__ import annotations

import pytest
import torch
from models import FAMILIES, tiny_llama, tiny_model
from oracle import decode_row
from test_invariants import padded, random_prompts, seeded, trained_looking_router
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, BertLMHeadModel, BloomConfig, BloomForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

from lbr_kernels import check_model, generate
from lbr_kernels.decoding.adapter import ModelAdapter


@pytest.mark.parametrize("family", FAMILIES)
def test_passes_the_check(family):
    """Trees are exact; prefixes are longer than the windows."""
    report = check_model(tiny_model(family))
    assert report.reason is None
    assert report.tree_error < 5e-6
    assert report.prefix_length >= 11


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("width", "depth"), [(3, 1), (2, 2)])
def test_equals_the_oracle(family, width, depth):
    """Ragged prompts, longer than the windows, decoded for longer than the windows."""
    model = tiny_model(family)
    router = trained_looking_router(model, depth)
    prompts = random_prompts([9, 3])
    out = generate(
        model, **padded(prompts), width=width, depth=depth, router=router, max_new_tokens=9, do_sample=True, top_k=0,
        generator=seeded(1), return_dict_in_generate=True,
    )  # fmt: skip
    for row, prompt in enumerate(prompts):
        want = decode_row(
            model, prompt, width=width, depth=depth, max_new_tokens=9, router=router,
            seed=out.trajectory.settings.seed, stream=row,
        )  # fmt: skip
        assert out.sequences[row, 9:].tolist() == want.tokens
        assert out.trajectory.node_tokens[row].tolist() == want.node_tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_states(family):
    """Head inputs lead to the model's own logits, soft-caps and scales included."""
    model, ids = tiny_model(family), torch.randint(1, 53, (1, 7), generator=seeded(0))
    adapter = ModelAdapter(model)
    with torch.no_grad():
        torch.testing.assert_close(adapter.logits_of(adapter.head_inputs(ids)[0]), model(ids).logits[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_passes_the_check_in_half_precision(family, dtype):
    assert check_model(tiny_model(family).to(dtype)).reason is None


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_passes_the_check_in_double_precision(family):
    assert check_model(tiny_model(family).double()).reason is None


def test_rotary_scalings():
    """Scaled rotary positions below their limit are exact like any others."""
    for scaling in (
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
        {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64},
        {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    ):
        assert check_model(tiny_llama(rope_parameters=scaling)).reason is None, scaling


def test_refused_by_structure():
    bloom = BloomForCausalLM(BloomConfig(vocab_size=20, hidden_size=16, n_layer=1, n_head=2))
    assert "takes no position_ids" in check_model(bloom).reason
    lfm = AutoConfig.for_model(
        "lfm2", vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, layer_types=["conv", "full_attention"],
    )  # fmt: skip
    assert "cannot share" in check_model(AutoModelForCausalLM.from_config(lfm)).reason
    xglm = AutoConfig.for_model("xglm", vocab_size=20, d_model=16, ffn_dim=16, num_layers=1, attention_heads=2)
    assert "attention interface" in check_model(AutoModelForCausalLM.from_config(xglm)).reason


def test_the_check_is_of_the_models_own_arithmetic():
    """Whatever the caller has switched on around it."""
    with torch.autocast("cpu", torch.bfloat16):
        assert check_model(tiny_llama()).reason is None


def test_refused_for_not_being_causal():
    """A model that sees both ways answers with a cache, but not the same."""
    bert = BertLMHeadModel(BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                      intermediate_size=16))  # fmt: skip
    for parameter in bert.parameters():
        nn.init.normal_(parameter, std=0.3)
    assert "not causal" in check_model(bert).reason


def test_refused_by_numbers(monkeypatch):
    """A layer that does something with its neighbours outside attention is found out."""
    forward = LlamaAttention.forward

    def leaky(self, hidden_states, *args, **kwargs):
        output, weights = forward(self, hidden_states, *args, **kwargs)
        return output + 0.01 * hidden_states.roll(1, dims=1), weights

    monkeypatch.setattr(LlamaAttention, "forward", leaky)
    reason = check_model(tiny_llama(seed=3)).reason
    assert "differ" in reason


def test_a_model_without_a_head():
    model = tiny_llama(seed=4)
    model.get_output_embeddings = lambda: None
    assert "no output head" in check_model(model).reason


@pytest.mark.parametrize("vocab_size", [2, 4, 9, 18, 53])
def test_equal_candidates_do_not_confuse_the_check(vocab_size):
    """With a small vocabulary siblings of the random tree are often equal."""
    for seed in range(4):
        assert check_model(tiny_llama(vocab_size=vocab_size, seed=seed, pad_token_id=0)).reason is None
    assert check_model(tiny_model("gpt_oss", sliding_window=128)).reason is None


def test_the_check_leaves_every_module_in_its_mode():
    model = tiny_llama(seed=5)
    model.model.layers[1].train()
    before = [module.training for module in model.modules()]
    assert check_model(model).reason is None
    assert [module.training for module in model.modules()] == before


def test_a_refusal_is_not_for_ever():
    """Weights that were wrong when the model was first looked at, and are right now."""
    model = tiny_llama(seed=6)
    good = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        model.lm_head.weight.fill_(1)
        model.model.layers[0].mlp.up_proj.weight.fill_(torch.nan)
    assert check_model(model).reason is not None
    model.load_state_dict(good)
    assert check_model(model).reason is None


def test_another_attention_is_another_check():
    """SDPA passes over Gemma 2's soft-cap: what holds for the eager model does not hold for it."""
    model = tiny_model("gemma2")
    assert check_model(model).reason is None
    model.config._attn_implementation = "sdpa"
    assert check_model(model).reason is not None
    model.config._attn_implementation = "eager"
    assert check_model(model).reason is None
