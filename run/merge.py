"""Merge the updates of a model that was trained with --lora into its UNet.

    python -m run.merge runs/NAME --out merged/model.safetensors

The file that is written is a model as one trained without --lora: it holds a UNet of its own (3.4 GB at
size sd15), and eval.py, predict.py and train.py --from read it.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from errors import CheckpointError, Parser, run_command
from kernels.linear import Linear
from run.checkpoint import HASHES, find_model, frozen_digests, read_about, read_model, save_model
from run.files import replacing
from unet import LoRA, replace_projections


@torch.no_grad()
def merged(layer: LoRA) -> Linear:
    """A plain layer of the weight W + B A."""
    plain = Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    plain.weight, plain.bias = nn.Parameter(layer.weight + layer.lora_B @ layer.lora_A), layer.bias
    return plain


def merge(path: Path, out: Path, weights: str | None = None) -> str:
    """Write the merged model of `path` to the file `out`; return a sentence. Raises CheckpointError."""
    tada = read_model(path, weights)
    rank = tada.config.lora
    if not rank:
        raise CheckpointError(f"{path} was trained without --lora: there is nothing to merge")
    if out.exists() or out.with_name(HASHES).exists():
        raise CheckpointError(f"{out} exists, or its folder is a step's: give another --out")
    replace_projections(tada.unet, merged)
    tada.config = replace(tada.config, lora=0)
    out.parent.mkdir(parents=True, exist_ok=True)
    metrics = read_about(find_model(path))["metrics"]
    try:
        with replacing(out) as new:
            save_model(tada, new, frozen_digests(tada.config), metrics)
    except SafetensorError as error:
        raise CheckpointError(f"{out} could not be written ({error}): give another --out") from None
    return f"wrote {out}: the updates of rank {rank} are part of its UNet"


def main(argv: Sequence[str] | None = None) -> int:
    p = Parser("python -m run.merge", description="Merge a model's LoRA into its UNet.")
    p.add_argument("model", type=Path, help="a run folder, a step folder or a model.safetensors")
    p.add_argument("--out", type=Path, required=True, help="the file to write")
    p.add_argument("--weights", metavar="DIR", help="where the prior is now (default: where it was)")
    args = p.parse_args(argv)

    return run_command("run.merge", lambda: print(merge(args.model, args.out, args.weights)))


if __name__ == "__main__":
    sys.exit(main())
