"""The Markdown table of a benchmark run: ``python bench/report.py RUN.json``."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}"


def table(records: list[dict[str, object]]) -> str:
    """One line per record: median times of both sides and the quartiles of their ratio."""
    lines = ["| what | ours, ms | plain, ms | plain / ours: median (quartiles) | plain is |", "|---|--:|--:|--:|---|"]
    for record in records:
        info = record["extra_info"]
        assert isinstance(info, dict)
        ratio = info["speedup"]
        lines.append(
            f"| {record['group']} | {milliseconds(info['ours_seconds']['median'])} "
            f"| {milliseconds(info['plain_seconds']['median'])} "
            f"| {ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f}) | {info['baseline']} |"
        )
    return "\n".join(lines)


def main(path: Path) -> None:
    run = json.loads(path.read_text())
    info = run["benchmarks"][0]["extra_info"]
    print(
        f"{info['cpu']}, {info['threads']} threads, torch {info['torch']}, transformers {info['transformers']}, ",
        end="",
    )
    print(f"{run['datetime'][:10]}. Medians of runs in turns; raw data in `{path.name}`.\n")
    print(table(run["benchmarks"]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
