"""What the Triton kernels need on a GPU: registers, spills, shared memory, and how many programs fit a multiprocessor.

Contract
--------
No GPU is needed: kernels are compiled ahead of time, from the very arguments that a call would launch them with (on
the meta device), and Triton's own ``ptxas`` reports on the result. Kernels may not spill; ``main`` fails if one does.

Do not set ``TRITON_INTERPRET``: there would be nothing to compile.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from lbr_kernels.ops import tree_attention_triton

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


def tree_attention_launch(
    rows: int, head_size: int, dtype: torch.dtype, *, value_size: int | None = None, features: bool = False
) -> tree_attention_triton.Launch:
    """A call with 8 key heads and one node for each of ``rows``, long enough to be split; with all features or none."""
    B, Hk, T, S = 2, 8, rows, 8192
    value_size = value_size or head_size

    def meta(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

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
        meta(B, Hk, rows, head_size),
        meta(B, Hk, S, head_size),
        meta(B, Hk, S, value_size),
        meta(B, dtype=torch.int32),
        meta(B, T, -(-T // 64), dtype=torch.int64),
        meta(B, Hk, rows, value_size),
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
            return tuple(
                kind(item, (*place, i), "", constant=False, specialised=True) for i, item in enumerate(value)
            )
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
        path.write_text(ptx)
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={target[1]}", str(path), "-o", str(path.with_suffix(".o"))]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    (registers,) = re.findall(r"Used (\d+) registers", said)
    return int(registers), sum(int(n) for n in re.findall(r"(\d+) bytes spill", said))


KERNELS: dict[str, tuple[int, int, torch.dtype, dict[str, Any]]] = {
    **{
        f"tree_attention bfloat16 d{d} rows {rows}": (rows, d, torch.bfloat16, {})
        for d in (64, 128, 256)
        for rows in (16, 32, 64)
    },
    "tree_attention bfloat16 d192/128 rows 16": (16, 192, torch.bfloat16, {"value_size": 128}),
    **{f"tree_attention float32 d{d} rows 16": (16, d, torch.float32, {}) for d in (64, 128, 256)},
    **{
        f"tree_attention {str(dtype)[6:]} d{d} rows {rows}, all features": (rows, d, dtype, {"features": True})
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
}


def resources(
    kernels: Iterable[str] = tuple(KERNELS), architectures: Iterable[int] = tuple(ARCHITECTURES)
) -> list[dict[str, Any]]:
    """Compiles; one record per kernel and architecture, with the seconds that compiling took."""
    records = []
    for name in kernels:
        rows, head_size, dtype, options = KERNELS[name]
        launch = tree_attention_launch(rows, head_size, dtype, **options)
        for arch in architectures:
            start = time.perf_counter()
            compiled = triton.compile(
                source(tree_attention_triton.tree_attention_kernel, launch.arguments),
                target=GPUTarget("cuda", arch, 32),
                options=launch.options,
            )
            seconds = time.perf_counter() - start
            registers, spilled = assembler_report(compiled.asm["ptx"], arch)
            shared, warps = compiled.metadata.shared, launch.options["num_warps"]
            records.append(
                {
                    "kernel": name,
                    "arch": f"sm_{arch}",
                    "registers": registers,
                    "spill_bytes": spilled,
                    "shared_bytes": shared,
                    "blocks_per_sm": ARCHITECTURES[arch].fits(registers, shared, warps),
                    "compile_seconds": seconds,
                }
            )
    return records


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
