"""Fixed steps driven to the end of the last text: the host enqueues them, and learns some steps later what they did."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from lbr_kernels import ops
from lbr_kernels.decoding.engine import KeptStep
from lbr_kernels.decoding.loop import DecodingStats, Limits
from lbr_kernels.decoding.routing import Routing
from lbr_kernels.decoding.sampling import DRAWN_TOGETHER, Draws
from lbr_kernels.decoding.step import StepRecord
from lbr_kernels.decoding.tracing import named_range
from lbr_kernels.ops._flags import in_words, word

MOST_STEPS_LATE = 3
"""So many steps of a graph are enqueued before the host reads what the first of them did."""


class RecordReader:
    """What steps have done, on the host, some steps later: copies that nobody waits for until they are needed.

    The flags that kernels set when they meet bad values travel along.
    """

    def __init__(self, record: StepRecord, device: torch.device, most_late: int) -> None:
        self._device = device
        self._from = (record.numbers, record.log_probs, word(device))
        self._free = [
            tuple(torch.empty(t.shape, dtype=t.dtype, pin_memory=device.type == "cuda") for t in self._from)
            for _ in range(most_late + 1)
        ]
        self._under_way: deque[tuple[tuple[Tensor, ...], torch.cuda.Event | None]] = deque()

    def __len__(self) -> int:
        return len(self._under_way)

    def enqueue(self) -> None:
        """Have the record of the step that was enqueued last copied."""
        to = self._free.pop()
        for source, target in zip(self._from, to, strict=True):
            target.copy_(source, non_blocking=True)
        event = None
        if self._device.type == "cuda":
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self._device))
        self._under_way.append((to, event))

    def read(self) -> StepRecord:
        """The oldest record that was not read yet. Raises ``RuntimeError`` if a kernel had met a bad value by then."""
        copies, event = self._under_way.popleft()
        if event is not None:
            event.synchronize()
        numbers, log_probs, flags = copies
        if bits := int(flags):
            ops.raise_if_flagged(self._device)
            raise RuntimeError(in_words(bits))  # another thread has cleared them meanwhile
        self._free.append(copies)
        return StepRecord(numbers.clone(), log_probs.clone())


class FixedDecoder:
    """Decodes one batch of rows by fixed steps; its results have the names of ``TreeDecoder``'s.

    Args:
        kept: the step, which the caller has locked; the prompts are in its cache.
        draws: the random numbers, needed where something is drawn.
        limits: where texts end.
        streamer: gets every committed token, as soon as the host knows of it.
        stats: is added to.
    """

    def __init__(
        self,
        kept: KeptStep,
        sequences: Tensor,
        *,
        draws: Draws | None,
        limits: Limits,
        streamer: BaseStreamer | None,
        stats: DecodingStats,
    ) -> None:
        self._kept, self._draws, self._limits, self._streamer, self._stats = kept, draws, limits, streamer, stats
        self.cache = kept.step.cache
        self.sequences = sequences
        self.num_committed = torch.zeros(len(sequences), dtype=torch.int64, device=sequences.device)
        self.node_tokens: list[Tensor] = []
        self.node_log_probs: list[Tensor] = []
        self.choices: list[Tensor] = []
        self.router_log_probs: list[Tensor] = []
        self.raw_logits: list[Tensor] = []
        self.scores: list[Tensor] = []

    def run(self, root_logits: Tensor, next_positions: Tensor, *, routing: Routing, filters: dict[str, float]) -> None:
        """From the logits ``[B, V]`` behind the prompts to the end of the last text."""
        step, stats, limits, device = self._kept.step, self._stats, self._limits, self.sequences.device
        with stats.phase("step"):
            layers = step.begin(
                root_logits, next_positions, routing=routing, filters=filters, limit=limits.max_new_tokens,
                eos_token_ids=limits.eos_token_ids, pad_token_id=limits.pad_token_id, draws=self._draws,
            )  # fmt: skip
            late = MOST_STEPS_LATE if self._kept.graph is not None else 0
            reader = RecordReader(step.record, device, late)
            records: list[StepRecord] = []
            goes_on, enqueued = True, 0
            while goes_on:
                if enqueued < limits.max_new_tokens:
                    self._enqueue(enqueued)
                    reader.enqueue()
                    enqueued += 1
                    if len(reader) <= late and enqueued < limits.max_new_tokens:
                        continue
                records.append(reader.read())
                goes_on = bool(records[-1].goes_on.any())
                if self._streamer is not None:
                    self._streamer.put(records[-1].committed)
        self._gather(layers, records)

    def _enqueue(self, number: int) -> None:
        if self._draws is not None and number % DRAWN_TOGETHER == 0:
            self._kept.step.draw(self._draws, number)
        with named_range("step"):
            self._kept.run()
        self.cache.committed(all_rows=False)

    def _gather(self, layers: list[tuple[Tensor, Tensor]], records: list[StepRecord]) -> None:
        """The results on the device, and what they cost."""
        device = self.sequences.device
        numbers = torch.stack([record.numbers for record in records])
        log_probs = torch.stack([record.log_probs for record in records]).to(device)
        forwarded = [int((tokens >= 0).sum()) for tokens, _ in layers]
        forwarded += [int((record.tokens >= 0).sum()) for record in records]
        self._stats.committed_tokens += int((numbers[:, :, -3] >= 0).sum())
        self._stats.forwarded_nodes += sum(forwarded)
        self._stats.model_calls += sum(count > 0 for count in forwarded)

        numbers = numbers.to(device)
        done = [StepRecord(*pair) for pair in zip(numbers, log_probs, strict=True)]
        self.node_tokens = [*(tokens for tokens, _ in layers), *(record.tokens for record in done)]
        self.node_log_probs = [*(values for _, values in layers), *(record.token_log_probs for record in done)]
        self.choices = [record.choice for record in done]
        self.router_log_probs = [record.router_log_probs for record in done]
        self.sequences = torch.cat([self.sequences, numbers[:, :, -2].T], dim=1)
        self.num_committed = (numbers[:, :, -3] >= 0).sum(0)
