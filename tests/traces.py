"""What the tests of traces share: decodes that are recorded, tokens that are hard to show, the data of a page."""

from __future__ import annotations

import json
import re
from typing import Any

import torch
from test_invariants import seeded, trained_looking_router

from lbr_kernels import generate
from lbr_kernels.trace import Trace

PROMPT = [5, 9, 2, 7]
HOSTILE = (
    "</script><script>window.hacked=1</script>", "<!--<script>", "<img src=x onerror=window.hacked=1>", "&lt;b&gt;",
    "\"'`\\", "\n", " ", "", "\u2028", "\u202eabc", "\u200b", "\x00", "😀", "{{document}}", "${alert(1)}", "\ufffd",
    "]]>",
)  # fmt: skip


def letters(ids: list[int]) -> str:
    return "".join(f"<{token}>" for token in ids)


def hostile(ids: list[int]) -> str:
    return "".join(HOSTILE[token % len(HOSTILE)] for token in ids)


def traced(
    model: Any,
    decode: Any = letters,
    *,
    prompt: Any = PROMPT,
    width: int = 3,
    depth: int = 2,
    steps: int = 6,
    **kwargs: Any,
) -> Any:
    """The document of one decode and ``generate``'s own account of it."""
    kwargs = {"do_sample": True, "top_k": 0, **kwargs}
    recorded = Trace(model, decode, prompt, width=width, depth=depth, max_new_tokens=steps)
    out = generate(
        model, torch.tensor([prompt]), width=width, depth=depth, router=trained_looking_router(model, depth),
        on_step=recorded, max_new_tokens=steps, generator=seeded(1), return_dict_in_generate=True, **kwargs,
    )  # fmt: skip
    facts, settings = [("model", "tiny")], out.trajectory.settings
    return recorded.document(decode(prompt), facts=facts, routed=True, settings=settings, note="a note"), out


def embedded(html: str) -> Any:
    """The data of a page."""
    (data,) = re.findall(r'<script type="application/json" id="document">(.*?)</script>', html, flags=re.DOTALL)
    return json.loads(data)
