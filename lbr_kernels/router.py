"""The set-attention router: which depth-1 subtree of a lookahead tree to commit.

Contract
--------
The router reads the hidden states of a forwarded tree and gives a distribution over its K candidates (paper,
section 3, stage 2 and appendix A.4). It is equivariant under a permutation of the candidates and invariant under a
permutation of the paths below one candidate. Nodes that do not exist are masked, so an early end of text or a missing
candidate changes nothing but the set that is compared. The score head starts at zero: an untrained router is exactly
uniform, and decoding with it is ancestral sampling.

This module is what is trained. Decoding evaluates the same function through ``ops.route``.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lbr_kernels.ops.route import RouterWeights, routing_log_probs, weight_shapes
from lbr_kernels.ops.tree_shape import num_slots, path_masks, path_slots

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG_NAME = "router_config.json"
WEIGHTS_NAME = "router.safetensors"


@dataclass(frozen=True)
class RouterConfig:
    """The shape of a router; defaults are the paper's (appendix A.4.1), with ``hidden_size`` of the language model.

    ``score_head`` is ``"linear"`` (the text's w^T g) or ``"mlp"`` (Figure 2's shared MLP). ``independent`` replaces
    the attention between candidates by an MLP of each candidate alone (the paper's ablation). ``input_norm`` puts a
    LayerNorm before the input projection.
    """

    hidden_size: int
    depth: int = 1
    dim: int = 128
    num_heads: int = 4
    ffn_mult: int = 4
    score_head: Literal["linear", "mlp"] = "linear"
    independent: bool = False
    input_norm: bool = False

    def __post_init__(self) -> None:
        for name in ("hidden_size", "depth", "dim", "num_heads", "ffn_mult"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"RouterConfig: {name} is {value!r}, expected an integer >= 1")
        if self.dim % self.num_heads:
            raise ValueError(f"RouterConfig: dim is {self.dim}, expected a multiple of num_heads ({self.num_heads})")
        if self.score_head not in ("linear", "mlp"):
            raise ValueError(f"RouterConfig: score_head is {self.score_head!r}, expected 'linear' or 'mlp'")


class EncoderBlock(nn.Module):
    """One pre-LN Transformer encoder layer (GELU, no dropout) and the LayerNorm that closes a pre-LN stack."""

    def __init__(self, config: RouterConfig) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(
            d_model=config.dim,
            nhead=config.num_heads,
            dim_feedforward=config.ffn_mult * config.dim,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, x: Tensor, exists: Tensor) -> Tensor:
        """``x`` ``[rows, items, dim]``; ``exists`` bool ``[rows, items]``, at least one true in every row."""
        out: Tensor = self.norm(self.layer(x, src_key_padding_mask=~exists))
        return out


class Router(nn.Module):
    """The router of Local Branch Routing, for one hidden size and one tree depth; any width.

    ``Router.for_model(model, depth=2)`` makes an untrained one for a language model. Parameters and arithmetic are
    fp32 whatever the language model's dtype is.
    """

    def __init__(self, config: RouterConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.input_norm = nn.LayerNorm(config.hidden_size) if config.input_norm else None
        self.in_proj = nn.Linear(config.hidden_size, dim, bias=False)
        self.depth_embed = nn.Parameter(torch.empty(config.depth, dim))
        self.cls = nn.Parameter(torch.empty(dim))
        self.path_encoder = EncoderBlock(config)
        self.subtree_attention = EncoderBlock(config)
        self.pool_query = nn.Parameter(torch.empty(dim))
        self.candidate_attention = None if config.independent else EncoderBlock(config)
        self.candidate_mlp = _mlp(dim, config.ffn_mult * dim, dim) if config.independent else None
        self.score: nn.Module = nn.Linear(dim, 1, bias=False) if config.score_head == "linear" else _mlp(dim, dim, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise so that the router is uniform: everything as PyTorch does, the last score layer at zero."""
        for parameter in (self.depth_embed, self.cls, self.pool_query):
            nn.init.normal_(parameter, std=0.02)
        last = self.score if isinstance(self.score, nn.Linear) else self.score[-1]  # type: ignore[index]
        for parameter in last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, hidden: Tensor, width: int, *, valid: Tensor | None = None, temperature: float = 1.0) -> Tensor:
        """The routing distribution, paper section 3 (stage 2).

        Args:
            hidden: ``[B, T, hidden_size]``, any floating dtype: hidden states of the tree's T = sum K^l slots in
                level order, as the output head receives them. Slots that hold no node may hold anything.
            width: the tree's K; its depth is the router's.
            valid: bool ``[B, T]``, which slots hold a node; all of them by default.
            temperature: the routing temperature tau.

        Returns:
            fp32 log-probabilities ``[B, K]``, -inf for candidates that do not exist. A row without any candidate
            gets the uniform distribution.

        Raises:
            ValueError: a shape or the temperature is not as above.
        """
        depth = self.config.depth
        if width < 1:
            raise ValueError(f"Router: width is {width}, expected an integer >= 1")
        slots = num_slots(width, depth)
        if hidden.dim() != 3 or hidden.shape[1] != slots or hidden.shape[2] != self.config.hidden_size:
            raise ValueError(
                f"Router: hidden has shape {list(hidden.shape)}, expected [B, {slots}, {self.config.hidden_size}] "
                f"for width {width}, depth {depth} and this router's hidden_size"
            )
        if not temperature > 0:
            raise ValueError(f"Router: temperature is {temperature}, expected a number > 0")
        batch = hidden.shape[0]
        if valid is None:
            valid = hidden.new_ones((batch, slots), dtype=torch.bool)
        on_path, path_exists = path_masks(valid, width, depth)
        paths = path_slots(width, depth, hidden.device)
        num_paths = paths.shape[1]

        states = torch.where(valid.unsqueeze(-1), hidden, 0).to(self.in_proj.weight.dtype)
        if self.input_norm is not None:
            states = self.input_norm(states)
        embedded = self.in_proj(states)[:, paths] + self.depth_embed
        sequence = torch.cat([self.cls.expand(batch, width, num_paths, 1, -1), embedded], dim=3)
        seen = torch.cat([on_path.new_ones(batch, width, num_paths, 1), on_path], dim=3)
        encoded = self.path_encoder(sequence.flatten(0, 2), seen.flatten(0, 2))[:, 0]

        # A candidate that does not exist keeps its first path, so that no softmax is empty; it is masked at the end.
        candidate_exists = valid[:, :width]
        kept = path_exists.clone()
        kept[:, :, 0] |= ~candidate_exists
        rollouts = self.subtree_attention(encoded.view(batch * width, num_paths, -1), kept.flatten(0, 1))
        pool = torch.einsum("rmp,p->rm", rollouts, self.pool_query) / self.config.dim**0.5
        pool = pool.masked_fill(~kept.flatten(0, 1), -torch.inf).softmax(dim=-1)
        candidates = torch.einsum("rm,rmp->rp", pool, rollouts).view(batch, width, -1)

        if self.candidate_attention is not None:
            compared = candidate_exists.clone()
            compared[:, 0] |= ~candidate_exists.any(dim=1)
            candidates = self.candidate_attention(candidates, compared)
        else:
            assert self.candidate_mlp is not None
            candidates = self.candidate_mlp(candidates)
        scores = self.score(candidates).squeeze(-1)
        return routing_log_probs(scores, candidate_exists, candidate_exists.any(dim=1), temperature)

    @torch.no_grad()
    def packed(self) -> RouterWeights:
        """A copy of the parameters in the form that ``ops.route`` takes."""
        config = self.config
        ffn_dim, mlp_score = config.ffn_mult * config.dim, config.score_head == "mlp"
        shapes = weight_shapes(
            config.hidden_size, config.depth, config.dim, ffn_dim, mlp_score, config.independent, config.input_norm
        )
        parameters = dict(self.named_parameters())
        parts = []
        for name in shapes:
            # nn.MultiheadAttention spells its packed projection with an underscore.
            parameter = parameters[name.replace("self_attn.in_proj.", "self_attn.in_proj_")]
            is_matrix = name.endswith("weight") and parameter.dim() == 2
            parts.append((parameter.T if is_matrix else parameter).flatten().float())
        return RouterWeights(
            torch.cat(parts), config.hidden_size, config.depth, config.dim, config.num_heads, ffn_dim, mlp_score,
            config.independent, config.input_norm,
        )  # fmt: skip

    @classmethod
    def for_model(cls, model: PreTrainedModel, *, depth: int = 1, **config: Any) -> Router:
        """An untrained (uniform) router that fits ``model``'s output head, on its device.

        Keyword arguments are :class:`RouterConfig`'s. Raises ``ValueError`` if the model has no output head.
        """
        head = model.get_output_embeddings()
        if head is None:
            raise ValueError(f"Router.for_model: {type(model).__name__} has no output head (get_output_embeddings)")
        router = cls(RouterConfig(hidden_size=head.weight.shape[-1], depth=depth, **config))
        return router.to(head.weight.device)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write ``router_config.json`` and ``router.safetensors``."""
        path = Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        (path / CONFIG_NAME).write_text(json.dumps(asdict(self.config), indent=2) + "\n", encoding="utf-8")
        save_file({name: tensor.contiguous() for name, tensor in self.state_dict().items()}, path / WEIGHTS_NAME)

    @classmethod
    def from_pretrained(cls, source: str | Path, **hub: Any) -> Router:
        """Load a router from a directory or a Hub id (which alone needs the network).

        Keyword arguments go to ``huggingface_hub.snapshot_download`` (``revision``, ``token``, ...). Weights stored
        in half precision are widened to fp32. Raises ``FileNotFoundError`` if a file is missing and ``ValueError`` if
        the configuration lacks an entry or has an unknown one, or a file is broken or for another configuration.
        """
        path = Path(source)
        if not path.is_dir():
            from huggingface_hub import snapshot_download

            if isinstance(source, Path) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
                raise FileNotFoundError(f"Router.from_pretrained: {source} is neither a directory nor a Hub id")
            path = Path(snapshot_download(str(source), allow_patterns=[CONFIG_NAME, WEIGHTS_NAME], **hub))
        try:
            entries = json.loads((path / CONFIG_NAME).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path / CONFIG_NAME}: {error}") from error
        known = {field.name for field in fields(RouterConfig)}
        if unknown := sorted(set(entries) - known):
            raise ValueError(f"{path / CONFIG_NAME}: unknown entries {unknown}, known are {sorted(known)}")
        if missing := sorted({"hidden_size", "depth"} - set(entries)):
            raise ValueError(f"{path / CONFIG_NAME}: {', '.join(missing)} is missing")
        router = cls(RouterConfig(**entries))
        try:
            router.load_state_dict({name: t.float() for name, t in load_file(path / WEIGHTS_NAME).items()})
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"{path / WEIGHTS_NAME}: {error}") from error
        return router

    def push_to_hub(self, repo_id: str, **hub: Any) -> str:
        """Upload what :meth:`save_pretrained` writes; keyword arguments go to ``HfApi.upload_folder``."""
        from tempfile import TemporaryDirectory

        from huggingface_hub import HfApi

        api = HfApi(token=hub.pop("token", None))
        api.create_repo(repo_id, exist_ok=True)
        with TemporaryDirectory() as directory:
            self.save_pretrained(directory)
            return str(api.upload_folder(repo_id=repo_id, folder_path=directory, **hub))


def _mlp(d_in: int, d_hidden: int, d_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(d_in, d_hidden), nn.GELU(), nn.Linear(d_hidden, d_out))
