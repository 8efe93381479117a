"""What ``lbr-kernels demo`` runs: the shipped model and routers on unseen reachability problems.

Contract
--------
:class:`Demo` loads the checkpoint and decodes problems, plainly and with Local Branch Routing; it prints nothing. All
sampling is at temperature 1 without filters, as in training. One seed gives one set of problems and one set of answers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lbr_kernels.decoding.generate import LBRGenerateOutput, generate
from lbr_kernels.decoding.loop import StepView
from lbr_kernels.evaluation.reachability import (
    EOS,
    Problem,
    ReachabilityOptions,
    check_answer,
    evaluation_problems,
    prompt_ids,
)
from lbr_kernels.router import Router

CHECKPOINT = Path(__file__).parent / "checkpoints" / "reachability"
WIDTHS, DEPTHS = (2, 3), (1, 2)
BATCH = 50  # problems that are decoded together

Decoder: TypeAlias = Callable[[Tensor], tuple[Tensor, int | None]]


@dataclass
class Measured:
    """One way of decoding: what it committed and forwarded, how fast, how often it was right."""

    name: str
    tokens: int = 0
    nodes: int = 0
    speeds: list[float] = field(default_factory=list)  # committed tokens per second of each run
    correct: int = 0
    problems: int = 0

    def add(self, tokens: int, nodes: int, seconds: float) -> None:
        """Count a run."""
        self.tokens += tokens
        self.nodes += nodes
        self.speeds.append(tokens / seconds)


class Demo:
    """The shipped checkpoint: a model of 0.8 M parameters and a router for each depth."""

    def __init__(self) -> None:
        self.options = ReachabilityOptions()
        self.model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
        self.routers = {d: Router.from_pretrained(CHECKPOINT / f"router-depth{d}").eval() for d in DEPTHS}

    def prompts(self, problems: list[Problem]) -> Tensor:
        """Token ids ``[B, prompt_length]``; all prompts are equally long."""
        return torch.tensor([prompt_ids(problem, self.options) for problem in problems])

    def plain(self, prompts: Tensor, *, do_sample: bool) -> Tensor:
        """``model.generate``; ids ``[B, prompt_length + new]``."""
        sampling = {"do_sample": True, "top_k": 0} if do_sample else {"do_sample": False}
        ids: Tensor = self.model.generate(prompts, max_new_tokens=self.options.max_answer_length, **sampling)
        return ids

    def lbr(
        self,
        prompts: Tensor,
        *,
        width: int,
        depth: int,
        generator: torch.Generator,
        streams: list[int] | None = None,
        on_step: Callable[[StepView], None] | None = None,
    ) -> LBRGenerateOutput:
        """Local Branch Routing with the router of that depth; arguments as for ``lbr_kernels.generate``."""
        out = generate(
            self.model, prompts, width=width, depth=depth, router=self.routers[depth], generator=generator,
            streams=streams, on_step=on_step, do_sample=True, top_k=0, max_new_tokens=self.options.max_answer_length,
            return_dict_in_generate=True,
        )  # fmt: skip
        assert isinstance(out, LBRGenerateOutput)
        return out

    def problem_to_show(self, *, width: int, depth: int, seed: int) -> Problem:
        """Of some unseen problems of the most hops that greedy decoding gets wrong and this tree right, the one with
        the most decisions between different candidates.

        With the same seed the tree decodes it in the same way alone: a row's text does not depend on its batch.
        """
        problem_seed = seed
        while True:
            problem_seed += 1
            unseen = evaluation_problems(self.options, 60, hops=[self.options.max_hops], seed=problem_seed)
            prompts, generator = self.prompts(unseen), torch.Generator().manual_seed(seed)
            greedy = self.answers(self.plain(prompts, do_sample=False))
            steps: list[StepView] = []
            out = self.lbr(
                prompts, width=width, depth=depth, generator=generator, streams=[0] * len(unseen), on_step=steps.append
            )
            contested = torch.stack([(step.choice >= 0) & differing_candidates(step, width) for step in steps]).sum(0)
            told = torch.tensor([
                not self.is_right(problem, one) and self.is_right(problem, other)
                for problem, one, other in zip(unseen, greedy, self.answers(out.sequences), strict=True)
            ])  # fmt: skip
            if bool(told.any()):
                # Nothing may be contested, as at width 1: what is not to be shown stands below that.
                return unseen[int(torch.where(told, contested, -1).argmax())]

    def is_right(self, problem: Problem, answer: list[int]) -> bool:
        """Whether the answer has ended, is a path of the graph and leads to the reachable target."""
        return check_answer(problem, answer, self.options).correct

    def answers(self, sequences: Tensor) -> list[list[int]]:
        """The new tokens of every row, up to the end of text, itself included."""
        rows: list[list[int]] = sequences[:, self.options.prompt_length :].tolist()
        return [row[: row.index(EOS) + 1] if EOS in row else row for row in rows]

    def decoders(self, generator: torch.Generator) -> dict[str, Decoder]:
        """Every way of decoding by name: prompts to ids and the number of nodes forwarded, None for one per token."""

        def plain(do_sample: bool) -> Decoder:
            return lambda prompts: (self.plain(prompts, do_sample=do_sample), None)

        def lbr(width: int, depth: int) -> Decoder:
            def decode(prompts: Tensor) -> tuple[Tensor, int | None]:
                out = self.lbr(prompts, width=width, depth=depth, generator=generator)
                assert out.stats is not None
                return out.sequences, out.stats.forwarded_nodes

            return decode

        trees = {f"LBR K={k} L={d}": lbr(k, d) for k in WIDTHS for d in DEPTHS}
        return {"plain, sampled": plain(True), "plain, greedy": plain(False), **trees}

    def compare(self, count: int, *, seed: int) -> Iterator[list[Measured]]:
        """Decode ``count`` unseen problems in every way; the running totals, first at nothing, then after each part.

        Ways alternate, one batch each. Plain sampling draws from torch's global generator, whose state is put back.
        """
        decoders = self.decoders(torch.Generator().manual_seed(seed))
        rows = [Measured(name) for name in decoders]
        yield rows
        hops = range(1, self.options.max_hops + 1)
        problems = evaluation_problems(self.options, count, hops=hops, seed=seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for start in range(0, count, BATCH):
                batch = problems[start : start + BATCH]
                prompts = self.prompts(batch)
                for row, decode in zip(rows, decoders.values(), strict=True):
                    began = time.perf_counter()
                    sequences, nodes = decode(prompts)
                    seconds = time.perf_counter() - began
                    answers = self.answers(sequences)
                    tokens = sum(map(len, answers))
                    row.add(tokens, tokens if nodes is None else nodes, seconds)
                    row.problems += len(batch)
                    row.correct += sum(map(self.is_right, batch, answers))
                    yield rows


def differing_candidates(step: StepView, width: int) -> Tensor:
    """Whether there is something to decide, bool ``[B]``."""
    candidates = step.tokens[:, :width]
    return (candidates != candidates[:, :1]).any(dim=1)
