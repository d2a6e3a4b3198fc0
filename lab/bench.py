"""Speed and memory against the libraries a user would take instead, in one run; a table goes out, BENCH.md
keeps it.

    python -m lab.bench --suite cpu                                      # every row, float32 and bfloat16
    python -m lab.bench --suite cpu --only unet --dtype float32          # one of them
    python -m lab.bench --suite cpu --only mask2former mask2former-loss  # forward; forward, loss and backward
    python -m lab.bench --suite kernels                                  # on a GPU: see bench_kernels.py

Both models hold the same weights and see the same input. Their results are compared first: a row whose error
is too large says FAIL and has no time. Then they run in turns (ours, peer, peer, ours, ...); the table has
each median, the median of the ratios ours / peer of every turn (below 1: we are faster), and the ratio of the
fastest runs. Peak memory is taken in a process of its own, one side at a time. A row during which other
processes take more than 8 % of the CPUs is run again, and says BUSY and has no time after the third try. FAIL
and BUSY make the exit code 1.
"""

import argparse
import ctypes
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from clip import CLIP, pixels
from lab.bench_mask2former import (
    learn,
    learn_peer,
    maps_and_segments,
    our_names,
    peer_mask2former,
    predict,
    predict_peer,
)
from mask2former import Mask2Former
from unet import UNet
from vae import VAE
from weights.load import load

BUSY = 0.08  # a second busy process can make a row several times slower
BOUND = {"float32": 1e-5, "bfloat16": 0.05}  # relative RMS error between ours and the peer
MASKS_BOUND = {"float32": 1e-4}  # transformers' pixel decoder gives nan in bfloat16
MIB = 2**20


@dataclass(frozen=True)
class Side:
    """A model and one run of it; results are compared part by part, a batch picture by picture."""

    build: Callable[[], nn.Module]
    run: Callable[[nn.Module, list[Tensor]], Sequence[Tensor]]


@dataclass(frozen=True)
class Case:
    """The same work done by two libraries, both with Stable Diffusion v1.5's sizes and random weights."""

    title: str
    inputs: Callable[[int], list[Tensor]]  # of the picture's side in pixels
    ours: Side
    peer: Side
    names: Callable[[dict], dict] = dict  # the peer's weights under our names
    bounds: dict[str, float] = field(default_factory=BOUND.copy)  # for every precision that is measured
    mode: Callable = torch.inference_mode


def peer_unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(sample_size=64, attention_head_dim=8, cross_attention_dim=768)


def peer_vae() -> nn.Module:
    from diffusers import AutoencoderKL

    levels = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    return AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, **levels)


def peer_clip() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    image = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    }
    image |= {"patch_size": 14, "image_size": 224, "projection_dim": 768}
    return CLIPModel(
        CLIPConfig(projection_dim=768, text_config=text | {"projection_dim": 768}, vision_config=image)
    )


CASES = {
    "unet": Case(
        "UNet, 77 tokens",
        lambda size: [torch.randn(1, 4, size // 8, size // 8), torch.tensor([1]), torch.randn(1, 77, 768)],
        Side(UNet, lambda model, x: model(*x)),
        Side(peer_unet, lambda model, x: model(*x).sample),
    ),
    "vae": Case(
        "VAE encoder",
        lambda size: [torch.rand(1, 3, size, size) * 2 - 1],
        Side(VAE, lambda model, x: model.moments(*x)[0]),
        Side(peer_vae, lambda model, x: model.encode(*x).latent_dist.mean),
    ),
    "clip": Case(
        "CLIP image tower",
        lambda size: [torch.rand(1, 3, 224, 224) * 2 - 1],
        Side(CLIP, lambda model, x: model.image(*x)[0]),
        Side(
            peer_clip, lambda model, x: model.vision_model(pixels(*x, 224).to(x[0].dtype)).last_hidden_state
        ),
    ),
    "mask2former": Case(
        "Mask2Former",
        maps_and_segments,
        Side(Mask2Former, predict),
        Side(peer_mask2former, predict_peer),
        our_names,
        MASKS_BOUND,
    ),
    "mask2former-loss": Case(
        "Mask2Former, loss, backward",
        maps_and_segments,
        Side(Mask2Former, learn),
        Side(peer_mask2former, learn_peer),
        our_names,
        MASKS_BOUND,
        torch.enable_grad,
    ),
}


def compare(name: str, dtype: str, size: int, rounds: int) -> dict:
    """One row: error, times in turns, ratio; peak memory of each side."""
    torch.manual_seed(0)
    case = CASES[name]
    ours, peer = case.ours.build(), case.peer.build()
    ours.load_state_dict(case.names(peer.state_dict()))
    sides = [(case.ours.run, ours), (case.peer.run, peer)]
    for _, model in sides:
        model.to(getattr(torch, dtype)).eval()
    inputs = cast(case.inputs(size), dtype)
    row = {"case": case.title, "picture": size, "dtype": dtype}
    with case.mode():
        mine, theirs = (run(model, inputs) for run, model in sides)  # also the warm-up
        row["error"] = torch.stack([relative(*x) for x in zip(mine, theirs, strict=True)]).max().item()
        if not row["error"] <= case.bounds[dtype]:
            return row | {"verdict": "FAIL"}
        times = in_turns([lambda run=run, model=model: run(model, inputs) for run, model in sides], rounds)
    if times is None:
        return row | {"verdict": "BUSY"}
    del ours, peer, model, sides, mine, theirs
    row["ours s"], row["peer s"] = (statistics.median(x) for x in times)
    row["ratio"] = statistics.median(mine / theirs for mine, theirs in zip(*times, strict=True))
    row["min ratio"] = min(times[0]) / min(times[1])
    for who in ("ours", "peer"):
        row[f"{who} MiB"] = alone(peak_of_run, name, who, dtype, size)
    return row


def relative(ours: Tensor, peer: Tensor) -> Tensor:
    ours, peer = ours.float(), peer.float()
    return (ours - peer).norm() / peer.norm()


def in_turns(sides: list[Callable], rounds: int) -> list[list[float]] | None:
    """Seconds of every run, A B, B A, A B, ...; None if other processes kept the machine busy three times
    over.
    """
    for _ in range(3):
        times, others = ([], []), cpu_of_others()
        for i in range(rounds):
            for who in (0, 1) if i % 2 == 0 else (1, 0):
                start = time.perf_counter()
                sides[who]()
                times[who].append(time.perf_counter() - start)
        if others() <= BUSY:
            return times
    return None


def cast(inputs: list[Tensor], dtype: str) -> list[Tensor]:
    return [x.to(getattr(torch, dtype)) if x.is_floating_point() else x for x in inputs]


def peak_of_run(name: str, who: str, dtype: str, size: int) -> float:
    """Peak resident MiB of one run, weights included, imports and building not."""
    case = CASES[name]
    side = getattr(case, who)
    with torch.device("meta"):
        side.build()  # imports the peer
    before = resident()
    model = side.build().to(getattr(torch, dtype)).eval()
    inputs = cast(case.inputs(size), dtype)
    ctypes.CDLL(None).malloc_trim(0)  # what building left in the heap is not the run's
    start_peak()
    with case.mode():
        side.run(model, inputs)
    return peak() - before


def compare_loading() -> dict:
    """3.4 GB of UNet weights from a file in the page cache, every number touched: time and peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        peer_unet().save_pretrained(folder, max_shard_size="100GB")
        size = sum(x.stat().st_size for x in Path(folder).glob("*.safetensors")) / MIB
        row = {"case": f"load the UNet's {size:,.0f} MiB", "dtype": "float32"}
        for side in ("ours", "peer"):
            alone(load_once, side, folder)  # fills the page cache
            row[f"{side} s"], row[f"{side} MiB"] = alone(load_once, side, folder)
    return row | {"ratio": row["ours s"] / row["peer s"], "share of the file": row["ours MiB"] / size}


def load_once(side: str, folder: str) -> tuple[float, float]:
    """Seconds and peak MiB."""
    with torch.device("meta"):
        model = UNet() if side == "ours" else peer_unet()
    before = resident()
    start_peak()
    start = time.perf_counter()
    model = load(model, folder) if side == "ours" else type(model).from_pretrained(folder)
    for parameter in model.parameters():
        parameter.sum()  # weights may be mapped lazily: read them all
    return time.perf_counter() - start, peak() - before


def alone(function: Callable, *arguments):
    """The result of a function in a fresh process, where glibc gives freed blocks over 1 MiB back at once.

    So live tensors are compared, not the holes between them that a heap happens to keep.
    """
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(MIB)  # glibc reads it when a process starts
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def resident() -> float:
    """MiB of this process that are in memory now."""
    return float(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / MIB


def start_peak() -> None:
    """Begin a new peak: the highest resident size is forgotten (proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> float:
    """The highest resident MiB since `start_peak`."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def cpu_of_others() -> Callable[[], float]:
    """A clock: called later, it gives the share of all CPUs that other processes took since."""

    def ticks() -> tuple[int, int, float]:
        user, nice, system, idle, wait, *rest = map(
            int, Path("/proc/stat").read_text().split("\n")[0].split()[1:]
        )
        busy = user + nice + system + sum(rest[:3])
        return busy, busy + idle + wait, sum(os.times()[:4]) * os.sysconf("SC_CLK_TCK")

    start = ticks()

    def share() -> float:
        busy, whole, own = (now - then for now, then in zip(ticks(), start, strict=True))
        return max(busy - own, 0) / max(whole, 1)

    return share


def header() -> str:
    """What the numbers were taken on."""
    names = [
        x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x
    ]
    bf16 = "bfloat16 by oneDNN" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "bfloat16 emulated"
    simd = torch.backends.cpu.get_cpu_capability()
    versions = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    versions += [f"{x} {__import__(x).__version__}" for x in ("diffusers", "transformers")]
    return f"{names[0]}, {len(names)} CPUs, {simd}, {bf16}, {torch.get_num_threads()} threads; " + ", ".join(
        versions
    )


def table(rows: list[dict]) -> str:
    """Markdown."""
    columns = [
        "case",
        "picture",
        "dtype",
        "ours s",
        "peer s",
        "ratio",
        "min ratio",
        "ours MiB",
        "peer MiB",
        "error",
    ]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    forms = {"ours s": ".2f", "peer s": ".2f", "ratio": ".2f", "min ratio": ".2f", "error": ".1e"}
    forms |= {"ours MiB": ",.0f", "peer MiB": ",.0f"}
    for row in rows:
        cells = [format(row[x], forms.get(x, "")) if x in row else row.get("verdict", "") for x in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Measure TADA against its peers.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--suite", choices=["cpu", "kernels"], default="cpu", help="what to measure")
    parser.add_argument("--only", choices=[*CASES, "load"], nargs="+", default=[*CASES, "load"], help="rows")
    parser.add_argument("--dtype", choices=list(BOUND), nargs="+", default=list(BOUND), help="precisions")
    parser.add_argument(
        "--size",
        type=int,
        default=512,
        help="side of the picture in pixels, a multiple of 64; at least 256 for mask2former-loss",
    )
    parser.add_argument("--rounds", type=int, default=7, help="runs of each side per row, at least 3")
    parser.add_argument("--out", metavar="FILE.json", help="also write every number here")
    options = parser.parse_args(argv)
    if options.rounds < 3:
        parser.error(f"--rounds {options.rounds}: a median wants at least 3")
    if options.size < 64 or options.size % 64:
        parser.error(f"--size {options.size}: give a multiple of 64")
    if options.suite == "kernels":
        if not torch.cuda.is_available():
            parser.error("--suite kernels: torch sees no GPU here; --suite cpu needs none")
        from lab.bench_kernels import Sizes, gpu_clock, suite  # Triton has wheels for Linux only

        return suite(Sizes(), gpu_clock, options.out)
    print(header(), flush=True)
    rows = []
    for name in options.only:
        float32_alone = name == "load" or list(CASES[name].bounds) == ["float32"]
        for dtype in ["float32"] if float32_alone else options.dtype:
            rows.append(
                compare_loading() if name == "load" else compare(name, dtype, options.size, options.rounds)
            )
            print(json.dumps(rows[-1]), flush=True)
    print(table(rows))
    if options.out:
        Path(options.out).write_text(json.dumps({"machine": header(), "rows": rows}, indent=1))
    return int(any("verdict" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
