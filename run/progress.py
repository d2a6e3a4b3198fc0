"""What a run shows: model and settings at its start, drawings of its data, speed and losses; its stop."""

import resource
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import numpy as np
import torch

import kernels
from data import Dataset
from images.draw import Target, compared, mosaic
from metrics.charts import LOSSES
from model import Tada
from run.files import replacing
from run.folder import Run
from run.options import Options
from run.recipes import paper_row, recipe


def describe(run: Run, options: Options, tada: Tada) -> None:
    """Print the parts of the model, the batch, the paper's settings and the machine."""
    config = tada.config
    if config.weights == "random":
        run.print0("RANDOM WEIGHTS: no prior is used; scores do not measure the method")
    if "oracle" in (config.condition, config.tags):
        run.print0("ORACLE: the model reads the ground-truth tags; scores are upper bounds")
    for part in ("vae", "clip", "unet", "adapter", "decoder"):
        sizes = [0, 0]  # frozen, trained
        for parameter in getattr(tada, part).parameters():
            sizes[parameter.requires_grad] += parameter.numel()
        run.print0(f"  {part:8} {sizes[1]:>13,} parameters trained {sizes[0]:>13,} frozen")
    device, world = run.ranks.device, run.ranks.world
    each = options.batch // (world * options.accumulate)
    paper = recipe(options.dataset, options.model, decoder=options.decoder).paper
    batch = f"batch {options.batch} = {world} processes x {options.accumulate} accumulated x {each} images"
    schedule = f"{options.iterations:,} iterations, lr {options.lr:g}" + (paper and f"; the paper: {paper}")
    machine = f"device {device}, {options.threads} threads, torch {torch.__version__}"
    run.print0(f"{batch}, {schedule}; {machine}")
    words = options.dataset, options.condition, options.tags, options.tag_loss_weight
    if options.model == "sd15" and (row := paper_row(*words)):
        run.print0(f"to compare with the paper's {row}")
    run.print0(kernels.describe(device))
    run.print0(f"run folder {run.folder}")


Shown = tuple[np.ndarray, dict[str, Target], list[str] | None]  # image (H, W, 3), its targets, its tags


def draw(file: Path, dataset: Dataset, shown: Iterable[Shown]) -> None:
    """Each image beside itself under its targets, two images in a row."""
    names = {"palette": dataset.palette, "classes": dataset.classes}
    rows = [compared(image, "image", targets, tags, **names) for image, targets, tags in shown]
    with replacing(file) as new:
        mosaic([tile for row in rows for tile in row], 2 * len(rows[0])).save(new, quality=92)


@contextmanager
def drawing(run: Run, file: Path) -> Iterator[None]:
    """Print why the block could not draw the file: whatever fails there, training goes on."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - as said: a drawing ends no run
        run.print0(f"{file} is not drawn ({error})")


def speed(times: Sequence[tuple[float, float]], batch: int, remaining: int) -> dict[str, float]:
    """Speed, share of loading, memory, and time for `remaining` steps, from the seconds of loading and of
    computing of each step of `batch` images.
    """
    loading, computing = map(sum, zip(*times, strict=True))
    seconds = loading + computing
    return {
        "images_per_second": len(times) * batch / seconds,
        "data_share": loading / seconds,
        "memory_gib": peak_memory() / 2**30,
        "eta_seconds": remaining * seconds / len(times),
    }


def peak_memory() -> int:
    """Bytes of the GPU, or of this process where there is none."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def log_line(entry: dict, iterations: int) -> str:
    """A line of log.jsonl as the terminal shows it."""
    losses = " ".join(f"{name} {entry[name]:.4f}" for name in LOSSES if name in entry)
    eta = int(entry["eta_seconds"])
    return (
        f"step {entry['step']}/{iterations} {losses} lr {entry['lr']:.2e} "
        f"gnorm {entry['grad_norm']:.2f} {entry['images_per_second']:.1f} img/s "
        f"data {entry['data_share']:.0%} mem {entry['memory_gib']:.1f}G "
        f"eta {eta // 3600}:{eta // 60 % 60:02}:{eta % 60:02}"
    )


class StopOnSignal:
    """SIGTERM, Ctrl-C and a closed terminal stop after the current step, a second Ctrl-C at once."""

    signal: int | None = None  # the one received

    def __enter__(self) -> Self:
        numbers = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # not under nohup
            numbers.append(signal.SIGHUP)
        self.before = {number: signal.signal(number, self.receive) for number in numbers}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def receive(self, number: int, frame: object) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
