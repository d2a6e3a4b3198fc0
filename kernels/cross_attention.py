"""Attention of many queries to few keys, forward and backward, as Triton kernels that never write the scores.

What is computed. One head of one image has queries Q (N, d), keys K (M, d) and values V (M, d). With
c = log2(e) / sqrt(d), since 2^x is what a GPU computes,

    S = c Q K^T        L_i = log2 sum_j 2^S_ij        P = 2^(S - L)        O = P V

is softmax(Q K^T / sqrt(d)) V. The scores S (N, M) are made tile by tile and stay on the chip: of a tile's
rows only the largest score and the sum of powers are carried to the next tile of keys, and what was summed
before is shrunk when a larger score comes ("online softmax", Milakov and Gimelshein 2018; FlashAttention, Dao
et al. 2022). The 77 keys of a text are two tiles.

The gradient. Given dO, and P made again from Q, K and the saved L, the chain rule through O = P V, the
softmax and S gives

    dV = P^T dO        dP = dO V^T        dS = P * (dP - delta)        delta_i = sum_j P_ij dP_ij = dO_i . O_i
    dQ = dS K / sqrt(d)                   dK = dS^T Q / sqrt(d)

dQ sums over keys and dK, dV over queries, so two kernels share the work. The second splits the queries among
programs, since few keys alone would leave most of the GPU idle; each program writes its own float32 part, and
a third kernel adds the parts in their order. No atomic addition: the same inputs give the same bits.

Shapes that fit. A tile's sides must be powers of two, and 40, 80 and 160 are not: a head is split into two
tiles, 32 + 16 (8 of them used), 64 + 16 and 128 + 32, instead of one of 64, 128 and 256. The keys are split
likewise: 77 are 64 + 16, 150 are 64 + 64 + 32. Offsets that could overflow 32 bits have 64.

In this order: the public function, block sizes by shape, the launches, the kernels.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import triton_op, wrap_triton

from .reference import RESIDENT

LOG2E = 1.4426950408889634


def cross_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for every head: `(B, N, n, d), (B, M, n, d), (B, M, n, d) -> (B, N, n, d)`.

    bfloat16 or float16 on a GPU, float16 or float32 in Triton's interpreter; under autocast, its type. d is a
    multiple of 8 up to 160; N and M are any. The stride of d must be 1; the other strides are free, so k and
    v may be slices of one wide product. `lengths (B,)`, int32 or int64: how many keys of each image are real,
    1..M (not checked: reading them would synchronise the GPU); None means all. Keys and values that are not
    real are not read. The same inputs give the same bits, also in the gradients.
    """
    q, k, v = cast_for_autocast(q, k, v)
    check(q, k, v, lengths)
    return CrossAttention.apply(q, k, v, lengths)


def cast_for_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    device = tensors[0].device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in tensors)


def check(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> None:
    """Check shapes, types, strides and devices only: reading values would synchronise the GPU."""
    (B, N, n, d), M = q.shape, k.shape[1]
    assert k.shape == v.shape == (B, M, n, d) and min(B, N, M, n) > 0, (
        f"q, k and v are {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}: "
        "give (B, N, n, d), (B, M, n, d) and (B, M, n, d), none empty"
    )
    assert d % 8 == 0 and d <= 160, (
        f'heads are {d} wide: give a multiple of 8 up to 160, or choose use("torch")'
    )
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1, (
        f"the strides are {q.stride()}, {k.stride()} and {v.stride()}: "
        "the last must be 1, as .contiguous() makes it"
    )
    types = (torch.float16, torch.float32) if INTERPRETED else (torch.float16, torch.bfloat16)
    assert q.dtype == k.dtype == v.dtype and q.dtype in types, (
        f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}: cast all to {types[0]} or all to {types[1]}, "
        f'which are right {"in the interpreter" if INTERPRETED else "on a GPU"}, or choose use("torch")'
    )
    assert q.device == k.device == v.device, f"q, k and v are on {q.device}, {k.device} and {v.device}"
    assert q.device.type != "cpu" or INTERPRETED, (
        'q is on the CPU: set TRITON_INTERPRET=1 before Triton is imported, or choose use("torch")'
    )
    if lengths is not None:
        assert lengths.shape == (B,) and lengths.dtype in (torch.int32, torch.int64), (
            f"lengths is {lengths.dtype} {tuple(lengths.shape)}: give int32 or int64, ({B},)"
        )
        assert lengths.device == q.device, f"lengths is on {lengths.device}, not on {q.device}"


class CrossAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> Tensor:
        o, sums = forward(q, k, v, lengths)
        ctx.save_for_backward(q, k, v, lengths, o, sums)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, do: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, lengths, o, sums = ctx.saved_tensors
        do = do if do.stride(-1) == 1 else do.contiguous()  # the gradient of .sum() has stride 0
        dq, dkv = backward(q, k, v, lengths, o, sums, do)
        return dq, dkv[0], dkv[1], None


# Block sizes by shape.


def power_of_two(size: int) -> int:
    """The smallest one that is neither below `size` nor below 16, the least side of a tile."""
    power = 16
    while power < size:
        power *= 2
    return power


def split(size: int) -> tuple[int, int]:
    """Two sides of tiles that cover `size` together: 40 -> 32 + 16, 80 -> 64 + 16, 160 -> 128 + 32.

    The second one is wasted where the size is 8 or 16, which only the miniature has.
    """
    first = max(16, power_of_two(size) // 2)
    return first, power_of_two(size - first)


def key_tiles(M: int) -> dict[str, int]:
    """How many keys are in whole tiles, and the side of one more tile for the rest: 77 -> 64 and 16.

    Contexts longer than RESIDENT share one kernel, whose number of keys is a run-time value (WHOLE = -1).
    """
    if M > RESIDENT:
        return {"TILE": KEY_TILE, "WHOLE": -1, "REST": 0}
    whole = M // KEY_TILE * KEY_TILE
    rest = power_of_two(M - whole) if whole < M else 0
    if rest == KEY_TILE:
        whole, rest = whole + rest, 0
    return {"TILE": KEY_TILE, "WHOLE": whole, "REST": rest}


# Rows per block of queries and warps, by the first part of the head's width: these compile for sm_90 without
# spills and to its own matrix instructions, which take 64 rows (tests/test_kernels_aot_cross_attention.py).
# Not timed on a GPU yet.
FORWARD = {16: (64, 4), 32: (128, 8), 64: (128, 8), 128: (64, 8)}
QUERIES = {16: (64, 4), 32: (64, 4), 64: (64, 4), 128: (64, 8)}  # delta and dQ
KEYS = {16: (64, 4), 32: (64, 4), 64: (64, 8), 128: (32, 8)}  # dK and dV
STAGES = 2  # a loop loads the next tile while it computes with this one
KEY_TILE = 64
PROGRAMS = 132  # multiprocessors of an H100 or H200: at most so many programs share dK and dV


def query_parts(B: int, N: int, n: int, M: int, rows: int) -> tuple[int, int]:
    """The number of parts into which dK and dV split the queries, and the queries of each.

    Both depend on the shape alone: the order of the sums, and so the bits of the result, must not depend on
    the GPU or on its load.
    """
    blocks = triton.cdiv(N, rows)
    parts = max(1, PROGRAMS // (B * n * triton.cdiv(M, KEY_TILE)))
    each = triton.cdiv(blocks, min(parts, blocks))
    return triton.cdiv(blocks, each), each * rows


def constants(**tensors: Tensor) -> dict[str, int]:
    """What a kernel is compiled for: heads, their width, its two parts, and from one head to the next.

    The last is a constant and not an argument: loads of 16 bytes require that 8 divides it, and for arguments
    Triton only checks whether 16 does, which does not divide 40.
    """
    n, d = tensors["Q"].shape[2:]
    d1, d2 = split(d)
    heads = {f"{name}_HEAD": x.stride(2) for name, x in tensors.items()}
    return {"HEADS": n, "D": d, "D1": d1, "D2": d2, **heads}


def strides(*tensors: Tensor) -> list[int]:
    """From one image to the next, and from one row of an image to the next."""
    return [x.stride(i) for x in tensors for i in (0, 1)]


# The launches. Each is an operator that torch.compile can trace; the interpreter cannot run inside one.


def launches(function: Callable) -> Callable:
    """Wrap the function as the operator `tada::...`; on a CPU, for the interpreter, call it directly."""
    operator = triton_op(f"tada::cross_attention_{function.__name__}", function, mutates_args={})

    def launch(q: Tensor, *rest: Tensor | None):
        return (function if q.is_cpu else operator)(q, *rest)

    return launch


def on(x: Tensor, kernel: Callable) -> Callable:
    """The kernel, wrapped for torch.compile; on a CPU as it is."""
    return kernel if x.is_cpu else wrap_triton(kernel)


@launches
def forward(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """O `(B, N, n, d)` and L `(B, n, N)` float32."""
    (B, N, n, d), M = q.shape, k.shape[1]
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    sums = torch.empty(B, n, N, dtype=torch.float32, device=q.device)
    rows, warps = FORWARD[split(d)[0]]
    on(q, forward_kernel)[(n, triton.cdiv(N, rows), B)](
        q, k, v, lengths, o, sums, N, M, d**-0.5 * LOG2E, *strides(q, k, v),
        **constants(Q=q, K=k, V=v), **key_tiles(M), ROWS=rows, num_warps=warps, num_stages=STAGES,
    )  # fmt: skip
    return o, sums


@launches
def backward(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, o: Tensor, sums: Tensor, do: Tensor
) -> tuple[Tensor, Tensor]:
    """dQ `(B, N, n, d)`, and dK and dV in one tensor `(2, B, M, n, d)`."""
    (B, N, n, d), M = q.shape, k.shape[1]
    slope, compiled = d**-0.5, constants(Q=q, K=k, V=v, DO=do)

    dq, delta = torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty_like(sums)
    rows, warps = QUERIES[compiled["D1"]]
    on(q, queries_kernel)[(n, triton.cdiv(N, rows), B)](
        q, k, v, lengths, o, sums, do, delta, dq, N, M, slope * LOG2E, slope, *strides(q, k, v, do),
        **compiled, **key_tiles(M), ROWS=rows, num_warps=warps, num_stages=STAGES,
    )  # fmt: skip

    rows, warps = KEYS[compiled["D1"]]
    parts, each = query_parts(B, N, n, M, rows)
    dkv = torch.empty(2, B, M, n, d, dtype=k.dtype, device=q.device)
    partial = dkv if parts == 1 else torch.empty(parts, *dkv.shape, dtype=torch.float32, device=q.device)
    on(q, keys_kernel)[(triton.cdiv(M, KEY_TILE) * n, parts, B)](
        q, k, v, lengths, sums, do, delta, partial, N, M, each, slope * LOG2E, slope, *strides(q, k, v, do),
        **compiled, TILE=KEY_TILE, ROWS=rows, num_warps=warps, num_stages=STAGES,
    )  # fmt: skip
    if parts > 1:
        size, block = dkv.numel(), 1024
        on(q, sum_kernel)[(triton.cdiv(size, block),)](partial, dkv, size, parts, BLOCK=block)
    return dq, dkv


# The kernels. Q, K, ... are pointers; q, k, ... are pairs of tiles, the two parts of a head's width. A
# program moves its pointers to its image, head and first row at once, in 64 bits, and counts rows from there.


@triton.jit
def forward_kernel(
    Q, K, V, LENGTHS, O, SUMS, N, M, scale, q_image, q_row, k_image, k_row, v_image, v_row,
    HEADS: tl.constexpr, Q_HEAD: tl.constexpr, K_HEAD: tl.constexpr, V_HEAD: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, WHOLE: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """O and L of ROWS queries of one head."""
    head, image = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    first = tl.program_id(1).to(tl.int64) * ROWS
    length = real_keys(LENGTHS, image, M)
    Q += image * q_image + head * Q_HEAD + first * q_row
    K += image * k_image + head * K_HEAD
    V += image * v_image + head * V_HEAD
    q = load(Q, q_row, N - first, ROWS, D, D1, D2)

    top = tl.full((ROWS,), float("-inf"), tl.float32)
    state = (top, tl.zeros((ROWS,), tl.float32), zeros(ROWS, D1, D2))  # largest score, sum of powers, O
    for key in range(0, length if WHOLE < 0 else WHOLE, TILE):
        state = attend(state, q, K, V, key, length, scale, k_row, v_row, D, D1, D2, TILE)
    if REST > 0:
        state = attend(state, q, K, V, WHOLE, length, scale, k_row, v_row, D, D1, D2, REST)

    top, total, o = state
    O += ((image * N + first) * HEADS + head) * D
    store(O, HEADS * D, N - first, o, 1 / total[:, None], ROWS, D, D1, D2)
    row = tl.arange(0, ROWS)
    tl.store(SUMS + (image * HEADS + head) * N + first + row, top + tl.log2(total), mask=row < N - first)


@triton.jit
def attend(
    state, q, K, V, key, length, scale, k_row, v_row,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The state after one more tile of keys, which begins at `key`."""
    top, total, o = state
    k = load(K + tl.cast(key, tl.int64) * k_row, k_row, length - key, TILE, D, D1, D2)
    v = load(V + tl.cast(key, tl.int64) * v_row, v_row, length - key, TILE, D, D1, D2)
    p, shrink, top, total = soften(scores(q, k, scale, length - key, TILE), top, total)
    o = (o[0] * shrink[:, None], o[1] * shrink[:, None])
    return top, total, add_product(o, p, v)


@triton.jit
def queries_kernel(
    Q, K, V, LENGTHS, O, SUMS, DO, DELTA, DQ, N, M, scale, slope,
    q_image, q_row, k_image, k_row, v_image, v_row, do_image, do_row,
    HEADS: tl.constexpr, Q_HEAD: tl.constexpr, K_HEAD: tl.constexpr, V_HEAD: tl.constexpr,
    DO_HEAD: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, WHOLE: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """delta and dQ of ROWS queries of one head."""
    head, image = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    first = tl.program_id(1).to(tl.int64) * ROWS
    length = real_keys(LENGTHS, image, M)
    Q += image * q_image + head * Q_HEAD + first * q_row
    K += image * k_image + head * K_HEAD
    V += image * v_image + head * V_HEAD
    DO += image * do_image + head * DO_HEAD + first * do_row
    O += ((image * N + first) * HEADS + head) * D
    DQ += ((image * N + first) * HEADS + head) * D
    SUMS += (image * HEADS + head) * N + first
    DELTA += (image * HEADS + head) * N + first

    q = load(Q, q_row, N - first, ROWS, D, D1, D2)
    o = load(O, HEADS * D, N - first, ROWS, D, D1, D2)
    do = load(DO, do_row, N - first, ROWS, D, D1, D2)
    row = tl.arange(0, ROWS)
    sums = tl.load(SUMS + row, mask=row < N - first, other=0.0)
    delta = tl.sum(o[0].to(tl.float32) * do[0].to(tl.float32), 1)
    delta += tl.sum(o[1].to(tl.float32) * do[1].to(tl.float32), 1)
    tl.store(DELTA + row, delta, mask=row < N - first)

    dq = zeros(ROWS, D1, D2)
    for key in range(0, length if WHOLE < 0 else WHOLE, TILE):
        dq = descend(dq, q, do, sums, delta, K, V, key, length, scale, k_row, v_row, D, D1, D2, TILE)
    if REST > 0:
        dq = descend(dq, q, do, sums, delta, K, V, WHOLE, length, scale, k_row, v_row, D, D1, D2, REST)
    store(DQ, HEADS * D, N - first, dq, slope, ROWS, D, D1, D2)


@triton.jit
def descend(
    dq, q, do, sums, delta, K, V, key, length, scale, k_row, v_row,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """dQ, not scaled yet, after one more tile of keys, which begins at `key`."""
    k = load(K + tl.cast(key, tl.int64) * k_row, k_row, length - key, TILE, D, D1, D2)
    v = load(V + tl.cast(key, tl.int64) * v_row, v_row, length - key, TILE, D, D1, D2)
    p = tl.exp2(scores(q, k, scale, length - key, TILE) - sums[:, None])
    ds = p * (product(do, v) - delta[:, None])
    return add_product(dq, ds, k)


@triton.jit
def keys_kernel(
    Q, K, V, LENGTHS, SUMS, DO, DELTA, PARTIAL, N, M, each, scale, slope,
    q_image, q_row, k_image, k_row, v_image, v_row, do_image, do_row,
    HEADS: tl.constexpr, Q_HEAD: tl.constexpr, K_HEAD: tl.constexpr, V_HEAD: tl.constexpr,
    DO_HEAD: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """What `each` queries of one head add to dK and dV of TILE keys. The scores are keys by queries here."""
    head, image = (tl.program_id(0) % HEADS).to(tl.int64), tl.program_id(2).to(tl.int64)
    key, part = (tl.program_id(0) // HEADS).to(tl.int64) * TILE, tl.program_id(1).to(tl.int64)
    length = real_keys(LENGTHS, image, M)
    Q += image * q_image + head * Q_HEAD
    K += image * k_image + head * K_HEAD + key * k_row
    V += image * v_image + head * V_HEAD + key * v_row
    DO += image * do_image + head * DO_HEAD
    SUMS += (image * HEADS + head) * N
    DELTA += (image * HEADS + head) * N

    k = load(K, k_row, length - key, TILE, D, D1, D2)
    v = load(V, v_row, length - key, TILE, D, D1, D2)
    real = (tl.arange(0, TILE) < length - key)[:, None]
    dk, dv = zeros(TILE, D1, D2), zeros(TILE, D1, D2)
    row = tl.arange(0, ROWS)
    for first in range(part * each, tl.minimum(part * each + each, N), ROWS):
        q = load(Q + first * q_row, q_row, N - first, ROWS, D, D1, D2)
        do = load(DO + first * do_row, do_row, N - first, ROWS, D, D1, D2)
        sums = tl.load(SUMS + first + row, mask=row < N - first, other=0.0)
        delta = tl.load(DELTA + first + row, mask=row < N - first, other=0.0)
        p = tl.where(real, tl.exp2(product(k, q) * scale - sums[None, :]), 0.0)
        dv = add_product(dv, p, do)
        ds = p * (product(v, do) - delta[None, :])
        dk = add_product(dk, ds, q)

    images = tl.num_programs(2).to(tl.int64)
    DK = PARTIAL + (((2 * part * images + image) * M + key) * HEADS + head) * D
    DV = DK + images * M * HEADS * D
    store(DK, HEADS * D, M - key, dk, slope, TILE, D, D1, D2)
    store(DV, HEADS * D, M - key, dv, 1.0, TILE, D, D1, D2)


@triton.jit
def sum_kernel(PARTIAL, OUT, size, parts, BLOCK: tl.constexpr):
    """The sum of `parts` consecutive tensors of `size` numbers, in their order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(parts):
        total += tl.load(PARTIAL + at, mask=at < size, other=0.0)
        PARTIAL += size
    tl.store(OUT + at, total.to(OUT.dtype.element_ty), mask=at < size)


@triton.jit
def real_keys(LENGTHS, image, M):
    """The number of real keys of the image."""
    if LENGTHS is None:
        return M
    else:
        return tl.minimum(tl.load(LENGTHS + image).to(tl.int32), M)


@triton.jit
def scores(q, k, scale, count, TILE: tl.constexpr):
    """S of a block of queries and a tile of keys; -inf for keys from `count` on."""
    return tl.where(tl.arange(0, TILE)[None, :] < count, product(q, k) * scale, float("-inf"))


@triton.jit
def soften(s, top, total):
    """2^(s - the largest score so far), the factor of earlier powers, that score, the sum of all powers."""
    higher = tl.maximum(top, tl.max(s, 1))
    p, shrink = tl.exp2(s - higher[:, None]), tl.exp2(top - higher)
    return p, shrink, higher, total * shrink + tl.sum(p, 1)


@triton.jit
def product(a, b):
    """a b^T, in float32; "ieee" keeps float32 inputs from being rounded to tf32."""
    s = tl.dot(a[0], tl.trans(b[0]), input_precision="ieee")
    return tl.dot(a[1], tl.trans(b[1]), s, input_precision="ieee")


@triton.jit
def add_product(total, p, b):
    """total + p b, with p rounded to b's type as a matrix instruction needs it."""
    p = p.to(b[0].dtype)
    return (
        tl.dot(p, b[0], total[0], input_precision="ieee"),
        tl.dot(p, b[1], total[1], input_precision="ieee"),
    )


@triton.jit
def zeros(ROWS: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    return tl.zeros((ROWS, D1), tl.float32), tl.zeros((ROWS, D2), tl.float32)


@triton.jit
def load(X, stride, count, ROWS: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """The next ROWS rows of X; 0 from row `count` on, and beyond the width D."""
    row, left = tl.arange(0, ROWS)[:, None], tl.arange(0, D1)[None, :]
    right = D1 + tl.arange(0, D2)[None, :]
    X += row.to(tl.int64) * stride
    return (
        tl.load(X + left, mask=(row < count) & (left < D), other=0.0),
        tl.load(X + right, mask=(row < count) & (right < D), other=0.0),
    )


@triton.jit
def store(
    X, stride, count, x, factor, ROWS: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr
):  # fmt: skip
    """Store x times the factor, in the layout of `load`."""
    row, left = tl.arange(0, ROWS)[:, None], tl.arange(0, D1)[None, :]
    right = D1 + tl.arange(0, D2)[None, :]
    X += row.to(tl.int64) * stride
    tl.store(X + left, (x[0] * factor).to(X.dtype.element_ty), mask=(row < count) & (left < D))
    tl.store(X + right, (x[1] * factor).to(X.dtype.element_ty), mask=(row < count) & (right < D))


INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)
