"""Compare speed and memory with diffusers and transformers, and print a table for BENCH.md.

    python -m lab.bench --suite cpu                                      # every row, float32 and bfloat16
    python -m lab.bench --suite cpu --only unet unet-last --dtype float32  # the peer NCHW, and channels-last
    python -m lab.bench --suite cpu --only mask2former mask2former-loss  # forward; forward, loss and backward
    python -m lab.bench --suite cpu-choices                              # for kernels.WINS, on this processor
    python -m lab.bench --suite gpu --minutes 9 --out gpu.json           # all of a first day on a GPU
    python -m lab.bench --suite gpu --only kernels                       # against torch, for kernels.WINS

Both models have the same weights and the same input. Their results are compared first: a row whose error is
too large reads FAIL and is not timed. Then they run in turns (ours, peer, peer, ours, ...); the table has
each median, the median of the ratios ours / peer of all turns (below 1: ours is faster), and the ratio of the
fastest runs. Peak memory is measured in a process of its own for each side. If other processes take more than
8 % of the CPUs during a row, it runs again; after the third try it reads BUSY and has no time. FAIL and BUSY
make the exit code 1.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from timeit import timeit

import torch
from torch import Tensor, nn

from clip import CLIP, pixels
from errors import Parser, run_command
from kernels import arrange
from lab import bench_choices, bench_peers
from lab import bench_mask2former as masks
from lab.bench_peers import peer_clip, peer_unet, peer_vae
from mask2former import Mask2Former
from ram import RAMConfig, Swin
from unet import UNet
from vae import VAE

BUSY = 0.08  # a second busy process can make a row several times slower
BOUND = {"float32": 1e-5, "bfloat16": 0.05}  # relative RMS error between ours and the peer


@dataclass(frozen=True)
class Side:
    """A model and one run of it, whose results are compared one by one."""

    build: Callable[[], nn.Module]
    run: Callable[[nn.Module, list[Tensor]], Sequence[Tensor]]


@dataclass(frozen=True)
class Case:
    """The same work by two libraries, both with Stable Diffusion v1.5's sizes and random weights."""

    title: str
    inputs: Callable[[int], list[Tensor]]  # of the image's side in pixels
    ours: Side
    peer: Side
    names: Callable[[dict], dict] = dict  # the peer's weights under our names
    bounds: dict[str, float] = field(default_factory=BOUND.copy)  # of the error, by the precisions to measure
    mode: Callable = torch.inference_mode


def run_openvino(model: nn.Module, x: list[Tensor]) -> list[Tensor]:
    """The UNet by OpenVINO, computed in the model's type; the first call converts it."""
    if not hasattr(model, "compiled"):
        import openvino  # a peer of the bench alone: pip install openvino

        precision = {"INFERENCE_PRECISION_HINT": "bf16" if model.dtype == torch.bfloat16 else "f32"}
        model.forward = partial(model.forward, return_dict=False)
        converted = openvino.convert_model(model.float(), example_input=cast(x, "float32"))
        model.compiled = openvino.compile_model(converted, "CPU", precision)
    return [torch.from_numpy(model.compiled([y.numpy() for y in cast(x, "float32")])[0])]


def peer_swin() -> nn.Module:
    from transformers import SwinConfig, SwinModel

    sizes = {"embed_dim": 192, "depths": [2, 2, 18, 2], "num_heads": [6, 12, 24, 48], "window_size": 12}
    return SwinModel(SwinConfig(image_size=384, **sizes), add_pooling_layer=False)


SWIN_NAMES = {  # transformers' -> RAM's
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "embeddings.": "patch_embed.",
    "encoder.layers": "layers",
    "relative_position_bias.": "",
    ".attention.o_proj": ".attn.proj",
    ".attention.": ".attn.",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "layernorm": "norm",
}


def swin_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Transformers' weights under RAM's names; its queries, keys and values become one matrix."""
    ours = {}
    for name, x in state.items():
        if ".q_proj." in name:
            x = torch.cat([state[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"])
        for theirs, new in SWIN_NAMES.items():
            name = name.replace(theirs, new)
        if ".k_proj." not in name and ".v_proj." not in name:
            ours[name.replace(".q_proj.", ".qkv.")] = x
    return ours


def mask_case(title: str, ours: Callable, peer: Callable, **mode: Callable) -> Case:
    bounds = {"float32": 1e-4}  # transformers' pixel decoder returns NaN in bfloat16
    sides = Side(Mask2Former, ours), Side(masks.peer_mask2former, peer)
    return Case(title, masks.maps_and_segments, *sides, masks.our_names, bounds, **mode)


def channels_last(case: Case) -> Case:
    """The same case against the peer with channels-last weights."""
    peer = Side(lambda: case.peer.build().to(memory_format=torch.channels_last), case.peer.run)
    return replace(case, title=f"{case.title}; peer channels-last", peer=peer)


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
        Side(peer_clip, lambda m, x: m.vision_model(pixels(*x, 224).to(x[0].dtype)).last_hidden_state),
    ),
    "ram": Case(
        "RAM's Swin-L, 384x384",
        lambda size: [torch.randn(1, 3, 384, 384)],
        Side(partial(Swin, RAMConfig()), lambda model, x: [model(*x)]),
        Side(peer_swin, lambda model, x: [model(*x).last_hidden_state]),
        swin_names,
    ),
    "mask2former": mask_case("Mask2Former", masks.predict, masks.predict_peer),
    "mask2former-loss": mask_case(
        "Mask2Former, loss, backward",
        partial(masks.learn, masks.our_loss),
        partial(masks.learn, masks.peer_loss),
        mode=torch.enable_grad,
    ),
}
CASES["unet-openvino"] = replace(
    CASES["unet"], title="UNet, 77 tokens; OpenVINO", peer=Side(peer_unet, run_openvino)
)
CASES |= {f"{name}-last": channels_last(CASES[name]) for name in ("unet", "vae")}
ROWS = [name for name in CASES if name != "unet-openvino"]  # by default: of packages that the tests need
PARTS = (
    "tests",
    "unknowns",
    "kernels",
    "encoder",
    "unet",
    "train",
    "inference",
    "compiled",
)  # of bench_gpu.py


def compare(name: str, dtype: str, size: int, rounds: int) -> dict:
    """Measure one row: error, times in turns, ratios; peak memory of each side."""
    torch.manual_seed(0)
    case = CASES[name]
    ours, peer = case.ours.build(), case.peer.build()
    ours.load_state_dict(case.names(peer.state_dict()))
    inputs = cast(case.inputs(size), dtype)
    models = (arrange(model.to(getattr(torch, dtype)).eval()) for model in (ours, peer))
    runs = [partial(side.run, model, inputs) for side, model in zip((case.ours, case.peer), models)]
    row = {"case": case.title, "image": size, "dtype": dtype}
    with case.mode():
        mine, theirs = (run() for run in runs)  # also the warm-up
        row["error"] = torch.stack([relative(*x) for x in zip(mine, theirs, strict=True)]).max().item()
        if not row["error"] <= case.bounds[dtype]:
            return row | {"verdict": "FAIL"}
        for _ in range(3):
            others = cpu_of_others()
            times = bench_peers.in_turns(rounds, *(lambda _, run=run: timeit(run, number=1) for run in runs))
            if not (busy := others() > BUSY):
                break
    if busy:
        return row | {"verdict": "BUSY"}
    del ours, peer, models, runs, mine, theirs  # free their memory
    row["ours s"], row["peer s"] = (statistics.median(x) for x in times)
    row["ratio"] = bench_peers.ratio(*times)
    row["min ratio"] = min(times[0]) / min(times[1])
    for who in ("ours", "peer"):
        row[f"{who} MiB"] = bench_peers.alone(peak_of_run, name, who, dtype, size)
    return row


def relative(ours: Tensor, peer: Tensor) -> Tensor:
    ours, peer = ours.float(), peer.float()
    return (ours - peer).norm() / peer.norm()


def cast(inputs: list[Tensor], dtype: str) -> list[Tensor]:
    return [x.to(getattr(torch, dtype)) if x.is_floating_point() else x for x in inputs]


def peak_of_run(name: str, who: str, dtype: str, size: int) -> float:
    """Peak resident MiB of one run, with the weights, without imports and construction."""
    case, side = CASES[name], getattr(CASES[name], who)
    with torch.device("meta"):
        side.build()  # imports the peer
    before = bench_peers.memory("VmRSS")
    model = arrange(side.build().to(getattr(torch, dtype)).eval())
    inputs = cast(case.inputs(size), dtype)
    bench_peers.watch_peak()
    with case.mode():
        side.run(model, inputs)
    return bench_peers.memory("VmHWM") - before


def cpu_of_others() -> Callable[[], float]:
    """Return a function: called later, it returns the share of all CPUs that other processes took since."""

    def ticks() -> tuple[int, int, float]:
        counts = [int(x) for x in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
        whole, own = sum(counts), sum(os.times()[:4]) * os.sysconf("SC_CLK_TCK")
        return whole - counts[3] - counts[4], whole, own  # less idle and wait

    start = ticks()

    def share() -> float:
        busy, whole, own = (now - then for now, then in zip(ticks(), start, strict=True))
        return max(busy - own, 0) / max(whole, 1)

    return share


def cpu_suite(names: list[str], dtypes: list[str], size: int, rounds: int, out: str | None) -> int:
    """Measure and print every row of CASES in `names`; return the exit code."""
    print(bench_peers.header(), flush=True)
    rows = []
    for name in names:
        measured = list(CASES[name].bounds)
        for dtype in [x for x in dtypes if x in measured] or measured:
            rows.append(compare(name, dtype, size, rounds))
            print(json.dumps(rows[-1]), flush=True)
    print(bench_peers.table(rows, bench_peers.COLUMNS))
    if out:
        Path(out).write_text(json.dumps({"machine": bench_peers.header(), "rows": rows}, indent=1))
    return int(any("verdict" in row for row in rows))


def main(argv: list[str] | None = None) -> int:
    how = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter}
    parser = Parser(prog="python -m lab.bench", description="Measure TADA against its peers.", **how)
    add = parser.add_argument
    add("--suite", choices=["cpu", "cpu-choices", "gpu"], default="cpu", help="what to measure")
    add("--only", choices=[*CASES | dict.fromkeys(PARTS)], nargs="+", help=f"rows; gpu: {', '.join(PARTS)}")
    add("--minutes", type=float, default=9, help="for the suite gpu; a part that no longer fits is named")
    add("--dtype", choices=list(BOUND), nargs="+", default=list(BOUND), help="precisions")
    add("--size", type=int, default=512, help="of the image, a multiple of 64; mask2former-loss: 256 or more")
    add("--rounds", type=int, default=7, help="runs of each side per row, at least 3")
    add("--out", metavar="FILE.json", help="also write all numbers to this file")
    options = parser.parse_args(argv)
    if options.rounds < 3:
        parser.error(f"--rounds {options.rounds}: give at least 3 for a median")
    if options.size < 64 or options.size % 64:
        parser.error(f"--size {options.size}: give a multiple of 64")
    gpu = options.suite == "gpu"
    if wrong := [x for x in options.only or () if x not in (PARTS if gpu else CASES)]:
        parser.error(f"--only {wrong[0]}: --suite {options.suite} has {', '.join(PARTS if gpu else CASES)}")
    if gpu and not torch.cuda.is_available():
        parser.error("--suite gpu: torch finds no GPU; --suite cpu needs none")

    if gpu:
        from lab import bench_gpu  # Triton has wheels for Linux only

        plan, how = bench_gpu.Plan(bench_gpu.PARTS), (options.minutes, options.only or (), options.out)
        return run_command("bench", lambda: bench_gpu.suite(plan, *how))
    if options.suite == "cpu-choices":
        return run_command("bench", bench_choices.suite)
    numbers = options.only or ROWS, options.dtype, options.size, options.rounds, options.out
    return run_command("bench", lambda: cpu_suite(*numbers))


if __name__ == "__main__":
    sys.exit(main())
