"""What the Triton kernels need on a GPU: registers, spills, shared memory, and how many programs fit a multiprocessor.

Contract
--------
No GPU is needed: kernels are compiled ahead of time, from the very arguments that a call would launch them with (on
the meta device), and Triton's own ``ptxas`` reports on the result. Kernels may not spill; ``main`` fails if one does.

Do not set ``TRITON_INTERPRET``: there would be nothing to compile.
"""

from __future__ import annotations

import math
import multiprocessing
import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from lbr_kernels.ops import (
    commit_triton,
    packed_tree_attention_triton,
    route_triton,
    sample_children_triton,
    tree_attention_triton,
)
from lbr_kernels.ops._triton_support import Launch
from lbr_kernels.ops.route import weight_shapes
from lbr_kernels.ops.tree_shape import num_slots

POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float64: "*fp64",
    torch.bool: "*i1",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
MULTIPROCESSORS = 132


class Multiprocessor(NamedTuple):
    """What programs on one multiprocessor share (CUDA's table of technical specifications per compute capability)."""

    shared_bytes: int
    registers: int = 65536
    warps: int = 64
    programs: int = 32

    def fits(self, registers: int, shared_bytes: int, warps: int) -> int:
        """How many programs run at a time: registers are dealt to warps by 256, and each program costs 1 KiB more."""
        per_warp = -(-registers * 32 // 256) * 256
        return min(
            self.programs,
            self.warps // warps,
            self.registers // (per_warp * warps),
            self.shared_bytes // (shared_bytes + 1024),
        )


ARCHITECTURES = {
    80: Multiprocessor(164 * 1024),
    90: Multiprocessor(228 * 1024),
    100: Multiprocessor(228 * 1024),
}


def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def tree_attention_launch(
    rows: int, head_size: int, dtype: torch.dtype, *, value_size: int | None = None, features: bool = False
) -> Launch:
    """A call with 8 key heads and one node for each of ``rows``, long enough to be split; with all features or none."""
    B, Hk, T, S = 2, 8, rows, 8192
    value_size = value_size or head_size

    extras: dict[str, Any] = {}
    if features:
        extras = {
            "num_nodes": meta(B, dtype=torch.int32),
            "window": 512,
            "softcap": 30.0,
            "sinks": meta(Hk, dtype=torch.float32),
            "alibi_slopes": meta(Hk, dtype=torch.float32),
            "flag": meta(1, dtype=torch.int32),
        }
    return tree_attention_triton.launch(
        meta(B, Hk, rows, head_size, dtype=dtype),
        meta(B, Hk, S, head_size, dtype=dtype),
        meta(B, Hk, S, value_size, dtype=dtype),
        meta(B, dtype=torch.int32),
        meta(B, T, -(-T // 64), dtype=torch.int64),
        meta(B, Hk, rows, value_size, dtype=dtype),
        meta(B, Hk, rows, dtype=torch.float32),
        multiprocessors=MULTIPROCESSORS,
        **extras,
    )


def source(kernel: Any, arguments: dict[str, Any]) -> ASTSource:
    """The kernel specialised as a launch with these arguments specialises it."""
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}

    def kind(value: Any, place: tuple[int, ...], annotation: str, *, constant: bool, specialised: bool) -> Any:
        if constant or value is None or (specialised and type(value) is int and value == 1):
            constants[place] = value
            return "constexpr"
        if isinstance(value, tuple):  # Triton specialises their elements always
            return tuple(kind(item, (*place, i), "", constant=False, specialised=True) for i, item in enumerate(value))
        is_pointer = hasattr(value, "data_ptr")
        if specialised and (is_pointer or (type(value) is int and value % 16 == 0)):
            attributes[place] = [["tt.divisibility", 16]]
        if is_pointer:
            return POINTERS[value.dtype]
        if annotation:
            return annotation
        return "fp32" if isinstance(value, float) else "i32" if -(2**31) <= value < 2**31 else "i64"

    for parameter in kernel.params:
        signature[parameter.name] = kind(
            arguments[parameter.name],
            (parameter.num,),
            parameter.annotation_type,
            constant=parameter.is_constexpr,
            specialised=not parameter.do_not_specialize,
        )
    return ASTSource(kernel, signature, constants, attributes)


def assembler_report(ptx: str, arch: int) -> tuple[int, int]:
    """Registers per thread, and bytes that are spilled (stored and loaded), as ``ptxas`` says."""
    target = re.search(r"^\.target\s+(\w+)", ptx, re.MULTILINE)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx, encoding="utf-8")
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={target[1]}", str(path), "-o", str(path.with_suffix(".o"))]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    (registers,) = re.findall(r"Used (\d+) registers", said)
    return int(registers), sum(int(n) for n in re.findall(r"(\d+) bytes spill", said))


def commit_launch(layers: int, heads: int, head_size: int, dtype: torch.dtype, *, moves: int) -> Launch:
    """Keys and values of so many layers; each row has its number of moves."""
    caches = [meta(2, heads, 4096, head_size, dtype=dtype) for _ in range(2 * layers)]
    lens, sources, word = (meta(*shape, dtype=torch.int32) for shape in ((2,), (2, moves), (1,)))
    return commit_triton.launch(caches, lens, sources, lens, num_moves=lens, flag=word)


def sample_launch(dtype: torch.dtype, *, filters: str = "none", draws: bool = True) -> Launch:
    """Nine rows of a vocabulary of 151936, three children each."""
    numbers = (0.6, 50, 0.95, 0.0) if filters == "numbers" else (1.0, 0, 1.0, 0.0)
    return sample_children_triton.launch(
        meta(9, 151936, dtype=dtype),
        meta(9, 3, dtype=torch.float64) if draws else None,
        3,
        numbers,
        row_filters=meta(9, 4, dtype=torch.float64) if filters == "rows" else None,
        row_index=meta(9, dtype=torch.int64),
        flag=meta(1, dtype=torch.int32),
    )


def route_launch(width: int, depth: int, dim: int, dtype: torch.dtype, *, variant: bool = False) -> Launch:
    """Hidden states of 1536 for the paper's router, or for the variant with all that it leaves out."""
    B, T, heads = 2, num_slots(width, depth), 4
    shapes = weight_shapes(1536, depth, dim, 4 * dim, variant, variant, variant)
    return route_triton.launch(
        meta(B, T, 1536, dtype=dtype),
        meta(sum(math.prod(shape) for shape in shapes.values()), dtype=torch.float32),
        width,
        depth,
        dim,
        heads,
        4 * dim,
        variant,
        variant,
        variant,
        meta(B, dtype=torch.int32),
        uniforms=meta(B, dtype=torch.float64),
        valid=meta(B, T, dtype=torch.bool),
        active=meta(B, dtype=torch.bool),
        flag=meta(1, dtype=torch.int32),
    )


def packed_launch(
    name: str,
    head_size: int,
    dtype: torch.dtype,
    *,
    value_size: int | None = None,
    heads: tuple[int, int] = (32, 8),
    features: bool = False,
    arch: int = 90,
) -> Launch:
    """One of the launches of a forward and a backward pass over 12288 nodes; with all features or none."""
    (Hq, Hk), T, value_size = heads, 12288, value_size or head_size

    def halves(count: int, size: int) -> torch.Tensor:
        return meta(1, T, count, size, dtype=dtype).transpose(1, 2)

    query, key, value, grad = (
        halves(Hq, head_size),
        halves(Hk, head_size),
        halves(Hk, value_size),
        halves(Hq, value_size),
    )
    per_head, per_node = meta(Hq, dtype=torch.float32), meta(1, T, dtype=torch.int32)
    lse, packs, flag = meta(1, Hq, T, dtype=torch.float32), meta(9, dtype=torch.int32), meta(1, dtype=torch.int32)
    positions, sinks, slopes = (per_node, per_head, per_head) if features else (None, None, None)
    numbers: Any = (None, 512, 30.0) if features else (None, None, None)
    ours = packed_tree_attention_triton
    launches = ours.forward(
        query, key, value, per_node, packs, positions, sinks, slopes, *numbers, flag=flag, capability=arch
    ).launches  # fmt: skip
    launches |= ours.backward(
        grad, query, key, value, grad, lse, per_node, packs, positions, slopes, *numbers, flag=flag,
        capability=arch, multiprocessors=MULTIPROCESSORS,
    ).launches  # fmt: skip
    return launches[name]


PACKED = ("forward", "query_gradient", "key_value_gradient")

BY_ARCHITECTURE = "packed_tree_attention"  # kernels whose block sizes depend on it

KERNELS: dict[str, Callable[..., Launch]] = {
    **{
        f"tree_attention bfloat16 d{d} rows {rows}": partial(tree_attention_launch, rows, d, torch.bfloat16)
        for d in (64, 128, 256)
        for rows in (16, 32, 64)
    },
    "tree_attention bfloat16 d192/128 rows 16": partial(tree_attention_launch, 16, 192, torch.bfloat16, value_size=128),
    **{
        f"tree_attention float32 d{d} rows 16": partial(tree_attention_launch, 16, d, torch.float32)
        for d in (64, 128, 256)
    },
    **{
        f"tree_attention {str(dtype)[6:]} d{d} rows {rows}, all features": partial(
            tree_attention_launch, rows, d, dtype, features=True
        )
        for dtype, d, rows in (
            (torch.bfloat16, 64, 16),
            (torch.bfloat16, 64, 64),
            (torch.bfloat16, 128, 16),
            (torch.bfloat16, 128, 64),
            (torch.bfloat16, 256, 16),
            (torch.bfloat16, 256, 64),
            (torch.float16, 128, 64),
            (torch.float32, 128, 16),
            (torch.float32, 256, 16),
        )
    },
    "commit_ 28 layers bfloat16 d128, 1 move": partial(commit_launch, 28, 2, 128, torch.bfloat16, moves=1),
    "commit_ 36 layers bfloat16 d128, 12 moves": partial(commit_launch, 36, 8, 128, torch.bfloat16, moves=12),
    "commit_ 80 layers float32 d256, 39 moves": partial(commit_launch, 80, 8, 256, torch.float32, moves=39),
    **{
        f"{op} {str(dtype)[6:]}, filters: {filters}": partial(sample_launch, dtype, filters=filters, draws=draws)
        for op, draws in (("sample_children", True), ("top_children", False))
        for dtype in (torch.float32, torch.bfloat16)
        for filters in ("none", "numbers", "rows")
    },
    **{
        f"route {str(dtype)[6:]} p{dim} K{width} L{depth}{', variant' if variant else ''}": partial(
            route_launch, width, depth, dim, dtype, variant=variant
        )
        for dtype, dim, width, depth, variant in (
            (torch.bfloat16, 128, 3, 1, False),
            (torch.bfloat16, 128, 3, 2, False),
            (torch.bfloat16, 128, 3, 2, True),
            (torch.float16, 128, 1, 1, False),
            (torch.float32, 128, 16, 1, True),
            (torch.float32, 256, 3, 3, False),
        )
    },
    **{
        f"packed_tree_attention {kernel} {str(dtype)[6:]} d{d}{', all features' if features else ''}": partial(
            packed_launch, kernel, d, dtype, features=features
        )
        for dtype, d, features in (
            (torch.bfloat16, 64, False),
            (torch.bfloat16, 128, False),
            (torch.bfloat16, 256, False),
            (torch.float16, 64, False),
            (torch.float16, 128, False),
            (torch.float32, 128, False),
            (torch.bfloat16, 64, True),
            (torch.bfloat16, 128, True),
            (torch.bfloat16, 256, True),
        )
        for kernel in PACKED
    },
    **{
        f"packed_tree_attention {launch}": partial(packed_launch, launch, 128, torch.bfloat16, features=True)
        for launch in ("order", "blocks of lists by query", "lists by query", "lists by key")
    },
}


def compile_for(launch: Launch, arch: int) -> Any:
    """What Triton makes of a launch for a GPU of this compute capability."""
    return triton.compile(
        source(launch.kernel, launch.arguments), target=GPUTarget("cuda", arch, 32), options=launch.options
    )


def in_turn() -> list[tuple[str, int]]:
    """Every kernel with one architecture; those of an op that stand beside each other with different ones."""
    architectures, turns, pairs = list(ARCHITECTURES), Counter[str](), []
    for name in KERNELS:
        turn = turns[name.split()[0]]
        # Moved on by one after each round: names come in threes, too, and each of them is to meet every architecture.
        pairs.append((name, architectures[(turn + turn // len(architectures)) % len(architectures)]))
        turns[name.split()[0]] += 1
    return pairs


def resources(
    kernels: Iterable[str] = tuple(KERNELS), architectures: Iterable[int] = tuple(ARCHITECTURES)
) -> list[dict[str, Any]]:
    """Compiles; one record per kernel and architecture, with the seconds that compiling took."""
    return resources_of([(name, arch) for name in kernels for arch in architectures])


def resources_of(pairs: list[tuple[str, int]]) -> list[dict[str, Any]]:
    """The same for pairs of a kernel and an architecture.

    Two at a time where there are many: most of the time is the assembler's.
    """
    if len(pairs) < 8:
        return [_record(pair) for pair in pairs]
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(_record, pairs, chunksize=4))


def _record(pair: tuple[str, int]) -> dict[str, Any]:
    name, arch = pair
    make = KERNELS[name]
    launch = make(arch=arch) if name.startswith(BY_ARCHITECTURE) else make()
    start = time.perf_counter()
    compiled = compile_for(launch, arch)
    seconds = time.perf_counter() - start
    registers, spilled = assembler_report(compiled.asm["ptx"], arch)
    shared, warps = compiled.metadata.shared, launch.options["num_warps"]
    return {
        "kernel": name,
        "arch": f"sm_{arch}",
        "registers": registers,
        "spill_bytes": spilled,
        "shared_bytes": shared,
        "blocks_per_sm": ARCHITECTURES[arch].fits(registers, shared, warps),
        "compile_seconds": seconds,
    }


def main() -> None:
    """Print the table; exit with an error if a kernel spills or does not fit."""
    records = resources()
    table = Table(title=f"Triton {triton.__version__}")
    for name in records[0]:
        table.add_column(name, no_wrap=True)
    for record in records:
        table.add_row(*(f"{value:.1f}" if isinstance(value, float) else str(value) for value in record.values()))
    Console(width=140).print(table)
    bad = [r for r in records if r["spill_bytes"] or not r["blocks_per_sm"]]
    if bad:
        raise SystemExit(f"{len(bad)} kernels spill or do not fit")


if __name__ == "__main__":
    main()
