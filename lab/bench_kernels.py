"""`python -m lab.bench --suite gpu --only kernels`: the Triton kernels against torch's ways of the same work.

A row of each shape; its floor is the bytes that must move at this GPU's copy rate, or the products at its
rate of products, whichever takes longer. Correctness comes first: in memory that was filled with NaN, our
error against float64 may be at most twice that of plain torch in the same precision, and a second run must
give the same bits. Otherwise the row reads FAIL and is not timed. A peer that fails is named with its error.

A time is the median of replays of a CUDA graph (`triton.testing.do_bench_cudagraph`) that calls the function
on several sets of inputs, together larger than the cache: neither launches nor the cache are measured. Ours
and the peers run twice each, in mirrored order. The time of backward is that of both passes less forward's.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from importlib.metadata import distributions
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import reference
from kernels.cross_attention import cross_attention
from kernels.group_norm import add_group_norm, group_norm
from kernels.row_attention import row_attention
from kernels.upsample_cross_entropy import upsample_cross_entropy
from run.compiled import OPTIONS
from run.folder import commit
from unet import UNet, UNetConfig

Clock = Callable[[Callable[[], object]], float]  # microseconds of one call
Function = Callable[..., Tensor]

ROTATED = 180e6  # bytes of all input sets: three times the 60 MB second-level cache of an H200
MOST_SETS = 24


def gpu_clock(work: Callable[[], object]) -> float:
    """Microseconds of `work` on the GPU, the median of a CUDA graph's replays."""
    from triton.testing import do_bench_cudagraph  # Triton has wheels for Linux only

    torch.cuda.synchronize()  # the graph runs on a stream of its own
    return do_bench_cudagraph(work, rep=6, return_mode="median") * 1e3  # 10 replays of 6 ms


# ---- a row


@dataclass(frozen=True)
class Case:
    """The same work by our kernel and by torch."""

    name: str
    inputs: Callable[[], list[Tensor]]  # new tensors; if one requires a gradient, backward is measured too
    ours: Function
    plain: Function  # in any precision
    peers: dict[str, Function]
    key: tuple[str, int] | None  # the entry of kernels.WINS
    moved: tuple[float, float]  # least bytes of forward and of backward
    products: tuple[float, float] = (0.0, 0.0)  # their least floating-point operations
    slack: float = 2.0  # times plain torch's error is allowed


@contextmanager
def nan_memory() -> Iterator[None]:
    """Fill new memory with NaN, so that unwritten results are noticed."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # with torch's default of filling memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def evaluate(function: Function, inputs: list[Tensor], dy: Tensor | None) -> list[Tensor]:
    """The result and, given its gradient dy, the gradients of the inputs that require one."""
    y = function(*inputs)
    if dy is None:
        return [y] if isinstance(y, Tensor) else y
    return [y, *torch.autograd.grad(y, [x for x in inputs if x.requires_grad], dy)]


def error(result: Tensor, exact: Tensor) -> float:
    """Relative RMS error, infinite for NaN."""
    result, exact = result.detach().double(), exact.detach()
    ratio = ((result - exact).norm() / exact.norm().clamp(min=1e-30)).item()
    return math.inf if math.isnan(ratio) else ratio


def check(case: Case) -> dict:
    """The row of a case without times: the worst of its errors, and whether it is right and repeats."""
    inputs = case.inputs()
    trained = any(x.requires_grad for x in inputs)
    dy = torch.randn_like(case.plain(*inputs)) if trained else None
    doubled = [x.detach().double() if x.is_floating_point() else x for x in inputs]
    doubled = [y.requires_grad_(x.requires_grad) for x, y in zip(inputs, doubled, strict=True)]
    exact = evaluate(case.plain, doubled, dy.double() if trained else None)
    plain = evaluate(case.plain, inputs, dy)
    with nan_memory():
        ours, again = (evaluate(case.ours, inputs, dy) for _ in range(2))
    errors = [(error(x, z), error(y, z)) for x, y, z in zip(ours, plain, exact, strict=True)]
    worst, theirs = max(errors, key=lambda pair: pair[0] - case.slack * pair[1])
    row = {"case": case.name, "key": case.key, "error": worst, "plain": theirs}
    if not all(map(torch.equal, ours, again)):
        return row | {"right": False, "note": "a second run differs"}
    return row | {"right": worst <= case.slack * theirs + 1e-6}


def measure(case: Case, rates: dict[str, float], clock: Clock) -> dict:
    """The row of a case; with times if it is right."""
    row = check(case)
    return row | timed(case, {"triton": case.ours}, case.peers, rates, clock) if row["right"] else row


def sentence(problem: BaseException) -> str:
    if isinstance(problem, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(problem).__name__}: {str(problem).partition(chr(10))[0][:200]}"


@contextmanager
def noted(failed: dict[str, str], name: str) -> Iterator[None]:
    """Note an error: of memory, of a compiler, of a backend that does not support the shape. One after which
    nothing can run on the GPU is raised.
    """
    try:
        yield
    except torch.AcceleratorError:
        raise
    except Exception as problem:  # noqa: BLE001 - compilers raise anything
        failed[name] = sentence(problem)


def timed(
    case: Case, ours: dict[str, Function], peers: dict[str, Function], rates: dict[str, float], clock: Clock
) -> dict:
    """Microseconds of each function's passes (forward, and backward if an input requires a gradient), the
    means of two turns; the floor of each; and the errors of peers that fail.
    """
    sets = [case.inputs()]
    size = sum(x.numel() * x.element_size() for x in sets[0])
    more = min(MOST_SETS - 1, max(1, int(ROTATED / size))) if sets[0][0].is_cuda else 0
    sets += [case.inputs() for _ in range(more)]
    trained = any(x.requires_grad for x in sets[0])
    dys = [torch.randn_like(case.plain(*inputs)) for inputs in sets] if trained else []
    functions, turns, failed = ours | peers, defaultdict(list), {}
    for name in (*functions, *reversed(functions)):
        with nullcontext() if name in ours else noted(failed, name):
            turns[name].append(time_passes(functions[name], sets, dys, clock))
    turns = {name: x for name, x in turns.items() if name not in failed}
    means = {name: [*map(statistics.mean, zip(*passes, strict=True))] for name, passes in turns.items()}
    costs = zip(case.moved, case.products, strict=True)
    floor = [max(x / rates["copy"], y / rates["products"]) * 1e6 for x, y in costs][: 1 + trained]
    ours = {name: means.pop(name) for name in ours}
    return {"ours": ours, "peers": means, "failed": failed, "floor": floor}


def time_passes(function: Callable, sets: list[list[Tensor]], dys: list[Tensor], clock: Clock) -> list[float]:
    """Microseconds of forward and, if there are gradients dys, of backward, per set of inputs."""

    def work(gradients: list[Tensor] | list[None]) -> None:
        for inputs, dy in zip(sets, gradients, strict=True):
            evaluate(function, inputs, dy)

    forward = clock(lambda: work([None] * len(sets))) / len(sets)
    if not dys:
        return [forward]
    return [forward, max(clock(lambda: work(dys)) / len(sets) - forward, 1e-3)]  # noise may exceed backward


# ---- the cases


@dataclass(frozen=True)
class Sizes:
    """The shapes of Stable Diffusion v1.5 at 512x512."""

    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    batches: tuple[int, ...] = (16, 2)
    levels: tuple[tuple[int, int], ...] = ((4096, 40), (1024, 80), (256, 160), (64, 160))  # N, d
    contexts: tuple[int, ...] = (32, 77, 150)
    context: int = 77  # of a text
    heads: int = 8
    unet: UNetConfig = field(default_factory=UNetConfig)
    projected: tuple[int, ...] = (16, 1)
    backends: tuple[str, ...] = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION")
    unet_maps: tuple[tuple[int, int, int], ...] = (  # B, C, side
        *((16, 320, 64), (16, 960, 64), (16, 640, 32), (16, 1920, 32)),
        *((16, 1280, 16), (16, 2560, 16), (16, 1280, 8), (2, 320, 64)),
    )
    block_maps: tuple[tuple[int, int, int], ...] = ((16, 320, 64), (16, 640, 32), (16, 1280, 16))
    vae_maps: tuple[tuple[int, int, int], ...] = ((4, 128, 512), (4, 256, 256), (4, 512, 128), (4, 512, 64))
    groups: int = 32
    logits: tuple[int, int, int, int] = (4, 150, 64, 8)  # B, K, side, stride
    wide: tuple[int, int, int] = (4, 4096, 512)  # B, N, d
    convolutions: tuple[tuple[int, int, int, int], ...] = (  # B, channels in and out, side; last: the VAE's
        *((16, 320, 320, 64), (16, 960, 320, 64), (16, 640, 640, 32), (16, 1920, 640, 32)),
        *((16, 1280, 1280, 16), (16, 2560, 1280, 16), (16, 1280, 1280, 8)),
        *((4, 128, 128, 512), (4, 256, 256, 256), (4, 512, 512, 128)),
    )
    compiled: bool = True

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype)

    def peers(self, plain: Function) -> dict[str, Function]:
        compiled = {"compiled": torch.compile(plain, dynamic=False, options=OPTIONS)} if self.compiled else {}
        return {"eager": plain} | compiled


def attention_cases(sizes: Sizes) -> Iterator[Case]:
    """Cross-attention at the four levels of the UNet; k and v are slices of one product's result."""
    n, bytes_each, plain = sizes.heads, sizes.dtype.itemsize, reference.attention
    peers = {name: sdpa_kernel(getattr(SDPBackend, name))(plain) for name in sizes.backends}
    for B, (N, d), M in product(sizes.batches, sizes.levels, sizes.contexts):

        def inputs(B: int = B, N: int = N, M: int = M, d: int = d) -> list[Tensor]:
            q, kv = sizes.random(B, N, n, d), sizes.random(B, M, 2 * n, d)
            return [x.detach().requires_grad_() for x in (q, *kv.chunk(2, dim=2))]

        name, key = f"cross-attention B {B} N {N} M {M} d {d}", ("cross_attention", d)
        moved, flops = bytes_each * B * n * d * (2.0 * N + 2 * M), 4.0 * B * n * N * M * d
        costs = (moved, 2 * moved), (flops, 2.5 * flops)
        yield Case(name, inputs, cross_attention, plain, peers, key, *costs)


def block_cases(sizes: Sizes) -> Iterator[Case]:
    """A transformer block's norm, cross-attention and residual: all that unet.py does there."""
    n, C, B, M = sizes.heads, sizes.unet.context_width, sizes.batches[0], sizes.context

    def chain(attend: Function, x: Tensor, context: Tensor, *weights: Tensor) -> Tensor:
        scale, shift, q, k, v, out, bias = weights
        q = F.linear(F.layer_norm(x, x.shape[-1:], scale, shift), q)
        if attend is reference.attention:
            k, v = F.linear(context, k), F.linear(context, v)
        else:  # as UNet.keys_values
            k, v = F.linear(context, torch.cat([k, v])).chunk(2, dim=-1)
        y = attend(*(part.unflatten(-1, (n, -1)) for part in (q, k, v)))
        return x + F.linear(y.flatten(2), out, bias)

    plain = lambda *tensors: chain(reference.attention, *tensors)
    for N, d in sizes.levels:

        def inputs(N: int = N, D: int = n * d) -> list[Tensor]:
            q, k, v, out = (sizes.random(D, x) * x**-0.5 for x in (D, C, C, D))
            scale, shift, bias = (sizes.random(D) for _ in range(3))
            return [sizes.random(B, N, D), sizes.random(B, M, C), scale, shift, q, k, v, out, bias]

        D, size = n * d, sizes.dtype.itemsize
        moved = size * (2.0 * B * N * D + B * M * C + 2 * D * (C + D))
        flops = 4.0 * B * D * (N * D + M * C + N * M)
        name = f"cross-attention block B {B} N {N} M {M} C {D}"
        ours, costs = partial(chain, cross_attention), ((moved, 0.0), (flops, 0.0))
        yield Case(name, inputs, ours, plain, sizes.peers(plain), None, *costs)


class KeysValues(UNet):
    """The keys and values of every layer."""

    def forward(self, context: Tensor) -> list[Tensor]:
        return [x for pair in self.keys_values(context) for x in pair]


def projection_cases(sizes: Sizes) -> Iterator[Case]:
    """The keys and values of all cross-attentions: one product, `UNet.keys_values`, against a Linear each."""
    with torch.device("meta"):
        unet = KeysValues(sizes.unet)
    last = (".attn2.to_k.weight", ".attn2.to_v.weight")
    widths = {name: len(x) for name, x in unet.named_parameters() if name.endswith(last)}  # as executed
    C, M, D = sizes.unet.context_width, sizes.context, sum(widths.values())

    def ours(context: Tensor, *weights: Tensor) -> list[Tensor]:
        return functional_call(unet, dict(zip(widths, weights, strict=True)), (context,))

    n = sizes.unet.heads
    plain = lambda context, *weights: [F.linear(context, x).unflatten(-1, (n, -1)) for x in weights]
    for B in sizes.projected:
        inputs = lambda B=B: [sizes.random(B, M, C), *(sizes.random(x, C) / C**0.5 for x in widths.values())]
        costs = (sizes.dtype.itemsize * (B * M * (C + D) + 1.0 * C * D), 0.0), (2.0 * B * M * C * D, 0.0)
        name, peers = f"keys and values B {B} M {M}, {len(widths) // 2} layers", {"eager": plain}
        yield Case(name, inputs, ours, plain, peers, None, *costs)


def norm_cases(sizes: Sizes) -> Iterator[Case]:
    """GroupNorm with SiLU, or of the sum of two maps, channels-last; of the VAE's without gradients."""
    maps = [(True, True, x) for x in sizes.unet_maps] + [(True, False, x) for x in sizes.vae_maps]
    for silu, trained, (B, C, side) in maps + [(False, True, x) for x in sizes.block_maps]:

        def plain(weight: Tensor, bias: Tensor, x: Tensor, *residual: Tensor) -> Tensor:
            y = F.group_norm(sum(residual, x), sizes.groups, weight, bias, 1e-5)
            return y if residual else F.silu(y)

        def ours(weight: Tensor, bias: Tensor, x: Tensor, *residual: Tensor) -> Tensor:
            if residual:
                return add_group_norm(x, *residual, sizes.groups, weight, bias, 1e-5)[1]
            return group_norm(x, sizes.groups, weight, bias, 1e-5, silu=True)

        def inputs(
            shape: tuple = (B, C, side, side), trained: bool = trained, n: int = 2 - silu
        ) -> list[Tensor]:
            x = [sizes.random(*shape).contiguous(memory_format=torch.channels_last) for _ in range(n)]
            weights = sizes.random(shape[1]), sizes.random(shape[1])
            return [x.requires_grad_(trained) for x in (*weights, *x)]

        of = " + SiLU" if silu else " of a sum"
        name = f"GroupNorm{of} {'UNet' if trained else 'VAE'} B {B} C {C} {side}x{side}"
        values = B * C * side * side * sizes.dtype.itemsize
        moved = 3.0 * values, 5.0 * values  # x is read twice: 6 bytes a value in bfloat16; backward 10
        if not silu:
            moved = 5.0 * values, 6.0 * values  # and the sum is stored; backward its other gradient is read
        key = "group_norm_silu" if silu else "group_norm", C
        yield Case(name, inputs, ours, plain, sizes.peers(plain), key, moved)


def loss_cases(sizes: Sizes) -> Iterator[Case]:
    """The loss of logits at stride 8 at the size of the image."""
    B, K, side, stride = sizes.logits
    large = stride * side

    def inputs() -> list[Tensor]:
        labels = torch.randint(0, K, (B, large, large), device=sizes.device)
        labels[:, :3] = reference.IGNORE
        return [sizes.random(B, K, side, side).requires_grad_(), labels]

    def plain(logits: Tensor, labels: Tensor) -> Tensor:
        logits = logits if logits.dtype == torch.float64 else logits.float()
        logits = F.interpolate(logits, (large, large), mode="bilinear", align_corners=False)
        return F.cross_entropy(logits, labels, ignore_index=reference.IGNORE, reduction="sum")

    ours = lambda *tensors: upsample_cross_entropy(*tensors)[0]
    small, labels, flops = B * K * side**2 * sizes.dtype.itemsize, 8.0 * B * large**2, 10.0 * B * K * large**2
    shape, peers = f"B {B} K {K} {side} -> {large}", sizes.peers(plain)
    name, key = f"upsampling + cross-entropy {shape}", ("upsample_cross_entropy", K)
    costs = (small + labels, 2 * small + labels), (flops, 2 * flops)
    yield Case(name, inputs, ours, plain, peers, key, *costs)


def wide_cases(sizes: Sizes) -> Iterator[Case]:
    """The autoencoder's attention: one head of 512 channels over 64x64 positions, without gradients."""
    B, N, d = sizes.wide
    plain, peers = reference.attention, {"torch's choice": reference.attention}
    costs = (4.0 * sizes.dtype.itemsize * B * N * d, 0.0), (4.0 * B * N * N * d, 0.0)
    inputs = lambda: [sizes.random(B, N, 1, d) for _ in range(3)]
    name, key = f"wide attention B {B} N {N} d {d}", ("row_attention", d)
    slack = 3.0  # its scores are rounded to bfloat16, torch's are not
    yield Case(name, inputs, row_attention, plain, peers, key, *costs, slack=slack)


def convolution_cases(sizes: Sizes) -> Iterator[Case]:
    """3x3 convolutions by torch alone, whose rate on a GPU decides what is worth doing."""
    for B, C, K, side in sizes.convolutions:

        def inputs(B: int = B, C: int = C, K: int = K, side: int = side) -> list[Tensor]:
            new = sizes.random(B, C, side, side), sizes.random(K, C, 3, 3)
            return [x.contiguous(memory_format=torch.channels_last).requires_grad_(B > 4) for x in new]

        name, plain = f"convolution B {B} {C} -> {K} {side}x{side}", partial(F.conv2d, padding=1)
        flops, moved = 18.0 * B * C * K * side**2, sizes.dtype.itemsize * B * (C + K) * side**2
        costs = (moved, 2.0 * moved), (flops, 2 * flops)
        yield Case(name, inputs, plain, plain, {}, None, *costs)


# ---- the report


def measure_rates(sizes: Sizes, clock: Clock) -> dict[str, float]:
    """Bytes per second of a 1 GiB copy, read and written; operations per second of an 8192 x 8192 product."""
    n, side = (2**29, 8192) if sizes.device == "cuda" else (2**16, 64)
    source, a, b = sizes.random(n), sizes.random(side, side), sizes.random(side, side)
    target = torch.empty_like(source)
    copied, multiplied = clock(lambda: target.copy_(source)) * 1e-6, clock(lambda: a @ b) * 1e-6
    return {"copy": 2.0 * n * source.element_size() / copied, "products": 2.0 * side**3 / multiplied}


def header(device: str) -> str:
    """The machine, the versions and the commit of a measurement."""
    found, packages = (
        {x.name: x.version for x in distributions()},
        ("torch", "triton", "diffusers", "transformers"),
    )
    versions = ", ".join(f"{x} {found.get(x, 'missing')}" for x in packages)
    versions = f"{versions}, commit {commit() or 'unknown'}, {date.today()}"
    if device == "cpu":
        return f"rehearsal on a CPU, {versions}: the times mean nothing"
    major, minor = torch.cuda.get_device_capability()
    cudnn = torch.backends.cudnn.version()
    return f"{torch.cuda.get_device_name()}, sm_{major}{minor}, {versions}, cuDNN {cudnn}, bfloat16"


def all_cases(sizes: Sizes) -> Iterator[Case]:
    """Every case that has a kernel; those of many shapes come last."""
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = 64  # a graph per shape: beyond the default of 8 they run eagerly
    for cases in (loss_cases, wide_cases, projection_cases, block_cases, norm_cases, attention_cases):
        yield from cases(sizes)
