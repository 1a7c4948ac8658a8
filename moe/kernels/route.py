"""The gate: softmax, top-k, balance loss. Dimensions: T tokens, M model, E experts, K choices."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe.kernels.launch import launch


@triton.jit(do_not_specialize=["num_tokens"])
def _route(
    tokens,
    gate,
    bias,
    probs,
    ids,
    weights,
    sums,
    num_tokens,
    E: tl.constexpr,
    K: tl.constexpr,
    M: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
    CHOICES: tl.constexpr,
    WIDTH: tl.constexpr,
    BF16: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    block = tl.program_id(0)
    token = block.to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    real, expert = (token < num_tokens)[:, None], tl.arange(0, EXPERTS)[None, :]
    inside = real & (expert < E)
    logit = tl.zeros([TOKENS, EXPERTS], tl.float32)
    for start in range(0, M, WIDTH):
        column = start + tl.arange(0, WIDTH)
        x = tl.load(tokens + token[:, None] * M + column[None, :], mask=real & (column < M)[None, :], other=0.0)
        rest = tl.load(gate + expert * M + column[:, None], mask=(expert < E) & (column < M)[:, None], other=0.0)
        if BF16:
            for _ in tl.static_range(3):
                part = rest.to(tl.bfloat16)
                logit = tl.dot(x, part, logit)
                rest -= part.to(tl.float32)
        else:
            logit = tl.dot(x.to(tl.float32), rest, logit, input_precision="ieee")
    if HAS_BIAS:
        logit += tl.load(bias + expert, mask=expert < E, other=0.0)
    logit = tl.where(expert < E, logit, -float("inf"))
    e = tl.exp(logit - tl.max(logit, axis=1)[:, None])
    prob = e / tl.sum(e, axis=1)[:, None]
    tl.store(probs + token[:, None] * E + expert, prob, mask=inside)
    left = tl.where(expert < E, prob, -1.0)
    choice = tl.arange(0, CHOICES)[None, :]
    chosen = tl.zeros([TOKENS, CHOICES], tl.int64)
    chosen_prob = tl.zeros([TOKENS, CHOICES], tl.float32)
    count = tl.zeros([EXPERTS], tl.int32)
    first = tl.zeros([EXPERTS], tl.int32)
    for k in tl.static_range(K):
        best = tl.minimum(tl.argmax(left, axis=1), E - 1)[:, None]  # of NaNs, too, one that exists
        chosen = tl.where(choice == k, best.to(tl.int64), chosen)
        chosen_prob = tl.where(choice == k, tl.sum(tl.where(expert == best, prob, 0.0), axis=1)[:, None], chosen_prob)
        count += tl.sum((real & (expert == best)).to(tl.int32), axis=0)
        if k == 0:
            first = count
        left = tl.where(expert == best, -1.0, left)
    if K > 1:
        chosen_prob = chosen_prob / tl.maximum(tl.sum(chosen_prob, axis=1), 1.1920929e-07)[:, None]
    places = token[:, None] * K + choice
    tl.store(ids + places, chosen, mask=real & (choice < K))
    tl.store(weights + places, chosen_prob, mask=real & (choice < K))
    of_block = sums + block * (3 * E) + tl.arange(0, EXPERTS)
    column_inside = tl.arange(0, EXPERTS) < E
    tl.store(of_block, tl.sum(tl.where(inside, prob, 0.0), axis=0), mask=column_inside)
    tl.store(of_block + E, count.to(tl.float32), mask=column_inside)
    tl.store(of_block + 2 * E, first.to(tl.float32), mask=column_inside)


@triton.jit(do_not_specialize=["num_tokens", "num_blocks"])
def _balance(
    sums,
    penalty,
    counts_E,
    shares_E,
    aux_loss,
    num_tokens,
    num_blocks,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCKS: tl.constexpr,
    EXPERTS: tl.constexpr,
    HAS_PENALTY: tl.constexpr,
):
    expert = tl.arange(0, EXPERTS)
    prob = tl.zeros([EXPERTS], tl.float32)
    count = tl.zeros([EXPERTS], tl.int32)
    first = tl.zeros([EXPERTS], tl.int32)
    for start in range(0, num_blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        place = sums + block[:, None] * (3 * E) + expert[None, :]
        inside = (block < num_blocks)[:, None] & (expert < E)[None, :]
        prob += tl.sum(tl.load(place, mask=inside, other=0.0), axis=0)
        count += tl.sum(tl.load(place + E, mask=inside, other=0.0).to(tl.int32), axis=0)
        first += tl.sum(tl.load(place + 2 * E, mask=inside, other=0.0).to(tl.int32), axis=0)
    if K <= 2:
        share = first.to(tl.float32) / num_tokens
    else:
        share = count.to(tl.float32) / (num_tokens * K)
    if HAS_PENALTY:
        share *= tl.load(penalty + expert, mask=expert < E, other=0.0)
    tl.store(counts_E + expert, count.to(tl.int64), mask=expert < E)
    tl.store(shares_E + expert, share, mask=expert < E)
    tl.store(aux_loss, E * tl.sum(share * (prob / num_tokens), axis=0))


def route(
    x_TM: Tensor, gate_EM: Tensor, top_k: int, bias_E: Tensor | None = None, penalty_E: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Logits, softmax, the K largest (of equals the first), their weights (the probability for K = 1, else normalised),
    and the balance loss of `moe.gate.balance_loss`.

    In bfloat16 the tokens are exact and the gate's matrix is cut into three bfloat16 ones, whose sum is the float32 one
    to its last bit or two: tensor cores then give float32 logits.

    Args:
        x_TM: [T, M], T > 0.
        gate_EM: [E, M] float32.
        top_k: K.
        bias_E: [E] float32, added to the logits; None for none.
        penalty_E: [E] float32, factors of the balance loss; None for ones.

    Returns:
        probs [T, E] float32, ids [T, K] int64, weights [T, K] float32, counts [E] int64 of the choices, the balance
        loss (scalar float32), and the shares [E] float32 that it weighs the mean probabilities with.
    """
    (num_tokens, model_dim), num_experts, device = x_TM.shape, len(gate_EM), x_TM.device
    experts, choices = max(16, triton.next_power_of_2(num_experts)), triton.next_power_of_2(top_k)
    tokens, width = (64, 64) if experts <= 64 else (32, 32)
    num_blocks = triton.cdiv(num_tokens, tokens)
    probs = torch.empty(num_tokens, num_experts, device=device)
    ids = torch.empty(num_tokens, top_k, dtype=torch.int64, device=device)
    weights = torch.empty(num_tokens, top_k, device=device)
    sums = torch.empty(num_blocks, 3, num_experts, device=device)
    # Interpreted, a product of bfloat16 would multiply bit patterns.
    on_tensor_cores = x_TM.is_cuda and x_TM.dtype == torch.bfloat16
    launch(
        _route,
        (num_blocks,),
        (x_TM, gate_EM, gate_EM if bias_E is None else bias_E, probs, ids, weights, sums),
        (num_tokens,),
        (num_experts, top_k, model_dim, tokens, experts, choices, width, on_tensor_cores, bias_E is not None),
        num_warps=4 if experts <= 64 else 8,
    )
    counts_E = torch.empty(num_experts, dtype=torch.int64, device=device)
    shares_E, aux_loss = torch.empty(num_experts, device=device), torch.empty((), device=device)
    launch(
        _balance,
        (1,),
        (sums, sums if penalty_E is None else penalty_E, counts_E, shares_E, aux_loss),
        (num_tokens, num_blocks),
        (num_experts, top_k, max(4, 8192 // experts), experts, penalty_E is not None),
        num_warps=8,
    )
    return probs, ids, weights, counts_E, aux_loss, shares_E


@triton.jit(do_not_specialize=["aux_scale"])
def _route_backward(
    probs,
    ids,
    grad_weights,
    grad_probs,
    grad_aux,
    shares,
    grad_logits,
    aux_scale,
    HAS_PROBS: tl.constexpr,
    HAS_AUX: tl.constexpr,
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
    if HAS_AUX:
        grad += tl.load(grad_aux) * aux_scale * tl.load(shares + expert, mask=inside, other=0.0)
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
    probs_TE: Tensor,
    ids_TK: Tensor,
    shares_E: Tensor,
    grad_weights_TK: Tensor,
    grad_probs_TE: Tensor | None,
    grad_aux: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Gradient of the logits.

    Args:
        probs_TE, ids_TK, shares_E: of `route`.
        grad_weights_TK: [T, K] float32, gradient of its weights.
        grad_probs_TE: [T, E] float32, gradient of its probabilities, or None.
        grad_aux: scalar float32, gradient of the balance loss, or None.
        dtype: of the result.

    Returns:
        [T, E] float32, or [T, 2 * E] bfloat16: the rounded gradient and what rounding left, rounded.
    """
    num_tokens, num_experts = probs_TE.shape
    parts = 2 if dtype == torch.bfloat16 else 1
    grad_logits = torch.empty(num_tokens, parts * num_experts, dtype=dtype, device=probs_TE.device)
    launch(
        _route_backward,
        (num_tokens,),
        (
            probs_TE,
            ids_TK,
            grad_weights_TK.contiguous(),
            probs_TE if grad_probs_TE is None else grad_probs_TE.contiguous(),
            shares_E if grad_aux is None else grad_aux,
            shares_E,
            grad_logits,
        ),
        (num_experts / num_tokens,),
        (
            grad_probs_TE is not None,
            grad_aux is not None,
            parts,
            num_experts,
            ids_TK.shape[1],
            triton.next_power_of_2(num_experts),
        ),
        num_warps=1,
    )
    return grad_logits
