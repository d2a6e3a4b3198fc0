"""kernels/group_norm.py by the three-way bar (proof.py): interpreted here, and on a GPU with `-m gpu`."""

import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from proof import BAR, ROOT, error, excess, gradients, planted, poison, results  # noqa: F401 (poison is a fixture)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kernels
import kernels.group_norm as module
from kernels import reference
from kernels.group_norm import add_group_norm, backward, forward, group_norm
from unet import ResnetBlock, SpatialTransformer, UNet, UNetConfig
from vae import VAE, VAEConfig

pytestmark = [
    pytest.mark.usefixtures("poison"),
    # exp(-z) is infinite where silu(z) rounds to 0, and z / infinity is that 0.
    pytest.mark.filterwarnings("ignore:overflow encountered in exp"),
]
EPS = 1e-5
# B, C, G, H, W: the widths of the miniatures, of Stable Diffusion's narrowest and widest groups, of a single
# pixel.
SHAPES = [
    *((2, 16, 8, 5, 7), (2, 96, 8, 9, 11), (2, 192, 8, 3, 1)),
    *((1, 320, 32, 5, 3), (2, 160, 2, 7, 5), (2, 32, 8, 1, 1)),
]


@pytest.fixture(params=["held", "in tiles"])
def each_way(request, monkeypatch) -> None:
    """The groups of small maps held whole, as they are, and processed in tiles, as those of large ones."""
    if request.param == "in tiles":
        monkeypatch.setattr(module, "HELD", 0)


def plain(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor | None = None,
    *,
    groups: int,
    eps: float = EPS,
    silu: bool = True,
) -> Tensor:
    """Torch's operators, on NCHW maps: its float32 GroupNorm of channels-last ones is inexact on a CPU."""
    x = x.contiguous() if shift is None else x.contiguous() + shift[:, :, None, None]
    y = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(y) if silu else y


def kernel(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor | None = None,
    *,
    groups: int,
    eps: float = EPS,
    silu: bool = True,
) -> Tensor:
    return group_norm(x, groups, weight, bias, eps, silu, shift)


SUM, NORM = 0, 1  # the outputs of a norm that adds a residual


def plain_added(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *, groups: int, read: tuple[int, ...]
) -> Tensor:
    """Those of the sum and its norm that are read, as one tensor."""
    total = x.contiguous() + residual.contiguous()
    both = total, F.group_norm(total, groups, weight, bias, EPS)
    return torch.stack([both[i] for i in read])


def kernel_added(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *, groups: int, read: tuple[int, ...]
) -> Tensor:
    both = add_group_norm(x, residual, groups, weight, bias, EPS)
    return torch.stack([both[i] for i in read])


def added_case(*shape: int, dtype=torch.float32, device: str = "cpu") -> tuple[list[Tensor], Tensor]:
    """x, a residual of another layout, weight and bias; gradients of the sum and of the norm."""
    (x, weight, bias), dy = case(*shape, dtype, device=device)
    residual, dsum = (torch.randn(x.shape, device=device).to(dtype) for _ in range(2))
    return [x, residual, weight, bias], torch.stack([dsum, dy])


def case(
    B: int, C: int, H: int, W: int, dtype=torch.float32, mean: float = 0.0, device: str = "cpu"
) -> tuple[list[Tensor], Tensor]:
    """x channels-last, weight and bias as trained ones are; dy."""
    x = (mean + torch.randn(B, C, H, W, device=device)).to(dtype, memory_format=torch.channels_last)
    weight, bias = 1 + 0.3 * torch.randn(C, device=device), 0.3 * torch.randn(C, device=device)
    dy = torch.randn(B, C, H, W, device=device).to(dtype, memory_format=torch.channels_last)
    return [x, weight, bias], dy


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("shifted", [True, False])
def test_equals_torch(shape, dtype, silu, shifted, each_way):
    """Values and all gradients; weight and bias stay float32, as under autocast."""
    B, C, groups, H, W = shape
    inputs, dy = case(B, C, H, W, dtype)
    inputs += [torch.randn(B, C).to(dtype)] if shifted else []
    ratios = excess(*(partial(f, groups=groups, silu=silu) for f in (kernel, plain)), inputs, dy)
    assert max(ratios) <= 2, ratios


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("read", [(SUM, NORM), (NORM,)])
def test_an_added_residual_equals_torch(shape, dtype, read, each_way):
    """The sum and its norm, and all gradients, from both and from the norm alone."""
    B, C, groups, H, W = shape
    inputs, dy = added_case(B, C, H, W, dtype=dtype)
    ours, torchs = (partial(f, groups=groups, read=read) for f in (kernel_added, plain_added))
    ratios = excess(ours, torchs, inputs, dy[[*read]])
    assert max(ratios) <= 2, ratios


def test_a_residual_of_several_tiles_in_a_program():
    inputs, dy = added_case(1, 16, 91, 91)
    ours, torchs = (partial(f, groups=8, read=(SUM, NORM)) for f in (kernel_added, plain_added))
    ratios = excess(ours, torchs, inputs, dy)
    assert max(ratios) <= 2, ratios


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_sum_whose_norm_is_not_read(dtype, each_way):
    """To the bit: its gradient is that of both addends, and the weight's is zero."""
    inputs, dy = added_case(2, 96, 9, 11, dtype=dtype)
    total, dx, dresidual, *of_norm = results(partial(kernel_added, groups=8, read=(SUM,)), inputs, dy[[SUM]])
    assert torch.equal(total[0], inputs[0] + inputs[1])
    assert torch.equal(dx, dy[SUM]) and torch.equal(dresidual, dy[SUM])
    assert all((x == 0).all() for x in of_norm)


def test_both_addends_have_one_gradient(each_way):
    """One tensor of it, and the norm is that of the sum as it is stored, rounded."""
    inputs, dy = added_case(2, 32, 5, 7, dtype=torch.float16)
    before, kept = [x.clone() for x in inputs], []
    leaves = [x.requires_grad_() for x in inputs]
    total, y = add_group_norm(leaves[0], leaves[1], 8, *leaves[2:], EPS)
    assert torch.equal(y, kernel(total.detach(), *leaves[2:], groups=8, silu=False))
    node = total.grad_fn
    node.register_hook(lambda gradients, _: kept.extend(gradients))
    held = {x.data_ptr() for x in node.saved_tensors if x is not None}
    assert total.data_ptr() in held and not held & {x.data_ptr() for x in inputs[:2]}
    torch.autograd.backward([total, y], [*dy])
    dx, *_, dresidual = kept
    assert dx.data_ptr() == dresidual.data_ptr() and torch.equal(leaves[0].grad, leaves[1].grad)
    assert all(torch.equal(x, z) for x, z in zip(inputs, before, strict=True))


def test_a_group_that_fits_is_one_launch():
    """Of the UNet's maps of 512x512 images, forward and backward; None: it is processed in tiles."""

    def warps(C: int, side: int) -> tuple[int | None, ...]:
        x = torch.empty(2, C, side, side, device="meta")
        held = (module.whole(x, 32, maps) for maps in (1, 2))
        return tuple(sizes and sizes["num_warps"] for sizes in held)

    assert warps(1280, 8) == (2, 4) and warps(2560, 8) == (4, 8)
    assert warps(1280, 16) == warps(1920, 16) == (8, 16)
    assert warps(2560, 16) == warps(640, 32) == warps(960, 32) == (16, None)
    assert warps(320, 64) == warps(1280, 32) == (None, None)


def test_a_shift_that_is_no_tensor_of_its_own():
    """A slice of a wider product, whose values do not lie together: to the bit the same."""
    inputs, dy = case(2, 32, 5, 7)
    shift = torch.randn(2, 64)[:, ::2]
    ours, again = (results(partial(kernel, groups=8), [*inputs, x], dy) for x in (shift, shift.contiguous()))
    assert all(torch.equal(x, y) for x, y in zip(ours, again, strict=True))


def test_parameters_of_the_same_type(each_way):
    """Their gradients are of that type, too."""
    inputs, dy = case(2, 64, 4, 5, torch.float16)
    inputs = [x.half() for x in inputs]
    ratios = excess(partial(kernel, groups=8), partial(plain, groups=8), inputs, dy)
    assert max(ratios) <= 2, ratios
    assert all(x.dtype == torch.float16 for x in results(partial(kernel, groups=8), inputs, dy))


def test_several_tiles_in_a_program_and_many_in_the_merge():
    """91 x 91 pixels: 65 programs of two tiles, the last a part of one; the merge takes 64 at once."""
    inputs, dy = case(1, 16, 91, 91)
    ratios = excess(partial(kernel, groups=8), partial(plain, groups=8), inputs, dy)
    assert max(ratios) <= 2, ratios


@pytest.mark.parametrize("mean", [100.0, -3000.0])
def test_a_large_mean_keeps_the_variance(mean, each_way):
    """Against a deviation of 1, where the difference of two sums of squares would be noise."""
    inputs, dy = case(2, 32, 9, 13, mean=mean)
    ratios = excess(partial(kernel, groups=8), partial(plain, groups=8), inputs, dy)
    assert max(ratios) <= 2, ratios


def test_a_small_variance_shows_eps(each_way):
    """At a variance of 1e-6 the UNet's and the VAE's eps differ by a factor in the result."""
    inputs, dy = case(2, 32, 4, 4)
    inputs[0] = inputs[0] * 1e-3
    for eps in (1e-5, 1e-6):
        ratios = excess(partial(kernel, groups=8, eps=eps), partial(plain, groups=8, eps=eps), inputs, dy)
        assert max(ratios) <= 2, (eps, ratios)


def test_extreme_values_of_silu(each_way):
    """No NaN where exp overflows, in either pass."""
    inputs, dy = case(1, 16, 2, 2)
    inputs[1] = 200 * inputs[1]
    ratios = excess(partial(kernel, groups=8), partial(plain, groups=8), inputs, dy)
    assert max(ratios) <= 2, ratios


def test_any_layout(each_way):
    """NCHW, every second pixel and channel, a transposed map and gradient: to the bit the same result."""
    big = torch.randn(2, 64, 10, 14)
    layouts = [big[:, ::2, ::2, ::2], big.mT[:, :32, :7, :5].mT, big[:, 32:, :5, 7:]]
    for x in layouts:
        _, weight, bias = case(2, 32, 5, 7)[0]
        dy = torch.randn(2, 32, 7, 5).mT
        ours = results(partial(kernel, groups=8), [x, weight, bias], dy)
        last = results(
            partial(kernel, groups=8),
            [x.contiguous(memory_format=torch.channels_last), weight, bias],
            dy.contiguous(memory_format=torch.channels_last),
        )
        assert all(torch.equal(a, b) for a, b in zip(ours, last, strict=True))
        assert ours[0].is_contiguous(memory_format=torch.channels_last)


def test_runs_are_equal_to_the_bit(each_way):
    inputs, dy = case(2, 96, 9, 11)
    inputs.append(torch.randn(2, 96))
    first, second = (results(partial(kernel, groups=8), inputs, dy) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_inputs_are_left_alone_and_only_statistics_are_kept():
    """x is not written, and apart from the inputs the graph holds two numbers a group."""
    inputs, dy = case(2, 32, 5, 7)
    before = [x.clone() for x in inputs]
    y = kernel(*(x.requires_grad_() for x in inputs), groups=8)
    kept = y.grad_fn.next_functions[0][0] if not hasattr(y.grad_fn, "saved_tensors") else y.grad_fn
    assert (
        sum(x.numel() for x in kept.saved_tensors if x is not None)
        == sum(x.numel() for x in inputs) + 2 * 2 * 8
    )
    y.backward(dy)
    assert all(torch.equal(x, z) for x, z in zip(inputs, before, strict=True))


def test_recomputed_activations(each_way):
    """Under activation checkpointing: to the bit the same."""
    inputs, dy = case(2, 32, 5, 7)
    ours = results(partial(kernel, groups=8), inputs, dy)
    again = results(lambda *x: checkpoint(partial(kernel, groups=8), *x, use_reentrant=False), inputs, dy)
    assert all(torch.equal(x, y) for x, y in zip(ours, again, strict=True))


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("shifted", [True, False])
def test_the_reference_is_what_the_towers_compute(silu, shifted):
    """To the bit, with its gradients: the shift added in place, norm, then SiLU in place."""
    norm = nn.GroupNorm(8, 32, eps=1e-6)
    inputs, dy = case(2, 32, 5, 7)
    with torch.no_grad():
        norm.weight.copy_(inputs[1]), norm.bias.copy_(inputs[2])
    inputs += [torch.randn(2, 32)] if shifted else []
    x, *shift = (x.clone().requires_grad_() for x in (inputs[0], *inputs[3:]))
    y = norm((1 * x).add_(shift[0][:, :, None, None]) if shifted else x)
    y = F.silu(y, inplace=True) if silu else y
    y.backward(dy)
    ours = results(
        lambda x, w, b, shift=None: reference.group_norm(1 * x, 8, w, b, 1e-6, silu, shift), inputs, dy
    )
    expected = [y, *(x.grad for x in (x, norm.weight, norm.bias, *shift))]
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_the_reference_adds_and_norms():
    """To the bit what a residual block and the norm after it compute, with its gradients. x stays as it is,
    since a recomputed transformer is given it again.
    """
    norm = nn.GroupNorm(8, 32, eps=1e-6)
    for dtype in (torch.float32, torch.bfloat16):
        norm.to(dtype)
        (x, residual, *_), dy = added_case(2, 32, 5, 7, dtype=dtype)
        all_results = []
        for ours in (True, False):
            leaves = [x.clone().requires_grad_(), residual.clone().requires_grad_()]
            h = 1 * leaves[0]
            if ours:
                total, y = kernels.add_normed(norm, h, leaves[1])
                assert torch.equal(h, x)
            else:
                total = h.add_(leaves[1])
                y = norm(total)
            gradients = torch.autograd.grad([total, y], [*leaves, norm.weight, norm.bias], [*dy])
            all_results.append([total, y, *gradients])
        assert all(torch.equal(a, b) for a, b in zip(*all_results, strict=True))


@pytest.mark.parametrize("silu", [True, False])
def test_the_kernel_is_asked_for_by_name(silu, monkeypatch):
    inputs, _ = case(2, 32, 5, 7)
    x, weight, bias = inputs
    norm = nn.GroupNorm(8, 32, eps=EPS)
    norm.weight, norm.bias = nn.Parameter(weight), nn.Parameter(bias)
    ours = kernels.norm_silu if silu else kernels.normed
    assert torch.equal(ours(norm, x), reference.group_norm(x, 8, weight, bias, EPS, silu))
    monkeypatch.setattr(kernels, "_asked", "triton")
    assert torch.equal(ours(norm, x), kernel(*inputs, groups=8, silu=silu))
    total, y = kernels.add_normed(norm, x, x)
    assert torch.equal(total, 2 * x) and torch.equal(y, kernel(2 * x, weight, bias, groups=8, silu=False))


def test_the_unet_and_the_vae_with_kernels_equal_those_without(monkeypatch):
    """Every norm of theirs goes through the kernel, those after the time embedding with it, a transformer's
    with the residual before it; all gradients.
    """
    unet = UNet(UNetConfig(channels=(16, 32), layers=1, heads=2, context_width=32, groups=8))
    vae = VAE(VAEConfig(channels=(16, 32), layers=1, groups=8))
    latent, t, context = torch.randn(2, 4, 4, 6), torch.tensor([3, 900]), torch.randn(2, 5, 32)
    image, launched = torch.rand(2, 3, 8, 12), []
    launch = module.forward
    monkeypatch.setattr(module, "forward", lambda *x: launched.append(x[5:]) or launch(*x))

    def losses() -> list[Tensor]:
        noise, encoded = unet(latent, t, context), vae.encode(image)
        both = (noise.square().sum() + encoded.square().sum(), nn.ModuleList([unet, vae]))
        return [noise, encoded, gradients(*both)[1]]

    without = losses()
    assert not launched
    monkeypatch.setattr(kernels, "_asked", "triton")
    for ours, torchs in zip(losses(), without, strict=True):
        assert error(ours, torchs) <= BAR
    norms = [x for tower in (unet, vae.encoder) for x in tower.modules() if isinstance(x, nn.GroupNorm)]
    blocks = sum(isinstance(x, ResnetBlock) for x in unet.modules())
    assert len(launched) == len(norms) and sum(shift is not None for _, shift, _ in launched) == blocks
    transformers = sum(isinstance(x, SpatialTransformer) for x in unet.modules())
    assert sum(not silu for silu, *_ in launched) == transformers + 1  # and the VAE's attention
    assert sum(residual is not None for *_, residual in launched) == transformers


@pytest.mark.parametrize("which", ["torch", "triton"])
def test_recomputed_blocks_add_their_residual_once(which, monkeypatch):
    """The noise and all gradients are those without recomputation."""
    unet = UNet(UNetConfig(channels=(16, 16), layers=1, heads=2, context_width=8, groups=4))
    inputs = torch.randn(1, 4, 2, 4), torch.tensor([3]), torch.randn(1, 3, 8)
    monkeypatch.setattr(kernels, "_asked", which)
    results = []
    for unet.checkpoint_activations in (False, True):
        noise = unet(*inputs)
        results.append([noise, gradients(noise.square().sum(), unet)[1]])
    for kept, recomputed in zip(*results, strict=True):
        assert error(recomputed, kept) <= BAR


def test_wrong_inputs_are_refused():
    (x, weight, bias), _ = case(2, 32, 5, 7)
    with pytest.raises(AssertionError, match=r"torch.float64 \(2, 32, 5, 7\): give .* bfloat16"):
        group_norm(x.double(), 8, weight, bias, EPS, True)
    with pytest.raises(AssertionError, match=r"\(32, 5, 7\): give a map \(B, C, H, W\)"):
        group_norm(x[0], 8, weight, bias, EPS, True)
    with pytest.raises(AssertionError, match="32 channels cannot be split into 5 groups"):
        group_norm(x, 5, weight, bias, EPS, True)
    with pytest.raises(AssertionError, match=r"bias \(31,\): give \(32,\)"):
        group_norm(x, 8, weight, bias[1:], EPS, True)
    with pytest.raises(AssertionError, match=r"shift is \(2, 31\): give \(2, 32\), one value per image"):
        group_norm(x, 8, weight, bias, EPS, True, torch.zeros(2, 31))
    with pytest.raises(
        AssertionError, match=r"residual is torch.float16 .*: give torch.float32 \(2, 32, 5, 7\)"
    ):
        add_group_norm(x, x.half(), 8, weight, bias, EPS)
    with pytest.raises(AssertionError, match=r"residual is torch.float32 \(2, 32, 7, 5\): give"):
        add_group_norm(x, x.mT, 8, weight, bias, EPS)
    with pytest.raises(AssertionError, match=r"\(0, 32, 5, 7\): an empty map"):
        group_norm(x[:0], 8, weight, bias, EPS, True)
    with pytest.raises(AssertionError, match="truncates: give float16 or float32"):
        group_norm(x.bfloat16(), 8, weight, bias, EPS, True)


def test_a_cpu_without_the_interpreter_is_refused():
    """In a process of its own: whether kernels are interpreted is settled when they are defined."""
    code = (
        "import os, torch; os.environ.pop('TRITON_INTERPRET', None)\n"
        "from kernels.group_norm import group_norm\n"
        "group_norm(torch.zeros(1, 8, 2, 2), 8, torch.ones(8), torch.ones(8), 1e-5, True)"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1 and "only with TRITON_INTERPRET=1" in result.stderr, result.stderr


MISTAKES = {
    "pixels beyond the edge counted": ("tl.where(real, x - tile_mean[None, :], 0)", "x - tile_mean[None, :]"),
    "means of the parts not compared": (
        "m2_1 + m2_2 + delta * delta * n1 * share",
        "m2_1 + m2_2 + delta * 0",
    ),
    "parts of unequal size averaged": ("share = n2 / tl.maximum(n, 1)", "share = 0.5"),
    "eps outside the root": ("tl.sqrt_rn(m2 / n + eps)", "(tl.sqrt_rn(m2 / n) + eps)"),
    "variance of a sample": ("tl.sqrt_rn(m2 / n + eps)", "tl.sqrt_rn(m2 / (n - 1) + eps)"),
    "channels in the wrong group": ("tl.minimum(c, C - 1) // D", "tl.minimum(c, C - 1) % groups"),
    "SiLU's slope not differentiated": ("(1 + z * (1 - sigma))", "1"),
    "variance not differentiated": ("- of_dz - xhat * of_dz_xhat", "- of_dz"),
    "means of dz without the weight": ("tl.sum(weight * total)", "tl.sum(total)"),
    "SiLU though there is none": (" if SILU else z", ""),
    "SiLU differentiated though there is none": ("if SILU:", "if True:"),
    "statistics of tiles without the shift": ("channel_mean += tl.load(", "channel_mean += 0 * tl.load("),
    "tiles without the shift": ("mean -= tl.load(", "mean -= 0 * tl.load("),
    "the shift of another image": ("SHIFT + tl.program_id(2) * C + c", "SHIFT + c"),
    "the gradient of the shift counts padding": (
        "tl.sum(tl.where(real, dx, 0), axis=0)",
        "tl.sum(dx, axis=0)",
    ),
    "whole groups without the shift": ("x += tl.load(", "x += 0 * tl.load("),
    "mean of a whole group counts padding": ("tl.sum(tl.where(real, x, 0))", "tl.sum(x)"),
    "variance of a whole group counts padding": ("tl.where(real, x - mean, 0)", "x - mean"),
    "whole groups without eps": (
        "tl.sum(centred * centred) / (P * D) + eps",
        "tl.sum(centred * centred) / (P * D)",
    ),
    "means of a whole group's dz without the weight": ("tl.sum(weight * sum_dz)", "tl.sum(sum_dz)"),
    "the first image's sums twice": ("(B + b) * C", "B * C"),
    "a sum of one addend": ("x.to(tl.float32) + residual", "x.to(tl.float32)"),
    "tiles normalized without the residual": ("x if residual is None else total", "x"),
    "differentiated at x, not at the sum": ("total if ctx.added else x", "x"),
    "no gradient from the sum, in tiles": ("            dx += tl.load(", "            dx += 0 * tl.load("),
    "no gradient from the sum of a whole group": ("\n        dx += tl.load(", "\n        dx += 0 * tl.load("),
    "no gradient of the residual": ("dx if ctx.added else None", "0 * dx if ctx.added else None"),
}


def test_the_right_kernel_passes_the_comparison(tmp_path):
    module = planted(tmp_path, "kernels/group_norm.py", "import torch", "import torch")
    assert max(ratios(module)) <= 2


@pytest.mark.parametrize("name", MISTAKES)
def test_the_mistake_is_detected(name, tmp_path):
    assert any(x > 20 for x in ratios(planted(tmp_path, "kernels/group_norm.py", *MISTAKES[name])))


def ratios(module) -> Iterator[float]:
    """Ten times the bar must part the mistakes from the truth; groups held whole, and five tiles, the last
    with two pixels, merged by twos.
    """
    module.PIXELS, module.MERGED = 4, 2
    inputs, dy = case(2, 16, 3, 6)
    inputs = [0.1 * inputs[0], *inputs[1:], 0.1 * torch.randn(2, 16)]

    def mistaken(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor) -> Tensor:
        return module.group_norm(x, 4, weight, bias, EPS, silu, shift)

    def mistaken_sum(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return torch.stack(module.add_group_norm(x, residual, 4, weight, bias, EPS))

    def right_sum(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return plain_added(x, residual, weight, bias, groups=4, read=(SUM, NORM))

    most = module.HELD
    for silu, held in product((True, False), (0, most)):
        module.HELD = held
        yield from excess(mistaken, partial(plain, groups=4, silu=silu), inputs, dy)
        if not silu:
            added = [*inputs[:3], 0.1 * torch.randn_like(inputs[0])]
            yield from excess(mistaken_sum, right_sum, added, torch.stack([dy, dy.flip(0)]))


# On a GPU. C, H, W: every width of the UNet and the VAE at least once, and sizes that no block divides.
GPU_SHAPES = [
    *(
        (320, 64, 64),
        (640, 32, 32),
        (960, 64, 64),
        (1280, 16, 16),
        (1920, 16, 16),
        (2560, 16, 16),
        (1920, 32, 32),
        (2560, 8, 8),
    ),
    *((128, 512, 512), (256, 256, 256), (512, 64, 64), (320, 37, 53), (960, 1, 3)),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", GPU_SHAPES)
@pytest.mark.parametrize("silu", [True, False])
def test_equals_torch_on_a_gpu(shape, dtype, silu):
    """The VAE's eps at the VAE's widths does not matter here: it is tested above. SiLU with a shift."""
    C, H, W = shape
    inputs, dy = case(2, C, H, W, dtype, mean=3.0, device="cuda")
    inputs += [torch.randn(2, C, device="cuda").to(dtype)] if silu else []
    ratios = excess(*(partial(f, groups=32, silu=silu) for f in (kernel, plain)), inputs, dy)
    assert max(ratios) <= 2, ratios


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(320, 64, 64), (640, 32, 32), (1280, 16, 16), (1280, 8, 8), (320, 37, 53)])
def test_an_added_residual_equals_torch_on_a_gpu(shape, dtype):
    inputs, dy = added_case(2, *shape, dtype=dtype, device="cuda")
    ours, torchs = (partial(f, groups=32, read=(SUM, NORM)) for f in (kernel_added, plain_added))
    ratios = excess(ours, torchs, inputs, dy)
    assert max(ratios) <= 2, ratios


@pytest.mark.gpu
def test_more_than_two_to_the_31_values():
    """The last image equals itself alone: no offset wraps."""
    x = torch.randn(129, 64, 512, 512, device="cuda", dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last)
    weight, bias = torch.ones(64, device="cuda"), torch.zeros(64, device="cuda")
    y = kernel(x, weight, bias, groups=32)
    assert torch.equal(y[-1:], kernel(x[-1:], weight, bias, groups=32))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(320, 64, 64), (2560, 8, 8), (320, 37, 53)])
def test_a_hundred_runs_are_equal_to_the_bit(shape):
    inputs, dy = case(2, *shape, torch.bfloat16, device="cuda")
    first = results(partial(kernel, groups=32), inputs, dy)
    for _ in range(100):
        again = results(partial(kernel, groups=32), inputs, dy)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.gpu
def test_compiled(monkeypatch):
    """As one graph; the sum over images may be reordered by the compiler, the kernels not."""
    monkeypatch.undo()  # of the NaN in new memory, which is no part of a graph
    inputs, dy = case(2, 320, 37, 53, torch.bfloat16, device="cuda")
    eager = results(partial(kernel, groups=32), inputs, dy)
    compiled = results(torch.compile(partial(kernel, groups=32), fullgraph=True), inputs, dy)
    assert torch.equal(eager[0], compiled[0]) and torch.equal(eager[1], compiled[1])
    for x, y in zip(eager[2:], compiled[2:], strict=True):
        assert error(x, y.double()) <= 1e-6


@pytest.mark.gpu
def test_the_operators_are_well_formed():
    """Schemas, autograd, fake tensors: torch's own checks."""
    (x, weight, bias), dy = case(2, 320, 5, 7, torch.bfloat16, device="cuda")
    shift = torch.randn(2, 320, device="cuda")
    torch.library.opcheck(
        forward, (x.requires_grad_(), 32, weight.requires_grad_(), bias, EPS, True, shift, None)
    )
    torch.library.opcheck(forward, (x, 32, weight, bias, EPS, False, None, x.detach().clone()))
    _, _, mean, rstd = forward(x.detach(), 32, weight.detach(), bias, EPS, True, shift, None)
    torch.library.opcheck(backward, (dy, x.detach(), weight.detach(), bias, True, shift, mean, rstd, None))
    torch.library.opcheck(backward, (dy, x.detach(), weight.detach(), bias, False, None, mean, rstd, dy))


@pytest.mark.gpu
def test_under_autocast_and_checkpointing():
    """The map keeps bfloat16, the parameters and their gradients float32."""
    inputs, dy = case(2, 320, 16, 16, torch.bfloat16, device="cuda")
    alone = results(partial(kernel, groups=32), inputs, dy)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        ours = results(lambda *x: checkpoint(partial(kernel, groups=32), *x, use_reentrant=False), inputs, dy)
    assert [x.dtype for x in ours] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    assert all(torch.equal(x, y) for x, y in zip(alone, ours, strict=True))
