"""Attention with a learned bias in windows, without a matrix of all windows' weights in memory.

    out = softmax(q k^T / sqrt(c) + bias) v            S = q k^T / sqrt(c) + bias,  P = softmax(S),  dP = dO v^T
    dS = P (dP - sum(P dP)),   dv = P^T dO,   dq = dS k / sqrt(c),   dk = dS^T q / sqrt(c),   dbias = sum of dS

CUDA has a kernel for both passes. On a CPU torch has one that takes a bias but gives it no gradient, and where one is
wanted falls to a kernel that writes and keeps matrices for all windows. Here that first kernel always runs forwards,
and backwards the matrices of a few windows at a time are computed again, which stay in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from re2tal.reversible.fake import is_counted

Run = tuple[int, Tensor | None]
"""How many windows, one behind the other, and their mask: (tokens, tokens) bool, True where attention is not allowed;
None allows all of it."""

# Added to the logits of token pairs that are not neighbours; in float32, exp(-100) vanishes beside any other weight.
MASKED_LOGIT = -100

# Those that take a bias that wants a gradient. Left to itself torch may choose another one where no gradient is wanted,
# and a rebuilt activation would not be the same bits as the forgotten one.
ATTENTION_KERNELS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

# Of the weights of a group, of which there are two at once. Measured with 392 tokens, on one and two threads: twice as
# much leaves the caches, with half as much threads wait for each other.
GROUP_BYTES = 5 * 2**19


def attend(qkv: Tensor, bias: Tensor, runs: Sequence[Run]) -> Tensor:
    """Attention inside each window: (windows, tokens, 3 * C), queries, keys, values -> (windows, tokens, C).

    `bias` is (heads, tokens, tokens), the same for all windows; `runs` are their masks, and cover them in order. A
    window's result does not depend on how many there are. On a CPU a second derivative is a RuntimeError.
    """
    bias = bias.to(qkv.dtype)  # as autocast does where it casts what attention gets
    if qkv.device.type == "cpu":
        return _BiasedAttention.apply(qkv, bias, runs)
    return _attend_by(ATTENTION_KERNELS, qkv, bias, runs)


def _attend_by(kernels: list[SDPBackend], qkv: Tensor, bias: Tensor, runs: Sequence[Run]) -> Tensor:
    """One call of a kernel of torch for each run."""
    attended = []
    for part, (_, mask) in zip(qkv.split([num for num, _ in runs]), runs, strict=True):
        q, k, v = part.unflatten(-1, (3, len(bias), -1)).permute(2, 0, 3, 1, 4)
        with sdpa_kernel(kernels):
            heads = F.scaled_dot_product_attention(q, k, v, attn_mask=_masked(bias, mask)[None])
        attended.append(heads.transpose(1, 2).flatten(2))
    return attended[0] if len(attended) == 1 else torch.cat(attended)


def _masked(bias: Tensor, mask: Tensor | None) -> Tensor:
    return bias if mask is None else torch.add(bias, mask, alpha=MASKED_LOGIT)


class _BiasedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor, runs: Sequence[Run]) -> Tensor:
        ctx.save_for_backward(qkv, bias)
        ctx.runs = runs
        return _attend_by([SDPBackend.FLASH_ATTENTION], qkv.detach(), bias.detach(), runs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "attention with a learned bias can be differentiated only once on a CPU; leave out create_graph=True"
            )
        qkv, bias = ctx.saved_tensors
        wants_qkv, wants_bias, _ = ctx.needs_input_grad
        with torch.autocast("cpu", enabled=False):
            return *_gradients(qkv, bias, ctx.runs, gradient, wants_qkv=wants_qkv, wants_bias=wants_bias), None


def _gradients(
    qkv: Tensor, bias: Tensor, runs: Sequence[Run], gradient: Tensor, *, wants_qkv: bool, wants_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Of `qkv`, in its own layout, and of `bias`, computed in float32 or more."""
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    num_heads, num_tokens, _ = bias.shape
    size = max(1, GROUP_BYTES // (num_tokens**2 * dtype.itemsize))
    size = min(size, max(num for num, _ in runs))
    qkv_heads = qkv.unflatten(-1, (3, num_heads, -1))
    d_qkv = torch.empty_like(qkv) if wants_qkv else None
    d_bias = torch.zeros_like(bias, dtype=dtype) if wants_bias else None
    d_heads = None if d_qkv is None else d_qkv.unflatten(-1, (3, num_heads, -1))
    d_out = gradient.unflatten(-1, (num_heads, -1))
    buffers = qkv.new_empty(2, size, num_tokens, num_tokens, dtype=dtype)
    narrow = qkv.new_empty(size, num_tokens, qkv_heads.shape[-1], dtype=dtype)
    heads, groups = range(num_heads), list(_groups(runs, size))
    if is_counted(qkv):
        heads, groups = heads[:1], _largest(groups)
    for head in heads:
        for span, mask in groups:
            d_logits = _gradients_of_group(
                qkv_heads[span, :, :, head],
                d_out[span, :, head],
                _masked(bias[head].to(dtype), mask),
                None if d_heads is None else d_heads[span, :, :, head],
                buffers=buffers,
                narrow=narrow,
            )
            if d_bias is not None:
                d_bias[head] += d_logits.sum(0)
    return d_qkv, None if d_bias is None else d_bias.to(bias.dtype)


def _gradients_of_group(
    qkv: Tensor, d_out: Tensor, logits: Tensor, d_qkv: Tensor | None, *, buffers: Tensor, narrow: Tensor
) -> Tensor:
    """Of one head: `qkv` (windows, tokens, 3, C), whose gradient goes to `d_qkv`; returned is that of the logits."""
    dtype, scale = logits.dtype, qkv.shape[-1] ** -0.5
    q, k, v = qkv.to(dtype).unbind(2)
    o = d_out.to(dtype)
    scores, weights = buffers[:, : len(q)]
    torch.baddbmm(logits.expand_as(scores), q, k.mT, alpha=scale, out=scores)
    torch.softmax(scores, -1, out=weights)
    torch.bmm(o, v.mT, out=scores)
    # In place: of a row it writes nothing before it has read all of it.
    torch.ops.aten._softmax_backward_data.out(scores, weights, -1, dtype, grad_input=scores)
    if d_qkv is not None:
        found = narrow[: len(q)]
        dq, dk, dv = d_qkv.unbind(2)
        dq.copy_(torch.baddbmm(found, scores, k, beta=0, alpha=scale, out=found))
        dk.copy_(torch.baddbmm(found, scores.mT, q, beta=0, alpha=scale, out=found))
        dv.copy_(torch.bmm(weights.mT, o, out=found))
    return scores


def _groups(runs: Sequence[Run], size: int) -> Iterator[tuple[slice, Tensor | None]]:
    """`size` windows at a time, and what is left of a run, with their mask."""
    start = 0
    for num, mask in runs:
        for first in range(start, start + num, size):
            yield slice(first, min(first + size, start + num)), mask
        start += num


def _largest(groups: Sequence[tuple[slice, Tensor | None]]) -> list[tuple[slice, Tensor | None]]:
    """One with a mask and one without, as far as there are: no other takes more memory."""
    by_size = sorted(groups, key=lambda group: group[0].stop - group[0].start)
    return list({group[1] is None: group for group in by_size}.values())
