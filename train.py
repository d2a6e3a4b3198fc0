"""Train: the recipes of the paper, a plain loop under torchrun, runs that go on exactly where they ended.

    python train.py                                        # tiny, on drawn scenes: minutes on a laptop
    torchrun --nproc-per-node 8 train.py --dataset ade20k  # the paper's model
    python train.py --dataset folder --data DIR            # images/, labels/, classes.txt

The same command again goes on from the last checkpoint of its run folder. Top to bottom: one step, the loop,
what it keeps, its pictures, what comes before it. The flags are in recipes.py, the run folder in run.py.
"""

import argparse
import json
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import inference
import kernels
from assemble import build, parameter_groups
from data import Dataset, check
from errors import CheckpointError, RunError, TadaError
from eval import Result, evaluate
from images.draw import mosaic, overlay, segment_overlay
from images.panoptic import Segment
from loading.augment import normalise
from loading.jitter import NOBODY, PanopticBatch, PanopticTrainStream, masks_of
from loading.stream import Batch, EvaluationStream, TrainStream
from loading.tags import TagSource, open_words
from mask2former import Rand, Target
from model import Tada
from run import checkpoint
from run.folder import Run, fingerprint, open_run
from run.ranks import Ranks, cleanup, init_distributed
from run.recipes import DROPS, config_of, open_set, parse, recipe

SHOWN = 8  # pictures in inputs.jpg and in val/
# This pass of torch 2.13's compiler may read a sum before it is made: all maps then have the gradient 0.
COMPILE = {"reorder_for_peak_memory": False}
POINTS = 3  # keeps this use of the seed apart from the order's and the samples' (stream.py)


# ---- one step


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
) -> dict[str, float]:
    """One update from the micro-batches of this process: losses of the global batch, gradient norm, stop.

    `model` is `tada` or its DDP wrapper. Each part of the loss is divided by its count over all processes and
    micro-batches: however a batch is divided, the gradient is the same. Nothing is updated if the loss or the
    gradient is not finite, in whichever process (RunError in all). `stop` is true if any process is
    `stopping`. `seed` is of the points of Mask2Former's loss.
    """
    labels = [batch.labels.to(ranks.device, non_blocking=True).long() for batch in batches]
    segments = [segments_of(tada, batch, ranks.device) for batch in batches]
    counts = count_all(tada, labels, segments, ranks)
    sums = {}
    for i, (batch, true_labels, true_segments) in enumerate(zip(batches, labels, segments, strict=True)):
        last = i == len(batches) - 1
        with nullcontext() if last or model is tada else model.no_sync():
            image = normalise(batch.image.to(ranks.device, non_blocking=True))  # (B, 3, H, W)
            with torch.autocast(ranks.device.type, torch.bfloat16, enabled=ranks.device.type == "cuda"):
                output = model(image, words_of(batch, words))
            rand = [points_of(seed, position, ranks.device) for position in batch.positions]
            losses = tada.loss(output, true_labels, true_segments, rand)
            parts = {name: total / counts[name] for name, (total, _) in losses.items()}
            (sum(parts.values()) * ranks.world).backward()  # DDP takes the mean over processes, we want sums
        for name, part in parts.items():
            sums[name] = sums.get(name, 0) + part.detach()

    trained = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(trained, clip or math.inf)
    told = torch.stack([*sums.values(), norm.new_tensor(float(stopping))]).double()
    *losses, stop = ranks.all_reduce(told).tolist()
    step = {"loss": sum(losses), **dict(zip(sums, losses, strict=True)), "grad_norm": float(norm)}
    if not all(map(math.isfinite, step.values())):
        wrong = [] if all(x.isfinite() for x in sums.values()) else [p for x in batches for p in x.paths]
        where = ", ".join(ranks.all_gather_object(wrong)) or "the gradient alone"
        raise RunError(
            f"not finite: {step}, in {where}: give a lower --lr, or the largest norm with --clip, and --fresh"
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {**step, "stop": bool(stop)}


def count_all(
    tada: Tada, labels: Sequence[Tensor], segments: Sequence[list[Target] | None], ranks: Ranks
) -> dict[str, Tensor]:
    """How many terms each part of the loss has in the global batch, at least 1."""
    counts = [tada.counts(*target) for target in zip(labels, segments, strict=True)]
    every = ranks.all_reduce(torch.stack([torch.stack(list(x.values())) for x in counts]).sum(dim=0))
    return dict(zip(counts[0], every.clamp(min=1), strict=True))


def segments_of(tada: Tada, batch: Batch | PanopticBatch, device: torch.device) -> list[Target] | None:
    """The segments of each picture as Mask2Former's loss takes them; None of a batch that has none."""
    if not isinstance(batch, PanopticBatch):
        return None
    owners = tada.padded(batch.owners.to(device, non_blocking=True), NOBODY)
    classes = [x.to(device, non_blocking=True) for x in batch.classes]
    return [
        Target(labels, masks_of(owner, len(labels)), tuple(size))
        for labels, owner, size in zip(classes, owners, batch.sizes, strict=True)
    ]


def points_of(seed: int, position: int, device: torch.device) -> Rand:
    """Draws the points of one sample's loss, a function of (seed, position): on every rank, in every
    micro-batch, after every resumption the same.
    """
    number = np.random.default_rng((POINTS, seed, position)).integers(2**63)
    return partial(torch.rand, generator=torch.Generator(device).manual_seed(int(number)))


def words_of(batch: Batch, words: TagSource) -> list[list[str]] | None:
    """The words of each picture of a batch; None where the condition reads none per picture."""
    found = [words(path, present) for path, present in zip(batch.paths, batch.present, strict=True)]
    return None if None in found else found


def learning_rate(step: int, iterations: int, warmup: int, drops: Sequence[float] = ()) -> float:
    """The share of the full rate at step 0, 1, ...: a line down to 0, times a warm-up from 1e-6 to 1.

    mmsegmentation's poly policy of power 1 with linear warm-up (mmcv/runner/hooks/lr_updater.py). With
    `drops`, shares of the run, no line: at each the rate falls to a tenth.
    """
    warm = min(1e-6 + (1 - 1e-6) * step / warmup, 1.0) if warmup else 1.0
    if drops:
        return warm * 0.1 ** sum(step >= share * iterations for share in drops)
    return warm * (1 - step / iterations)


# ---- the loop


def loop(
    run: Run, options: argparse.Namespace, tada: Tada, sets: "Sets", state: "State", stop: "Stop"
) -> int:
    """Train from `state` to the last iteration; the exit code."""
    ranks, model = run.ranks, tada
    if options.compile:
        tada.run_unet = torch.compile(tada.run_unet, options=COMPILE)
        tada.decoder.compile(options=COMPILE)
    if ranks.world > 1:
        devices = [ranks.device.index] if ranks.device.type == "cuda" else None
        model = DistributedDataParallel(tada, device_ids=devices, broadcast_buffers=False)
    stream = training_stream(
        options,
        tada,
        sets.train,
        options.batch,
        rank=ranks.rank,
        world=ranks.world,
        accumulate=options.accumulate,
        workers=options.workers,
        device=ranks.device.type,
    )
    drops = DROPS if options.decoder == "mask2former" else ()
    tada.train()
    stopping = False
    if not state.judged:  # the run ended in between
        judge(run, options, tada, sets, state, final=state.step == options.iterations)
    clock = Clock(options, state.step)
    micro_batches = stream.batches(state.step * options.batch)
    for step in range(state.step + 1, options.iterations + 1):
        batches = list(clock.waiting(micro_batches, options.accumulate))
        share = learning_rate(step - 1, options.iterations, options.warmup, drops)
        for group in state.optimizer.param_groups:
            group["lr"] = group["full_lr"] * share
        made = train_step(
            model,
            tada,
            state.optimizer,
            batches,
            sets.train_words,
            ranks,
            options.clip,
            stop.signal is not None,
            options.seed,
        )
        clock.worked()
        state.step = step
        last = step == options.iterations
        stopping = made.pop("stop") and not last
        if last or stopping or step % options.log_every == 0 or step == 1:
            entry = {
                "step": step,
                **made,
                "lr": options.lr * share,
                "replaced": stream.replaced,
                **clock.read(step),
            }
            run.log(entry)
            run.say(log_line(entry, options))
        state.judged = not (last or step % options.eval_every == 0)
        if not state.judged or stopping or step % options.save_every == 0:
            # Before judging, which takes long and may fail.
            keep(run, tada, state, {}, final=last or stopping)
        if stopping:
            run.say(f"stopped at step {step}; the same command goes on from there")
            break
        if not state.judged:
            judge(run, options, tada, sets, state, final=last)
    micro_batches.close()
    return 128 + (stop.signal or signal.SIGTERM) if stopping else 0


def training_stream(
    options: argparse.Namespace, tada: Tada, dataset: Dataset, batch: int, **shares: int | str
) -> TrainStream:
    """The samples that the decoder is trained on, with segments or classes alone."""
    crop = tada.config.crop
    if options.decoder == "mask2former":
        return PanopticTrainStream(dataset, crop, batch, options.seed, tuple(options.scales), **shares)
    return TrainStream(dataset, crop, options.short, options.long, batch, options.seed, **shares)


def judge(
    run: Run, options: argparse.Namespace, tada: Tada, sets: "Sets", state: "State", final: bool
) -> None:
    """Evaluate, log it, draw val/, keep the step with its metrics and whether it is the best one so far."""
    result = evaluate_val(tada, sets, run.ranks, options)
    metrics = {"mIoU": result.mIoU, "pixel_accuracy": result.pixel_accuracy}
    measure, said = measure_of(options), ""
    if measure == "PQ":
        mean = result.segments.quality.mean()
        metrics |= {name: mean[name] for name in ("PQ", "SQ", "RQ")}
        said = f"PQ {mean['PQ']:.4f} SQ {mean['SQ']:.4f} RQ {mean['RQ']:.4f} "
    run.log({"step": state.step, "val": metrics})
    run.say(f"step {state.step} val {said}mIoU {result.mIoU:.4f} pixel accuracy {result.pixel_accuracy:.4f}")
    if run.ranks.is_main:
        draw_val(run, tada, sets, state.step)
    before, state.judged = state.best, True
    if not before or metrics[measure] > before[measure]:
        state.best = {"step": state.step, measure: metrics[measure]}
    if not keep(run, tada, state, metrics, final):
        state.best = before


def measure_of(options: argparse.Namespace) -> str:
    """By what the best step is chosen."""
    return "PQ" if options.decoder == "mask2former" else "mIoU"


def keep(run: Run, tada: Tada, state: "State", metrics: dict[str, float], final: bool) -> bool:
    """Write a checkpoint; false on the rank that could not. A full disk stops no run, unless nothing would be
    left of its end.
    """
    tensors, written = training_state(state.optimizer, run.ranks), True
    if run.ranks.is_main:
        facts = {"step": state.step, "best": state.best, "judged": state.judged}
        try:
            folder = checkpoint.write_step(
                run.folder, state.step, tada, state.frozen, metrics, tensors, facts
            )
            if state.best.get("step") == state.step:
                checkpoint.point(run.folder, "best", folder.name)
        except (CheckpointError, OSError) as error:
            if final:
                raise
            run.say(f"no checkpoint at step {state.step}: {error}")
            written = False
    run.ranks.barrier()
    return written


class Clock:
    """Speed, share of time spent waiting for data, memory, time to go; of training since the last reading."""

    def __init__(self, options: argparse.Namespace, step: int):
        self.options, self.step = options, step
        self.took = self.waited = 0.0
        self.last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap."""
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        return seconds

    def waiting(self, batches: Iterator[Batch], count: int) -> Iterator[Batch]:
        self.lap()  # what was done since the step ended (evaluation, checkpoints) is not training
        for _ in range(count):
            yield next(batches)
        self.waited += self.lap()

    def worked(self) -> None:
        self.took += self.lap()

    def read(self, step: int) -> dict[str, float]:
        took, steps = self.took + self.waited, step - self.step
        if torch.cuda.is_available():
            memory = torch.cuda.max_memory_allocated()
        else:
            unit = 1 if sys.platform == "darwin" else 1024  # macOS counts in bytes, Linux in KiB
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        reading = {
            "images_per_second": steps * self.options.batch / took,
            "data_share": self.waited / took,
            "memory_gib": memory / 2**30,
            "eta_seconds": (self.options.iterations - step) * took / steps,
        }
        self.took = self.waited = 0.0
        self.step = step
        return reading


LOSSES = ("loss", "seg", "aux", "class", "mask", "dice", "tag")


def log_line(entry: dict, options: argparse.Namespace) -> str:
    losses = " ".join(f"{name} {entry[name]:.4f}" for name in LOSSES if name in entry)
    eta = int(entry["eta_seconds"])
    return (
        f"step {entry['step']}/{options.iterations} {losses} lr {entry['lr']:.2e} "
        f"gnorm {entry['grad_norm']:.2f} {entry['images_per_second']:.1f} img/s "
        f"data {entry['data_share']:.0%} mem {entry['memory_gib']:.1f}G "
        f"eta {eta // 3600}:{eta // 60 % 60:02}:{eta % 60:02}"
    )


# ---- state that training needs to go on


def training_state(optimizer: torch.optim.Optimizer, ranks: Ranks) -> dict[str, Tensor]:
    """AdamW's moments by parameter name (rank 0 alone, which writes them), every rank's random state."""
    tensors = {}
    for group in optimizer.param_groups if ranks.is_main else ():  # they are the same everywhere
        for name, p in zip(group["names"], group["params"], strict=True):
            for key, value in optimizer.state[p].items():
                tensors[f"optimizer/{name}/{key}"] = value.detach().cpu().contiguous()
    for rank, state in enumerate(ranks.all_gather(torch.get_rng_state().to(ranks.device))):
        tensors[f"rng/{rank}/cpu"] = state.cpu()
    if ranks.device.type == "cuda":
        for rank, state in enumerate(ranks.all_gather(torch.cuda.get_rng_state().to(ranks.device))):
            tensors[f"rng/{rank}/cuda"] = state.cpu()
    return tensors


def restore_training(tensors: dict[str, Tensor], optimizer: torch.optim.Optimizer, ranks: Ranks) -> bool:
    """Put `training_state` back; false if this rank has no random state there (more ranks than before)."""
    for group in optimizer.param_groups:
        for name, p in zip(group["names"], group["params"], strict=True):
            keys = ("step", "exp_avg", "exp_avg_sq")
            state = {key: tensors[f"optimizer/{name}/{key}"] for key in keys}
            optimizer.state[p] = {key: x if key == "step" else x.to(p.device) for key, x in state.items()}
    if f"rng/{ranks.rank}/cpu" not in tensors:
        return False
    torch.set_rng_state(tensors[f"rng/{ranks.rank}/cpu"])
    if ranks.device.type == "cuda" and f"rng/{ranks.rank}/cuda" in tensors:
        torch.cuda.set_rng_state(tensors[f"rng/{ranks.rank}/cuda"])
    return True


class Stop:
    """While it is open, SIGTERM, Ctrl-C and a lost terminal ask for an end after this step; a second Ctrl-C
    ends at once.
    """

    signal: int | None = None

    def __enter__(self) -> Self:
        numbers = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
            numbers.append(signal.SIGHUP)
        self.before = {number: signal.signal(number, self.ask) for number in numbers}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, number: int, frame: object) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number


# ---- pictures of the run


def draw_inputs(run: Run, sets: "Sets", batch: Batch) -> None:
    """inputs.jpg: the first pictures as the model will see them, each with its labels and its words."""
    pictures = batch.image.permute(0, 2, 3, 1).numpy()  # (B, H, W, 3)
    words = words_of(batch, sets.train_words) or [None] * len(pictures)
    targets = batch.labels.numpy()
    if isinstance(batch, PanopticBatch):  # NOBODY, -1, becomes 0, which is void
        owned = [[Segment(i, k, False) for i, k in enumerate(x.tolist(), 1)] for x in batch.classes]
        targets = zip(batch.owners.numpy() + 1, owned, strict=True)
    draw(run.folder / "inputs.jpg", sets.train, zip(pictures, targets, words, strict=True))


def draw_val(run: Run, tada: Tada, sets: "Sets", step: int) -> None:
    """val/step-000123.jpg: what the model says of a few pictures of the validation set, always the same."""
    chosen = np.linspace(0, len(sets.val) - 1, min(SHOWN, len(sets.val))).astype(int).tolist()
    shown = []
    tada.eval()
    for item in EvaluationStream(sets.val, *(tada.config.box or (None, None))).items(chosen):
        image = normalise(item.image[None].to(run.ranks.device))
        words = sets.val_words(item.path, item.present)
        if tada.config.tags == "clip":
            words = [word for word, _ in tada.zero_shot_tags(image)[0]]
        steering = None if words is None else [words]
        with torch.autocast(image.device.type, torch.bfloat16, enabled=image.is_cuda):
            if tada.config.decoder == "mask2former":
                ids, segments = inference.segment(tada, image, steering).panoptic[0]
                target = ids.cpu().numpy(), segments
            else:
                seen = inference.predict(
                    tada, image, steering, window=tada.config.crop, stride=tada.config.stride
                )
                target = seen.labels[0].byte().cpu().numpy()
        shown.append((item.image.permute(1, 2, 0).numpy(), target, words))
    tada.train()
    file = run.folder / "val" / f"step-{step:06d}.jpg"
    try:
        file.parent.mkdir(exist_ok=True)
        draw(file, sets.val, shown)
    except OSError as error:
        run.say(f"{file} is not drawn ({error.strerror})")


def draw(file: Path, dataset: Dataset, shown: Iterable[tuple[np.ndarray, Any, list[str] | None]]) -> None:
    """Each picture `(H, W, 3)` beside itself under its labels `(H, W)` or (ids, segments), with its words."""
    tiles, names = [], (dataset.palette, dataset.classes)
    for picture, target, words in shown:
        tiles.append(Image.fromarray(picture))
        if isinstance(target, tuple):
            tiles.append(segment_overlay(picture, *target, *names, words))
        else:
            tiles.append(overlay(picture, target, *names, words))
    mosaic(tiles, 4).save(file, quality=92)


# ---- before the loop


@dataclass
class Sets:
    """What is trained on and judged by, and the words of their pictures."""

    train: Dataset
    val: Dataset
    train_words: TagSource
    val_words: TagSource


@dataclass
class State:
    """Where a run is: what a checkpoint holds beside the model."""

    optimizer: torch.optim.Optimizer
    step: int
    best: dict
    frozen: dict[str, str]
    judged: bool = True  # has this step been evaluated, if it is to be?


def train(options: argparse.Namespace, ranks: Ranks) -> int:
    """A whole run, or the rest of one; the exit code."""
    run = Run(Path(options.run), ranks)
    try:
        return train_in(run, options)
    finally:
        run.release()


def train_in(run: Run, options: argparse.Namespace) -> int:
    """`train` in its folder: open all that is needed, what is quick first, then the loop."""
    ranks = run.ranks
    train_set, val_set = (
        open_set(options.dataset, options.data, split, options.decoder) for split in ("train", "val")
    )
    if ranks.is_main:
        for dataset in (train_set, val_set):
            run.say(str(check(dataset)))
    config = config_of(options, train_set)
    frozen = checkpoint.frozen_digests(config) if ranks.is_main else {}
    last = open_run(run, options, config, fingerprint(options, train_set, frozen) if ranks.is_main else {})

    torch.manual_seed(options.seed)  # the same first weights on every rank
    tada = build(config, ranks.device)
    tada.unet.checkpoint_activations = options.checkpoint_activations
    train_words, val_words = words_of_sets(run, tada, options, train_set, val_set)
    sets = Sets(train_set, val_set, train_words, val_words)
    groups = parameter_groups(tada, options.lr, options.weight_decay, options.unet_lr_scale)
    optimizer = torch.optim.AdamW([{**group, "full_lr": group["lr"]} for group in groups])
    state = State(optimizer, 0, {}, frozen)

    torch.manual_seed(options.seed + 1 + ranks.rank)  # dropout differs between ranks
    if last is not None:
        resume(run, tada, state, last)
    describe(run, options, tada)
    if state.step == options.iterations and state.judged:
        run.say(f"{run.folder} is complete: {options.iterations} steps; --fresh starts anew")
        return 0
    if last is None:
        rehearse(run, options, tada, sets)
    if options.check:
        run.say(f"checked: look at {run.folder / 'inputs.jpg'}, then run without --check")
        return 0
    with Stop() as stop:
        code = loop(run, options, tada, sets, state, stop)
    if code == 0:
        best, measure = state.best, measure_of(options)
        run.say(
            f"done: best val {measure} {best[measure]:.4f} at step {best['step']}; "
            f"next: python eval.py {run.folder}"
        )
    return code


def resume(run: Run, tada: Tada, state: State, folder: Path) -> None:
    """Take up the model, the optimiser, the random states and the log as they were at a checkpoint."""
    tensors, facts = checkpoint.read_step(folder, tada)
    known = restore_training(tensors, state.optimizer, run.ranks)
    state.step, state.best, state.judged = facts["step"], facts["best"], facts.get("judged", True)
    best = run.folder / checkpoint.step_name(state.best["step"]) if state.best else None
    if (
        run.ranks.is_main and best and best.is_dir()
    ):  # a crash may have come before the link, or a copy lost it
        checkpoint.point(run.folder, "best", best.name)
    run.cut_log(state.step + 0.5 * state.judged)
    more = "" if known else "; ranks that were not there before get new random states"
    run.say(f"going on from step {state.step} in {folder}{more}")


def rehearse(run: Run, options: argparse.Namespace, tada: Tada, sets: Sets) -> None:
    """What would fail after hours, at once: inputs.jpg, and two evaluation batches."""
    if run.ranks.is_main:
        stream = training_stream(options, tada, sets.train, min(SHOWN, options.batch))
        batches = stream.batches()
        draw_inputs(run, sets, next(batches))
        batches.close()
    evaluate_val(tada, sets, run.ranks, options, limit=2 * run.ranks.world)


def evaluate_val(
    tada: Tada, sets: Sets, ranks: Ranks, options: argparse.Namespace, limit: int | None = None
) -> Result:
    """The protocol of `eval.py` without flags, on the validation set or its first `limit` pictures."""
    windows = {"window": tada.config.crop, "stride": tada.config.stride}
    return evaluate(
        tada,
        sets.val,
        sets.val_words,
        **({} if options.decoder == "mask2former" else windows),
        indices=range(min(limit or len(sets.val), len(sets.val))),
        workers=options.workers,
        rank=ranks.rank,
        world=ranks.world,
    )


def words_of_sets(
    run: Run, tada: Tada, options: argparse.Namespace, train_set: Dataset, val_set: Dataset
) -> tuple[TagSource, TagSource]:
    """Where the words of training and of validation pictures come from; CLIP tags the former once, here."""
    paths = [dataset.path(i) for dataset in (train_set, val_set) for i in range(len(dataset))]
    words = open_words(options.condition, options.tags, train_set.prompts, options.data, paths)
    if options.tags != "clip":
        if words.table:
            tada.cache_words(sorted({word for some in words.table.values() for word in some}), keep=True)
        return words, words
    table = tag_all(run, tada, train_set, options)
    return TagSource("clip", train_set.prompts, table), words


def tag_all(run: Run, tada: Tada, dataset: Dataset, options: argparse.Namespace) -> dict[str, list[str]]:
    """CLIP's tags of every training picture, in `tags-train.jsonl` of the run folder, shared by all ranks.

    A file of an earlier start of this run is taken as it is.
    """
    file = run.folder / "tags-train.jsonl"
    if run.ranks.is_main and not file.is_file():
        run.say(f"tagging {len(dataset):,} training pictures with CLIP")
        box = tada.config.box or (None, None)
        stream = EvaluationStream(dataset, *box, options.workers, run.ranks.device.type)
        lines = []
        for item in tqdm(stream.items(range(len(dataset))), total=len(dataset), desc="tagging", disable=None):
            found = tada.zero_shot_tags(normalise(item.image[None].to(run.ranks.device)))[0]
            lines.append(json.dumps({"image": item.path, "tags": found}) + "\n")
        new = file.with_suffix(".tmp")
        new.write_text("".join(lines))
        os.replace(new, file)
    run.ranks.barrier()
    entries = map(json.loads, file.read_text().splitlines())
    return {entry["image"]: [tag for tag, _ in entry["tags"]] for entry in entries}


def describe(run: Run, options: argparse.Namespace, tada: Tada) -> None:
    """The first screen: what is trained, from what, how much."""
    config, world = tada.config, run.ranks.world
    if config.weights == "random":
        run.say("RANDOM WEIGHTS: no prior is used; the result says nothing about the method")
    if config.condition == "oracle" or config.tags == "oracle":
        run.say("ORACLE: the model is told the true classes; the result is a bound, not a result")
    for part in ("vae", "clip", "unet", "adapter", "decoder"):
        parameters = list(getattr(tada, part).parameters())
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        frozen = sum(p.numel() for p in parameters if not p.requires_grad)
        run.say(f"  {part:8} {trained:>13,} parameters trained {frozen:>13,} frozen")
    each = options.batch // (world * options.accumulate)
    paper = recipe(options.dataset, options.model, options.decoder).paper
    run.say(
        f"batch {options.batch} = {world} processes x {options.accumulate} accumulated x {each} pictures, "
        f"{options.iterations:,} iterations, lr {options.lr:g}"
        + (f"; the paper: {paper}" if paper else "")
        + f"; device {run.ranks.device}, {options.threads} threads, torch {torch.__version__}"
    )
    run.say(kernels.describe(run.ranks.device))
    run.say(f"run folder {run.folder}")


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    torch.set_num_threads(options.threads)
    ranks = init_distributed()
    try:
        kernels.use(options.kernels)
        code = train(options, ranks)
    except KeyboardInterrupt:
        print("stopped: the last checkpoint stays", file=sys.stderr)
        return 130
    except torch.OutOfMemoryError as error:
        print(f"train.py: {error}: give a larger --accumulate, or --checkpoint-activations", file=sys.stderr)
        return 2
    except (TadaError, OSError) as error:
        if ranks.is_main or not isinstance(error, RunError):  # rank 0 has every one of those
            print(f"train.py: {error}", file=sys.stderr)
        return 2
    cleanup()
    return code


if __name__ == "__main__":
    sys.exit(main())
