"""What the launched configurations of group_norm.py and upsample_cross_entropy.py become on three GPUs."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from aot import Compiled, compiled

# An operator on meta tensors is traced, not run; with this off it calls its kernels, which aot.py compiles.
from torch._library.triton import set_wrap_triton_enabled

from kernels.group_norm import add_group_norm, group_norm
from kernels.upsample_cross_entropy import upsample_cross_entropy

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
# 16-byte loads and stores of one tile, 64 x 64 values of two bytes by 128 threads: four for each map.
# A whole group of 40 or 80 channels is read and written like that, too: 64 values by a thread forward, 32 of
# each map backward.
MAPS = {"measure": 1, "normalize": 2, "measure_backward": 2, "normalize_backward": 3}
MAPS |= {"whole_forward": 4, "whole_backward": 3}
# Of a sum: the residual is read and the sum written; backward, the sum's other gradient is read.
SUMMED = MAPS | {"measure": 3, "normalize_backward": 4, "whole_forward": 8, "whole_backward": 4}
NARROW = ("640", "1920", "tiny", "one pixel")  # pieces of rows or whole rows that 16 bytes do not divide


def norm(
    C: int,
    size: int,
    dtype: torch.dtype,
    parameters: torch.dtype,
    groups: int = 32,
    silu: bool = True,
    shifted: bool = False,
) -> Callable:
    """Forward and backward of a batch of two."""
    x = torch.empty(2, C, size, size, dtype=dtype, device="meta", requires_grad=True)
    x.data = x.data.contiguous(memory_format=torch.channels_last)
    weight, bias = (torch.empty(C, dtype=parameters, device="meta", requires_grad=True) for _ in range(2))
    shift = torch.empty(2, C, dtype=dtype, device="meta", requires_grad=True) if shifted else None

    def call() -> None:
        with set_wrap_triton_enabled(False):
            group_norm(x, groups, weight, bias, 1e-5, silu, shift).backward(x.detach())

    return call


def norm_of_sum(C: int, size: int, dtype: torch.dtype = BF16) -> Callable:
    """The same of a norm that adds a residual; both its outputs are read."""
    x, residual = (torch.empty(2, C, size, size, dtype=dtype, device="meta") for _ in range(2))
    x, residual = (x.contiguous(memory_format=torch.channels_last).requires_grad_() for x in (x, residual))
    weight, bias = (torch.empty(C, dtype=dtype, device="meta", requires_grad=True) for _ in range(2))

    def call() -> None:
        with set_wrap_triton_enabled(False):
            both = add_group_norm(x, residual, 32, weight, bias, 1e-6)
            torch.autograd.backward(both, (x.detach(), x.detach()))

    return call


def loss(K: int, small: int, size: int, dtype: torch.dtype) -> Callable:
    """Forward and backward of a batch of two."""
    logits = torch.empty(2, K, small, small, dtype=dtype, device="meta", requires_grad=True)
    labels = torch.empty(2, size, size, dtype=torch.int64, device="meta")

    def call() -> None:
        with set_wrap_triton_enabled(False):
            upsample_cross_entropy(logits, labels)[0].backward()

    return call


def launched() -> dict[str, Callable]:
    """A map of the UNet under autocast, one of the frozen VAE, both strides of UperNet's heads."""
    return {
        "norm, 320 channels, 64 x 64, float32 parameters": norm(320, 64, BF16, F32),
        "norm, 128 channels, 512 x 512": norm(128, 512, BF16, BF16),
        "norm, shifted, 320 channels, 64 x 64": norm(320, 64, BF16, BF16, shifted=True),
        "norm, shifted, 1280 channels, 16 x 16": norm(1280, 16, BF16, BF16, shifted=True),
        "norm, 1920 channels, 16 x 16, float32 parameters": norm(1920, 16, BF16, F32),
        "norm of a sum, 320 channels, 64 x 64": norm_of_sum(320, 64),
        "norm of a sum, 1280 channels, 16 x 16": norm_of_sum(1280, 16),
        "norm of a sum, 640 channels, 32 x 32": norm_of_sum(640, 32),
        "loss, 150 classes, stride 8": loss(150, 64, 512, BF16),
        "loss, 150 classes, stride 32": loss(150, 16, 512, BF16),
    }


def others() -> dict[str, Callable]:
    """The widest map, the narrowest group, tiny's, float16, one pixel; few classes, no whole stride."""
    return {
        "norm, 2560 channels": norm(2560, 8, BF16, F32),
        "norm, 2560 channels, 16 x 16": norm(2560, 16, BF16, BF16),
        "norm, shifted, 1280 channels, 8 x 8": norm(1280, 8, BF16, BF16, shifted=True),
        "norm without SiLU, 320 channels, 64 x 64": norm(320, 64, BF16, BF16, silu=False),
        "norm without SiLU, 1280 channels, 16 x 16": norm(1280, 16, BF16, BF16, silu=False),
        "norm, shifted, 640 channels, float16": norm(640, 32, F16, F16, shifted=True),
        "norm, 1280 channels, float32": norm(1280, 16, F32, F32),
        "norm, 960 channels, float16": norm(960, 64, F16, F16),
        "norm of a sum, 1280 channels, 8 x 8": norm_of_sum(1280, 8),
        "norm of a sum, 640 channels, float16": norm_of_sum(640, 32, F16),
        "norm of a sum, 1280 channels, float32": norm_of_sum(1280, 16, F32),
        "norm, 16 channels of tiny": norm(16, 128, BF16, F32, groups=8),
        "norm, one pixel": norm(320, 1, BF16, F32),
        "loss, 171 classes, float16, no whole stride": loss(171, 61, 479, F16),
        "loss, 19 classes, one logit": loss(19, 1, 3, BF16),
    }


def graphs() -> dict[str, Callable]:
    """Each public function compiled by torch as one graph, forward and backward, for unknown sizes."""
    graph = partial(torch.compile, backend="aot_eager", fullgraph=True, dynamic=True)
    small, x = (
        torch.empty(2, 320, *size, dtype=BF16, device="meta", requires_grad=True)
        for size in ((5, 7), (61, 53))
    )
    weight, bias = (torch.empty(320, device="meta", requires_grad=True) for _ in range(2))
    shift = torch.empty(2, 320, dtype=BF16, device="meta", requires_grad=True)
    logits = torch.empty(2, 133, 31, 17, dtype=BF16, device="meta", requires_grad=True)
    labels = torch.empty(2, 247, 139, dtype=torch.int64, device="meta")
    return {
        "norm": lambda: graph(group_norm)(x, 32, weight, bias, 1e-5, True, shift).sum().backward(),
        "norm of a small map": lambda: (
            graph(group_norm)(small, 32, weight, bias, 1e-5, False).sum().backward()
        ),
        "norm of a sum": lambda: sum(
            map(torch.sum, graph(add_group_norm)(x, 2 * x, 32, weight, bias, 1e-6))
        ).backward(),
        "loss": lambda: graph(upsample_cross_entropy)(logits, labels)[0].backward(),
    }


def check(facts: list[Compiled]) -> None:
    """Nothing spills but on sm_80, where no norm of a sum does, and 8 values of a group of 60 channels on
    sm_100; a map of whole tiles is read and written 16 bytes at a time.
    """
    for fact in facts:
        assert fact.fits, fact
        allowed = 8 if fact.capability == 100 and "1920" in fact.call else 0
        summed = "sum" in fact.call
        assert (fact.capability == 80 and not summed) or fact.spills <= allowed, fact
        if fact.kernel in MAPS and not any(name in fact.call for name in NARROW):
            assert fact.wide >= 4 * (SUMMED if summed else MAPS)[fact.kernel], fact


def test_launched_kernels():
    facts = compiled(launched, (90,))
    assert {x.kernel for x in facts} == {
        *MAPS,
        *("merge", "merge_backward", "sum_losses", "share_gradients", "add_shares"),
    }
    check(facts)


def test_torch_compile_makes_one_graph():
    """Symbolic sizes meet every line of the border; on the meta device the graph then launches nothing."""
    assert compiled(graphs, (90,)) == []


@pytest.mark.slow
def test_other_gpus_and_configurations():
    check(compiled(launched, (80, 100)))
    check(compiled(others, (90,)))
