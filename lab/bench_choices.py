"""Measure the ways in which a CPU may compute, for `kernels.WINS`: `python -m lab.bench --suite cpu-choices`.

Each is compared with plain torch at the sizes of Stable Diffusion v1.5, in turns. It wins a size where the
median of the ratios is at most 0.97.
"""

import copy
from collections.abc import Callable
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import WINS, cpu_class, reference
from kernels.linear import as_convolution
from kernels.row_attention import row_attention
from lab import bench_peers
from lab.bench_peers import cpu_seconds, in_turns
from unet import UNet
from vae import VAE

WON = 0.97
ROUNDS = 7
HEADS = {40: (4096, 8), 80: (1024, 8), 512: (4096, 1)}  # width -> tokens, heads, of a 512x512 image
PRODUCTS = ((4096, 320, 2560), (1024, 640, 5120), (257, 1024, 4096))  # tokens, widths: the UNet's and CLIP's


def ratio(ours: Callable, plain: Callable) -> float:
    """CPU time of ours / plain: the median over rounds, in turns, after one run of each."""
    times = in_turns(ROUNDS + 1, *(lambda _, x=x: cpu_seconds(x) for x in (ours, plain)))
    return bench_peers.ratio(*(x[1:] for x in times))


def attention_ratio(width: int) -> float:
    tokens, heads = HEADS[width]
    q, k, v = torch.randn(3, 1, tokens, heads, width).bfloat16()
    with torch.inference_mode():
        return ratio(lambda: row_attention(q, k, v), lambda: reference.attention(q, k, v))


def linear_ratio(gradients: bool) -> float:
    """The largest over PRODUCTS."""

    def run(layer: Callable, x: Tensor, weight: Tensor) -> None:
        with torch.set_grad_enabled(gradients):
            y = layer(x, weight)
            if gradients:
                y.sum().backward()

    ratios = []
    for tokens, width, out in PRODUCTS:
        inputs = torch.randn(1, tokens, width), nn.Parameter(torch.randn(out, width))
        ratios.append(ratio(*(partial(run, layer, *inputs) for layer in (as_convolution, F.linear))))
    return max(ratios)


def format_ratio(kind: type[nn.Module], dtype: torch.dtype) -> float:
    """Channels-last weights of the UNet or the VAE, on an image of 256x256."""
    with torch.device("meta"):
        plain = kind()
    plain = plain.to(dtype).to_empty(device="cpu").requires_grad_(False)
    for p in plain.parameters():
        p.normal_(std=0.02)
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        if kind is VAE:
            image = torch.rand(1, 3, 256, 256).to(dtype)
            return ratio(lambda: last.encode(image), lambda: plain.encode(image))
        x = torch.randn(1, 4, 32, 32).to(dtype), torch.tensor([1]), torch.randn(1, 77, 768).to(dtype)
        return ratio(lambda: last.features(*x), lambda: plain.features(*x))


def suite() -> int:
    """Print every ratio, and the entries of WINS that they make for this processor."""
    measured = {("row_attention", width): attention_ratio(width) for width in HEADS}
    for size in ("forward", "gradients"):
        measured["linear_as_convolution", size] = linear_ratio(size == "gradients")
    for kind, dtype in product((UNet, VAE), ("bfloat16", "float32")):
        measured["channels_last", f"{kind.__name__} {dtype}"] = format_ratio(kind, getattr(torch, dtype))
    print(f"processor class {cpu_class()}, {torch.get_num_threads()} threads; ratios to plain torch")
    for (what, size), value in measured.items():
        print(f"  {what} {size}: {value:.2f}")
    for what in dict.fromkeys(what for what, _ in measured):
        sizes = [size for (name, size), value in measured.items() if name == what and value <= WON]
        print(f"    ({what!r}, {cpu_class()!r}): frozenset({set(sizes) or ''}),")
    print("in the table now:", {key: sizes for key, sizes in WINS.items() if key[1] == cpu_class()})
    return 0
