"""Tiny random models of the families that tests decode: every kind of position, head count, window and soft-cap."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

_COMMON = {
    "vocab_size": 53,
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": None,
}
_MODERN = {
    **_COMMON,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
_WINDOWED = {
    **_MODERN,
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _MODERN,
    "mistral": {**_MODERN, "sliding_window": 6},
    "qwen2": {k: v for k, v in _MODERN.items() if k != "head_dim"},
    "qwen3": _MODERN,
    "gemma2": {**_WINDOWED, "attn_logit_softcapping": 4.0, "final_logit_softcapping": 6.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {**_WINDOWED, "query_pre_attn_scalar": 8},
    "phi": {k: v for k, v in _MODERN.items() if k != "head_dim"},
    "phi3": {**{k: v for k, v in _MODERN.items() if k != "head_dim"}, "sliding_window": 6},
    "gpt_neox": {
        **_COMMON, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    },
    "gpt2": {**_COMMON, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 90},
    "opt": {
        **_COMMON, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "word_embed_proj_dim": 32, "max_position_embeddings": 90,
    },
    "gpt_oss": {**_WINDOWED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**_MODERN, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "cohere2": {**_WINDOWED, "logit_scale": 0.25},
    "olmo2": {k: v for k, v in _MODERN.items() if k != "head_dim"},
    "stablelm": {k: v for k, v in _MODERN.items() if k != "head_dim"},
    "starcoder2": {**{k: v for k, v in _MODERN.items() if k != "head_dim"}, "sliding_window": 6},
    "gemma3n_text": {
        **_WINDOWED, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 53, "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": None, "laurel_rank": 8,
    },
}  # fmt: skip


def tiny_model(
    family: str, *, seed: int = 0, scale: float = 0.2, attn_implementation: str | None = None, **change: Any
) -> PreTrainedModel:
    """A random model whose next-token distributions are neither flat nor peaked."""
    config = AutoConfig.for_model(family, **{**FAMILIES[family], **change})
    torch.manual_seed(seed)
    # Older transformers let SDPA pass over a soft-cap in silence.
    if "attn_logit_softcapping" in FAMILIES[family]:
        attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation).float().eval()
    for name, parameter in model.named_parameters():
        if "norm" not in name and parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=scale)
    return model


def tiny_llama(vocab_size: int = 53, **change: Any) -> PreTrainedModel:
    return tiny_model("llama", vocab_size=vocab_size, **change)


def letters_tokenizer() -> PreTrainedTokenizerFast:
    """One letter per id."""
    vocabulary = {chr(97 + i): i for i in range(26)} | {f"<{i}>": i for i in range(26, 53)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<26>"))
    tokenizer.pre_tokenizer = Split("", "isolated")
    tokenizer.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
