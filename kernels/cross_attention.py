"""Attention from N queries to M keys, where an image may own fewer than M: the plain-torch reference."""

import torch
import torch.nn.functional as F
from torch import Tensor


def reference(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for every head: `(B, N, n, d), (B, M, n, d), (B, M, n, d) -> (B, N, n, d)`.

    `lengths (B,)` says how many of the M keys of each image are real (1..M); the rest are masked. None builds
    no mask, which leaves torch free to take its fastest path.
    """
    mask = None
    if lengths is not None:
        mask = torch.arange(k.shape[1], device=k.device) < lengths[:, None]  # (B, M)
        mask = mask[:, None, None, :]  # (B, 1, 1, M): the same for every head and query
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, n, N or M, d)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
