"""The command line: ``lbr-kernels demo``, ``generate``, ``trace``, ``info`` and ``build``."""

from __future__ import annotations

import os
import platform
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from io import TextIOWrapper
from pathlib import Path
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
from lbr_kernels.decoding.loop import DecodingStats, StepView
from lbr_kernels.decoding.trajectory import DecodingSettings, TreeTrajectory
from lbr_kernels.display import Decode, TreeView, comparison, progress
from lbr_kernels.evaluation import reachability
from lbr_kernels.evaluation.demo import BATCH, DEPTHS, Demo, Measured
from lbr_kernels.evaluation.digits import CONTINUES
from lbr_kernels.evaluation.machine import processor
from lbr_kernels.files import check_place
from lbr_kernels.ops import _extension, _preferences
from lbr_kernels.router import Router
from lbr_kernels.trace import Trace, check_size, write_page

app = typer.Typer(
    help="Local Branch Routing: decode with a rolling lookahead tree.", no_args_is_help=True, add_completion=False
)
console = Console()

WIDTH = 3  # of the tree that the demo shows

# Options that commands have in common.
Prompt = Annotated[str, typer.Option(help="The text to go on from.")]
RouterName = Annotated[str | None, typer.Option(help="A router's directory or Hub id; uniform by default.")]
Width = Annotated[int, typer.Option(min=1, help="K, candidates per token.")]
Depth = Annotated[int, typer.Option(min=1, help="L, layers of the tree.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="At most.")]
Greedy = Annotated[bool, typer.Option("--greedy", help="Most likely candidates and choice, nothing drawn.")]
# None is what is not given, so that --greedy can be refused beside what is.
Temperature = Annotated[float | None, typer.Option(min=1e-4, show_default="1.0")]
TopK = Annotated[int | None, typer.Option(min=0, help="0: off.", show_default="0")]
TopP = Annotated[float | None, typer.Option(min=0, max=1, show_default="1.0")]
Seed = Annotated[
    int, typer.Option(min=0, max=2**63 - 1, help="Seed of all that is drawn, the demo's problems included.")
]
Pause = Annotated[float, typer.Option(min=0, help="Seconds to hold a decision between different tokens.")]
Chat = Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, ...")]


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
    seed: Seed = 0,
    pause: Pause = 1.8,
    depth: Annotated[int, typer.Option(min=1, max=2, help="Depth of the tree that is shown.")] = 2,
) -> None:
    """Watch one problem being decoded, then see Local Branch Routing beside plain decoding.

    The task is graph reachability: follow edges from a root to the one of two targets that can be reached. The model
    (0.8 M parameters) and its routers come with the package; python/reachability/synthetic.py trains them.
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
    question = text.split(",")[-1].strip() + " "
    with TreeView(console, _speller(shipped), question, width=WIDTH, depth=depth, pause=pause) as view:
        generator = torch.Generator().manual_seed(seed)
        out = shipped.lbr(prompt, width=WIDTH, depth=depth, generator=generator, on_step=view)
    said, right = _verdict(shipped, first, out)
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


def _speller(shipped: Demo) -> Decode:
    """Tokens of the demo as text; a digit that continues a number looks like any other."""
    return lambda tokens: reachability.to_text(tokens, shipped.options).replace(CONTINUES, "")


def _verdict(shipped: Demo, problem: reachability.Problem, out: LBRGenerateOutput) -> tuple[str, str]:
    """What the first row's answer is, and what the right one is."""
    verdict = reachability.check_answer(problem, shipped.answers(out.sequences)[0], shipped.options)
    said = "correct" if verdict.correct else "legal, wrong target" if verdict.legal else "not a path of the graph"
    return said, reachability.to_text(reachability.node_ids(problem.answer, shipped.options), shipped.options)


@dataclass
class Subject:
    """A model, and what it is to go on from."""

    name: str
    model: Any
    decode: Decode  # special tokens included
    read: Decode  # special tokens left out
    prompt: str
    inputs: dict[str, Any]


def _load(model: str, prompt: str, *, chat: bool, dtype: str, device: str) -> Subject:
    """A checkpoint with a prompt, checked to hold a tree; what is wrong is printed."""
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

    def decode(tokens: list[int], *, skip_special_tokens: bool = False) -> str:
        text: str = tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)
        return text

    return Subject(model, loaded, decode, partial(decode, skip_special_tokens=True), prompt, dict(inputs))


def _public_name(name: str) -> str:
    """A page is passed on: where a directory lies on this machine is nobody else's business."""
    if not Path(name).is_dir():
        return name
    # "." has a name of its own, and links keep theirs.
    return Path(os.path.abspath(name)).name


@dataclass(frozen=True)
class Drawing:
    """How tokens and choices come about, as the options say; None where one is not given."""

    greedy: bool
    temperature: float | None
    top_k: int | None
    top_p: float | None
    seed: int

    def __post_init__(self) -> None:
        given = [name for name in ("temperature", "top_k", "top_p") if getattr(self, name) is not None]
        if self.greedy and given:
            option = given[0].replace("_", "-")
            raise typer.BadParameter(f"--{option} is given with --greedy, which draws nothing; expected one of them")

    def arguments(self) -> dict[str, Any]:
        """As arguments of ``generate``; a model's own settings do not take the place of what is not given."""
        if self.greedy:
            return {"do_sample": False}
        filters = {
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_k": self.top_k or 0,
            "top_p": 1.0 if self.top_p is None else self.top_p,
        }
        return {"do_sample": True, **filters}


def _how_drawn(settings: DecodingSettings, seed: int) -> str:
    """What shaped the draws, the model's own settings included, of which the options say nothing."""
    filters = dict(settings.filters)
    processors = ", ".join(filters.pop("processors", []))
    if settings.mode == "deterministic":
        return "no, likeliest" + (f" behind {processors}" if processors else "")
    # A temperature of 1 is no filter; among processors there may be one, whose value is not known.
    first = f"behind {processors}" if processors else f"at temperature {filters.pop('temperature', 1.0):g}"
    others = [f"{name.replace('_', '-')} {value:g}" for name, value in filters.items()]
    return ", ".join([first, *others, f"seed {seed}"])


def _decode(
    subject: Subject,
    drawing: Drawing,
    max_new_tokens: int,
    *,
    width: int,
    depth: int,
    router: Router | None,
    on_step: Callable[[StepView], None],
) -> tuple[LBRGenerateOutput, DecodingStats, TreeTrajectory]:
    """Local Branch Routing behind the prompt."""
    out = generate(
        subject.model, **subject.inputs, width=width, depth=depth, router=router, on_step=on_step,
        return_dict_in_generate=True, generator=torch.Generator().manual_seed(drawing.seed),
        max_new_tokens=max_new_tokens, **drawing.arguments(),
    )  # fmt: skip
    assert isinstance(out, LBRGenerateOutput)
    assert out.stats is not None
    assert out.trajectory is not None
    return out, out.stats, out.trajectory


def _router(name: str | None, subject: Subject) -> Router | None:
    """The router of that name, where the model is; what is wrong is printed."""
    if name is None:
        return None
    try:
        return Router.from_pretrained(name).to(subject.model.device).eval()
    except (OSError, ValueError, RuntimeError) as error:
        reason = textwrap.shorten(str(error), 300, placeholder=" ...")
        raise fail(f"--router is {name!r}, expected a router's directory or Hub id: {reason}") from error


def _demo_subject(shipped: Demo, problem: reachability.Problem) -> Subject:
    """The demo's model on one of its problems."""
    ids, spell = shipped.prompts([problem]), _speller(shipped)
    text = reachability.to_text(ids[0].tolist(), shipped.options) + " "
    return Subject("graph reachability, the demo's", shipped.model, spell, spell, text, {"input_ids": ids})


@app.command(name="generate")
def generate_command(
    model: Annotated[str, typer.Option(help="A transformers causal LM: a directory or a Hub id.")],
    prompt: Prompt,
    router: RouterName = None,
    width: Width = 3,
    depth: Depth = 1,
    max_new_tokens: MaxNewTokens = 64,
    greedy: Greedy = False,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = 0,
    chat: Chat = False,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    pause: Pause = 0.0,
    compare: Annotated[bool, typer.Option(help="Also time plain decoding.")] = True,
) -> None:
    """Decode a prompt with any checkpoint, the tree rolling on the terminal; then the cost beside plain decoding."""
    drawing = Drawing(greedy, temperature, top_k, top_p, seed)
    subject = _load(model, prompt, chat=chat, dtype=dtype, device=device)
    routes = _router(router, subject)
    try:
        with TreeView(console, subject.decode, subject.prompt, width=width, depth=depth, pause=pause) as view:
            out, stats, _ = _decode(
                subject, drawing, max_new_tokens, width=width, depth=depth, router=routes, on_step=view
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise fail(str(error)) from error
    prompt_length = subject.inputs["input_ids"].shape[1]
    text = subject.read(out.sequences[0, prompt_length:].tolist())
    console.print(Panel(Text(text), title="text", title_align="left"))
    # The phases of decoding alone: drawing the tree is not among them.
    ours = Measured(f"LBR K={width} L={depth}")
    ours.add(stats.committed_tokens, stats.forwarded_nodes, sum(stats.seconds.values()))
    rows = [ours]
    if compare:
        torch.manual_seed(seed)
        with console.status("plain decoding"):
            began = time.perf_counter()
            plain = subject.model.generate(**subject.inputs, max_new_tokens=max_new_tokens, **drawing.arguments())
            count = plain.shape[1] - prompt_length
            rows.insert(0, Measured("plain"))
            rows[0].add(count, count, time.perf_counter() - began)
    console.print(comparison(rows))


@app.command()
def trace(
    html: Annotated[Path, typer.Option(help="The file to write.")] = Path("trace.html"),
    model: Annotated[str | None, typer.Option(help="A transformers causal LM; the demo's by default.")] = None,
    prompt: Annotated[str | None, typer.Option(help="The text to go on from, with --model.")] = None,
    router: RouterName = None,
    width: Width = WIDTH,
    depth: Depth = 2,
    max_new_tokens: MaxNewTokens = 24,
    greedy: Greedy = False,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = 0,
    chat: Chat = False,
    dtype: Dtype = "auto",
    device: Device = "cpu",
) -> None:
    """Write one decode as an HTML file in which it is stepped through: grow, route, prune, shift.

    Tokens, probabilities and what the hidden states say, node by node; the file needs no network and no other file.
    By default the demo's model decodes an unseen problem, with its own router of depth 1 or 2; what is for checkpoints
    goes with --model. A page holds trees of up to 64 slots and texts of up to 256 tokens, and of each node's next
    tokens the five likeliest.
    """
    drawing = Drawing(greedy, temperature, top_k, top_p, seed)
    of_checkpoints = {
        "prompt": prompt is not None, "router": router is not None, "chat": chat, "dtype": dtype != "auto",
        "device": device != "cpu",
    }  # fmt: skip
    if model is None and any(of_checkpoints.values()):
        given = [name for name, is_given in of_checkpoints.items() if is_given]
        raise fail(f"--{given[0]} is given without --model, expected both or neither")
    if model is not None and prompt is None:
        raise fail("--model is given without --prompt, expected both or neither")
    if model is None and depth not in DEPTHS:
        raise fail(
            f"--depth is {depth}, expected {' or '.join(map(str, DEPTHS))}: the demo's model has routers for these"
        )
    try:
        check_size(width, depth, max_new_tokens)
        check_place(html)
    except ValueError as error:
        raise fail(str(error)) from error
    except OSError as error:
        raise fail(
            f"--html is {str(html)!r}: {error.strerror}; expected a regular file, or none yet, in a directory that can "
            "be written to"
        ) from error
    routes: Router | None
    judge: Callable[[LBRGenerateOutput], tuple[str, str]] | None
    if model is None or prompt is None:
        with console.status("looking for a problem that is worth showing"):
            shipped = Demo()
            problem = shipped.problem_to_show(width=width, depth=depth, seed=seed)
        subject = _demo_subject(shipped, problem)
        routes, route_name = shipped.routers[depth], "the demo's"
        max_new_tokens = min(max_new_tokens, shipped.options.max_answer_length)
        judge = partial(_verdict, shipped, problem)
    else:
        subject = _load(model, prompt, chat=chat, dtype=dtype, device=device)
        routes = _router(router, subject)
        route_name = "none, uniform" if router is None else _public_name(router)
        judge = None
    ids = subject.inputs["input_ids"][0].tolist()
    recorded = Trace(subject.model, subject.decode, ids, width=width, depth=depth, max_new_tokens=max_new_tokens)
    try:
        with console.status("decoding"):
            out, stats, trajectory = _decode(
                subject, drawing, max_new_tokens, width=width, depth=depth, router=routes, on_step=recorded
            )
        facts = [
            ("model", _public_name(subject.name)),
            ("tree", f"{width} wide, {depth} deep"),
            ("router", route_name),
            ("drawn", _how_drawn(trajectory.settings, seed)),
            ("forwarded", f"{stats.nodes_per_token:.1f} nodes per token"),
        ]
        routed, note = routes is not None, ""
        if judge is not None:
            said, right = judge(out)
            note = f"Which of the two targets can be reached? It is {right}; the answer is {said}."
        document = recorded.document(
            subject.prompt, facts=facts, routed=routed, settings=trajectory.settings, note=note
        )
        write_page(html, document)
    except (OSError, ValueError, RuntimeError) as error:
        raise fail(str(error)) from error
    size = html.stat().st_size / 1024
    console.print(Text(f"written: {html} ({size:.0f} KiB, {stats.committed_tokens} steps)"), soft_wrap=True)
    console.print("Open it in a browser: arrow keys step through it, point at a node to see what it had to show.")


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
