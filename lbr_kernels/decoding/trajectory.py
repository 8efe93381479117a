"""What a decoding call did: every node it grew and every choice it made.

Contract
--------
A trajectory holds, per row, exactly the random quantities of the paper's Eq. 1: the tokens of all grown nodes, also of
those later pruned, and the router's choices, each with the log-probability under which it was drawn. Nodes stand in
the order in which they grew: the warm-up's layers 1..L-1 in level order, then one layer of K^L nodes per step. What
does not exist is marked by token -1 or choice -1, with log-probability 0.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lbr_kernels.ops.tree_shape import num_slots

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class DecodingSettings:
    """What a trajectory was drawn with.

    ``filters`` says what shaped the distribution besides the model, by name: temperature, top_k, top_p, min_p, and
    ``processors`` for anything else. In ``mode`` "deterministic" children are the most likely tokens and the choice is
    the argmax: such a trajectory has no likelihood in the sense of Eq. 1.
    """

    width: int
    depth: int
    mode: Literal["sampled", "deterministic"]
    filters: dict[str, Any]
    router_temperature: float
    router_do_sample: bool
    eos_token_ids: list[int]
    seed: int | None
    model_fingerprint: str
    router_fingerprint: str


@dataclass(frozen=True)
class TreeTrajectory:
    """The trees of one decoding call; one row per returned sequence.

    Attributes:
        prompt_ids: int64 ``[rows, P]``, left-padded; with ``prompt_embeds`` what ids were given beside them.
        prompt_mask: bool ``[rows, P]``, which of them (or of the embeddings) are real.
        node_tokens: int64 ``[rows, nodes]`` with ``nodes = (K + ... + K^(L-1)) + steps * K^L``.
        node_log_probs: fp32 ``[rows, nodes]``, under the filtered distribution.
        choices: int64 ``[rows, steps]``, the candidate committed at each step.
        router_log_probs: fp32 ``[rows, steps]``.
        num_committed: int64 ``[rows]``.
        streams: int64 ``[rows]``, the rows' own random streams.
        settings: what it was drawn with.
        prompt_embeds: ``[rows, P, D]`` if the prompt was given as embeddings.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    node_tokens: Tensor
    node_log_probs: Tensor
    choices: Tensor
    router_log_probs: Tensor
    num_committed: Tensor
    streams: Tensor
    settings: DecodingSettings
    prompt_embeds: Tensor | None = None

    def __len__(self) -> int:
        return self.choices.shape[0]

    @property
    def num_steps(self) -> int:
        return self.choices.shape[1]

    def step_nodes(self, step: int) -> slice:
        """Where the layer-L nodes grown for ``step`` (0-based) stand along the node axis."""
        width, depth = self.settings.width, self.settings.depth
        start = num_slots(width, depth - 1) + step * width**depth
        return slice(start, start + width**depth)

    def _tensors(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def _with(self, changes: dict[str, Any]) -> Self:
        return replace(self, **changes)

    def to(self, device: str | torch.device) -> Self:
        """The same trajectory on another device."""
        return self._with({name: tensor.to(device) for name, tensor in self._tensors().items()})

    def __getitem__(self, rows: int | slice | Sequence[int] | Tensor) -> Self:
        """The chosen rows, still padded to this trajectory's number of steps; one row is a trajectory too."""
        index: slice | Tensor
        if isinstance(rows, slice):
            index = rows
        else:
            index = torch.as_tensor(rows, device=self.choices.device).reshape(-1)
            index = index if index.dtype == torch.bool else index.long()
        return self._with({name: tensor[index] for name, tensor in self._tensors().items()})

    def split(self, rows_each: int) -> list[Self]:
        """Pieces of at most ``rows_each`` rows."""
        if rows_each < 1:
            raise ValueError(f"TreeTrajectory.split: rows_each is {rows_each}, expected an integer >= 1")
        return [self[start : start + rows_each] for start in range(0, len(self), rows_each)]

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        """Stack trajectories of the same settings (seeds may differ); shorter ones are padded.

        Raises ``ValueError`` if there are none or their settings differ.
        """
        if not parts:
            raise ValueError("TreeTrajectory.concatenate: parts is empty, expected at least one trajectory")
        settings = parts[0].settings
        for part in parts[1:]:
            if replace(part.settings, seed=settings.seed) != settings:
                raise ValueError(
                    f"TreeTrajectory.concatenate: settings {part.settings} differ from the first part's {settings}"
                )
        if len({part.prompt_embeds is None for part in parts}) > 1:
            raise ValueError("TreeTrajectory.concatenate: parts mix prompts of ids and of embeddings")
        seeds = {part.settings.seed for part in parts}
        tensors: dict[str, Any] = {}
        for name in parts[0]._tensors():
            values = [getattr(part, name) for part in parts]
            if values[0].dim() > 1:
                size = max(value.shape[1] for value in values)
                values = [_pad(name, value, size) for value in values]
            tensors[name] = torch.cat(values)
        settings = replace(settings, seed=seeds.pop() if len(seeds) == 1 else None)
        return parts[0]._with(tensors | {"settings": settings})

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, the settings in its metadata."""
        settings = json.dumps({field.name: getattr(self.settings, field.name) for field in fields(self.settings)})
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self._tensors().items()}
        save_file(tensors, path, metadata={"settings": settings, "format": "lbr_kernels.TreeTrajectory"})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what :meth:`save` wrote, onto the CPU. Raises ``ValueError`` if the file holds something else."""
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != "lbr_kernels.TreeTrajectory":
                raise ValueError(f"{path} is not a saved TreeTrajectory (metadata {metadata})")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        return cls(**tensors, settings=DecodingSettings(**json.loads(metadata["settings"])))


def _pad(name: str, value: Tensor, size: int) -> Tensor:
    missing = size - value.shape[1]
    # Prompts are padded on the left, everything else at its end; what does not exist is token or choice -1.
    fill = -1 if name in ("node_tokens", "choices") else 0
    block = value.new_full((value.shape[0], missing, *value.shape[2:]), fill)
    return torch.cat([block, value] if name.startswith("prompt") else [value, block], dim=1)


@torch.no_grad()
def fingerprint(module: nn.Module | None) -> str:
    """A short hash that changes when a module's parameters do: names, shapes and sixteen samples of each."""
    digest = hashlib.sha256()
    for name, parameter in module.named_parameters() if module is not None else ():
        flat = parameter.detach().reshape(-1)
        # A copy: numpy would hold on to the memory of a parameter that FSDP means to free.
        samples = flat[:: max(1, flat.numel() // 16)][:16].float().cpu().clone()
        digest.update(f"{name}{tuple(parameter.shape)}".encode() + samples.numpy().tobytes())
    return digest.hexdigest()[:16] if module is not None else "none"
