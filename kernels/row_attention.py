"""Attention in bfloat16, without gradients, as two matrix products with a softmax between them.

On a CPU torch's fused attention converts every tile to float32 and back. Two products and a softmax are
faster, if the scores stay in the cache and their memory is reused for each block of rows; how much faster
depends on the processor (BENCH.md; `python -m lab.bench --only unet vae --dtype bfloat16`). On a GPU the
fused kernels stop at 256 channels a head, and the VAE has 512: there all rows are one block.
"""

import torch
from torch import Tensor

ROWS = 256  # of the scores at a time on a CPU


def row_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for every head: `(B, N, n, d), (B, M, n, d), (B, M, n, d) -> (B, N, n, d)`.

    The scores are rounded to the inputs' type, as those of any product are. Not differentiable.
    """
    (B, N, n, d), M = q.shape, k.shape[1]
    rows = min(N, ROWS) if q.device.type == "cpu" else N
    y, buffer = torch.empty_like(q), q.new_empty(B * n, rows, M)
    q, k, v = (x.transpose(1, 2).reshape(B * n, -1, d).contiguous() for x in (q, k, v))  # else copied per row
    for top in range(0, N, rows):
        part = q[:, top : top + rows]
        scores = buffer[:, : part.shape[1]]
        torch.baddbmm(scores, part, k.mT, beta=0, alpha=d**-0.5, out=scores)
        torch.softmax(scores, dim=-1, out=scores)
        y[:, top : top + rows] = torch.bmm(scores, v).view(B, n, -1, d).transpose(1, 2)
    return y
