"""The packed likelihood against a fresh forward per path, and everything that may wrap a model."""

from __future__ import annotations

import copy
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from likelihood_oracle import likelihood
from models import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from lbr_kernels import Router, generate
from lbr_kernels.decoding.attention import LayerExtras
from lbr_kernels.training import forward, memory
from lbr_kernels.training import likelihood as likelihood_module
from lbr_kernels.training.likelihood import trajectory_log_probs

SHAPES = [(1, 1), (3, 1), (2, 2), (3, 2), (2, 3)]
PROMPTS = torch.tensor([[0, 0, 1, 2, 3], [0, 0, 1, 2, 3], [4, 5, 1, 2, 7]])
EOS = [3, 8, 12, 17]


def make(family="llama", width=3, depth=1, *, steps=7, seed=1, trained=True, **settings):
    """A model, a router that prefers something, and a trajectory: ragged prompts, two of them equal, early ends."""
    layers = {name: settings.pop(name) for name in ("num_hidden_layers",) if name in settings}
    model = tiny_model(family, vocab_size=23, **layers)
    router = Router.for_model(model, depth=depth, dim=8, num_heads=2)
    if trained:
        torch.nn.init.normal_(router.score.weight)
    mask = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    given = {"input_ids": PROMPTS, "attention_mask": mask, "top_k": 0} | settings
    trajectory = generate(
        model, width=width, depth=depth, router=router, do_sample=True, max_new_tokens=steps, eos_token_id=EOS,
        pad_token_id=0, generator=torch.Generator().manual_seed(seed), return_dict_in_generate=True, **given,
    ).trajectory  # fmt: skip
    return model, router, trajectory


def tensors(result):
    return result.node_log_probs, result.router_log_probs, result.node_entropies, result.router_entropies


def gradients(result, *modules):
    """Of the likelihood and the entropies, each term with a weight of its own."""
    generator = torch.Generator().manual_seed(0)
    parts = [value for value in (result if isinstance(result, list) else tensors(result)) if value is not None]
    total = sum((value * torch.randn(value.shape, generator=generator, dtype=value.dtype)).sum() for value in parts)
    for module in modules:
        module.zero_grad()
    total.backward()
    return {
        f"{number}.{name}": parameter.grad.clone()
        for number, module in enumerate(modules)
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }


def assert_same_gradients(actual, want, tolerance):
    assert actual.keys() == want.keys()
    scale = max(float(value.norm()) for value in want.values())
    for name, value in want.items():
        error = float((actual[name] - value).norm() / (value.norm() + 1e-3 * scale))
        assert error <= tolerance, f"{name}: {error:.1e}"


def assert_near(actual, want, tolerance=1e-5):
    """Relative, and for numbers near zero relative to the rounding of the scores that they come from."""
    for a, b in zip(actual, want, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("family", "shape"),
    [
        *(("llama", shape) for shape in SHAPES),
        *((family, (3, 2)) for family in ("gemma2", "gpt_oss", "qwen2", "gpt2", "cohere2", "opt", "qwen3_moe")),
        ("gemma2", (2, 3)), ("gemma3n_text", (3, 1)), ("phi3", (2, 2)),
    ],
)  # fmt: skip
def test_node_by_node(family, shape):
    """Separate forwards, and what decoding recorded (I5). Windows are shorter than the texts, some ends are early."""
    model, router, trajectory = make(family, *shape)
    assert trajectory.num_committed.unique().numel() > 1 or shape == (1, 1) or family != "llama"
    result = trajectory_log_probs(model, router, trajectory, entropies=True)
    with torch.no_grad():
        want = likelihood(model, router, trajectory)
    assert_near(tensors(result), want)
    assert_near(
        (result.node_log_probs, result.router_log_probs), (trajectory.node_log_probs, trajectory.router_log_probs)
    )
    assert result.node_log_probs[trajectory.node_tokens < 0].abs().sum() == 0
    assert result.router_log_probs[trajectory.choices < 0].abs().sum() == 0


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (2, 2), (2, 3)])
@pytest.mark.parametrize("detach", [False, True])
def test_gradients_are_those_of_brute_force(shape, detach):
    model, router, trajectory = make("gemma2", *shape)
    model.double()
    router.double()
    options = {"detach_router_input": detach}
    result = trajectory_log_probs(model, router, trajectory, entropies=True, on_policy=False, chunk_size=4, **options)
    want = likelihood(model, router, trajectory, **options)
    for actual, expected in zip(tensors(result), want, strict=True):
        torch.testing.assert_close(actual, expected.double(), rtol=1e-6, atol=1e-6)
    assert_same_gradients(gradients(result, model, router), gradients(want, model, router), 1e-5)  # norms are fp32


def test_one_prompt_is_read_once():
    model, router, trajectory = make()
    shared = trajectory_log_probs(model, router, trajectory, entropies=True)
    apart = trajectory_log_probs(model, router, trajectory, entropies=True, share_prompts=False)
    assert_near(tensors(shared), tensors(apart))
    assert apart.forwarded_nodes == shared.forwarded_nodes + 3
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    trajectory_log_probs(model, router, trajectory)
    handle.remove()
    assert len(calls) == 1


def test_equal_siblings_are_one_node():
    model, router, trajectory = make(seed=3)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(8)  # next tokens are almost certain
    trajectory = generate(
        model, PROMPTS, width=3, router=router, do_sample=True, top_k=0, max_new_tokens=12, eos_token_id=EOS,
        pad_token_id=0, generator=torch.Generator().manual_seed(0), return_dict_in_generate=True,
    ).trajectory  # fmt: skip
    result = trajectory_log_probs(model, router, trajectory, entropies=True)
    assert result.forwarded_nodes < 0.8 * int((trajectory.node_tokens >= 0).sum())
    with torch.no_grad():
        assert_near(tensors(result), likelihood(model, router, trajectory), 1e-4)  # of scores of some tens


def test_rows_do_not_depend_on_their_company():
    model, router, trajectory = make("gemma2", 3, 2)
    together = tensors(trajectory_log_probs(model, router, trajectory, entropies=True))
    for row in range(len(trajectory)):
        alone = tensors(trajectory_log_probs(model, router, trajectory[[row]], entropies=True))
        assert_near(alone, [value[[row]] for value in together])


def test_no_more_than_a_chunk_of_logits_is_alive():
    model, router, trajectory = make("gemma2", 3, 2)
    whole = trajectory_log_probs(model, router, trajectory, entropies=True)
    want = gradients(whole, model, router)
    saved, rows = [], []
    handle = model.get_output_embeddings().register_forward_hook(lambda m, args, out: rows.append(out.shape[-2]))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        result = trajectory_log_probs(model, router, trajectory, entropies=True, chunk_size=5)
    forwards = len(rows)
    assert not [shape for shape in saved if len(shape) > 1 and shape[-1] == 23 and shape[0] not in (1, 32)]
    assert_near(tensors(result), tensors(whole))
    assert_same_gradients(gradients(result, model, router), want, 1e-4)
    handle.remove()
    assert max(rows) == 5
    assert len(rows) == 2 * forwards - 1  # every chunk again, and the call of the model once


def test_router_of_no_parameters():
    model, _, trajectory = make()
    trajectory = replace(trajectory, settings=replace(trajectory.settings, router_fingerprint="none"))
    result = trajectory_log_probs(model, None, trajectory, entropies=True)
    with torch.no_grad():
        assert_near(tensors(result), likelihood(model, None, trajectory))


def test_prompts_of_embeddings():
    model, router, trajectory = make()
    with torch.no_grad():
        embeds = model.get_input_embeddings()(PROMPTS)
    mask = trajectory.prompt_mask.long()
    given = {"input_ids": None, "inputs_embeds": embeds, "attention_mask": mask}
    _, _, embedded = make(**given)
    assert embedded.prompt_embeds is not None
    want = trajectory_log_probs(model, router, trajectory, share_prompts=False)
    result = trajectory_log_probs(model, router, embedded)
    assert_near((result.node_log_probs,), (want.node_log_probs,))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model, router, trajectory = make("gemma2", 3, 2)
    want = trajectory_log_probs(model, router, trajectory)
    want_gradients = gradients(want, model, router)
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
    result = trajectory_log_probs(model, router, trajectory)
    assert_near((result.node_log_probs, result.router_log_probs), (want.node_log_probs, want.router_log_probs))
    assert_same_gradients(gradients(result, model, router), want_gradients, 1e-4)


def test_torchs_own_checkpoint_wrapper():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model, router, trajectory = make("llama", 3, 2)
    want = gradients(trajectory_log_probs(model, router, trajectory), model, router)
    wrapped = copy.deepcopy(model)
    for number, layer in enumerate(wrapped.model.layers):
        wrapped.model.layers[number] = checkpoint_wrapper(layer)
    actual = gradients(trajectory_log_probs(wrapped, router, trajectory, on_policy=False), wrapped, router)
    actual = {name.replace("._checkpoint_wrapped_module", ""): value for name, value in actual.items()}
    assert_same_gradients(actual, want, 1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_autocast(family):
    """In bf16, as far from fp32 as plain autocast forwards are."""
    model, router, trajectory = make(family, 3, 2)
    exact = trajectory_log_probs(model, router, trajectory)
    with torch.autocast("cpu", torch.bfloat16):
        result = trajectory_log_probs(model, router, trajectory)
        with torch.no_grad():
            plain = likelihood(model, router, trajectory)
    assert result.node_log_probs.dtype == torch.float32
    allowed = 2 * (plain[0] - exact.node_log_probs).abs().max() + 0.02
    assert (result.node_log_probs - exact.node_log_probs).abs().max() <= allowed
    assert_same_gradients(gradients(result, model, router), gradients(exact, model, router), 0.2)


def test_half_precision():
    model, router, trajectory = make("llama", 3, 2)
    exact = trajectory_log_probs(model, router, trajectory)
    model.bfloat16()
    result = trajectory_log_probs(model, router, trajectory, on_policy=False)
    assert result.node_log_probs.dtype == result.router_log_probs.dtype == torch.float32
    assert (result.node_log_probs - exact.node_log_probs).abs().max() < 0.2


def test_lora():
    peft = pytest.importorskip("peft")
    model, router, trajectory = make("llama", 3, 2)
    want = trajectory_log_probs(model, router, trajectory)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "lm_head"]))
    result = trajectory_log_probs(adapted, router, trajectory, on_policy=False)
    assert_near((result.node_log_probs,), (want.node_log_probs,))  # an untrained adapter adds zero
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    drawn = generate(
        adapted, input_ids=PROMPTS, width=3, depth=2, router=router, do_sample=True, top_k=0, max_new_tokens=4,
        eos_token_id=EOS, pad_token_id=0, return_dict_in_generate=True,
    ).trajectory  # fmt: skip
    result = trajectory_log_probs(adapted, router, drawn)
    assert_near((result.node_log_probs,), (drawn.node_log_probs,))
    trained = gradients(result, adapted).keys()
    assert trained
    assert all("lora_" in name for name in trained)
    prefix = peft.get_peft_model(
        copy.deepcopy(model), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    with pytest.raises(ValueError, match="learned prompts"):
        trajectory_log_probs(prefix, router, trajectory)


def test_compiled():
    model, router, trajectory = make("llama", 3, 1, num_hidden_layers=1)
    _, _, other = make("llama", 3, 1, seed=5, steps=9, num_hidden_layers=1)
    compiled = torch.compile(copy.deepcopy(model), backend="eager", dynamic=True)
    for drawn in (trajectory, other):
        want = trajectory_log_probs(model, router, drawn)
        result = trajectory_log_probs(compiled, router, drawn)
        assert_near((result.node_log_probs, result.router_log_probs), (want.node_log_probs, want.router_log_probs))
        actual = {name.replace("_orig_mod.", ""): g for name, g in gradients(result, compiled, router).items()}
        assert_same_gradients(actual, gradients(want, model, router), 1e-4)


def test_accelerates_wrapper():
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)  # other tests' trainers have left theirs
    model, router, trajectory = make("llama", 3, 2)
    exact = trajectory_log_probs(model, router, trajectory)
    prepared = accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare_model(copy.deepcopy(model))
    result = trajectory_log_probs(prepared, router, trajectory)
    error = (result.node_log_probs - exact.node_log_probs).abs().max()
    assert 0 < error < 0.2


def test_a_model_that_cannot_pack():
    """Recurrent state: a row per path, said once, and the same numbers."""
    config = AutoConfig.for_model(
        "mamba", vocab_size=23, hidden_size=16, state_size=4, num_hidden_layers=2, pad_token_id=0
    )
    torch.manual_seed(0)
    mamba = AutoModelForCausalLM.from_config(config).eval()
    _, _, trajectory = make("llama", 3, 2)
    router = Router.for_model(mamba, depth=2, dim=8, num_heads=2)
    with pytest.warns(
        UserWarning, match="MambaForCausalLM forwards every path by itself, since its state is recurrent"
    ):
        result = trajectory_log_probs(mamba, router, trajectory, entropies=True, on_policy=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trajectory_log_probs(mamba, router, trajectory, on_policy=False)
    with torch.no_grad():
        assert_near(tensors(result), likelihood(mamba, router, trajectory), 1e-4)
    assert result.node_log_probs.requires_grad


@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
def test_path_by_path_is_the_same(family, monkeypatch):
    model, router, trajectory = make(family, 3, 2)
    want = trajectory_log_probs(model, router, trajectory, entropies=True)
    want_gradients = gradients(want, model, router)
    monkeypatch.setattr(likelihood_module, "packing_obstacle", lambda model: "this test says so")
    with pytest.warns(UserWarning, match="this test says so"):
        result = trajectory_log_probs(model, router, trajectory, entropies=True)
    assert_near(tensors(result), tensors(want))
    assert_same_gradients(gradients(result, model, router), want_gradients, 1e-4)


def test_the_model_is_left_as_it_was_found(monkeypatch):
    model, router, trajectory = make()
    found = model.config._attn_implementation
    head, body = model.get_output_embeddings(), model.base_model

    def untouched():
        assert model.config._attn_implementation == found
        assert not head._forward_pre_hooks
        assert not body._forward_hooks
        assert type(model.base_model).__name__ == "LlamaModel"

    trajectory_log_probs(model, router, trajectory)
    untouched()
    monkeypatch.setattr(forward.PackedForward, "attend", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        trajectory_log_probs(model, router, trajectory)
    untouched()


@pytest.mark.parametrize(("family", "where"), [("gpt2", "drop"), ("opt", "decoder")])
def test_dropout_is_refused(family, where):
    """Modules of dropout, and layers that have a share of it; in training mode only."""
    model, router, trajectory = make(family, 3, 1)
    model.train()
    with pytest.raises(ValueError, match=rf"trains with dropout 0\.1 \(.*{where}\), expected 0"):
        trajectory_log_probs(model, router, trajectory)
    trajectory_log_probs(model.eval(), router, trajectory)
    attended = forward.PackedForward(None, None, None, [], None)
    extras = LayerExtras(scale=None, window=None, softcap=None, sinks=None, dropout=0.1)
    with pytest.raises(ValueError, match=r"attention dropout 0\.1, expected 0"):
        attended.attend(model, *[torch.zeros(1, 1, 1, 1)] * 3, extras)


def test_wrappers_of_a_router():
    model, router, trajectory = make()
    compiled = torch.compile(router, backend="eager")
    want = trajectory_log_probs(model, router, trajectory)
    assert_near((trajectory_log_probs(model, compiled, trajectory).router_log_probs,), (want.router_log_probs,))


def test_threads_share_a_model():
    """Plain forwards and other likelihoods beside it see nothing of one."""
    model, router, trajectory = make()
    want = trajectory_log_probs(model, router, trajectory)
    with torch.no_grad():
        plain = model(input_ids=PROMPTS).logits
    stop, failures = threading.Event(), []

    def forwards():
        while not stop.is_set():
            with torch.no_grad():
                logits = model(input_ids=PROMPTS).logits
            if logits.shape != plain.shape or not torch.allclose(logits, plain, atol=1e-4):
                failures.append(logits.shape)

    other = threading.Thread(target=forwards)
    other.start()
    try:
        with ThreadPoolExecutor(2) as pool:
            results = list(pool.map(lambda _: trajectory_log_probs(model, router, trajectory), range(8)))
    finally:
        stop.set()
        other.join()
    assert not failures
    for result in results:
        assert_near((result.node_log_probs,), (want.node_log_probs,))


def test_a_full_memory_says_nothing_of_the_model(monkeypatch):
    model, router, trajectory = make()
    attend = forward.PackedForward.attend

    def full(*_):
        raise torch.OutOfMemoryError("once")

    monkeypatch.setattr(forward.PackedForward, "attend", full)
    with pytest.raises(ValueError, match="out of memory on cpu"):
        trajectory_log_probs(model, router, trajectory)
    monkeypatch.setattr(forward.PackedForward, "attend", attend)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trajectory_log_probs(model, router, trajectory)


def test_refused():
    model, router, trajectory = make("gpt2", 3, 2)
    settings = trajectory.settings

    def refused(match, *, model=model, router=router, **change):
        changed = replace(trajectory, **{k: v for k, v in change.items() if hasattr(trajectory, k)})
        settings_change = {k: v for k, v in change.items() if hasattr(settings, k)}
        changed = replace(changed, settings=replace(settings, **settings_change))
        with pytest.raises(ValueError, match=match):
            trajectory_log_probs(model, router, changed, on_policy="fingerprint" in match)

    refused(r"drawn with \{'top_k': 5\}, expected none of it", filters={"top_k": 5})
    refused(r"drawn with \{'processors': \['Any'\]\}", filters={"processors": ["Any"]})
    refused("'router_do_sample': False", router_do_sample=False)
    refused("decoded with do_sample=False", mode="deterministic")
    refused(r"node_tokens of shape .* for width 2, depth 2", width=2)
    refused(r"node_tokens of shape .* for width 3, depth 1", depth=1)
    refused("router was made for depth 1, the trajectory has depth 2", router=Router.for_model(model, depth=1))
    refused("router was made for hidden size 16", router=Router(replace(router.config, hidden_size=16)))
    refused("token 22, expected less than the vocabulary's 20", model=tiny_model("gpt2", vocab_size=20))
    refused("drawn by a model with fingerprint", model=tiny_model("gpt2", vocab_size=23, seed=1))
    refused("drawn by a router with fingerprint", router=Router.for_model(model, depth=2, dim=8, num_heads=2))
    refused("reaches position .*, expected at most the model's last, 9", model=tiny_model("gpt2", n_positions=10))
    refused("holds choice 7, expected less than its 3", choices=torch.full_like(trajectory.choices, 7))
    with pytest.raises(ValueError, match="0 rows of"):
        trajectory_log_probs(model, router, trajectory[0:0])
    mask = trajectory.prompt_mask.clone()
    mask[1] = False
    refused("empty prompt in row 1", prompt_mask=mask)
    refused("token 30, expected less than the vocabulary's 23", prompt_ids=torch.full_like(trajectory.prompt_ids, 30))
    refused(r"num_committed \[1, 1, 1\] and", num_committed=torch.ones_like(trajectory.num_committed))
    with pytest.raises(TypeError, match="router is a str"):
        trajectory_log_probs(model, "router", trajectory)
    with pytest.raises(ValueError, match="chunk_size is 0"):
        trajectory_log_probs(model, router, trajectory, chunk_size=0)
    with pytest.raises(TypeError, match="trajectory is a dict"):
        trajectory_log_probs(model, router, {})
    with pytest.raises(TypeError, match="model is a Linear"):
        trajectory_log_probs(torch.nn.Linear(2, 2), router, trajectory)


def test_filters_where_they_are_allowed():
    model, router, trajectory = make(temperature=0.5)
    assert trajectory.settings.filters == {"temperature": 0.5}
    result = trajectory_log_probs(model, router, trajectory, allow_filters=True)
    assert_near((result.node_log_probs,), (trajectory.node_log_probs,))
    _, _, cut = make(top_k=4)
    result = trajectory_log_probs(model, router, cut, allow_filters=True)
    there = cut.node_tokens >= 0
    assert (result.node_log_probs[there] < cut.node_log_probs[there]).all()


def test_what_does_not_fit_is_refused_beforehand(monkeypatch):
    model, router, trajectory = make()
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    with pytest.raises(ValueError, match=r"3 rows are \d+ nodes, .* take .* GiB, of .* free on cpu; split"):
        trajectory_log_probs(model, router, trajectory)
    monkeypatch.setattr(memory, "free_bytes", lambda device: None)

    def too_much(*_):
        torch.empty(2**60)

    monkeypatch.setattr(forward.PackedForward, "attend", too_much)
    with pytest.raises(ValueError, match=r"out of memory on cpu: 3 rows are \d+ nodes"):
        trajectory_log_probs(model, router, trajectory)
    assert memory.free_bytes(torch.device("cpu")) is None
