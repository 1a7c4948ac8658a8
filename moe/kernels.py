"""Triton kernels of the native layer on a GPU: what `moe.ops`, `moe.gate` and `moe.experts` do there in one pass.

Each program has a token, a row or a block of its own, computes in float32, and writes every element of its outputs
once: no atomics, so two runs agree bit for bit. They run under TRITON_INTERPRET=1 on a CPU too, where tests hold them
against the torch path.

Dimensions: T tokens, K choices, S copies, R rows, M model, H hidden, E experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def _warps(block: int) -> int:
    """Warps of a program that holds a row of `block` elements: 16 elements a thread, more beyond 8192."""
    return max(1, min(16, block // 512))


@triton.jit
def _gather_rows(rows, index, out, DIVISOR: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr):
    target = tl.program_id(0).to(tl.int64)
    source = tl.load(index + target) // DIVISOR
    columns = tl.arange(0, BLOCK)
    inside = columns < M
    tl.store(out + target * M + columns, tl.load(rows + source * M + columns, mask=inside), mask=inside)


def gather_rows(rows: Tensor, index: Tensor, divisor: int = 1) -> Tensor:
    """As `moe.ops.gather_rows`."""
    out = rows.new_empty(len(index), rows.shape[1])
    if len(index):
        block = triton.next_power_of_2(rows.shape[1])
        _gather_rows[(len(index),)](rows, index, out, divisor, rows.shape[1], block, num_warps=_warps(block))
    return out


@triton.jit
def _sum_copies(
    copies,
    inverse,
    weights,
    out,
    num_copies,
    K: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < M
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(K):
        source = tl.load(inverse + token * K + k)
        row = tl.load(copies + source * M + columns, mask=inside & (source < num_copies), other=0.0).to(tl.float32)
        if WEIGHTED:
            row *= tl.load(weights + token * K + k).to(tl.float32)
        total += row
    tl.store(out + token * M + columns, total.to(out.dtype.element_ty), mask=inside)


def sum_copies(copies_SM: Tensor, inverse_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    """As `moe.ops.sum_copies`, summed in float32."""
    num_tokens, top_k = inverse_TK.shape
    model_dim = copies_SM.shape[1]
    out = copies_SM.new_empty(num_tokens, model_dim)
    block = triton.next_power_of_2(model_dim)
    weighted = weights_TK is not None
    _sum_copies[(num_tokens,)](
        copies_SM,
        inverse_TK,
        weights_TK if weighted else copies_SM,
        out,
        len(copies_SM),
        top_k,
        model_dim,
        block,
        weighted,
        num_warps=_warps(block),
    )
    return out


@triton.jit
def _weight_copies(
    grad,
    copies,
    inverse,
    weights,
    grad_copies,
    grad_weights,
    num_copies,
    K: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < M
    grad_row = tl.load(grad + token * M + columns, mask=inside, other=0.0).to(tl.float32)
    for k in tl.static_range(K):
        place = tl.load(inverse + token * K + k)
        kept = inside & (place < num_copies)
        copy = tl.load(copies + place * M + columns, mask=kept, other=0.0).to(tl.float32)
        weight = tl.load(weights + token * K + k).to(tl.float32)
        tl.store(grad_weights + token * K + k, tl.sum(grad_row * copy, axis=0))
        tl.store(grad_copies + place * M + columns, (grad_row * weight).to(grad_copies.dtype.element_ty), mask=kept)


def weighted_sum_backward(
    grad_TM: Tensor, copies_SM: Tensor, inverse_TK: Tensor, weights_TK: Tensor
) -> tuple[Tensor, Tensor]:
    """As `moe.ops.weighted_sum_backward`, in one pass; the gradient of the weights is float32."""
    num_tokens, top_k = inverse_TK.shape
    model_dim = copies_SM.shape[1]
    grad_copies = torch.empty_like(copies_SM)
    grad_weights = torch.empty(num_tokens, top_k, device=grad_TM.device)
    block = triton.next_power_of_2(model_dim)
    _weight_copies[(num_tokens,)](
        grad_TM,
        copies_SM,
        inverse_TK,
        weights_TK,
        grad_copies,
        grad_weights,
        len(copies_SM),
        top_k,
        model_dim,
        block,
        num_warps=_warps(block),
    )
    return grad_copies, grad_weights


@triton.jit
def _count_choices(chosen, counts, num_copies, E: tl.constexpr, BLOCK: tl.constexpr, EXPERTS: tl.constexpr):
    block = tl.program_id(0)
    copy = block * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(chosen + copy, mask=copy < num_copies, other=E)
    ids = tl.arange(0, EXPERTS)
    mine = (expert[:, None] == ids[None, :]).to(tl.int32)
    tl.store(counts + block * E + ids, tl.sum(mine, axis=0), mask=ids < E)


@triton.jit
def _place_copies(
    chosen,
    starts,
    order,
    inverse,
    num_copies,
    num_kept,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    block = tl.program_id(0)
    copy = block * BLOCK + tl.arange(0, BLOCK)
    inside = copy < num_copies
    expert = tl.load(chosen + copy, mask=inside, other=E)
    ids = tl.arange(0, EXPERTS)
    mine = (expert[:, None] == ids[None, :]).to(tl.int32)
    before = tl.cumsum(mine, axis=0) - mine  # of the same expert, in this block, before this copy
    start = tl.load(starts + block * E + ids, mask=ids < E, other=0)
    place = tl.sum(mine * (before + start[None, :]), axis=1).to(tl.int64)
    kept = inside & (expert < E)
    tl.store(order + place, copy.to(tl.int64), mask=kept)
    tl.store(inverse + copy, tl.where(kept, place, num_kept), mask=inside)


def _counting(num_experts: int) -> tuple[int, int]:
    """Padded experts, and copies of one program: together a table of 16384 ones and zeros."""
    experts = max(16, triton.next_power_of_2(num_experts))
    return experts, max(16, 16384 // experts)


def count_choices(chosen_S: Tensor, num_experts: int) -> Tensor:
    """As `moe.ops.count_choices`, of int64 [S]."""
    experts, block = _counting(num_experts)
    num_blocks = triton.cdiv(len(chosen_S), block)
    counts = torch.empty(num_blocks, num_experts, dtype=torch.int32, device=chosen_S.device)
    if num_blocks:
        _count_choices[(num_blocks,)](chosen_S, counts, len(chosen_S), num_experts, block, experts)
    return counts.sum(0)  # int64


def sort_by_expert(chosen_S: Tensor, num_experts: int, num_kept: int) -> tuple[Tensor, Tensor]:
    """As `moe.ops.sort_by_expert`, by counting, for at most 1024 experts."""
    experts, block = _counting(num_experts)
    num_copies = len(chosen_S)
    num_blocks = triton.cdiv(num_copies, block)
    counts = torch.empty(num_blocks, num_experts, dtype=torch.int32, device=chosen_S.device)
    order = torch.empty(num_kept, dtype=torch.int64, device=chosen_S.device)
    inverse = torch.empty_like(chosen_S)
    if num_copies:
        _count_choices[(num_blocks,)](chosen_S, counts, num_copies, num_experts, block, experts)
        # Expert-major: all of expert 0 from block 0, from block 1, ...; then expert 1.
        running = counts.t().contiguous().view(-1).cumsum(0, dtype=torch.int32).view(num_experts, num_blocks).t()
        starts = (running - counts).contiguous()
        _place_copies[(num_blocks,)](
            chosen_S, starts, order, inverse, num_copies, num_kept, num_experts, block, experts
        )
    return order, inverse


@triton.jit
def _gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _activate(hidden, out, num_elements, H: tl.constexpr, SWIGLU: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < num_elements
    if SWIGLU:
        left = place // H * (2 * H) + place % H
        a = tl.load(hidden + left, mask=inside).to(tl.float32)
        b = tl.load(hidden + left + H, mask=inside).to(tl.float32)
        value = a * tl.sigmoid(a) * b
    else:
        value = _gelu(tl.load(hidden + place, mask=inside).to(tl.float32))
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _activate_backward(hidden, grad, num_elements, H: tl.constexpr, SWIGLU: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < num_elements
    g = tl.load(grad + place, mask=inside).to(tl.float32)
    kind = grad.dtype.element_ty
    if SWIGLU:
        left = place // H * (2 * H) + place % H
        a = tl.load(hidden + left, mask=inside).to(tl.float32)
        b = tl.load(hidden + left + H, mask=inside).to(tl.float32)
        s = tl.sigmoid(a)
        tl.store(hidden + left, (g * b * s * (1.0 + a * (1.0 - s))).to(kind), mask=inside)
        tl.store(hidden + left + H, (g * a * s).to(kind), mask=inside)
        tl.store(grad + place, (a * s * b).to(kind), mask=inside)
    else:
        x = tl.load(hidden + place, mask=inside).to(tl.float32)
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        density = tl.exp(-0.5 * x * x) * 0.3989422804014327
        tl.store(hidden + place, (g * (cdf + x * density)).to(kind), mask=inside)
        tl.store(grad + place, (x * cdf).to(kind), mask=inside)


ACTIVATION_BLOCK = 2048


def activate(hidden: Tensor, swiglu: bool) -> Tensor:
    """gelu(h), or silu(a) * b of h = [a, b].

    Args:
        hidden: [R, H], or [R, 2 H] with `swiglu`.
        swiglu: which.

    Returns:
        [R, H].
    """
    width = hidden.shape[1] // 2 if swiglu else hidden.shape[1]
    out = hidden.new_empty(len(hidden), width)
    if out.numel():
        grid = (triton.cdiv(out.numel(), ACTIVATION_BLOCK),)
        _activate[grid](hidden, out, out.numel(), width, swiglu, ACTIVATION_BLOCK)
    return out


def activate_backward_(hidden: Tensor, grad: Tensor, swiglu: bool) -> None:
    """In place: `hidden` becomes its gradient, and `grad`, the gradient of the activation, becomes the activation."""
    if grad.numel():
        grid = (triton.cdiv(grad.numel(), ACTIVATION_BLOCK),)
        _activate_backward[grid](hidden, grad, grad.numel(), grad.shape[1], swiglu, ACTIVATION_BLOCK)


@triton.jit
def _split(matrix, parts, num_elements, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < num_elements
    rest = tl.load(matrix + place, mask=inside).to(tl.float32)
    for part in tl.static_range(3):
        rounded = rest.to(tl.bfloat16)
        tl.store(parts + part * num_elements + place, rounded, mask=inside)
        rest -= rounded.to(tl.float32)


def split_bf16(matrix: Tensor) -> Tensor:
    """Three bfloat16 matrices whose sum is a float32 one to its last bit or two.

    Args:
        matrix: [E, M] float32.

    Returns:
        [3 * E, M] bfloat16: the rounded matrix, what rounding left, rounded, and what that left.
    """
    parts = torch.empty(3 * matrix.shape[0], matrix.shape[1], dtype=torch.bfloat16, device=matrix.device)
    _split[(triton.cdiv(matrix.numel(), 1024),)](matrix.contiguous(), parts, matrix.numel(), 1024)
    return parts


@triton.jit
def _route(
    logits,
    probs,
    ids,
    weights,
    PARTS: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    EXPERTS: tl.constexpr,
    CHOICES: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, EXPERTS)
    inside = expert < E
    logit = tl.load(logits + token * PARTS * E + expert, mask=inside, other=-float("inf"))
    for part in tl.static_range(1, PARTS):
        logit += tl.load(logits + (token * PARTS + part) * E + expert, mask=inside, other=0.0)
    e = tl.exp(logit - tl.max(logit, axis=0))
    prob = e / tl.sum(e, axis=0)
    tl.store(probs + token * E + expert, prob, mask=inside)
    left = tl.where(inside, prob, -1.0)
    choice = tl.arange(0, CHOICES)
    chosen = tl.zeros([CHOICES], tl.int64)
    chosen_prob = tl.zeros([CHOICES], tl.float32)
    for k in tl.static_range(K):
        best = tl.argmax(left, axis=0)
        chosen = tl.where(choice == k, best.to(tl.int64), chosen)
        chosen_prob = tl.where(choice == k, tl.max(left, axis=0), chosen_prob)
        left = tl.where(expert == best, -1.0, left)
    if K > 1:
        chosen_prob = chosen_prob / tl.maximum(tl.sum(chosen_prob, axis=0), 1.1920929e-07)
    tl.store(ids + token * K + choice, chosen, mask=choice < K)
    tl.store(weights + token * K + choice, chosen_prob, mask=choice < K)


def route(logits: Tensor, num_experts: int, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax, the K largest (of equals the first), and their weights: the probability for K = 1, else normalised.

    Args:
        logits: [T, parts * E] float32; the parts are added first.
        num_experts: E.
        top_k: K.

    Returns:
        probs [T, E] float32, ids [T, K] int64, weights [T, K] float32.
    """
    num_tokens, parts = len(logits), logits.shape[1] // num_experts
    probs = torch.empty(num_tokens, num_experts, device=logits.device)
    ids = torch.empty(num_tokens, top_k, dtype=torch.int64, device=logits.device)
    weights = torch.empty(num_tokens, top_k, device=logits.device)
    experts, choices = triton.next_power_of_2(num_experts), triton.next_power_of_2(top_k)
    _route[(num_tokens,)](logits, probs, ids, weights, parts, num_experts, top_k, experts, choices, num_warps=1)
    return probs, ids, weights


@triton.jit
def _route_backward(
    probs,
    ids,
    grad_weights,
    grad_probs,
    grad_logits,
    HAS_PROBS: tl.constexpr,
    PARTS: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, EXPERTS)
    inside = expert < E
    prob = tl.load(probs + token * E + expert, mask=inside, other=0.0)
    total = 0.0
    along = 0.0
    for k in tl.static_range(K):
        p = tl.load(probs + token * E + tl.load(ids + token * K + k))
        total += p
        along += p * tl.load(grad_weights + token * K + k)
    total = tl.maximum(total, 1.1920929e-07)
    grad = tl.zeros([EXPERTS], tl.float32)
    if HAS_PROBS:
        grad += tl.load(grad_probs + token * E + expert, mask=inside, other=0.0)
    for k in tl.static_range(K):
        g = tl.load(grad_weights + token * K + k)
        if K > 1:
            g = (g - along / total) / total
        grad += tl.where(expert == tl.load(ids + token * K + k), g, 0.0)
    rest = prob * (grad - tl.sum(prob * grad, axis=0))
    for part in tl.static_range(PARTS):
        rounded = rest.to(grad_logits.dtype.element_ty)
        tl.store(grad_logits + (token * PARTS + part) * E + expert, rounded, mask=inside)
        rest -= rounded.to(tl.float32)


def route_backward(
    probs_TE: Tensor, ids_TK: Tensor, grad_weights_TK: Tensor, grad_probs_TE: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Gradient of the logits.

    Args:
        probs_TE, ids_TK: of `route`.
        grad_weights_TK: [T, K] float32, gradient of its weights.
        grad_probs_TE: [T, E] float32, gradient of its probabilities, or None.
        dtype: of the result.

    Returns:
        [T, E] float32, or [T, 2 * E] bfloat16: the rounded gradient and what rounding left, rounded.
    """
    num_tokens, num_experts = probs_TE.shape
    parts = 2 if dtype == torch.bfloat16 else 1
    grad_logits = torch.empty(num_tokens, parts * num_experts, dtype=dtype, device=probs_TE.device)
    _route_backward[(num_tokens,)](
        probs_TE,
        ids_TK,
        grad_weights_TK.contiguous(),
        probs_TE if grad_probs_TE is None else grad_probs_TE.contiguous(),
        grad_logits,
        grad_probs_TE is not None,
        parts,
        num_experts,
        ids_TK.shape[1],
        triton.next_power_of_2(num_experts),
        num_warps=1,
    )
    return grad_logits
