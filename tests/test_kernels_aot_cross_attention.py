"""What the launched configurations of the cross-attention kernels become on sm_80, sm_90 and sm_100.

python tests/aot.py test_kernels_aot_cross_attention:everything 80 90 100        prints the whole table
"""

from collections.abc import Callable

import torch
from aot import Compiled, compiled
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._library.triton import set_wrap_triton_enabled

from kernels.cross_attention import cross_attention

QUERIES = {40: 4096, 80: 1024, 160: 256}  # by head width, of Stable Diffusion v1.5 at 512 x 512
WIDE = 24960  # all layers' keys and values come from one product
KERNELS = {"forward_kernel", "queries_kernel", "keys_kernel", "sum_kernel"}
BF16, FP16 = torch.bfloat16, torch.float16


def call(d: int, M: int, dtype: torch.dtype = BF16, B: int = 2, ragged: bool = True) -> Callable:
    """Forward and backward, as the UNet calls them; in a batch of 2 dK and dV are sums of float32 parts."""
    q = torch.empty(B, QUERIES.get(d, 64), 8, d, dtype=dtype, device="meta", requires_grad=True)
    wide = torch.empty(B, M, WIDE, dtype=dtype, device="meta", requires_grad=True)
    k, v = (x.unflatten(-1, (8, d)) for x in wide.split([8 * d, 8 * d, WIDE - 16 * d], dim=-1)[:2])
    lengths = torch.empty(B, dtype=torch.int64, device="meta") if ragged else None

    def launch() -> None:
        with set_wrap_triton_enabled(False):  # else operators only note their kernels on this device
            cross_attention(q, k, v, lengths).backward(q)

    return launch


def on_hopper() -> dict[str, Callable]:
    """Every width with one, two and three tiles of keys; the rest where it is hardest, and the smallest."""
    calls = {f"d {d}, {M} keys": call(d, M) for d in QUERIES for M in (32, 77, 150)}
    calls |= {"d 160, 1024 keys": call(160, 1024), "d 160, 150 keys, float16": call(160, 150, FP16)}
    calls |= {"d 160, no lengths, batch 16": call(160, 150, B=16, ragged=False), "d 8, 5 keys": call(8, 5)}
    return calls


def elsewhere() -> dict[str, Callable]:
    """The kind of context that takes most registers and memory."""
    return {f"d {d}, 150 keys": call(d, 150) for d in QUERIES}


def everything() -> dict[str, Callable]:
    return {
        f"d {d}, {M} keys, {dtype}": call(d, M, dtype)
        for dtype in (BF16, FP16)
        for d in (*QUERIES, *range(8, 161, 8))
        for M in (5, 32, 77, 100, 150, 1024)
    }


def graphs() -> dict[str, Callable]:
    """torch.compile makes one graph each of forward and backward, for one number of keys and then for any."""

    def trace() -> None:
        found: list[int] = []

        def count(graph: torch.fx.GraphModule, inputs: list) -> Callable:
            found.append(sum("triton_kernel" in str(x.target) for x in graph.graph.nodes))
            return make_boxed_func(graph.forward)

        def attend(*inputs: torch.Tensor) -> torch.Tensor:
            return cross_attention(*inputs) * 2

        function = torch.compile(attend, backend=aot_autograd(fw_compiler=count), fullgraph=True)
        for M in (77, 150):
            q, *kv = (torch.empty(2, x, 8, 40, device="meta", dtype=BF16) for x in (100, M, M))
            q, *kv = (x.requires_grad_() for x in (q, *kv))
            function(q, *kv, torch.empty(2, dtype=torch.int32, device="meta")).backward(q)
            assert q.grad.shape == q.shape and all(x.grad.shape == x.shape for x in kv)
        assert found == 2 * [1, 3], f"kernels in the graphs: {found}"

    return {"traced": trace}


def multiplies(x: Compiled) -> bool:
    return x.kernel != "sum_kernel"


def test_torch_compile_traces_the_kernels():
    """Nothing is left outside the graphs; test_kernels_cross_attention.py checks the values on a GPU."""
    compiled(graphs, (90,))


def test_hopper_runs_them_without_spills_on_its_own_matrix_instructions():
    facts = compiled(on_hopper, (90,))
    assert {x.kernel for x in facts} == KERNELS, "a kernel was never launched"
    for x in facts:
        assert x.fits and x.spills == 0 and x.wide, x
        assert x.hmma == 0 and (x.hgmma > 0) == multiplies(x), x


def test_they_fit_ampere_and_blackwell():
    """Wide heads spill on sm_80, for want of registers: the test prints it, and a benchmark must decide."""
    facts = compiled(elsewhere, (80, 100))
    assert {(x.kernel, x.capability) for x in facts} == {(x, gpu) for x in KERNELS for gpu in (80, 100)}
    for x in facts:
        assert x.fits and x.wide, x
        assert (x.hmma > 0) == (x.capability == 80 and multiplies(x)), x
        assert (x.tensor_memory > 0) == (x.capability == 100 and multiplies(x)), x
    print(*(f"{x.call}: {x.kernel} spills {x.spills} times on sm_80" for x in facts if x.spills), sep="\n")
