"""Speed and memory against the libraries a user would take instead, in one run; a table goes out, BENCH.md keeps it.

    python bench.py --suite cpu                                      # every row, float32 and bfloat16
    python bench.py --suite cpu --only unet --dtype float32          # one of them

Both models hold the same weights and see the same input. Their results are compared first: a row whose error is too large
says FAIL and has no time. Then they run in turns, ours and the peer's; the table has the median and the smallest time of
each, and the ratio of the medians, ours / peer (below 1: we are faster). Peak memory is taken in a process of its own, one
side at a time. If other processes take more than 8 % of the CPUs during a row it says BUSY and has no time. FAIL and BUSY
make the exit code 1.
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from clip import CLIP, pixels
from unet import UNet
from vae import VAE
from weights.load import load

BUSY = 0.08  # a second busy process can make a row several times slower
BOUND = {"float32": 1e-5, "bfloat16": 0.05}  # relative RMS error between ours and the peer
MIB = 2**20


@dataclass(frozen=True)
class Side:
    """A model and one run of it."""

    build: Callable[[], nn.Module]
    run: Callable[[nn.Module, list[Tensor]], Tensor]


@dataclass(frozen=True)
class Case:
    """The same work done by two libraries, both with Stable Diffusion v1.5's sizes and random weights."""

    title: str
    inputs: Callable[[], list[Tensor]]
    ours: Side
    peer: Side


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
        "UNet, 64x64 latents, 77 tokens",
        lambda: [torch.randn(1, 4, 64, 64), torch.tensor([1]), torch.randn(1, 77, 768)],
        Side(UNet, lambda model, x: model(*x)),
        Side(peer_unet, lambda model, x: model(*x).sample),
    ),
    "vae": Case(
        "VAE encoder, 512x512",
        lambda: [torch.rand(1, 3, 512, 512) * 2 - 1],
        Side(VAE, lambda model, x: model.moments(*x)[0]),
        Side(peer_vae, lambda model, x: model.encode(*x).latent_dist.mean),
    ),
    "clip": Case(
        "CLIP image tower, 224x224",
        lambda: [torch.rand(1, 3, 224, 224) * 2 - 1],
        Side(CLIP, lambda model, x: model.image(*x)[0]),
        Side(
            peer_clip, lambda model, x: model.vision_model(pixels(*x, 224).to(x[0].dtype)).last_hidden_state
        ),
    ),
}


def compare(case: Case, dtype: str, rounds: int) -> dict:
    """One row: error, times in turns, ratio; peak memory of each side."""
    torch.manual_seed(0)
    low = getattr(torch, dtype)
    ours, peer = case.ours.build(), case.peer.build()
    ours.load_state_dict(peer.state_dict(), assign=True)  # one copy of the weights for both
    sides = [(case.ours.run, ours.to(low).eval()), (case.peer.run, peer.to(low).eval())]
    inputs = [x.to(low) if x.is_floating_point() else x for x in case.inputs()]
    row = {"case": case.title, "dtype": dtype}
    with torch.inference_mode():
        mine, theirs = (run(model, inputs).float() for run, model in sides)  # also the warm-up
        row["error"] = ((mine - theirs).norm() / theirs.norm()).item()
        if not row["error"] <= BOUND[dtype]:
            return row | {"verdict": "FAIL"}
        times, others = ([], []), cpu_of_others()
        for _ in range(rounds):
            for (run, model), taken in zip(sides, times, strict=True):
                start = time.perf_counter()
                run(model, inputs)
                taken.append(time.perf_counter() - start)
        if others() > BUSY:
            return row | {"verdict": f"BUSY: others took {others():.0%} of the CPUs"}
    del ours, peer, sides
    medians, best = [statistics.median(x) for x in times], [min(x) for x in times]
    row |= {"ours s": medians[0], "peer s": medians[1], "ratio": medians[0] / medians[1]}
    row |= {"ours min s": best[0], "peer min s": best[1], "min ratio": best[0] / best[1]}
    for side in ("ours", "peer"):
        row[f"{side} MiB"] = alone(peak_of_run, case.title, side, dtype)
    return row


def peak_of_run(title: str, side: str, dtype: str) -> float:
    """Peak resident MiB of building one side and running it once, weights included, imports not."""
    case = next(case for case in CASES.values() if case.title == title)
    build, run = getattr(case, side).build, getattr(case, side).run
    with torch.device("meta"):
        build()  # imports the peer
    before = resident()
    model = build().to(getattr(torch, dtype)).eval()
    inputs = [x.to(getattr(torch, dtype)) if x.is_floating_point() else x for x in case.inputs()]
    start_peak()
    with torch.inference_mode():
        run(model, inputs)
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
    """The result of a function in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


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
    flags = Path("/proc/cpuinfo").read_text()
    bf16 = "bfloat16 in hardware" if "avx512_bf16" in flags or "amx_bf16" in flags else "bfloat16 emulated"
    simd = torch.backends.cpu.get_cpu_capability()
    versions = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    versions += [f"{x} {__import__(x).__version__}" for x in ("diffusers", "transformers")]
    return f"{names[0]}, {len(names)} CPUs, {simd}, {bf16}, {torch.get_num_threads()} threads; " + ", ".join(
        versions
    )


def table(rows: list[dict]) -> str:
    """Markdown."""
    columns = ["case", "dtype", "ours s", "peer s", "ratio", "min ratio", "ours MiB", "peer MiB", "error"]
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
    parser.add_argument("--suite", choices=["cpu"], default="cpu", help="what to measure")
    parser.add_argument("--only", choices=[*CASES, "load"], nargs="+", default=[*CASES, "load"], help="rows")
    parser.add_argument("--dtype", choices=list(BOUND), nargs="+", default=list(BOUND), help="precisions")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each side per row, at least 3")
    parser.add_argument("--out", metavar="FILE.json", help="also write every number here")
    options = parser.parse_args(argv)
    if options.rounds < 3:
        parser.error(f"--rounds {options.rounds}: a median wants at least 3")
    print(header(), flush=True)
    rows = []
    for name in options.only:
        for dtype in options.dtype if name != "load" else ["float32"]:
            rows.append(compare_loading() if name == "load" else compare(CASES[name], dtype, options.rounds))
            print(json.dumps(rows[-1]), flush=True)
    print(table(rows))
    if options.out:
        Path(options.out).write_text(json.dumps({"machine": header(), "rows": rows}, indent=1))
    return int(any("verdict" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
