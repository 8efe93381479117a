"""``LBRGRPOTrainer``: TRL's trainer on trees; what it pins of TRL; checkpoints, and going on exactly."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed")

import transformers
import trl
from accelerate import DistributedType
from torch.distributed.fsdp import StateDictType
from transformers import AutoModelForCausalLM, Trainer
from trl import GRPOConfig, GRPOTrainer
from trl_support import (
    config,
    history,
    prompts,
    share_of_good,
    tiny_policy,
    tiny_router,
    tiny_tokenizer,
    trainer,
)

from lbr_kernels import Router
from lbr_kernels.training import trl as module
from lbr_kernels.training.trl import ROUTER, UNFINISHED, LBRGRPOConfig, LBRGRPOTrainer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- the canary -------------------------------------------------------------------------------------------------------

# Of the text of what the trainer overrides or leans on. If one differs, read TRL's method again beside ours, mend what
# has to be mended, and only then put the new hash here.
SOURCES = {
    "__init__": "18f01b7a46c9544b",
    "training_step": "9e18632f7dd8e8d8",
    "_prepare_inputs": "f824e7fb07147956",
    "_calculate_rewards": "736ae29b083840b5",
    "_generate_single_turn": "e0f02e4fc094cefd",
    "_generate": "2a27fdf8f5e6f356",
    "_generate_and_score_completions": "1fa48922792dcd5c",
    "_get_per_token_logps_and_entropies": "ea73c3909275851d",
    "_compute_loss": "80295546bbdbf6f7",
    "log": "1e7772819cc8cf09",
    "_save_checkpoint": "ec91bde123649111",
    "_load_optimizer_and_scheduler": "5c1772becdfd7fdb",
}


@pytest.mark.parametrize("name", SOURCES)
def test_trl_is_as_it_was_read(name):
    source = inspect.getsource(
        getattr(GRPOTrainer, name).__wrapped__ if name == "__wrapped__" else getattr(GRPOTrainer, name)
    )
    found = hashlib.sha256(source.encode()).hexdigest()[:16]
    assert found == SOURCES[name], (
        f"trl {trl.__version__}: GRPOTrainer.{name} has changed (hash {found}). LBRGRPOTrainer relies on how it was in "
        "1.16.0: read it again, see the comment at SOURCES."
    )


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("create_optimizer", ["self", "model"]),
        ("_get_output_dir", ["self", "trial"]),
        ("_save", ["self", "output_dir", "state_dict"]),
        ("_save_checkpoint", ["self", "model", "trial"]),
        ("_load_from_checkpoint", ["self", "resume_from_checkpoint", "model"]),
        ("_push_from_checkpoint", ["self", "checkpoint_folder"]),
    ],
)
def test_transformers_trainer_has_what_is_overridden(name, parameters):
    assert list(inspect.signature(getattr(Trainer, name)).parameters) == parameters, transformers.__version__


def test_another_trl_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(trl, "__version__", "1.17.0")
    with pytest.raises(ImportError, match=r"trl >= 1.16, < 1.17; installed is 1.17.0"):
        trainer(tmp_path)


# --- training ---------------------------------------------------------------------------------------------------------


def test_it_learns(tmp_path):
    """A reward for half of the vocabulary rises, by the model and by the router; what is logged."""
    made = trainer(tmp_path, max_steps=12, per_device_train_batch_size=16, num_generations=8, warmup_steps=0)
    before = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
    made.train()
    rewards = [entry["reward"] for entry in history(made)]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.2
    moved = {name for name, tensor in made.model.state_dict().items() if not torch.equal(tensor, before[name])}
    # What is added to all candidates alike, the router's softmax takes away again.
    assert {name for name, _ in made.model.named_parameters()} - moved <= {f"{ROUTER}.candidate_attention.norm.bias"}
    for entry in history(made):
        assert 0 < entry["entropy"] < math.log(40)
        assert 0 < entry["router_entropy"] <= math.log(2) + 1e-6
        assert entry["ratio/mean"] == pytest.approx(1, abs=1e-5)
        assert entry["router_ratio/max"] == pytest.approx(1, abs=1e-4)
        assert entry["kl"] == pytest.approx(0, abs=1e-6)
        assert 1.5 <= entry["forwarded_nodes_per_token"] <= 2
        assert entry["undecided_groups"] == entry["frac_reward_zero_std"]
        assert {"rewards/share_of_good/mean", "router_learning_rate", "clip/high", "grad_norm"} <= set(entry)


def test_parameter_groups(tmp_path):
    made = trainer(tmp_path, learning_rate=1e-6, router_learning_rate=1e-4, weight_decay=0.01)
    groups = made.create_optimizer().param_groups
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [
        (1e-6, 0.01), (1e-6, 0.0), (1e-4, 0.01), (1e-4, 0.0),
    ]  # fmt: skip
    names = {id(parameter): name for name, parameter in made.model.named_parameters()}
    for group in groups:
        for parameter in group["params"]:
            name = names.pop(id(parameter))
            assert name.startswith(ROUTER) == (group["lr"] == 1e-4)
            assert ("norm" in name or name.endswith("bias")) == (group["weight_decay"] == 0), name
    assert not names  # each of them once


def test_defaults_are_the_paper_s():
    defaults = LBRGRPOConfig("unused", num_generations=8, use_cpu=True, bf16=False)
    assert (defaults.learning_rate, defaults.router_learning_rate, defaults.width) == (1e-6, 1e-4, 3)
    assert (defaults.epsilon, defaults.delta, defaults.beta, defaults.entropy_coef) == (0.2, 3.0, 0, 0)
    assert (defaults.weight_decay, defaults.max_grad_norm, defaults.temperature, defaults.top_p) == (0.01, 1, 1, 1)
    assert (defaults.loss_type, defaults.num_iterations) == ("dapo", 1)


@pytest.mark.parametrize(
    "change",
    [
        {"loss_type": "dapo", "gradient_accumulation_steps": 2},
        {"loss_type": "grpo", "num_iterations": 2, "beta": 0.1},
        *(
            pytest.param(more, marks=pytest.mark.full)
            for more in (
                {"loss_type": "bnpo", "gradient_accumulation_steps": 2, "mask_truncated_completions": True},
                {"loss_type": "dr_grpo", "steps_per_generation": 2, "epsilon_high": 0.3, "scale_rewards": "batch"},
                {"loss_type": "dapo", "steps_per_generation": 4, "gradient_accumulation_steps": 2, "entropy_coef": 0.0},
            )
        ),
    ],
    ids=str,
)
def test_width_1_trains_as_trl_does(tmp_path, change, monkeypatch):
    """The same completions, given to TRL's own trainer: the same losses, metrics and weights after four steps."""
    shared = {"max_steps": 4, "learning_rate": 3e-3, "weight_decay": 0.0, **change}
    policy = tiny_policy()
    policy.save_pretrained(tmp_path / "policy")  # where TRL finds the reference

    def load():
        return AutoModelForCausalLM.from_pretrained(tmp_path / "policy", dtype=torch.float32)

    ours = trainer(tmp_path / "ours", model=load(), width=1, behaviour="recomputed", **shared)
    rollouts = []
    generate = ours._generate_single_turn

    def remember(*args, **kwargs):
        rollouts.append(generate(*args, **kwargs))
        return rollouts[-1]

    monkeypatch.setattr(ours, "_generate_single_turn", remember)
    ours.train()
    settings = {
        name: value
        for name, value in vars(config(tmp_path / "theirs", **shared)).items()
        if name in inspect.signature(GRPOConfig).parameters
        and name not in ("generation_batch_size", "steps_per_generation")
    }
    settings["steps_per_generation"] = shared.get("steps_per_generation")
    theirs = GRPOTrainer(
        load(), share_of_good, GRPOConfig(**settings), train_dataset=prompts(), processing_class=tiny_tokenizer()
    )
    monkeypatch.setattr(theirs, "_generate_single_turn", lambda *args, **kwargs: rollouts.pop(0))
    theirs.train()
    assert not rollouts
    for mine, other in zip(history(ours), history(theirs), strict=True):
        same = {"loss", "reward", "entropy", "grad_norm", "completions/mean_length", "frac_reward_zero_std"}
        for name in same & set(mine) & set(other):
            assert mine[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), name
        assert mine.keys() >= {"loss", "grad_norm", "ratio/max"}
        if "clip/low" in mine:
            assert mine["clip/low"] == pytest.approx(other["clip_ratio/low_mean"])
        if shared.get("beta"):
            assert mine["reference_kl"] == pytest.approx(other["kl"], rel=1e-3, abs=1e-5)
    for name, tensor in theirs.model.state_dict().items():
        torch.testing.assert_close(ours.model.state_dict()[name], tensor, rtol=1e-3, atol=2e-4, msg=name)


@pytest.mark.parametrize(
    "change",
    [
        {"num_iterations": 2, "gradient_accumulation_steps": 2},
        {"num_iterations": 2, "behaviour": "recomputed", "depth": 2, "beta": 0.05},
        {"gradient_checkpointing": True, "width": 3, "router_entropy_coef": 0.01, "entropy_coef": 0.01},
        {"bf16": True, "loss_type": "bnpo", "nodes": "mean", "detach_router_input": True},
        {"mask_truncated_completions": True, "allow_filters": True, "temperature": 0.7, "top_k": 20},
    ],
    ids=str,
)
def test_settings(tmp_path, change):
    """They train, and say what they shall: ratios that leave 1 behind the first update, a KL to the reference."""
    if change.get("beta"):
        model = tiny_policy()
        model.save_pretrained(tmp_path / "policy")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "policy", dtype=torch.float32)
    else:
        model = None
    made = trainer(tmp_path, model=model, **{"max_steps": 4, **change})
    before = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
    made.train()
    entries = history(made)
    assert all(math.isfinite(value) for entry in entries for value in entry.values())
    moved = [name for name, tensor in made.model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert any(name.startswith(ROUTER) for name in moved)
    assert any(not name.startswith(ROUTER) for name in moved)
    if change.get("num_iterations"):
        assert [abs(entry["ratio/max"] - 1) > 1e-3 for entry in entries] == [False, True] * 2
        assert entries[1]["router_ratio/max"] != pytest.approx(1, abs=1e-4)
    if change.get("beta"):
        assert entries[0]["reference_kl"] == pytest.approx(0, abs=1e-6)
        assert entries[3]["reference_kl"] > 1e-4
        assert entries[3]["router_reference_kl"] > 0


def test_lora(tmp_path):
    """Adapters and router train, the base does not; the reference is the model without adapters."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    lora = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    made = trainer(
        tmp_path, trainer_args={"peft_config": lora}, max_steps=3, save_strategy="steps", save_steps=3, beta=0.05,
        num_iterations=2, gradient_checkpointing=True,
    )  # fmt: skip
    before = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
    made.train()
    moved = {name for name, tensor in made.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert any(name.startswith(ROUTER) for name in moved)
    assert any("lora" in name for name in moved)
    assert all(name.startswith(ROUTER) or "lora_" in name for name in moved)
    assert not any("lora" in name for name in moved if name.startswith(ROUTER))
    assert history(made)[0]["reference_kl"] == pytest.approx(0, abs=1e-6)
    assert history(made)[2]["reference_kl"] > 1e-5
    checkpoint = tmp_path / "checkpoint-3"
    again = trainer(tmp_path, trainer_args={"peft_config": lora}, max_steps=3)
    again._load_from_checkpoint(str(checkpoint))
    for name, tensor in made.model.state_dict().items():
        torch.testing.assert_close(again.model.state_dict()[name], tensor, msg=name)


def test_equal_rewards_change_nothing(tmp_path):
    made = trainer(tmp_path, reward=lambda completions, **_: [0.3] * len(completions), weight_decay=0.0)
    before = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
    made.train()
    for name, tensor in made.model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], msg=name)
    assert all(entry["undecided_groups"] == 1 for entry in history(made))


def test_a_plain_config_and_an_untrained_router(tmp_path):
    settings = config(tmp_path, width=2, max_steps=1)
    plain = GRPOConfig(str(tmp_path), **{
        name: getattr(settings, name)
        for name in ("per_device_train_batch_size", "num_generations", "max_completion_length", "max_steps", "use_cpu",
                     "bf16", "report_to", "gradient_checkpointing", "disable_tqdm", "logging_steps", "save_strategy")
    })  # fmt: skip
    made = LBRGRPOTrainer(
        tiny_policy(), None, share_of_good, plain, train_dataset=prompts(), processing_class=tiny_tokenizer()
    )
    assert (made.args.width, made.args.depth, made.args.delta) == (3, 1, None)
    made.train()
    assert history(made)[0]["router_entropy"] == pytest.approx(math.log(3))
    assert made.router is made.model.get_submodule(ROUTER)


def test_evaluation_draws_the_same_again(tmp_path):
    made = trainer(tmp_path, trainer_args={"eval_dataset": prompts(2)}, per_device_eval_batch_size=4)
    first, state = made.evaluate(), torch.get_rng_state()
    made._evaluation = (-1, 0)
    second = made.evaluate()
    assert first["eval_reward"] == second["eval_reward"] > 0
    assert first["eval_router_entropy"] > 0
    assert state.shape == torch.get_rng_state().shape


def test_rows_draw_from_their_own_streams(tmp_path, monkeypatch):
    """The rows of a second process are numbered on from those of the first; equal prompts are read once."""
    made = trainer(tmp_path)
    made.model.train()
    seen = []
    generate = module.generate

    def spy(*args, **kwargs):
        seen.append((kwargs["streams"].tolist(), kwargs["generation_config"].num_return_sequences, args[1].shape))
        return generate(*args, **kwargs)

    monkeypatch.setattr(module, "generate", spy)
    ids = [[5, 6, 7]] * 2 + [[8, 9]] * 2
    both, _ = made._generate_single_turn(ids, None, {}, 2)
    monkeypatch.setattr(type(made.accelerator), "process_index", 1)
    rest, _ = made._generate_single_turn(ids[2:], None, {}, 2)
    assert seen == [([0, 1, 2, 3], 2, (2, 3)), ([2, 3], 2, (1, 2))]
    assert rest == both[2:]
    assert made.model.training


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.7}, "temperature is 0.7, expected 1.0, or allow_filters=True"),
        ({"top_p": 0.9}, "top_p is 0.9"),
        ({"top_k": 50}, "top_k is 50"),
        ({"min_p": 0.1}, "min_p is 0.1"),
        ({"repetition_penalty": 1.1}, "repetition_penalty is 1.1"),
        ({"loss_type": "cispo"}, "loss_type is 'cispo', expected 'dapo' or 'bnpo' or 'grpo' or 'dr_grpo'"),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level is 'sequence'"),
        ({"top_entropy_quantile": 0.5}, "top_entropy_quantile is 0.5"),
        ({"generation_kwargs": {"num_beams": 2}}, "generation_kwargs is"),
        ({"use_vllm": True}, "use_vllm is True, expected False"),
        ({"use_transformers_continuous_batching": True}, "use_transformers_continuous_batching is True"),
        ({"cast_lm_head_to_fp32": True}, "cast_lm_head_to_fp32 is True"),
        ({"off_policy_mask_threshold": 0.1}, "off_policy_mask_threshold is 0.1"),
        ({"behaviour": "old"}, "behaviour is 'old', expected 'recorded' or 'recomputed'"),
        ({"nodes": "max"}, "nodes is 'max'"),
        ({"width": 0}, "width is 0"),
        ({"router_learning_rate": -1.0}, "router_learning_rate is -1.0"),
        ({"trainer_args": {"tools": [print]}}, "tools is given, which a tree cannot honour"),
        ({"trainer_args": {"rollout_func": print}}, "rollout_func is given"),
        ({"width": 1, "router": Router.for_model(tiny_policy())}, "router is given and width is 1"),
        ({"depth": 2, "router": Router.for_model(tiny_policy())}, "router was made for depth 1, expected 2"),
    ],
)
def test_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **change)


@pytest.mark.parametrize(
    ("runs", "version", "kind", "message"),
    [
        (DistributedType.MULTI_CPU, 2, "FULL", "fsdp is asked for, and accelerate runs MULTI_CPU"),
        (DistributedType.FSDP, 1, "FULL", "fsdp_version is 1, expected 2"),
        (DistributedType.FSDP, 2, "SHARDED", "fsdp_state_dict_type is SHARDED_STATE_DICT, expected FULL_STATE_DICT"),
    ],
)
def test_sharding_that_is_refused(tmp_path, runs, version, kind, message):
    made = trainer(tmp_path)
    plugin = SimpleNamespace(fsdp_version=version, state_dict_type=StateDictType[f"{kind}_STATE_DICT"])
    made.accelerator = SimpleNamespace(distributed_type=runs, state=SimpleNamespace(fsdp_plugin=plugin))
    with pytest.raises(ValueError, match=message):
        made._allow_sharding()


def test_no_sharding_where_trees_cannot_be_packed(tmp_path, monkeypatch):
    made = trainer(tmp_path)
    monkeypatch.setattr(module, "packing_obstacle", lambda inner: "its layers are recurrent")
    made._check(made.model)
    made._checked, made.is_fsdp_enabled = False, True
    with pytest.raises(ValueError, match="Qwen3ForCausalLM cannot train under FSDP, since its layers are recurrent"):
        made._check(made.model)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rewards_that_are_no_numbers(tmp_path, bad):
    made = trainer(tmp_path, reward=lambda completions, **_: [0.0, 1.0, bad, 0.0])
    with pytest.raises(ValueError, match=rf"reward function '<lambda>' returned {bad} for row 2"):
        made.train()
    made = trainer(tmp_path, reward=lambda completions, **_: [None, 1.0, 0.5, 0.0], max_steps=1)
    made.train()  # None says that the function does not apply
    assert history(made)[0]["reward"] == pytest.approx(0.5)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_the_model_s_files_are_the_model_s(tmp_path):
    """Model and router are found where they always are, and the model is as if there were no router."""
    made = trainer(tmp_path / "run", max_steps=1)
    made.train()
    made.save_model(str(tmp_path / "saved"))
    model, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", dtype=torch.float32, output_loading_info=True
    )
    assert not report["unexpected_keys"]
    assert not report["missing_keys"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(made.model.state_dict()[name], tensor), name
    router = Router.from_pretrained(tmp_path / "saved" / "router")
    for name, tensor in router.state_dict().items():
        assert torch.equal(made.router.state_dict()[name], tensor), name
    made.model.save_pretrained(tmp_path / "plain")  # not by the trainer
    assert not AutoModelForCausalLM.from_pretrained(tmp_path / "plain", output_loading_info=True)[1]["unexpected_keys"]


EXACT = {
    "max_steps": 7, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2, "steps_per_generation": 3,
    "num_iterations": 1, "depth": 2, "learning_rate": 5e-3, "lr_scheduler_type": "linear",
}  # fmt: skip


def test_killed_and_resumed(tmp_path):
    """SIGKILL at some step, in the middle of a batch of rollouts: the run goes on as if nothing had happened."""
    whole = trainer(tmp_path / "whole", **EXACT)
    whole.train()
    step = random.randint(3, 6)
    sign = tmp_path / "sign"
    options = {"args": {**EXACT, "output_dir": str(tmp_path / "run")}, "pause": step, "sign": str(sign)}
    child = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("trl_support.py")), json.dumps(options)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
    )
    try:
        while not sign.exists():
            assert child.poll() is None, "the run ended before it was killed"
            time.sleep(0.05)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    torch.manual_seed(123)
    resumed = trainer(tmp_path / "run", **EXACT)
    resumed.train(resume_from_checkpoint=True)
    assert history(resumed) == history(whole), f"killed at step {step}"
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
    assert sorted(path.name for path in (tmp_path / "run").glob("*")) == ["README.md", "checkpoint-6", "checkpoint-7"]


@pytest.mark.parametrize("step", [2, 3])
def test_resumed_at_the_end_of_an_epoch(tmp_path, step):
    """Two steps are an epoch: each has an order of its own, which a run that begins there knows too."""
    settings = {"per_device_train_batch_size": 16, "max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    whole = trainer(tmp_path, **settings)
    whole.train()
    resumed = trainer(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert history(resumed) == history(whole)


class Interrupted(BaseException):
    """As KeyboardInterrupt: no handler of exceptions stops it."""


@pytest.mark.parametrize("where", ["_save_optimizer_and_scheduler", "_save_rng_state", "_save_rollouts"])
def test_a_failed_save_leaves_no_checkpoint(tmp_path, monkeypatch, where):
    made = trainer(tmp_path, max_steps=3, save_strategy="steps", save_steps=1)
    original, calls = getattr(made, where), []

    def fail_the_second_time(*args, **kwargs):
        original(*args, **kwargs)
        calls.append(None)
        if len(calls) == 2:
            raise Interrupted

    monkeypatch.setattr(made, where, fail_the_second_time)
    with pytest.raises(Interrupted):
        made.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1"]
    assert (tmp_path / UNFINISHED).is_dir()
    resumed = trainer(tmp_path, max_steps=3, save_strategy="steps", save_steps=1)
    resumed.train(resume_from_checkpoint=True)
    assert [entry["step"] for entry in history(resumed)] == [1, 2, 3]
    assert not (tmp_path / UNFINISHED).exists()


def test_the_best_checkpoint_keeps_its_name(tmp_path):
    made = trainer(
        tmp_path, trainer_args={"eval_dataset": prompts(1)}, per_device_eval_batch_size=4, max_steps=2,
        save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, metric_for_best_model="eval_reward",
        load_best_model_at_end=True, save_total_limit=1,
    )  # fmt: skip
    made.train()
    best = Path(made.state.best_model_checkpoint)
    assert best.parent == tmp_path
    assert best.is_dir()
    assert json.loads((best / "trainer_state.json").read_text(encoding="utf-8"))["best_model_checkpoint"] == str(best)


def test_push_to_hub(tmp_path, monkeypatch):
    """Model, tokenizer and router go up together."""
    uploads = []

    def upload(*, folder_path, **kwargs):
        uploads.append(sorted(str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*")))
        return SimpleNamespace(done=lambda: True)

    hub = SimpleNamespace(create_repo=lambda *a, **k: SimpleNamespace(repo_id="me/run"), upload_folder=upload)
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda: hub)
    made = trainer(
        tmp_path, max_steps=1, push_to_hub=True, hub_model_id="me/run", save_strategy="steps", save_steps=1,
        hub_strategy="every_save",
    )  # fmt: skip
    made.train()
    assert {"router/router.safetensors", "router/router_config.json", "model.safetensors"} <= set(uploads[0])
    made.push_to_hub()
    assert {"router/router.safetensors", "router/router_config.json", "model.safetensors"} <= set(uploads[-1])


def test_the_reference_router_is_not_trained(tmp_path):
    tiny_policy().save_pretrained(tmp_path / "policy")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "policy", dtype=torch.float32)
    router = tiny_router(model)
    before = {name: tensor.clone() for name, tensor in router.state_dict().items()}
    made = trainer(tmp_path, model=model, router=router, beta=0.1)
    made.train()
    for name, tensor in made.reference_router.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not torch.equal(made.router.in_proj.weight, before["in_proj.weight"])
