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
    device = q.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        q, k, v = (x.to(torch.get_autocast_dtype(device)) for x in (q, k, v))
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
    assert lengths is None or (lengths.shape == (B,) and lengths.dtype in (torch.int32, torch.int64)), (
        f"lengths is {lengths.dtype} {tuple(lengths.shape)}: give int32 or int64, ({B},)"
    )
    assert lengths is None or lengths.device == q.device, f"lengths is on {lengths.device}, not on {q.device}"
    return forward(q, k, v, lengths)[0]


def power_of_two(size: int) -> int:
    """The smallest one that is neither below `size` nor below 16, the least side of a tile."""
    return next(x for x in (16, 32, 64, 128, 256) if x >= size)


def split(size: int) -> tuple[int, int]:
    """Two sides of tiles that cover `size` together: 40 -> 32 + 16, 80 -> 64 + 16, 160 -> 128 + 32."""
    first = max(16, power_of_two(size) // 2)
    return first, power_of_two(size - first)


def key_tiles(M: int) -> dict[str, int]:
    """How many keys are in whole tiles, and the side of one more tile for the rest: 77 -> 64 and 16."""
    if M > RESIDENT:  # all such contexts share one kernel, whose number of keys is a run-time value
        return {"TILE": KEY_TILE, "WHOLE": -1, "REST": 0}
    whole = (M + KEY_TILE // 2 - 1) // KEY_TILE * KEY_TILE  # a rest of more than half a tile has a whole one
    return {"TILE": KEY_TILE, "WHOLE": whole, "REST": power_of_two(M - whole) if whole < M else 0}


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
    """Parts of the queries for dK and dV, and the queries of each: by shape alone, which fixes the bits."""
    blocks = triton.cdiv(N, rows)
    parts = max(1, PROGRAMS // (B * n * triton.cdiv(M, KEY_TILE)))
    each = triton.cdiv(blocks, min(parts, blocks))
    return triton.cdiv(blocks, each), each * rows


def layout(**tensors: Tensor) -> dict[str, int | float]:
    """The kernels' arguments that follow from shapes and strides: from one image, row or head to the next.

    From head to head it is a constant and not an argument: loads of 16 bytes require that 8 divides it, and
    for arguments Triton only checks whether 16 does, which does not divide 40.
    """
    (N, n, d), M = tensors["q"].shape[1:], tensors["k"].shape[1]
    d1, d2 = split(d)
    arguments = {"N": N, "M": M, "scale": d**-0.5 * LOG2E, "HEADS": n, "D": d, "D1": d1, "D2": d2}
    for name, x in tensors.items():
        image, row, head, _ = x.stride()
        arguments |= {f"{name}_image": image, f"{name}_row": row, f"{name.upper()}_HEAD": head}
    return arguments


@triton_op("tada::cross_attention", mutates_args=())
def forward(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """O `(B, N, n, d)` and L `(B, n, N)` float32."""
    B, N, n, d = q.shape
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    sums = torch.empty(B, n, N, dtype=torch.float32, device=q.device)
    rows, warps = FORWARD[split(d)[0]]
    wrap_triton(forward_kernel)[(n, triton.cdiv(N, rows), B)](
        q, k, v, lengths, o, sums, **layout(q=q, k=k, v=v), **key_tiles(k.shape[1]),
        ROWS=rows, num_warps=warps, num_stages=STAGES,
    )  # fmt: skip
    return o, sums


@triton_op("tada::cross_attention_backward", mutates_args=())
def backward(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, o: Tensor, sums: Tensor, do: Tensor
) -> tuple[Tensor, Tensor]:
    """dQ `(B, N, n, d)`, and dK and dV in one tensor `(2, B, M, n, d)`."""
    (B, N, n, d), M = q.shape, k.shape[1]
    width, arguments = split(d)[0], layout(q=q, k=k, v=v, do=do) | {"slope": d**-0.5}

    dq, delta = torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty_like(sums)
    rows, warps = QUERIES[width]
    wrap_triton(queries_kernel)[(n, triton.cdiv(N, rows), B)](
        q, k, v, lengths, o, sums, do, delta, dq, **arguments, **key_tiles(M),
        ROWS=rows, num_warps=warps, num_stages=STAGES,
    )  # fmt: skip

    rows, warps = KEYS[width]
    parts, each = query_parts(B, N, n, M, rows)
    dkv = torch.empty(2, B, M, n, d, dtype=k.dtype, device=q.device)
    partial = dkv if parts == 1 else torch.empty(parts, *dkv.shape, dtype=torch.float32, device=q.device)
    wrap_triton(keys_kernel)[(triton.cdiv(M, KEY_TILE) * n, parts, B)](
        q, k, v, lengths, sums, do, delta, partial, **arguments, each=each, TILE=KEY_TILE,
        ROWS=rows, num_warps=warps, num_stages=STAGES,
    )  # fmt: skip
    if parts > 1:
        size, block = dkv.numel(), 1024
        wrap_triton(sum_kernel)[(triton.cdiv(size, block),)](partial, dkv, size, parts, BLOCK=block)
    return dq, dkv


def keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


@once_differentiable
def differentiate(ctx, do: Tensor, _) -> tuple[Tensor, Tensor, Tensor, None]:
    do = do if do.stride(-1) == 1 else do.contiguous()  # the gradient of .sum() has stride 0
    dq, dkv = backward(*ctx.saved_tensors, do)
    return dq, dkv[0], dkv[1], None


forward.register_autograd(differentiate, setup_context=keep)


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
    store(O, HEADS * D, N - first, o, 1 / total[:, None], D)
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
    s = scores(q, k, scale, length - key, TILE)
    higher = tl.maximum(top, tl.max(s, 1))
    p, shrink = tl.exp2(s - higher[:, None]), tl.exp2(top - higher)  # shrink is the factor of earlier powers
    o = (o[0] * shrink[:, None], o[1] * shrink[:, None])
    return higher, total * shrink + tl.sum(p, 1), add_product(o, p, v)


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
    store(DQ, HEADS * D, N - first, dq, slope, D)


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
    store(DK, HEADS * D, M - key, dk, slope, D)
    store(DV, HEADS * D, M - key, dv, 1.0, D)


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
    return M if LENGTHS is None else tl.minimum(tl.load(LENGTHS + image).to(tl.int32), M)


@triton.jit
def scores(q, k, scale, count, TILE: tl.constexpr):
    """S of a block of queries and a tile of keys; -inf for keys from `count` on."""
    return tl.where(tl.arange(0, TILE)[None, :] < count, product(q, k) * scale, float("-inf"))


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
def store(X, stride, count, x, factor, D: tl.constexpr):
    """Store x times the factor, in the layout of `load`."""
    row, left = tl.arange(0, x[0].shape[0])[:, None], tl.arange(0, x[0].shape[1])[None, :]
    right = x[0].shape[1] + tl.arange(0, x[1].shape[1])[None, :]
    X += row.to(tl.int64) * stride
    tl.store(X + left, (x[0] * factor).to(X.dtype.element_ty), mask=(row < count) & (left < D))
    tl.store(X + right, (x[1] * factor).to(X.dtype.element_ty), mask=(row < count) & (right < D))


INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)
