"""The command line: ``lbr-kernels demo``, ``generate``, ``info`` and ``build``."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from lbr_kernels import ops
from lbr_kernels.decoding.adapter import UnsupportedModelError, require_supported
from lbr_kernels.decoding.generate import LBRGenerateOutput, generate
from lbr_kernels.display import TreeView, progress
from lbr_kernels.evaluation import reachability
from lbr_kernels.evaluation.statistics import wilson_interval
from lbr_kernels.ops import _extension
from lbr_kernels.router import Router

app = typer.Typer(
    help="Local Branch Routing: decode with a rolling lookahead tree.", no_args_is_help=True, add_completion=False
)
console = Console()

CHECKPOINT = Path(__file__).parent / "evaluation" / "checkpoints" / "reachability"
BATCH = 50  # problems that are decoded together


@dataclass
class Measured:
    """One row of a comparison."""

    name: str
    tokens: int = 0
    seconds: float = 0.0
    nodes: int = 0
    correct: int = 0
    problems: int = 0

    def cells(self) -> list[str]:
        cells = [self.name]
        if self.problems:
            low, high = wilson_interval(self.correct, self.problems)
            cells += [f"{self.correct / self.problems:.3f}", f"{low:.2f} – {high:.2f}"]
        return [*cells, f"{self.tokens / self.seconds:,.0f}", f"{self.nodes / self.tokens:.2f}"]


def comparison(rows: list[Measured]) -> Table:
    """Decoding methods side by side."""
    table = Table()
    table.add_column("decoding", no_wrap=True)
    if rows[0].problems:
        table.add_column("accuracy", justify="right")
        table.add_column("95 %", justify="right", style="dim", no_wrap=True)
    table.add_column("committed tokens/s", justify="right")
    table.add_column("forwarded nodes/token", justify="right")
    for row in rows:
        table.add_row(*row.cells())
    return table


def fail(message: str) -> typer.Exit:
    """Print an error in one plain line; to be raised."""
    console.print(f"[bold red]error:[/] {message}", highlight=False, soft_wrap=True)
    return typer.Exit(1)


@app.command()
def demo(
    problems: Annotated[int, typer.Option(min=2, help="Unseen problems in the table; an even number.")] = 200,
    seed: Annotated[int, typer.Option(help="Seed of problems and decoding.")] = 0,
    pause: Annotated[float, typer.Option(min=0, help="Seconds to hold each picture of the tree.")] = 0.6,
    depth: Annotated[int, typer.Option(min=1, max=2, help="Depth of the tree that is shown.")] = 2,
) -> None:
    """Watch one problem being decoded, then see Local Branch Routing beside plain decoding.

    The task is graph reachability: follow edges from a root to the one of two targets that can be reached. The model
    (0.8 M parameters) and its routers come with the package; python/reachability/train.py trains them.
    """
    if problems % 2:
        raise fail(f"--problems is {problems}, expected an even number: problems come in twin pairs")
    options = reachability.ReachabilityOptions()
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    routers = {d: Router.from_pretrained(CHECKPOINT / f"router-depth{d}").eval() for d in (1, 2)}

    first = _hard_problem(model, options, seed + 1)
    ids = torch.tensor([reachability.prompt_ids(first, options)])
    text = reachability.to_text(ids[0].tolist(), options)
    title = "edges, the two targets, the root (greedy decoding gets this one wrong)"
    console.print(Panel(text, title=title, title_align="left"), highlight=False)

    def spell(tokens: list[int]) -> str:
        return reachability.to_text(tokens, options).replace(reachability.CONTINUES, "")

    generator = torch.Generator().manual_seed(seed)
    with TreeView(console, spell, text.split(",")[-1].strip() + " ", width=3, depth=depth, pause=pause) as view:
        out = generate(
            model, ids, width=3, depth=depth, router=routers[depth], generator=generator, on_step=view,
            max_new_tokens=options.max_answer_length, **_TASK_SAMPLING,
        )  # fmt: skip
    assert isinstance(out, Tensor)
    verdict = reachability.check_answer(first, out[0, ids.shape[1] :].tolist(), options)
    right = reachability.to_text(reachability.node_ids(first.answer, options), options)
    said = "correct" if verdict.correct else "legal, wrong target" if verdict.legal else "not a path of the graph"
    console.print(f"answer: [bold]{said}[/] (the reachable target is {right})\n", highlight=False)

    unseen = reachability.evaluation_problems(options, problems, hops=range(1, options.max_hops + 1), seed=seed)
    prompts = torch.tensor([reachability.prompt_ids(problem, options) for problem in unseen])
    methods: list[tuple[str, Callable[[Tensor, torch.Generator], tuple[Tensor, int]]]] = [
        ("plain, sampled", lambda batch, g: _plain(model, batch, options, do_sample=True)),
        ("plain, greedy", lambda batch, g: _plain(model, batch, options, do_sample=False)),
    ]
    for width in (2, 3):
        for tree_depth in (1, 2):

            def decode(
                batch: Tensor, g: torch.Generator, width: int = width, d: int = tree_depth
            ) -> tuple[Tensor, int]:
                result = generate(
                    model, batch, width=width, depth=d, router=routers[d], generator=g, return_dict_in_generate=True,
                    max_new_tokens=options.max_answer_length, **_TASK_SAMPLING,
                )  # fmt: skip
                assert isinstance(result, LBRGenerateOutput)
                assert result.stats is not None
                return result.sequences, result.stats.forwarded_nodes

            methods.append((f"LBR K={width} L={tree_depth}", decode))

    torch.manual_seed(seed)
    rows = [Measured(name) for name, _ in methods]
    with progress(console) as bar:
        task = bar.add_task(f"{problems} unseen problems, {len(methods)} ways", total=problems * len(methods))
        for start in range(0, problems, BATCH):
            batch, asked = prompts[start : start + BATCH], unseen[start : start + BATCH]
            for row, (_, method) in zip(rows, methods, strict=True):
                began = time.perf_counter()
                sequences, nodes = method(batch, generator)
                row.seconds += time.perf_counter() - began
                answers = sequences[:, batch.shape[1] :].tolist()
                tokens = sum(_length(answer) for answer in answers)
                row.tokens += tokens
                row.nodes += nodes or tokens
                row.problems += len(asked)
                row.correct += sum(
                    reachability.check_answer(problem, answer, options).correct
                    for problem, answer in zip(asked, answers, strict=True)
                )
                bar.advance(task, len(asked))
    console.print(comparison(rows))
    console.print(
        f"The same model in every row, sampled at temperature 1 but for the greedy one; {problems} problems of 1 to "
        f"{options.max_hops} hops on graphs it was not trained on, {BATCH} at a time, seed {seed}. "
        f"{torch.get_num_threads()} threads.",
        style="dim",
        highlight=False,
    )


_TASK_SAMPLING: dict[str, Any] = {"do_sample": True, "top_k": 0}


def _plain(
    model: PreTrainedModel, batch: Tensor, options: reachability.ReachabilityOptions, *, do_sample: bool
) -> tuple[Tensor, int]:
    sampling = _TASK_SAMPLING if do_sample else {"do_sample": False}
    return model.generate(batch, max_new_tokens=options.max_answer_length, **sampling), 0


def _hard_problem(model: PreTrainedModel, options: reachability.ReachabilityOptions, seed: int) -> reachability.Problem:
    """The first unseen problem of the most hops that greedy decoding gets wrong."""
    unseen = reachability.evaluation_problems(options, 40, hops=[options.max_hops], seed=seed)
    prompts = torch.tensor([reachability.prompt_ids(problem, options) for problem in unseen])
    answers, _ = _plain(model, prompts, options, do_sample=False)
    for problem, answer in zip(unseen, answers[:, prompts.shape[1] :].tolist(), strict=True):
        if not reachability.check_answer(problem, answer, options).correct:
            return problem
    return unseen[0]


def _length(answer: list[int]) -> int:
    """Tokens up to the end of text, itself included."""
    return answer.index(reachability.EOS) + 1 if reachability.EOS in answer else len(answer)


@app.command(name="generate")
def generate_command(
    model: Annotated[str, typer.Option(help="A transformers causal LM: a directory or a Hub id.")],
    prompt: Annotated[str, typer.Option(help="The text to go on from.")],
    router: Annotated[str | None, typer.Option(help="A router's directory or Hub id; uniform by default.")] = None,
    width: Annotated[int, typer.Option(min=1, help="K, candidates per token.")] = 3,
    depth: Annotated[int, typer.Option(min=1, help="L, layers of the tree.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    greedy: Annotated[bool, typer.Option("--greedy", help="Most likely candidates and choice, nothing drawn.")] = False,
    temperature: Annotated[float, typer.Option(min=1e-4)] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="0: off.")] = 0,
    top_p: Annotated[float, typer.Option(min=0, max=1)] = 1.0,
    seed: Annotated[int, typer.Option()] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    pause: Annotated[float, typer.Option(min=0, help="Seconds to hold each picture of the tree.")] = 0.0,
    compare: Annotated[bool, typer.Option(help="Also time plain decoding.")] = True,
) -> None:
    """Decode a prompt with any checkpoint, the tree rolling on the terminal; then the cost beside plain decoding."""
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise fail(f"--dtype is {dtype!r}, expected auto, float32, bfloat16 or float16")
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype if dtype == "auto" else getattr(torch, dtype))
        loaded = loaded.to(device).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise fail(f"cannot load {model!r}: {error}") from error
    with console.status("comparing a tree with plain forwards of its paths, once per model"):
        try:
            require_supported(loaded)
        except UnsupportedModelError as error:
            raise fail(str(error)) from error
    if chat and tokenizer.chat_template is None:
        raise fail(f"--chat is set, but {model!r} has no chat template")
    if chat:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat).to(device)
    inputs.pop("token_type_ids", None)
    sampling: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": not greedy}
    if not greedy:
        sampling |= {"temperature": temperature, "top_k": top_k, "top_p": top_p}

    def spell(tokens: list[int]) -> str:
        text: str = tokenizer.decode(tokens, skip_special_tokens=False)
        return text

    try:
        with TreeView(console, spell, prompt, width=width, depth=depth, pause=pause) as view:
            out = generate(
                loaded, **inputs, width=width, depth=depth, router=router, on_step=view, return_dict_in_generate=True,
                generator=torch.Generator().manual_seed(seed), **sampling,
            )  # fmt: skip
    except (OSError, ValueError, RuntimeError) as error:
        raise fail(str(error)) from error
    assert isinstance(out, LBRGenerateOutput)
    assert out.stats is not None
    text = tokenizer.decode(out.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    console.print(Panel(text, title="text", title_align="left"), highlight=False)
    # The phases of decoding alone: drawing the tree is not among them.
    ours = sum(out.stats.seconds.values())
    rows = [Measured(f"LBR K={width} L={depth}", out.stats.committed_tokens, ours, out.stats.forwarded_nodes)]
    if compare:
        torch.manual_seed(seed)
        with console.status("plain decoding"):
            began = time.perf_counter()
            plain = loaded.generate(**inputs, **sampling)
            count = plain.shape[1] - inputs["input_ids"].shape[1]
            rows.insert(0, Measured("plain", count, time.perf_counter() - began, count))
    console.print(comparison(rows))


@app.command()
def info() -> None:
    """Versions, devices, and which backend each op takes and why the others cannot run."""
    versions = Table(title="versions", title_justify="left", show_header=False)
    versions.add_row("lbr-kernels", metadata.version("lbr-kernels"))
    versions.add_row("python", platform.python_version())
    versions.add_row("torch", torch.__version__)
    versions.add_row("transformers", transformers.__version__)
    for name in ("triton", "flash-attn"):
        try:
            versions.add_row(name, metadata.version(name))
        except metadata.PackageNotFoundError:
            versions.add_row(name, "not installed")
    console.print(versions, highlight=False)

    devices = Table(title="devices", title_justify="left", show_header=False)
    devices.add_row("cpu", f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    for index in range(torch.cuda.device_count()):
        devices.add_row(f"cuda:{index}", torch.cuda.get_device_name(index))
    console.print(devices, highlight=False)

    reason = _extension.load()
    console.print(f"compiled kernels: {reason or _extension.library_path()}", highlight=False, soft_wrap=True)
    kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for kind in kinds:
        table = Table(title=f"ops on {kind}", title_justify="left")
        for column in ("op", "takes", "cannot run"):
            table.add_column(column)
        for op, reasons in ops.backends(kind).items():
            runs = [name for name, why in reasons.items() if why is None]
            # The last of the instruction sets that run is the one that "cpu" stands for.
            takes = f"cpu ({runs[-1].removeprefix('cpu-')})" if "cpu" in runs else "reference"
            refused = "\n".join(f"{name}: {why}" for name, why in reasons.items() if why is not None)
            table.add_row(op, takes, refused or "-")
        console.print(table, highlight=False)


def _processor() -> str:
    """The processor's name as the system tells it."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@app.command()
def build() -> None:
    """Compile the C++ kernels now instead of at their first use."""
    if (reason := _extension.load()) is not None:
        raise fail(reason)
    console.print(f"compiled kernels: {_extension.library_path()}", highlight=False, soft_wrap=True)
