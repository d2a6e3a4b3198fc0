"""Choose how attention, norms and the loss are computed: in plain torch, or by a Triton kernel.

A kernel is the default only where WINS lists it for that class of GPU; everything else, and every CPU, runs
the plain torch of reference.py. After `use("triton")` the kernels always run, or raise an error; nothing
falls back silently. Triton is imported when a kernel first runs.
"""

import os

import torch
from torch import Tensor, nn

from errors import ModelError

from . import reference
from .reference import IGNORE, RESIDENT
from .reference import attention_maps as attention_maps  # for those who import from here
from .row_attention import row_attention

# (kernel, compute capability) -> the sizes at which it won `python -m lab.bench --suite kernels`. The size is
# the head width for attention, the number of channels for group_norm_silu, and the number of classes for
# upsample_cross_entropy. Empty: no GPU has been measured yet (BENCH.md).
WINS: dict[tuple[str, tuple[int, int]], frozenset[int]] = {}
MANY = 1024  # keys from which row_attention is worth a megabyte for each shape of its products on a CPU

_asked = "auto"


def use(which: str) -> None:
    """Choose for this process: "auto" (by WINS), "torch" (the reference), or "triton" (the kernels)."""
    global _asked
    assert which in ("auto", "torch", "triton"), f"unknown kernels {which!r}: choose auto, torch or triton"
    if which == "triton" and not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"):
        raise ModelError("kernels triton: torch finds no GPU; choose auto or torch")
    _asked = which


def describe(device: torch.device | str) -> str:
    """One line about what will run on the device, to print at the start."""
    device = torch.device(device)
    if _asked != "auto":
        return f"kernels: {_asked}, as asked"
    if device.type != "cuda":
        return "kernels: plain torch, as on every CPU"
    capability = torch.cuda.get_device_capability(device)
    winners = [f"{kernel} at {sorted(sizes)}" for (kernel, gpu), sizes in WINS.items() if gpu == capability]
    name = f"sm_{capability[0]}{capability[1]}"
    return f"kernels: {', '.join(winners) or 'plain torch: no kernel has won a benchmark yet'} on {name}"


def attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for every head: `(B, N, n, d), (B, M, n, d), (B, M, n, d) -> (B, N, n, d)`.

    `lengths (B,)`: how many of the M keys of each image are real (1..M); None means all of them.
    """
    if chosen("cross_attention", q, q.shape[-1], q.dtype != torch.float32 and k.shape[1] <= RESIDENT):
        from .cross_attention import cross_attention

        return cross_attention(q, k, v, lengths)
    return plain_attention(q, k, v) if lengths is None else reference.attention(q, k, v, lengths)


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention in plain torch; bfloat16 by `row_attention` on a CPU, and where it won on a GPU."""
    many = k.shape[1] >= MANY
    rows = many if q.device.type == "cpu" else won("row_attention", q, q.shape[-1])
    if rows and q.dtype == torch.bfloat16 and not torch.is_grad_enabled():
        return row_attention(q, k, v)
    return reference.attention(q, k, v)


wide_attention = plain_attention  # of heads too wide for a kernel: the VAE has a single one of 512 channels


def norm_silu(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """silu(norm(x)) of a map `(B, C, H, W)`.

    The kernel's result is channels-last in memory and of x's type, also under autocast, where torch's is
    float32.
    """
    if chosen("group_norm_silu", x, x.shape[1], x.dtype != torch.float32):
        from .group_norm import group_norm_silu
    else:
        from .reference import group_norm_silu
    return group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps)


def upsampled_cross_entropy(logits: Tensor, labels: Tensor, ignore: int = IGNORE) -> tuple[Tensor, Tensor]:
    """Cross-entropy of logits `(B, K, h, w)`, upsampled to labels `(B, H, W)`: float32 sum, int64 count.

    Pixels labelled `ignore` count in neither; if all are, the sum is 0 and its gradients are zeros.
    """
    if chosen("upsample_cross_entropy", logits, logits.shape[1], logits.dtype != torch.float32):
        from .upsample_cross_entropy import upsample_cross_entropy

        return upsample_cross_entropy(logits, labels, ignore)
    return reference.upsample_cross_entropy(logits, labels, ignore)


def upsampled_argmax(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """The most likely class of every pixel at `size` = (H, W): logits `(B, K, h, w)` -> `(B, H, W)` int64."""
    return reference.upsample(logits, size).argmax(dim=1)


def chosen(kernel: str, x: Tensor, size: int, worth: bool = True) -> bool:
    """Whether the Triton kernel runs for x. `size` is its key in WINS; by default only if `worth` holds."""
    return _asked == "triton" or (_asked == "auto" and worth and won(kernel, x, size))


def won(kernel: str, x: Tensor, size: int) -> bool:
    """Whether WINS lists this kernel for x's GPU and this size."""
    return x.is_cuda and size in WINS.get((kernel, torch.cuda.get_device_capability(x.device)), ())
