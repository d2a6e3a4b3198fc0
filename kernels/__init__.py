"""Choose how attention, norms, linear layers and the loss are computed: in plain torch, or another way.

The other way, a Triton kernel on a GPU or another use of torch on a CPU, is the default only where WINS lists
it for that class of processor; everything else runs the plain torch of reference.py. After `use("triton")`
the kernels always run, or raise an error; nothing falls back silently. Triton is imported when a kernel first
runs.
"""

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor, nn

from errors import ModelError

from . import reference
from .reference import IGNORE, RESIDENT
from .reference import attention_maps as attention_maps  # for those who import from here
from .row_attention import row_attention

# (what, class of processor) -> where it won. GPUs, by compute capability: `python -m lab.bench --suite gpu
# --only kernels`; the size is the head width for attention, the number of channels for group_norm and
# group_norm_silu, the number of classes for upsample_cross_entropy. No GPU has been measured yet. CPUs, by
# `processor()`: `python -m lab.bench --suite cpu-choices`. The numbers are in BENCH.md.
WINS: dict[tuple[str, tuple[int, int] | str], frozenset[int | str]] = {
    ("row_attention", "avx512_bf16"): frozenset({40, 80, 512}),
    ("linear_as_convolution", "avx512_bf16"): frozenset({"forward"}),
    ("channels_last", "avx512_bf16"): frozenset({"VAE bfloat16"}),
    ("channels_last", "amx"): frozenset({"UNet bfloat16", "VAE bfloat16"}),
}
MANY = 1024  # keys from which row_attention is worth a megabyte for each shape of its products on a CPU

_asked = "auto"


def use(which: str, device: torch.device | str = "cuda") -> None:
    """Choose for this process: "auto" (by WINS), "torch" (the reference), or "triton" (the kernels)."""
    global _asked
    assert which in ("auto", "torch", "triton"), f"unknown kernels {which!r}: choose auto, torch or triton"
    gpu = torch.cuda.is_available() and torch.device(device).type == "cuda"
    if which == "triton" and not (gpu or os.environ.get("TRITON_INTERPRET") == "1"):
        raise ModelError("kernels triton: no GPU is used here; choose auto or torch")
    _asked = which


def describe(device: torch.device | str) -> str:
    """One line about what will run on the device, to print at the start."""
    device = torch.device(device)
    if _asked != "auto":
        return f"kernels: {_asked}, as asked"
    found = processor(device)
    if device.type != "cuda":
        measured = any(cpu == found for _, cpu in WINS)
        return f"kernels: torch's own, {'as fastest' if measured else 'not measured'} on {found}"
    winners = [f"{kernel} at {sorted(sizes)}" for (kernel, gpu), sizes in WINS.items() if gpu == found]
    name = "sm_{}{}".format(*found)
    return f"kernels: {', '.join(winners) or 'plain torch: no kernel has won a benchmark yet'} on {name}"


def processor(device: torch.device) -> tuple[int, int] | str:
    """The class of a processor in WINS: a GPU's compute capability; amx, avx512_bf16, avx2, arm or other."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else cpu_class()


@cache
def cpu_class() -> str:
    """The best of the instructions for matrix products that this CPU has."""
    able = torch.cpu.get_capabilities()
    if able.get("architecture") in ("aarch64", "arm64"):
        return "arm"
    names = {"amx_bf16": "amx", "avx512_bf16": "avx512_bf16", "avx2": "avx2"}
    return next((name for flag, name in names.items() if able.get(flag)), "other")


def attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for every head: `(B, N, n, d), (B, M, n, d), (B, M, n, d) -> (B, N, n, d)`.

    `lengths (B,)`: how many of the M keys of each image are real (1..M); None means all of them.
    """
    if chosen("cross_attention", q, q.shape[-1], q.dtype != torch.float32 and k.shape[1] <= RESIDENT):
        from .cross_attention import cross_attention

        return cross_attention(q, k, v, lengths)
    return plain_attention(q, k, v) if lengths is None else reference.attention(q, k, v, lengths)


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention in plain torch; without gradients in bfloat16 by `row_attention` where it won."""
    worth = q.dtype == torch.bfloat16 and not torch.is_grad_enabled() and (q.is_cuda or k.shape[1] >= MANY)
    if worth and won("row_attention", q, q.shape[-1]):
        return row_attention(q, k, v)
    return reference.attention(q, k, v)


wide_attention = plain_attention  # of heads too wide for a kernel: the VAE has a single one of 512 channels


def norm_silu(norm: nn.GroupNorm, x: Tensor, shift: Tensor | None = None) -> Tensor:
    """silu(norm(x + shift)) of a map `(B, C, H, W)` and a shift `(B, C)`, which may be added to x in place.

    The kernel's result is channels-last in memory and of x's type, also under autocast, where torch's is
    float32.
    """
    return normed(norm, x, silu=True, shift=shift)


def normed(norm: nn.GroupNorm, x: Tensor, silu: bool = False, shift: Tensor | None = None) -> Tensor:
    """norm(x) of a map `(B, C, H, W)`, else as `norm_silu`."""
    kernel = "group_norm_silu" if silu else "group_norm"
    if chosen(kernel, x, x.shape[1], x.dtype != torch.float32):
        from .group_norm import group_norm
    else:
        from .reference import group_norm
    return group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps, silu, shift)


def add_normed(norm: nn.GroupNorm, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """x + residual, of maps `(B, C, H, W)`, and `normed` of it."""
    if chosen("group_norm", x, x.shape[1], x.dtype != torch.float32):
        from .group_norm import add_group_norm
    else:
        from .reference import add_group_norm
    return add_group_norm(x, residual, norm.num_groups, norm.weight, norm.bias, norm.eps)


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


def won(what: str, x: Tensor, size: int | str) -> bool:
    """Whether WINS lists this way for x's processor and this size; never if "torch" was chosen."""
    return _asked != "torch" and size in WINS.get((what, processor(x.device)), ())


def own_type(weight: Tensor) -> AbstractContextManager:
    """Turn autocast off for a part whose weights are not float32: all of it computes in their type.

    Autocast would compute its norms in float32, with two to three times the bytes.
    """
    off = weight.dtype != torch.float32
    return torch.autocast(weight.device.type, enabled=False) if off else nullcontext()


def arrange(part: nn.Module) -> nn.Module:
    """Lay out a part's convolution weights, in place, as is fastest for its type on its processor.

    To be called after the part is cast or moved. The maps of a convolution follow its weights.
    """
    weight = next(part.parameters())
    last = won("channels_last", weight, f"{type(part).__name__} {str(weight.dtype).removeprefix('torch.')}")
    return part.to(memory_format=torch.channels_last) if last else part
