"""GroupNorm with or without SiLU, of channels-last maps to which a shift or a residual is added; both passes.

With g the group of channel c, N = P C/G the values of a group (P = H W pixels, G groups) and sigma the
logistic function, per image:

    xhat = (x + shift_c - mean_g) rstd_g      mean_g, rstd_g = 1 / sqrt(var_g + eps) over the group's N values
    z    = xhat weight_c + bias_c
    y    = z sigma(z)                         or z, without SiLU

Backward, from dy. The mean and the variance depend on every value of the group, which gives two means:

    dz      = dy sigma(z) (1 + z (1 - sigma(z)))              or dy
    dbias_c = sum of dz, dweight_c = sum of dz xhat           over images and pixels
    dx      = rstd_g (weight_c dz - mean of (weight dz) - xhat mean of (weight dz xhat))       means over g
    dshift_c = sum of dx                                      over the pixels of each image

z is not stored: it costs two multiplications, and reading it would cost as much as reading x. Nor is x +
shift (the time embedding of the UNet): that saves a reading and a writing forward, 4 bytes per value in
bfloat16, and the reading of dx for its sum backward, 2 bytes.

Tiles. A group's channels are a short piece of each pixel's row (20 bytes of 640 at C = 320), so a program
does not process a group of a large map: it processes tiles of 64 pixels x 64 channels, lines of 128 bytes,
per channel. Three kernels forward and three backward: sums of each tile over its pixels, per channel; their
merge into the groups' statistics; the result. The forward pass reads x twice and writes y, the backward pass
reads x and dy twice and writes dx: 6 and 10 bytes per value in bfloat16, against 18 of eager torch on
channels-last maps, which first copies to another layout. If the map fits the cache, the second reading is
free.

Small maps. Where the group fits the registers of a program (16x16 pixels of 40 channels, say), the program
holds it: one kernel forward and one backward, and each map is read once: 4 and 6 bytes per value.

Residual. The sum x + residual of a UNet's residual block is read by the norm and again by the residual of the
transformer. The pass that reads x first also reads residual and stores the sum, rounded; the rest is of that.
So the forward pass moves 6 bytes and then 4, or 8 if the group is held, where torch's addition (6) and the
norm move 12 or 10. Backward, dx is the gradient of both addends; the one that reaches the sum elsewhere is
added to it before it is stored: 12 or 8 bytes, where autograd's addition makes 16 or 12. The UNet has 11.55
million such values in a 512x512 image: 23 MB less forward, 1.5 % of the least it moves, and 46 MB backward.

Large means. Sums of squares lose the variance if the mean is large relative to the deviation, so a tile's sum
of squares is taken around its own mean, and two sets are joined by (Chan, Golub & LeVeque 1983, Eq. 2.1)

    mean = mean_1 + delta n_2 / n       m2 = m2_1 + m2_2 + delta^2 n_1 n_2 / n       delta = mean_2 - mean_1

Every sum has a fixed order and there are no atomic additions: repeated runs are bit-identical.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

# A tile is 64 pixels x 64 channels: rows of 128 bytes, 32 float32 values for each of 128 threads. 64 divides
# every width of Stable Diffusion; the miniatures use narrower tiles.
PIXELS, CHANNELS, WARPS = 64, 64, 4
# Tiles that one program processes in sequence: one up to 64x64 pixels, to fill the GPU; several on larger
# maps, so that there are fewer sums to merge.
MOST_TILES = 8
MERGED = 64  # sums of tiles that the merge reads at once
# The most values that a program holds of a whole group, padded to powers of two: of x forward, of x and dy
# backward; and those in each of its threads, which have 128 registers if there are 512.
HELD, EACH = 2**15, 64
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def group_norm(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool, shift: Tensor | None = None
) -> Tensor:
    """group_norm(x + shift), and SiLU of it: `(B, C, H, W)` -> `(B, C, H, W)` of x's type, channels-last.

    x is bfloat16, float16 or float32; if it is not channels-last in memory it is copied once. weight and bias
    `(C,)` and shift `(B, C)` have any floating type (float32 under autocast); all arithmetic is in float32.
    Differentiable once, in x, weight, bias and shift.
    """
    return checked(x, groups, weight, bias, eps, silu, shift, None)[0]


def add_group_norm(
    x: Tensor, residual: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """x + residual, and its group_norm: two maps of x's shape and type, channels-last; x is left as it is."""
    return checked(x, groups, weight, bias, eps, False, None, residual)[1::-1]


def checked(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool,
    shift: Tensor | None, residual: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`forward`, of inputs that it can take, laid out as it needs them."""
    assert x.ndim == 4 and x.dtype in DTYPES, (
        f"x is {x.dtype} {tuple(x.shape)}: give a map (B, C, H, W) of bfloat16, float16 or float32"
    )
    C = x.shape[1]
    assert groups > 0 and C % groups == 0, f"{C} channels cannot be split into {groups} groups"
    assert weight.shape == bias.shape == (C,), (
        f"weight is {tuple(weight.shape)} and bias {tuple(bias.shape)}: give ({C},), one value per channel"
    )
    assert shift is None or shift.shape == x.shape[:2], (
        f"shift is {tuple(shift.shape)}: give {tuple(x.shape[:2])}, one value per image and channel"
    )
    assert residual is None or (residual.shape, residual.dtype) == (x.shape, x.dtype), (
        f"residual is {residual.dtype} {tuple(residual.shape)}: give {x.dtype} {tuple(x.shape)}, as x"
    )
    assert x.numel() > 0, f"x is {tuple(x.shape)}: an empty map has no mean"
    assert x.device.type != "cpu" or not isinstance(normalize, triton.JITFunction), (
        "x is on the CPU: Triton's kernels run there only with TRITON_INTERPRET=1 in the environment"
    )
    assert x.dtype != torch.bfloat16 or isinstance(normalize, triton.JITFunction), (
        "x is bfloat16, to which Triton's interpreter (3.7.1) truncates: give float16 or float32"
    )
    x = x.contiguous(memory_format=torch.channels_last)
    shift = None if shift is None else shift.contiguous()
    residual = None if residual is None else residual.contiguous(memory_format=torch.channels_last)
    return forward(x, groups, weight, bias, eps, silu, shift, residual)


def tiling(x: Tensor, groups: int) -> tuple[tuple[int, int, int], dict[str, int], dict[str, int]]:
    """The grid (channels, pixels, B) of programs, their sizes, and those of the programs that merge."""
    (B, C, H, W), D = x.shape, x.shape[1] // groups
    channels = min(CHANNELS, triton.next_power_of_2(C))
    tiles = int(max(1, min(MOST_TILES, H * W // 4096)))  # int: H and W may be symbols
    grid = (triton.cdiv(C, channels), triton.cdiv(H * W, tiles * PIXELS), B)
    sizes = {"P": H * W, "C": C, "PIXELS": PIXELS, "CHANNELS": channels, "TILES": tiles, "num_warps": WARPS}
    merged = {"P": H * W, "C": C, "S": grid[1], "D": D, "WIDTH": triton.next_power_of_2(D), "MERGED": MERGED}
    return grid, sizes, merged


def whole(x: Tensor, groups: int, maps: int) -> dict[str, int] | None:
    """The sizes of the programs that hold a whole group of so many maps; None if it does not fit."""
    (_, C, H, W), D = x.shape, x.shape[1] // groups
    width = triton.next_power_of_2(int(D))
    if maps * H * W * width > HELD:
        return None
    pixels = triton.next_power_of_2(int(H) * int(W))  # int: sizes may be symbols
    warps = max(1, min(16, maps * pixels * width // (32 * EACH)))
    sizes = {"P": H * W, "C": C, "groups": groups, "D": D, "PIXELS": pixels, "WIDTH": width}
    return sizes | {"num_warps": warps}


@triton_op("tada::group_norm", mutates_args=())
def forward(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool,
    shift: Tensor | None, residual: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y; x + residual, empty without residual; each group's mean and rstd `(B, G)` float32 for `backward`."""
    B, C = x.shape[:2]
    y, total = torch.empty_like(x), x.new_empty(0) if residual is None else torch.empty_like(x)
    mean, rstd = (torch.empty(B, groups, dtype=torch.float32, device=x.device) for _ in range(2))
    addends, arguments = (x, residual, total), (shift, y, mean, rstd, weight, bias)
    if held := whole(x, groups, maps=1):
        wrap_triton(whole_forward)[(groups, 1, B)](*addends, *arguments, eps=eps, SILU=silu, **held)
        return y, total, mean, rstd

    grid, sizes, merged = tiling(x, groups)
    tile_mean, tile_m2 = (torch.empty(B, grid[1], C, dtype=torch.float32, device=x.device) for _ in range(2))
    wrap_triton(measure)[grid](*addends, tile_mean, tile_m2, **sizes)
    span = sizes["TILES"] * PIXELS
    wrap_triton(merge)[(groups, B)](tile_mean, tile_m2, shift, mean, rstd, eps=eps, SPAN=span, **merged)
    summed = x if residual is None else total
    wrap_triton(normalize)[grid](summed, *arguments, groups=groups, D=merged["D"], SILU=silu, **sizes)
    return y, total, mean, rstd


@triton_op("tada::group_norm_backward", mutates_args=())
def backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, silu: bool,
    shift: Tensor | None, mean: Tensor, rstd: Tensor, dsum: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dx; dbias and dweight in one float32 tensor `(2, C)`; parts of dshift `(B, S, C)`, none without shift.

    All maps are channels-last. x is the sum if there was a residual, and dsum its gradient from elsewhere.
    """
    (B, C), groups = x.shape[:2], mean.shape[1]
    held, (grid, sizes, merged) = whole(x, groups, maps=2), tiling(x, groups)
    parts = 0 if shift is None else 1 if held else grid[1]
    dx = torch.empty_like(x)
    dshift = torch.empty(B, parts, C, dtype=torch.float32, device=x.device)
    sums = torch.empty(2, B, C, dtype=torch.float32, device=x.device)  # of dz and dz xhat, over an image
    arguments = dy, x, shift, mean, rstd, weight, bias
    if held:
        wrap_triton(whole_backward)[(groups, 1, B)](*arguments, sums, dsum, dx, dshift, SILU=silu, **held)
        return dx, sums.sum(dim=1), dshift

    sizes |= {"groups": groups, "D": merged["D"], "SILU": silu}
    tile_sums = torch.empty(2, B, grid[1], C, dtype=torch.float32, device=x.device)  # of dz, and of dz xhat
    means = torch.empty(2, B, groups, dtype=torch.float32, device=x.device)  # of weight dz (xhat)
    wrap_triton(measure_backward)[grid](*arguments, tile_sums, **sizes)
    wrap_triton(merge_backward)[(groups, B)](tile_sums, weight, sums, means, **merged)
    wrap_triton(normalize_backward)[grid](*arguments, means, dsum, dx, dshift, **sizes)
    return dx, sums.sum(dim=1), dshift


def keep(ctx, inputs, output) -> None:
    x, _, weight, bias, _, ctx.silu, shift, residual = inputs
    _, total, *statistics = output
    ctx.added = residual is not None
    ctx.save_for_backward(total if ctx.added else x, weight, bias, shift, *statistics)
    ctx.mark_non_differentiable(*statistics)


def differentiate(ctx, dy: Tensor, dsum: Tensor, *_) -> tuple[Tensor | None, ...]:
    x, weight, bias, shift, mean, rstd = ctx.saved_tensors
    dy = dy.contiguous(memory_format=torch.channels_last)
    dsum = dsum.contiguous(memory_format=torch.channels_last) if ctx.added else None
    dx, (dbias, dweight), parts = backward(dy, x, weight, bias, ctx.silu, shift, mean, rstd, dsum)
    dshift = None if shift is None else parts.sum(dim=1).to(shift.dtype)
    dresidual = dx if ctx.added else None
    return dx, None, dweight.to(weight.dtype), dbias.to(bias.dtype), None, None, dshift, dresidual


forward.register_autograd(differentiate, setup_context=keep)


@triton.jit
def tile_at(tile, c, own, P, C, PIXELS: tl.constexpr):
    """The start of the image's `tile`-th tile, in values; the offsets in it; which of them are real.

    c: the program's channels, of which those are real that are its `own`.
    """
    first = tile * PIXELS
    start = (tl.program_id(2).to(tl.int64) * P + first) * C  # over 2^31 values at batch 64 of the VAE
    p = tl.arange(0, PIXELS)
    return start, p[:, None] * C + c[None, :], (first + p < P)[:, None] & own[None, :]


@triton.jit
def joined(n1, mean1, m2_1, n2, mean2, m2_2):
    """Count, mean and sum of squares around it of two sets together; either may be empty."""
    n = n1 + n2
    delta = mean2 - mean1
    share = n2 / tl.maximum(n, 1)
    return n, mean1 + delta * share, m2_1 + m2_2 + delta * delta * n1 * share


@triton.jit
def load_x(X, RESIDUAL, SUM, at, real):
    """x, float32; with a residual, their sum as it is stored, rounded."""
    x = tl.load(X + at, mask=real, other=0)
    if RESIDUAL is not None:
        residual = tl.load(RESIDUAL + at, mask=real, other=0).to(tl.float32)
        x = (x.to(tl.float32) + residual).to(SUM.dtype.element_ty)
        tl.store(SUM + at, x, mask=real)
    return x.to(tl.float32)


@triton.jit
def measure(
    X, RESIDUAL, SUM, MEAN, M2, P, C,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Each channel's mean and sum of squares around it, over this program's TILES tiles: (B, S, C)."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    n, mean, m2 = 0.0, tl.zeros([CHANNELS], tl.float32), tl.zeros([CHANNELS], tl.float32)
    for i in range(TILES):
        tile = tl.program_id(1) * TILES + i
        start, offsets, real = tile_at(tile, c, c < C, P, C, PIXELS)
        x = load_x(X, RESIDUAL, SUM, start + offsets, real)
        count = tl.minimum(tl.maximum(P - tile * PIXELS, 0), PIXELS).to(tl.float32)
        tile_mean = tl.sum(x, axis=0) / tl.maximum(count, 1)
        centred = tl.where(real, x - tile_mean[None, :], 0)
        n, mean, m2 = joined(n, mean, m2, count, tile_mean, tl.sum(centred * centred, axis=0))
    row = (tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * C
    tl.store(MEAN + row + c, mean, mask=c < C)
    tl.store(M2 + row + c, m2, mask=c < C)


@triton.jit
def merge(
    TILE_MEAN, TILE_M2, SHIFT, MEAN, RSTD, P, C, S, eps,
    SPAN: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    """One group of one image: mean and rstd from its D channels' S means and sums of squares, (B, G)."""
    g, b, groups = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    d = tl.arange(0, WIDTH)
    n, mean, m2 = 0.0, 0.0, 0.0
    for top in range(0, S, MERGED):
        s = top + tl.arange(0, MERGED)
        real = (s < S)[:, None] & (d < D)[None, :]
        at = (b * S + s)[:, None] * C + g * D + d[None, :]
        channel_mean = tl.load(TILE_MEAN + at, mask=real, other=0)
        if SHIFT is not None:
            channel_mean += tl.load(SHIFT + b * C + g * D + d, mask=d < D, other=0).to(tl.float32)[None, :]
        channel_m2 = tl.load(TILE_M2 + at, mask=real, other=0)
        pixels = tl.minimum(P - s * SPAN, SPAN)[:, None]
        count = tl.where(real, pixels, 0).to(tl.float32)

        block_n = tl.sum(count)
        block_mean = tl.sum(count * channel_mean) / block_n
        delta = channel_mean - block_mean
        n, mean, m2 = joined(n, mean, m2, block_n, block_mean, tl.sum(channel_m2 + count * delta * delta))
    tl.store(MEAN + b * groups + g, mean)
    tl.store(RSTD + b * groups + g, 1 / tl.sqrt_rn(m2 / n + eps))


@triton.jit
def channel_values(g, c, own, SHIFT, MEAN, RSTD, WEIGHT, BIAS, C):
    """Mean (less the shift) and rstd of the group, weight and bias, for each of the channels c; float32.

    g: the groups of the channels among those of all images, or the one of all of them.
    """
    mean, rstd = tl.broadcast_to(tl.load(MEAN + g), c.shape), tl.broadcast_to(tl.load(RSTD + g), c.shape)
    if SHIFT is not None:
        mean -= tl.load(SHIFT + tl.program_id(2) * C + c, mask=own, other=0).to(tl.float32)
    weight = tl.load(WEIGHT + c, mask=own, other=0).to(tl.float32)
    bias = tl.load(BIAS + c, mask=own, other=0).to(tl.float32)
    return mean[None, :], rstd[None, :], weight[None, :], bias[None, :]


@triton.jit
def normalize(
    X, SHIFT, Y, MEAN, RSTD, WEIGHT, BIAS, P, C, groups,
    D: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, TILES: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """y, from the statistics."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    g = tl.program_id(2) * groups + tl.minimum(c, C - 1) // D
    mean, rstd, weight, bias = channel_values(g, c, c < C, SHIFT, MEAN, RSTD, WEIGHT, BIAS, C)
    for i in range(TILES):
        start, offsets, real = tile_at(tl.program_id(1) * TILES + i, c, c < C, P, C, PIXELS)
        x = tl.load(X + start + offsets, mask=real, other=0).to(tl.float32)
        z = (x - mean) * (rstd * weight) + bias
        y = z / (1 + tl.exp(-z)) if SILU else z
        tl.store(Y + start + offsets, y.to(Y.dtype.element_ty), mask=real)


@triton.jit
def whole_forward(
    X, RESIDUAL, SUM, SHIFT, Y, MEAN, RSTD, WEIGHT, BIAS, P, C, groups, eps,
    D: tl.constexpr, PIXELS: tl.constexpr, WIDTH: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """One group of one image: its mean and rstd (B, G), and y."""
    g, b, d = tl.program_id(0), tl.program_id(2), tl.arange(0, WIDTH)
    c, own = g * D + d, d < D
    start, offsets, real = tile_at(0, c, own, P, C, PIXELS)
    x = load_x(X, RESIDUAL, SUM, start + offsets, real)
    if SHIFT is not None:
        x += tl.load(SHIFT + b * C + c, mask=own, other=0).to(tl.float32)[None, :]
    mean = tl.sum(tl.where(real, x, 0)) / (P * D)
    centred = tl.where(real, x - mean, 0)
    rstd = 1 / tl.sqrt_rn(tl.sum(centred * centred) / (P * D) + eps)
    tl.store(MEAN + b * groups + g, mean)
    tl.store(RSTD + b * groups + g, rstd)

    weight = tl.load(WEIGHT + c, mask=own, other=0).to(tl.float32)[None, :]
    bias = tl.load(BIAS + c, mask=own, other=0).to(tl.float32)[None, :]
    z = centred * (rstd * weight) + bias
    y = z / (1 + tl.exp(-z)) if SILU else z
    tl.store(Y + start + offsets, y.to(Y.dtype.element_ty), mask=real)


@triton.jit
def dz_xhat(DY, X, start, offsets, real, mean, rstd, weight, bias, SILU: tl.constexpr):
    """The gradient of z (0 where not real), and xhat."""
    x = tl.load(X + start + offsets, mask=real, other=0).to(tl.float32)
    dz = tl.load(DY + start + offsets, mask=real, other=0).to(tl.float32)
    xhat = (x - mean) * rstd
    if SILU:
        z = xhat * weight + bias
        sigma = 1 / (1 + tl.exp(-z))
        dz *= sigma * (1 + z * (1 - sigma))
    return dz, xhat


@triton.jit
def measure_backward(
    DY, X, SHIFT, MEAN, RSTD, WEIGHT, BIAS, TILE_SUMS, P, C, groups,
    D: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, TILES: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Each channel's sum of dz and sum of dz xhat, over this program's TILES tiles: (2, B, S, C)."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    g = tl.program_id(2) * groups + tl.minimum(c, C - 1) // D
    mean, rstd, weight, bias = channel_values(g, c, c < C, SHIFT, MEAN, RSTD, WEIGHT, BIAS, C)
    sum_dz, sum_dz_xhat = tl.zeros([CHANNELS], tl.float32), tl.zeros([CHANNELS], tl.float32)
    for i in range(TILES):
        start, offsets, real = tile_at(tl.program_id(1) * TILES + i, c, c < C, P, C, PIXELS)
        dz, xhat = dz_xhat(DY, X, start, offsets, real, mean, rstd, weight, bias, SILU)
        sum_dz += tl.sum(dz, axis=0)
        sum_dz_xhat += tl.sum(dz * xhat, axis=0)
    S, B = tl.num_programs(1), tl.num_programs(2)
    row = tl.program_id(2) * S + tl.program_id(1)
    tl.store(TILE_SUMS + row * C + c, sum_dz, mask=c < C)
    tl.store(TILE_SUMS + (B * S + row) * C + c, sum_dz_xhat, mask=c < C)


@triton.jit
def merge_backward(
    TILE_SUMS, WEIGHT, SUMS, MEANS, P, C, S,
    D: tl.constexpr, WIDTH: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    """One group of one image: its D channels' sums (2, B, C), the means of weight dz (xhat) (2, B, G)."""
    g, b, groups, B = tl.program_id(0), tl.program_id(1), tl.num_programs(0), tl.num_programs(1)
    d = tl.arange(0, WIDTH)
    c = g * D + d
    weight = tl.load(WEIGHT + c, mask=d < D, other=0).to(tl.float32)
    for which in range(2):
        total = tl.zeros([WIDTH], tl.float32)
        for top in range(0, S, MERGED):
            s = top + tl.arange(0, MERGED)
            real = (s < S)[:, None] & (d < D)[None, :]
            row = (which * B + b) * S + s
            total += tl.sum(tl.load(TILE_SUMS + row[:, None] * C + c[None, :], mask=real, other=0), axis=0)
        tl.store(SUMS + (which * B + b) * C + c, total, mask=d < D)
        tl.store(MEANS + (which * B + b) * groups + g, tl.sum(weight * total) / (P * D))


@triton.jit
def normalize_backward(
    DY, X, SHIFT, MEAN, RSTD, WEIGHT, BIAS, MEANS, DSUM, DX, DSHIFT, P, C, groups,
    D: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, TILES: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """dx, from the means of weight dz and of weight dz xhat; each channel's sum of it (B, S, C)."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    g = tl.program_id(2) * groups + tl.minimum(c, C - 1) // D
    mean, rstd, weight, bias = channel_values(g, c, c < C, SHIFT, MEAN, RSTD, WEIGHT, BIAS, C)
    of_dz = tl.load(MEANS + g)[None, :]
    of_dz_xhat = tl.load(MEANS + tl.num_programs(2) * groups + g)[None, :]
    sum_dx = tl.zeros([CHANNELS], tl.float32)
    for i in range(TILES):
        start, offsets, real = tile_at(tl.program_id(1) * TILES + i, c, c < C, P, C, PIXELS)
        dz, xhat = dz_xhat(DY, X, start, offsets, real, mean, rstd, weight, bias, SILU)
        dx = rstd * (weight * dz - of_dz - xhat * of_dz_xhat)
        if DSUM is not None:
            dx += tl.load(DSUM + start + offsets, mask=real, other=0).to(tl.float32)
        tl.store(DX + start + offsets, dx.to(DX.dtype.element_ty), mask=real)
        if SHIFT is not None:
            sum_dx += tl.sum(tl.where(real, dx, 0), axis=0)
    if SHIFT is not None:
        row = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
        tl.store(DSHIFT + row * C + c, sum_dx, mask=c < C)


@triton.jit
def whole_backward(
    DY, X, SHIFT, MEAN, RSTD, WEIGHT, BIAS, SUMS, DSUM, DX, DSHIFT, P, C, groups,
    D: tl.constexpr, PIXELS: tl.constexpr, WIDTH: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """One group of one image: its D channels' sums of dz and dz xhat (2, B, C), dx and its sums (B, 1, C)."""
    b, B, d = tl.program_id(2), tl.num_programs(2), tl.arange(0, WIDTH)
    c, own = tl.program_id(0) * D + d, d < D
    g = b * groups + tl.program_id(0)
    mean, rstd, weight, bias = channel_values(g, c, own, SHIFT, MEAN, RSTD, WEIGHT, BIAS, C)
    start, offsets, real = tile_at(0, c, own, P, C, PIXELS)
    dz, xhat = dz_xhat(DY, X, start, offsets, real, mean, rstd, weight, bias, SILU)
    sum_dz, sum_dz_xhat = tl.sum(dz, axis=0)[None, :], tl.sum(dz * xhat, axis=0)[None, :]
    tl.store(SUMS + b * C + c[None, :], sum_dz, mask=own[None, :])
    tl.store(SUMS + (B + b) * C + c[None, :], sum_dz_xhat, mask=own[None, :])

    of_dz, of_dz_xhat = tl.sum(weight * sum_dz) / (P * D), tl.sum(weight * sum_dz_xhat) / (P * D)
    dx = rstd * (weight * dz - of_dz - xhat * of_dz_xhat)
    if DSUM is not None:
        dx += tl.load(DSUM + start + offsets, mask=real, other=0).to(tl.float32)
    tl.store(DX + start + offsets, dx.to(DX.dtype.element_ty), mask=real)
    if SHIFT is not None:
        tl.store(DSHIFT + b * C + c, tl.sum(tl.where(real, dx, 0), axis=0), mask=own)
