"""Causal attention on a CPU, for learning in bf16: what PyTorch's kernel computes, forward and
backward in half to three quarters of its time.

A few queries at a time meet the keys that they may see, as ordinary products:

              keys, oldest first
    queries   # # # . . .             each row of blocks is one product of QUERIES positions, of all
              # # # # . .             heads that share keys at once; within the last block of a row
              # # # # # .             later keys are masked

PyTorch's own kernel is the faster one without a backward pass, in fp32, on CPUs without bf16, and
with many keys. It keeps scores in fp32; here they are rounded to bf16, like all activations, which
shows where they are large: SmolLM2's gradients are 6% off those of fp32 either way. (Taking the
keys' mean off before, which changes no probability, makes it 9%.) Left out: dropout, other masks.
"""
import math

import torch

QUERIES = 128                                       # that AttentionByParts takes at a time
MOST_KEYS = 2048                                    # beyond, PyTorch's kernel is as fast


def cpu_has_bf16() -> bool:
    """Does this CPU multiply bfloat16 at full speed?"""
    has = torch.cpu.get_capabilities()
    return bool(has.get("amx_bf16") or has.get("avx512_bf16"))


def by_parts_pays(q, k) -> bool:
    """Is AttentionByParts faster than PyTorch's kernel?"""
    learning = q.requires_grad or k.requires_grad
    return learning and q.shape[2] > 1 and k.shape[2] <= MOST_KEYS \
        and k.dtype == torch.bfloat16 and k.device.type == "cpu" and cpu_has_bf16()


class AttentionByParts(torch.autograd.Function):
    """Attention of the last T positions, q (B, heads, T, head_dim), on k and v (B, n_kv_head, past
    + T, head_dim): (B, heads, T, head_dim). The probabilities are computed again in the backward
    pass."""

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        y = torch.empty_like(q)
        for part, seen, _, p in parts_of_attention(q, k):
            into_part(y, part, p @ v[:, :, :seen])
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        q, k, v = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for part, seen, queries, p in parts_of_attention(q, k):
            slope = by_keys(dy[:, :, part], k.shape[1])
            dv[:, :, :seen] += p.transpose(2, 3) @ slope
            dp = slope @ v[:, :, :seen].transpose(2, 3)
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)   # autograd's own
            into_part(dq, part, ds @ k[:, :, :seen] * q.shape[3] ** -0.5)
            dk[:, :, :seen] += ds.transpose(2, 3) @ queries
        return dq, dk, dv


def parts_of_attention(q, k):
    """Yields (part, how many keys it may see, its queries, divided by sqrt(head_dim), their
    probabilities) of QUERIES positions each; queries and probabilities (B, n_kv_head, those of all
    heads with the same keys, ...)."""
    T, past = q.shape[2], k.shape[2] - q.shape[2]
    later = torch.ones(QUERIES, QUERIES, dtype=torch.bool, device=q.device).triu(1)
    for start in range(0, T, QUERIES):
        part = slice(start, min(start + QUERIES, T))
        n, seen = part.stop - start, past + part.stop
        queries = by_keys(q[:, :, part], k.shape[1]) * q.shape[3] ** -0.5
        scores = queries @ k[:, :, :seen].transpose(2, 3)
        scores.unflatten(2, (-1, n))[..., seen - n:].masked_fill_(later[:n, :n], -math.inf)
        yield part, seen, queries, scores.softmax(-1)


def by_keys(t, kv_heads: int):
    """(B, heads, n, head_dim) -> (B, n_kv_head, heads a key head * n, head_dim)."""
    return t.unflatten(1, (kv_heads, -1)).flatten(2, 3)


def into_part(t, part: slice, values) -> None:
    """Writes values, which lie as by_keys leaves them, into t (B, heads, T, head_dim)."""
    t[:, :, part] = values.unflatten(2, (-1, part.stop - part.start)).flatten(1, 2)
