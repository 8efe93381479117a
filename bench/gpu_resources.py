"""What the GPU kernels need, CUDA C++ and Triton: registers, spills, shared memory, blocks per multiprocessor.

    bench/gpu_resources.py check         compile, compare with bench/results/gpu-resources.json; needs nvcc, no GPU
    bench/gpu_resources.py check --full  Triton's kernels for every architecture, not each for one of them in turn
    bench/gpu_resources.py update        compile all, keep the result

Contract
--------
``check`` fails where a kernel spills a register, where fewer of its blocks fit a multiprocessor, or where, by the same
compilers, it takes more registers or shared memory than what is kept. Where a compiler is missing it says so and
passes. The times are those of one architecture on this machine.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.table import Table
from triton_resources import ARCHITECTURES

from lbr_kernels.ops import _extension

Record = dict[str, Any]

RESULTS = Path(__file__).parent / "results"
KEPT = RESULTS / "gpu-resources.json"
TILES = Path(__file__).parent / "tile_shapes.cpp"
UNIT_BYTES = {"Unit16": 16, "m": 8, "j": 4, "t": 2, "h": 1}
ARCHITECTURES_ORDER = {f"sm_{arch}": arch for arch in ARCHITECTURES}
TYPES = {"f": "fp32", "Half": "fp16", "BFloat16": "bf16"}


class Kernel(NamedTuple):
    """A kernel's instantiations: how their symbols look, what the table calls one, where its shared bytes are found.

    ``label`` and ``shape`` are given the match; ``shape`` makes a key of :func:`shared_bytes`, None without any.
    """

    symbol: re.Pattern[str]
    warps: int
    label: Callable[[re.Match[str]], str]
    shape: Callable[[re.Match[str]], tuple[str, ...] | None]


def _tree_attention_label(found: re.Match[str]) -> str:
    heads = f"d{found[2]}" if int(found[4]) else f"d<={found[2]}"
    return f"tree_attention {TYPES[found[1]]} {heads} rows {found[3]}"


KERNELS = (
    Kernel(
        re.compile(r"tree_attention_kernelINS0_\d+(Half|BFloat16)ELi(\d+)ELi(\d+)ELb([01])EE"),
        4,
        _tree_attention_label,
        lambda found: ("tree_attention", found[2], found[3]),
    ),
    Kernel(
        re.compile(r"sample_children_kernelI(?:NS0_\d+)?(f|Half|BFloat16)E"),
        16,
        lambda found: f"sample_children {TYPES[found[1]]}",
        lambda found: ("sample_children",),
    ),
    Kernel(
        re.compile(r"commit_kernelI(?:N\w*?)?(Unit16|[mjth])E"),
        4,
        lambda found: f"commit {UNIT_BYTES[found[1]]} bytes at a time",
        lambda found: None,
    ),
    Kernel(
        re.compile(r"route_kernelILb([01])ELi([12])EE"),
        12,
        lambda found: f"route dim<={128 * int(found[2])}, weights {'on chip' if int(found[1]) else 'streamed'}",
        lambda found: ("route", found[1], str(128 * int(found[2]))),
    ),
)

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
console = Console(width=150)


def shared_bytes() -> dict[tuple[str, ...], int]:
    """By kernel and what tells its shapes apart, as the headers in csrc/cuda compute them."""
    shim = Path(__file__).parent.parent / "tests" / "simt"
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder) / "tiles")
        csrc = _extension.source_dir()
        include = [f"-I{csrc}", f"-I{csrc / 'cuda'}", f"-I{shim}"]
        compiler = os.environ.get("CXX", "c++")
        sources = [str(TILES), str(shim / "simt.cpp")]
        flags = ["-std=c++17", "-DLBR_SIMT", "-fno-strict-aliasing"]
        subprocess.run([compiler, *flags, *include, *sources, "-o", program], check=True)
        lines = subprocess.run([program], check=True, capture_output=True, text=True).stdout.splitlines()
    return {tuple(shape): int(size) for *shape, size in map(str.split, lines)}


def cuda_resources(architectures: list[int]) -> tuple[list[Record], dict[str, float]]:
    """A record per kernel and architecture, and the seconds that compiling for each took, two files at a time."""
    sources = [path for path in _extension.CUDA.sources() if path.suffix == ".cu"]
    shared, records, seconds = shared_bytes(), [], {}
    for arch in architectures:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:

            def assemble(source: Path, arch: int = arch, folder: str = folder) -> str:
                flags = [*_extension.CUDA.nvcc_flags(), f"-arch=sm_{arch}", "-Xptxas", "-v", "-c"]
                target = str(Path(folder) / f"{source.stem}.o")
                command = ["nvcc", *flags, str(source), "-o", target]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    raise RuntimeError(f"nvcc failed on {source.name} for sm_{arch}:\n{done.stdout}{done.stderr}")
                return done.stdout + done.stderr

            reports = list(pool.map(assemble, sources))
        seconds[f"sm_{arch}"] = time.perf_counter() - start
        for report in reports:
            for entry in report.split("Compiling entry function")[1:]:
                kernel, found = next((k, found) for k in KERNELS if (found := k.symbol.search(entry)))
                (registers,) = re.findall(r"Used (\d+) registers", entry)
                spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", entry))
                shape = kernel.shape(found)
                size = shared[shape] if shape else 0
                records.append(
                    {
                        "kernel": f"cuda {kernel.label(found)}",
                        "arch": f"sm_{arch}",
                        "registers": int(registers),
                        "spill_bytes": spilled,
                        "shared_bytes": size,
                        "blocks_per_sm": ARCHITECTURES[arch].fits(int(registers), size, kernel.warps),
                    }
                )
    return sorted(records, key=lambda r: (ARCHITECTURES_ORDER[r["arch"]], r["kernel"])), seconds


def measure(*, full: bool) -> dict[str, Any]:
    """Everything, with the compilers' versions; without ``full`` each Triton kernel for one architecture only."""
    import triton
    from triton_resources import in_turn, resources, resources_of

    architectures = list(ARCHITECTURES)
    cuda, seconds = cuda_resources(architectures)
    start = time.perf_counter()
    compiled = resources(architectures=architectures) if full else resources_of(in_turn())
    seconds["triton"] = time.perf_counter() - start
    kernels = [
        *cuda,
        *(
            {**{k: v for k, v in record.items() if k != "compile_seconds"}, "kernel": f"triton {record['kernel']}"}
            for record in compiled
        ),
    ]
    nvcc = subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True).stdout
    version = re.search(r"release .*", nvcc)
    assert version is not None
    return {"versions": {"nvcc": version[0], "triton": triton.__version__}, "seconds": seconds, "kernels": kernels}


def worse(now: dict[str, Any], kept: dict[str, Any]) -> list[str]:
    """What is worse than what is kept, one line each."""
    before = {(r["kernel"], r["arch"]): r for r in kept["kernels"]}
    lines = []
    for record in now["kernels"]:
        name = f"{record['kernel']} on {record['arch']}"
        if record["spill_bytes"]:
            lines.append(f"{name} spills {record['spill_bytes']} bytes, expected none")
        if not record["blocks_per_sm"]:
            lines.append(f"{name} does not fit a multiprocessor")
        old = before.get((record["kernel"], record["arch"]))
        if old is None:
            lines.append(f"{name} is not in {KEPT.name}; `make gpu-resources` adds it")
            continue
        if record["blocks_per_sm"] < old["blocks_per_sm"]:
            lines.append(
                f"{name}: {record['blocks_per_sm']} blocks per multiprocessor, expected {old['blocks_per_sm']}"
            )
        compiler = record["kernel"].split()[0].replace("cuda", "nvcc")
        if now["versions"][compiler] == kept["versions"][compiler]:
            lines += [
                f"{name}: {record[key]} {key.replace('_', ' ')}, expected at most {old[key]}"
                for key in ("registers", "shared_bytes")
                if record[key] > old[key]
            ]
    missing = before.keys() - {(r["kernel"], r["arch"]) for r in now["kernels"]}
    return lines + [f"{kernel} on {arch} is kept, but is no kernel any more" for kernel, arch in sorted(missing)]


def table(data: dict[str, Any]) -> Table:
    """One row per kernel; each cell has registers, KiB of shared memory, and blocks per multiprocessor."""
    architectures = list(ARCHITECTURES_ORDER)
    made = Table(
        title="registers · spilled bytes · KiB of shared memory · blocks per multiprocessor", title_justify="left"
    )
    for column in ("kernel", *architectures):
        made.add_column(column)
    for kernel in dict.fromkeys(r["kernel"] for r in data["kernels"]):
        cells = {r["arch"]: r for r in data["kernels"] if r["kernel"] == kernel}
        made.add_row(kernel, *(_cell(cells[arch]) if arch in cells else "" for arch in architectures))
    return made


def _cell(record: Record) -> str:
    kib = round(record["shared_bytes"] / 1024)
    return f"{record['registers']} · {record['spill_bytes']} · {kib} · {record['blocks_per_sm']}"


def page(data: dict[str, Any]) -> str:
    """The table in Markdown, with what compiling took."""
    versions, seconds = data["versions"], data["seconds"]
    architectures = list(ARCHITECTURES_ORDER)
    lines = [
        "# What the GPU kernels take of a GPU",
        "",
        f"Compiled by nvcc ({versions['nvcc']}) and Triton {versions['triton']}; made by `make gpu-resources`, "
        "compared by `make gpu-check`, which fails where a kernel spills or gets worse. A cell has registers per "
        "thread, spilled bytes, KiB of shared memory per block, and blocks that fit a multiprocessor. A kernel for "
        "`d<=128` takes all head sizes up to that.",
        "",
        f"| kernel | {' | '.join(architectures)} |",
        f"|---|{'---|' * len(architectures)}",
    ]
    for kernel in dict.fromkeys(r["kernel"] for r in data["kernels"]):
        cells = {r["arch"]: r for r in data["kernels"] if r["kernel"] == kernel}
        lines.append(f"| {kernel} | {' | '.join(_cell(cells[arch]) for arch in architectures)} |")
    took = ", ".join(f"{seconds[arch]:.0f} s for {arch}" for arch in architectures)
    lines += ["", f"nvcc took {took}, two files at a time on two cores of the machine that made this page.", ""]
    return "\n".join(lines)


def in_gate(kept: dict[str, Any]) -> dict[str, Any]:
    """Of what is kept that which ``check`` compiles without ``--full``; all of a kernel that there is no more."""
    from triton_resources import KERNELS as TRITON_KERNELS
    from triton_resources import in_turn

    wanted = {(f"triton {name}", f"sm_{arch}") for name, arch in in_turn()}
    known = {f"triton {name}" for name in TRITON_KERNELS}
    kernels = [r for r in kept["kernels"] if r["kernel"] not in known or (r["kernel"], r["arch"]) in wanted]
    return {**kept, "kernels": kernels}


@app.command()
def check(
    full: Annotated[bool, typer.Option("--full", help="Every Triton kernel for every architecture.")] = False,
) -> None:
    """Compile and fail where a kernel has become worse."""
    if shutil.which("nvcc") is None:
        console.print("nvcc is not installed: the GPU kernels were not compiled")
        return
    now = measure(full=full)
    console.print(table(now))
    console.print(", ".join(f"{name}: {took:.0f} s" for name, took in now["seconds"].items()), highlight=False)
    kept = json.loads(KEPT.read_text(encoding="utf-8"))
    lines = worse(now, kept if full else in_gate(kept))
    for line in lines:
        console.print(line, style="red", highlight=False)
    raise typer.Exit(bool(lines))


@app.command()
def update(to: Annotated[Path, typer.Option(help="Where the result is kept.")] = KEPT) -> None:
    """Compile everything and keep the result."""
    now = measure(full=True)
    console.print(table(now))
    to.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
    to.with_suffix(".md").write_text(page(now), encoding="utf-8")


if __name__ == "__main__":
    app()
