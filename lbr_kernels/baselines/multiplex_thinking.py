"""Multiplex Thinking (Tang et al., arXiv 2601.08808): K independent draws are merged into one input.

Contract
--------
At each thinking step K tokens are drawn from the filtered distribution, with replacement, and the next input is the
mean of their embeddings, in which duplicates weigh more, or their sum weighted by probability. The likelihood of a
text is the product over all draws. Width 1 is plain sampling, draw for draw that of ``lbr_kernels.generate`` with
width 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lbr_kernels import ops
from lbr_kernels.baselines.continuous import Step, ThinkingGenerateOutput, checked_end, decode, require_mixtures
from lbr_kernels.decoding.arguments import Caller, GenerateArguments, Request, require_type, whole_number
from lbr_kernels.decoding.prompts import draw_seed, row_streams
from lbr_kernels.decoding.sampling import ChildSampler

_NAME = "multiplex_thinking"
_OPTIONS = {"weighting": ("uniform", "probability"), "ends_by": ("first", "any")}


def multiplex_thinking(
    model: PreTrainedModel,
    inputs: Tensor | None = None,
    *,
    width: int = 3,
    weighting: Literal["uniform", "probability"] = "uniform",
    end_of_thinking: int | None = None,
    ends_by: Literal["first", "any"] = "first",
    generator: torch.Generator | None = None,
    streams: Sequence[int] | Tensor | None = None,
    **kwargs: Any,
) -> Tensor | ThinkingGenerateOutput:
    """Decode with Multiplex Thinking (arXiv 2601.08808); a drop-in for ``model.generate`` with ``do_sample=True``.

    The committed token of a thinking step is its **first** draw: a draw from the model's own distribution, so that
    thinking and texts end as readily as in plain sampling, whatever the width. It is what the text shows and what
    logits processors, stopping criteria and streamers see. Where it is ``end_of_thinking`` it is read alone, whatever
    else was drawn, and what follows is sampled plainly; where it ends the text, the row has ended.

    Args:
        model: any decoder-only transformers model that passes :func:`lbr_kernels.check_model` and reads embeddings as
            it reads ids.
        inputs: prompt ids ``[B, P]``, left- or right-padded (or ``input_ids=``, ``inputs_embeds=``). A row thinks from
            its prompt's end on.
        width: K, draws per thinking step.
        weighting: the next input is the draws' mean (``"uniform"``), or weighted by their probabilities, renormalised
            over the K draws (``"probability"``); a duplicate counts each time it was drawn.
        end_of_thinking: id of the token that ends thinking; None: all of the text is thinking.
        ends_by: which of the draws has to be ``end_of_thinking``: the first one, as in code that builds on the paper's
            authors', or any of them, which is then committed in the first one's place (the two change places) and ends
            thinking up to K times as readily.
        generator: source of the call's 64-bit seed; torch's default one if None. Every draw is keyed by that seed, the
            row's stream, the step and the draw's number: a row's text does not depend on the batch around it.
        streams: one integer per returned row; ``0 .. rows - 1`` by default.
        **kwargs: as for ``model.generate``. The paper trains and decodes at temperature 1 and top-p 1;
            ``model.generate``'s own default is ``top_k=50``.

    Returns:
        ids ``[rows, length]`` with the prompts in front; with ``return_dict_in_generate`` a
        :class:`ThinkingGenerateOutput`, whose ``mixtures`` hold the draws and their log-probabilities
        (``mixtures.log_prob`` is their sum).

    Raises:
        ValueError: an argument out of its range, a setting that cannot be honoured, ``do_sample`` that is not True, a
            model that cannot be decoded this way (:class:`lbr_kernels.UnsupportedModelError`).
        TypeError: an unknown keyword argument.
        RuntimeError: NaN logits, or a distribution from which every token was filtered out.
    """
    require_type(_NAME, "generator", generator, torch.Generator)
    width = whole_number(_NAME, "width", width, least=1)
    for name, value in (("weighting", weighting), ("ends_by", ends_by)):
        if value not in _OPTIONS[name]:
            raise ValueError(f"{_NAME}: {name} is {value!r}, expected {' or '.join(map(repr, _OPTIONS[name]))}")
    caller = Caller(_NAME, "Multiplex Thinking", multiplex_thinking)
    arguments = GenerateArguments(caller, model, inputs, kwargs)
    if not arguments.setting("do_sample"):
        raise ValueError(
            f"{_NAME}: do_sample is {arguments.setting('do_sample')!r}, expected True: its inputs are made of draws"
        )
    end = checked_end(arguments, end_of_thinking)
    require_mixtures(arguments.model, caller=_NAME)

    def run(request: Request) -> Tensor | ThinkingGenerateOutput:
        rows = row_streams(_NAME, streams, len(request.input_ids), request.input_ids.device)
        sampler = ChildSampler(
            request.processors, width=width, candidate_min_p=0.0, keep_scores=request.keeps_scores, backend=None
        )
        mixer = _Draws(width, weighting, end if ends_by == "any" else None)
        return decode(
            request, mixer=mixer, sampler=sampler, end_of_thinking=end, seed=draw_seed(generator), streams=rows
        )

    return arguments.generate(run)


class _Draws:
    """K draws, merged; of thinking rows the first ``forward`` among them comes first."""

    def __init__(self, width: int, weighting: str, forward: int | None) -> None:
        self.slots, self.weighting, self.forward = width, weighting, forward

    def mix(self, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        assert step.uniforms is not None
        tokens, log_probs = ops.sample_children(
            step.processed, step.uniforms, row_index=step.processed_row_of, **step.filters
        )
        if self.forward is not None:
            # argmax of a row without it is 0: nothing changes places.
            found = ((tokens == self.forward) & step.thinking[:, None]).long().argmax(dim=1, keepdim=True)
            order = torch.arange(self.slots, device=tokens.device).expand_as(tokens).clone()
            order[:, :1] = found
            order.scatter_(1, found, 0)
            tokens, log_probs = tokens.gather(1, order), log_probs.gather(1, order)
        if self.weighting == "uniform":
            return tokens, torch.full_like(log_probs, 1 / self.slots), log_probs
        return tokens, log_probs.softmax(dim=-1), log_probs
