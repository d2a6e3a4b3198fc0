"""What the launched kernels become on sm_80, sm_90 and sm_100; first, that the harness detects errors."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from aot import compiled


@triton.jit
def product(X, Y, Z, SIZE: tl.constexpr):
    """Z = X Y, square, by one program."""
    row, column = tl.arange(0, SIZE)[:, None] * SIZE, tl.arange(0, SIZE)[None, :]
    z = tl.dot(tl.load(X + row + column), tl.load(Y + row + column))
    tl.store(Z + row + column, z.to(Z.dtype.element_ty))


def products() -> dict[str, Callable]:
    def call(size: int) -> Callable:
        x = torch.empty(size, size, dtype=torch.bfloat16, device="meta")
        return lambda: product[(1,)](x, x, x, SIZE=size)

    return {"square": call(64), "narrow": call(32), "too large": call(256)}


def test_the_harness_detects_what_fits_and_what_does_not():
    """256 x 256 are two operands of 128 KiB, and 512 float32 accumulators for each of 128 threads."""
    facts = {x.call: x for x in compiled(products, (90,))}
    square, narrow, large = facts["square"], facts["narrow"], facts["too large"]
    assert square.fits and square.wide and not square.spills
    assert square.hgmma and not square.hmma
    assert narrow.hmma and not narrow.hgmma, "four warps' instructions take 64 rows"
    assert not large.fits and large.spills
