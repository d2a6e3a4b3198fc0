"""What the kernels compute, in plain torch: it runs everywhere, and each kernel is tested against it."""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = 255  # the label of a pixel without a class
RESIDENT = 160  # keys that cross_attention holds at once; WINS chooses it only for contexts up to this length


def attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for every head: `(B, N, n, d), (B, M, n, d), (B, M, n, d) -> (B, N, n, d)`.

    `lengths (B,)`: how many of the M keys of each image are real (1..M); the rest are masked. None builds no
    mask, so that torch can take its fastest path.
    """
    mask = None if lengths is None else real(k, lengths)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, n, N or M, d)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def attention_maps(q: Tensor, k: Tensor, lengths: Tensor | None = None) -> Tensor:
    """What each query attends to: the softmax of `attention`, averaged over the heads; `(B, N, M)` float32.

    q `(B, N, n, d)`, k `(B, M, n, d)`, lengths `(B,)`. Each row sums to 1; keys that are not real have 0. The
    scores of all heads are in memory at once: only figures and VPD's maps need them.
    """
    with torch.autocast(q.device.type, enabled=False):  # which would round the scores
        scores = torch.einsum("BNnd,BMnd->BnNM", q.float(), k.float()) * q.shape[-1] ** -0.5
    if lengths is not None:
        scores = scores.masked_fill(~real(k, lengths), -torch.inf)
    return scores.softmax(dim=-1).mean(dim=1)


def real(k: Tensor, lengths: Tensor) -> Tensor:
    """True for the real keys of each image, `(B, 1, 1, M)`: the same for every head and query."""
    mask = torch.arange(k.shape[1], device=k.device) < lengths[:, None]  # (B, M)
    return mask[:, None, None, :]


def group_norm(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool, shift: Tensor | None = None
) -> Tensor:
    """group_norm(x + shift), and SiLU of it: `(B, C, H, W)` -> `(B, C, H, W)`.

    shift `(B, C)` is added in place. Under autocast the result is float32, as torch's norms are.
    """
    if shift is not None:
        x = x.add_(shift[:, :, None, None])
    y = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(y, inplace=True) if silu else y


def add_group_norm(
    x: Tensor, residual: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """x + residual, of maps `(B, C, H, W)`, and its `group_norm`; not in place: a checkpoint may hold x."""
    x = x + residual
    return x, group_norm(x, groups, weight, bias, eps, silu=False)


def upsample_cross_entropy(logits: Tensor, labels: Tensor, ignore: int) -> tuple[Tensor, Tensor]:
    """Cross-entropy of logits `(B, K, h, w)`, upsampled to labels `(B, H, W)`: float32 sum, int64 count.

    Pixels labelled `ignore` count in neither; if all are, the sum is 0 and its gradients are zeros. The
    upsampled logits are the largest tensor of training, 157 MB per 512x512 image of 150 classes: their
    log-softmax is kept until the backward pass, which holds three of that size at its peak.
    """
    assert labels.dtype == torch.int64 and labels.ndim == 3 and len(labels) == len(logits), (
        f"the labels are {labels.dtype} {tuple(labels.shape)}: "
        f"give one int64 map per image, ({len(logits)}, H, W)"
    )
    upsampled = upsample(logits, labels.shape[1:])  # (B, K, H, W)
    total = F.cross_entropy(upsampled, labels, ignore_index=ignore, reduction="sum")
    return total, (labels != ignore).sum()


def upsample(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Logits `(B, K, h, w)` -> `(B, K, H, W)` float32, bilinearly, pixel centres aligned."""
    return F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)
