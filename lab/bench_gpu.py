"""`python -m lab.bench --suite gpu --minutes 9`: what a first day on a GPU needs, in one call.

In this order: the tests that need a GPU; what decides the next work (cuDNN's convolutions, each of torch's
backends of attention, a copy, a product); our kernels against torch; the VAE's encoder, the UNet, a training
step and inference against diffusers. All rows and the goals come last. Each part runs in a process of its
own, so neither an illegal access nor a lack of memory harms the next, and gets the time that later parts do
not need. Rows are printed and written to the JSON file as they come.

Times of whole models are medians of calls between CUDA events, all sides in turns. Ours runs with the kernels
that won in this call ("auto") and with all of them ("triton"). Its error may be three times that of the peer
in the same precision, both against the peer in float32; otherwise it reads FAIL and has no time.
"""

import json
import math
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import date
from functools import partial
from importlib.metadata import distributions
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
from loading.augment import normalise
from run.files import replace_text

SLACK = 3.0  # times the peer's error
LIMIT = 11_900  # characters of the summary: a lent machine returns the last 12,000
GOALS = (  # name, part, start of the rows, pass (None: the sum), peer ("": the fastest), the highest ratio
    ("G1", "kernels", "cross-attention B 16", 0, "", 0.80),
    ("G2", "kernels", "cross-attention B 16", 1, "", 0.60),
    ("G2", "kernels", "cross-attention B 2", 1, "", 0.40),
    ("G4", "kernels", "GroupNorm + SiLU", None, "eager", 0.40),
    ("G4", "kernels", "GroupNorm + SiLU", None, "compiled", 0.90),
    ("G6", "kernels", "upsampling", None, "eager", 0.15),
    ("G7", "unknowns", "self-attention B 16 N 4096", None, "cudnn", 1.05),
    ("G8", "encoder", "VAE encoder B 16", None, "", 0.75),
    ("G9", "unet", "UNet B 16", None, "", 0.70),
    ("G10", "train", "training step B 16", None, "", 0.65),
    ("G10", "train", "training step B 2", None, "", 0.65),
    ("G11", "inference", "inference B 1", None, "", 0.50),
    ("G11", "inference", "inference B 16", None, "", 0.75),
)
Run = Callable[[object], list[Tensor]]  # one call of a side, with results to compare


def event_clock(work: Callable[[], object]) -> float:
    """Microseconds of one call on the GPU."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


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
    start: str = "spawn"  # of the processes


# ---- the parts


def run_tests(plan: Plan) -> Iterator[dict]:
    root = Path(__file__).parents[1]
    files = sorted((root / "tests").glob("test_*.py"))
    marked = [file for file in files if "pytest.mark.gpu" in file.read_text()]
    last, command = "", [sys.executable, "-m", "pytest", *(plan.tests or ("-m", "gpu", "-x", "-q", *marked))]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as tests:
        for text in tests.stdout:
            print(text, end="", flush=True)
            last = text.strip() or last
    yield {"case": "pytest", "note": last, "right": tests.returncode == 0}


def unknowns(plan: Plan) -> Iterator[dict]:
    """Convolutions by cuDNN, attention by each of torch's backends."""
    torch.backends.cudnn.benchmark = True
    sizes, rates = plan.sizes, short.measure_rates(plan.sizes, plan.clock)
    products = f"products {rates['products'] / 1e12:,.1f} TFLOP/s"
    yield {"case": "rates", "note": f"copy {rates['copy'] / 1e9:,.0f} GB/s, {products}", "rates": rates}
    own = (replace(sizes, batches=sizes.batches[:1], levels=(x,), contexts=x[:1]) for x in sizes.levels[:3])
    alone = [replace(case, name="self-" + case.name[6:]) for x in own for case in short.attention_cases(x)]
    across = short.attention_cases(replace(sizes, batches=sizes.batches[-1:]))
    backends = {name: sdpa_kernel(getattr(SDPBackend, name)) for name in sizes.backends}
    for case in chain(short.convolution_cases(sizes), alone, across, short.wide_cases(sizes)):
        peers = {name: by(case.plain) for name, by in backends.items() if case.key[0] != "convolution"}
        times, failed = short.take_turns(case, {"ours": case.plain, **peers}, plan.clock)
        costs = zip(case.moved, case.products, strict=True)
        floor = [max(x / rates["copy"], y / rates["products"]) * 1e6 for x, y in costs]
        row = {"case": case.name, "ours": {"torch": times.pop("ours")}, "peers": times, "floor": floor}
        yield row | {"failed": failed}


def our_kernels(plan: Plan) -> Iterator[dict]:
    rates = short.measure_rates(plan.sizes, plan.clock)
    for rows in short.measure_all(plan.sizes, rates, plan.clock):
        worst = max(rows, key=lambda row: row.error - row.case.slack * row.plain_error)
        result = {"case": worst.case.name, "key": worst.case.key, "right": all(row.right for row in rows)}
        result |= {"error": worst.error, "plain": worst.plain_error, "failed": worst.failed}
        if result["right"]:
            result["ours"] = {"triton": [row.ours for row in rows]}
            result["peers"] = {peer: [row.peers[peer] for row in rows] for peer in worst.peers}
            result["floor"] = [row.floor for row in rows]
        elif not all(row.repeats for row in rows):
            result["note"] = "a second run differs"
        yield result


def encoder(plan: Plan) -> Iterator[dict]:
    """The VAE's encoder, without gradients, against that of diffusers in the same type."""
    work = plan.work

    @torch.no_grad()
    def encode(vae: nn.Module, image: Tensor) -> list[Tensor]:
        ours = hasattr(vae, "moments")
        return [vae.moments(image)[0] if ours else vae.encode(image.to(vae.dtype)).latent_dist.mean]

    def build(half: bool, last: bool, ours: bool = False) -> Run:
        return partial(encode, steps.part(work, 0, half, last, ours))

    def images(B: int) -> Tensor:
        return torch.rand(B, 3, work.size, work.size, device=work.device) * 2 - 1

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
        return partial(learn, model, model.features if ours else steps.tapped(model), half and not ours)

    def inputs(B: int) -> list[Tensor]:
        shapes = (B, 4, work.size // 8, work.size // 8), (B, 77, work.context)
        return [torch.randn(shape, device=work.device) for shape in shapes]

    yield from contest(plan, "UNet", layouts(plan, build), inputs, plan.batches)


def layouts(plan: Plan, build: Callable[..., Run]) -> dict[str, Callable[[], Run]]:
    """Ours, the peer in both layouts of memory, and the peer in float32."""
    half = plan.work.half
    sides = {"ours": partial(build, half, last=True, ours=True), "NCHW": partial(build, half, False)}
    return sides | {"channels-last": partial(build, half, True), "exact": partial(build, False, False)}


def train(plan: Plan) -> Iterator[dict]:
    """The step of train.py against the same of diffusers, transformers and our decoder."""

    def build(side: Callable) -> Run:
        step = side(plan.work)[2]
        return lambda batch: [torch.tensor(x) for x in step(batch)]  # the loss, the norm of the gradient

    sides = {"ours": partial(build, steps.ours), "channels-last": partial(build, steps.peer)}
    batch = partial(steps.batch_of, plan.work.size)
    yield from contest(plan, "training step", sides, batch, plan.batches)


def predict(plan: Plan) -> Iterator[dict]:
    """The labels of images: ours as eval.py's, the peer's of bfloat16 weights."""
    work = plan.work

    def ours() -> Run:
        tada = steps.our_model(work).eval()

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


# ---- ours against peers


def contest(
    plan: Plan, name: str, sides: dict[str, Callable[[], Run]], inputs: Callable, batches: tuple[int, ...]
) -> Iterator[dict]:
    """Compare "ours" with "exact", or else with the peer, at the last of the batches; then time all sides."""
    small, runs, results, kept, wrong = inputs(batches[-1]), {}, {}, {}, {}
    exact = sides["exact"]()(small) if "exact" in sides else None
    for side in (x for x in sides if x != "exact"):
        before, run = torch.cuda.memory_allocated(), sides[side]()
        for label in plan.choices if side == "ours" else (side,):
            runs[label] = partial(call, plan, label if side == "ours" else "torch", run)
            try:
                results[label] = runs[label](small)
            except RuntimeError as problem:  # the others go on
                wrong[label] = f"FAIL: {str(problem).partition(chr(10))[0][:200]}"
            kept[label] = torch.cuda.memory_allocated() - before
    peer = next(x for x in results if x not in plan.choices)
    plain = list(map(difference, results[peer], exact or results[peer]))
    least = 1e-5 if exact else 0.05 if plan.work.half else 1e-4
    pairs = [] if results.keys() & plan.choices else [(math.inf, 0.0)]
    for label in results.keys() & plan.choices:
        errors = zip(map(difference, results[label], exact or results[peer]), plain, strict=True)
        pairs.append(max(errors, key=lambda pair: pair[0] - SLACK * pair[1]))
        if not pairs[-1][0] <= SLACK * pairs[-1][1] + least < math.inf:
            wrong[label] = f"FAIL: error {pairs[-1][0]:.1e}"
    error, plain = max(pairs)
    del exact, results
    right = {label: run for label, run in runs.items() if label not in wrong}
    for B in batches:
        row = race(plan, right, inputs(B), kept)
        row["failed"] |= wrong
        yield {"case": f"{name} B {B}", "error": error, "plain": plain, "right": not wrong} | row


def race(plan: Plan, runs: dict[str, Run], inputs: object, kept: dict[str, int]) -> dict:
    """The median time of each side in turns, and the MiB that it takes; one that lacks memory is named."""
    times, failed, most = {}, {}, {}
    for label, run in runs.items():
        torch.cuda.empty_cache()
        try:
            before = torch.cuda.memory_allocated() - kept[label]
            if plan.work.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            for _ in range(plan.turns[0]):
                run(inputs)
            most[label] = (torch.cuda.max_memory_allocated() - before) / 2**20
            times[label] = []
        except torch.OutOfMemoryError:
            failed[label] = "out of memory"
    for i in range(plan.turns[1]):
        for label in list(times)[:: -1 if i % 2 else 1]:
            times[label].append(plan.call_clock(partial(runs[label], inputs)))
    medians = {label: [statistics.median(x)] for label, x in times.items()}
    ours = {label: medians.pop(label) for label in plan.choices if label in medians}
    return {"ours": ours, "peers": medians, "failed": failed, "MiB": most}


def call(plan: Plan, choice: str, run: Run, inputs: object) -> list[Tensor]:
    kernels.use(choice, plan.work.device)
    return run(inputs)


def difference(x: Tensor, exact: Tensor) -> float:
    """Relative RMS error; of labels the share that differs."""
    return short.error(x, exact) if x.is_floating_point() else (x != exact).double().mean().item()


# ---- the suite

PARTS = {"tests": (run_tests, 60), "unknowns": (unknowns, 60), "kernels": (our_kernels, 90)}
PARTS |= {"encoder": (encoder, 25), "unet": (unet, 35), "train": (train, 45), "inference": (predict, 30)}


def suite(plan: Plan, minutes: float, only: Sequence[str] = (), out: str | None = None) -> int:
    """Run the parts, or `only` some, print the summary; return the exit code: 1 after an error or FAIL."""
    deadline = time.monotonic() + 60 * minutes
    installed = {x.name: x.version for x in distributions()}
    packages = ", ".join(f"{x} {installed.get(x, 'missing')}" for x in ("diffusers", "transformers"))
    facts = {"machine": f"{short.header(plan.work.device)}, {packages}, {date.today()}", "parts": {}}
    print(facts["machine"], flush=True)
    parts = {name: part for name, part in plan.parts.items() if not only or name in only}
    needed = sum(seconds for _, seconds in parts.values())
    for name, (function, seconds) in parts.items():
        needed -= seconds
        left = deadline - time.monotonic()
        limit = min(left, max(seconds, left - needed))
        if name == "tests" and len(parts) > 1:
            limit = min(limit, 20 * minutes)
        part = facts["parts"][name] = {"rows": [], "verdict": "left out"}
        if left >= seconds:
            print(f"\n{name}, at most {limit:.0f} s\n{HEAD}", flush=True)
            for row in rows_of(plan, function, won_by(facts), limit, part):
                part["rows"].append(row)
                print(line(row), flush=True)
                save(facts, out)
        print(f"{name}: {part['verdict']}", flush=True)
        save(facts, out)
    print("\n" + summary(facts)[-LIMIT:], flush=True)
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
        part["verdict"] = f"stopped after {limit:.0f} s"
    except EOFError:  # the process has ended
        process.join()
        part["verdict"] = f"FAIL, exit code {process.exitcode}" if process.exitcode else "done"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()


def child(plan: Plan, function: Callable, won: dict[str, list[int]], sender: Connection) -> None:
    """Send the rows of a part; an error is one more, and ends this process with its traceback."""
    os.setsid()  # so that it is killed with all that it starts
    processor = kernels.processor(torch.device(plan.work.device))
    kernels.WINS.update({(kernel, processor): frozenset(sizes) for kernel, sizes in won.items()})
    try:
        for row in function(plan):
            sender.send(row)
    finally:
        if problem := sys.exc_info()[1]:
            note = f"{type(problem).__name__}: {str(problem).partition(chr(10))[0][:200]}"
            sender.send({"case": "error", "note": note, "right": False})


def save(facts: dict, out: str | None) -> None:
    if out:
        replace_text(Path(out), json.dumps(facts, indent=1))


# ---- the report

HEAD = "| case | ours us | best peer us | ratio | of the floor | error, peer's | |\n" + "|---" * 7 + "|"


def all_rows(facts: dict) -> list[tuple[str, dict]]:
    return [(name, row) for name, part in facts["parts"].items() for row in part["rows"]]


def best(times: dict[str, list[float]]) -> list[tuple[float, str]]:
    """The least time of each pass, and whose it is."""
    named = [[(x, name.removesuffix("_ATTENTION").lower()) for x in y] for name, y in times.items()]
    return [min(x) for x in zip(*named, strict=True)]


def ratios(row: dict, peer: str = "") -> list[float]:
    """Ours / the fastest peer, or those of one name, of each pass and of their sum; [] without times."""
    peers = {name: x for name, x in row.get("peers", {}).items() if name.lower().startswith(peer)}
    pairs = [(x, y) for (x, _), (y, _) in zip(best(row.get("ours", {})), best(peers), strict=False)]
    return [x / y for x, y in pairs] + [sum(x for x, _ in pairs) / sum(y for _, y in pairs)] if pairs else []


def won_by(facts: dict) -> dict[str, list[int]]:
    """The value of kernels.WINS for this GPU."""
    rows = [row for name, row in all_rows(facts) if "key" in row]
    return short.wins([(tuple(row["key"]), x) for row in rows for x in ratios(row)[:-1] or [math.inf]])


def line(row: dict) -> str:
    """A row of the table: forward / backward."""
    ours, peers = (best(row.get(side, {})) for side in ("ours", "peers"))
    cells = [" / ".join(f"{us:,.{int(us < 1e4)}f} {name}" for us, name in x) for x in (ours, peers)]
    cells += [" / ".join(f"{x:.2f}" for x in ratios(row)[:-1])]
    cells += [" / ".join(f"{x / us:.0%}" for x, (us, _) in zip(row.get("floor", []), ours, strict=False))]
    cells += [f"{row['error']:.1e}, {row['plain']:.1e}" if "error" in row else ""]
    notes = [row["note"]] if "note" in row else []
    notes += [f"{name}: {why}" for name, why in row.get("failed", {}).items()]
    notes += [f"{name} {mib:,.0f} MiB" for name, mib in row.get("MiB", {}).items()]
    if not row.get("right", True) and not ours:
        cells[0] = "FAIL"
    return f"| {' | '.join([row['case'], *cells, '; '.join(notes)])} |"


def judged(facts: dict, goal: tuple) -> str:
    """A line of the table of goals: of the geometric mean; no row may be slower than the peer."""
    name, part, start, i, peer, highest = goal
    rows = [row for x, row in all_rows(facts) if x == part and f"{row['case']} ".startswith(start + " ")]
    found = [x[-1 if i is None else i] for x in (ratios(row, peer) for row in rows) if len(x) > (i or 0) + 1]
    way = "" if i is None else (", forward", ", backward")[i]
    text = f"| {name} | {start}{way}{f' against {peer}' if peer else ''} | {highest:.2f}"
    if not found:
        return f"{text} | | not measured |"
    mean, worst = statistics.geometric_mean(found), max(found)
    verdict = "reached" if mean <= highest and worst <= max(highest, 1.05) else "missed"
    return f"{text} | {mean:.2f}, the worst of {len(found)} {worst:.2f} | {verdict} |"


def summary(facts: dict) -> str:
    """The last of the output: all rows, the goals, what is missing."""
    lines = [HEAD, *(line(row) for _, row in all_rows(facts)), "", facts["machine"], ""]
    lines += [f"kernels.WINS of this GPU: {won_by(facts)}", "", "| goal | case | at most | measured | |"]
    lines += ["|---" * 5 + "|", *(judged(facts, goal) for goal in GOALS), "", "G3, G5: no case here."]
    for name, part in facts["parts"].items():
        again = f"; alone: python -m lab.bench --suite gpu --only {name}" if part["verdict"] != "done" else ""
        lines.append(f"{name}: {part['verdict']}{again}")
    return "\n".join(lines)
