"""Evaluate: mIoU of a trained model, IoU of every class, confusion matrix, tag quality; PQ of data sets with
instances.

    python eval.py runs/NAME                             # its best step, the val split, the default protocol
    python eval.py runs/NAME --ms                        # "+MS": five scales, each also mirrored
    torchrun --nproc-per-node 8 eval.py runs/NAME/last   # the processes share the images

Writes result.json, result.md, confusion.csv and confusion.png; with --worst 8 also worst/, drawings of the
eight images with the lowest mIoU; for mask2former also panoptic.json and, in panoptic/, the PNGs that it
lists, as COCO's server takes them. Earlier results are moved to eval-val.1, eval-val.2 and so on first. The
checkpoint holds its data set, classes, sizes and condition, so no flag asks for them. Top to bottom: the
loop, the command, its flags. The report is in metrics/report.py.
"""

from errors import DataError, ModelError, Parser, TadaError, end_quietly, run_command

if __name__ == "__main__":
    end_quietly()  # at Ctrl-C during the imports below

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import groupby, islice, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import inference
import kernels
from data import Dataset, default_data, open_dataset
from images.draw import Target
from images.panoptic import components
from images.read import fit
from images.scenes import VERSION
from inference import Prediction, at_once, stride_of
from loading.augment import normalise
from loading.check import check
from loading.stream import EvaluationStream, Item
from loading.tags import TagSource, choose_source, open_words, split_words, tag_key
from mask2former import OVERLAP, SCORE, Instances, Mask2Former
from metrics.judge import PanopticEvaluator
from metrics.report import Result, confusion, move_earlier_results, percent
from metrics.worst import WorstImages
from model import Size, Tada, TadaConfig, Tags
from run.checkpoint import find_model, read_about, read_config, read_model
from run.files import entry, read_bytes
from run.folder import lock, say
from run.ranks import DEVICE, DEVICE_HINTS, Ranks, cleanup, init_distributed
from weights.words import digest

MULTISCALE = (1.0, 1.125, 1.25, 1.375, 1.5)  # VPD's "+MS"
CHECKED = 10  # images and labels that are decoded before the model is loaded


# ---- the loop


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
    panoptic: bool = True,
    score: float = SCORE,
    overlap: float = OVERLAP,
    folder: Path | None = None,
    instances: bool = False,
    write: Callable[[Result], None] = lambda result: None,
    worst: WorstImages | None = None,
) -> Result:
    """Predict the images `indices` (None: all) in order, each at its own size, and count.

    Each is resized into `config.box` once; for other scales than 1 every size is made from the original
    image. It is read in windows of `window`, whole if None. `world` processes share the images; each calls
    this and gets the result of all. Unless `panoptic` is false, segments are measured where the data set has
    instances: those of mask2former, which reads images whole (`score`, `overlap`; `instances`: also their AP;
    `folder`: where they are written), or the connected components of a semantic decoder's classes. `write` is
    called on every rank with what was measured, before AP and the files of segments, which take longer and
    may fail; `worst` is given what this process predicts. No global random state is touched, every module
    keeps its mode. Raises DataError on all ranks if one of them cannot read an image.
    """
    start = time.perf_counter()
    config, ranks = tada.config, Ranks(rank, world, tada.unet.conv_in.weight.device)
    indices = range(len(dataset)) if indices is None else indices
    mine, n, K = indices[rank::world], len(indices), len(config.classes)
    once, passes = tuple(scales) == (1.0,) or config.box is None, len(scales) * (1 + flip)
    box = config.box if once and config.box else (None, None)
    items = EvaluationStream(dataset, *box, workers, ranks.device.type).items(mine)
    bar = tqdm(items, f"{dataset.name} {dataset.split}", len(mine), disable=None if show else True)
    if isinstance(tada.decoder, Mask2Former):
        assert once and not flip and window is None, "Mask2Former reads an image whole, once"
        predict = partial(inference.segment, tada, score=score, overlap=overlap, instances=instances)
        how = f"mask2former, score {score:g}, overlap {overlap:g}"
    else:
        protocol = {"scales": scales, "flip": flip, "window": window, "stride": stride}
        predict, how = partial(inference.predict, tada, **protocol), "connected components"
    evaluator = None
    if panoptic and dataset.categories is not None:
        evaluator = PanopticEvaluator(dataset, how, folder, instances)
    total = torch.zeros(K, K, dtype=torch.int64, device=ranks.device)
    tag_counts = total.new_zeros(3)
    present, scores = torch.zeros(2, n, K, device=ranks.device)

    error, training = None, [module for module in tada.modules() if module.training]
    tada.eval()
    try:
        places = iter(range(rank, n, world))
        for group in groups(bar, lambda x: (x.image.shape[1:], x.labels.shape), ranks.device, passes):
            labels = torch.stack([item.labels for item in group])
            base = {} if once else {"base": fit(labels.shape[1:], *config.box)}
            prediction, tags = predict_items(tada, group, words=words, predict=partial(predict, **base))
            total += confusion(labels.to(ranks.device), prediction.labels, K)
            for i, (item, place) in enumerate(zip(group, places)):
                present[place, item.present] = 1
                if prediction.tag_logits is not None:
                    scores[place] = prediction.tag_logits[i]
                if evaluator is not None:
                    evaluator.add(item, *segments_of(prediction, i, dataset))
                if worst is not None:
                    worst.add(item, prediction.labels[i], target_of(prediction, i), tags and tags[i])
                if tags is not None:
                    unique = {tag_key(tag) for tag in tags[i]}
                    right = {tag_key(config.prompts[k]) for k in item.present} & unique
                    tag_counts += tag_counts.new_tensor([len(right), len(unique), len(item.present)])
    except DataError as caught:
        error = caught
    finally:
        bar.close()
        for module in training:
            module.training = True
    for sentence in ranks.all_gather_object([str(error)] if error else []):
        raise DataError(sentence)  # on every rank, so that none hangs in a collective
    counts = (ranks.all_reduce(x).cpu() for x in (total, present, scores, tag_counts))
    stride = stride or window
    about = describe(tada, dataset, words) | {"scales": [*scales], "flip": flip}
    about |= {"window": window and [*window], "stride": stride and [*stride]}
    segments = evaluator and evaluator.measure(ranks)
    result = Result(config.classes, about, *counts, time.perf_counter() - start, segments)
    write(result)
    if evaluator is not None:
        evaluator.finish(ranks, result.segments)
    return result


def groups(
    items: Iterable[Any], sizes: Callable[[Any], tuple[Size, Size]], device: torch.device, passes: int = 1
) -> Iterator[list]:
    """The items in order, those that follow each other with equal sizes together, as many as `at_once` lets.

    `sizes` (H, W): of the model's image, whose logits are kept from all `passes`, and of the labels, which
    count by a quarter of their sides.
    """
    for (image, labels), run in groupby(items, sizes):
        areas = (passes * image[0], image[1]), (labels[0] / 4, labels[1] / 4)
        most = min(at_once(area, device) for area in areas)
        while group := list(islice(run, most)):
            yield group


def predict_items(
    tada: Tada, items: Sequence[Item], words: TagSource, predict: Callable[..., Prediction]
) -> tuple[Prediction, Tags | None]:
    """The prediction for images of one size at that of their labels, and the tags it was made with."""
    device = tada.unet.conv_in.weight.device
    image = normalise(torch.stack([item.image for item in items]).to(device))  # (B, 3, h, w)
    given = [words(item.path, item.present) for item in items]
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        tags, seen = tada.resolve_tags(image, None if given[0] is None else given)
        return predict(image, tags, seen=seen, size=tuple(items[0].labels.shape)), tags


def segments_of(
    prediction: Prediction, i: int, dataset: Dataset
) -> tuple[np.ndarray, Sequence, Instances | None]:
    """The ids `(H, W)` of image i, their segments, and the things that may overlap if requested."""
    target = target_of(prediction, i)
    if prediction.panoptic is None:
        return *components(target, dataset.categories.things), None
    return *target, prediction.instances and prediction.instances[i]


def target_of(prediction: Prediction, i: int) -> Target:
    """Image i's labels `(H, W)` uint8; of mask2former its ids `(H, W)` and their segments."""
    if prediction.panoptic is None:
        return prediction.labels[i].byte().cpu().numpy()
    ids, segments = prediction.panoptic[i]
    return ids.cpu().numpy(), segments


def describe(tada: Tada, dataset: Dataset, words: TagSource) -> dict:
    """What is evaluated. `oracle`: the model sees ground-truth tags, so its scores are upper bounds."""
    config = tada.config
    about = {"dataset": dataset.name, "split": dataset.split, "split_images": len(dataset)}
    about |= {"scenes_version": VERSION} if dataset.name == "scenes" else {}
    about |= {name: getattr(config, name) for name in ("model", "decoder", "weights", "condition")}
    about |= {"tags": words.tags, "oracle": "oracle" in (config.condition, words.tags)}
    about |= {"trained_tags": config.tags} if words.tags != config.tags else {}
    about |= {"random_weights": config.weights == "random"}
    about |= {"tag_head": config.condition == "tagging" and config.tag_loss_weight > 0}
    return about | {"box": config.box and [*config.box]}


# ---- the command


def main(argv: Sequence[str] | None = None) -> int:
    options = vars(parse(argv))
    work = partial(run, ranks=init_distributed(options.pop("device")), **options)
    return run_command("eval.py", work)


def run(
    checkpoint: str,
    *,
    ranks: Ranks,
    data: str | None,
    split: str,
    limit: int | None,
    tags: str | None,
    words: str | None,
    tag_threshold: float | None,
    weights: str | None,
    workers: int,
    kernel: str,
    out: str | None,
    worst: int,
    **flags: Any,
) -> None:
    """Open everything, cheapest checks first; evaluate; rank 0 reports. `flags` are of `protocol_of`."""
    kernels.use(kernel, ranks.device)
    if ranks.is_main:
        say(kernels.describe(ranks.device))  # first: a large data set takes seconds to open
    file = find_model(Path(checkpoint)).resolve()  # `best` may point elsewhere soon
    config, home = read_config(read_about(file)["config"], file), run_folder(file)
    root = data or data_folder(home, config)
    dataset = open_dataset(config.dataset, root, split)
    if tuple(dataset.classes) != config.classes:
        pairs = zip_longest(dataset.classes, config.classes, fillvalue="none")
        here, there = next((x, y) for x, y in pairs if x != y)
        raise TadaError(
            f"{root} has {len(dataset.classes)} classes, with {here} where {file}, "
            f"trained on {len(config.classes)}, has {there}: give another --data"
        )
    protocol = protocol_of(config, **flags)
    trained = {"condition": config.condition, "trained": (config.tags, config.tag_threshold)}
    source, given, threshold = choose_source(tags, words, tag_threshold, **trained)
    if given is None:
        source_words = open_words(config.condition, source, dataset.prompts, root, dataset.paths, threshold)
    else:
        table = dict.fromkeys(dataset.paths, split_words(given, config.condition))
        source_words = TagSource(source, dataset.prompts, table)
    check(dataset, CHECKED)
    n = min(limit or len(dataset), len(dataset))
    protocol["indices"] = [i * len(dataset) // n for i in range(n)]
    out = Path(out) if out else (home or Path()) / f"eval-{split}"
    if config.decoder == "mask2former":
        protocol |= {"folder": out / "panoptic", "instances": True}

    with lock(out, "--out") if ranks.is_main else nullcontext():
        sha256 = digest(file)
        tada = read_model(file, weights, ranks.device, source, threshold)
        if ranks.is_main and (earlier := move_earlier_results(out)):
            say(f"moved the earlier evaluation to {earlier}")
        ranks.barrier()  # only now may files appear
        shares = {"workers": workers, "rank": ranks.rank, "world": ranks.world, "show": ranks.is_main}
        steering = {"tag_threshold": threshold, "words": given}

        def write(result: Result) -> None:
            result.about |= {name: x for name, x in steering.items() if x is not None}
            if ranks.is_main:
                result.write(out, checkpoint=file, sha256=sha256)

        drawn = WorstImages(dataset, worst) if worst else None
        result = evaluate(tada, dataset, source_words, **protocol, **shares, write=write, worst=drawn)
        write(result)  # again, now with AP
        if ranks.is_main:
            result.write_confusion(out)
            say(result.as_markdown())
        for score, i in drawn.draw(out / "worst", ranks) if drawn else ():
            if ranks.is_main:
                say(f"mIoU {percent(score, '%')} {dataset.paths[i]}")
        if ranks.is_main:
            more = ", panoptic.json, panoptic/" if config.decoder == "mask2former" else ""
            more += ", worst/" if worst else ""
            mean = f"mIoU {percent(result.mIoU, '%')}"
            say(f"{mean}; written: {out}/result.json, result.md, confusion.csv, confusion.png{more}")
    cleanup()


def run_folder(file: Path) -> Path | None:
    """The run that a model's file belongs to; None if it belongs to none."""
    folder = file.resolve().parent
    folder = folder.parent if folder.name.startswith("step-") else folder
    return folder if (folder / "config.json").exists() else None


def data_folder(home: Path | None, config: TadaConfig) -> str:
    """The data set's folder of the run, or the default one."""
    try:
        if home and (folder := entry(json.loads(read_bytes(home / "config.json")), "data", str, default="")):
            return folder
    except (OSError, ValueError, RecursionError) as error:
        raise TadaError(f"{home / 'config.json'} cannot be read ({error}): give --data") from None
    if config.dataset in ("folder", "panoptic"):
        raise TadaError("the checkpoint does not hold its data set's folder: give it with --data")
    return default_data(config.dataset)


def protocol_of(
    config: TadaConfig, *, ms: bool, whole: bool, window: Size | None, stride: Size | None, **flags: Any
) -> dict[str, Any]:
    """The arguments of `evaluate` that the flags request; `flags`: scales, flip, score and overlap."""
    scales, flip = flags.pop("scales"), flags.pop("flip")
    several = {"ms": ms, "flip": flip, "window": window, "stride": stride, "scales": scales != [1.0]}
    protocol = {"scales": scales, "flip": flip} | segment_options(flags, config.decoder, several)
    if whole or config.decoder == "mask2former":
        return protocol
    default = tuple(map(stride_of, window)) if window else config.stride
    window, stride = window or config.crop, stride or default
    if any(step > side for step, side in zip(stride, window, strict=True)):
        raise TadaError(f"--stride {stride} leaves gaps between windows of {window}: give at most the window")
    return protocol | {"window": window, "stride": stride}


# ---- its flags


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; argparse ends the command with code 2 where a flag is wrong."""
    parser = Parser(
        "eval.py",
        DEVICE_HINTS,
        description="Evaluate a trained model: mIoU, every class, the confusion matrix, its tags.",
        epilog="By default an image is resized as in training and, where it is then larger than the crop of "
        "training, read in windows of that crop; their logits are averaged where they overlap.",
    )
    parser.add_argument("checkpoint", help="a run folder (its best step), a step folder, model.safetensors")
    add = parser.add_argument_group("the images").add_argument
    data = "the data set (default: that of the run, or data/ and its official name)"
    add("--data", metavar="DIR", help=data)
    add("--split", default="val", metavar="NAME", help="train or val; of scenes also test (default: val)")
    add("--limit", type=positive, metavar="N", help="evenly spaced images of the split (default: all)")
    add_word_flags(add)
    group = parser.add_argument_group("the protocol")
    add = group.add_mutually_exclusive_group().add_argument
    add("--ms", action="store_true", help="scales 1, 1.125, 1.25, 1.375, 1.5 and --flip (default: no)")
    add("--scales", type=scale, nargs="+", metavar="X", default=[1.0], help="times that size (default: 1)")
    group.add_argument("--flip", action="store_true", help="add the mirrored image (default: no)")
    add, sides = group.add_mutually_exclusive_group().add_argument, {"type": positive, "nargs": "+"}
    add("--whole", action="store_true", help="no windows (default: windows)")
    add("--window", **sides, metavar="N", help="its height and width (default: the crop of training)")
    steps = "from window to window (default: that of training; two thirds of --window)"
    group.add_argument("--stride", **sides, metavar="N", help=steps)
    add_segment_flags(parser)
    add = parser.add_argument_group("the run").add_argument
    add("--weights", metavar="DIR", help="the frozen files (default: their folder in training)")
    add("--device", **DEVICE)
    add("--workers", type=int, default=2, metavar="N", help="processes that load images (default: 2)")
    which = "what won the benchmark, plain torch, or the Triton kernels (default: auto)"
    add("--kernels", dest="kernel", choices=["auto", "torch", "triton"], default="auto", help=which)
    lowest = "draw the N images with the lowest mIoU into worst/ (default: 0)"
    add("--worst", type=positive, metavar="N", default=0, help=lowest)
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


def add_word_flags(add: Callable[..., Any]) -> None:
    """--tags, --words and --tag-threshold of eval.py and predict.py."""
    sources = "classes, clip, ram, oracle, none or FILE.jsonl (default: the tags of training)"
    add("--tags", metavar="WHERE", help=sources)
    add("--words", metavar="WORDS", help="of all images, 'sea, boat', or their caption (default: --tags)")
    least = "lowest score of a tag (default: that of training; else RAM's per tag, CLIP's 1 / classes)"
    add("--tag-threshold", type=fraction, metavar="X", help=least)


def add_segment_flags(parser: Parser) -> None:
    """--score and --overlap of eval.py and predict.py; the options lack one that is not given."""
    add = parser.add_argument_group("the segments of mask2former").add_argument
    common = {"type": fraction, "metavar": "X", "default": argparse.SUPPRESS}
    least = f"minimum probability of a segment's class (default: {SCORE}, Mask2Former's; ODISE's is 0.0)"
    add("--score", **common, help=least)
    kept = f"minimum share of its mask that a segment keeps after overlaps (default: {OVERLAP})"
    add("--overlap", **common, help=kept)


def segment_options(given: dict[str, float], decoder: str, several: dict[str, Any]) -> dict[str, float]:
    """`score` and `overlap` of mask2former, {} of another decoder. Raises ModelError if that is given one,
    or mask2former one of the flags that read an image `several` times.
    """
    if decoder == "mask2former":
        for name in [name for name, value in several.items() if value][:1]:
            raise ModelError(f"--{name}: mask2former reads an image whole, once; leave it out")
        for name in [name for name, value in given.items() if not 0 <= value <= 1]:
            raise ModelError(f"--{name} {given[name]}: give a share in 0..1")
        return {"score": SCORE, "overlap": OVERLAP} | given
    for name in given:
        raise ModelError(f"--{name} is for mask2former's segments, this decoder is {decoder}: leave it out")
    return {}


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def scale(text: str, least: float = 0.1, most: float = 10) -> float:
    x = float(text)  # argparse reports a ValueError
    if not least <= x <= most:
        raise argparse.ArgumentTypeError(f"{text!r} is not in {least}..{most}")
    return x


def fraction(text: str) -> float:
    return scale(text, 0, 1)


if __name__ == "__main__":
    sys.exit(main())
