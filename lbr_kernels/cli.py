"""The command line: ``lbr-kernels demo``, ``generate``, ``info`` and ``build``."""

from __future__ import annotations

import os
import platform
import sys
import textwrap
import time
from importlib import metadata
from io import TextIOWrapper
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForCausalLM, AutoTokenizer

import lbr_kernels
from lbr_kernels import ops
from lbr_kernels.decoding.adapter import UnsupportedModelError, require_supported
from lbr_kernels.decoding.generate import LBRGenerateOutput, generate
from lbr_kernels.display import TreeView, comparison, progress
from lbr_kernels.evaluation import reachability
from lbr_kernels.evaluation.demo import BATCH, Demo, Measured
from lbr_kernels.evaluation.digits import CONTINUES
from lbr_kernels.evaluation.machine import processor
from lbr_kernels.ops import _extension, _preferences

app = typer.Typer(
    help="Local Branch Routing: decode with a rolling lookahead tree.", no_args_is_help=True, add_completion=False
)
console = Console()

WIDTH = 3  # of the tree that the demo shows


@app.callback()
def _prepare() -> None:
    """Whatever a model writes can be printed: what the terminal's encoding lacks becomes a question mark."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")


def fail(message: str) -> typer.Exit:
    """Print an error in one plain line; to be raised."""
    console.print(Text.assemble(("error:", "bold red"), " ", message), soft_wrap=True)
    return typer.Exit(1)


@app.command()
def demo(
    problems: Annotated[int, typer.Option(min=2, help="Unseen problems in the table; an even number.")] = 200,
    seed: Annotated[int, typer.Option(help="Seed of problems and decoding.")] = 0,
    pause: Annotated[float, typer.Option(min=0, help="Seconds to hold a decision between different tokens.")] = 1.8,
    depth: Annotated[int, typer.Option(min=1, max=2, help="Depth of the tree that is shown.")] = 2,
) -> None:
    """Watch one problem being decoded, then see Local Branch Routing beside plain decoding.

    The task is graph reachability: follow edges from a root to the one of two targets that can be reached. The model
    (0.8 M parameters) and its routers come with the package; python/reachability/train.py trains them.
    """
    if problems % 2:
        raise fail(f"--problems is {problems}, expected an even number: problems come in twin pairs")
    with console.status("looking for a problem that is worth showing"):
        shipped = Demo()
        first = shipped.problem_to_show(width=WIDTH, depth=depth, seed=seed)
    prompt = shipped.prompts([first])
    text = reachability.to_text(prompt[0].tolist(), shipped.options)
    title = "the edges, two targets, and the root; greedy decoding gets this one wrong"
    console.print(Panel(Text(text), title=title, title_align="left"))

    def spell(tokens: list[int]) -> str:
        return reachability.to_text(tokens, shipped.options).replace(CONTINUES, "")

    question = text.split(",")[-1].strip() + " "
    with TreeView(console, spell, question, width=WIDTH, depth=depth, pause=pause) as view:
        generator = torch.Generator().manual_seed(seed)
        out = shipped.lbr(prompt, width=WIDTH, depth=depth, generator=generator, on_step=view)
    verdict = reachability.check_answer(first, shipped.answers(out.sequences)[0], shipped.options)
    right = reachability.to_text(reachability.node_ids(first.answer, shipped.options), shipped.options)
    said = "correct" if verdict.correct else "legal, wrong target" if verdict.legal else "not a path of the graph"
    console.print(f"answer: [bold]{said}[/] (the reachable target is {right})\n", highlight=False)

    rows: list[Measured] = []
    with progress(console) as bar:
        task = bar.add_task(f"{problems} unseen problems, each way", total=None)
        for rows in shipped.compare(problems, seed=seed):
            bar.update(task, completed=sum(row.problems for row in rows), total=problems * len(rows))
    console.print(comparison(rows))
    console.print(
        f"The same model in every row, sampled at temperature 1 but for the greedy one; {problems} problems of 1 to "
        f"{shipped.options.max_hops} hops on graphs it was not trained on, {BATCH} at a time, seed {seed}, "
        f"{torch.get_num_threads()} CPU thread(s). Equal draws are forwarded once; nodes are counted so. "
        "The problem above was picked: greedy decoding gets it wrong, and this tree right.",
        style="dim",
        highlight=False,
    )


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
    pause: Annotated[float, typer.Option(min=0, help="Seconds to hold a decision between different tokens.")] = 0.0,
    compare: Annotated[bool, typer.Option(help="Also time plain decoding.")] = True,
) -> None:
    """Decode a prompt with any checkpoint, the tree rolling on the terminal; then the cost beside plain decoding."""
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise fail(f"--dtype is {dtype!r}, expected auto, float32, bfloat16 or float16")
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:
        raise fail(f"--device is {device!r}: {str(error).splitlines()[0]}") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype if dtype == "auto" else getattr(torch, dtype))
        loaded = loaded.to(device).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise fail(f"cannot load {model!r}: {textwrap.shorten(str(error), 300, placeholder=' ...')}") from error
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
    console.print(Panel(Text(text), title="text", title_align="left"))
    # The phases of decoding alone: drawing the tree is not among them.
    ours = Measured(f"LBR K={width} L={depth}")
    ours.add(out.stats.committed_tokens, out.stats.forwarded_nodes, sum(out.stats.seconds.values()))
    rows = [ours]
    if compare:
        torch.manual_seed(seed)
        with console.status("plain decoding"):
            began = time.perf_counter()
            plain = loaded.generate(**inputs, **sampling)
            count = plain.shape[1] - inputs["input_ids"].shape[1]
            rows.insert(0, Measured("plain"))
            rows[0].add(count, count, time.perf_counter() - began)
    console.print(comparison(rows))


@app.command()
def info() -> None:
    """Versions, devices, and which backend each op takes and why the others cannot run."""
    versions = Table(title="versions", title_justify="left", show_header=False)
    versions.add_row("lbr-kernels", lbr_kernels.__version__)
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
    devices.add_row("cpu", f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    for index in range(torch.cuda.device_count()):
        devices.add_row(f"cuda:{index}", torch.cuda.get_device_name(index))
    console.print(devices, highlight=False)

    reason = _extension.CPU.load()
    console.print(Text(f"compiled kernels: {reason or _extension.CPU.library_path()}"), soft_wrap=True)
    if torch.cuda.is_available() and (library := _extension.CUDA.library_path()) is not None:
        console.print(Text(f"compiled kernels for CUDA: {library}"), soft_wrap=True)
    if not torch.cuda.is_available():
        why = ops.backends("cuda")["tree_attention"]["cuda"]
        console.print(Text(f"no op runs on cuda: {_cause(why)}"), soft_wrap=True)
    for kind in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        table = Table(title=f"ops on {kind}", title_justify="left")
        for column in ("op", "takes", "cannot run"):
            table.add_column(column)
        for op, reasons in ops.backends(kind).items():
            # What is for another kind of device says nothing about this one.
            of_kind = {name: _cause(why) for name, why in reasons.items() if name.startswith("cpu") == (kind == "cpu")}
            whys = dict.fromkeys(why for why in of_kind.values() if why)
            refused = "\n".join(", ".join(n for n, w in of_kind.items() if w == why) + f": {why}" for why in whys)
            table.add_row(op, _takes(op, kind, reasons), Text(refused or "-"))
        console.print(table, highlight=False)


def _cause(reason: str | None) -> str:
    """Why a backend cannot run, without what a message recommends in its place; nothing if it can."""
    return (reason or "").split("; the nearest")[0]


def _takes(op: str, kind: str, reasons: dict[str, str | None]) -> str:
    """What an op runs on by default, and why that."""
    runs = [name for name, why in reasons.items() if why is None and name != "reference"]
    if kind == "cpu" and "cpu" in runs:
        # The last of the instruction sets that run is the one that "cpu" stands for.
        return f"cpu ({[name for name in runs if name.startswith('cpu')][-1].removeprefix('cpu-')})"
    if kind == "cpu" or not runs:
        return "reference: no kernel runs"
    if len(runs) == 1:
        return f"{runs[0]}, the only kernel that runs"
    source = _preferences.source(op)
    by_shape = ", by shape" if op == "tree_attention" else ""
    return f"{' or '.join(runs)}{by_shape}: {'not measured yet, cuda first' if source is None else source}"


@app.command()
def build() -> None:
    """Compile the kernels now instead of at their first use: the CPU's, and CUDA's where there is a GPU."""
    libraries = [_extension.CPU, *([_extension.CUDA] if torch.cuda.is_available() else [])]
    for library in libraries:
        if (reason := library.load()) is not None:
            raise fail(reason)
        console.print(Text(f"compiled kernels: {library.library_path()}"), soft_wrap=True)
