"""Evaluate: the mIoU of a trained model, every class's IoU, what is taken for what, how good its tags are.

Where the data set has instances, also the PQ of its segments.

    python eval.py runs/NAME                             # its best step, the val split, the default protocol
    python eval.py runs/NAME --ms                        # "+MS": five scales, each also mirrored
    torchrun --nproc-per-node 8 eval.py runs/NAME/last   # the processes share the pictures

It writes result.json, result.md, confusion.csv and confusion.png; of mask2former also panoptic.json and, in
panoptic/, the PNGs that it lists, as COCO's server takes them. Those of an earlier evaluation are moved to
eval-val.1, eval-val.2 and so on, before the new one begins. The checkpoint knows its data set, classes, sizes
and condition, so no flag asks for them. Top to bottom: reading the pictures, what was counted and what
follows from it, the report, its files, the command line.
"""

import argparse
import csv
import json
import math
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import inference
import kernels
from data import Dataset, check
from errors import DataError, TadaError
from images.draw import confusion_matrix
from images.panoptic import components
from images.read import IGNORE, fit
from images.scenes import VERSION
from inference import Prediction, Segmented
from loading.augment import normalise
from loading.jitter import PanopticEvaluationStream
from loading.stream import EvaluationStream, Item
from loading.tags import TagSource, open_words
from mask2former import OVERLAP, SCORE, Instances, Mask2Former
from metrics.judge import PanopticEvaluator, PanopticResult
from model import Size, Tada, TadaConfig
from panoptic_data import PanopticDataset
from run.checkpoint import find_model, load_model, read_about, read_config
from run.folder import lock
from run.ranks import Ranks, cleanup, init_distributed
from run.recipes import add_segment_flags, default_data, open_set, segment_options, stride_of
from weights.words import digest

COMPONENTS = "connected components"
MULTISCALE = (1.0, 1.125, 1.25, 1.375, 1.5)  # VPD's "+MS"
MEASURES = (
    ("PQ", "PQ"),
    ("SQ", "SQ"),
    ("RQ", "RQ"),
    ("PQ of things", "PQ_things"),
    ("PQ of stuff", "PQ_stuff"),
    ("AP of things", "AP"),
)
WORST = 10  # classes that the report lists again
CHECKED = 10  # pictures and labels that are decoded before the model is loaded


# ---- reading the pictures


def evaluate(
    tada: Tada,
    dataset: Dataset,
    words: TagSource,
    *,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    window: Size | None = None,
    stride: Size | None = None,
    indices: Sequence[int] | None = None,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    show: bool = False,
    score: float = SCORE,
    overlap: float = OVERLAP,
    folder: Path | None = None,
    instances: bool = False,
) -> "Result":
    """Predict the pictures `indices` (None: all) one by one, each at its own size, and count.

    Each is resized into `config.box` once; for other scales than 1 every size is made from the picture as it
    is. It is read in windows of `window`, whole if None. `world` processes share the pictures; each calls
    this and gets the result of all. Of a panoptic data set, segments are judged: those of mask2former,
    which reads pictures whole (`score`, `overlap`; `instances`: also their AP; `folder`: where they are
    written), or the connected components of a semantic decoder's classes. No global random state is touched,
    every module keeps its mode. Raises DataError, in all processes, if one of them cannot read a picture.
    """
    start = time.perf_counter()
    config, ranks = tada.config, Ranks(rank, world, tada.unet.conv_in.weight.device)
    indices = range(len(dataset)) if indices is None else indices
    mine, n, K = indices[rank::world], len(indices), len(config.classes)
    once = tuple(scales) == (1.0,) or config.box is None
    box = config.box if once and config.box else (None, None)
    panoptic = isinstance(dataset, PanopticDataset)
    stream = PanopticEvaluationStream if panoptic else EvaluationStream
    items = stream(dataset, *box, workers, ranks.device.type).items(mine)
    bar = tqdm(items, f"{dataset.name} {dataset.split}", len(mine), disable=None if show else True)
    predict, how = (
        partial(inference.predict, tada, scales=scales, flip=flip, window=window, stride=stride),
        COMPONENTS,
    )
    if isinstance(tada.decoder, Mask2Former):
        assert once and not flip and window is None, "Mask2Former reads a picture whole, once"
        predict = partial(inference.segment, tada, score=score, overlap=overlap, instances=instances)
        how = f"mask2former, score {score:g}, overlap {overlap:g}"
    judge = PanopticEvaluator(dataset, how, folder, instances) if panoptic else None
    confusion = torch.zeros(K, K, dtype=torch.int64, device=ranks.device)
    spoken = confusion.new_zeros(3)
    present, scores = torch.zeros(2, n, K, device=ranks.device)

    error, training = None, [module for module in tada.modules() if module.training]
    tada.eval()
    try:
        for place, item in zip(range(rank, n, world), bar, strict=True):
            base = {} if once else {"base": fit(item.labels.shape, *config.box)}
            found, some = read(tada, item, words, partial(predict, **base))
            confusion += count(item.labels.to(ranks.device), found.labels[0], K)
            present[place, item.present] = 1
            if found.tag_logits is not None:
                scores[place] = found.tag_logits[0]
            if judge is not None:
                judge.add(item, *segments_of(found, dataset))
            if some is not None:
                right = {config.prompts[k] for k in item.present}.intersection(some)
                spoken += spoken.new_tensor([len(right), len(set(some)), len(item.present)])
    except DataError as caught:
        error = caught
    finally:
        bar.close()
        for module in training:
            module.training = True
    agree(error, ranks)
    confusion, present, scores, spoken = (
        ranks.all_reduce(x).cpu() for x in (confusion, present, scores, spoken)
    )
    stride = stride or window
    about = describe(tada, dataset, words) | {"scales": [*scales], "flip": flip}
    about |= {"window": window and [*window], "stride": stride and [*stride]}
    segments = judge and judge.end(ranks)
    seconds = time.perf_counter() - start
    return Result(config.classes, about, confusion, present, scores, spoken, seconds, segments)


def read(
    tada: Tada, item: Item, words: TagSource, predict: partial
) -> tuple[Prediction | Segmented, list[str] | None]:
    """One picture: what is predicted at its own size, the words it was read with."""
    device = tada.unet.conv_in.weight.device
    image = normalise(item.image[None].to(device))  # (1, 3, h, w)
    some = words(item.path, item.present)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        tags = tada.resolve_tags(image, None if some is None else [some])
        found = predict(image, tags, size=tuple(item.labels.shape))
    return found, tags and tags[0]


def segments_of(
    found: Prediction | Segmented, dataset: PanopticDataset
) -> tuple[np.ndarray, Sequence, Instances | None]:
    """One picture's ids `(H, W)`, their segments, and the things that may overlap if they were asked for."""
    if isinstance(found, Prediction):
        labels = found.labels[0].byte().cpu().numpy()
        return *components(labels, dataset.categories.things), None
    ids, segments = found.panoptic[0]
    return ids.cpu().numpy(), segments, found.instances and found.instances[0]


def count(truth: Tensor, predicted: Tensor, K: int) -> Tensor:
    """Pixels `(K, K)` int64 [truth, prediction] of two maps `(H, W)`, where the truth is not 255."""
    kept = truth != IGNORE
    return torch.bincount(K * truth[kept].long() + predicted[kept], minlength=K * K).view(K, K)


def agree(error: DataError | None, ranks: Ranks) -> None:
    """Raise an error of any process in all of them: none waits for one that has left."""
    for sentence in ranks.all_gather_object([str(error)] if error else []):
        raise DataError(sentence)


def describe(tada: Tada, dataset: Dataset, words: TagSource) -> dict:
    """What is evaluated. `oracle`: the model is told the truth, so the numbers are a bound and no result."""
    config = tada.config
    about = {"dataset": dataset.name, "split": dataset.split, "split_images": len(dataset)}
    about |= {"scenes_version": VERSION} if dataset.name == "scenes" else {}
    about |= {name: getattr(config, name) for name in ("model", "decoder", "weights", "condition")}
    about |= {"tags": words.tags, "oracle": "oracle" in (config.condition, words.tags)}
    about |= {"random_weights": config.weights == "random"}
    about |= {"tag_head": config.condition == "tagging" and config.tag_loss_weight > 0}
    return about | {"box": config.box and [*config.box]}


# ---- what was counted, and what follows from it


@dataclass
class Result:
    """n pictures, K classes. Fractions are in 0..1; NaN or None where nothing was counted."""

    classes: Sequence[str]
    about: dict  # what was evaluated, and how
    confusion: Tensor  # (K, K) int64 pixels [truth, prediction], without the ignored ones
    present: Tensor  # (n, K) 1 where a class is in the picture's labels
    scores: Tensor  # (n, K) logits of the multi-label head
    spoken: Tensor  # (3,) words that name a class in their picture, words, classes in their pictures
    seconds: float
    segments: PanopticResult | None = None  # of a panoptic data set

    @property
    def iou(self) -> Tensor:
        """`(K,)` intersection over union of all pictures' pixels; NaN where both are empty.

        As mmsegmentation (core/evaluation/metrics.py); ADE20K's own script gives an empty class 0.
        """
        right = self.confusion.diag().double()
        return right / (self.confusion.sum(0) + self.confusion.sum(1) - right)

    @property
    def mIoU(self) -> float:
        """The mean of `iou` over the classes that occur, in the truth or the prediction."""
        return self.iou.nanmean().item()

    @property
    def recall(self) -> Tensor:
        """`(K,)` the share of a class's pixels that were found; NaN where it has none."""
        return self.confusion.diag().double() / self.confusion.sum(1)

    @property
    def class_accuracy(self) -> float:
        """The mean of `recall` over the classes in the truth."""
        return self.recall.nanmean().item()

    @property
    def pixel_accuracy(self) -> float:
        return (self.confusion.diag().sum().double() / self.confusion.sum()).item()

    @property
    def tag_mAP(self) -> float | None:
        """Of the multi-label head: the mean average precision of the classes that are in some picture."""
        if not self.about["tag_head"] or not self.present.any():
            return None
        seen = self.present.any(dim=0).nonzero().flatten().tolist()
        return sum(average_precision(self.scores[:, k], self.present[:, k] > 0) for k in seen) / len(seen)

    @property
    def words_precision(self) -> float | None:
        """Of the words that steered, the share that name a class in their picture."""
        return self.named(1)

    @property
    def words_recall(self) -> float | None:
        """Of the classes in the pictures, the share that the words name."""
        return self.named(2)

    def named(self, of: int) -> float | None:
        steered, counts = self.about["condition"] in ("tagging", "oracle"), self.spoken.tolist()
        return counts[0] / counts[of] if steered and counts[of] else None

    def as_json(self) -> dict:
        """Everything that result.json holds of it; null where nothing was counted."""
        numbers = {
            "mIoU": self.mIoU,
            "pixel_accuracy": self.pixel_accuracy,
            "class_accuracy": self.class_accuracy,
            "tag_mAP": self.tag_mAP,
            "words_precision": self.words_precision,
            "words_recall": self.words_recall,
        }
        numbers = {name: known(x) for name, x in numbers.items()}
        numbers |= {"images": len(self.present), "seconds": self.seconds}
        classes = dict(zip(self.classes, map(known, self.iou.tolist()), strict=True))
        if self.segments is None:
            return {**numbers, **self.about, "classes": classes}
        pq = dict(zip(self.classes, map(known, self.segments.quality.classes[:, 0].tolist()), strict=True))
        return {**numbers, **self.segments.as_json(), **self.about, "classes": classes, "classes_PQ": pq}

    # ---- the report

    def as_markdown(self) -> str:
        """The warnings, every class, the ten worst, and the line to paste."""
        about, names = self.about, [name.replace("|", "\\|") for name in self.classes]
        iou, confusion = self.iou.tolist(), self.confusion
        shares = (confusion.sum(1) / confusion.sum()).tolist()
        lines = [f"# {about['dataset']} {about['split']}", ""]
        lines += [f"**{sentence}**\n" for sentence in self.warnings()]
        lines += ["| id | class | IoU % | found % | share of the pixels % |", "|--:|---|--:|--:|--:|"]
        for k, row in enumerate(zip(iou, self.recall.tolist(), shares, strict=True)):
            lines.append(f"| {k} | {names[k]} | {' | '.join(map(percent, row))} |")

        worst = sorted((k for k, x in enumerate(iou) if not math.isnan(x)), key=iou.__getitem__)[:WORST]
        lines += [f"\nThe {len(worst)} worst:\n", "| class | IoU % | most often taken for |", "|---|--:|---|"]
        for k in worst:
            wrong = confusion[k].clone()
            wrong[k] = 0
            most, total = int(wrong.argmax()), int(confusion[k].sum())
            other = f"{names[most]} ({percent(int(wrong[most]) / total)} %)" if wrong.any() else "-"
            lines.append(f"| {names[k]} | {percent(iou[k])} | {other} |")
        if self.segments is not None:
            lines += ["", *self.segments_table()]
        return "\n".join([*lines, f"\n    {self.line()}", ""])

    def segments_table(self) -> list[str]:
        """PQ, SQ and RQ of all classes together and of each."""
        quality, names = self.segments.quality, [name.replace("|", "\\|") for name in self.classes]
        rows = [f"Segments: {self.segments.how}", ""]
        rows += ["| classes | PQ % | SQ % | RQ % | how many occur |", "|---|--:|--:|--:|--:|"]
        for which in ("all", "things", "stuff"):
            *means, n = quality.mean(which).values()
            rows.append(f"| {which} | {' | '.join(map(percent, means))} | {n} |")
        rows += ["", "| class | PQ % | SQ % | RQ % |", "|---|--:|--:|--:|"]
        for name, row in zip(names, quality.classes.tolist(), strict=True):
            rows.append(f"| {name} | {' | '.join(map(percent, row))} |")
        return rows

    def warnings(self) -> list[str]:
        """Sentences without which the numbers mislead."""
        about, n = self.about, len(self.present)
        said = []
        if about["oracle"]:
            said.append("ORACLE: the model is told a picture's true classes: a bound, not a result.")
        if about["random_weights"]:
            said.append("RANDOM WEIGHTS: no prior was used: this says nothing about the method.")
        if n < about["split_images"]:
            said.append(f"PART: {n} of the split's {about['split_images']} pictures.")
        if self.segments is not None and self.segments.lacking:
            said.append(self.segments.lacking)
        return said

    def line(self) -> str:
        """The result and how it was taken, to paste."""
        about, numbers = self.about, self.as_json()
        occur = sum(x is not None for x in numbers["classes"].values())
        version = f" version {about['scenes_version']}" if "scenes_version" in about else ""
        tags = [("tag mAP", "tag_mAP"), ("words' precision", "words_precision"), ("recall", "words_recall")]
        size = "{}x{}".format
        parts = [
            f"{about['dataset']}{version} {about['split']} mIoU {percent(numbers['mIoU'])}",
            f"{occur} of {len(self.classes)} classes occur",
            *(f"{name} {percent(numbers[key])}" for name, key in MEASURES if key in numbers),
            *([numbers["segments"]] if "segments" in numbers else []),
            f"pixel accuracy {percent(numbers['pixel_accuracy'])}",
            f"class accuracy {percent(numbers['class_accuracy'])}",
            *(f"{name} {percent(numbers[key])}" for name, key in tags if numbers[key] is not None),
            f"{numbers['images']} pictures",
            " ".join(["scale", *(f"{x:g}" for x in about["scales"])]) + " + flip" * about["flip"],
            f"windows {size(*about['window'])} by {size(*about['stride'])}" if about["window"] else "whole",
            f"{about['model']} {about['decoder']} {about['condition']}, tags {about['tags']}",
            *(["ORACLE"] if about["oracle"] else []),
            *(["RANDOM WEIGHTS"] if about["random_weights"] else []),
        ]
        return ", ".join(parts)


def average_precision(scores: Tensor, there: Tensor) -> float:
    """The mean, over the positives `there (n,)`, of the precision among all that score no lower.

    Equal scores are one step, so the order of the pictures plays no part (scikit-learn's definition).
    """
    scores, order = scores.sort(descending=True)
    no_lower = torch.searchsorted(-scores, -scores, right=True)  # how many
    right = there[order].cumsum(0)[no_lower - 1]
    return (right / no_lower)[there[order]].double().mean().item()


def known(x: float | None) -> float | None:
    """NaN, which JSON lacks, as None."""
    return None if x is None or math.isnan(x) else x


def percent(x: float | None) -> str:
    return "-" if known(x) is None else f"{100 * x:.2f}"


# ---- its files

FILES = ("result.json", "result.md", "confusion.csv", "confusion.png", "panoptic.json", "panoptic")


def put_aside(out: Path) -> None:
    """Move what an earlier evaluation wrote into a new folder beside `out`; a stopped one's rest goes."""
    shutil.rmtree(out / ".tmp-panoptic", ignore_errors=True)
    earlier = [name for name in FILES if (out / name).exists()]
    if not earlier:
        return
    number, out = 1, out.resolve()
    while (aside := out.with_name(f"{out.name}.{number}")).exists():
        number += 1
    try:
        aside.mkdir()
    except OSError as error:
        raise TadaError(
            f"{aside}, for the earlier evaluation, cannot be made ({error.strerror}): give another --out"
        ) from None
    for name in earlier:
        shutil.move(out / name, aside / name)
    print(f"the earlier evaluation is now {aside}")


def write(result: Result, out: Path, file: Path, sha256: str) -> None:
    """result.json with the model's `file` and its hash, result.md, confusion.csv and confusion.png."""
    entries = result.as_json() | {"checkpoint": str(file), "sha256": sha256}
    (out / "result.json").write_text(json.dumps(entries, indent=1), encoding="utf-8")
    signed = f"{result.as_markdown()}\nCheckpoint {file}, sha256 {sha256}\n"
    (out / "result.md").write_text(signed, encoding="utf-8")
    with (out / "confusion.csv").open("w", newline="", encoding="utf-8") as f:
        table = csv.writer(f)
        table.writerow(["truth \\ prediction", *result.classes])
        for name, row in zip(result.classes, result.confusion.tolist(), strict=True):
            table.writerow([name, *row])
    confusion_matrix(result.confusion, result.classes).save(out / "confusion.png")


# ---- the command line


def main(argv: Sequence[str] | None = None) -> int:
    sys.stdout.reconfigure(errors="backslashreplace")  # a name that it cannot show stops nothing
    options = parse(argv)
    ranks = init_distributed()
    try:
        kernels.use(options.kernels)
        run(options, ranks)
    except KeyboardInterrupt:
        if ranks.is_main:
            print("stopped: no result was written", file=sys.stderr)
        return 130
    except (TadaError, OSError) as error:
        if ranks.is_main or isinstance(error, OSError):  # the others are the same in all processes
            print(f"eval.py: {error}", file=sys.stderr)
        return 2
    cleanup()
    return 0


def run(options: argparse.Namespace, ranks: Ranks) -> None:
    """Open all that is needed, what is quick first; evaluate; rank 0 reports."""
    file = find_model(Path(options.checkpoint)).resolve()  # `best` may lead elsewhere soon
    config, home = read_config(read_about(file)["config"], file), run_folder(file)
    root = options.data or data_folder(home, config)
    decoder = "mask2former" if config.dataset == "scenes" else config.decoder  # they have instances
    dataset = open_set(config.dataset, root, options.split, decoder)
    if tuple(dataset.classes) != config.classes:
        raise TadaError(
            f"{root} has {len(dataset.classes)} classes, such as {dataset.classes[0]}, but {file} "
            f"was trained on {len(config.classes)}, such as {config.classes[0]}: give another --data"
        )
    refuse_flags(options, config)
    reading = segment_options(options, config.decoder)
    words = open_dataset_words(options.tags, config, dataset, root)
    window, stride = windows_of(options, config)
    check(dataset, CHECKED)
    n = min(options.limit or len(dataset), len(dataset))
    protocol = {"scales": options.scales, "flip": options.flip, "window": window, "stride": stride}
    mine = {"workers": options.workers, "rank": ranks.rank, "world": ranks.world, "show": ranks.is_main}
    indices = [i * len(dataset) // n for i in range(n)]
    out = Path(options.out) if options.out else (home or Path()) / f"eval-{options.split}"
    if config.decoder == "mask2former":
        mine |= {**reading, "folder": out / "panoptic", "instances": True}

    with lock(out, "--out") if ranks.is_main else nullcontext():
        sha256 = digest(file)
        tada = load_model(file, options.weights, ranks.device)
        if ranks.is_main:
            print(kernels.describe(ranks.device))
            put_aside(out)
        ranks.barrier()  # only now may files appear
        result = evaluate(tada, dataset, words, **protocol, indices=indices, **mine)
        if ranks.is_main:
            print(result.as_markdown())
            write(result, out, file, sha256)
            more = ", panoptic.json, panoptic/" if config.decoder == "mask2former" else ""
            print(f"written: {out}/result.json, result.md, confusion.csv, confusion.png{more}")


def run_folder(file: Path) -> Path | None:
    """The run that a model's file belongs to; None if it lies alone."""
    folder = file.resolve().parent
    folder = folder.parent if folder.name.startswith("step-") else folder
    return folder if (folder / "config.json").is_file() else None


def data_folder(home: Path | None, config: TadaConfig) -> str:
    """Where the run had its data set, or where it is by default."""
    if home is not None:
        try:
            found = json.loads((home / "config.json").read_text()).get("data")
        except (OSError, ValueError, AttributeError) as error:
            raise TadaError(f"{home / 'config.json'} cannot be read ({error}): give --data") from None
        if found:
            return found
    if config.dataset in ("folder", "panoptic"):
        raise TadaError("the checkpoint does not say where its data set is: give its folder with --data")
    return default_data(config.dataset)


def open_dataset_words(tags: str | None, config: TadaConfig, dataset: Dataset, root: str) -> TagSource:
    """The words of training, or those that --tags names instead."""
    if tags and config.condition not in ("caption", "tagging", "oracle"):
        raise TadaError(f"--tags {tags}: a model of condition {config.condition} reads no words of a picture")
    if tags in ("classes", "clip") and tags != config.tags:
        raise TadaError(
            f"--tags {tags}: the model was trained with tags {config.tags}; give a file or oracle"
        )
    paths = [dataset.path(i) for i in range(len(dataset))]
    return open_words(config.condition, tags or config.tags, dataset.prompts, root, paths)


def refuse_flags(options: argparse.Namespace, config: TadaConfig) -> None:
    """What mask2former has no use for."""
    given = [name for name in ("ms", "flip", "window", "stride") if getattr(options, name)]
    given += ["scales"] if not given and options.scales != [1.0] else []
    if given and config.decoder == "mask2former":
        raise TadaError(f"--{given[0]}: mask2former reads a picture whole, once; leave it out")


def windows_of(options: argparse.Namespace, config: TadaConfig) -> tuple[Size | None, Size | None]:
    """The window and its stride that the flags ask for."""
    if options.whole or config.decoder == "mask2former":
        return None, None
    window = options.window or config.crop
    thirds = tuple(map(stride_of, window))
    stride = options.stride or (thirds if options.window else config.stride)
    if any(step > side for step, side in zip(stride, window, strict=True)):
        raise TadaError(f"--stride {stride} leaves gaps between windows of {window}: give at most the window")
    return window, stride


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; argparse ends the command with code 2 where a flag is wrong."""
    parser = argparse.ArgumentParser(
        prog="eval.py",
        description="Evaluate a trained model: mIoU, every class, the confusion matrix, its tags.",
        epilog="By default a picture is resized as training said and, where it is then larger than the "
        "crop of training, read in windows of that crop; their logits are averaged where they overlap.",
    )
    parser.add_argument(
        "checkpoint", help="a run folder (its best step), a step folder or a model.safetensors"
    )
    add = parser.add_argument_group("the pictures").add_argument
    add(
        "--data",
        metavar="DIR",
        help="the data set (default: that of the run, or data/ and its official name)",
    )
    add("--split", default="val", metavar="NAME", help="train or val; of scenes also test (default: val)")
    add("--limit", type=positive, metavar="N", help="so many, evenly spread over the split (default: all)")
    add("--tags", metavar="WHERE", help="FILE.jsonl or oracle (default: where training had its words from)")
    group = parser.add_argument_group("the protocol")
    add = group.add_mutually_exclusive_group().add_argument
    add("--ms", action="store_true", help="scales 1, 1.125, 1.25, 1.375, 1.5 and --flip (default: no)")
    add("--scales", type=scale, nargs="+", metavar="X", default=[1.0], help="times that size (default: 1)")
    group.add_argument("--flip", action="store_true", help="add the mirrored picture (default: no)")
    add, sides = group.add_mutually_exclusive_group().add_argument, {"type": positive, "nargs": "+"}
    add("--whole", action="store_true", help="no windows (default: windows)")
    add("--window", **sides, metavar="N", help="its height and width (default: the crop of training)")
    steps = "from window to window (default: that of training; two thirds of --window)"
    group.add_argument("--stride", **sides, metavar="N", help=steps)
    add_segment_flags(parser)
    add = parser.add_argument_group("the run").add_argument
    add("--weights", metavar="DIR", help="the frozen files (default: where training had them)")
    add("--workers", type=int, default=2, metavar="N", help="processes that load pictures (default: 2)")
    which = "Triton kernels: where they won the benchmark, never, or by name (default: auto)"
    add("--kernels", choices=["auto", "torch", "triton"], default="auto", help=which)
    add("--out", metavar="DIR", help="(default: eval-SPLIT in the run folder, or here if there is none)")
    options = parser.parse_args(argv)
    for name in ("window", "stride"):
        given = getattr(options, name)
        if given and len(given) > 2:
            parser.error(f"--{name} {' '.join(map(str, given))}: give one number, or height and width")
        setattr(options, name, given and (given[0], given[-1]))
    if options.whole and options.stride:
        parser.error("--stride: there are no windows with --whole")
    if options.workers < 0:
        parser.error(f"--workers {options.workers}: give 0 or more")
    if options.ms:
        options.scales, options.flip = list(MULTISCALE), True
    return options


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def scale(text: str) -> float:
    x = float(text)  # argparse reports a ValueError
    if not 0.1 <= x <= 10:
        raise argparse.ArgumentTypeError(f"{text!r} is not in 0.1..10")
    return x


if __name__ == "__main__":
    sys.exit(main())
