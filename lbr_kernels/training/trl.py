"""Local Branch Routing in TRL: a ``GRPOTrainer`` whose rollouts are trees and whose loss is theirs.

Contract
--------
Datasets, reward functions, advantages, callbacks, schedules, accumulation, evaluation and the Hub are TRL's; see its
``GRPOTrainer``. What differs:

- completions come from :func:`lbr_kernels.generate`; their trajectories travel with TRL's other tensors, rows first;
- the loss is :func:`policy_loss` of :func:`trajectory_log_probs`, reduced as ``loss_type`` says ("dapo", "bnpo",
  "grpo" or "dr_grpo") over the same batches that TRL reduces over; at width 1 it is TRL's;
- the router is a submodule of the policy, so that whatever accelerate does to the model (DDP, FSDP2) it does to both;
  it has its own learning rate, and it is written beside the model, never into its weights: ``router/`` in every
  checkpoint and on the Hub;
- a checkpoint appears under its name once it is whole, and holds what is needed to go on exactly, rollouts that are
  still in use included.

What cannot be honoured is refused at construction, by name. Advantages are TRL's too, with its 1e-4 beside the standard
deviation.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, field, fields
from itertools import groupby
from types import MethodType
from typing import Any, Literal

import numpy as np
import torch
import trl
from accelerate import DistributedType
from accelerate.logging import get_logger
from packaging.version import Version
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, StateDictType
from transformers import PreTrainedModel, ProcessorMixin
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from trl import GRPOConfig, GRPOTrainer
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import get_callable_name, pad

from lbr_kernels.decoding.adapter import check_model
from lbr_kernels.decoding.generate import LBRGenerateOutput, generate
from lbr_kernels.decoding.trajectory import DecodingSettings, TreeTrajectory
from lbr_kernels.router import Router
from lbr_kernels.training.forward import inner_model, packing_obstacle
from lbr_kernels.training.likelihood import TrajectoryLogProbs, trajectory_log_probs
from lbr_kernels.training.loss import Reduction, policy_loss

TRL_VERSIONS = ("1.16", "1.17")  # from the first, below the second; pyproject.toml says the same
ROUTER = "lbr_router"  # the policy's submodule
ROUTER_FOLDER = "router"
UNFINISHED = "unfinished"  # where a checkpoint is while it is written
TRAJECTORY = "lbr_"  # what the names of a trajectory's tensors start with, among TRL's

# Settings that a tree or its loss cannot honour, with the values that are accepted.
_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "loss_type": ("dapo", "bnpo", "grpo", "dr_grpo"),
    "importance_sampling_level": ("token",),
    "use_vllm": (False,),
    "use_liger_kernel": (False,),
    "use_transformers_continuous_batching": (False,),
    "cache_implementation": (None,),
    "generation_kwargs": (None, {}),
    "cast_lm_head_to_fp32": (False,),
    "router_aux_loss_coef": (None, 0),
    "top_entropy_quantile": (1.0,),
    "use_adaptive_entropy": (False,),
    "off_policy_mask_threshold": (None,),
    "torch_compile": (False,),
    "ds3_gather_for_generation": (True,),
}
# What shapes the distribution that children are drawn from; training needs the model's own (paper, section 5).
_NO_FILTERS: dict[str, tuple[Any, ...]] = {
    "temperature": (1.0,),
    "top_p": (1.0, None),
    "top_k": (0, None),
    "min_p": (None, 0.0),
    "repetition_penalty": (1.0, None),
}

logger = get_logger(__name__)


@dataclass
class LBRGRPOConfig(GRPOConfig):
    """TRL's ``GRPOConfig`` and what a tree needs; defaults that differ from TRL's are method choices.

    Args:
        width, depth: K and L of the tree (the paper trains 3 and 1, and 3 and 2).
        router_learning_rate: of the router's parameters; ``learning_rate`` is the model's (the paper's 1e-4 and 1e-6).
        router_temperature: tau of the routing softmax.
        behaviour: the denominators of the ratios: ``"recorded"``, the log-probabilities of decoding, or
            ``"recomputed"``, those of the training forward before the first update, as TRL does.
        nodes: ``"sum"`` or ``"mean"`` over the nodes grown for a position, see :func:`policy_loss`.
        router_entropy_coef: weight of the entropy bonus of the decisions; ``entropy_coef`` is that of the nodes.
        detach_router_input: keep the decisions' gradient from the model.
        allow_filters: accept temperature, top-p, top-k, min-p and repetition penalty, under which the likelihood is not
            that of the draws.
        backend: of the ops in decoding and training.
        delta: TRL's two-sided clipping, which for ``delta > 1 + epsilon_high`` is the dual clip; 3 by default.
    """

    width: int = 3
    depth: int = 1
    router_learning_rate: float = 1e-4
    router_temperature: float = 1.0
    behaviour: str = "recorded"
    nodes: Literal["sum", "mean"] = "sum"
    router_entropy_coef: float = 0.0
    detach_router_input: bool = False
    allow_filters: bool = False
    backend: str | None = None
    delta: float | None = 3.0
    weight_decay: float = 0.01
    disable_dropout: bool = field(default=True)  # else the rollouts' network is not the one that is trained


class LBRGRPOTrainer(GRPOTrainer):
    """GRPO on trees (paper, section 5).

    Args:
        model: as for TRL's trainer.
        router: is trained with the model. None makes an untrained one, which is uniform; at width 1 there is none.
        reward_funcs: as for TRL's trainer. A reward that is NaN or infinite is an error; None says that a function does
            not apply.
        args: an :class:`LBRGRPOConfig`, or a plain ``GRPOConfig``, for which the tree's settings are the defaults.
        **trainer: as for TRL's trainer.

    Raises:
        ValueError: a setting that cannot be honoured, or a router that does not fit.
        ImportError: a TRL that this class was not written for.
    """

    def __init__(
        self,
        model: Any,
        router: Router | None = None,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        **trainer: Any,
    ) -> None:
        if not Version(TRL_VERSIONS[0]) <= Version(trl.__version__) < Version(TRL_VERSIONS[1]):
            raise ImportError(
                f"LBRGRPOTrainer overrides private methods of trl >= {TRL_VERSIONS[0]}, < {TRL_VERSIONS[1]}; "
                f"installed is {trl.__version__}"
            )
        if args is None:
            args = LBRGRPOConfig(f"{os.path.basename(str(getattr(model, 'name_or_path', model)))}-LBR-GRPO")
        self._lbr = config = _with_tree_settings(args)
        _refuse(config, trainer)
        if router is not None and config.width == 1:
            raise ValueError("LBRGRPOTrainer: router is given and width is 1, where it decides nothing; expected None")
        single = not isinstance(reward_funcs, list)
        functions = [_checked(function) for function in ([reward_funcs] if single else reward_funcs)]
        self.router: Router | None = None
        self._rollout: TreeTrajectory | None = None
        self._settings: DecodingSettings | None = None
        self._recorded_once = self._saving = self._checked = False
        self._evaluation = (-1, 0)  # step, and how many batches of it have been decoded
        super().__init__(model, functions, config, **trainer)
        if config.fsdp or self.is_fsdp_enabled:
            self._allow_sharding()
        if self.aux_loss_enabled:
            raise ValueError("LBRGRPOTrainer: router_aux_loss_coef of the model is not 0, expected 0 in its config")
        if config.width > 1:
            self.router = self._attach(router)
        self.reference_router = copy.deepcopy(self.router).requires_grad_(False) if self.router and self.beta else None
        for policy in (self.model, self.ref_model):
            if policy is not None:
                _run_inside(policy)
        self._forward = self.model.forward  # without accelerate's autocast

    def _allow_sharding(self) -> None:
        """Have accelerate shard in a way that the likelihood can be computed with, or refuse."""
        accelerator = self.accelerator
        if accelerator.distributed_type != DistributedType.FSDP:  # it says nothing when it cannot
            raise ValueError(
                f"LBRGRPOTrainer: fsdp is asked for, and accelerate runs {accelerator.distributed_type.value}, which "
                "shards nothing; expected GPUs, or no fsdp"
            )
        plugin = accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise ValueError(f"LBRGRPOTrainer: fsdp_version is {plugin.fsdp_version}, expected 2")
        if plugin.state_dict_type != StateDictType.FULL_STATE_DICT:  # of others no model and no router is written
            raise ValueError(
                f"LBRGRPOTrainer: fsdp_state_dict_type is {plugin.state_dict_type.name}, expected FULL_STATE_DICT"
            )
        prepare = accelerator.prepare

        def with_head_in_root(*args: Any, **kwargs: Any) -> Any:
            with _head_in_root([module for module in args if isinstance(module, nn.Module)]):
                return prepare(*args, **kwargs)

        accelerator.prepare = with_head_in_root
        if isinstance(self.ref_model, FSDPModule):
            # TRL makes it one unit, with the head. It stays whole until _likelihood is done with it.
            self.ref_model.set_reshard_after_forward(False)

    def _attach(self, router: Router | None) -> Router:
        """Make the router a part of the policy, behind TRL's preparation of it: PEFT shall not adapt the router."""
        model = self.model
        if router is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.args.seed)  # the same in all processes
                router = Router.for_model(model, depth=self._lbr.depth)
        hidden_size = model.get_output_embeddings().weight.shape[-1] or router.config.hidden_size  # 0 under ZeRO-3
        for name, made_for, here in (
            ("depth", router.config.depth, self._lbr.depth),
            ("hidden_size", router.config.hidden_size, hidden_size),
        ):
            if made_for != here:
                raise ValueError(f"LBRGRPOTrainer: router was made for {name} {made_for}, expected {here}")
        router.to(self.accelerator.device).requires_grad_(True).train()
        model.add_module(ROUTER, router)
        if isinstance(model, PreTrainedModel):  # PEFT writes adapters alone
            names = {f"{ROUTER}.{name}" for name in router.state_dict()}
            model._keys_to_ignore_on_save = names | set(model._keys_to_ignore_on_save or ())
        return router

    # --- rollouts ---------------------------------------------------------------------------------------------------

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], images: Any, multimodal_fields: Any, num_generations: int, *_: Any, **__: Any
    ) -> tuple[list[list[int]], None]:
        rows, config = len(prompt_ids), self._lbr
        # TRL repeats every prompt; where all of them stand equally often here, each is read once.
        runs = [(ids, len(list(run))) for ids, run in groupby(prompt_ids)]
        repeats = runs[0][1] if len({count for _, count in runs}) == 1 else 1
        prompts = [torch.tensor(ids) for ids in prompt_ids[::repeats]]
        masks = [torch.ones_like(ids) for ids in prompts]
        padded = pad(prompts, padding_value=self._tokenizer.pad_token_id, padding_side="left")
        device, draws = self.accelerator.device, self._generator()
        asked = copy.deepcopy(self.generation_config)
        asked.update(num_return_sequences=repeats, return_dict_in_generate=True)
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=True,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as policy,
            self._unsharded(),
            torch.no_grad(),
            _evaluating(policy),
        ):
            self._check(policy)
            out = generate(
                policy,
                padded.to(device),
                attention_mask=pad(masks, padding_value=0, padding_side="left").to(device),
                generation_config=asked,
                width=config.width,
                depth=config.depth,
                router=self.router,
                router_temperature=config.router_temperature,
                backend=config.backend,
                generator=draws,
                # Numbered over all processes: what a row draws does not depend on how many there are.
                streams=torch.arange(rows) + rows * self.accelerator.process_index,
            )
        assert isinstance(out, LBRGenerateOutput)
        assert out.trajectory is not None
        assert out.stats is not None
        self._rollout, self._settings = out.trajectory, out.trajectory.settings
        counts = torch.tensor([out.stats.forwarded_nodes, out.stats.committed_tokens], device=device)
        forwarded, committed = self.accelerator.reduce(counts, reduction="sum").tolist()
        self._record("forwarded_nodes_per_token", forwarded / max(committed, 1))
        texts = out.sequences[:, padded.shape[1] :].tolist()
        lengths = out.trajectory.num_committed.tolist()
        return [text[:length] for text, length in zip(texts, lengths, strict=True)], None

    def _check(self, policy: nn.Module) -> None:
        """Once: trees are exact on the policy, in decoding and in training.

        Under mixed precision the policy's forward is in autocast, whose rounding the checks would take for an error of
        the trees; they are done, and kept, without it.
        """
        if self._checked:
            return
        self._checked, inner = True, inner_model(policy)
        wrapped, policy.forward = policy.forward, self._forward
        try:
            check_model(inner)
            obstacle = packing_obstacle(inner)
        finally:
            policy.forward = wrapped
        if obstacle is not None and self.is_fsdp_enabled:
            # Path by path, processes call the layers in different numbers, and each call waits for all processes.
            raise ValueError(f"LBRGRPOTrainer: {type(inner).__name__} cannot train under FSDP, since {obstacle}")

    def _generator(self) -> torch.Generator:
        """The source of this rollout's draws: of the run's seed and the step alone, so that resuming draws the same."""
        if self.model.training:
            key = [0, self._step, 0]
        else:
            step, count = self._evaluation
            self._evaluation = (self.state.global_step, count + 1 if step == self.state.global_step else 0)
            key = [1, *self._evaluation]
        words = np.random.SeedSequence([self.args.seed, *key]).generate_state(2)
        return torch.Generator().manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)

    @contextmanager
    def _unsharded(self) -> Iterator[None]:
        """Hold whole parameters under FSDP2: processes decode for different numbers of steps and must not wait."""
        if not self.is_fsdp_enabled:
            yield
            return
        # Else the first part that is called by itself (the checks do, on what PEFT wraps) takes itself for the root.
        self.model_wrapped._get_fsdp_state()._lazy_init()
        shards = [module for module in self.model_wrapped.modules() if isinstance(module, FSDPModule)]
        groups = {group for module in shards for group in module._get_fsdp_state()._fsdp_param_groups}
        kept = {group: group.post_forward_mesh_info for group in groups}
        for module in shards:
            module.unshard()
        for group in groups:
            group.post_forward_mesh_info = None  # not resharded after a forward
        try:
            yield
        finally:
            for group, mesh in kept.items():
                group.post_forward_mesh_info = mesh
            for module in shards:
                module.reshard()

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        return _ordered_by_epoch(super()._get_train_sampler(dataset))

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        # The first log-probabilities that TRL asks for, if it does at all, are those of the behaviour.
        every = self.args.steps_per_generation * self.num_iterations
        stale = self.args.gradient_accumulation_steps % every != 0
        self._recorded_once = stale and self._lbr.behaviour == "recorded"
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        assert self._rollout is not None
        for name, value in _tensors(self._rollout).items():
            output[TRAJECTORY + name] = value
        self._rollout = None
        return output

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        per_function: Tensor = super()._calculate_rewards(*args, **kwargs)
        rewards = (per_function * self.reward_weights.to(per_function.device)).nansum(dim=1)
        groups = rewards.view(-1, self.num_generations if self.model.training else self.num_generations_eval)
        self._record("undecided_groups", (groups.amax(dim=1) == groups.amin(dim=1)).float().mean().item())
        return per_function

    # --- loss -------------------------------------------------------------------------------------------------------

    def _likelihood(self, model: nn.Module, trajectory: TreeTrajectory, **options: Any) -> TrajectoryLogProbs:
        """The likelihood as one forward of the policy, wrappers and all."""
        router = self.reference_router if options.pop("reference", False) else self.router
        run: Callable[[nn.Module], TrajectoryLogProbs] = functools.partial(
            trajectory_log_probs, router=router, trajectory=trajectory, backend=self._lbr.backend,
            detach_router_input=self._lbr.detach_router_input, allow_filters=self._lbr.allow_filters,
            on_policy=False, **options,
        )  # fmt: skip
        result = TrajectoryLogProbs(**model(lbr_run=lambda policy: dict(vars(run(policy)))))
        if model is self.ref_model and isinstance(model, FSDPModule):
            model.reshard()
        return result

    def _get_per_token_logps_and_entropies(
        self, model: nn.Module, *args: Any, batch_size: int | None = None, **kwargs: Any
    ) -> tuple[Tensor, None, None]:
        """What TRL keeps as old and reference log-probabilities: ``[rows, nodes + steps]``, nodes and decisions."""
        trajectory = self._rollout
        assert trajectory is not None
        if self._recorded_once:
            self._recorded_once = False
            return torch.cat([trajectory.node_log_probs, trajectory.router_log_probs], dim=1), None, None
        reference = model is self.ref_model or _adapters_off(model)
        parts = [
            self._likelihood(model, part, reference=reference)
            for part in trajectory.split(batch_size or len(trajectory))
        ]
        return torch.cat([torch.cat([p.node_log_probs, p.router_log_probs], dim=1) for p in parts]), None, None

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        assert self._settings is not None
        names = [name for name in inputs if name.startswith(TRAJECTORY)]
        tensors = {name.removeprefix(TRAJECTORY): inputs[name] for name in names}
        trajectory = TreeTrajectory(**tensors, settings=self._settings)
        log_probs = self._likelihood(model, trajectory, entropies=True)
        # mask_truncated_completions empties the mask of rows that shall not count.
        masked = inputs["completion_mask"].sum(dim=1) == 0
        tensors["choices"] = trajectory.choices.masked_fill(masked[:, None], -1)
        trajectory = TreeTrajectory(**tensors, settings=self._settings)

        def unpack(name: str) -> TrajectoryLogProbs | None:
            packed = inputs.get(name)
            if packed is None:
                return None
            nodes, steps = trajectory.node_tokens.shape[1], trajectory.num_steps
            of_nodes, of_decisions = packed.split([nodes, steps], dim=1)
            return TrajectoryLogProbs(of_nodes, of_decisions, None, None, 0)

        recorded = self._lbr.behaviour == "recorded"
        reduction, max_length, normaliser = self._denominator(trajectory, inputs)
        result = policy_loss(
            log_probs,
            trajectory,
            inputs["advantages"],
            behaviour=unpack("old_per_token_logps") or (None if recorded else log_probs),
            clip=(self.epsilon_low, self.epsilon_high),
            dual_clip=self.args.delta,
            reduction=reduction,
            max_length=max_length,
            normaliser=normaliser,
            nodes=self._lbr.nodes,
            reference=unpack("ref_per_token_logps"),
            kl_coef=self.beta,
            correct_kl=self.args.use_bias_correction_kl,
            node_entropy_coef=self.entropy_coef,
            router_entropy_coef=self._lbr.router_entropy_coef,
        )
        self._record_all(result.metrics)
        return result.loss

    def _denominator(
        self, trajectory: TreeTrajectory, inputs: dict[str, Any]
    ) -> tuple[Reduction, int | None, float | Tensor]:
        """TRL's ``loss_type`` in the words of :func:`policy_loss`, over the batches that TRL means by it."""
        rows, training = len(trajectory), self.model.training
        parts = self.current_gradient_accumulation_steps if training else 1
        if self.loss_type == "grpo":
            return "row-mean", None, rows * parts
        if self.loss_type == "dr_grpo":
            return "constant", self.max_completion_length, rows * self.max_completion_length * parts
        if self.loss_type == "bnpo":
            return "token-mean", None, (trajectory.choices >= 0).sum().clamp(min=1) * parts
        # dapo: all tokens of the generation batch in all processes, as many as fall to one accumulation window.
        items = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
        return "token-mean", None, items * parts / self.args.steps_per_generation if training else items

    def _record(self, name: str, value: float) -> None:
        self._metrics["train" if self.model.training else "eval"][name].append(value)

    def _record_all(self, metrics: dict[str, Tensor]) -> None:
        """Log means over all nodes (decisions) of all processes, and the largest ratio of any."""
        counts = {"": metrics["nodes"], "router_": metrics["decisions"]}
        means = [name for name in metrics if name not in ("positions", "nodes", "decisions") and "max" not in name]
        weights = [counts["router_" if name.startswith("router_") else ""] for name in means]
        sums = [metrics[name] * weight for name, weight in zip(means, weights, strict=True)]
        totals = self.accelerator.reduce(torch.stack([*sums, *weights]).float(), reduction="sum").tolist()
        for name, total, weight in zip(means, totals, totals[len(means) :], strict=False):
            if weight:
                self._record(name, total / weight)
        most = torch.stack([metrics["ratio/max"], metrics["router_ratio/max"]])[None]
        nodes, choices = self.accelerator.gather(most).amax(dim=0).tolist()
        self._record("ratio/max", nodes)
        if self.router is not None:
            self._record("router_ratio/max", choices)

    # --- optimiser --------------------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """TRL's optimiser with the router's parameters in groups of their own."""
        fresh = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if fresh and self.router is not None:
            own = {id(parameter) for parameter in self.router.parameters()}
            for group in list(optimizer.param_groups):
                mine = [parameter for parameter in group["params"] if id(parameter) in own]
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
                if mine:
                    optimizer.add_param_group({**group, "params": mine, "lr": self._lbr.router_learning_rate})
        return optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "learning_rate" in logs and self.router is not None and self.lr_scheduler is not None:
            logs["router_learning_rate"] = self.lr_scheduler.get_last_lr()[-1]
        super().log(logs, start_time)

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        directory: str = super()._get_output_dir(trial)
        return os.path.join(directory, UNFINISHED) if self._saving else directory

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir, name = self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        unfinished, finished = os.path.join(run_dir, UNFINISHED), os.path.join(run_dir, name)
        if self.args.should_save:
            shutil.rmtree(unfinished, ignore_errors=True)  # what an interrupted save has left
        self.accelerator.wait_for_everyone()
        self._saving = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saving = False
        if not self.args.save_only_model:
            self._save_rollouts(os.path.join(unfinished, name))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            if str(self.state.best_model_checkpoint).startswith(unfinished + os.sep):
                self.state.best_model_checkpoint = finished
                self.state.save_to_json(os.path.join(unfinished, name, "trainer_state.json"))
            if os.path.isdir(finished):
                shutil.rmtree(finished)
            os.replace(os.path.join(unfinished, name), finished)
            shutil.rmtree(unfinished)
            rotate_checkpoints(
                output_dir=run_dir, save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint, use_mtime=True,
            )  # fmt: skip
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(finished)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._saving:
            return  # is done when the folder has its name
        router = os.path.join(checkpoint_folder, ROUTER_FOLDER)
        if self.is_world_process_zero() and os.path.isdir(router):
            shutil.copytree(router, os.path.join(self.args.output_dir, ROUTER_FOLDER), dirs_exist_ok=True)
        super()._push_from_checkpoint(checkpoint_folder)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        prefix, router = ROUTER + ".", None
        if self.router is not None:
            whole = self.router.state_dict() if state_dict is None else state_dict
            start = 0 if state_dict is None else len(prefix)
            router = {name[start:]: t for name, t in whole.items() if state_dict is None or name.startswith(prefix)}
        super()._save(output_dir, state_dict=state_dict)
        if self.router is not None and router and self.args.should_save:
            written = Router(self.router.config)
            written.load_state_dict({name: tensor.float().cpu() for name, tensor in router.items()})
            written.save_pretrained(os.path.join(output_dir or self.args.output_dir, ROUTER_FOLDER))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        # FSDP's own file holds all of the policy, the router included, and what is here are shards.
        if self.router is not None and not self.is_fsdp_enabled:
            saved = Router.from_pretrained(os.path.join(resume_from_checkpoint, ROUTER_FOLDER))
            self.router.load_state_dict(saved.state_dict())

    def _save_rollouts(self, folder: str) -> None:
        """Where in a generation batch this process is, and the batch if it is not used up."""
        every = self.args.steps_per_generation * self.num_iterations
        in_use = self._step % every != 0
        state = {
            "step": self._step,
            "inputs": self._buffered_inputs if in_use else None,
            "settings": asdict(self._settings) if self._settings is not None else None,
        }
        os.makedirs(folder, exist_ok=True)
        torch.save(state, os.path.join(folder, f"rollouts_{self.accelerator.process_index}.pt"))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = os.path.join(checkpoint, f"rollouts_{self.accelerator.process_index}.pt")
        if not os.path.isfile(path):
            logger.warning(f"{path} is missing: rollouts start anew, and the run does not go on exactly as it was")
            return
        state = torch.load(path, map_location=self.accelerator.device, weights_only=True)
        self._step, self._buffered_inputs = state["step"], state["inputs"]
        self._settings = DecodingSettings(**state["settings"]) if state["settings"] is not None else None


def _with_tree_settings(args: GRPOConfig) -> LBRGRPOConfig:
    """A plain ``GRPOConfig`` with the tree's defaults; its own values stay, those that differ in default included."""
    if isinstance(args, LBRGRPOConfig):
        return args
    config: LBRGRPOConfig = copy.copy(args)
    config.__class__ = LBRGRPOConfig
    for entry in fields(LBRGRPOConfig):
        if not hasattr(args, entry.name):
            assert entry.default is not MISSING
            setattr(config, entry.name, entry.default)
    return config


def _refuse(config: LBRGRPOConfig, trainer: dict[str, Any]) -> None:
    """Refuse by name what the tree or its loss cannot honour."""
    for name in ("tools", "rollout_func", "environment_factory"):
        if trainer.get(name):
            raise ValueError(f"LBRGRPOTrainer: {name} is given, which a tree cannot honour; expected None")
    if isinstance(trainer.get("processing_class"), ProcessorMixin):
        raise ValueError("LBRGRPOTrainer: processing_class is a processor of images, expected a tokenizer")
    for name, accepted in (_ACCEPTED if config.allow_filters else _ACCEPTED | _NO_FILTERS).items():
        if not hasattr(config, name):
            continue
        value = getattr(config, name)
        if value not in accepted:
            hint = ", or allow_filters=True" if name in _NO_FILTERS else ""
            raise ValueError(f"LBRGRPOTrainer: {name} is {value!r}, expected {' or '.join(map(repr, accepted))}{hint}")
    for name, options in (("behaviour", ("recorded", "recomputed")), ("nodes", ("sum", "mean"))):
        if getattr(config, name) not in options:
            raise ValueError(
                f"LBRGRPOTrainer: {name} is {getattr(config, name)!r}, expected {' or '.join(map(repr, options))}"
            )
    for name in ("width", "depth"):
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"LBRGRPOTrainer: {name} is {value!r}, expected an integer >= 1")
    for name in ("router_learning_rate", "router_temperature"):
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"LBRGRPOTrainer: {name} is {getattr(config, name)!r}, expected a finite number > 0")


def _checked(function: Any) -> Any:
    """A reward function that may say None, "does not apply", and nothing else that is no number.

    TRL takes NaN for None, so a reward that went wrong would pass for one that was not meant.
    """
    if function is None or isinstance(function, (str, nn.Module)):
        return function
    name = get_callable_name(function)

    def check(rewards: Any) -> Any:
        for row, reward in enumerate(rewards):
            if reward is not None and not math.isfinite(reward):
                raise ValueError(
                    f"reward function {name!r} returned {reward} for row {row}, expected a finite number, or None "
                    "where it does not apply"
                )
        return rewards

    checked: Callable[..., Any]
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):

        async def checked(*args: Any, **kwargs: Any) -> Any:
            return check(await function(*args, **kwargs))
    else:

        def checked(*args: Any, **kwargs: Any) -> Any:
            return check(function(*args, **kwargs))

    functools.update_wrapper(checked, function)
    checked.__name__ = name
    return checked


def _run_inside(model: nn.Module) -> None:
    """Let ``model(lbr_run=f)`` return ``f(model)``.

    Several forwards of the policy's parts then are one forward for DDP, FSDP2 and ZeRO, whose bookkeeping is around it;
    they look for tensors in lists and dictionaries of what is returned. A deep copy of the model keeps the original's
    forward, and so would run the original: copy first.
    """
    forward = model.forward

    @functools.wraps(forward)
    def either(self: nn.Module, *args: Any, lbr_run: Callable[[nn.Module], Any] | None = None, **kwargs: Any) -> Any:
        if lbr_run is None:
            return forward(*args, **kwargs)
        # What accelerate has put around the forward is on already, and its autocast, entered twice, is never left.
        outside, self.forward = self.forward, forward
        try:
            return lbr_run(self)
        finally:
            self.forward = outside

    model.forward = MethodType(either, model)


def _ordered_by_epoch(sampler: Any) -> Any:
    """TRL's sampler, whose order of an epoch depends on which one it is.

    It draws one order after the other, and a run that is resumed has not drawn those of the epochs before; the orders
    are the same.
    """
    if sampler.shuffle:

        def set_epoch(epoch: int) -> None:
            sampler.generator.manual_seed(sampler.seed)
            for _ in range(epoch):
                torch.randperm(sampler.num_samples, generator=sampler.generator)

        sampler.set_epoch = set_epoch
    return sampler


@contextmanager
def _head_in_root(models: list[Any]) -> Iterator[None]:
    """Let accelerate leave the output head, and the embeddings tied to it, to FSDP2's root unit.

    It would make one unit of the final norm and the head, for a forward that calls each of them once. The likelihood
    calls the head once per chunk of rows, by itself and again in the backward pass, in numbers that differ between
    processes: the unit's hooks then gather, reduce and free its parameters at the wrong time, and not equally often.
    The root's parameters are whole from the beginning of the forward, in which all of the likelihood is
    (:func:`_run_inside`), until the backward pass is over, and its hooks are not around the head. accelerate finds the
    head by the model's ``get_output_embeddings``, which here says that there is none.
    """
    hidden: list[tuple[Any, str]] = []
    try:
        for model in models:
            if not hasattr(model, "get_output_embeddings"):
                continue
            head, embeddings = (
                getattr(part, "weight", None) for part in (model.get_output_embeddings(), model.get_input_embeddings())
            )
            tied = head is not None and head is embeddings
            for name in ("get_output_embeddings", *(["get_input_embeddings"] if tied else [])):
                model.__dict__[name] = lambda: None
                hidden.append((model, name))
        yield
    finally:
        for model, name in hidden:
            del model.__dict__[name]


def _adapters_off(model: nn.Module) -> bool:
    """Whether TRL has turned a PEFT model into its reference: adapters disabled, or those named "ref" active."""
    base = getattr(model, "module", model)
    if getattr(base, "active_adapter", None) == "ref":
        return True
    return any(getattr(module, "_disable_adapters", False) for module in base.modules())


def _tensors(trajectory: TreeTrajectory) -> dict[str, Tensor]:
    values = {entry.name: getattr(trajectory, entry.name) for entry in fields(trajectory)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Decode without dropout, and leave the model in the mode it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
