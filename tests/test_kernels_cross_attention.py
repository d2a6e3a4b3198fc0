"""The cross-attention kernels against float64, in Triton's interpreter, and on a GPU with `-m gpu`.

The bar: an error against float64 of at most twice that of plain torch in the same precision. New memory is
NaN until it is written, no input is contiguous, and NaN follows each image's last key.
"""

from collections.abc import Callable

import pytest
import torch
from proof import BAR, error, excess, planted, poison, results  # noqa: F401 (poison is a fixture)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import kernels
from kernels import cross_attention as module
from kernels import reference
from unet import UNet, UNetConfig

pytestmark = pytest.mark.usefixtures("poison")
ROUNDINGS = 10  # the floor of the bar for a single key, whose dQ and dK are 0: torch's may be so by luck
SHAPES = [  # N, M, d: every N, M and d, each next to several others
    (1, 1, 8),
    (17, 5, 16),
    (63, 32, 24),
    (100, 77, 40),
    (256, 150, 80),
    (17, 171, 160),
    (63, 300, 40),
    (17, 77, 160),
    (63, 150, 40),
    (1, 32, 80),
    (100, 300, 8),
]
DTYPES = [torch.float32, torch.float16]


@pytest.fixture
def triton_asked():
    kernels.use("triton")
    yield
    kernels.use("auto")


def make(B: int, N: int, M: int, n: int, d: int, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """q, k, v and the gradient of the output, none contiguous and no two with the same strides."""
    q = torch.randn(B, n, N, d, device=device).to(dtype).transpose(1, 2)
    k = torch.randn(B, M, 3, n, d + 8, device=device).to(dtype)[:, :, 1, :, 8:]
    v = torch.randn(B, n, M, d + 16, device=device).to(dtype)[..., :d].transpose(1, 2)
    do = torch.randn(B, N, n, 2, d, device=device).to(dtype)[..., 1, :]
    return [q, k, v, do]


def ragged(B: int, M: int, device: str = "cpu") -> Tensor:
    """All keys, one key, about half of them."""
    return torch.tensor([M, 1, (M + 1) // 2], device=device)[:B]


def outputs(attend: Callable, inputs: list[Tensor], lengths: Tensor | None) -> list[Tensor]:
    """The output and the gradients of q, k and v."""
    *qkv, do = inputs
    return results(lambda *x: attend(*x, lengths), qkv, do)


def worst(attend: Callable, inputs: list[Tensor], lengths: Tensor | None, value: float = torch.nan) -> float:
    """The largest `excess` of output and gradients, with `value` behind each image's last key."""
    *qkv, do = inputs
    floor = ROUNDINGS * torch.finfo(do.dtype).eps if inputs[1].shape[1] == 1 else 0.0
    functions = (lambda *x: attend(*x, lengths), lambda *x: reference.attention(*x, lengths))
    hidden = behind(inputs, lengths, value)[:3]
    return max(excess(*functions, qkv, do, kernel_inputs=hidden, floor=floor))


def behind(inputs: list[Tensor], lengths: Tensor | None, value: float) -> list[Tensor]:
    """The inputs with `value` in the keys and values that are not real; strides are kept."""
    if lengths is None:
        return inputs
    q, k, v, do = inputs
    k, v = (torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x) for x in (k, v))
    for keys, values, length in zip(k, v, lengths, strict=True):
        keys[length:] = values[length:] = value
    return [q, k, v, do]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "M", "d"), SHAPES)
def test_output_and_gradients(N, M, d, dtype):
    lengths = ragged(2, M) if N % 2 else None
    heads = 8 if N == 1 else 2  # enough numbers for the two errors to be compared
    assert worst(module.cross_attention, make(2, N, M, heads, d, dtype), lengths) <= 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "integer"), [(5, torch.int64), (77, torch.int32), (171, torch.int64)])
def test_images_with_fewer_keys(M, integer, dtype):
    """All, one and half of the keys are real, for one tile, for two, and for a loop over them."""
    inputs, lengths = make(3, 17, M, 2, 24, dtype), ragged(3, M).to(integer)
    assert worst(module.cross_attention, inputs, lengths) <= 2
    alone = outputs(
        module.cross_attention,
        [x[2:, : lengths[2] if i in (1, 2) else 17] for i, x in enumerate(inputs)],
        None,
    )
    for together, x in zip(outputs(module.cross_attention, inputs, lengths), alone, strict=True):
        assert error(together[2:, : x.shape[1]], x) <= 4 * torch.finfo(dtype).eps


def test_offsets_beyond_32_bits(device="cpu"):
    """Images and rows that lie 2^31 numbers apart: on a CPU only pages that are written take memory."""
    far, dtype = 2**31 + 8, torch.float16
    q, k, v, do = make(2, 130, 2, 2, 16, dtype, device)
    store = torch.empty_strided((far + 16384,), (1,), dtype=dtype, device=device)
    images = store.as_strided(q.shape, (far, 32, 16, 1)).copy_(q)
    rows = store[2 * 130 * 32 :].as_strided(k.shape, (64, far, 16, 1)).copy_(k)  # behind an image's queries
    near = outputs(module.cross_attention, [q, k, v, do], None)
    apart = outputs(module.cross_attention, [images, rows, v, do], None)
    assert all(x.equal(y) for x, y in zip(near, apart, strict=True))


def test_the_gradient_is_that_of_the_kernel_itself():
    """Without any reference: central differences of the forward kernel along random directions."""
    q, k, v, do = make(2, 3, 5, 2, 8, torch.float32)
    lengths = ragged(2, 5)
    _, *gradients = outputs(module.cross_attention, [q, k, v, do], lengths)
    for i, gradient in enumerate(gradients):
        direction, step = torch.randn_like(gradient), 1e-2
        moved = [
            [x + sign * step * direction if i == j else x for j, x in enumerate((q, k, v))]
            for sign in (1, -1)
        ]
        up, down = ((module.cross_attention(*x, lengths) * do).sum() for x in moved)
        assert error((up - down) / (2 * step), (gradient * direction).sum()) <= 1e-3


def test_the_gradient_of_a_sum_has_no_strides():
    q, k, v, _ = make(2, 3, 5, 2, 8, torch.float32)
    ones = outputs(module.cross_attention, [q, k, v, torch.ones(2, 3, 2, 8)], None)
    expanded = outputs(module.cross_attention, [q, k, v, torch.ones(()).expand(2, 3, 2, 8)], None)
    assert all(x.equal(y) for x, y in zip(ones, expanded, strict=True))


def test_the_backward_pass_gives_the_same_bits():
    inputs = make(2, 256, 77, 2, 40, torch.float16)
    parts, _ = module.query_parts(2, 256, 2, 77, module.KEYS[32][0])
    assert parts > 1, "the sum over parts must be in play"
    first, second = (outputs(module.cross_attention, inputs, ragged(2, 77)) for _ in range(2))
    assert all(x.dtype == torch.float16 and x.equal(y) for x, y in zip(first, second, strict=True))


def test_the_parts_cover_all_queries_once():
    for B, N, n, M in [(1, 1, 1, 1), (2, 4096, 8, 77), (16, 4096, 8, 77), (1, 4096, 8, 1), (3, 1000, 5, 300)]:
        parts, each = module.query_parts(B, N, n, M, 64)
        assert (parts - 1) * each < N <= parts * each and each % 64 == 0
    assert module.query_parts(2, 4096, 8, 77, 64) == (4, 1024), "128 programs for 132 multiprocessors"


def test_tiles_cover_a_width_and_the_keys():
    for size in range(1, 161):
        first, second = module.split(size)
        assert first + second >= size and first >= second >= 16
        tiles = module.key_tiles(size)
        assert size <= tiles["WHOLE"] + tiles["REST"] < size + max(16, size)
    assert [module.split(x) for x in (40, 80, 160)] == [(32, 16), (64, 16), (128, 32)]
    tiles = [tuple(module.key_tiles(x).values()) for x in (32, 77, 100, 150, 161)]
    assert tiles == [(64, 0, 32), (64, 64, 16), (64, 128, 0), (64, 128, 32), (64, -1, 0)]


MISTAKES = {
    "no mask": (
        'tl.where(tl.arange(0, TILE)[None, :] < count, product(q, k) * scale, float("-inf"))',
        "product(q, k) * scale",
    ),
    "dK in powers of two, as the scores are": ("dk, slope", "dk, scale"),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["no mistake", *MISTAKES])
def test_mistakes_are_detected(name, dtype, tmp_path):
    right, wrong = MISTAKES.get(name, ("import torch", "import torch"))
    mistaken = planted(tmp_path, "kernels/cross_attention.py", right, wrong)
    inputs, lengths = make(2, 17, 77, 2, 40, dtype), ragged(2, 77)
    assert (worst(mistaken.cross_attention, inputs, lengths, 0.0) > 4) == (name in MISTAKES)


def test_the_kernels_run_when_asked_for_by_name(triton_asked, monkeypatch):
    launched = []
    for name in ("forward", "backward"):
        launch = getattr(module, name)
        spy = lambda *x, name=name, launch=launch: launched.append(name) or launch(*x)
        monkeypatch.setattr(module, name, spy)
    inputs = make(2, 3, 5, 2, 8, torch.float32)
    outputs(kernels.attention, inputs, None)
    assert launched == ["forward", "backward"]
    kernels.use("auto")
    outputs(kernels.attention, inputs, None)
    assert len(launched) == 2, "a CPU chooses plain torch by default"


REFUSALS = {
    "width": (lambda q, k, v: (q[..., :12], k[..., :12], v[..., :12], None), "12 wide: give a multiple of 8"),
    "wide": (lambda q, k, v: (*(x.repeat(1, 1, 1, 11) for x in (q, k, v)), None), "176 wide.*up to 160"),
    "type": (lambda q, k, v: (q.double(), k.double(), v.double(), None), "float64.*cast"),
    "types": (lambda q, k, v: (q, k, v.half(), None), "float32, torch.float32 and torch.float16: cast all"),
    "stride": (lambda q, k, v: (q, k.mT.contiguous().mT, v, None), "the last must be 1"),
    "heads": (lambda q, k, v: (q, k[:, :, :1], v, None), r"\(2, 5, 1, 16\).*give"),
    "images": (lambda q, k, v: (q, k, v[:1], None), r"\(1, 5, 2, 16\).*give"),
    "fewer values": (lambda q, k, v: (q, k, v[:, :4], None), r"\(2, 4, 2, 16\).*give"),
    "no keys": (lambda q, k, v: (q, k[:, :0], v[:, :0], None), "none empty"),
    "lengths": (
        lambda q, k, v: (q, k, v, torch.ones(3, dtype=torch.int64)),
        r"int64 \(3,\): give int32 or int64, \(2,\)",
    ),
    "float lengths": (lambda q, k, v: (q, k, v, torch.ones(2)), "torch.float32.*give int32 or int64"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_errors_have_the_value_and_the_cure(name, triton_asked):
    change, message = REFUSALS[name]
    with pytest.raises(AssertionError, match=message):
        kernels.attention(*change(*make(2, 3, 5, 2, 16, torch.float32)[:3]))


def test_a_cpu_without_the_interpreter_is_refused(triton_asked, monkeypatch):
    monkeypatch.setattr(module, "INTERPRETED", False)
    with pytest.raises(AssertionError, match="TRITON_INTERPRET=1"):
        kernels.attention(*make(2, 3, 5, 2, 8, torch.float16)[:3])
    with pytest.raises(
        AssertionError, match="float32.*cast all to torch.float16 or all to torch.bfloat16.*on a GPU"
    ):
        kernels.attention(*make(2, 3, 5, 2, 8, torch.float32)[:3])


def test_under_autocast_the_type_is_what_it_asks_for():
    q, k, v, _ = make(2, 3, 5, 2, 8, torch.float32)
    with torch.autocast("cpu", dtype=torch.float16):
        assert module.cross_attention(q, k.half(), v).dtype == torch.float16


def test_a_second_derivative_is_refused():
    q, k, v, do = make(2, 3, 5, 2, 8, torch.float32)
    q, do = q.requires_grad_(), do.requires_grad_()
    (dq,) = torch.autograd.grad(module.cross_attention(q, k, v), q, do, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


def test_the_unet_with_kernels_equals_the_unet_with_references():
    """Features, maps and every parameter's gradient, on ragged contexts; self-attention runs the kernels too.

    The kernels run under activation checkpointing: their forward pass a second time in the backward pass.
    """
    unet = UNet(UNetConfig(channels=(16, 32, 48, 48), layers=1, heads=2, context_width=32, groups=8))
    latent, t, context = torch.randn(2, 4, 8, 16), torch.tensor([1, 731]), torch.randn(2, 40, 32)
    found = []
    for which in ("torch", "triton"):
        kernels.use(which)
        unet.checkpoint_activations = which == "triton"
        unet.zero_grad()
        features, maps = unet.features_and_attention(latent, t, context, torch.tensor([40, 1]))
        sum((x * x).mean() for x in (*features, *maps)).backward()
        gradients = {name: x.grad for name, x in unet.named_parameters() if x.grad is not None}
        found.append(([*features, *maps], gradients))
    kernels.use("auto")
    (plain, plain_gradients), (ours, gradients) = found
    assert all(error(x, y) <= BAR for x, y in zip(ours, plain, strict=True))
    without = {name for name, _ in unet.named_parameters()} - gradients.keys()
    assert all(name.startswith(("conv_norm_out", "conv_out")) for name in without), "only they make the noise"
    assert all(error(gradients[name], x) <= 10 * BAR for name, x in plain_gradients.items())


# On a GPU.


@pytest.fixture
def gpu() -> str:
    assert torch.cuda.is_available(), "these tests need a CUDA device"
    return "cuda"


GPU_SHAPES = [*SHAPES, (4096, 77, 40), (1600, 150, 80), (400, 150, 160), (1024, 1024, 80), (33, 1000, 64)]
GPU_DTYPES = [torch.bfloat16, torch.float16]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", GPU_DTYPES)
@pytest.mark.parametrize(("N", "M", "d"), GPU_SHAPES)
def test_output_and_gradients_on_a_gpu(N, M, d, dtype, gpu):
    for lengths in (None, ragged(2, M, gpu)):
        assert worst(module.cross_attention, make(2, N, M, 8, d, dtype, gpu), lengths) <= 2


@pytest.mark.gpu
@pytest.mark.parametrize("d", range(8, 161, 8))
def test_every_width_on_a_gpu(d, gpu):
    for M in (16, 77, 100, 150):
        inputs = make(2, 100, M, 2, d, torch.bfloat16, gpu)
        assert worst(module.cross_attention, inputs, ragged(2, M, gpu)) <= 2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", GPU_DTYPES)
@pytest.mark.parametrize(("N", "M", "d"), [(4096, 77, 40), (1000, 150, 80), (250, 77, 160), (250, 300, 160)])
def test_a_hundred_runs_give_the_same_bits_on_a_gpu(N, M, d, dtype, gpu):
    inputs, lengths = make(2, N, M, 8, d, dtype, gpu), ragged(2, M, gpu)
    first = outputs(module.cross_attention, inputs, lengths)
    for _ in range(100):
        again = outputs(module.cross_attention, inputs, lengths)
        assert all(x.equal(y) for x, y in zip(first, again, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [False, True])
def test_compiled_on_a_gpu(lengths, gpu, monkeypatch):
    """In one graph, forward and backward, with the same bits: the launches are the same."""
    monkeypatch.undo()  # of the NaN in new memory, which is no part of a graph
    inputs = make(2, 1000, 77, 8, 40, torch.bfloat16, gpu)
    lengths = ragged(2, 77, gpu) if lengths else None
    compiled = torch.compile(module.cross_attention, fullgraph=True)
    pairs = zip(*(outputs(x, inputs, lengths) for x in (compiled, module.cross_attention)), strict=True)
    assert all(x.equal(y) for x, y in pairs)


@pytest.mark.gpu
def test_autocast_and_checkpointing_on_a_gpu(gpu):
    q, k, v, do = (x.float() for x in make(2, 300, 77, 8, 40, torch.bfloat16, gpu))
    with torch.autocast(gpu, dtype=torch.bfloat16):
        cast = outputs(lambda *x: module.cross_attention(*x).float(), [q, k, v, do], None)
        kept = lambda *x: checkpoint(module.cross_attention, *x, use_reentrant=False).float()
        again = outputs(kept, [q, k, v, do], None)
    assert all(x.dtype == torch.float32 and x.equal(y) for x, y in zip(cast, again, strict=True))
    half = outputs(module.cross_attention, [x.bfloat16() for x in (q, k, v, do)], None)
    assert all(x.bfloat16().equal(y) for x, y in zip(cast, half, strict=True))


@pytest.mark.gpu
def test_offsets_beyond_32_bits_on_a_gpu(gpu):
    test_offsets_beyond_32_bits(gpu)


@pytest.mark.gpu
def test_float32_is_refused_on_a_gpu(gpu):
    with pytest.raises(AssertionError, match="float32.*cast all to torch.float16"):
        module.cross_attention(*make(2, 3, 5, 2, 8, torch.float32, gpu)[:3])
