"""Tables and plots of a benchmark run, the README's performance section, and the comparison of two runs.

    python bench/report.py show RUN.json                 the tables, on the terminal
    python bench/report.py publish RUN.json              JSON, tables, plots into bench/results/; the README's section
    python bench/report.py compare RUN.json STORED.json  fails if a ratio figure fell by more than 10 %
    python bench/report.py readme                        the README's section again, from the run that it names

Times are medians; a ratio is the median over rounds of another side's time divided by ours in the same round, so that
more than 1 means that ours is faster. The figures are read from the JSON and nowhere else.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markdown import Markdown

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
README = ROOT / "README.md"
Record = dict[str, Any]

BEGIN, END = "<!-- performance: {} -->", "<!-- /performance -->"
SDPA = "SDPA"
ALLOWED = 0.9  # of a stored ratio

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)
console = Console()


class Run:
    """One run: its records in a fixed order, and what it says of the machine."""

    def __init__(self, path: Path) -> None:
        self.path = path
        data = json.loads(path.read_text(encoding="utf-8"))
        self.date: str = data["datetime"][:10]
        self.records: list[Record] = [bench["extra_info"] for bench in data["benchmarks"]]
        self.machine: dict[str, Any] = self.records[0]

    def of(self, op: str, **wanted: Any) -> list[Record]:
        """The records of an op whose dtype and shape are as wanted; a tuple stands for any of its values."""

        def fits(record: Record) -> bool:
            found = {"dtype": record["dtype"], **record["shape"]}
            return all(found[key] in (value if isinstance(value, tuple) else (value,)) for key, value in wanted.items())

        return [record for record in self.records if record["op"] == op and fits(record)]

    def describe(self) -> str:
        """Machine, versions, date."""
        m = self.machine
        roofs = [record["roof"] for record in self.records if "roof" in record]
        spread = {
            name: f"{min(r[name] for r in roofs) / scale:.0f} to {max(r[name] for r in roofs) / scale:.0f}"
            for name, scale in (("read_bytes", 1e9), ("float32", 1e9), ("bfloat16", 1e9))
        }
        return (
            f"{m['cpu']}, {m['threads']} threads, {m['capability']}, torch {m['torch']}, transformers "
            f"{m['transformers']}, Python {m['python']}, {self.date}. Measured beside the records, the machine reads "
            f"{spread['read_bytes']} GB/s and computes {spread['float32']} GFLOP/s in fp32, {spread['bfloat16']} in "
            "bf16."
        )


def shape_of(record: Record) -> str:
    return ", ".join(f"{name} {value}" for name, value in record["shape"].items())


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def ratios(record: Record) -> dict[str, float]:
    """Every other side's time in units of ours: of a decoding step where there is one, else of the whole call."""
    if "times_per_token" in record:
        found: dict[str, float] = record["times_per_token"]
        return found
    return {name: values["median"] for name, values in record["times_as_long"].items()}


def best(record: Record, prefix: str = "") -> float:
    """The fastest of the other sides whose name begins so, in units of ours."""
    return min(value for name, value in ratios(record).items() if name.startswith(prefix))


def tables(run: Run) -> str:
    """All records as Markdown."""
    parts = [f"# {run.path.stem}", run.describe()]
    parts.append(
        "Each run alternates the sides; times and ratios are medians, in parentheses the quartiles of the ratio. "
        "`% of roof` is the least time that the machine needs for these bytes and operations, divided by ours; more "
        "than 100 means that the machine was faster in our rounds than when its roof was read."
    )
    for op in dict.fromkeys(record["op"] for record in run.records):
        parts.append(f"## {op}")
        lines = ["| shape | dtype | ours, ms | % of roof | times as long as ours |", "|---|---|--:|--:|---|"]
        for record in run.of(op):
            ours = record["seconds"]["ours"]["median"] * 1e3
            share = f"{record['percent_of_roof']:.0f}" if "percent_of_roof" in record else ""
            sides = [
                f"{name}: {number(v['median'])} ({number(v['low'])} to {number(v['high'])})"
                for name, v in record["times_as_long"].items()
            ]
            if "milliseconds_per_token" in record:
                steps = record["milliseconds_per_token"]
                ours = steps["ours"]
                sides = [
                    f"{name}: {number(value)} ({number(steps[name])} ms)"
                    for name, value in record["times_per_token"].items()
                ]
                sides.append(f"nodes per token {number(record['nodes_per_token'])}")
            elif "nodes_per_token" in record:
                nodes = record["nodes_per_token"]
                sides.append(f"nodes per token {number(nodes['True'])} instead of {number(nodes['False'])}")
            lines.append(
                f"| {shape_of(record)} | {record['dtype']} | {number(ours)} | {share} | {'<br>'.join(sides)} |"
            )
        parts.append("\n".join(lines))
    parts.append("For `generate` the times are those of a decoding step, reading the prompt taken off.")
    return "\n\n".join(parts) + "\n"


def spread(values: Iterable[float]) -> str:
    """One figure, or the range of several."""
    found = sorted(values)
    low, high = number(found[0]), number(found[-1])
    return low if low == high else f"{low} to {high}"


def performance_section(run: Run) -> str:
    """The README's section: every figure with the command that repeats it."""
    rows: list[tuple[str, str, str, str]] = []

    def row(what: str, side: str, figure: str, file: str) -> None:
        rows.append((what, side, figure, f"`{file}`"))

    grid = {"heads": ("32/8", "14/2"), "nodes": (3, 9, 12), "batch": 1}
    shares = []
    for prefix in (8192, 1024):
        for dtype, short in (("float32", "fp32"), ("bfloat16", "bf16")):
            if found := run.of("tree_attention", prefix=prefix, dtype=dtype, **grid):
                what = f"`tree_attention`, 3, 9 and 12 nodes behind {prefix} slots, {short}"
                row(what, "the fastest form of SDPA", spread(best(r, SDPA) for r in found), "bench_tree_attention.py")
                shares.append(f"{spread(r['percent_of_roof'] for r in found)} % (prefix {prefix}, {short})")
    flex = "FlexAttention, compiled"
    for dtype, short in (("float32", "fp32"), ("bfloat16", "bf16")):
        if found := [r for r in run.of("tree_attention", dtype=dtype) if flex in ratios(r)]:
            what = f"… head size 64, behind 8192 slots, {short}"
            row(what, flex, spread(best(r, flex) for r in found), "bench_tree_attention.py")
    for dtype, short in (("float32", "fp32"), ("bfloat16", "bf16"), ("float16", "fp16")):
        if found := run.of("linear", dtype=dtype, rows=(3, 9)):
            row(f"`linear`, 3 and 9 rows, {short}", "torch's", spread(map(best, found)), "bench_linear.py")
    for depth in (1, 2):
        if found := run.of("commit_", depth=depth, stored=("one tensor", "a tensor per layer")):
            what = f"`commit_`, 32 layers, L = {depth}"
            row(what, "a slice copy of the moved rows per tensor", spread(map(best, found)), "bench_commit.py")
    if found := run.of("commit_", stored="gathered"):
        what = "`commit_`, 32 layers, prefix 8192"
        row(what, "`index_select` of the cache", spread(map(best, found)), "bench_commit.py")
    for record in run.of("sample_children"):
        filters = record["shape"]["filters"]
        what = "`sample_children`, V = 151 936, K = 3, " + ("no filter" if filters == "none" else filters)
        row(what, "transformers' warpers, multinomial", number(best(record)), "bench_sample_children.py")
    if found := run.of("route"):
        row("`route`, D = 1536, K = 3, L = 1 to 3", "the router module", spread(map(best, found)), "bench_route.py")
    for width, depth in ((1, 1), (3, 1), (3, 2)):
        for dtype, short in (("float32", "fp32"), ("bfloat16", "bf16")):
            for record in run.of("generate", K=width, L=depth, dtype=dtype):
                steps = record["milliseconds_per_token"]
                what = f"`generate`, K = {width}, L = {depth}, {short}: {number(steps['ours'])} ms per token"
                for name, shown in (("model.generate", "`model.generate`"), ("naive LBR", "naive branch routing")):
                    if name in steps:
                        figure = number(steps[name] / steps["ours"])
                        row(what, f"{shown}: {number(steps[name])} ms", figure, "bench_generate.py")

    m = run.machine
    parameters = next((r["shape"]["parameters"] for r in run.of("generate")), 0) / 1e6
    trie = "; ".join(
        f"K = {r['shape']['K']}, L = {r['shape']['L']}: {number(r['nodes_per_token']['True'])} instead of "
        f"{number(r['nodes_per_token']['False'])} nodes per token, {number(best(r))} times as fast"
        for r in run.of("trie", rows=50)
    )
    lines = [
        f"Measured on {m['threads']} threads of an {m['cpu']} ({m['capability']}), torch {m['torch']}, transformers "
        f"{m['transformers']}, {run.date}. All sides run in turns and are checked against each other first; a figure "
        "says how many times as long the other side takes (median over rounds; a range is over shapes: for "
        "`tree_attention` heads 32/8 and 14/2, head sizes 64 and 128). `generate` "
        f"decodes with a random-weight Qwen2 of {parameters:.0f} M parameters behind a prompt of 256 tokens; its times "
        "are those of a decoding step.",
        "",
        "| ours | the other side | times as long | `pytest --benchmark-enable bench/…` |",
        "|---|---|--:|---|",
        *(f"| {' | '.join(cells)} |" for cells in rows),
        "",
        *_scaling(run),
        "Of the machine's roof (the least time for these bytes and operations at its measured read rate and peak) "
        f"`tree_attention` reaches {', '.join(shares)}.",
        "",
        f"The trie on the model that the demo had on that day, 50 problems at once, against the full tree: {trie}.",
        "",
        f"![Share of the machine's roof, by shape](bench/results/{run.path.stem}-attention.svg)",
        "",
        f"![Milliseconds per committed token](bench/results/{run.path.stem}-generate.svg)",
        "",
        f"All shapes: [bench/results/{run.path.stem}.md](bench/results/{run.path.stem}.md), raw data beside it. "
        "`make bench` repeats the whole, `make bench-quick` a selection.",
    ]
    return "\n".join(lines)


def _scaling(run: Run) -> list[str]:
    """How times grow with prefix and nodes; from different records, so without turns."""

    def milliseconds(op: str, **wanted: Any) -> float | None:
        found = run.of(op, **wanted)
        return 1e3 * found[0]["seconds"]["ours"]["median"] if found else None

    parts = []
    for dtype, short in (("float32", "fp32"), ("bfloat16", "bf16")):
        held = {"heads": "32/8", "head size": 64, "batch": 1, "dtype": dtype}
        one, three, far = (
            milliseconds("tree_attention", nodes=nodes, prefix=prefix, **held)
            for nodes, prefix in ((1, 8192), (3, 8192), (3, 32768))
        )
        if one and three and far:
            parts.append(
                f"{short}: three nodes take {number(three / one)} times as long as one at prefix 8192, and a prefix "
                f"four times as long takes {number(far / three)} times as long"
            )
    commits = [milliseconds("commit_", depth=1, stored="one tensor", prefix=prefix) for prefix in (1024, 8192, 16384)]
    if None not in commits:
        shown = ", ".join(f"{1e3 * value:.0f}" for value in commits if value is not None)
        parts.append(f"`commit_` (L = 1, one tensor) takes {shown} µs behind 1024, 8192 and 16384 slots")
    return [f"`tree_attention`, heads 32/8, {'; '.join(parts)}.", ""] if parts else []


def with_section(text: str, run: Run) -> str:
    """The README with the section between its marks made new from ``run``."""
    begin = BEGIN.format(f"bench/results/{run.path.name}")
    pattern = re.compile(BEGIN.format(".*?").replace("/", "/") + ".*?" + re.escape(END), flags=re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"README.md has no {BEGIN.format('...')} ... {END}")
    return pattern.sub(lambda _: f"{begin}\n{performance_section(run)}\n{END}", text)


def named_run(text: str) -> Path:
    """The file that the README's section was made from."""
    found = re.search(BEGIN.format("(.*?)"), text)
    if found is None:
        raise ValueError(f"README.md has no {BEGIN.format('...')}")
    return ROOT / found.group(1)


def regressions(run: Run, stored: Run) -> list[str]:
    """Ratio figures that fell by more than a tenth, in words."""

    def figures(one: Run) -> dict[str, float]:
        return {
            f"{record['op']}: {shape_of(record)}, {record['dtype']}; {name}": value
            for record in one.records
            for name, value in ratios(record).items()
        }

    now, before = figures(run), figures(stored)
    return [
        f"{name}: {number(now[name])}, was {number(before[name])}"
        for name in now
        if name in before and now[name] < ALLOWED * before[name]
    ]


@app.command()
def show(run: Annotated[Path, typer.Argument(exists=True, dir_okay=False)]) -> None:
    """The tables, on the terminal."""
    console.print(Markdown(tables(Run(run))))


@app.command()
def publish(
    run: Annotated[Path, typer.Argument(exists=True, dir_okay=False)],
    name: Annotated[str | None, typer.Option(help="Of the files; date, processor and threads by default.")] = None,
) -> None:
    """Keep a run: JSON, tables and plots go to bench/results/, and the README's section is made from it."""
    from plots import draw

    found = Run(run)
    m = found.machine
    cpu = re.sub(r"[^a-z0-9]+", "-", m["cpu"].lower()).strip("-")
    stem = name or f"{found.date}-{cpu}-{m['threads']}-threads"
    RESULTS.mkdir(exist_ok=True)
    kept = RESULTS / f"{stem}.json"
    if kept.resolve() != run.resolve():
        shutil.copy(run, kept)
    found = Run(kept)
    (RESULTS / f"{stem}.md").write_text(tables(found), encoding="utf-8")
    for path in draw(found, RESULTS):
        console.print(path)
    README.write_text(with_section(README.read_text(encoding="utf-8"), found))
    console.print(f"{kept}, tables beside it, README.md")


@app.command()
def readme() -> None:
    """Write the README's section again from the run that it names."""
    text = README.read_text(encoding="utf-8")
    README.write_text(with_section(text, Run(named_run(text))), encoding="utf-8")


@app.command()
def compare(
    run: Annotated[Path, typer.Argument(exists=True, dir_okay=False)],
    stored: Annotated[Path, typer.Argument(exists=True, dir_okay=False)],
) -> None:
    """Fail if a ratio figure of RUN is more than 10 % below the one in STORED; times alone are not compared."""
    worse = regressions(Run(run), Run(stored))
    for line in worse:
        console.print(line, highlight=False, soft_wrap=True)
    if worse:
        raise typer.Exit(1)
    console.print("no ratio figure fell by more than 10 %")


if __name__ == "__main__":
    app()
