"""A linear layer by the faster of torch's two ways on a CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import won


class Linear(nn.Linear):
    """`nn.Linear`, by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x `(B, N, C)`, weight `(D, C)`, bias `(D,)` -> `(B, N, D)`; as a 1x1 convolution where that won.

    The results agree to rounding. torch computes convolutions by oneDNN and float32 products by its BLAS,
    which takes up to twice as long on some processors; the gradients of a product are never slower. A single
    thread uses the product: there torch has a slow 1x1 convolution of its own (ATen Convolution.cpp).
    """
    if x.dtype != torch.float32 or x.ndim != 3 or torch.is_grad_enabled() or torch.get_num_threads() == 1:
        return F.linear(x, weight, bias)
    if not won("linear_as_convolution", x, "forward"):
        return F.linear(x, weight, bias)
    return as_convolution(x, weight, bias)


def as_convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` by oneDNN."""
    pixels = x[:, :, None].permute(0, 3, 1, 2)  # (B, C, N, 1): a view, channels-last in memory
    return F.conv2d(pixels, weight[:, :, None, None], bias)[..., 0].mT
