"""The tree cache: keys and values of the committed prefix and of the tree behind it, for every layer.

Contract
--------
Row b of a layer holds its committed prefix in slots ``[0, prefix_lens[b])``, without padding, and the tree's nodes in
the slots after it. A forward of the tree writes its nodes there; :meth:`TreeCache.commit` moves the survivors to the
front and lets the prefix grow. Layers that share device, dtype and retained window form a group with one
``prefix_lens`` and one arena for each head size, in which the layers' heads stand side by side: a commit is one
``ops.commit_`` of one tensor for most models. A sliding layer whose text would outgrow its window keeps the window and
the tree only; its group's slots then count from an offset that differs by row, which changes nothing, since windows
compare positions with each other.

The host keeps an upper bound of the prefix lengths, so that it knows without asking when memory must grow. A cache of
fixed capacity never grows, and a forward or a commit on it reads nothing on the host: both can be captured in a graph.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from lbr_kernels import ops

CACHE_NAME = "cache" if any(f.name == "cache" for f in fields(GenerateDecoderOnlyOutput)) else "past_key_values"
"""What this transformers calls the cache of a text: ``past_key_values`` up to 5.23, ``cache`` from 5.24 on."""

# Memory for a text grows by half of what there is, and by so many slots at least.
_MIN_GROWTH = 256


def layer_window(layer: CacheLayerMixin) -> int | None:
    """The sliding window of a layer of a prefilled cache, None for full attention.

    Raises ``TypeError`` for layers whose state a tree cannot share (recurrent, convolutional, quantised, ...).
    """
    if type(layer) is DynamicLayer:
        return None
    if type(layer) is DynamicSlidingWindowLayer:
        return int(layer.sliding_window)
    raise TypeError(f"its cache holds a {type(layer).__name__}, a state that the branches of a tree cannot share")


class TreeLayer(CacheLayerMixin):
    """One layer's view of its group's arena, in the form that transformers' models write to."""

    keys: Tensor
    values: Tensor

    def __init__(self, group: LayerGroup, window: int | None) -> None:
        super().__init__()
        self.group = group
        self.window = window
        self.is_sliding = window is not None
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the group makes the views."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write the new nodes' keys and values ``[B, H, N, D]`` into the tree; returns the whole buffers."""
        self.group.write(self.keys, key_states)
        self.group.write(self.values, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.group.longest

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.group.longest + query_length, 0

    def get_max_length(self) -> int:
        return self.group.capacity


@dataclass(frozen=True)
class LayerShape:
    """Heads, head sizes and sliding window of one layer."""

    key_heads: int
    key_dim: int
    value_heads: int
    value_dim: int
    window: int | None


class LayerGroup:
    """Layers with one capacity: their arenas, their prefix lengths, and where the next nodes go.

    ``retained`` is the window that the group cuts its text down to, None for a group that keeps the whole text.
    """

    def __init__(
        self,
        shapes: list[LayerShape],
        retained: int | None,
        prefix_lens: Tensor,
        capacity: int,
        tree_nodes: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        fixed: bool,
    ) -> None:
        self.shapes, self.retained, self.tree_nodes, self.fixed = shapes, retained, tree_nodes, fixed
        self.dtype, self.device = dtype, device
        self.prefix_lens = prefix_lens.to(device=device, dtype=torch.int32, copy=True)
        self.layers = [TreeLayer(self, shape.window) for shape in shapes]
        self._arenas: dict[int, Tensor] = {}
        self.capacity = 0
        self._measure()
        self.allocate(capacity)
        self.set_base(0)

    def _measure(self) -> None:
        self.longest = int(self.prefix_lens.max())
        # Where all rows are equally long, slots are written by slices. A graph would keep the numbers in them.
        self.uniform = not self.fixed and bool((self.prefix_lens == self.longest).all())

    def allocate(self, capacity: int) -> None:
        """New arenas ``[B, heads of all layers, capacity, D]``, one for each head size, with the old ones' contents."""
        heads: dict[int, int] = {}
        places: list[list[tuple[int, int, int]]] = []  # head size, first head and end of each layer's keys and values
        for shape in self.shapes:
            places.append([])
            for count, dim in ((shape.key_heads, shape.key_dim), (shape.value_heads, shape.value_dim)):
                first = heads.get(dim, 0)
                heads[dim] = first + count
                places[-1].append((dim, first, first + count))
        rows = len(self.prefix_lens)
        arenas = {
            dim: torch.empty((rows, count, capacity, dim), dtype=self.dtype, device=self.device)
            for dim, count in heads.items()
        }
        for dim, old in self._arenas.items():
            arenas[dim][:, :, : self.capacity] = old
        for layer, place in zip(self.layers, places, strict=True):
            layer.keys, layer.values = (arenas[dim][:, first:end] for dim, first, end in place)
        self._arenas, self.capacity = arenas, capacity

    @property
    def buffers(self) -> list[Tensor]:
        """Every layer's keys and values, in the few tensors that ``ops.commit_`` is given."""
        return list(self._arenas.values())

    def fill(self, layer: TreeLayer, keys: Tensor, values: Tensor, repeats: int) -> None:
        """Copy a prefilled layer's states ``[B, H, P, D]``, real tokens last, to the prefixes of the rows.

        A sliding layer's states may begin later than the text; the slots before them stay unwritten, nobody sees them.
        """
        equal = bool((self.prefix_lens == self.longest).all())
        for buffer, states in ((layer.keys, keys), (layer.values, values)):
            held = states.shape[2]
            if equal:
                count = min(self.longest, held)
                rows = buffer.unflatten(0, (-1, repeats))
                rows[:, :, :, self.longest - count : self.longest] = states[:, None, :, held - count :]
                continue
            for row, length in enumerate(self.prefix_lens.tolist()):
                count = min(length, held)
                buffer[row, :, length - count : length] = states[row // repeats, :, held - count :]

    def set_base(self, base: int) -> None:
        """The next nodes written are the tree's from ``base`` on."""
        self.base = base
        self._slots: Tensor | None = None

    def write(self, buffer: Tensor, states: Tensor) -> None:
        """Put the nodes' states ``[B, H, N, D]`` where they belong."""
        nodes = states.shape[2]
        if self.uniform:
            start = self.longest + self.base
            buffer[:, :, start : start + nodes] = states
            return
        if self._slots is None or self._slots.shape[1] != nodes:
            # int64 as scatter wants it; one for all layers of a forward.
            self._slots = self.prefix_lens[:, None].long() + torch.arange(
                self.base, self.base + nodes, device=self.device
            )
        buffer.scatter_(2, self._slots[:, None, :, None].expand(states.shape), states)

    def begin(self, prefix_lens: Tensor) -> None:
        """New prefixes of these lengths ``[B]``, which :meth:`fill` brings."""
        self.prefix_lens.copy_(prefix_lens)
        self._measure()
        self.set_base(0)

    @property
    def is_full(self) -> bool:
        return self.longest + self.tree_nodes > self.capacity

    def cut_to_window(self) -> None:
        """Drop all but the last ``window`` tokens; the tree moves along.

        The next query sees one token less than that. The oldest one is for whoever continues from the returned cache,
        which ends before the last token.
        """
        assert self.retained is not None
        kept = self.prefix_lens.clamp(max=self.retained)
        live = torch.arange(self.retained + self.tree_nodes, device=self.device)
        slots = (live + (self.prefix_lens - kept)[:, None]).clamp(max=self.capacity - 1)
        for buffer in self.buffers:
            index = slots[:, None, :, None].expand(*buffer.shape[:2], -1, buffer.shape[3])
            buffer[:, :, : len(live)] = buffer.gather(2, index)
        self.prefix_lens.copy_(kept)
        self.longest = min(self.longest, self.retained)


def _held(prompt_lens: Tensor, repeats: int, retained: int | None) -> Tensor:
    """How much of the rows' prompts a group holds."""
    lens = prompt_lens.repeat_interleave(repeats)
    return lens if retained is None else lens.clamp(max=retained - 1)


def _sliding_capacity(window: int, tree_nodes: int) -> int:
    """Slots for a window, the tree, and some tokens before the next cut."""
    return window + tree_nodes + max(_MIN_GROWTH, window // 4)


class TreeCache(Cache):
    """The cache that a model writes to while a tree is decoded."""

    layers: list[TreeLayer]

    def __init__(self, layers: list[TreeLayer], groups: list[LayerGroup], final_length: int) -> None:
        super().__init__(layers=list(layers))
        self.groups = groups
        self._final_length = final_length

    @classmethod
    def from_prefill(
        cls,
        prefilled: Cache,
        prompt_lens: Tensor,
        *,
        repeats: int,
        tree_nodes: int,
        max_new_tokens: int,
        release: bool = True,
        fixed_capacity: int | None = None,
    ) -> TreeCache:
        """Move a prefilled cache into an arena.

        Args:
            prefilled: keys and values of left-padded prompts, ``[B, H, P, D]`` per layer.
            prompt_lens: int64 ``[B]``, real tokens per prompt.
            repeats: rows per prompt.
            tree_nodes: the most nodes that a tree holds.
            max_new_tokens: the most tokens that will be committed.
            release: empty the prefilled cache layer by layer on the way.
            fixed_capacity: slots for a whole text and a tree, which then is all that there will ever be; by default
                memory grows with the texts.

        Raises:
            TypeError: a layer's state cannot be shared by branches.
        """
        longest = int(prompt_lens.max())
        final_length = fixed_capacity or longest + max_new_tokens + tree_nodes
        members: dict[tuple[torch.device, torch.dtype, int | None], list[int]] = {}
        shapes = []
        for index, layer in enumerate(prefilled.layers):
            window = layer_window(layer)
            keys, values = layer.keys, layer.values
            shapes.append(LayerShape(keys.shape[1], keys.shape[3], values.shape[1], values.shape[3], window))
            # A window that the text never outgrows needs no group of its own.
            outgrown = window is not None and _sliding_capacity(window, tree_nodes) < final_length
            members.setdefault((keys.device, keys.dtype, window if outgrown else None), []).append(index)

        cache = cls([], [], final_length)
        views: dict[int, TreeLayer] = {}
        for (device, dtype, retained), indices in members.items():
            lens = _held(prompt_lens, repeats, retained)
            capacity = fixed_capacity or min(final_length, longest + _MIN_GROWTH + tree_nodes)
            if retained is not None:
                capacity = _sliding_capacity(retained, tree_nodes)
            group = LayerGroup(
                [shapes[index] for index in indices],
                retained, lens, cache._unused_capacity(capacity), tree_nodes, dtype, device,
                fixed=fixed_capacity is not None,
            )  # fmt: skip
            cache.groups.append(group)
            views.update(zip(indices, group.layers, strict=True))
        cache.layers = [views[index] for index in range(len(views))]
        cache._fill(prefilled, repeats, release)
        return cache

    def refill(self, prefilled: Cache, prompt_lens: Tensor, *, repeats: int, release: bool = True) -> None:
        """Begin anew with other prompts of the same model, in the same memory; arguments as for ``from_prefill``."""
        for group in self.groups:
            group.begin(_held(prompt_lens, repeats, group.retained))
        self._fill(prefilled, repeats, release)

    def _fill(self, prefilled: Cache, repeats: int, release: bool) -> None:
        for source, layer in zip(prefilled.layers, self.layers, strict=True):
            layer.group.fill(layer, source.keys, source.values, repeats)
            if release:
                source.keys = source.values = None

    def _unused_capacity(self, capacity: int) -> int:
        """``capacity`` or the next number that no other group has: buffers are told apart by it."""
        taken = {group.capacity for group in self.groups}
        while capacity in taken:
            capacity += 1
        return capacity

    def set_base(self, base: int) -> None:
        """The next forward writes the tree's nodes from ``base`` on."""
        for group in self.groups:
            group.set_base(base)

    def commit(self, sources: Tensor, num_moves: Tensor | None, *, backend: str | None) -> None:
        """Prune and shift all layers by ``ops.commit_``."""
        for group in self.groups:
            moves = None if num_moves is None else num_moves.to(group.device)
            ops.commit_(group.buffers, group.prefix_lens, sources.to(group.device), num_moves=moves, backend=backend)

    def committed(self, *, all_rows: bool) -> None:
        """The host's part of a commit: what it knows of the lengths, and room for the next tree.

        ``all_rows`` says that no row has stayed behind.
        """
        for group in self.groups:
            group.longest += 1
            group.uniform &= all_rows
            if not group.is_full:
                continue
            if group.retained is not None:
                group.cut_to_window()
            elif not group.fixed:
                grown = max(group.capacity + _MIN_GROWTH, group.capacity * 3 // 2)
                group.allocate(self._unused_capacity(min(grown, self._final_length)))

    def prefix_lens_for(self, key_cache: Tensor) -> Tensor:
        """The prefix lengths that belong to a buffer which a layer of this cache has returned."""
        for group in self.groups:
            if group.capacity == key_cache.shape[2] and group.device == key_cache.device:
                return group.prefix_lens
        raise RuntimeError(
            f"tree attention: keys of shape {list(key_cache.shape)} are not a buffer of this call's cache: "
            "the model changes what the cache returns before it attends"
        )

    def layer_window(self, layer: int | None) -> int | None:
        """The sliding window of a layer of the model, by its index; None if it has none, or no cache of its own."""
        return self.layers[layer].window if layer is not None and layer < len(self.layers) else None

    def to_dynamic_layers(self, lens: Tensor, pads: Tensor, num_columns: int) -> list[DynamicLayer]:
        """The committed text in the form and layout in which ``model.generate`` leaves a cache.

        Args:
            lens: int64 ``[rows]``, tokens of each row, prompt included.
            pads: int64 ``[rows]``, columns before a row's first token.
            num_columns: columns of the result. Columns without a token are zero; sliding layers keep their last
                ``window - 1`` columns.
        """
        layers = []
        for layer in self.layers:
            first = 0 if layer.window is None else max(0, num_columns - (layer.window - 1))
            states = [_columns(layer, buffer, lens, pads, first, num_columns) for buffer in (layer.keys, layer.values)]
            target = DynamicLayer() if layer.window is None else DynamicSlidingWindowLayer(layer.window)
            target.update(*states)
            if layer.window is not None:
                target.cumulative_length = num_columns
            layers.append(target)
        return layers


def _columns(layer: TreeLayer, buffer: Tensor, lens: Tensor, pads: Tensor, first: int, end: int) -> Tensor:
    """Columns ``[first, end)`` of a row-wise packed buffer, as a padded tensor."""
    out = buffer.new_zeros(*buffer.shape[:2], end - first, buffer.shape[3])
    rows = zip(lens.tolist(), pads.tolist(), layer.group.prefix_lens.tolist(), strict=True)
    for row, (length, pad, held) in enumerate(rows):
        dropped = length - held  # tokens that a sliding group has cut
        low, high = max(first - pad, dropped, 0), min(end - pad, length)
        if low < high:
            out[row, :, low + pad - first : high + pad - first] = buffer[row, :, low - dropped : high - dropped]
    return out
