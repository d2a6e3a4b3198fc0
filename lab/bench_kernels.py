"""`python -m lab.bench --suite kernels`: the Triton kernels on a GPU, against all that torch has for their work.

First what the conclusions of kernels/ rest on: this GPU's own rates of copying and multiplying, of its
convolutions and of its attention, each way that torch can take. Then one row per shape: our time, the fastest
peer's, their ratio, and the floor: the bytes that must move at the measured copy rate, or the products at the
measured rate of products, whichever takes longer. A row is right first: on fresh inputs, in memory that was
filled with NaN before, ours may be off float64 by at most twice what plain torch is in the same precision,
and it must repeat itself to the bit. Else it says FAIL, and the exit code is 1.

A time is that of a CUDA graph of several calls, each with inputs of its own, together larger than the cache,
so that neither launches nor the cache are measured; the median of some replays, ours and its peers in turns.
A backward time is that of forward and backward less that of forward.

Top to bottom: times, a row, the cases, the rates, the report.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import reference
from kernels.cross_attention import cross_attention
from kernels.group_norm import group_norm_silu
from kernels.row_attention import row_attention
from kernels.upsample_cross_entropy import upsample_argmax, upsample_cross_entropy

ROTATED = 180e6  # bytes of inputs in turn: three times the 60 MB second-level cache of an H200
MOST_SETS = 24
REPLAYS = 9
SLACK = 2.0  # times plain torch's own error are right, if a case does not say otherwise
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
GOALS = {  # the largest geometric mean of the ratios, ours / best peer, that was aimed at
    "cross-attention, batch 16, forward": 0.80,
    "cross-attention, batch 16, backward": 0.60,
    "cross-attention, batch 2, backward": 0.40,
    "GroupNorm + SiLU, forward": 0.40,
    "keys and values, batch 1, forward": 0.25,
    "keys and values, batch 16, forward": 0.60,
    "upsampling + cross-entropy, forward": 0.15,
    "upsampling + cross-entropy, backward": 0.15,
}


# ---- times


def microseconds(calls: Sequence[Callable], device: torch.device) -> float:
    """Of one call; on a CPU by its clock, which only rehearses this file."""
    if device.type == "cpu":
        start = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - start) / len(calls) * 1e6
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0](), calls[-1]()  # compiles, and chooses algorithms
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()  # keeps the GPU busy while the CPU hands over what is timed
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


@contextmanager
def poisoned() -> Iterator[None]:
    """New memory is full of NaN: what is not written is seen."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before


# ---- a row


@dataclass
class Case:
    """The same work done by us and by torch.

    `inputs()` makes fresh ones; `moved` and `products` are the bytes and floating-point operations that
    forward, and backward, cannot do without. `key` is the entry of kernels.WINS.
    """

    goal: str
    name: str
    inputs: Callable[[], list]
    ours: Callable[..., Tensor]
    plain: Callable[..., Tensor]  # torch's, in any precision
    peers: dict[str, Callable[..., Tensor]]
    moved: tuple[float, float]
    products: tuple[float, float] = (0.0, 0.0)
    backward: bool = True
    key: tuple[str, int] | None = None
    slack: float = SLACK


@dataclass
class Row:
    """What was measured of a case in one direction; without a time if it is wrong."""

    case: str
    goal: str
    direction: str
    error: float
    plain_error: float
    repeats: bool
    floor: float  # microseconds
    ours: float = float("nan")
    peers: dict[str, float] = field(default_factory=dict)
    key: tuple[str, int] | None = None
    slack: float = SLACK

    @property
    def right(self) -> bool:
        return self.error <= self.slack * self.plain_error + 1e-6 and self.repeats

    @property
    def best(self) -> str:
        return min(self.peers, key=self.peers.get)

    @property
    def ratio(self) -> float:
        return self.ours / self.peers[self.best]


def leaves(inputs: list) -> list[Tensor]:
    return [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]


def both(function: Callable, inputs: list, seed: Tensor | None) -> list[Tensor]:
    """The result and, of a seed, the gradients."""
    y = function(*inputs)
    return [y] if seed is None else [y, *torch.autograd.grad(y, leaves(inputs), seed)]


def doubled(inputs: list) -> list:
    """Inputs in float64."""
    made = []
    for x in inputs:
        wide = isinstance(x, Tensor) and x.is_floating_point()
        made.append(x.detach().double().requires_grad_(x.requires_grad) if wide else x)
    return made


def error(found: Tensor, exact: Tensor) -> float:
    """Relative RMS; of labels the share that differs."""
    if not exact.is_floating_point():
        return float((found != exact).double().mean())
    found, exact = found.detach().double(), exact.detach()
    return float((found - exact).norm() / exact.norm().clamp(min=1e-30))


def check(case: Case) -> list[tuple[float, float, bool]]:
    """Per direction: our error, plain torch's, and whether a second run gives the same bits."""
    inputs = case.inputs()
    with torch.no_grad():
        like = case.plain(*inputs)
    seed = torch.randn_like(like) if case.backward else None
    exact = both(case.plain, doubled(inputs), None if seed is None else seed.double())
    plain = both(case.plain, inputs, seed)
    with poisoned():
        ours, again = (both(case.ours, inputs, seed) for _ in range(2))
    found = []
    for part in (slice(0, 1), slice(1, None)):
        pairs = list(zip(ours[part], plain[part], again[part], exact[part], strict=True))
        if pairs:
            errors, theirs, repeats = zip(
                *((error(a, d), error(b, d), torch.equal(a, c)) for a, b, c, d in pairs), strict=True
            )
            worst = max(range(len(errors)), key=lambda i: errors[i] - case.slack * theirs[i])
            found.append((errors[worst], theirs[worst], all(repeats)))
    return found


def measure(case: Case, rates: "Rates", device: torch.device) -> list[Row]:
    """Right first, then both directions' times, ours and the peers in turns."""
    rows = []
    for i, (ours, plain, repeats) in enumerate(check(case)):
        direction = ("forward", "backward")[i]
        floor = max(case.moved[i] / rates.copy, case.products[i] / rates.products) * 1e6
        numbers = ours, plain, repeats, floor
        rows.append(Row(case.name, case.goal, direction, *numbers, key=case.key, slack=case.slack))
    if all(row.right for row in rows):
        for name, values in time_all(case, device).items():
            for row, value in zip(rows, values, strict=True):
                if name == "ours":
                    row.ours = value
                else:
                    row.peers[name] = value
    return rows


def time_all(case: Case, device: torch.device) -> dict[str, list[float]]:
    """Microseconds of ours and of each peer that takes the shape: forward and, if there is one, backward."""
    first = case.inputs()
    size = sum(x.numel() * x.element_size() for x in first if isinstance(x, Tensor))
    count = 1 if device.type == "cpu" else max(2, min(MOST_SETS, int(ROTATED / size) + 1))
    sets = [first, *(case.inputs() for _ in range(count - 1))]
    seeds = [[None] * count]
    if case.backward:
        seeds.append([torch.randn_like(case.plain(*inputs)) for inputs in sets])
    functions = {"ours": case.ours, **case.peers}
    times: dict[str, list[list[float]]] = {name: [] for name in functions}
    for turn in (list(functions), list(reversed(functions))):
        for name in turn:
            passes = [[partial(both, functions[name], *x) for x in zip(sets, y, strict=True)] for y in seeds]
            try:
                times[name].append([microseconds(calls, device) for calls in passes])
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # a backend that does not take this shape
                if name == "ours":
                    raise
    found = {}
    for name, turns in times.items():
        if turns:
            forward, *whole = (statistics.mean(x) for x in zip(*turns, strict=True))
            found[name] = [forward, *(max(x - forward, 1e-3) for x in whole)]  # noise may be larger
    return found


# ---- the cases


def sdpa(name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """torch's attention by one of its backends."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(BACKENDS[name]):
            return reference.attention(q, k, v)

    return run


def attention_cases(sizes: "Sizes") -> Iterator[Case]:
    """Cross-attention at the four levels of the UNet, 512x512; k and v are slices of one product's result."""
    for batch in sizes.batches:
        for N, d in sizes.levels:
            for M in sizes.contexts:
                n = sizes.heads

                def inputs(B=batch, N=N, M=M, n=n, d=d) -> list[Tensor]:
                    kv = sizes.random(B, M, 2 * n * d)
                    k, v = (x.unflatten(-1, (n, d)).detach().requires_grad_() for x in kv.chunk(2, dim=-1))
                    return [sizes.random(B, N, n, d).requires_grad_(), k, v]

                size, width = sizes.dtype.itemsize, batch * n * d
                forward = size * width * (2 * N + 2 * M)
                flops = 4.0 * batch * n * N * M * d
                yield Case(
                    f"cross-attention, batch {batch}",
                    f"cross-attention B {batch} N {N} M {M} d {d}",
                    inputs,
                    cross_attention,
                    reference.attention,
                    {name: sdpa(name) for name in sizes.backends},
                    (forward, 2.0 * forward),
                    (flops, 2.5 * flops),
                    key=("cross_attention", d),
                )


def norm_cases(sizes: "Sizes") -> Iterator[Case]:
    """GroupNorm + SiLU on channels-last maps of the UNet and, without gradients, of the autoencoder."""

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.silu(F.group_norm(x, sizes.groups, weight, bias, 1e-5))

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return group_norm_silu(x, sizes.groups, weight, bias, 1e-5)

    compiled = torch.compile(plain, dynamic=False) if sizes.compile else None
    for part, batch, C, side in sizes.maps:
        trained = part == "UNet"

        def inputs(B=batch, C=C, side=side, trained=trained) -> list[Tensor]:
            x = sizes.random(B, C, side, side).contiguous(memory_format=torch.channels_last)
            weight, bias = sizes.random(C), sizes.random(C)
            return [y.detach().requires_grad_(trained) for y in (x, weight, bias)]

        values = batch * C * side * side * sizes.dtype.itemsize
        yield Case(
            "GroupNorm + SiLU",
            f"GroupNorm + SiLU {part} B {batch} C {C} {side}x{side}",
            inputs,
            ours,
            plain,
            {"eager": plain} | ({"compiled": compiled} if compiled else {}),
            (3.0 * values, 5.0 * values),  # x is read twice: 6 bytes a value in bfloat16; backward 10
            backward=trained,
            key=("group_norm_silu", C),
        )


def projection_cases(sizes: "Sizes") -> Iterator[Case]:
    """Keys and values of all cross-attention layers: one product against one Linear each."""
    widths = [width for width, count in sizes.layers for _ in range(2 * count)]
    for batch in (1, 16):

        def inputs(B=batch) -> list[Tensor]:
            return [
                sizes.random(B, sizes.tokens, sizes.context),
                *(sizes.random(x, sizes.context) for x in widths),
            ]

        def together(x: Tensor, *weights: Tensor) -> Tensor:
            return F.linear(x, torch.cat(weights))

        def alone(x: Tensor, *weights: Tensor) -> Tensor:
            return [F.linear(x, weight) for weight in weights][-1]

        total = sum(widths)
        rows = batch * sizes.tokens
        moved = sizes.dtype.itemsize * (total * sizes.context + rows * (total + sizes.context))
        yield Case(
            f"keys and values, batch {batch}",
            f"keys and values of {len(widths) // 2} layers, B {batch}",
            inputs,
            together,
            together,
            {"one Linear each": alone},
            (moved, 0.0),
            (2.0 * rows * total * sizes.context, 0.0),
            backward=False,
        )


def loss_cases(sizes: "Sizes") -> Iterator[Case]:
    """The loss of a map of logits at stride 8 at the picture's size; and the classes of its pixels."""
    B, K, side, stride = sizes.logits

    def inputs(trained: bool) -> list:
        logits = sizes.random(B, K, side, side).requires_grad_(trained)
        labels = torch.randint(0, K, (B, stride * side, stride * side), device=sizes.device)
        labels[:, :3] = 255
        return [logits, labels]

    def ours(logits: Tensor, labels: Tensor) -> Tensor:
        return upsample_cross_entropy(logits, labels)[0]

    def plain(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(large(logits, labels), labels, ignore_index=255, reduction="sum")

    def large(logits: Tensor, labels: Tensor) -> Tensor:
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=False)

    pixels = B * (stride * side) ** 2
    small = B * K * side * side * sizes.dtype.itemsize
    peers = {"eager": plain} | ({"compiled": torch.compile(plain, dynamic=False)} if sizes.compile else {})
    yield Case(
        "upsampling + cross-entropy",
        f"upsampling + cross-entropy B {B} K {K} {side} -> {stride * side}",
        lambda: inputs(True),
        ours,
        plain,
        peers,
        (small + 8.0 * pixels, 2.0 * small + 8.0 * pixels),
        (10.0 * pixels * K, 20.0 * pixels * K),
        key=("upsample_cross_entropy", K),
    )

    def most(logits: Tensor, labels: Tensor) -> Tensor:
        return large(logits, labels).argmax(dim=1)

    yield Case(
        "upsampling + arg-max",
        f"upsampling + arg-max B {B} K {K} {side} -> {stride * side}",
        lambda: inputs(False),
        lambda logits, labels: upsample_argmax(logits, tuple(labels.shape[1:])),
        most,
        {"eager": most},
        (small + 8.0 * pixels, 0.0),
        (10.0 * pixels * K, 0.0),
        backward=False,
        key=("upsample_argmax", K),
    )


def wide_cases(sizes: "Sizes") -> Iterator[Case]:
    """The autoencoder's attention: one head of 512 channels over 64x64 positions, without gradients."""
    B, N, d = sizes.wide
    size = sizes.dtype.itemsize
    yield Case(
        "attention of the autoencoder",
        f"wide attention B {B} N {N} d {d}",
        lambda: [sizes.random(B, N, 1, d) for _ in range(3)],
        row_attention,
        reference.attention,
        {"torch's choice": reference.attention},
        (4.0 * size * B * N * d, 0.0),
        (4.0 * B * N * N * d, 0.0),
        backward=False,
        key=("row_attention", d),
        slack=3.0,  # its scores are rounded to bfloat16, which torch's are not
    )


@dataclass
class Sizes:
    """The shapes of Stable Diffusion v1.5 at 512x512; `small` ones rehearse the suite without a GPU."""

    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    batches: tuple[int, ...] = (16, 2)
    levels: tuple[tuple[int, int], ...] = ((4096, 40), (1024, 80), (256, 160), (64, 160))  # N, d
    contexts: tuple[int, ...] = (32, 77, 150)
    heads: int = 8
    backends: tuple[str, ...] = tuple(BACKENDS)
    maps: tuple[tuple[str, int, int, int], ...] = (  # part, B, C, side
        ("UNet", 16, 320, 64),
        ("UNet", 16, 960, 64),
        ("UNet", 16, 640, 32),
        ("UNet", 16, 1920, 32),
        ("UNet", 16, 1280, 16),
        ("UNet", 16, 2560, 16),
        ("UNet", 16, 1280, 8),
        ("UNet", 2, 320, 64),
        ("VAE", 4, 128, 512),
        ("VAE", 4, 256, 256),
        ("VAE", 4, 512, 128),
        ("VAE", 4, 512, 64),
    )
    groups: int = 32
    layers: tuple[tuple[int, int], ...] = ((320, 5), (640, 5), (1280, 6))  # width, how many
    context: int = 768
    tokens: int = 77
    logits: tuple[int, int, int, int] = (4, 150, 64, 8)  # B, K, side, stride
    wide: tuple[int, int, int] = (4, 4096, 512)
    compile: bool = True

    @classmethod
    def small(cls) -> "Sizes":
        return cls(
            torch.device("cpu"),
            torch.float32,  # the interpreter's bfloat16 is wrong
            batches=(2,),
            levels=((40, 8),),
            contexts=(5,),
            heads=2,
            backends=("flash",),
            maps=(("UNet", 2, 16, 4), ("VAE", 1, 16, 8)),
            groups=8,
            layers=((16, 1), (32, 2)),
            context=24,
            tokens=7,
            logits=(1, 5, 3, 4),
            wide=(1, 20, 24),
            compile=False,
        )

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype)

    def cases(self) -> Iterator[Case]:
        for made in (attention_cases, norm_cases, projection_cases, loss_cases, wide_cases):
            yield from made(self)


# ---- the rates


@dataclass
class Rates:
    """Measured: bytes per second of a copy, read and written; operations per second of products."""

    copy: float
    products: float


def measure_rates(sizes: Sizes) -> Rates:
    """A copy of 1 GiB, a product of 8192 x 8192 matrices."""
    n, side = (2**29, 8192) if sizes.device.type == "cuda" else (2**16, 64)
    source = sizes.random(n)
    target = torch.empty_like(source)
    a, b = sizes.random(side, side), sizes.random(side, side)
    copied = microseconds([lambda: target.copy_(source)], sizes.device) * 1e-6
    multiplied = microseconds([lambda: a @ b], sizes.device) * 1e-6
    return Rates(2.0 * n * source.element_size() / copied, 2.0 * side**3 / multiplied)


def convolutions(sizes: Sizes, rates: Rates) -> Iterator[str]:
    """3x3 convolutions, channels-last, forward: the largest part of all time, and not ours to write."""
    shapes = [part for part in sizes.maps if part[2] <= 1280]
    for part, batch, C, side in shapes:
        x = sizes.random(batch, C, side, side).contiguous(memory_format=torch.channels_last)
        weight = sizes.random(C, C, 3, 3).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            took = microseconds([lambda x=x, w=weight: F.conv2d(x, w, padding=1)] * 3, sizes.device) * 1e-6
        rate = 18.0 * batch * C * C * side * side / took
        yield f"| {part} B {batch} C {C} {side}x{side} | {rate / 1e12:,.0f} | {rate / rates.products:.0%} |"


def chosen_backend(sizes: Sizes, N: int, M: int, d: int, batch: int) -> str:
    """The name of the kernel that torch's attention really launches by default."""
    q, k, v = (sizes.random(batch, length, sizes.heads, d) for length in (N, M, M))
    reference.attention(q, k, v)
    if sizes.device.type == "cpu":
        return "a CPU"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        reference.attention(q, k, v)
        torch.cuda.synchronize()
    events = [x for x in profile.key_averages() if x.device_time_total > 0]
    return max(events, key=lambda x: x.device_time_total).key[:48] if events else "unknown"


def self_attention(sizes: Sizes) -> Iterator[str]:
    """What each backend needs for the UNet's self-attention, forward and backward; none of it is ours."""
    batch = sizes.batches[0]
    for N, d in sizes.levels[:3]:
        inputs = [sizes.random(batch, N, sizes.heads, d).requires_grad_() for _ in range(3)]
        seed, found = torch.randn_like(inputs[0]), []
        for name in sizes.backends:
            run = sdpa(name)
            try:
                forward, whole = (
                    microseconds([partial(both, run, inputs, x)] * 3, sizes.device) for x in (None, seed)
                )
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # it does not take this shape
                continue
            found.append(f"{name} {forward:,.0f} + {whole - forward:,.0f}")
        yield f"| B {batch} N {N} d {d} | {chosen_backend(sizes, N, N, d, batch)} | {', '.join(found)} |"


# ---- the report


def header(device: torch.device) -> str:
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    if device.type == "cpu":
        return f"a rehearsal on the CPU, {versions}: the times mean nothing"
    major, minor = torch.cuda.get_device_capability()
    cudnn = torch.backends.cudnn.version()
    return f"{torch.cuda.get_device_name()}, sm_{major}{minor}, {versions}, cuDNN {cudnn}, bfloat16"


def line(row: Row) -> str:
    """A row of the table."""
    if not row.right:
        why = f"FAIL: error {row.error:.1e}, plain torch {row.plain_error:.1e}"
        why += "" if row.repeats else ", a second run differs"
        return f"| {row.case} | {row.direction} | {why} | | | | | |"
    numbers = (
        f"{row.ours:,.1f} | {row.peers[row.best]:,.1f} ({row.best}) | {row.ratio:.2f}"
        if row.peers
        else "- | - | -"
    )
    share = f"{row.floor:,.1f} | {row.floor / row.ours:.0%}"
    return f"| {row.case} | {row.direction} | {numbers} | {share} | {row.error:.1e} | {row.plain_error:.1e} |"


def goals(rows: list[Row]) -> Iterator[str]:
    """The geometric mean of each goal's ratios, and the worst."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row.right and row.peers:
            found.setdefault(f"{row.goal}, {row.direction}", []).append(row.ratio)
    for goal, ratios in found.items():
        wanted = f"{GOALS[goal]:.2f}" if goal in GOALS else "-"
        mean = statistics.geometric_mean(ratios)
        yield f"| {goal} | {len(ratios)} | {mean:.2f} | {max(ratios):.2f} | {wanted} |"


def wins(rows: list[Row]) -> dict[str, list[int]]:
    """What kernels.WINS should say of this GPU: sizes at which no row was slower than the best peer."""
    worst: dict[tuple[str, int], float] = {}
    for row in rows:
        if row.key:
            ratio = row.ratio if row.right and row.peers else float("inf")
            worst[row.key] = max(worst.get(row.key, 0.0), ratio)
    found: dict[str, list[int]] = {}
    for (kernel, size), ratio in sorted(worst.items()):
        if ratio < 1:
            found.setdefault(kernel, []).append(size)
    return found


def suite(sizes: Sizes, out: str | None = None) -> int:
    """Measure all, print the tables; the exit code."""
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    torch._dynamo.config.recompile_limit = 64  # a graph per shape: with torch's 8 the ninth would run eagerly
    print(header(sizes.device), flush=True)
    rates = measure_rates(sizes)
    print(f"copy {rates.copy / 1e9:,.0f} GB/s, products {rates.products / 1e12:,.1f} TFLOP/s\n")
    print("| 3x3 convolution, channels-last | TFLOP/s | of the products' rate |\n|---|---|---|")
    print("\n".join(convolutions(sizes, rates)), flush=True)
    print("\n| self-attention | torch's choice | each backend, forward + backward us |\n|---|---|---|")
    print("\n".join(self_attention(sizes)), flush=True)
    M, B = sizes.contexts[-1], sizes.batches[0]
    print("\ncross-attention by torch's choice: ", end="")
    print(", ".join(f"d {d} {chosen_backend(sizes, N, M, d, B)}" for N, d in sizes.levels[:3]), end="\n\n")
    print("| case | direction | ours us | best peer us | ratio | floor us | share | error | plain |")
    print("|---|---|---|---|---|---|---|---|---|")
    rows: list[Row] = []
    for case in sizes.cases():
        new = measure(case, rates, sizes.device)
        rows += new
        print("\n".join(map(line, new)), flush=True)
    print("\n| goal | rows | mean ratio | worst | wanted |\n|---|---|---|---|---|")
    print("\n".join(goals(rows)))
    print(f"\nkernels.WINS of this GPU: {wins(rows)}")
    if out:
        facts: list[dict[str, Any]] = [
            vars(row) | {"ratio": row.ratio if row.peers else None} for row in rows
        ]
        Path(out).write_text(
            json.dumps({"machine": header(sizes.device), "rates": vars(rates), "rows": facts})
        )
    return int(not all(row.right for row in rows))
