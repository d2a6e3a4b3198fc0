"""The one place that chooses how attention is computed: the plain-torch reference, on every device."""

from torch import Tensor

from .cross_attention import attention_maps, reference

__all__ = ["attention", "attention_maps"]


def attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for every head: `(B, N, n, d), (B, M, n, d), (B, M, n, d) -> (B, N, n, d)`.

    `lengths (B,)` says how many of the M keys of each image are real (1..M); None means all of them.
    """
    return reference(q, k, v, lengths)
