"""`python -m lab.bench --suite gpu --minutes 9`: what a first day on a GPU needs, in one call.

In this order: the tests that need a GPU; what decides the next work (cuDNN's convolutions, each of torch's
backends of attention, a copy, a product); our kernels against torch; the VAE's encoder, the UNet, a training
step and inference against diffusers, and all but inference against diffusers compiled. All rows and the goals
come last. Each part runs in a process of its own, so neither an illegal access nor a lack of memory harms the
next, and gets the time that later parts do not need. Rows are printed and written to the JSON file as they
come.

Times of whole models are medians of calls between CUDA events, all sides in turns. Ours runs with the kernels
that won in this call ("auto") and with all of them ("triton"). Its error may be three times that of the peer
in the same precision, both against the peer in float32; otherwise it reads FAIL and has no time.
"""

import ctypes
import json
import math
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import inference
import kernels
from lab import bench_kernels as short
from lab import bench_step as steps
from lab.bench_goals import HEAD, all_rows, line, summary, won_by
from loading.augment import normalise
from run.compiled import OPTIONS
from run.files import replace_text
from run.graph import Recorded

SLACK = 3.0  # times the peer's error
Run = Callable[[object], list[Tensor]]  # one call of a side, with results to compare


def event_clock(work: Callable[[], object]) -> float:
    """Microseconds of one call on the GPU."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def captured(forward: Callable) -> Callable:
    """The function, replayed from a CUDA graph for each shape of its first argument. The other arguments are
    those of the first call; the result is overwritten by the next one.
    """
    graphs = {}

    def run(x: Tensor, *others: object) -> object:
        if x.shape not in graphs:
            own, stream, graph = x.clone(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):  # cuDNN's trials and Triton's compiler wait for the GPU
                    forward(own, *others)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph):
                graphs[x.shape] = graph, own, forward(own, *others)
        graph, own, result = graphs[x.shape]
        own.copy_(x)
        graph.replay()
        return result

    return run


@dataclass(frozen=True)
class Plan:
    """The parts of the suite, their sizes and clocks."""

    parts: dict[str, tuple[Callable, float]]  # name -> a function that yields rows, the seconds it needs
    tests: tuple[str, ...] = ()  # pytest's arguments; by default for the files with tests that need a GPU
    sizes: short.Sizes = field(default_factory=short.Sizes)
    clock: short.Clock = short.gpu_clock  # of short work
    call_clock: short.Clock = event_clock
    work: steps.Work = field(default_factory=partial(steps.Work, 512, "cuda", half=True))
    batches: tuple[int, ...] = (16, 2)
    predicted: tuple[int, ...] = (16, 1)
    choices: tuple[str, ...] = ("auto", "triton")  # of kernels.use
    turns: tuple[int, int] = (3, 20)  # before the clock, and timed
    compile: dict | None = None  # how the only peer is compiled; None: the peers run eagerly
    options: dict = field(default_factory=lambda: {"dynamic": False, "options": OPTIONS})  # of `compile`
    capture: Callable[[Callable], Callable] = captured
    recorded: type[Recorded] = Recorded
    start: str = "spawn"  # of the processes


# ---- the parts


def run_tests(plan: Plan) -> Iterator[dict]:
    root = Path(__file__).parents[1]
    files = sorted((root / "tests").glob("test_*.py"))
    marked = [file for file in files if "pytest.mark.gpu" in file.read_text()]
    arguments, last = plan.tests or ("-m", "gpu", "--maxfail=9", "-q", *marked), ""
    command = [sys.executable, "-m", "pytest", *arguments]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as tests:
        for text in tests.stdout:
            print(text, end="", flush=True)
            last = text.strip() or last
    yield {"case": "pytest", "note": last, "right": tests.returncode == 0}


def unknowns(plan: Plan) -> Iterator[dict]:
    """Convolutions by cuDNN, attention by each of torch's backends."""
    sizes, rates = plan.sizes, short.measure_rates(plan.sizes, plan.clock)
    products = f"products {rates['products'] / 1e12:,.1f} TFLOP/s"
    yield {"case": "rates", "note": f"copy {rates['copy'] / 1e9:,.0f} GB/s, {products}", "rates": rates}
    own = (replace(sizes, batches=sizes.batches[:1], levels=(x,), contexts=x[:1]) for x in sizes.levels[:3])
    alone = [replace(case, name="self-" + case.name[6:]) for x in own for case in short.attention_cases(x)]
    across = short.attention_cases(replace(sizes, batches=sizes.batches[-1:]))
    backends = {name: sdpa_kernel(getattr(SDPBackend, name)) for name in sizes.backends}

    def measured(case: short.Case) -> dict:
        peers = {name: by(case.plain) for name, by in backends.items() if case.key}
        return short.timed(case, {"torch": case.plain}, peers, rates, plan.clock)

    yield from each(chain(short.convolution_cases(sizes), alone, across, short.wide_cases(sizes)), measured)


def our_kernels(plan: Plan) -> Iterator[dict]:
    rates = short.measure_rates(plan.sizes, plan.clock)
    yield from each(short.all_cases(plan.sizes), partial(short.measure, rates=rates, clock=plan.clock))


def each(cases: Iterable[short.Case], measured: Callable[[short.Case], dict]) -> Iterator[dict]:
    """A row of each case; an error is its note."""
    for case in cases:
        row, failed = {"right": False, "key": case.key}, {}
        with short.noted(failed, "note"):
            row = measured(case)
        yield {"case": case.name} | row | failed


def encoder(plan: Plan) -> Iterator[dict]:
    """The VAE's encoder, without gradients, against that of diffusers in the same type."""
    work = plan.work

    @torch.no_grad()
    def encode(vae: nn.Module, image: Tensor) -> list[Tensor]:
        ours = hasattr(vae, "moments")
        return [vae.moments(image)[0] if ours else vae.encode(image.to(vae.dtype)).latent_dist.mean]

    def build(half: bool, last: bool, ours: bool = False) -> Run:
        vae = steps.part(work, 0, half, last, ours)
        if plan.compile and not ours:
            vae.encoder.compile(**plan.compile)
        return partial(encode, vae)

    images = lambda B: torch.rand(B, 3, work.size, work.size, device=work.device) * 2 - 1
    yield from contest(plan, "VAE encoder", layouts(plan, build), images, plan.batches)


def unet(plan: Plan) -> Iterator[dict]:
    """The UNet's features and their backward pass, against diffusers by autocast."""
    work = plan.work

    def learn(unet: nn.Module, features: Callable, cast: bool, inputs: list[Tensor]) -> list[Tensor]:
        latent, context = inputs[0], inputs[1].detach().requires_grad_()
        t = torch.zeros(len(latent), dtype=torch.int64, device=work.device)
        with torch.autocast(work.device, torch.bfloat16, enabled=cast):
            maps = features(latent, t, context)
        torch.autograd.backward(maps, [x.detach() for x in maps])
        weight = unet.conv_in.weight.grad
        unet.zero_grad(set_to_none=True)
        return [*(x.detach() for x in maps), context.grad, weight]

    def build(half: bool, last: bool, ours: bool = False) -> Run:
        model = steps.part(work, 1, half and ours, last, ours)
        if plan.compile and not ours:
            model.compile(**plan.compile)
        return partial(learn, model, model.features if ours else steps.tapped(model), half and not ours)

    def inputs(B: int) -> list[Tensor]:
        shapes = (B, 4, work.size // 8, work.size // 8), (B, 77, work.context)
        return [torch.randn(shape, device=work.device) for shape in shapes]

    yield from contest(plan, "UNet", layouts(plan, build), inputs, plan.batches)


def layouts(plan: Plan, build: Callable[..., Run]) -> dict[str, Callable[[], Run]]:
    """Ours, the peer in both layouts of memory, and in float32; or ours and the compiled peer."""
    half = plan.work.half
    sides = {"ours": partial(build, half, last=True, ours=True)}
    if plan.compile:
        return sides | {"compiled": partial(build, half, True)}
    sides |= {"NCHW": partial(build, half, False), "channels-last": partial(build, half, True)}
    return sides | {"exact": partial(build, False, False)}


def train(plan: Plan) -> Iterator[dict]:
    """The step of train.py against the same of diffusers, transformers and our decoder."""

    def build(side: Callable, *compiled: str) -> Run:
        model, _, step = side(plan.work)
        for name in compiled:
            model.get_submodule(name).compile(**plan.compile)
        return lambda batch: [torch.tensor(x) for x in step(batch)]  # the loss, the norm of the gradient

    sides = {"ours": partial(build, steps.ours), "channels-last": partial(build, steps.peer)}
    if plan.compile:
        sides = {"ours": sides["ours"], "compiled": partial(sides["channels-last"], *steps.COMPILED)}
    batch = partial(steps.batch_of, plan.work.size)
    yield from contest(plan, "training step", sides, batch, plan.batches)
    if not plan.compile:
        sides["ours"] = partial(build, partial(steps.ours, graph=plan.recorded))
        plan, small = replace(plan, choices=plan.choices[:1]), plan.batches[-1:]
        yield from contest(plan, "training step by CUDA graph", sides, batch, small)


def predict(plan: Plan) -> Iterator[dict]:
    """The labels of images: ours as eval.py's, the peer's of bfloat16 weights."""
    work = plan.work

    def ours(graph: bool = False) -> Run:
        tada = steps.our_model(work, training=False).eval()
        if graph:
            ids = tada.tokenizer([steps.CAPTION]).to(work.device)  # a graph copies nothing from the CPU
            tada.tokenizer = lambda texts: ids.expand(len(texts), -1)
            # A cached cast would be freed after the capture.
            cast = torch.autocast(work.device, torch.bfloat16, work.half, cache_enabled=False)
            tada.forward = plan.capture(cast(tada.forward))

        def run(image: Tensor) -> list[Tensor]:
            pixels, words = normalise(image.to(work.device)), [[steps.CAPTION]] * len(image)
            with work.autocast():
                return [inference.predict(tada, pixels, words).labels]

        return run

    def peer(half: bool) -> Run:
        model, logits = steps.peer_model(work)
        model.to(torch.bfloat16 if half else None)

        @torch.no_grad()
        def run(image: Tensor) -> list[Tensor]:
            return [F.interpolate(logits(image), size=image.shape[2:], mode="bilinear").argmax(dim=1)]

        return run

    sides = {"ours": ours, "channels-last": partial(peer, work.half), "exact": partial(peer, False)}
    image = lambda B: steps.batch_of(work.size, B).image
    yield from contest(plan, "inference", sides, image, plan.predicted)
    plan, sides = replace(plan, choices=plan.choices[:1]), sides | {"ours": partial(ours, graph=True)}
    yield from contest(plan, "inference by CUDA graph", sides, image, plan.predicted[-1:])


def compiled(plan: Plan) -> Iterator[dict]:
    """The encoder, the UNet and the step against diffusers compiled; last, since that takes minutes."""
    plan = replace(plan, compile=plan.options)
    for part in (encoder, unet):
        yield from part(replace(plan, batches=plan.batches[:1]))
    yield from train(plan)


# ---- ours against peers


def contest(
    plan: Plan, name: str, sides: dict[str, Callable[[], Run]], inputs: Callable, batches: tuple[int, ...]
) -> Iterator[dict]:
    """Compare "ours" with "exact", or else with the peer, at the last of the batches; then time all sides."""
    small, built, runs, results, kept, wrong = inputs(batches[-1]), {}, {}, {}, {}, {}
    labels = [(x, "ours") for x in plan.choices] + [(x, x) for x in sides if x != "ours"]
    for label, side in reversed(labels):
        with short.noted(wrong, label):
            if side not in built:
                built[side] = torch.cuda.memory_allocated(), sides[side]()
            run = partial(call, plan, label if side == "ours" else "torch", built[side][1])
            results[label] = run(small)
            kept[label] = torch.cuda.memory_allocated() - built[side][0]
            runs[label] = run
        run = None
        if side == "exact":
            built, runs = {}, {}  # free it
    exact = results.pop("exact", None)
    theirs = next((x for label, x in results.items() if label not in plan.choices), exact)
    least = 1e-5 if exact else 0.25 if plan.compile else 0.05 if plan.work.half else 1e-4
    worst = []
    for label in results.keys() & plan.choices:
        sets = zip(results[label], theirs or results[label], exact or theirs or results[label], strict=True)
        errors = [(difference(x, z), difference(y, z)) for x, y, z in sets] if theirs else [(math.inf, 0.0)]
        worst.append(max(errors, key=lambda pair: pair[0] - SLACK * pair[1]))
        if not theirs:
            wrong[label] = "no peer to compare with"
        elif not worst[-1][0] <= SLACK * worst[-1][1] + least < math.inf:
            wrong[label] = f"error {worst[-1][0]:.1e}"
    error, plain = max(worst, default=(math.inf, 0.0))
    del exact, theirs, results
    right = {label: runs[label] for label, _ in labels if label in runs and label not in wrong}
    for B in batches:
        row = race(plan, right, inputs(B), kept)
        row["failed"] |= wrong
        row["right"] = not row["failed"].keys() & plan.choices
        yield {"case": f"{name} B {B}", "error": error, "plain": plain} | row


def race(plan: Plan, runs: dict[str, Run], inputs: object, kept: dict[str, int]) -> dict:
    """The median time of each side in turns, and the MiB that it takes; one that fails is named."""
    times, failed, most = {label: [] for label in runs}, {}, {}
    for i in range(sum(plan.turns)):
        for label in list(times)[:: -1 if i % 2 else 1]:
            with short.noted(failed, label):
                before = torch.cuda.memory_allocated() - kept[label]
                if plan.work.device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                times[label].append(plan.call_clock(partial(runs[label], inputs)))
                most[label] = (torch.cuda.max_memory_allocated() - before) / 2**20
            if label in failed:
                del times[label]
                torch.cuda.empty_cache()
    medians = {label: [statistics.median(x[plan.turns[0] :])] for label, x in times.items()}
    ours = {label: medians.pop(label) for label in plan.choices if label in medians}
    return {"ours": ours, "peers": medians, "failed": failed, "MiB": most}


def call(plan: Plan, choice: str, run: Run, inputs: object) -> list[Tensor]:
    kernels.use(choice, plan.work.device)
    return run(inputs)


def difference(x: Tensor, exact: Tensor) -> float:
    """Relative RMS error; of labels the share that differs."""
    return short.error(x, exact) if x.is_floating_point() else (x != exact).double().mean().item()


# ---- the suite

PARTS = {"tests": (run_tests, 60), "unknowns": (unknowns, 45), "kernels": (our_kernels, 100)}
PARTS |= {"encoder": (encoder, 25), "unet": (unet, 35), "train": (train, 45), "inference": (predict, 40)}
PARTS |= {"compiled": (compiled, 60)}


def suite(plan: Plan, minutes: float, only: Sequence[str] = (), out: str | None = None) -> int:
    """Run the parts, or `only` some, print the summary; return the exit code: 1 after an error or FAIL."""
    deadline = time.monotonic() + 60 * minutes
    parts = {name: part for name, part in plan.parts.items() if not only or name in only}
    needed = sum(seconds for _, seconds in parts.values())
    facts = {"machine": short.header(plan.work.device)}
    facts["parts"] = {name: {"rows": [], "verdict": "left out"} for name in parts}
    print(facts["machine"], flush=True)
    for name, (function, seconds) in parts.items():
        needed -= seconds
        left = deadline - time.monotonic()
        limit = min(left, max(seconds, left - needed))
        if name == "tests" and len(parts) > 1:
            limit = min(limit, 20 * minutes)
        part = facts["parts"][name]
        if left >= seconds:
            print(f"\n{name}, at most {limit:.0f} s\n{HEAD}", flush=True)
            for row in rows_of(plan, function, won_by(facts), limit, part):
                part["rows"].append(row)
                print(line(row), flush=True)
                save(facts, out)
        print(f"{name}: {part['verdict']}", flush=True)
        save(facts, out)
    print("\n" + summary(facts), flush=True)
    failed = [x for x in facts["parts"].values() if x["verdict"].startswith("FAIL")]
    return int(bool(failed) or not all(row.get("right", True) for _, row in all_rows(facts)))


def rows_of(plan: Plan, function: Callable, won: dict, limit: float, part: dict) -> Iterator[dict]:
    """The rows of a part, from a process of its own, which has `limit` seconds; sets the part's verdict."""
    context, end = multiprocessing.get_context(plan.start), time.monotonic() + limit
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(plan, function, won, sender))
    process.start()
    sender.close()
    part["verdict"] = "cut"
    try:
        while receiver.poll(max(0, end - time.monotonic())):
            yield receiver.recv()
        part["verdict"] = f"FAIL, stopped after {limit:.0f} s"
    except EOFError:  # the process has ended
        process.join()
        part["verdict"] = f"FAIL, exit code {process.exitcode}" if process.exitcode else "done"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()  # its memory is free for the next part


def child(plan: Plan, function: Callable, won: dict[str, list[int]], sender: Connection) -> None:
    """Send the rows of a part; an error is one more, and ends this process with its traceback."""
    os.setsid()  # so that it is killed with all that it starts
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: and with the process that started it
    torch.backends.cudnn.benchmark = True  # as train.py
    torch.backends.cudnn.allow_tf32 = False  # float32 is the reference
    processor = kernels.processor(torch.device(plan.work.device))
    kernels.WINS.update({(kernel, processor): frozenset(sizes) for kernel, sizes in won.items()})
    try:
        for row in function(plan):
            sender.send(row)
    finally:
        if problem := sys.exc_info()[1]:
            sender.send({"case": "error", "note": short.sentence(problem), "right": False})


def save(facts: dict, out: str | None) -> None:
    if out:
        replace_text(Path(out), json.dumps(facts, indent=1))
