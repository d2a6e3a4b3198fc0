"""One step of training: a micro-batch on its device, the update, what is read from it.

But for Mask2Former `update` reads nothing from a GPU, so that run/graph.py can record it.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from adapter import Text
from errors import RunError
from loading.augment import normalise
from loading.jitter import UNOWNED, masks_of
from loading.stream import Batch, points_of
from loading.tags import TagSource
from mask2former import Rand, Target
from model import Tada, Tags
from run.masters import Masters
from run.ranks import Ranks


class Inputs(NamedTuple):
    """A micro-batch on the device: image `(B, 3, H, W)` and labels `(B, H, W)` uint8; text None = no tags."""

    image: Tensor
    labels: Tensor
    text: Tags | Text | None
    segments: list[Target] | None
    rand: list[Rand]


Work = Callable[[Sequence[Inputs], Tensor], dict[str, Tensor]]  # `update` without its first arguments


def train_step(
    model: nn.Module,
    tada: Tada,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    words: TagSource,
    ranks: Ranks,
    clip: float | None = None,
    stopping: bool = False,
    seed: int = 0,
    masters: Masters | None = None,
    recorded: Work | None = None,
) -> dict[str, float]:
    """Update the model once with the micro-batches of this rank; return the losses of the global batch, the
    gradient norm, `stop`: whether any rank is `stopping`, and `replaced`: how many files were unreadable.

    `model` is `tada`, its `masters`, or the DDP wrapper of either. `seed` is that of the points of
    Mask2Former's loss. `recorded` is the `update` of all these as a CUDA graph. Raises RunError on all ranks,
    without an update, if a loss or the gradient is not finite.
    """
    inputs = [
        inputs_of(tada, batch, words, ranks.device, seed, fixed=recorded is not None) for batch in batches
    ]
    flags = torch.tensor([stopping, sum(len(batch.skipped) for batch in batches)], dtype=torch.float32)
    flags = flags.to(ranks.device, non_blocking=True)
    work = recorded or partial(update, model, tada, optimizer, ranks, clip, masters)
    numbers = work(inputs, flags)
    values = torch.stack([*numbers.values()]).tolist()
    result = dict(zip(numbers, values, strict=True))
    here, stop, replaced = (result.pop(name) for name in ("finite_here", "stop", "replaced"))
    norm = result.pop("grad_norm")
    step = {"loss": sum(result.values()), **result, "grad_norm": norm}
    if not all(map(math.isfinite, step.values())):
        wrong = [] if here else [path for batch in batches for path in batch.paths]
        where = ", ".join(ranks.all_gather_object(wrong)) or "the gradient alone"
        cure = "give a lower --lr, or the largest norm with --clip, and --fresh"
        raise RunError(f"not finite: {step}, in {where}: {cure}")
    return {**step, "stop": bool(stop), "replaced": int(replaced)}


# ---- inputs


def inputs_of(
    tada: Tada, batch: Batch, words: TagSource, device: torch.device, seed: int, fixed: bool
) -> Inputs:
    """A micro-batch on the device; with `fixed` its text is as long as the longest of all images'."""
    image, labels = (x.to(device, non_blocking=True) for x in (batch.image, batch.labels))
    rand = [points_of(seed, position, device=device) for position in batch.positions]
    text = words_of(batch, words)
    if fixed:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            text = tada.text(text, words.longest)
    return Inputs(image, labels, text, segments_of(tada, batch, device), rand)


def segments_of(tada: Tada, batch: Batch, device: torch.device) -> list[Target] | None:
    """The segments of each image as Mask2Former's loss takes them; None for a batch without segments."""
    if batch.owners is None:
        return None
    owners = tada.padded(batch.owners.to(device, non_blocking=True), UNOWNED)
    classes = [x.to(device, non_blocking=True) for x in batch.classes]
    return [
        Target(labels, masks_of(owner, len(labels)), tuple(size))
        for labels, owner, size in zip(classes, owners, batch.sizes, strict=True)
    ]


def words_of(batch: Batch, words: TagSource) -> list[list[str]] | None:
    """The tags of each image of a batch; None where the condition has none per image."""
    tags = [words(path, present) for path, present in zip(batch.paths, batch.present, strict=True)]
    return None if None in tags else tags


# ---- the update


def update(
    model: nn.Module,
    tada: Tada,
    optimizer: torch.optim.Optimizer,
    ranks: Ranks,
    clip: float | None,
    masters: Masters | None,
    inputs: Sequence[Inputs],
    flags: Tensor,
) -> dict[str, Tensor]:
    """Update the model once, unless a loss or the gradient is not finite; return scalars of one dtype.

    They are the losses of the global batch, `stop` and `replaced`, the sums of `flags` over the ranks,
    `grad_norm`, and `finite_here`, whether the losses of this rank are. Each part of the loss is divided by
    its count over all ranks and micro-batches, so the gradient does not depend on how a batch is divided. But
    for Mask2Former's matching nothing is read from a GPU.
    """
    half = ranks.device.type == "cuda" or masters is not None
    labels = [x.labels.long() for x in inputs]
    terms = [tada.counts(y, x.segments) for x, y in zip(inputs, labels, strict=True)]
    total = ranks.all_reduce(torch.stack([torch.stack(list(x.values())) for x in terms]).sum(dim=0))
    counts, sums = dict(zip(terms[0], total.clamp(min=1), strict=True)), {}  # of the global batch
    for i, (x, true_labels) in enumerate(zip(inputs, labels, strict=True)):
        last = i == len(inputs) - 1
        with nullcontext() if last or ranks.world == 1 else model.no_sync():
            with torch.autocast(ranks.device.type, torch.bfloat16, enabled=half):
                output = model(normalise(x.image), x.text)
            losses = tada.loss(output, true_labels, segments=x.segments, rand=x.rand)
            parts = {name: total / counts[name] for name, (total, _) in losses.items()}
            (sum(parts.values()) * ranks.world).backward()  # DDP averages over ranks; the loss is a sum
        for name, part in parts.items():
            sums[name] = sums.get(name, 0) + part.detach()

    if masters:
        masters.take_gradients()
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
    if clip:
        nn.utils.clip_grads_with_norm_(trained, clip, norm)
    parts = torch.stack([*sums.values(), *flags])
    finite_here = parts.isfinite().all()
    parts = ranks.all_reduce(parts.float() if ranks.device.type == "mps" else parts.double())
    # AdamW leaves everything as it is if this is 1, as torch's GradScaler sets it (fused only).
    optimizer.found_inf = 1 - (parts.isfinite().all() & norm.isfinite()).float()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if masters:
        masters.copy_weights()
    own = {"grad_norm": norm.to(parts), "finite_here": finite_here.to(parts)}
    return dict(zip([*sums, "stop", "replaced"], parts, strict=True)) | own
