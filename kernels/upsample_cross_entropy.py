"""Bilinear upsampling with the cross-entropy of its result, which is never stored.

Logits `(B, K, h, w)` are upsampled to the labels' `(B, H, W)`. At 512x512 pixels and 150 classes the result
takes 157 MB in float32 per image; the loss is one number.

Bilinear interpolation, pixel centres aligned (`align_corners=False`). Row y of the image lies at

    s = (y + 1/2) h/H - 1/2, not less than 0,       i = floor(s),  f = s - i

and mixes (1 - f) of logit row i and f of row i + 1, which below the last row is the last row again: there f
may as well be 0. Columns likewise. So all pixels of one floor (i, j), a cell, mix the same four logits, its
corners; every pixel lies in one cell, and there are as many cells as logit pixels. A program computes a cell.
Its rows begin where s >= i, the first cell's at 0; in integers, so that cells neither overlap nor leave gaps:

    first(i) = ceil(((2 i + 1) H - h) / (2 h)) = ((2 i + 1) H + h - 1) // (2 h)       first(0) = 0
    f = ((2 y + 1) h - H - 2 H i) / (2 H)                                              first(h) = H

Downsampling works as well: then some cells have no pixels.

Forward. With x_k the upsampled logits of a pixel, its loss is log(sum_k exp(x_k)) - x_label. The classes come
in blocks of 32: m is the largest logit so far and total = sum exp(x_k - m), rescaled whenever m grows. The
logarithm is kept, one float32 for each pixel.

Backward. d loss / d x_k = exp(x_k - logsumexp) - [k = label], whose sum with the weights (1 - f), f of a
cell's pixels is the share of each of the four corners. A logit pixel is a corner of four cells, so each cell
writes its four shares (2.6 MB each for the image above) and a last kernel adds four shares for each logit:
there are no atomic additions, every sum has a fixed order, and repeated runs are bit-identical. Gathering the
pixels around each logit instead would compute every exponential four times.

The lanes of a warp are pixels forward, where the sum runs over classes, and classes backward, where it runs
over pixels: no sum crosses lanes.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from .reference import IGNORE

CLASSES = 32  # per block: the lanes of a warp; 150 classes are padded to 160
SIDE = 16  # pixels of the largest tile: at stride 32 a cell has four of them
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def upsample_cross_entropy(logits: Tensor, labels: Tensor, ignore: int = IGNORE) -> tuple[Tensor, Tensor]:
    """Cross-entropy of logits `(B, K, h, w)`, upsampled to labels `(B, H, W)`: float32 sum, int64 count.

    logits are bfloat16, float16 or float32, and are copied once unless they are channels-last in memory and
    have whole blocks of 32 classes; labels int64 in 0..K-1 or `ignore`, whose pixels count in neither result.
    Any other label makes the sum NaN: raising an error would synchronise the GPU. Differentiable once, in the
    logits; the gradient has their type.
    """
    assert logits.ndim == 4 and logits.dtype in DTYPES and logits.numel() > 0, (
        f"the logits are {logits.dtype} {tuple(logits.shape)}: "
        "give (B, K, h, w) of bfloat16, float16 or float32, not empty"
    )
    assert logits.device.type != "cpu" or not isinstance(sum_losses, triton.JITFunction), (
        "the logits are on the CPU: Triton's kernels run there only under TRITON_INTERPRET=1"
    )
    assert logits.dtype != torch.bfloat16 or isinstance(sum_losses, triton.JITFunction), (
        "the logits are bfloat16, to which Triton's interpreter (3.7.1) truncates: give float16 or float32"
    )
    assert labels.dtype == torch.int64 and labels.ndim == 3 and len(labels) == len(logits), (
        f"the labels are {labels.dtype} {tuple(labels.shape)}: "
        f"give one int64 map per image, ({len(logits)}, H, W)"
    )
    total, _ = forward(rows(logits), labels.contiguous(), logits.shape[1], ignore)
    return total, (labels != ignore).sum()


def rows(logits: Tensor) -> Tensor:
    """`(B, K, h, w)` -> `(B, h, w, stride)`: the classes of a pixel contiguous, in whole blocks."""
    padding, lowest = -logits.shape[1] % CLASSES, torch.finfo(logits.dtype).min  # exp(lowest) is 0: no masks
    return F.pad(logits.permute(0, 2, 3, 1), (0, padding), value=lowest).contiguous()


def tiling(h: int, w: int, H: int, W: int) -> dict[str, int]:
    """The tile of pixels that a program computes at once: a cell's, a side rounded up to a power of two."""
    rows = triton.next_power_of_2(int(min(SIDE, triton.cdiv(H, h))))  # int: the sizes may be symbols
    columns = triton.next_power_of_2(int(min(SIDE, triton.cdiv(W, w))))
    warps = max(1, rows * columns // 64)  # two pixels a lane: with one, 28 instructions a logit instead of 10
    return {"ROWS": rows, "COLUMNS": columns, "CLASSES": CLASSES, "num_warps": warps}


@triton_op("tada::upsample_cross_entropy", mutates_args=())
def forward(logits: Tensor, labels: Tensor, K: int, ignore: int) -> tuple[Tensor, Tensor]:
    """The sum of the losses, and each pixel's logarithm `(B, H, W)` float32 for the backward pass."""
    (B, h, w, stride), (H, W) = logits.shape, labels.shape[1:]
    losses = torch.empty(B, h, w, dtype=torch.float32, device=logits.device)  # of each cell
    logsumexp = torch.empty(B, H, W, dtype=torch.float32, device=logits.device)
    wrap_triton(sum_losses)[(w, h, B)](
        logits, labels, losses, logsumexp, ignore, K, stride, h, w, H, W, **tiling(h, w, H, W),
    )  # fmt: skip
    return losses.sum(), logsumexp


@triton_op("tada::upsample_cross_entropy_backward", mutates_args=())
def backward(dtotal: Tensor, logits: Tensor, labels: Tensor, logsumexp: Tensor, ignore: int) -> Tensor:
    """dlogits, for the gradient of the sum; those of the padding are zeros."""
    (B, h, w, stride), (H, W) = logits.shape, labels.shape[1:]
    shares = torch.empty(B, h, w, 4, stride, dtype=torch.float32, device=logits.device)  # of the corners
    dlogits = torch.empty_like(logits)
    wrap_triton(share_gradients)[(w * (stride // CLASSES), h, B)](
        logits, labels, logsumexp, shares, ignore, stride, h, w, H, W,
        COLUMNS=min(8, tiling(h, w, H, W)["COLUMNS"]),  # 16 do not fit a lane's registers
        CLASSES=CLASSES, num_warps=1,
    )  # fmt: skip
    classes = triton.next_power_of_2(stride)
    wrap_triton(add_shares)[(w, h, B)](shares, dtotal, dlogits, stride, CLASSES=classes, num_warps=1)
    return dlogits


def keep(ctx, inputs, output) -> None:
    logits, labels, _, ctx.ignore = inputs
    ctx.save_for_backward(logits, labels, output[1])
    ctx.mark_non_differentiable(output[1])


def differentiate(ctx, dtotal: Tensor, _) -> tuple[Tensor, None, None, None]:
    logits, labels, logsumexp = ctx.saved_tensors
    return backward(dtotal, logits, labels, logsumexp, ctx.ignore), None, None, None


forward.register_autograd(differentiate, setup_context=keep)


@triton.jit
def first_of(i, small, size):
    """The first row (or column) of the image in cell i: of `small` cells over `size` pixels."""
    first = ((2 * i + 1) * size + small - 1) // (2 * small)
    return tl.where(i == 0, 0, tl.where(i == small, size, first))


@triton.jit
def fraction(y, i, small, size):
    """The fraction from logit i to i + 1 of rows (or columns) y; 0 above the first and below the last."""
    f = tl.maximum((2 * y + 1) * small - size - 2 * size * i, 0).to(tl.float32) / (2 * size)
    return tl.where(i == small - 1, 0, f)


@triton.jit
def load_logits(LOGITS, i, j, k, stride, h, w):
    """Classes k of logit pixel (i, j), clamped at the edge, of this program's image; float32."""
    row, column = tl.minimum(i, h - 1), tl.minimum(j, w - 1)
    at = ((tl.program_id(2).to(tl.int64) * h + row) * w + column) * stride
    return tl.load(LOGITS + at + k).to(tl.float32)


@triton.jit
def load_corners(LOGITS, i, j, k, stride, h, w):
    """Classes k at the cell's corners: left and right of its upper row, then of its lower."""
    upper_left = load_logits(LOGITS, i, j, k, stride, h, w)
    upper_right = load_logits(LOGITS, i, j + 1, k, stride, h, w)
    lower_left = load_logits(LOGITS, i + 1, j, k, stride, h, w)
    lower_right = load_logits(LOGITS, i + 1, j + 1, k, stride, h, w)
    return upper_left, upper_right, lower_left, lower_right


@triton.jit
def mixed(upper_left, upper_right, lower_left, lower_right, f_row, f_column):
    """The logits between the corners."""
    left = upper_left + f_row * (lower_left - upper_left)
    right = upper_right + f_row * (lower_right - upper_right)
    return left + f_column * (right - left)


@triton.jit
def exp(x):
    """tl.exp also computes results below 1e-38, at three more instructions for each logit."""
    return tl.exp2(x * 1.4426950408889634)  # log2(e)


@triton.jit
def sum_losses(
    LOGITS, LABELS, LOSSES, LOGSUMEXP, ignore, K, stride, h, w, H, W,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """One cell: the sum of its pixels' losses (B, h, w); each pixel's logarithm (B, H, W)."""
    j, i, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    bottom, right = first_of(i + 1, h, H), first_of(j + 1, w, W)
    pixel = tl.arange(0, ROWS * COLUMNS)
    loss = tl.zeros([ROWS * COLUMNS], tl.float32)
    for top in range(first_of(i, h, H), bottom, ROWS):
        for left in range(first_of(j, w, W), right, COLUMNS):
            y, x = top + pixel // COLUMNS, left + pixel % COLUMNS
            inside = (y < bottom) & (x < right)
            f_row, f_column = fraction(y, i, h, H), fraction(x, j, w, W)
            at = (b.to(tl.int64) * H + y) * W + x
            label = tl.load(LABELS + at, mask=inside, other=0).to(tl.int32)
            known = (label >= 0) & (label < K)

            largest = tl.full([ROWS * COLUMNS], float("-inf"), tl.float32)
            total = tl.zeros([ROWS * COLUMNS], tl.float32)
            for first in range(0, stride, CLASSES):
                c00, c01, c10, c11 = load_corners(LOGITS, i, j, first + tl.arange(0, CLASSES), stride, h, w)
                logit = mixed(c00[:, None], c01[:, None], c10[:, None], c11[:, None], f_row, f_column)
                larger = tl.maximum(largest, tl.max(logit, axis=0))
                total = total * exp(largest - larger) + tl.sum(exp(logit - larger[None, :]), axis=0)
                largest = larger
            c00, c01, c10, c11 = load_corners(LOGITS, i, j, tl.where(known, label, 0), stride, h, w)
            of_label = mixed(c00, c01, c10, c11, f_row, f_column)
            logsumexp = tl.where(known, largest + tl.log(total), float("nan"))
            counted = inside & (label != ignore)
            loss += tl.where(counted, logsumexp - of_label, 0)
            # Backward, exp(logit - infinity) makes the gradients of ignored pixels 0.
            tl.store(LOGSUMEXP + at, tl.where(counted, logsumexp, float("inf")), mask=inside)
    tl.store(LOSSES + (b * h + i) * w + j, tl.sum(loss))


@triton.jit
def share_gradients(
    LOGITS, LABELS, LOGSUMEXP, SHARES, ignore, stride, h, w, H, W,
    COLUMNS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """One cell and one block of classes: each corner's share of the gradients (B, h, w, 4, stride)."""
    blocks = stride // CLASSES
    j, i, b = tl.program_id(0) // blocks, tl.program_id(1), tl.program_id(2)
    k = tl.program_id(0) % blocks * CLASSES + tl.arange(0, CLASSES)
    c00, c01, c10, c11 = load_corners(LOGITS, i, j, k, stride, h, w)
    right = first_of(j + 1, w, W)
    zeros = tl.zeros([CLASSES], tl.float32)
    d00, d01, d10, d11 = zeros, zeros, zeros, zeros
    for left in range(first_of(j, w, W), right, COLUMNS):
        x = left + tl.arange(0, COLUMNS)
        f_column = fraction(x, j, w, W)[:, None]
        for y in range(first_of(i, h, H), first_of(i + 1, h, H)):
            f_row = fraction(y, i, h, H)
            row = (b.to(tl.int64) * H + y) * W + left
            label = tl.load(LABELS + row + tl.arange(0, COLUMNS), mask=x < right, other=ignore).to(tl.int32)
            logsumexp = tl.load(LOGSUMEXP + row + tl.arange(0, COLUMNS), mask=x < right, other=float("inf"))
            label = tl.where(label == ignore, -1, label)

            logit = mixed(c00[None, :], c01[None, :], c10[None, :], c11[None, :], f_row, f_column)
            gradient = exp(logit - logsumexp[:, None])  # [COLUMNS, CLASSES]
            gradient -= (k[None, :] == label[:, None]).to(tl.float32)
            to_both = tl.sum(gradient, axis=0)
            to_right = tl.sum(f_column * gradient, axis=0)
            d00 += (1 - f_row) * (to_both - to_right)
            d01 += (1 - f_row) * to_right
            d10 += f_row * (to_both - to_right)
            d11 += f_row * to_right
    cell = SHARES + ((b.to(tl.int64) * h + i) * w + j) * 4 * stride + k
    tl.store(cell, d00)
    tl.store(cell + stride, d01)
    tl.store(cell + 2 * stride, d10)
    tl.store(cell + 3 * stride, d11)


@triton.jit
def add_shares(SHARES, DTOTAL, DLOGITS, stride, CLASSES: tl.constexpr):
    """One logit pixel: the shares of the four cells of which it is a corner, its own and the three before."""
    j, i, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    w, h = tl.num_programs(0), tl.num_programs(1)
    k = tl.arange(0, CLASSES)
    real = k < stride
    pixel = (b.to(tl.int64) * h + i) * w + j
    cell = SHARES + 4 * stride * pixel + k
    before, above = cell - 4 * stride, cell - 4 * stride * w
    upper_left = tl.load(cell, mask=real, other=0)
    upper_right = tl.load(before + stride, mask=real & (j > 0), other=0)
    lower_left = tl.load(above + 2 * stride, mask=real & (i > 0), other=0)
    lower_right = tl.load(above - 4 * stride + 3 * stride, mask=real & (i > 0) & (j > 0), other=0)
    dlogits = tl.load(DTOTAL) * (upper_left + upper_right + lower_left + lower_right)
    tl.store(DLOGITS + pixel * stride + k, dlogits.to(DLOGITS.dtype.element_ty), mask=real)
