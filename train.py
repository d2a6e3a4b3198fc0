"""Train: the paper's recipes, a plain loop under torchrun, bit-exact resume.

    python train.py                                        # tiny, on drawn scenes: minutes on a laptop
    torchrun --nproc-per-node 8 train.py --dataset ade20k  # the paper's model
    python train.py --dataset folder --data DIR            # images/, labels/, classes.txt
    python train.py --dataset folder --data DIR --from RUN # starts from a trained model

Re-running the command resumes from the last checkpoint of its run folder. Top to bottom: the loop,
validation, saving, start. One step is in run/step.py, the flags in run/options.py, the folder in
run/folder.py.
"""

from errors import CheckpointError, ModelError, RunError, end_quietly, run_command

if __name__ == "__main__":
    end_quietly()  # at Ctrl-C during the imports below

import signal
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch

import inference
import kernels
from assemble import build, parameter_groups
from data import Dataset, open_dataset
from eval import Result, evaluate, predict_items, target_of
from images import scenes
from images.panoptic import Segment
from loading.augment import RATIOS, Augment
from loading.check import check
from loading.jitter import Jitter
from loading.stream import Batch, EvaluationStream, TrainStream
from loading.tags import TagSource
from metrics.charts import curves
from metrics.report import percent
from model import Size, Tada
from run import checkpoint
from run.compiled import compile_blocks
from run.files import place
from run.folder import Run, fingerprint, open_run
from run.graph import Recorded
from run.masters import Masters
from run.memory import keep_freed_memory, relief
from run.options import Options, config_of, defaults, parse
from run.progress import StopOnSignal, describe, draw, drawing, log_line, speed
from run.ranks import Ranks, cleanup, init_distributed
from run.recipes import DROPS, learning_rate
from run.start import find_source, start_from
from run.step import train_step, update, words_of
from run.tagging import open_tags

SHOWN = 8  # images in inputs.jpg and in val/


# ---- the loop


@dataclass
class Training:
    """A run in progress."""

    run: Run
    options: Options
    tada: Tada
    train_set: Dataset
    val_set: Dataset
    train_words: TagSource
    val_words: TagSource
    optimizer: torch.optim.Optimizer
    frozen: dict[str, str]  # hashes of the prior's files
    step: int = 0
    best: dict = field(default_factory=dict)  # step and metric of the best checkpoint
    validated: bool = True  # False while a validation of this step is still due
    replaced: int = 0  # samples whose file was unreadable, on all ranks, since step 1

    @property
    def metric(self) -> str:
        """The metric that chooses the best step."""
        return "PQ" if self.options.decoder == "mask2former" else "mIoU"

    @property
    def windows(self) -> dict[str, Size]:
        """The windows that a validation image is read in; Mask2Former reads it whole."""
        config = self.tada.config
        return {} if self.metric == "PQ" else {"window": config.crop, "stride": config.stride}


def loop(training: Training, stop: StopOnSignal) -> int:
    """Train to the last iteration, or until a signal; return the exit code."""
    run, options, tada, ranks = training.run, training.options, training.tada, training.run.ranks
    masters = Masters(tada) if ranks.device.type == "cuda" and not tada.config.keeps_unet else None
    if options.compile:
        compile_blocks((masters or tada).unet, tada.decoder)
    model = ranks.data_parallel(masters or tada, options.accumulate, half=ranks.device.type == "cuda")
    shares = {"rank": ranks.rank, "world": ranks.world, "accumulate": options.accumulate}
    shares |= {"workers": options.workers, "device": ranks.device.type}
    stream = training_stream(training, options.batch, **shares)
    fixed = {"words": training.train_words, "ranks": ranks, "masters": masters}
    fixed |= {"clip": options.clip, "seed": options.seed}
    if options.cuda_graph:
        work = partial(update, model, tada, training.optimizer, ranks, options.clip, masters)
        fixed["recorded"] = Recorded(work, training.optimizer)
    # Other sizes, without gradients: the graphs of validation would exceed the compiler's limit.
    eager = partial(torch.compiler.set_stance, "force_eager") if options.compile else nullcontext
    drops = DROPS if options.decoder == "mask2former" else ()
    tada.train()
    if not training.validated:  # the run was interrupted before
        with eager():
            validate(training, final=training.step == options.iterations)
    times, stopping = [], False  # seconds since the last line of the log, without evaluation and saving
    micro_batches = stream.batches(training.step * options.batch)
    for step in range(training.step + 1, options.iterations + 1):
        started = time.perf_counter()
        batches = [next(micro_batches) for _ in range(options.accumulate)]
        loaded = time.perf_counter()
        share = learning_rate(step - 1, options.iterations, warmup=options.warmup, drops=drops)
        for group in training.optimizer.param_groups:
            group["lr"] = group["full_lr"] * share
        stopping = stop.signal is not None
        result = train_step(model, tada, training.optimizer, batches=batches, stopping=stopping, **fixed)
        times.append((loaded - started, time.perf_counter() - loaded))
        training.step, training.replaced = step, training.replaced + result.pop("replaced")
        stream.refuse_many(training.replaced, position=step * options.batch)
        last = step == options.iterations
        stopping = result.pop("stop") and not last
        if last or stopping or step % options.log_every == 0 or step == 1:
            entry = {"step": step, **result, "lr": options.lr * share, "replaced": training.replaced}
            entry |= speed(times, options.batch, remaining=options.iterations - step)
            times.clear()
            run.log(entry)
            run.print0(log_line(entry, options.iterations))
        training.validated = not (last or step % options.eval_every == 0)
        if not training.validated or stopping or step % options.save_every == 0:
            save_checkpoint(training, {}, final=last or stopping)  # first: validation takes long and may fail
        if stopping:
            run.print0(f"stopped at step {step}; the same command resumes from there")
            break
        if not training.validated:
            with eager():
                validate(training, final=last)
    micro_batches.close()
    return 128 + (stop.signal or signal.SIGTERM) if stopping else 0


def training_stream(training: Training, batch: int, **shares: int | str) -> TrainStream:
    """The augmented samples: large-scale jitter with segments for Mask2Former, else labels alone."""
    options = training.options
    ratios = options.scales or RATIOS
    augmentation = Augment(options.crop, options.short, options.long, ratios, options.colours)
    if options.decoder == "mask2former":
        augmentation = Jitter(options.crop, tuple(options.scales))
    return TrainStream(training.train_set, augmentation, batch=batch, seed=options.seed, **shares)


# ---- validation


def validate(training: Training, final: bool) -> None:
    """Evaluate this step, log and draw it, and save it with its metrics, as `best` if it is."""
    run, metric = training.run, training.metric
    result = evaluate_val(training)
    metrics, quality = {"mIoU": result.mIoU, "pixel_accuracy": result.pixel_accuracy}, ""
    if metric == "PQ":
        mean = result.segments.quality.mean()
        metrics |= {name: mean[name] for name in ("PQ", "SQ", "RQ")}
        quality = "".join(f"{name} {percent(mean[name], '%')} " for name in ("PQ", "SQ", "RQ"))
    run.log({"step": training.step, "val": metrics})
    accuracy = f"mIoU {percent(result.mIoU, '%')} pixel accuracy {percent(result.pixel_accuracy, '%')}"
    run.print0(f"step {training.step} val {quality}{accuracy}")
    if run.ranks.is_main:
        draw_val(training)
        with drawing(run, run.folder / "curve.png"):
            curves(run.folder / "curve.png", run.folder / "log.jsonl")
    best, training.validated = training.best, True
    if not best or metrics[metric] > best[metric]:
        training.best = {"step": training.step, metric: metrics[metric]}
    if not save_checkpoint(training, metrics, final=final):
        training.best = best


def evaluate_val(training: Training, limit: int | None = None) -> Result:
    """The protocol of `eval.py` without flags, on the validation set or its first `limit` images."""
    val, ranks = training.val_set, training.run.ranks
    how = {"indices": range(len(val))[:limit], "panoptic": training.metric == "PQ", **training.windows}
    shares = {"workers": training.options.workers, "rank": ranks.rank, "world": ranks.world}
    shares["show"] = ranks.is_main
    return evaluate(training.tada, val, training.val_words, **how, **shares)


def draw_val(training: Training) -> None:
    """val/step-000123.jpg: a few images of the validation set, always the same ones, with their ground truth
    and their predictions.
    """
    run, tada, val = training.run, training.tada, training.val_set
    predict = inference.segment if training.metric == "PQ" else inference.predict
    chosen = np.linspace(0, len(val) - 1, min(SHOWN, len(val))).astype(int).tolist()
    shown = []
    tada.eval()
    for item in EvaluationStream(val, *(tada.config.box or (None, None))).items(chosen):
        truth = (item.ids, item.segments) if training.metric == "PQ" else item.labels.numpy()
        item = item._replace(labels=item.image[0])  # predicted at the size that the model reads
        how = partial(predict, tada, **training.windows)
        prediction, tags = predict_items(tada, [item], words=training.val_words, predict=how)
        targets = {"ground truth": truth, "prediction": target_of(prediction, 0)}
        shown.append((item.image.permute(1, 2, 0).numpy(), targets, tags and tags[0]))
    tada.train()
    name = f"val/step-{training.step:06d}.jpg"
    with drawing(run, run.folder / name):
        draw(place(run.folder, name), val, shown)


def draw_inputs(training: Training, batch: Batch) -> None:
    """inputs.jpg: the first training images after augmentation, each with its labels and its tags."""
    images = batch.image.permute(0, 2, 3, 1).numpy()  # (B, H, W, 3)
    words = words_of(batch, training.train_words) or [None] * len(images)
    targets = batch.labels.numpy()
    if batch.owners is not None:  # UNOWNED, -1, becomes 0, which is void
        owned = [[Segment(i, k, False) for i, k in enumerate(x.tolist(), 1)] for x in batch.classes]
        targets = zip(batch.owners.numpy() + 1, owned, strict=True)
    file = training.run.folder / "inputs.jpg"
    labels = ({"labels": target} for target in targets)
    draw(file, training.train_set, zip(images, labels, words, strict=True))


# ---- saving


def save_checkpoint(training: Training, metrics: dict[str, float], final: bool) -> bool:
    """Write a checkpoint; False on a rank that failed. A full disk is fatal only if it is `final`."""
    run, best = training.run, training.best
    tensors, written = checkpoint.training_state(training.optimizer, run.ranks), True
    if run.ranks.is_main:
        facts = {"step": training.step, "best": best, "judged": training.validated}
        facts["replaced"] = training.replaced
        try:
            model = {"tada": training.tada, "frozen": training.frozen, "metrics": metrics}
            folder = checkpoint.write_step(run.folder, training.step, **model, tensors=tensors, facts=facts)
            if best.get("step") == training.step:
                checkpoint.point(run.folder, "best", target=folder.name)
        except (CheckpointError, OSError) as error:
            if final:
                raise
            run.print0(f"no checkpoint at step {training.step}: {error}")
            written = False
    run.ranks.barrier()
    return written


def resume(training: Training, folder: Path) -> None:
    """Restore model, optimiser, RNG and log from a checkpoint."""
    run = training.run
    tensors, facts = checkpoint.read_step(folder, training.tada)
    restored = checkpoint.restore_training(tensors, training.optimizer, ranks=run.ranks)
    training.step, training.best = facts["step"], facts["best"]
    training.validated, training.replaced = facts.get("judged", True), facts.get("replaced", 0)
    if run.ranks.is_main and training.best:
        best = checkpoint.step_name(training.best["step"])
        if (run.folder / best).is_dir():  # the link may be missing after a crash or a copy
            checkpoint.point(run.folder, "best", target=best)
    run.truncate_log(training.step + 0.5 * training.validated)
    new = "" if restored else "; it has no random states of more ranks or of a GPU: these are new"
    gpu = "" if run.ranks.device.type == "cpu" else "; same samples as in one go, but a GPU rounds otherwise"
    run.print0(f"resuming from step {training.step} in {folder}{new}{gpu}")


# ---- start


def train(options: Options, ranks: Ranks) -> int:
    """Train a run, or the rest of it; return the exit code."""
    with Run(Path(options.run), ranks) as run:
        training = prepare(run, options)
        describe(run, options, tada=training.tada)
        if training.step == options.iterations and training.validated:
            run.print0(f"{run.folder} is complete: {options.iterations} steps; --fresh starts over")
            return 0
        if training.step == 0:
            smoke_test(training)
        if options.check:
            run.print0(f"checked: look at {run.folder / 'inputs.jpg'}, then run without --check")
            return 0
        with StopOnSignal() as stop:
            code = loop(training, stop)
        if code == 0:
            best = training.best
            score = f"{training.metric} {percent(best[training.metric], '%')} at step {best['step']}"
            run.print0(f"done: best val {score}; next: python eval.py {run.folder}")
        return code


def prepare(run: Run, options: Options) -> Training:
    """Open everything, cheapest checks first: data, run folder, model, tags, optimiser, checkpoint."""
    ranks = run.ranks
    run.print0(f"{options.dataset} in {options.data}: checking images and labels")
    train_set, val_set = (open_dataset(options.dataset, options.data, split) for split in ("train", "val"))
    config, frozen, read = config_of(options, train_set), {}, {}
    if ranks.is_main:
        for dataset in (train_set, val_set):
            report = check(dataset)
            read |= report.fingerprint
            run.print0(str(report))
        frozen = checkpoint.frozen_digests(config)
        drawing = scenes.VERSION if options.dataset == "scenes" else None
        read |= fingerprint(train_set.classes, tags=options.tags, frozen=frozen, drawing=drawing)
    source = find_source(run, options, config=config, read=read, frozen=frozen)
    last = open_run(run, options, defaults=defaults(vars(options)), config=config, read=read)

    torch.manual_seed(options.seed)  # the same initial weights on every rank
    tada = build(config, ranks.device)
    if source and last is None:
        run.print0(start_from(source, tada))
    tada.unet.checkpoint_activations = options.checkpoint_activations
    data = {"train_set": train_set, "val_set": val_set}
    train_words, val_words = open_tags(run, tada, options=options, **data, resumed=last is not None)
    data |= {"train_words": train_words, "val_words": val_words}
    scales = {"weight_decay": options.weight_decay, "unet_scale": options.unet_lr_scale}
    groups = parameter_groups(tada, options.lr, **scales)
    optimizer = torch.optim.AdamW([{**group, "full_lr": group["lr"]} for group in groups], fused=True)
    training = Training(run, options, tada=tada, **data, optimizer=optimizer, frozen=frozen)

    torch.manual_seed(options.seed + 1 + ranks.rank)  # dropout differs between ranks
    if last is not None:
        resume(training, last)
    return training


def smoke_test(training: Training) -> None:
    """Fail early: draw inputs.jpg and evaluate two images per rank."""
    ranks = training.run.ranks
    if ranks.is_main:
        batches = training_stream(training, min(SHOWN, training.options.batch)).batches()
        draw_inputs(training, next(batches))
        batches.close()
    evaluate_val(training, limit=2 * ranks.world)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    ranks = init_distributed(options.device)
    torch.backends.cudnn.benchmark = True  # every step has the same shapes: time the convolutions once

    def work() -> int:
        kernels.use(options.kernels, ranks.device)
        try:
            code = train(options, ranks)
        except torch.OutOfMemoryError as error:
            raise ModelError(f"{error}: {relief(options, ranks.world)}") from None
        cleanup()
        return code

    interrupted = "interrupted: what is written is kept, the same command resumes from it"
    return run_command("train.py", work, interrupted=interrupted, on_all_ranks=RunError)


if __name__ == "__main__":
    sys.exit(main())
