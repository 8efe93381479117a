# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: ANN001, ANN201, ANN202 -- a kernel's arguments are pointers and numbers; the launch says which
"""route in Triton: one launch, the projection of the hidden states split over programs, the rest by who comes last.

Contract
--------
The op is the one of ``route.py``, for tensors on a CUDA device and fp32 weights; shapes, dtypes and numbers are checked
by the caller. Nothing is read on the host that lives on the device, so a call can be captured in a graph. fp32
throughout, the softmax over candidates and the draw in fp64. A row with a score that is not finite, with a ``valid``
that is no tree, or with a uniform number outside [0, 1) gets choice -1 and log-probabilities NaN, and ``flag``, where
given, bit 32 (score) or 64 of ``_flags``.

How it goes
-----------
The projection reads a matrix as wide as the model, so every program of a row makes some columns of it. There is no
barrier between programs, but whoever arrives last finds all columns there and goes on alone: the path encoder, the
subtree's set attention and pooling, the candidates' set attention or MLP, the score. It walks the rows of each step in
tiles, and leaves them in memory of its own from one step to the next, with a barrier of the program in between.

A node's key and value in the path encoder do not depend on the path, so they are made once per node; of an encoder's
queries there only [CLS]'s is read, the same for all paths. Paths and candidates that do not exist are computed like
others, on zeros, and nobody attends to them: what their slots hold is not read.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lbr_kernels.ops._triton_support import Launch, arrive, counters, stride
from lbr_kernels.ops.route import weight_shapes

MOST_VALUES = 2048  # of a tile: rows times dim
PART_COLUMNS = 16  # of the projection, that a program makes
INPUTS = 16  # of a matrix, that are multiplied at a time

_HALF_ROOT = tl.constexpr(0.5**0.5)


@triton.jit
def _gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * _HALF_ROOT))


@triton.jit
def _norm(x, weight, bias, size, SIZE: tl.constexpr):
    # LayerNorm of a tile's rows, whose columns from `size` on are 0 and stay so.
    column = tl.arange(0, SIZE)
    inside = column < size
    mean = tl.sum(x, 1) / size
    centred = tl.where(inside[None, :], x - mean[:, None], 0.0)
    deviation = tl.sqrt_rn(tl.sum(centred * centred, 1) / size + 1e-5)
    scaled = tl.div_rn(centred, tl.zeros_like(centred) + deviation[:, None])
    w = tl.load(weight + column, mask=inside, other=0.0)
    return scaled * w[None, :] + tl.load(bias + column, mask=inside, other=0.0)[None, :]


@triton.jit
def _rows_of(x, row, there, size, SIZE: tl.constexpr):
    # Past the level-1 cache, where other programs' stores may be missing.
    column = tl.arange(0, SIZE)
    at = x + row.to(tl.int64)[:, None] * size + column[None, :]
    return tl.load(at, mask=there[:, None] & (column < size)[None, :], other=0.0, cache_modifier=".cg")


@triton.jit
def _store_rows(x, row, there, row_size, tile, size, SIZE: tl.constexpr):
    column = tl.arange(0, SIZE)
    at = x + row.to(tl.int64)[:, None] * row_size + column[None, :]
    tl.store(at, tile, mask=there[:, None] & (column < size)[None, :])


@triton.jit
def _product(
    x, row, there, inputs, weight, weight_stride, outputs,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    # Rows of x, dense, times a matrix [inputs, outputs].
    column = tl.arange(0, OUTPUTS)
    sums = tl.zeros([ROWS, OUTPUTS], tl.float32)
    for first in range(0, inputs, INPUTS):
        i = first + tl.arange(0, INPUTS)
        at = x + row.to(tl.int64)[:, None] * inputs + i[None, :]
        a = tl.load(at, mask=there[:, None] & (i < inputs)[None, :], other=0.0)
        w_at = weight + i.to(tl.int64)[:, None] * weight_stride + column[None, :]
        w = tl.load(w_at, mask=(i < inputs)[:, None] & (column < outputs)[None, :], other=0.0)
        sums = tl.dot(a, w, sums, input_precision="ieee")
    return sums


@triton.jit
def _with_bias(tile, bias, size, SIZE: tl.constexpr):
    column = tl.arange(0, SIZE)
    return tile + tl.load(bias + column, mask=column < size, other=0.0)[None, :]


@triton.jit
def _feed_forward(
    x, hidden, row, there, weights, dim, ffn_dim, ROWS: tl.constexpr, DIM: tl.constexpr, INPUTS: tl.constexpr
):
    # Two linear layers with a GELU between them, for a tile; `hidden` is [ROWS, ffn_dim] of scratch for all tiles.
    up_bias = weights + dim * ffn_dim
    down = up_bias + ffn_dim
    tile_row = tl.arange(0, ROWS)
    for first in range(0, ffn_dim, DIM):
        left = ffn_dim - first
        tile = _product(x, row, there, dim, weights + first, ffn_dim, left, ROWS, DIM, INPUTS)
        tile = _gelu(_with_bias(tile, up_bias + first, left, DIM))
        _store_rows(hidden + first, tile_row, there, ffn_dim, tile, left, DIM)
    tl.debug_barrier()
    tile = _product(hidden, tile_row, there, ffn_dim, down, dim, dim, ROWS, DIM, INPUTS)
    tl.debug_barrier()
    return _with_bias(tile, down + ffn_dim * dim, dim, DIM)


@triton.jit
def _in_heads(x, row, there, row_size, heads, head_dim, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr):
    # Rows of x as [rows, heads, head size].
    head = tl.arange(0, HEADS)[None, :, None]
    i = tl.arange(0, HEAD_DIM)[None, None, :]
    at = x + row.to(tl.int64)[:, None, None] * row_size + head * head_dim + i
    return tl.load(at, mask=there[:, None, None] & (head < heads) & (i < head_dim), other=0.0)


@triton.jit
def _attend_to(query, keys, values, row, there, row_size, scale, heads, head_dim, top, total, sums,
               HEADS: tl.constexpr, HEAD_DIM: tl.constexpr):  # fmt: skip
    # One key for every query of the tile joins its softmax: state as in tree_attention_triton.py, to the base e.
    key = _in_heads(keys, row, there, row_size, heads, head_dim, HEADS, HEAD_DIM)
    value = _in_heads(values, row, there, row_size, heads, head_dim, HEADS, HEAD_DIM)
    score = tl.where(there[:, None], tl.sum(query * key, 2) * scale, float("-inf"))
    new_top = tl.maximum(top, score)
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    keep = tl.exp(top - base)
    weight = tl.exp(score - base)
    return new_top, total * keep + weight, sums * keep[:, :, None] + weight[:, :, None] * value


@triton.jit
def _store_mixed(x, row, there, total, sums, dim, heads, head_dim, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr):
    head = tl.arange(0, HEADS)[None, :, None]
    i = tl.arange(0, HEAD_DIM)[None, None, :]
    mixed = sums / tl.where(total == 0.0, 1.0, total)[:, :, None]
    at = x + row.to(tl.int64)[:, None, None] * dim + head * head_dim + i
    tl.store(at, mixed, mask=there[:, None, None] & (head < heads) & (i < head_dim))


@triton.jit
def _project(
    x, normed, projected, weights, count, dim, first_part,
    ROWS: tl.constexpr, DIM: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    # norm1, and of query, key and value those from `first_part` on, for all rows of x; `projected` is [count, 3 * dim].
    for first in range(0, count, ROWS):
        row = first + tl.arange(0, ROWS)
        there = row < count
        tile = _norm(_rows_of(x, row, there, dim, DIM), weights, weights + dim, dim, DIM)
        _store_rows(normed, row, there, dim, tile, dim, DIM)
    tl.debug_barrier()
    matrix = weights + 2 * dim
    for first in range(0, count, ROWS):
        row = first + tl.arange(0, ROWS)
        there = row < count
        for part in range(first_part, 3):
            tile = _product(normed, row, there, dim, matrix + part * dim, 3 * dim, dim, ROWS, DIM, INPUTS)
            tile = _with_bias(tile, matrix + 3 * dim * dim + part * dim, dim, DIM)
            _store_rows(projected + part * dim, row, there, 3 * dim, tile, dim, DIM)


@triton.jit
def _rest_of_layer(
    x, mixed, normed, hidden, row, there, weights, dim, ffn_dim,
    ROWS: tl.constexpr, DIM: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    # What comes after an encoder layer's attention, and the closing LayerNorm, for a tile; x is what the layer was
    # given. `normed` and `hidden` are scratch.
    out = weights + 2 * dim + 3 * dim * (dim + 1)
    x += _with_bias(_product(mixed, row, there, dim, out, dim, dim, ROWS, DIM, INPUTS), out + dim * dim, dim, DIM)
    norm = out + dim * dim + dim
    tl.debug_barrier()
    _store_rows(normed, row, there, dim, _norm(x, norm, norm + dim, dim, DIM), dim, DIM)
    tl.debug_barrier()
    up = norm + 2 * dim
    x += _feed_forward(normed, hidden, row, there, up, dim, ffn_dim, ROWS, DIM, INPUTS)
    last = up + 2 * dim * ffn_dim + ffn_dim + dim
    return _norm(x, last, last + dim, dim, DIM)


@triton.jit
def _set_attention(
    x, exists, normed, projected, mixed, hidden, weights, count, group, dim, ffn_dim, heads,
    ROWS: tl.constexpr, DIM: tl.constexpr, INPUTS: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    # An encoder layer in place, in which a row attends to those of its group of `group` rows that exist.
    _project(x, normed, projected, weights, count, dim, 0, ROWS, DIM, INPUTS)
    tl.debug_barrier()
    head_dim = dim // heads
    scale = 1.0 / tl.sqrt_rn(head_dim.to(tl.float32))
    for first in range(0, count, ROWS):
        row = first + tl.arange(0, ROWS)
        there = row < count
        query = _in_heads(projected, row, there, 3 * dim, heads, head_dim, HEADS, HEAD_DIM)
        top = tl.full([ROWS, HEADS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS, HEADS], tl.float32)
        sums = tl.zeros([ROWS, HEADS, HEAD_DIM], tl.float32)
        for j in range(group):
            other = row // group * group + j
            seen = there & (tl.load(exists + other, mask=there, other=0) != 0)
            top, total, sums = _attend_to(
                query, projected + dim, projected + 2 * dim, other, seen, 3 * dim, scale, heads, head_dim, top, total,
                sums, HEADS, HEAD_DIM,
            )  # fmt: skip
        _store_mixed(mixed, row, there, total, sums, dim, heads, head_dim, HEADS, HEAD_DIM)
    tl.debug_barrier()
    for first in range(0, count, ROWS):
        row = first + tl.arange(0, ROWS)
        there = row < count
        tile = _rest_of_layer(
            _rows_of(x, row, there, dim, DIM), mixed, normed, hidden, row, there, weights, dim, ffn_dim, ROWS, DIM,
            INPUTS,
        )  # fmt: skip
        _store_rows(x, row, there, dim, tile, dim, DIM)
    tl.debug_barrier()


@triton.jit
def _exists(valid, node, there):
    exists = there
    if valid is not None:
        exists = there & (tl.load(valid + node, mask=there, other=0) != 0)
    return exists


@triton.jit
def _is_tree(valid, width, nodes, TILE: tl.constexpr):
    # Whether there is a candidate, every node's parent is there, and children fill their slots from the first on.
    candidates = tl.zeros([TILE], tl.int32)
    wrong = tl.zeros([TILE], tl.int32)
    for first in range(0, nodes, TILE):
        node = first + tl.arange(0, TILE)
        exists = _exists(valid, node, node < nodes)
        candidates = candidates | (exists & (node < width)).to(tl.int32)
        child = exists & (node >= width)
        parent = _exists(valid, (node - width) // width, child)
        after = child & ((node - width) % width != 0)
        before = _exists(valid, node - 1, after)
        wrong = wrong | ((child & (parent == 0)) | (after & (before == 0))).to(tl.int32)
    return (tl.max(candidates, 0) != 0) & (tl.max(wrong, 0) == 0)


@triton.jit
def _embed(
    hidden, valid, states, weights, input_norm, in_proj, depth_embed, cls, column,
    node_stride, width, nodes, hidden_size, dim,
    INPUT_NORM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    # Some columns of [CLS], as row `nodes`, and of the projected nodes, each with its layer's embedding.
    inside = column < dim
    for first in range(0, nodes, ROWS):
        node = first + tl.arange(0, ROWS)
        there = node < nodes
        read = _exists(valid, node, there)
        at = hidden + node.to(tl.int64)[:, None] * node_stride
        mean = tl.zeros([ROWS], tl.float32)
        deviation = tl.zeros([ROWS], tl.float32) + 1.0
        if INPUT_NORM:
            total = tl.zeros([ROWS, INPUTS], tl.float32)
            for start in range(0, hidden_size, INPUTS):
                i = start + tl.arange(0, INPUTS)
                total += tl.load(at + i[None, :], mask=read[:, None] & (i < hidden_size)[None, :], other=0.0).to(
                    tl.float32
                )
            mean = tl.sum(total, 1) / hidden_size
            squares = tl.zeros([ROWS, INPUTS], tl.float32)
            for start in range(0, hidden_size, INPUTS):
                i = start + tl.arange(0, INPUTS)
                used = read[:, None] & (i < hidden_size)[None, :]
                centred = tl.load(at + i[None, :], mask=used, other=0.0).to(tl.float32) - mean[:, None]
                squares += tl.where(used, centred * centred, 0.0)
            deviation = tl.sqrt_rn(tl.sum(squares, 1) / hidden_size + 1e-5)
        sums = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, hidden_size, INPUTS):
            i = start + tl.arange(0, INPUTS)
            used = read[:, None] & (i < hidden_size)[None, :]
            state = tl.load(at + i[None, :], mask=used, other=0.0).to(tl.float32)
            if INPUT_NORM:
                w = tl.load(weights + input_norm + i, mask=i < hidden_size, other=0.0)
                bias = tl.load(weights + input_norm + hidden_size + i, mask=i < hidden_size, other=0.0)
                state = (state - mean[:, None]) / deviation[:, None] * w[None, :] + bias[None, :]
                state = tl.where(used, state, 0.0)
            matrix_at = weights + in_proj + i.to(tl.int64)[:, None] * dim + column[None, :]
            matrix = tl.load(matrix_at, mask=(i < hidden_size)[:, None] & inside[None, :], other=0.0)
            sums = tl.dot(state, matrix, sums, input_precision="ieee")
        layer = tl.zeros([ROWS], tl.int32)
        end = width
        size = width
        while end < nodes:
            layer += (node >= end).to(tl.int32)
            size *= width
            end += size
        embedding_at = weights + depth_embed + layer[:, None] * dim + column[None, :]
        sums += tl.load(embedding_at, mask=there[:, None] & inside[None, :], other=0.0)
        out = states + node.to(tl.int64)[:, None] * dim + column[None, :]
        tl.store(out, sums, mask=there[:, None] & inside[None, :])
    tl.store(
        states + nodes.to(tl.int64) * dim + column, tl.load(weights + cls + column, mask=inside, other=0.0), mask=inside
    )


@triton.jit(
    do_not_specialize=[
        "hidden", "weights", "valid", "active", "uniforms", "flag", "log_probs", "choices", "counters", "scratch",
        "exists", "row_stride", "node_stride", "scratch_size", "parts", "nodes", "paths", "hidden_size", "width",
        "depth", "dim", "heads", "ffn_dim", "input_norm", "in_proj", "depth_embed", "cls", "path_encoder",
        "subtree_attention", "pool_query", "candidate", "score", "temperature",
    ]
)  # fmt: skip
def route_kernel(
    hidden,
    weights,
    valid,  # bytes, or None
    active,  # bytes, or None
    uniforms,  # or None
    flag,  # or None
    log_probs,  # [B, width], dense
    choices,  # [B]
    counters,  # per row: how many of its programs are done
    scratch,  # per row: `scratch_size` floats
    exists,  # per row: a byte for each path, then one for each candidate
    row_stride,
    node_stride,
    scratch_size,
    parts,  # programs of a row
    nodes,
    paths,  # of all candidates: width ** depth
    hidden_size,
    width,
    depth,
    dim,
    heads,
    ffn_dim,
    input_norm,  # from here on: where a part of the weights begins
    in_proj,
    depth_embed,
    cls,
    path_encoder,
    subtree_attention,
    pool_query,
    candidate,
    score,
    temperature: tl.float64,
    MLP_SCORE: tl.constexpr,
    INDEPENDENT: tl.constexpr,
    INPUT_NORM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # of the projection, that a program makes
    DIM: tl.constexpr,  # dim, width, heads and dim / heads, rounded up to powers of two
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """Some columns of a row's projection; for the last of a row's programs, all the rest."""
    b = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    k = tl.arange(0, WIDTH)
    log_probs += b.to(tl.int64) * width
    decides = width > 0
    if active is not None:
        decides = tl.load(active + b) != 0
    if not decides:
        if part == 0:
            same = -tl.log(tl.zeros([WIDTH], tl.float64) + width)
            tl.store(log_probs + k, same.to(tl.float32), mask=k < width)
            tl.store(choices + b, tl.full([], -1, tl.int64))
        return
    if valid is not None:
        valid += b.to(tl.int64) * nodes

    states = scratch + b.to(tl.int64) * scratch_size
    _embed(
        hidden + b.to(tl.int64) * row_stride, valid, states, weights, input_norm, in_proj, depth_embed, cls,
        part * COLUMNS + tl.arange(0, COLUMNS), node_stride, width, nodes, hidden_size, dim,
        INPUT_NORM, ROWS, COLUMNS, INPUTS,
    )  # fmt: skip
    if not arrive(counters + b, parts):
        return

    fine = _is_tree(valid, width, nodes, 128)
    uniform = tl.zeros([], tl.float64)
    if uniforms is not None:
        uniform = tl.load(uniforms + b)
        fine = fine & (uniform >= 0.0) & (uniform < 1.0)
    most = tl.maximum(nodes + 1, paths)
    normed = states + (nodes + 1).to(tl.int64) * dim
    projected = normed + most.to(tl.int64) * dim
    mixed = projected + 3 * most.to(tl.int64) * dim
    rollouts = mixed + paths.to(tl.int64) * dim
    candidates = rollouts + paths.to(tl.int64) * dim
    scores = candidates + width.to(tl.int64) * dim
    hidden_units = scores + width
    exists += b.to(tl.int64) * (paths + width)
    head_dim = dim // heads
    per_candidate = paths // width

    # Which paths exist: an early end stands for one path, at the first of the leaf slots below it.
    for first in range(0, paths, 128):
        path = first + tl.arange(0, 128)
        there = path < paths
        on = there
        layer_begin = width * 0
        layer_size = width
        for layer in range(depth):
            step = path // (paths // layer_size)
            on = on & (_exists(valid, layer_begin + step, there) | ((path * 0 + layer > 0) & (step % width == 0)))
            layer_begin += layer_size
            layer_size *= width
        tl.store(exists + path, on.to(tl.int8), mask=there)
    tl.store(exists + paths + k, _exists(valid, k, k < width).to(tl.int8), mask=k < width)

    # [CLS]'s query; key and value of every node and of [CLS].
    encoder = weights + path_encoder
    _project(states, normed, projected, encoder, nodes + 1, dim, 1, ROWS, DIM, INPUTS)
    tile_row = tl.arange(0, ROWS)
    cls_row = tile_row * 0 + nodes
    query = _product(normed, cls_row, tile_row < 1, dim, encoder + 2 * dim, 3 * dim, dim, ROWS, DIM, INPUTS)
    query = _with_bias(query, encoder + 2 * dim + 3 * dim * dim, dim, DIM)
    _store_rows(projected, cls_row, tile_row < 1, 3 * dim, query, dim, DIM)
    tl.debug_barrier()
    scale = 1.0 / tl.sqrt_rn(head_dim.to(tl.float32))
    for first in range(0, paths, ROWS):
        path = first + tile_row
        there = path < paths
        cls_query = _in_heads(projected, cls_row, there, 3 * dim, heads, head_dim, HEADS, HEAD_DIM)
        top = tl.full([ROWS, HEADS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS, HEADS], tl.float32)
        sums = tl.zeros([ROWS, HEADS, HEAD_DIM], tl.float32)
        top, total, sums = _attend_to(
            cls_query, projected + dim, projected + 2 * dim, cls_row, there, 3 * dim, scale, heads, head_dim, top,
            total, sums, HEADS, HEAD_DIM,
        )  # fmt: skip
        layer_begin = width * 0
        layer_size = width
        for _ in range(depth):
            node = layer_begin + path // (paths // layer_size)
            top, total, sums = _attend_to(
                cls_query, projected + dim, projected + 2 * dim, node, _exists(valid, node, there), 3 * dim, scale,
                heads, head_dim, top, total, sums, HEADS, HEAD_DIM,
            )  # fmt: skip
            layer_begin += layer_size
            layer_size *= width
        _store_mixed(mixed, path, there, total, sums, dim, heads, head_dim, HEADS, HEAD_DIM)
    tl.debug_barrier()
    for first in range(0, paths, ROWS):
        path = first + tile_row
        there = path < paths
        tile = _rest_of_layer(
            _rows_of(states, cls_row, there, dim, DIM), mixed, normed, hidden_units, path, there, encoder, dim, ffn_dim,
            ROWS, DIM, INPUTS,
        )  # fmt: skip
        _store_rows(rollouts, path, there, dim, tile, dim, DIM)
    tl.debug_barrier()

    _set_attention(
        rollouts, exists, normed, projected, mixed, hidden_units, weights + subtree_attention, paths, per_candidate,
        dim, ffn_dim, heads, ROWS, DIM, INPUTS, HEADS, HEAD_DIM,
    )  # fmt: skip
    # Pooling: one query, a head as wide as all.
    pool_scale = 1.0 / tl.sqrt_rn(dim.to(tl.float32))
    for first in range(0, width, ROWS):
        row = first + tile_row
        there = row < width
        one_query = _in_heads(weights + pool_query, tile_row * 0, there, dim, 1, dim, 1, DIM)
        pool_top = tl.full([ROWS, 1], float("-inf"), tl.float32)
        pool_total = tl.zeros([ROWS, 1], tl.float32)
        pooled = tl.zeros([ROWS, 1, DIM], tl.float32)
        for j in range(per_candidate):
            path = row * per_candidate + j
            seen = there & (tl.load(exists + path, mask=there, other=0) != 0)
            pool_top, pool_total, pooled = _attend_to(
                one_query, rollouts, rollouts, path, seen, dim, pool_scale, 1, dim, pool_top, pool_total, pooled, 1, DIM
            )
        _store_mixed(candidates, row, there, pool_total, pooled, dim, 1, dim, 1, DIM)
    tl.debug_barrier()

    if not INDEPENDENT:
        _set_attention(
            candidates, exists + paths, normed, projected, mixed, hidden_units, weights + candidate, width, width, dim,
            ffn_dim, heads, ROWS, DIM, INPUTS, HEADS, HEAD_DIM,
        )  # fmt: skip
    column = tl.arange(0, DIM)
    for first in range(0, width, ROWS):
        row = first + tile_row
        there = row < width
        if INDEPENDENT:
            tile = _feed_forward(
                candidates, hidden_units, row, there, weights + candidate, dim, ffn_dim, ROWS, DIM, INPUTS
            )
            _store_rows(normed, row, there, dim, tile, dim, DIM)
            tl.debug_barrier()
            scored = normed
        else:
            scored = candidates
        head = weights + score
        if MLP_SCORE:
            tile = _product(scored, row, there, dim, head, dim, dim, ROWS, DIM, INPUTS)
            tile = _gelu(_with_bias(tile, head + dim * dim, dim, DIM))
            head += dim * dim + dim
            bias = tl.load(head + dim)
        else:
            tile = _rows_of(scored, row, there, dim, DIM)
            bias = 0.0
        w = tl.load(head + column, mask=column < dim, other=0.0)
        tl.store(scores + row, tl.sum(tile * w[None, :], 1) + bias, mask=there)
    tl.debug_barrier()

    exist = _exists(valid, k, k < width)
    its_score = tl.load(scores + k, mask=exist, other=float("-inf"))
    infinite = exist & ((tl.abs(its_score) < float("inf")) == 0)
    finite = tl.max(infinite.to(tl.int32), 0) == 0
    good = fine & finite
    difference = (its_score - tl.max(its_score, 0)).to(tl.float64) / temperature
    difference = tl.where(exist & good, difference, float("-inf"))
    log_total = tl.log(tl.sum(tl.exp(difference), 0))
    log_prob = (difference - log_total).to(tl.float32)
    probability = tl.where(exist & good, tl.exp(log_prob.to(tl.float64)), 0.0)
    if uniforms is not None:
        reached = (tl.cumsum(probability, 0) > uniform) & (probability > 0.0)
        choice = tl.min(tl.where(reached, k, WIDTH), 0)
        last = tl.max(tl.where(probability > 0.0, k, -1), 0)
        choice = tl.where(choice == WIDTH, last, choice)
    else:
        choice = tl.min(tl.where(exist & (log_prob == tl.max(log_prob, 0)), k, WIDTH), 0)
    tl.store(log_probs + k, tl.where(good, log_prob, float("nan")), mask=k < width)
    tl.store(choices + b, tl.where(good, choice, -1).to(tl.int64))
    if flag is not None:
        tl.atomic_or(flag, tl.where(fine, 32, 64), mask=good == 0)


def route_triton(
    hidden: Tensor,
    weights: Tensor,
    width: int,
    depth: int,
    dim: int,
    num_heads: int,
    ffn_dim: int,
    mlp_score: bool,
    independent: bool,
    input_norm: bool,
    *,
    temperature: float = 1.0,
    uniforms: Tensor | None = None,
    valid: Tensor | None = None,
    active: Tensor | None = None,
    flag: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and choices, as :func:`lbr_kernels.ops.route` defines them.

    Args:
        flag: int32 ``[1]``; 32 is or-ed into it for a score that is not finite, 64 for a bad ``valid`` or uniform.
    """
    B = hidden.shape[0]
    call = launch(
        hidden, weights, width, depth, dim, num_heads, ffn_dim, mlp_score, independent, input_norm,
        counters(hidden.device, B), temperature=temperature, uniforms=uniforms, valid=valid, active=active, flag=flag,
    )  # fmt: skip
    if B > 0:
        call.run(hidden.device)
    return call.arguments["log_probs"], call.arguments["choices"]


def launch(
    hidden: Tensor,
    weights: Tensor,
    width: int,
    depth: int,
    dim: int,
    num_heads: int,
    ffn_dim: int,
    mlp_score: bool,
    independent: bool,
    input_norm: bool,
    counters: Tensor,
    *,
    temperature: float = 1.0,
    uniforms: Tensor | None = None,
    valid: Tensor | None = None,
    active: Tensor | None = None,
    flag: Tensor | None = None,
) -> Launch:
    """What the kernel is called with; results and memory for what lies between the steps are allocated here.

    Tensors may be on the meta device, for compilation ahead of time.
    """
    B, nodes, hidden_size = hidden.shape
    paths = width**depth
    begins: dict[str, int] = {}
    end = 0
    for name, shape in weight_shapes(hidden_size, depth, dim, ffn_dim, mlp_score, independent, input_norm).items():
        begins.setdefault(name.split(".")[0], end)
        end += math.prod(shape)
    most = max(nodes + 1, paths)
    columns_of_tile = max(triton.next_power_of_2(dim), 16)
    rows = max(min(triton.next_power_of_2(paths), 16, MOST_VALUES // columns_of_tile), 1)
    scratch_size = (nodes + 1 + 4 * most + 2 * paths + width) * dim + width + rows * ffn_dim
    columns = min(triton.next_power_of_2(dim), PART_COLUMNS)
    parts = -(-dim // columns)
    arguments: dict[str, Any] = {
        "hidden": hidden,
        "weights": weights,
        "valid": None if valid is None else valid.view(torch.int8),
        "active": None if active is None else active.view(torch.int8),
        "uniforms": uniforms,
        "flag": flag,
        "log_probs": hidden.new_empty(B, width, dtype=torch.float32),
        "choices": hidden.new_empty(B, dtype=torch.int64),
        "counters": counters,
        "scratch": hidden.new_empty(B * scratch_size, dtype=torch.float32),
        "exists": hidden.new_empty(B * (paths + width), dtype=torch.int8),
        "row_stride": stride(hidden, 0),
        "node_stride": stride(hidden, 1),
        "scratch_size": scratch_size,
        "parts": parts,
        "nodes": nodes,
        "paths": paths,
        "hidden_size": hidden_size,
        "width": width,
        "depth": depth,
        "dim": dim,
        "heads": num_heads,
        "ffn_dim": ffn_dim,
        "candidate": begins["candidate_mlp" if independent else "candidate_attention"],
        "temperature": float(temperature),
        "MLP_SCORE": mlp_score,
        "INDEPENDENT": independent,
        "INPUT_NORM": input_norm,
        "ROWS": rows,
        "COLUMNS": columns,
        "DIM": columns_of_tile,
        "WIDTH": triton.next_power_of_2(width),
        "HEADS": triton.next_power_of_2(num_heads),
        "HEAD_DIM": triton.next_power_of_2(dim // num_heads),
        "INPUTS": INPUTS,
    }
    for name in (
        "input_norm",
        "in_proj",
        "depth_embed",
        "cls",
        "path_encoder",
        "subtree_attention",
        "pool_query",
        "score",
    ):
        arguments[name] = begins.get(name, 0)
    # Neither pipelines nor more warps on a multiprocessor: both are paid with spilled registers.
    options = {"num_warps": 8, "num_stages": 1, "maxnreg": 248, "enable_fp_fusion": True}
    return Launch(route_kernel, B * parts, arguments, options)
