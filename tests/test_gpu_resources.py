"""The comparison of what GPU kernels take: it fails where one gets worse, and only there."""

from __future__ import annotations

import copy
import json

import gpu_resources
import pytest

KEPT = json.loads(gpu_resources.KEPT.read_text(encoding="utf-8"))


def test_what_is_kept_is_no_worse_than_itself():
    assert gpu_resources.worse(KEPT, KEPT) == []
    assert all(record["spill_bytes"] == 0 and record["blocks_per_sm"] >= 1 for record in KEPT["kernels"])
    assert {record["arch"] for record in KEPT["kernels"]} == {"sm_80", "sm_90", "sm_100"}


def test_the_page_is_what_the_numbers_say():
    assert gpu_resources.KEPT.with_suffix(".md").read_text(encoding="utf-8") == gpu_resources.page(KEPT)


@pytest.mark.parametrize(
    ("key", "change", "said"),
    [
        ("spill_bytes", 8, "spills 8 bytes, expected none"),
        ("registers", 1, "registers, expected at most"),
        ("shared_bytes", 16, "shared bytes, expected at most"),
        ("blocks_per_sm", -1, "blocks per multiprocessor, expected"),
    ],
)
def test_one_that_gets_worse_is_named(key, change, said):
    now = copy.deepcopy(KEPT)
    record = next(r for r in now["kernels"] if r["blocks_per_sm"] > 1)
    record[key] += change
    (line,) = gpu_resources.worse(now, KEPT)
    assert line.startswith(f"{record['kernel']} on {record['arch']}")
    assert said in line
    record[key] -= 2 * change
    assert key == "spill_bytes" or gpu_resources.worse(now, KEPT) == []


def test_other_compilers_may_take_other_registers():
    now = copy.deepcopy(KEPT)
    now["versions"] = {"nvcc": "another", "triton": "another"}
    for record in now["kernels"]:
        record["registers"] += 1
    assert gpu_resources.worse(now, KEPT) == []


def test_the_gate_compiles_every_kernel_and_every_kind_for_every_architecture():
    part = gpu_resources.in_gate(KEPT)
    assert {r["kernel"] for r in part["kernels"]} == {r["kernel"] for r in KEPT["kernels"]}
    triton = [r for r in part["kernels"] if r["kernel"].startswith("triton")]
    assert len(triton) == len({r["kernel"] for r in triton})
    kinds = {(r["kernel"].split()[1], r["arch"]) for r in triton}
    assert len(kinds) == 3 * len({kind for kind, _ in kinds})
    assert [r for r in KEPT["kernels"] if r["kernel"].startswith("cuda")] == [
        r for r in part["kernels"] if r["kernel"].startswith("cuda")
    ]
    assert gpu_resources.worse(part, part) == []
    gpu_resources.table(part)


def test_kernels_come_and_go():
    now = copy.deepcopy(KEPT)
    gone = now["kernels"].pop()
    assert gpu_resources.worse(now, KEPT) == [f"{gone['kernel']} on {gone['arch']} is kept, but is no kernel any more"]
    assert "make gpu-resources" in gpu_resources.worse(KEPT, now)[0]
