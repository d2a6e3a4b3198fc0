"""GPU memory of a training step by option, computed without a GPU; with one, measured beside it.

    python -m lab.memory  # Stable Diffusion, 512x512, 150 classes, RAM's tags

Steps run on fake tensors, which have no numbers (torch's FakeTensorMode); `Live` counts what exists between
operations. They are the CPU's, where autocast and fused attention need no GPU; `AsOnGpu` makes norms a GPU's.
Not counted: the CUDA context (about 0.5 GiB), workspaces within an operation (cuDNN), fragmentation, DDP's
buckets, validation, and Mask2Former's loss, which matches numbers.
"""

import weakref
from collections import namedtuple
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels
from assemble import Undrawn, assemble, part_configs, shrink
from clip import CLIP
from errors import Parser
from model import TadaConfig
from ram import RAM
from run.masters import Masters
from unet import UNet
from vae import VAE

GIB, SPARE = 2**30, 2**30  # bytes; of a card for what is not counted
CARDS = (8, 12, 24, 48, 80)  # GB as sold
CLASSES, WORDS = 150, 10  # ADE20K; RAM's tags of an image
LORA, FROZEN, CHECKPOINT = {"lora": 16}, {"freeze_unet": True}, {"checkpoint": True}
OPTIONS = {"": {}, "--checkpoint-activations": CHECKPOINT, "--lora 16": LORA, "--freeze-unet": FROZEN}
# Bytes: all weights; AdamW's moments; gradients at the update; what autograd keeps; transients of the VAE's
# encoder; the peaks of forward and backward, and of the update, which include weights and moments.
Memory = namedtuple("Memory", "weights moments gradients kept encoder passes update")


class Live(TorchDispatchMode):
    """Counts the bytes of all storages that operations made and that still exist, and their peak."""

    bytes = peak = 0

    def __torch_dispatch__(self, function: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for storage in (x.untyped_storage() for x in tree_leaves(result) if isinstance(x, Tensor)):
            if not hasattr(storage, "counted"):
                storage.counted = True
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        return result

    def add(self, size: int) -> None:
        self.bytes += size
        self.peak = max(self.peak, self.bytes)


class AsOnGpu(TorchFunctionMode):
    """Norms of a contiguous map, and under autocast in float32."""

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if function in (F.group_norm, F.layer_norm):
            x = args[0].float() if torch.is_autocast_enabled("cpu") else args[0]
            args = (x.contiguous(), *args[1:])
        return function(*args, **(kwargs or {}))


def make(model: str, decoder: str, checkpoint: bool = False, **settings: Any) -> nn.Module:
    """A model on torch's default device, as train.py has it on a GPU."""
    names, things = tuple(map(str, range(CLASSES))), (True,) * CLASSES
    config = TadaConfig(names, things=things, model=model, decoder=decoder, noise="none", **settings)
    vae, unet, clip = part_configs(model, "random")
    vectors = torch.randn(77, unet.context_width), torch.randn(CLASSES, unet.context_width)
    tada = assemble(config, VAE(vae), UNet(unet), CLIP(clip), None, *vectors, None).train()
    tada.unet.checkpoint_activations = checkpoint
    shrink(tada, "ram", training=True)
    tada.clip.text_model = None  # as run/tagging.py
    tada.ram = RAM().requires_grad_(False) if model == "sd15" else None
    return tada if config.keeps_unet else Masters(tada)


def step(model: nn.Module, live: Live, batch: int = 1, side: int = 512) -> Memory:
    """A training step after the first, which makes the moments; `live` has seen all of the model."""
    tada, pairs = (model.tada, model.pairs) if isinstance(model, Masters) else (model, [])
    trained = [p for p in tada.parameters() if p.requires_grad] + [master for master, _ in pairs]
    weights, optimizer = live.bytes, torch.optim.AdamW(trained, fused=True)
    for p in trained:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    device = tada.unet.conv_in.weight.device
    tada.add_words(["tag"], torch.zeros(1, tada.unet.config.context_width, device=device))
    before = live.peak = live.bytes
    image = torch.zeros(batch, 3, side, side, device=device)
    with torch.no_grad():
        tada.vae.encode(image)
    encoder = live.peak - before
    with torch.autocast(device.type, torch.bfloat16):
        output = model(image, [["tag"] * WORDS] * batch)
    if tada.config.decoder == "mask2former":
        loss = sum(x.float().mean() for x in (*output.prediction.classes, *output.prediction.masks))
    else:
        losses = tada.loss(output, image.new_zeros(batch, side, side, dtype=torch.long))
        loss = sum(losses.pop(part)[0] for part in [*losses])
    kept = live.bytes - before
    loss.backward()
    del output, loss, image
    passes, live.peak = live.peak, live.bytes
    if pairs:
        model.take_gradients()
    gradients = live.bytes - before
    optimizer.step()
    optimizer.zero_grad()
    return Memory(weights, before - weights, gradients, kept, encoder, passes, live.peak)


def compute(
    *batches: int, model: str = "sd15", decoder: str = "fpn", side: int = 512, **how: Any
) -> list[Memory]:
    """The memory of a step of each batch on a GPU that need not be there."""
    with torch.device("meta"), Undrawn():
        parts = make(model, decoder, **how)
    with FakeTensorMode(allow_non_fake_inputs=True), Live() as live, AsOnGpu():
        old = [*parts.parameters()]
        new = dict(zip(old, parts.to_empty(device="cpu").parameters(), strict=True))
        if isinstance(parts, Masters):
            parts.pairs = [(new[master], new[half]) for master, half in parts.pairs]
        return [step(parts, live, batch, side) for batch in batches]


def measured(decoder: str, **how: Any) -> str:
    """GiB that torch's allocator had handed out at the peak of two steps on the GPU, if there is one."""
    if not torch.cuda.is_available():
        return "-"
    with torch.device("cuda"), Live() as live:
        parts = make("sd15", decoder, **how)
        torch.cuda.reset_peak_memory_stats()
        step(parts, live), step(parts, live)
    return f"{torch.cuda.max_memory_allocated() / GIB:.1f}"


def largest(card: int, one: Memory, eight: Memory, sixteen: Memory) -> int:
    """The largest batch on a card of so many GB; the peak grows linearly, from some batch on faster."""
    free = card * 10**9 - SPARE
    if max(one.passes, one.update) > free:
        return 0
    if eight.passes > free:
        return 1 + int((free - one.passes) / (eight.passes - one.passes) * 7)
    return 8 + int((free - eight.passes) / (sixteen.passes - eight.passes) * 8)


def main(argv: Sequence[str] | None = None) -> None:
    Parser("python -m lab.memory", description="GPU memory of a training step by option.").parse_args(argv)
    kernels.use("torch")
    print("| GiB at batch 1 |", " | ".join([*Memory._fields, "GPU", *(f"{card} GB" for card in CARDS)]), "|")
    print("|---" * (9 + len(CARDS)) + "|")
    for decoder in ("fpn", "upernet", "mask2former"):
        for option, how in OPTIONS.items():
            sizes = compute(1, 8, 16, decoder=decoder, **how)
            cells = [f"{decoder} {option}", *(f"{size / GIB:.2f}" for size in sizes[0])]
            cells += [measured(decoder, **how), *(str(largest(card, *sizes)) for card in CARDS)]
            print("|", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
