"""The README's Python runs as it stands, and what it refers to exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from models import tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


class Words:
    """In the place of the Hub's tokenizer."""

    def __call__(self, text: str, return_tensors: str) -> dict[str, torch.Tensor]:
        ids = torch.tensor([[1 + len(word) for word in text.split()]])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def decode(self, ids: torch.Tensor) -> str:
        return " ".join(map(str, ids.tolist()))


def test_python_blocks_run(monkeypatch, tmp_path, capsys):
    """All blocks in one namespace, as a reader would paste them; only the Hub is replaced."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda name: Words())
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda name: tiny_llama())
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 5
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["out"].shape == (1, 8, 3, 64)
    assert capsys.readouterr().out


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_links_and_targets_exist(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / target).exists(), target
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"make ([a-z-]+)", text):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), f"make {target}"
    for path in re.findall(r"`((?:lbr_kernels|csrc|tests|bench|python)/[\w/.<>-]+)`", text):
        assert "<" in path or (ROOT / path).exists(), path
