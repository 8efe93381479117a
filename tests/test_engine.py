"""The engines: fixed steps give the text of the loop, read nothing on the host, are kept and let go, and fall back.

Without a GPU the driver of graphs is tested with a stand-in: a "graph" that runs the step when it is replayed.
"""

from __future__ import annotations

import copy
import gc
import re
import threading
import warnings
import weakref

import pytest
import torch
from models import FAMILIES, tiny_llama, tiny_model
from test_invariants import seeded, trained_looking_router
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer

from lbr_kernels import DecodingStats, Router, WarmUp, check_model, generate, release, warmup
from lbr_kernels.decoding import engine, replay
from lbr_kernels.decoding.adapter import ModelAdapter
from lbr_kernels.decoding.cache import CACHE_NAME
from lbr_kernels.decoding.engine import capacity_class, kept_step
from lbr_kernels.decoding.routing import Routing
from lbr_kernels.decoding.sampling import Draws

IDS = torch.tensor([[7, 3, 9, 4], [1, 8, 8, 2]])
RAGGED = {"input_ids": torch.tensor([[0, 0, 9, 4], [1, 8, 8, 2], [0, 5, 5, 6]]),
          "attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])}  # fmt: skip
SAMPLED = {"do_sample": True, "top_k": 0}
TREES = [(1, 1), (3, 1), (3, 2), (2, 3)]


def both(model, seed=1, against="eager", **kwargs):
    """The same call by the loop and by fixed steps."""
    common = {"return_dict_in_generate": True, **kwargs}
    return [generate(model, engine=name, trie=False, generator=seeded(seed), **common) for name in (against, "static")]


def assert_same(a, b) -> None:
    """Texts, trajectories, and what was counted."""
    assert torch.equal(a.sequences, b.sequences)
    for name in ("node_tokens", "choices", "num_committed", "prompt_ids", "prompt_mask"):
        assert torch.equal(getattr(a.trajectory, name), getattr(b.trajectory, name)), name
    for name in ("node_log_probs", "router_log_probs"):
        torch.testing.assert_close(getattr(a.trajectory, name), getattr(b.trajectory, name), rtol=1e-4, atol=1e-5)
    for name in ("committed_tokens", "forwarded_nodes", "model_calls"):
        assert getattr(a.stats, name) == getattr(b.stats, name), name


# --- the same text -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "depth"), TREES)
@pytest.mark.parametrize("do_sample", [True, False])
@pytest.mark.parametrize("router_do_sample", [True, False])
def test_fixed_steps_give_the_text_of_the_loop(llama, width, depth, do_sample, router_do_sample):
    """Ragged prompts, texts that end at different steps, a router with opinions."""
    router = trained_looking_router(llama, depth)
    a, b = both(
        llama, **RAGGED, width=width, depth=depth, router=router, do_sample=do_sample,
        router_do_sample=router_do_sample, max_new_tokens=40, eos_token_id=[11, 29], pad_token_id=0,
    )  # fmt: skip
    assert_same(a, b)
    assert (a.stats.engine, b.stats.engine) == ("eager", "static")
    assert b.stats.engine_reason == "engine is 'static'"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family):
    """Windows in slots and in positions, learned positions that end, soft-caps, shared layers."""
    model = tiny_model(family)
    a, b = both(model, **RAGGED, width=2, depth=2, max_new_tokens=12, **SAMPLED)
    assert_same(a, b)


@pytest.mark.parametrize("depth", [1, 2])
def test_the_models_last_position(depth):
    """Texts end at the model's last position, each row at its own step."""
    model = tiny_model("gpt2", n_positions=20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        a, b = both(model, **RAGGED, width=2, depth=depth, max_new_tokens=40, **SAMPLED)
    assert_same(a, b)
    assert a.trajectory.num_committed.tolist() == [18, 16, 17]


def test_a_text_that_outgrows_its_window():
    """Sliding layers are cut to their window, on the device and in place, now and then."""
    model = tiny_model("gemma3_text")
    a, b = both(model, **RAGGED, width=2, depth=1, max_new_tokens=600, **SAMPLED)
    assert_same(a, b)
    assert getattr(b, CACHE_NAME).layers[0].keys.shape[2] == 5


@pytest.mark.parametrize("filters", [
    {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1},
    {"temperature": 1.3, "top_k": 9, "top_p": 0.9, "min_p": 0.02},
])  # fmt: skip
@pytest.mark.parametrize("do_sample", [True, False])
def test_filters(llama, filters, do_sample):
    a, b = both(llama, input_ids=IDS, do_sample=do_sample, max_new_tokens=15, **{"top_k": 0, **filters})
    assert_same(a, b)


@pytest.mark.parametrize("criteria", [
    [MaxLengthCriteria(12)], [MaxLengthCriteria(40)], [EosTokenCriteria(list(range(25)))],
])  # fmt: skip
@pytest.mark.parametrize("depth", [1, 2])
def test_the_callers_own_limits(llama, criteria, depth):
    """They take the place of the config's, as in model.generate."""
    call = {"stopping_criteria": StoppingCriteriaList(criteria), "max_new_tokens": 8, "eos_token_id": [5]}
    a, b = both(llama, input_ids=IDS, depth=depth, **call, **SAMPLED)
    assert_same(a, b)
    greedy = {"do_sample": False, "width": 1, **call}
    own = llama.generate(IDS, stopping_criteria=call["stopping_criteria"], max_new_tokens=8, eos_token_id=[5])
    for out in both(llama, input_ids=IDS, **greedy):
        assert torch.equal(out.sequences, own)


def test_another_vocabulary_needs_another_step():
    model = tiny_llama()
    for size in (53, 70, 60):
        model.resize_token_embeddings(size)
        assert_same(*both(model, input_ids=IDS, max_new_tokens=5, **SAMPLED))


def test_return_sequences_streams_and_caches(llama):
    options = {"num_return_sequences": 2, "streams": [5, 1, 9, 2], "max_new_tokens": 9, **SAMPLED}
    a, b = both(llama, input_ids=IDS, **options)
    assert_same(a, b)
    # Texts go on from the returned cache.
    mask = torch.ones_like(a.sequences)
    more = [
        generate(
            llama, out.sequences, attention_mask=mask, max_new_tokens=5, generator=seeded(4), engine=which,
            **{CACHE_NAME: getattr(out, CACHE_NAME)}, **SAMPLED,
        )
        for out, which in ((a, "eager"), (b, "static"))
    ]  # fmt: skip
    assert torch.equal(*more)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """Nearly the same numbers, so the first tokens are the same."""
    model = tiny_llama().to(dtype)
    a, b = both(model, input_ids=IDS, max_new_tokens=4, **SAMPLED)
    assert torch.equal(a.sequences, b.sequences)


def test_a_row_does_not_depend_on_its_neighbours(llama):
    out = generate(llama, IDS, engine="static", max_new_tokens=20, generator=seeded(3), **SAMPLED)
    alone = generate(llama, IDS[1:], engine="static", max_new_tokens=20, generator=seeded(3), streams=[1], **SAMPLED)
    assert torch.equal(out[1:], alone)


def test_more_steps_than_are_drawn_together(llama):
    a, b = both(llama, input_ids=IDS, max_new_tokens=150, width=2, **SAMPLED)
    assert_same(a, b)


# --- one step for many calls ------------------------------------------------------------------------------------------


def test_a_kept_step_serves_other_prompts_filters_seeds_and_routers(llama):
    release(llama)
    for seed in range(6):
        router = trained_looking_router(llama, 2)
        for parameter in router.parameters():
            parameter.data += 0.1 * seed * torch.randn_like(parameter)
        ids = torch.randint(1, 53, (2, 3 + seed), generator=seeded(seed))
        a, b = both(
            llama, seed, input_ids=ids, depth=2, router=router, max_new_tokens=10 + seed, eos_token_id=20 + seed,
            pad_token_id=seed, do_sample=True, top_k=seed, temperature=1 + seed / 10,
        )  # fmt: skip
        assert_same(a, b)
    assert len(engine._steps[llama]) == 1


def test_a_step_is_made_anew_where_none_serves(llama):
    release(llama)
    call = {"engine": "static", "max_new_tokens": 3, **SAMPLED}
    generate(llama, IDS, **call)
    for change in ({"width": 2}, {"depth": 2}, {"max_new_tokens": 300}):
        generate(llama, IDS, **{**call, **change})
    assert len(engine._steps[llama]) == 4
    first = next(iter(engine._steps[llama]))
    generate(llama, IDS, **call)  # the same, and so the last one to go
    generate(llama, IDS[:1], **call)  # one more than are kept
    assert len(engine._steps[llama]) == 4
    assert first in engine._steps[llama]
    release(llama)
    assert llama not in engine._steps


def test_a_longer_cache_serves_shorter_texts(llama):
    release(llama)
    for length in (600, 20, 300):
        a, b = both(llama, input_ids=IDS, max_new_tokens=length, eos_token_id=[5, 9, 11, 20], **SAMPLED)
        assert_same(a, b)
    assert len(engine._steps[llama]) == 1


def test_a_cache_of_other_layers_needs_another_step():
    """A text that goes on from a cache without windows, then one with them."""
    model = tiny_model("mistral")
    for past in (lambda: DynamicCache(), lambda: None):
        a, b = (
            generate(
                model, IDS, engine=which, trie=False, max_new_tokens=9, generator=seeded(1),
                return_dict_in_generate=True, **SAMPLED, **({CACHE_NAME: past()} if past() is not None else {}),
            )
            for which in ("eager", "static")
        )  # fmt: skip
        assert_same(a, b)
        kinds = [[type(layer) for layer in getattr(out, CACHE_NAME).layers] for out in (a, b)]
        assert kinds[0] == kinds[1]


def test_memory_goes_with_the_step():
    """Without waiting for the garbage collector."""
    model = tiny_llama()
    generate(model, IDS, engine="static", max_new_tokens=3, **SAMPLED)
    (kept,) = engine._steps[model].values()
    arena = weakref.ref(kept.step.cache.groups[0].buffers[0])
    gc.collect()
    gc.disable()
    try:
        del kept
        release(model)
        assert arena() is None
    finally:
        gc.enable()


def test_what_changes_a_forward_changes_the_key(llama):
    key = engine._model_key(llama)
    assert engine._model_key(llama) == key
    llama.train()
    assert engine._model_key(llama).modes != key.modes
    llama.eval()
    layer = llama.model.layers[0]
    layer.forward = layer.forward
    assert engine._model_key(llama).modes != key.modes
    del layer.forward
    assert engine._model_key(llama) == key
    llama.lm_head.weight.data = llama.lm_head.weight.data.clone()
    assert engine._model_key(llama).places != key.places


def test_steps_for_parameters_that_are_gone_go(graphs):
    model = tiny_llama()
    call = {"max_new_tokens": 3, **SAMPLED}
    generate(model, IDS, **call)
    model.train()
    generate(model, IDS, **call)
    model.eval()
    generate(model, IDS, **call)
    assert len(graphs) == len(engine._steps[model]) == 2
    model.lm_head.weight.data = model.lm_head.weight.data.clone()  # the old addresses are nobody's now
    generate(model, IDS, **call)
    assert len(graphs) == 3
    assert len(engine._steps[model]) == 1


def test_what_is_kept_does_not_keep_the_model():
    model = tiny_llama()
    generate(model, IDS, engine="static", max_new_tokens=3, router=Router.for_model(model), **SAMPLED)
    gone = weakref.ref(model)
    copy.deepcopy(model)
    del model
    gc.collect()
    assert gone() is None


def test_capacity_classes():
    """Never too small, at most a quarter of a power of two too large, few of them."""
    lengths = range(1, 5000)
    assert all(length <= capacity_class(length) <= max(256, length * 5 / 4 + 1) for length in lengths)
    assert len({capacity_class(length) for length in lengths}) == 18


def test_inference_mode_and_back(llama):
    release(llama)
    call = {"engine": "static", "max_new_tokens": 5, **SAMPLED}
    with torch.inference_mode():
        first = generate(llama, IDS, generator=seeded(1), **call)
    assert torch.equal(generate(llama, IDS, generator=seeded(1), **call), first)


def test_an_interrupt_leaves_a_step_that_serves(llama):
    class Interrupts(BaseStreamer):
        def put(self, value: Tensor) -> None:
            if value.dim() == 1:
                raise KeyboardInterrupt

        def end(self) -> None: ...

    call = {"engine": "static", "max_new_tokens": 5, **SAMPLED}
    want = generate(llama, IDS, generator=seeded(1), **call)
    with pytest.raises(KeyboardInterrupt):
        generate(llama, IDS, streamer=Interrupts(), **call)
    assert torch.equal(generate(llama, IDS, generator=seeded(1), **call), want)


def test_two_threads_at_a_time(llama):
    """The second one does without the step, or says that it cannot where it was asked for by name."""
    inside, go_on = threading.Event(), threading.Event()

    class Waits(BaseStreamer):
        def put(self, value: Tensor) -> None:
            if value.dim() == 1:  # no prompt any more
                inside.set()
                go_on.wait(60)

        def end(self) -> None: ...

    call = {"max_new_tokens": 5, "engine": "static", **SAMPLED}
    thread = threading.Thread(target=lambda: generate(llama, IDS, streamer=Waits(), **call))
    thread.start()
    try:
        assert inside.wait(60)
        with pytest.raises(RuntimeError, match="another call is using the step that this model keeps"):
            generate(llama, IDS, **call)
    finally:
        go_on.set()
        thread.join()
    generate(llama, IDS, **call)


# --- nothing is read on the host --------------------------------------------------------------------------------------


def a_step(model, depth, rows=2, captured=False, router=None, **change):
    """A step with a call under way, as a graph would find it."""
    check_model(model)
    adapter, stats = ModelAdapter(model), DecodingStats()
    prefilled = DynamicCache(config=model.config)
    with torch.no_grad():
        adapter.head_inputs(IDS[:, :3], prefilled)
    routing = Routing(
        router,
        width=3,
        depth=depth,
        hidden_size=adapter.hidden_size,
        temperature=1.0,
        device=model.device,
        backend=None,
    )
    shape = {"rows": rows, "width": 3, "depth": depth, "length": 60, "draw_children": True, "draw_choice": True,
             "num_eos": 2, "routing": routing, "captured": captured, "stats": stats, **change}  # fmt: skip
    kept = kept_step(model, adapter, prefilled, **shape)
    kept.step.adapter = adapter
    with torch.no_grad():
        kept.step.begin(
            torch.randn(rows, 53), torch.ones(rows, dtype=torch.int64), routing=routing, filters={}, limit=4,
            eos_token_ids=torch.tensor([51, 52]), pad_token_id=0,
            draws=Draws(0, torch.arange(rows), kept.step.num_slots),
        )  # fmt: skip
    return kept.step


# Torch traces grouped products, which these models have, in bf16 only.
EXPERTS = ("gpt_oss", "qwen3_moe")


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in EXPERTS])
@torch.no_grad()
def test_a_step_can_be_traced_without_values(family, depth):
    """Fake tensors have no values: whatever asks for one, as a host would, fails."""
    model = tiny_model(family)
    step = a_step(model, depth, router=Router.for_model(model, depth=depth))
    with FakeTensorMode(allow_non_fake_inputs=True):
        step.run()


@torch.no_grad()
def test_a_model_that_asks_for_values_cannot():
    model = tiny_llama()
    step = a_step(model, 1)
    model.model.layers[0].register_forward_hook(lambda module, args, out: out * float(out.sum()))
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(DataDependentOutputException):
        step.run()


class Shapes(TorchDispatchMode):
    """The ops that run, and the shapes of what they give."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, list[tuple[int, ...]]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in (out if isinstance(out, tuple | list) else [out]) if isinstance(t, Tensor)]
        self.seen.append((str(func), [tuple(t.shape) for t in tensors]))
        return out


def places_of(step) -> list[int]:
    group = step.cache.groups[0]
    tensors = [*vars(step).values(), step.record.numbers, step.record.log_probs, group.prefix_lens, *group.buffers]
    return [tensor.data_ptr() for tensor in tensors if isinstance(tensor, Tensor)]


@pytest.mark.parametrize("depth", [1, 2])
@torch.no_grad()
def test_every_step_is_the_same_to_the_device(llama, depth):
    """The same ops with the same shapes, on state that stays where it is, whatever rows have ended."""
    step = a_step(llama, depth, router=Router.for_model(llama, depth=depth))
    places = places_of(step)
    runs = []
    for number in range(6):
        if number == 2:
            step.active[0] = False
        with Shapes() as shapes:
            step.run()
        runs.append(shapes.seen)
    assert not step.active.any()
    assert all(run == runs[0] for run in runs)
    assert places_of(step) == places


# --- the driver of graphs, with a stand-in ----------------------------------------------------------------------------


class StandIn:
    """A "graph" that runs the step when it is replayed, and counts."""

    def __init__(self, step) -> None:
        self.step, self.replays = step, 0

    def replay(self) -> None:
        self.replays += 1
        self.step.run()


@pytest.fixture
def graphs(monkeypatch):
    """Calls on the CPU go the way of graphs."""
    made = []

    def capture(step, device):
        made.append(StandIn(step))
        return made[-1]

    monkeypatch.setattr(engine, "_graph_obstacle", engine._python_at_every_step)
    monkeypatch.setattr(engine, "_capture", capture)
    return made


@pytest.mark.parametrize("depth", [1, 2])
def test_what_is_decoded_past_the_end_is_cut_off(graphs, depth):
    """The host learns of the end some steps later; text, trajectory and counts are as if it had known at once."""
    model = tiny_llama()
    call = {"depth": depth, "max_new_tokens": 60, "eos_token_id": [5, 9], "return_dict_in_generate": True, **SAMPLED}
    want = generate(model, IDS, engine="eager", trie=False, generator=seeded(2), **call)
    out = generate(model, IDS, generator=seeded(2), **call)
    assert_same(want, out)
    assert (out.stats.engine, out.stats.engine_reason) == ("graph", None)
    steps = out.trajectory.choices.shape[1]
    assert steps < 57
    assert graphs[0].replays == steps + replay.MOST_STEPS_LATE


def test_the_length_limit_enqueues_nothing_past_it(graphs):
    model = tiny_llama()
    out = generate(model, IDS, max_new_tokens=7, return_dict_in_generate=True, **SAMPLED)
    assert out.trajectory.choices.shape[1] == graphs[0].replays == 7


def test_a_streamer_gets_every_token(graphs):
    class Collects(BaseStreamer):
        def __init__(self) -> None:
            self.values, self.ended = [], False

        def put(self, value: Tensor) -> None:
            self.values.append(value)

        def end(self) -> None:
            self.ended = True

    model, streamer = tiny_llama(), Collects()
    out = generate(model, IDS[:1], max_new_tokens=9, streamer=streamer, eos_token_id=5, **SAMPLED)
    assert streamer.ended
    assert torch.cat([value.flatten() for value in streamer.values]).tolist() == out[0].tolist()


def test_bad_values_are_said_while_decoding(graphs, monkeypatch):
    """Kernels for GPUs set flags: the next record that is read raises."""
    model = tiny_llama()
    generate(model, IDS, max_new_tokens=3, **SAMPLED)
    run = StandIn.replay

    def flags(self) -> None:
        run(self)
        if self.replays == 10:
            replay.word(torch.device("cpu")).fill_(8)

    monkeypatch.setattr(StandIn, "replay", flags)
    with pytest.raises(RuntimeError, match="a row of logits held NaN"):
        generate(model, IDS, max_new_tokens=50, **SAMPLED)
    assert graphs[0].replays < 20
    generate(model, IDS, max_new_tokens=3, **SAMPLED)


# --- which engine, and why -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [
    RuntimeError("CUDA error: operation not permitted when stream is capturing\nand more"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
])  # fmt: skip
def test_a_graph_that_cannot_be_had(graphs, monkeypatch, error):
    """The loop takes over with one warning that names the reason, and gives the same text."""
    model = tiny_llama()
    want = generate(model, IDS, engine="eager", max_new_tokens=9, generator=seeded(1), **SAMPLED)

    def fails(*args) -> None:
        try:
            raise error
        finally:
            raise RuntimeError("capture_end: the capture was invalidated")  # what comes of it later

    monkeypatch.setattr(engine, "_capture", fails)
    first_line = str(error).splitlines()[0]
    with pytest.warns(UserWarning, match=first_line) as caught:
        out = generate(model, IDS, max_new_tokens=9, generator=seeded(1), return_dict_in_generate=True, **SAMPLED)
    assert len(caught) == 1
    assert torch.equal(out.sequences, want)
    assert out.stats.engine == "eager"
    assert first_line in out.stats.engine_reason
    with pytest.raises(RuntimeError, match=f"generate: engine 'graph' cannot run: .*{first_line}"):
        generate(model, IDS, engine="graph", max_new_tokens=9, **SAMPLED)
    assert warmup(model, max_length=20).engine == "eager"


def test_a_failure_is_remembered_and_memory_is_not(graphs, monkeypatch):
    """What failed once fails again, so it is not tried again; but memory may be free the next time."""
    tried = []

    def fails(*args) -> None:
        tried.append(args)
        raise errors[-1]

    monkeypatch.setattr(engine, "_capture", fails)
    for errors, tries in (([RuntimeError("no")], 1), ([torch.OutOfMemoryError("none left")], 2)):
        model = tiny_llama()
        tried.clear()
        for _ in range(2):
            with pytest.warns(UserWarning, match=str(errors[-1])):
                generate(model, IDS, max_new_tokens=3, **SAMPLED)
        assert len(tried) == tries


def test_out_of_memory_lets_go_of_what_is_kept_first(graphs, monkeypatch):
    model = tiny_llama()
    generate(model, IDS, max_new_tokens=3, **SAMPLED)
    capture, failures = engine._capture, [torch.OutOfMemoryError("none left")]

    def fails_once(*args):
        if failures:
            raise failures.pop()
        return capture(*args)

    monkeypatch.setattr(engine, "_capture", fails_once)
    out = generate(model, IDS[:1], max_new_tokens=3, return_dict_in_generate=True, **SAMPLED)
    assert out.stats.engine == "graph"
    assert len(engine._steps[model]) == 1


def test_the_reason_is_not_the_callers_own_trouble(graphs, monkeypatch):
    def fails(*args) -> None:
        raise RuntimeError("the capture's")

    monkeypatch.setattr(engine, "_capture", fails)
    try:
        raise ValueError("the caller's")
    except ValueError:
        with pytest.warns(UserWarning, match="the capture's"):
            generate(tiny_llama(), IDS, max_new_tokens=3, **SAMPLED)


class Mine(torch.nn.Parameter):
    pass


@pytest.mark.parametrize(("change", "reason"), [
    (lambda m: m.model.layers[1].register_forward_hook(lambda *args: None), "there is a hook on the model's model"),
    (lambda m: m.lm_head.register_forward_pre_hook(lambda *args: None), "there is a hook on the model's lm_head"),
    (lambda m: setattr(m.lm_head, "weight", Mine(m.lm_head.weight.data)), "the model has parameters of type Mine"),
])  # fmt: skip
def test_what_a_graph_would_pass_over(graphs, change, reason):
    model = tiny_llama()
    change(model)
    out = generate(model, IDS, max_new_tokens=3, return_dict_in_generate=True, **SAMPLED)
    assert out.stats.engine == "eager"
    assert re.match(reason, out.stats.engine_reason)


def test_autocast(graphs):
    """A graph would keep its copies of the weights; ragged rows, whose keys and values come in two types, decode."""
    model = tiny_llama()
    with torch.autocast("cpu", torch.bfloat16):
        out = generate(model, **RAGGED, max_new_tokens=5, return_dict_in_generate=True, **SAMPLED)
    assert out.stats.engine_reason == "autocast is on, whose copies of the weights a graph would keep"
    assert out.sequences.shape == (3, 9)


REASONS = {
    "trie is on": {"trie": True},
    "on_step wants to see every step": {"on_step": lambda view: None},
    "scores or logits of every step are asked for": {"output_scores": True},
    r"the logits processors are \['RepetitionPenaltyLogitsProcessor'\]": {"repetition_penalty": 1.2},
    r"the stopping criteria have \['MaxTimeCriteria'\]": {"max_time": 100.0},
    "the router is a function": {"router": lambda hidden, valid: hidden[:, :3, 0]},
}


@pytest.mark.parametrize("reason", REASONS)
def test_what_the_loop_must_do(llama, graphs, reason):
    call = {"max_new_tokens": 4, "return_dict_in_generate": True, **SAMPLED, **REASONS[reason]}
    out = generate(llama, IDS, **call)
    assert out.stats.engine == "eager"
    assert re.match(reason, out.stats.engine_reason)
    for name in ("static", "graph"):
        with pytest.raises(ValueError, match=f"generate: engine '{name}' cannot run: {reason}"):
            generate(llama, IDS, engine=name, **call)


def test_the_default_on_a_cpu(llama):
    out = generate(llama, IDS, max_new_tokens=4, return_dict_in_generate=True, **SAMPLED)
    assert out.stats.engine == "eager"
    assert out.stats.engine_reason == "the model is on cpu, and graphs are CUDA's"
    out = generate(llama, IDS, max_new_tokens=4, engine="eager", return_dict_in_generate=True, **SAMPLED)
    assert out.stats.engine_reason == "engine is 'eager'"
    with pytest.raises(ValueError, match="engine 'graph' cannot run: the model is on cpu, and graphs are CUDA's"):
        generate(llama, IDS, max_new_tokens=4, engine="graph", **SAMPLED)
    with pytest.raises(ValueError, match="engine is 'fast', expected 'eager', 'static', 'graph' or None"):
        generate(llama, IDS, max_new_tokens=4, engine="fast", **SAMPLED)


# --- warm-up ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2])
def test_warmup_pays_beforehand(graphs, depth):
    model = tiny_llama()
    router = Router.for_model(model, depth=depth)
    ready = warmup(model, batch_size=2, max_length=30, depth=depth, router=router, eos_token_id=[5, 9])
    assert ready == WarmUp("graph", None, ready.seconds)
    assert len(graphs) == 1
    out = generate(
        model, IDS, depth=depth, router=router, max_length=30, eos_token_id=[5, 9], return_dict_in_generate=True,
        **SAMPLED,
    )  # fmt: skip
    assert len(graphs) == 1
    assert "warm-up" not in out.stats.seconds


def test_warmup_on_a_cpu(llama):
    ready = warmup(llama, max_length=30)
    assert (ready.engine, ready.engine_reason) == ("eager", "the model is on cpu, and graphs are CUDA's")
    assert warmup(llama, max_length=30, engine="static").engine == "static"


@pytest.mark.parametrize(("arguments", "message"), [
    ({"max_length": 0}, "max_length is 0, expected an integer >= 1"),
    ({"max_length": 9, "batch_size": 2.0}, "batch_size is 2.0, expected an integer >= 1"),
    ({"max_length": 9, "width": 0}, "width is 0"),
    ({"max_length": 9, "eos_token_id": "a"}, "eos_token_id is 'a', expected an integer or several"),
    ({"max_length": 9, "engine": "graph"}, "engine 'graph' cannot run: the model is on cpu"),
])  # fmt: skip
def test_warmup_refuses(llama, arguments, message):
    with pytest.raises(ValueError, match=message):
        warmup(llama, **arguments)


def test_warmup_and_release_of_what_cannot_be(llama):
    with pytest.raises(TypeError, match="has an unknown setting, expected some of width, depth"):
        warmup(llama, max_length=9, temperature=0.5)
    with pytest.raises(RuntimeError, match="warmup: tree_attention: backend 'cuda' cannot run: it takes"):
        warmup(llama, max_length=9, backend="cuda")
    with pytest.raises(TypeError, match="release: model is a NoneType, expected a model"):
        release(None)
