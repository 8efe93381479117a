"""The GPU benchmark of attention, without a GPU: its dry run, sides, checks, verdicts, and the results page."""

from __future__ import annotations

import copy
import itertools
import json
import types
from dataclasses import replace

import gpu
import gpu_attention
import gpu_report
import pytest
import torch
from gpu_attention import DRY, SHAPES, Prepared, Side, make_problem, reference, relative_error, sides_for
from typer.testing import CliRunner

from lbr_kernels import ops
from lbr_kernels.ops.tree_shape import path_slots

CPU = torch.device("cpu")
SDPA = "SDPA, dense mask, enable_gqa"

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def problem_of(shape, *, sets=1, dtype=torch.float32):
    return make_problem(shape, sets, CPU, dtype, seed=1)


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """A dry run, kept elsewhere."""
    pytest.importorskip("matplotlib")
    out = tmp_path_factory.mktemp("gpu")
    before = sorted(path.name for path in gpu.RESULTS.iterdir())
    result = CliRunner().invoke(gpu.app, ["attention", "--dry-run", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in gpu.RESULTS.iterdir()) == before
    (path,) = out.glob("*.json")
    return path, result.output


def as_if_measured(data, seconds):
    """The JSON of a dry run as a GPU's, with the given times; they are of this test and mean nothing."""
    data = copy.deepcopy(data)
    data["dry_run"] = False
    data["device"]["name"] = "A Test"
    for entry in data["shapes"]:
        entry["sides"] = {
            name: {"status": "timed", "graph": True, "seconds": [value * step for step in (1, 1.1, 1.2, 1.3, 1.4)]}
            for name, value in seconds.items()
        }
    data["preference"] = gpu_report.preference(data["shapes"])
    return data


def test_a_dry_run_goes_through_everything(dry):
    path, output = dry
    data = json.loads(path.read_text(encoding="utf-8"))
    assert data["dry_run"]
    assert data["complete"]
    assert path.name.endswith("-dry-run-on-a-cpu-attention.json")
    assert [entry["shape"]["nodes"] for entry in data["shapes"]] == [shape.nodes for shape in DRY]
    sides, missing = sides_for(CPU)
    assert data["not_available"] == missing
    for entry in data["shapes"]:
        assert list(entry["sides"]) == [side.name for side in sides]
        for name, side in entry["sides"].items():
            assert side["status"] == "timed", (name, side)
            assert side["error"] <= side["tolerance"]
            assert len(side["seconds"]) == gpu.DryRun.rounds[0]
        assert entry["sides"]["FlexAttention"]["apart"]["block mask"] > 0
    for reading in data["roof"]:
        assert len(reading["copy"]) == len(reading["matmul"]) > 0
    assert len(data["roof"]) == 2
    text = path.with_suffix(".md").read_text(encoding="utf-8")
    assert text == gpu_report.tables(gpu_report.Run.load(path))
    assert "Dry run" in text
    assert text.strip() in output
    assert "DRY RUN" in path.with_suffix(".svg").read_text(encoding="utf-8")
    gpu_report.draw(gpu_report.Run.load(path), path.with_suffix(".again.svg"))
    assert path.with_suffix(".again.svg").read_bytes() == path.with_suffix(".svg").read_bytes()
    assert gpu_report.Run.kept(path.parent) == []


def test_a_dry_run_has_no_place_among_the_results():
    result = CliRunner().invoke(gpu.app, ["attention", "--dry-run", "--out", str(gpu.RESULTS)])
    assert result.exit_code == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured():
    result = CliRunner().invoke(gpu.app, ["attention"])
    assert result.exit_code == 2
    assert "--dry-run" in result.output


def test_the_shapes_cover_every_pair():
    """Of batch, prefix, nodes and heads every two values meet at some shape."""
    rows = [(s.batch, s.prefix, s.nodes, (s.heads, s.kv_heads)) for s in SHAPES]
    assert len(set(rows)) == len(rows)
    for one, other in itertools.combinations(range(4), 2):
        wanted = itertools.product({row[one] for row in rows}, {row[other] for row in rows})
        assert {(row[one], row[other]) for row in rows} == set(wanted)
    sizes = [shape.cache_bytes(torch.bfloat16) for shape in SHAPES]
    for least in (0, 64_000_000, 250_000_000):
        assert any(size >= least for size in sizes)
    assert any(size < 16_000_000 for size in sizes)
    assert all(shape in SHAPES for shape in gpu.QUICK)


@pytest.mark.parametrize(("width", "depth"), [(3, 1), (3, 2), (3, 3), (2, 6), (1, 4)])
def test_full_tree(width, depth):
    """A node sees the nodes of a path from the root down to it, and the words say the same."""
    sees = gpu_attention.full_tree(width, depth)
    layer = [level for level in range(1, depth + 1) for _ in range(width**level)]
    assert sees.sum(1).tolist() == layer
    for path in path_slots(width, depth).flatten(0, 1).tolist():
        assert sees[path[-1]].nonzero().flatten().tolist() == path
    words = gpu_attention.mask_words(sees)
    node = torch.arange(len(layer))
    assert torch.equal((words[0][:, node // 64] >> (node % 64)) & 1 == 1, sees)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_side_is_within_the_tolerance_and_a_wrong_mask_is_not(dtype):
    """Also behind a long prefix, where of random keys nobody would notice a node."""
    shape = replace(DRY[1], prefix=4096)
    problem = problem_of(shape, dtype=dtype)
    wanted, tolerance = reference(problem), gpu_attention.TOLERANCE[dtype]
    for side in sides_for(CPU)[0]:
        error = relative_error(problem, side.prepare(problem).compute(*problem.sets[0]), wanted)
        assert error <= tolerance, side.name
    wrong = problem.ancestors.clone()
    wrong[0, -1, 0] ^= 1
    out = ops.tree_attention(*problem.sets[0], problem.prefix_lens, wrong)
    assert relative_error(problem, out, wanted) > 10 * tolerance


def test_flash_attn_is_called_as_it_documents():
    """A stand-in with flash-attn's layout, [B, S, H, D] and log-sum-exp [B, H, Sq]."""

    def flash_attn_with_kvcache(q, k_cache, v_cache, *, causal, return_softmax_lse):
        assert return_softmax_lse
        assert not causal
        q, k, v = (x.transpose(1, 2) for x in (q, k_cache, v_cache))
        scores = q @ k.mT * q.shape[-1] ** -0.5
        return (scores.softmax(-1) @ v).transpose(1, 2), scores.logsumexp(-1)

    module = types.SimpleNamespace(flash_attn_with_kvcache=flash_attn_with_kvcache)
    prepare = gpu_attention._two_pass(gpu_attention._flash_attn(module))
    for shape in DRY:
        problem = problem_of(shape)
        out = prepare(problem).compute(*problem.sets[0])
        assert relative_error(problem, out, reference(problem)) <= 1e-4


def test_flashinfer_is_called_as_it_documents():
    """A stand-in with FlashInfer's layout: pages [pages, H, page size, D], queries [rows, H, D], a flat mask."""

    class Wrapper:
        def __init__(self, workspace, kv_layout):
            assert workspace.dtype == torch.uint8
            assert kv_layout == "HND"

        def plan(
            self, qo_indptr, kv_indptr, kv_indices, last_page_len, heads, kv_heads, head_dim, page_size,
            *, custom_mask, q_data_type, kv_data_type,
        ):  # fmt: skip
            self.rows, self.pages, self.indices = qo_indptr.tolist(), kv_indptr.tolist(), kv_indices.tolist()
            assert all(index.dtype == torch.int32 for index in (qo_indptr, kv_indptr, kv_indices, last_page_len))
            assert last_page_len.tolist() == [page_size] * len(self.indices)
            self.group, self.size, self.mask = heads // kv_heads, page_size, custom_mask
            assert q_data_type == kv_data_type

        def run(self, q, cache):
            out, start = torch.empty_like(q), 0
            for b, page in enumerate(self.indices):
                assert self.pages[b : b + 2] == [b, b + 1]
                rows = slice(self.rows[b], self.rows[b + 1])
                count = (rows.stop - rows.start) * self.size
                mask = self.mask[start : start + count].view(-1, self.size)
                start += count
                k, v = (x[page].repeat_interleave(self.group, 0) for x in cache)
                out[rows] = torch.nn.functional.scaled_dot_product_attention(
                    q[rows].transpose(0, 1), k, v, mask
                ).transpose(0, 1)
            assert start == self.mask.numel()
            return out

    prepare = gpu_attention._flashinfer(types.SimpleNamespace(BatchPrefillWithPagedKVCacheWrapper=Wrapper))
    gpu_attention._flashinfer_workspace.cache_clear()
    for shape in DRY:
        problem = problem_of(shape, sets=2)
        prepared = prepare(problem)
        assert prepared.apart["plan"] > 0
        assert relative_error(problem, prepared.compute(*problem.sets[0]), reference(problem)) <= 1e-4
    gpu_attention._flashinfer_workspace.cache_clear()


def test_packages_that_are_missing_are_named(monkeypatch):
    assert gpu_attention.optional("no_such_package_here") == (None, "not installed")

    def broken(name):
        raise OSError("libsomething.so: undefined symbol")

    monkeypatch.setattr(gpu_attention.importlib, "import_module", broken)
    module, why = gpu_attention.optional("flash_attn")
    assert module is None
    assert "undefined symbol" in why


def _side(name, compute, **kwargs):
    return Side(name, lambda problem: Prepared(lambda q, k, v: compute(problem, q, k, v)), **kwargs)


def _right(problem, query, keys, values):
    return ops.tree_attention(query, keys, values, problem.prefix_lens, problem.ancestors)


def _fails(*args):
    raise NotImplementedError("it has no such heads\nand a second line")


def run_with(monkeypatch, tmp_path, sides, *options):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(gpu, "sides_for", lambda device: (sides, {}))
    monkeypatch.setattr(gpu, "DRY", DRY[:1])
    result = CliRunner().invoke(gpu.app, ["attention", "--dry-run", "--out", str(tmp_path), *options])
    return result, json.loads(next(tmp_path.glob("*.json")).read_text(encoding="utf-8"))


def test_what_is_wrong_is_not_timed_and_ends_with_1(monkeypatch, tmp_path):
    sides = [
        _side("ours", _right),
        _side("all of it off", lambda *args: _right(*args) * 1.01),
        _side("NaN", lambda *args: _right(*args) * torch.nan),
        _side("shape", lambda *args: _right(*args)[:, :1]),
        _side("fails", _fails),
    ]
    result, data = run_with(monkeypatch, tmp_path, sides)
    assert result.exit_code == 1
    found = data["shapes"][0]["sides"]
    assert found["ours"]["status"] == "timed"
    assert found["all of it off"]["status"] == found["NaN"]["status"] == "wrong"
    assert found["shape"]["status"] == found["fails"]["status"] == "failed"
    assert found["fails"]["why"] == "NotImplementedError: it has no such heads"
    assert found["NaN"]["error"] is None
    assert all("seconds" not in found[name] for name in found if name != "ours")
    for name in found:
        assert name in result.output


def test_failures_of_others_are_recorded_and_ours_end_with_1(monkeypatch, tmp_path):
    result, data = run_with(monkeypatch, tmp_path / "a", [_side("ours", _right), _side("other", _fails)])
    assert result.exit_code == 0
    assert data["shapes"][0]["sides"]["other"]["status"] == "failed"
    result, _ = run_with(monkeypatch, tmp_path / "b", [_side("ours", _fails), _side("other", _right)])
    assert result.exit_code == 1


def test_a_replay_that_writes_nothing_is_found():
    """What was captured is checked again, after its output was filled with NaN."""

    class Forgets(gpu.DryRun):
        def capture(self, work):
            out = work()
            return (lambda: None), out

    problem = problem_of(DRY[0], sets=2)
    wanted = reference(problem)
    record, ready = gpu.make_ready(Forgets(), problem, _side("ours", _right), wanted, 1e-4)
    assert ready is None
    assert record["status"] == "wrong"
    assert record["why"].startswith("replayed: ")


def test_what_cannot_be_captured_is_flagged():
    class Refuses(gpu.DryRun):
        def capture(self, work):
            raise RuntimeError("operation not permitted when stream is capturing")

    problem = problem_of(DRY[0], sets=2)
    record, ready = gpu.make_ready(Refuses(), problem, _side("ours", _right), reference(problem), 1e-4)
    assert ready is not None
    assert record["status"] == "timed"
    assert record["graph"] is False
    assert "not permitted" in record["why"]


def test_a_broken_device_ends_the_run_and_keeps_what_is_known():
    class Breaks(gpu.DryRun):
        def healthy(self):
            return False

    data = gpu.measure(
        Breaks(), DRY[:2], [_side("ours", _fails)], {}, 60, dry_run=True, quick=False, keep=lambda data: None
    )
    assert data["shapes"] == []
    assert not data["complete"]
    assert "no such heads" in data["aborted"]
    assert gpu.troubles(data) == [f"aborted: {data['aborted']}"]


def test_memory_and_time_are_kept():
    class Small(gpu.DryRun):
        def free_bytes(self):
            return 4 * gpu_attention.set_bytes(DRY[1], torch.float32)

    kept = []
    data = gpu.measure(
        Small(), DRY, [_side("ours", _right)], {}, 60, dry_run=True, quick=False,
        keep=lambda data: kept.append(len(data["shapes"])),
    )  # fmt: skip
    assert [one["shape"] for one in data["skipped"]] == [str(DRY[2])]
    assert "quarter" in data["skipped"][0]["why"]
    assert kept == [1, 2]
    assert data["shapes"][0]["sets"] == 1  # two would be more than a quarter
    data = gpu.measure(gpu.DryRun(), DRY, [], {}, 0, dry_run=True, quick=False, keep=lambda data: None)
    assert [one["why"] for one in data["skipped"]] == ["the time was used up"] * len(DRY)
    schedule = gpu.Schedule(10)
    schedule.longest_compilation = 100
    records = gpu.time_shape(
        gpu.DryRun(), problem_of(DRY[0]), [_side("slow to compile", _right, compiles=True)], schedule,
        schedule.slice_end(1),
    )  # fmt: skip
    assert records["slow to compile"]["status"] == "skipped"


def test_sets_outgrow_the_cache():
    class Cached(gpu.DryRun):
        cache_bytes = 100_000

    data = gpu.measure(
        Cached(), DRY[:1], [_side("ours", _right)], {}, 60, dry_run=True, quick=False, keep=lambda data: None
    )
    entry = data["shapes"][0]
    assert entry["cold"]
    assert (entry["sets"] - 1) * entry["cache_bytes"] <= 3 * 100_000 < entry["sets"] * entry["cache_bytes"]
    assert entry["sides"]["ours"]["calls"] == entry["sets"]


def test_verdicts(dry):
    data = json.loads(dry[0].read_text(encoding="utf-8"))
    run = gpu_report.Run(as_if_measured(data, {"ours, cuda": 4e-6, "ours, triton": 6e-6, SDPA: 9e-6}), "x")
    run.data["roof"] = [{"copy": [1e12], "matmul": [1e15]}, {"copy": [2e12], "matmul": [1e14]}]
    entry = run.entries[0]
    assert run.rate("copy") == 2e12  # the larger one is the stricter one
    assert gpu_report.ours(entry) == "ours, cuda"
    assert gpu_report.is_ahead(entry) is True
    assert gpu_report.speed_bar(entry) == ("seconds", 10e-6)
    assert gpu_report.meets_speed_bar(run, entry) is True
    # Of the median, 4.8 us, the least time is a half.
    entry["bytes"], entry["flops"] = 2.4e-6 * 2e12, 0
    assert run.share(entry) == pytest.approx(50)
    for size, bar in ((20e6, None), (64e6, ("share", 55.0)), (250e6, ("share", 80.0))):
        entry["cache_bytes"] = size
        assert gpu_report.speed_bar(entry) == bar
        assert gpu_report.meets_speed_bar(run, entry) is (None if bar is None else False)
    entry["bytes"] *= 1.7
    assert gpu_report.meets_speed_bar(run, entry) is True
    for side in ("ours, cuda", "ours, triton"):
        entry["sides"][side]["seconds"] = [1e-3] * 5
    assert gpu_report.is_ahead(entry) is False
    entry["sides"]["ours, cuda"] = entry["sides"]["ours, triton"] = {"status": "failed", "why": "x"}
    assert gpu_report.is_ahead(entry) is None
    assert run.share(entry) is None
    assert "| FAIL |" not in gpu_report.tables(run).splitlines()[10]


def test_preference(dry):
    data = as_if_measured(json.loads(dry[0].read_text(encoding="utf-8")), {"ours, cuda": 4e-6, "ours, triton": 6e-6})
    classes = [(one["rows"], one["head_size"], one["backend"]) for one in data["preference"]]
    assert classes == [(16, 64, "cuda"), (64, 64, "cuda"), (128, 64, "cuda")]
    names: dict[str, object] = {}
    exec(gpu_report.preference_literal(gpu_report.Run(data, "a-run")), names)
    assert names["SOURCE"] == "a-run.json"
    assert names["TREE_ATTENTION"] == {(rows, size): backend for rows, size, backend in classes}
    other = as_if_measured(json.loads(dry[0].read_text(encoding="utf-8")), {"ours, cuda": 6e-6, "ours, triton": 4e-6})
    assert {one["backend"] for one in other["preference"]} == {"triton"}
    assert gpu_report.preference([]) == []


def test_the_results_page_says_what_was_measured(dry, monkeypatch, tmp_path):
    """The page and its generator belong together; where no GPU has run, it says so for every figure."""
    assert (gpu.RESULTS / gpu.PAGE).read_text(encoding="utf-8") == gpu.page_text()
    empty = gpu_report.results_part([])
    assert empty.count(gpu_report.NOT_MEASURED) == len(gpu_report._figures(None))

    data = as_if_measured(
        json.loads(dry[0].read_text(encoding="utf-8")), {"ours, cuda": 4e-6, "ours, triton": 6e-6, SDPA: 9e-6}
    )
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    gpu.write_json(data, tmp_path)
    gpu.write_json({**data, "quick": True}, tmp_path)
    assert CliRunner().invoke(gpu.app, ["results"]).exit_code == 0
    text = (tmp_path / gpu.PAGE).read_text(encoding="utf-8")
    assert text.count("## A Test") == 1
    assert f"{len(DRY)} of {len(DRY)} shapes pass" in text
    assert f"| {SDPA}: times as long as ours | > 1 | 2.25; {len(DRY)} of {len(DRY)} shapes pass |" in text
    assert f"| FlexAttention: times as long as ours | > 1 | {gpu_report.NOT_MEASURED} |" in text
