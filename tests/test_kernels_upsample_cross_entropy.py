"""kernels/upsample_cross_entropy.py by the three-way bar (proof.py): interpreted; on a GPU by `-m gpu`."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from proof import error, excess, planted, poison, results  # noqa: F401 (poison is a fixture)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import kernels
from kernels import reference
from kernels.upsample_cross_entropy import (
    backward,
    forward,
    rows,
    upsample_cross_entropy,
)

pytestmark = [
    pytest.mark.usefixtures("poison"),
    # The lowest float32, which pads the classes, becomes -infinity on its way to an exponential of 0.
    pytest.mark.filterwarnings("ignore:overflow encountered in multiply"),
]
SHAPES = {  # B, K, h, w, H, W
    "stride 8": (2, 19, 2, 3, 16, 24),
    "no whole stride": (2, 35, 3, 2, 17, 11),
    "tiles of 16 pixels, several in a cell": (1, 5, 2, 1, 44, 36),
    "150 classes": (1, 150, 1, 2, 4, 9),
    "the same size": (2, 7, 3, 4, 3, 4),
    "smaller": (2, 7, 6, 5, 4, 2),
    "one logit": (1, 4, 1, 1, 3, 5),
}
DTOTAL = torch.tensor(0.7)  # the sum's own gradient


def plain(logits: Tensor, labels: Tensor, ignore: int = 255) -> Tensor:
    """Torch's operators, in float32 or float64."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    x = F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=False)
    return F.cross_entropy(x, labels, ignore_index=ignore, reduction="sum")


def kernel(logits: Tensor, labels: Tensor, ignore: int = 255) -> Tensor:
    return upsample_cross_entropy(logits, labels, ignore)[0]


def case(
    B: int, K: int, h: int, w: int, H: int, W: int, dtype=torch.float32, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Logits, and labels of which a fifth is ignored."""
    logits = (3 * torch.randn(B, K, h, w, device=device)).to(dtype)
    labels = torch.randint(K, (B, H, W), device=device)
    return logits, labels.masked_fill(torch.rand(B, H, W, device=device) < 0.2, 255)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_equals_torch(name, dtype):
    """The sum, its gradient, the count."""
    logits, labels = case(*SHAPES[name], dtype)
    ratios = excess(partial(kernel, labels=labels), partial(plain, labels=labels), [logits], DTOTAL)
    assert max(ratios) <= 2, ratios
    total, count = upsample_cross_entropy(logits, labels)
    assert total.dtype == torch.float32 and count.dtype == torch.int64
    assert count == (labels != 255).sum() > 0


@pytest.mark.parametrize("h", [1, 2, 3, 5])
def test_every_pixel_is_in_one_cell(h):
    """For any ratio: no pixel is missing, none mixes the wrong logits."""
    for H in range(1, 10):
        logits, labels = torch.randn(1, 3, h, 1), torch.randint(3, (1, H, 1))
        assert torch.allclose(kernel(logits, labels), plain(logits, labels), rtol=1e-5), H


def test_a_far_corner_does_not_drown_a_pixel():
    """Each pixel has its own largest logit: 200 at one corner of its cell would leave it exp(-190)."""
    logits = torch.randn(1, 5, 2, 2)
    logits[0, 2, 1, 1] = 200
    labels = torch.randint(5, (1, 12, 12))
    ratios = excess(partial(kernel, labels=labels), partial(plain, labels=labels), [logits], DTOTAL)
    assert max(ratios) <= 2, ratios


@pytest.mark.parametrize("scale", [1e-3, 1e4])
def test_small_and_large_logits(scale):
    logits, labels = case(1, 40, 2, 2, 6, 9)
    ratios = excess(partial(kernel, labels=labels), partial(plain, labels=labels), [logits * scale], DTOTAL)
    assert max(ratios) <= 2, ratios


def test_ignored_pixels():
    """All of them: 0 and a gradient of zeros. None. Another label, which is a class for its logits."""
    logits, labels = case(1, 7, 2, 2, 6, 9)
    total, dlogits = results(partial(kernel, labels=torch.full_like(labels, 255)), [logits], DTOTAL)
    assert total == 0 and (dlogits == 0).all()
    assert upsample_cross_entropy(logits, torch.full_like(labels, 255))[1] == 0

    labels = labels % 7
    ratios = excess(partial(kernel, labels=labels), partial(plain, labels=labels), [logits], DTOTAL)
    assert max(ratios) <= 2, ratios
    ours, torchs = (partial(f, labels=labels, ignore=3) for f in (kernel, plain))
    ratios = excess(ours, torchs, [logits], DTOTAL)
    assert max(ratios) <= 2, ratios
    assert upsample_cross_entropy(logits, labels, 3)[1] == (labels != 3).sum()


@pytest.mark.parametrize("label", [7, 40, -1])
def test_a_label_that_is_no_class_makes_the_sum_nan(label):
    logits, labels = case(1, 7, 2, 2, 6, 9)
    labels[0, 4, 4] = label
    assert kernel(logits, labels).isnan()


def test_any_layout():
    """Logits in steps, transposed, channels-last; labels transposed: to the bit the same result."""
    big, labels = torch.randn(1, 14, 4, 6), torch.randint(7, (1, 5, 7))
    for logits in [big[:, ::2, ::2, 1::2], big[:, :7, :3, :2].mT, big[:, 7:, :2, :3]]:
        strided = labels.mT.contiguous().mT
        assert not strided.is_contiguous()
        ours = results(partial(kernel, labels=strided), [logits], DTOTAL)
        last = logits.contiguous(memory_format=torch.channels_last)
        dense = results(partial(kernel, labels=labels), [last], DTOTAL)
        assert all(torch.equal(x, y) for x, y in zip(ours, dense, strict=True))


def test_runs_are_equal_to_the_bit():
    """Under activation checkpointing, too."""
    logits, labels = case(2, 35, 2, 1, 11, 7)
    first, second = (results(partial(kernel, labels=labels), [logits], DTOTAL) for _ in range(2))
    recomputed = results(
        lambda x: checkpoint(partial(kernel, labels=labels), x, use_reentrant=False), [logits], DTOTAL
    )
    for x, y, z in zip(first, second, recomputed, strict=True):
        assert torch.equal(x, y) and torch.equal(x, z)


def test_the_kernels_are_asked_for_by_name(monkeypatch):
    logits, labels = case(1, 7, 2, 2, 6, 9)
    for total, count in (kernels.upsampled_cross_entropy(logits, labels),):
        assert torch.equal(total, plain(logits, labels)) and count == (labels != 255).sum()
    classes = F.interpolate(logits, size=(6, 9), mode="bilinear").argmax(1)
    assert torch.equal(kernels.upsampled_argmax(logits, (6, 9)), classes)

    monkeypatch.setattr(kernels, "_asked", "triton")
    monkeypatch.setattr(reference, "upsample", None)
    total, count = kernels.upsampled_cross_entropy(logits, labels)
    assert torch.equal(total, kernel(logits, labels)) and count == (labels != 255).sum()


def test_wrong_inputs_are_refused():
    logits, labels = case(2, 7, 2, 2, 6, 9)
    with pytest.raises(AssertionError, match=r"torch.float64 \(2, 7, 2, 2\): give .* bfloat16"):
        upsample_cross_entropy(logits.double(), labels)
    with pytest.raises(AssertionError, match=r"\(7, 2, 2\): give \(B, K, h, w\)"):
        upsample_cross_entropy(logits[0], labels)
    with pytest.raises(AssertionError, match="not empty"):
        upsample_cross_entropy(logits[:0], labels[:0])
    with pytest.raises(AssertionError, match=r"torch.uint8 \(2, 6, 9\): give one int64 map"):
        upsample_cross_entropy(logits, labels.byte())
    with pytest.raises(AssertionError, match=r"\(1, 6, 9\): .* \(2, H, W\)"):
        upsample_cross_entropy(logits, labels[:1])
    with pytest.raises(AssertionError, match="truncates: give float16 or float32"):
        upsample_cross_entropy(logits.bfloat16(), labels)


MISTAKES = {
    "rows above the first logit extrapolated": (
        "tl.maximum((2 * y + 1) * small - size - 2 * size * i, 0)",
        "((2 * y + 1) * small - size - 2 * size * i)",
    ),
    "rows below the last logit shared with none": ("tl.where(i == small - 1, 0, f)", "f"),
    "cells begin a pixel early": ("* size + small - 1) // (2 * small)", "* size) // (2 * small)"),
    "the sum not rescaled when the maximum grows": ("total * exp(largest - larger)", "total"),
    "ignored pixels have gradients": ('tl.where(counted, logsumexp, float("inf"))', "logsumexp"),
    "a neighbour's share forgotten": ("+ lower_left + lower_right)", "+ lower_left)"),
    "shares of left and right swapped": (
        "tl.sum(f_column * gradient, axis=0)",
        "tl.sum((1 - f_column) * gradient, axis=0)",
    ),
    "the label not subtracted": ("gradient -= (k", "gradient -= 0 * (k"),
    "the sum's own gradient forgotten": ("tl.load(DTOTAL) *", "1.0 *"),
    "corners aligned": ("(2 * y + 1) * small - size -", "2 * y * (small - 1) * size // (size - 1) -"),
}


def test_the_right_kernel_passes_the_comparison(tmp_path):
    module = planted(tmp_path, "kernels/upsample_cross_entropy.py", "import torch\n", "import torch\n")
    assert worst(module) <= 2


@pytest.mark.parametrize("name", MISTAKES)
def test_the_mistake_is_detected(name, tmp_path):
    assert worst(planted(tmp_path, "kernels/upsample_cross_entropy.py", *MISTAKES[name])) > 20


def worst(module) -> float:
    """Ten times the bar must part the mistakes from the truth; two blocks of classes."""
    logits, labels = case(1, 35, 2, 2, 9, 7)

    def mistaken(x: Tensor) -> Tensor:
        return module.upsample_cross_entropy(x, labels)[0]

    return max(excess(mistaken, partial(plain, labels=labels), [logits], DTOTAL))


# On a GPU: the data sets' classes at the UNet's stride, UperNet's second head at stride 32, odd sizes.
GPU_SHAPES = [
    *((2, 150, 64, 64, 512, 512), (2, 171, 64, 64, 512, 512), (1, 19, 64, 128, 512, 1024)),
    *((2, 150, 16, 16, 512, 512), (2, 133, 61, 83, 479, 655), (2, 24, 40, 30, 33, 47), (1, 7, 1, 1, 3, 5)),
]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", GPU_SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_equals_torch_on_a_gpu(shape, dtype):
    logits, labels = case(*shape, dtype, device="cuda")
    ratios = excess(partial(kernel, labels=labels), partial(plain, labels=labels), [logits], DTOTAL.cuda())
    assert max(ratios) <= 2, ratios


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 150, 64, 64, 512, 512), (2, 133, 61, 83, 479, 655)])
def test_a_hundred_runs_are_equal_to_the_bit(shape):
    logits, labels = case(*shape, torch.bfloat16, device="cuda")
    first = results(partial(kernel, labels=labels), [logits], DTOTAL.cuda())
    for _ in range(100):
        again = results(partial(kernel, labels=labels), [logits], DTOTAL.cuda())
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.gpu
def test_compiled_under_autocast_and_checkpointing(monkeypatch):
    """As one graph; the sum over cells may be reordered by the compiler, the kernels not."""
    monkeypatch.undo()  # of the NaN in new memory, which is no part of a graph
    logits, labels = case(2, 133, 31, 17, 247, 139, torch.bfloat16, device="cuda")
    eager = results(partial(kernel, labels=labels), [logits], DTOTAL.cuda())
    compiled = results(torch.compile(partial(kernel, labels=labels), fullgraph=True), [logits], DTOTAL.cuda())
    with torch.autocast("cuda", dtype=torch.bfloat16):
        cast = results(
            lambda x: checkpoint(partial(kernel, labels=labels), x, use_reentrant=False),
            [logits],
            DTOTAL.cuda(),
        )
    assert error(compiled[0], eager[0].double()) <= 1e-6
    assert torch.equal(eager[1], compiled[1])
    assert all(torch.equal(x, y) for x, y in zip(eager, cast, strict=True))


@pytest.mark.gpu
def test_the_operators_are_well_formed():
    """Schemas, autograd, fake tensors: torch's own checks."""
    logits, labels = case(2, 35, 5, 7, 40, 56, torch.bfloat16, device="cuda")
    padded = rows(logits)
    torch.library.opcheck(forward, (padded.clone().requires_grad_(), labels, 35, 255))
    _, logsumexp = forward(padded, labels, 35, 255)
    torch.library.opcheck(backward, (DTOTAL.cuda(), padded, labels, logsumexp, 255))
