"""What the command line shows: the rolling tree, one picture per decision; a comparison; progress.

Contract
--------
:class:`TreeView` is given every :class:`StepView` of a decoding call (``generate(on_step=view)``) and draws row 0 of
it: the committed text, the candidates with what stands below them, the router's probabilities, the winner. On a
terminal the picture is replaced in place; elsewhere each decision is one line.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import takewhile
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from lbr_kernels.decoding.loop import StepView
from lbr_kernels.evaluation.demo import Measured, differing_candidates
from lbr_kernels.evaluation.statistics import wilson_interval

Decode = Callable[[list[int]], str]

_BAR = 20  # characters of a full probability bar
_SHOWN = 12  # candidates, and children of one candidate, that are drawn


def progress(console: Console) -> Progress:
    """A progress bar for anything that takes longer than a moment."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )


def comparison(rows: list[Measured]) -> Table:
    """Ways of decoding side by side, with accuracies if problems were judged."""
    judged = all(row.problems for row in rows)
    table = Table()
    table.add_column("decoding", no_wrap=True)
    if judged:
        table.add_column("accuracy", justify="right")
        table.add_column("95 %", justify="right", style="dim", no_wrap=True)
    table.add_column("committed tokens/s", justify="right")
    table.add_column("forwarded nodes/token", justify="right")
    for row in rows:
        cells = [row.name]
        if judged:
            low, high = wilson_interval(row.correct, row.problems)
            cells += [f"{row.correct / row.problems:.3f}", f"{low:.2f}-{high:.2f}"]
        table.add_row(*cells, f"{statistics.median(row.speeds):,.0f}", f"{row.nodes / row.tokens:.2f}")
    return table


class TreeView:
    """Draws the first row of a decoding call while it runs; a context manager around the call.

    Args:
        decode: token ids to text.
        prompt: shown in front of the committed text.
        width, depth: the tree's K and L.
        pause: seconds to hold a picture on a terminal; a third of it where all candidates are equal.
    """

    def __init__(
        self, console: Console, decode: Decode, prompt: str, *, width: int, depth: int, pause: float = 0.0
    ) -> None:
        self.console, self.decode, self.prompt = console, decode, prompt
        self.width, self.depth, self.pause = width, depth, pause
        self.committed: list[int] = []
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> TreeView:
        if self._live is not None:
            self._live.start()
        else:
            self.console.print("step  candidates with their probabilities; * is committed", highlight=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, step: StepView) -> None:
        choice = int(step.choice[0])
        if choice < 0:
            return
        if self._live is None:
            self.console.print(self._line(step), highlight=False)
        else:
            self._live.update(self.picture(step), refresh=True)
            time.sleep(self.pause if bool(differing_candidates(step, self.width)[0]) else self.pause / 3)
        self.committed.append(int(step.tokens[0, choice]))

    def _name(self, token: int) -> str:
        """A token as text that shows its edges."""
        return repr(self.decode([token]))[1:-1] or "''"

    def _line(self, step: StepView) -> Text:
        tokens, probabilities, choice = _first_row(step)
        line = Text(f"{step.step + 1:4}  ")
        for candidate in range(min(self.width, _SHOWN)):
            if tokens[candidate] >= 0:
                mark = "*" if candidate == choice else " "
                line.append(f"{mark}{self._name(tokens[candidate])} {probabilities[candidate]:.2f}   ")
        return line

    def picture(self, step: StepView) -> RenderableType:
        """The decision behind what is committed so far."""
        tokens, probabilities, choice = _first_row(step)
        before, after = self.decode(self.committed), self.decode([*self.committed, tokens[choice]])
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, after, strict=False)))
        text = Text(self.prompt, style="dim")
        text.append(after[:same], style="bold")
        text.append(after[same:], style="bold green")
        table = Table(box=None, padding=(0, 2), show_edge=False)
        for column in ("candidate and what follows", "router", ""):
            table.add_column(column, style="none", header_style="dim")
        for candidate in range(min(self.width, _SHOWN)):
            if tokens[candidate] < 0:
                continue
            won = candidate == choice
            style = "bold green" if won else "red"
            branch = Tree(Text(("▶ " if won else "✕ ") + self._name(tokens[candidate]), style=style), guide_style=style)
            self._add_children(branch, tokens, candidate, 1, "none" if won else "dim")
            share = probabilities[candidate]
            bar = "█" * round(share * _BAR)
            table.add_row(
                branch, Text(f"{bar:<{_BAR}} {share:.2f}", style=style), Text("commit" if won else "prune", style)
            )
        title = f"step {step.step + 1}: grow, route, prune, shift"
        return Group(Panel(text, title="text", title_align="left"), Panel(table, title=title, title_align="left"))

    def _add_children(self, branch: Tree, tokens: list[int], slot: int, layer: int, style: str) -> None:
        if layer == self.depth:
            return
        first = self.width + self.width * slot
        for child in range(first, first + min(self.width, _SHOWN)):
            if tokens[child] >= 0:
                self._add_children(branch.add(Text(self._name(tokens[child]), style)), tokens, child, layer + 1, style)


def _first_row(step: StepView) -> tuple[list[int], list[float], int]:
    """Row 0 of a step: its slots' tokens (negative: none), the candidates' probabilities, the choice."""
    return step.tokens[0].tolist(), step.router_log_probs[0].exp().tolist(), int(step.choice[0])
