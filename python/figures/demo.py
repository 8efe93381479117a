"""Draw ``demo.svg``: one decision of ``lbr-kernels demo`` and its table, as the terminal shows them.

    python python/figures/demo.py

The decision is the one in which the router is surest among those whose candidates differ.
"""

from __future__ import annotations

import io
import math
import re
from pathlib import Path

import torch
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console, RenderableType

from lbr_kernels.decoding.loop import StepView
from lbr_kernels.display import TreeView, comparison
from lbr_kernels.evaluation import reachability
from lbr_kernels.evaluation.demo import Demo
from lbr_kernels.evaluation.digits import CONTINUES

SEED, PROBLEMS, WIDTH, DEPTH = 0, 200, 3, 2
OUT = Path(__file__).with_name("demo.svg")


def main() -> None:
    """Decode one problem and compare, on a console that records."""
    demo = Demo()
    console = Console(record=True, width=80, file=io.StringIO())
    problem = demo.problem_to_show(width=WIDTH, depth=DEPTH, seed=SEED)
    prompt = demo.prompts([problem])
    question = reachability.to_text(prompt[0].tolist(), demo.options).split(",")[-1].strip() + " "

    def spell(tokens: list[int]) -> str:
        return reachability.to_text(tokens, demo.options).replace(CONTINUES, "")

    pictures: list[tuple[float, RenderableType]] = []
    view = TreeView(console, spell, question, width=WIDTH, depth=DEPTH)

    def keep(step: StepView) -> None:
        if int(step.choice[0]) >= 0:
            sure = step.router_log_probs[0, step.choice[0]].item()
            differ = len(set(step.tokens[0, :WIDTH].tolist())) > 1
            pictures.append((sure if differ else -math.inf, view.picture(step)))
            view.committed.append(int(step.tokens[0, step.choice[0]]))

    demo.lbr(prompt, width=WIDTH, depth=DEPTH, generator=torch.Generator().manual_seed(SEED), on_step=keep)
    console.print(max(pictures, key=lambda pair: pair[0])[1])
    console.print(comparison(list(demo.compare(PROBLEMS, seed=SEED))[-1]))
    # The reader's own font in the place of rich's web fonts: a picture in a README may not load those.
    template = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    template = template.replace("Fira Code, monospace", "monospace")
    console.save_svg(str(OUT), title="lbr-kernels demo", code_format=template)


if __name__ == "__main__":
    main()
