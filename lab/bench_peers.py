"""What the benches share: the peers' models at Stable Diffusion v1.5's sizes, the machine, the table."""

import platform
import re
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


COLUMNS = dict.fromkeys(["case", "image", "dtype"], "")  # of the table, with their formats
COLUMNS |= dict.fromkeys(["ours s", "peer s", "ratio", "min ratio"], ".2f")
COLUMNS |= dict.fromkeys(["ours MiB", "peer MiB"], ",.0f") | {"error": ".1e"}


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table; the verdict stands in place of missing numbers."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for row in rows:
        cells = [format(row[x], form) if x in row else row.get("verdict", "") for x, form in COLUMNS.items()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
