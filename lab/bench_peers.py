"""What the benches share: the peers' models at Stable Diffusion v1.5's sizes, turns, memory, the table."""

import ctypes
import multiprocessing
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn


def peer_unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(sample_size=64, attention_head_dim=8, cross_attention_dim=768)


def peer_vae() -> nn.Module:
    from diffusers import AutoencoderKL

    levels = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    return AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, **levels)


def peer_clip() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    text = dict(zip(sizes, (768, 3072, 12, 12), strict=True))
    image = dict(zip(sizes, (1024, 4096, 24, 16), strict=True)) | {"patch_size": 14, "image_size": 224}
    return CLIPModel(CLIPConfig(projection_dim=768, text_config=text, vision_config=image))


def memory(name: str) -> float:
    """MiB of this process: "VmRSS" resident now, "VmHWM" the highest since a write to clear_refs."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{name}:")[2].split()[0]) / 1024


def header() -> str:
    """The machine and the versions of a measurement."""
    cpus = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    bf16 = "bfloat16 by oneDNN" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "bfloat16 emulated"
    packages = [f"{x} {version(x)}" for x in ("torch", "diffusers", "transformers")]
    machine = f"{cpus[0]}, {len(cpus)} CPUs, {torch.backends.cpu.get_cpu_capability()}, {bf16}"
    threads, python = torch.get_num_threads(), platform.python_version()
    return f"{machine}, {threads} threads; Python {python}, {', '.join(packages)}"


def in_turns(runs: int, *sides: Callable[[int], float]) -> list[list[float]]:
    """What each side returns of 0..runs-1: A B, B A, A B, ..., so that a machine that slows down is fair."""
    found = [[] for _ in sides]
    for i in range(runs):
        for values, side in [*zip(found, sides, strict=True)][:: -1 if i % 2 else 1]:
            values.append(side(i))
    return found


def ratio(ours: list[float], peer: list[float]) -> float:
    return statistics.median(mine / theirs for mine, theirs in zip(ours, peer, strict=True))


def cpu_seconds(work: Callable, *arguments: object) -> float:
    start = time.process_time()
    work(*arguments)
    return time.process_time() - start


def watch_peak() -> None:
    """Begin to measure "VmHWM"; free first what construction left in the heap."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM (proc(5))


def apart(function: Callable, *arguments):
    """Run a function in a new process, with glibc as users have it."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def alone(function: Callable, *arguments):
    """Run a function in a new process, where glibc frees blocks over 1 MiB at once: peaks then compare
    live tensors, not the fragmentation of the heap.
    """
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**20)  # glibc reads it when a process starts
    return apart(function, *arguments)


COLUMNS = (
    "case",
    "image",
    "dtype",
    "ours s",
    "peer s",
    "ratio",
    "min ratio",
    "ours MiB",
    "peer MiB",
    "error",
)
FORMATS = {"error": ".1e", "ours MiB": ",.0f", "peer MiB": ",.0f"}  # of the table's columns; others: .2f


def table(rows: list[dict], columns: Sequence[str] = ()) -> str:
    """The rows as a Markdown table; the verdict stands in place of missing numbers."""
    columns = columns or [*rows[0]]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [(row.get(x, row.get("verdict", "")), FORMATS.get(x, ".2f")) for x in columns]
        cells = [format(x, form) if isinstance(x, float) else str(x) for x, form in cells]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
