"""Predict: label maps and overlays of an image, a folder or a glob, and the effect of words on them.

    python predict.py runs/NAME photo.jpg  # predictions/photo.png, predictions/photo.overlay.jpg
    python predict.py runs/NAME photos --words "sea, boat" --attention --out seen
    torchrun --nproc-per-node 8 predict.py runs/NAME "photos/**/*.jpg"  # the processes share the images

For `x.jpg` it writes into --out:

    x.png            the class of every pixel: one channel, the image's size, upright by its EXIF tag
    x.overlay.jpg    the image under its classes' colours (mask2former: and outlines), a legend, its words
    x.attention.jpg  with --attention: where the model attends to each word
    x.segments.png   mask2former: the segment of every pixel, its id as R + 256 G + 65536 B, 0 = none
    predictions.jsonl  per image "path", "labels" (x.png), "size" [height, width], "tags" (null: none),
        "shares" of its classes, mask2former's "segments", its settings, and "bytes", "mtime_ns" of its file

Folders are mirrored below the folder that holds all inputs; where two results would share a name the later
image keeps its suffix (1.jpg -> 1.png, 1.png -> 1.png.png). Files of another image or program are never
overwritten: a line is written before the files that it lists, so files without a line belong to others. An
image is skipped if its line has the same model, settings, size and time, and its files exist.
"""

import argparse
import fcntl
import json
import os
import re
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import inference
import kernels
from errors import TadaError, Unreadable, run_command
from eval import add_segment_flags, add_word_flags, scale, segment_options
from images.draw import attention_mosaic, overlay, percent, segment_overlay
from images.panoptic import to_colours
from images.read import distinct_colour, find_images, fit, read_image
from loading.augment import model_input
from loading.tags import choose_source, choose_words
from model import Tada
from run.checkpoint import find_model, load_model, read_about, read_config, replace_text
from run.folder import lock
from run.ranks import Ranks, cleanup, init_distributed
from weights.words import digest

LIST, SEGMENTS = "predictions.jsonl", ".segments.png"
ENDINGS = (".png", ".overlay.jpg", ".attention.jpg", SEGMENTS)  # of all results


@dataclass(frozen=True)
class Settings:
    """What a result depends on, besides its image and its words."""

    checkpoint: str  # its sha256
    tagger: dict[str, Any]  # the source of the words and its threshold, if not those of training
    scales: Sequence[float]
    flip: bool
    attention: bool
    reading: dict[str, float]  # score and overlap of mask2former's segments; {} for other decoders

    def of(self, path: str, words: list[str] | None) -> dict:
        """The entries of a line by which an existing result is recognised; {} without the image's file."""
        if not os.path.exists(path):
            return {}
        file = os.stat(path)
        made = {"checkpoint": self.checkpoint, "asked": words, "scales": self.scales, "flip": self.flip}
        return made | self.tagger | self.reading | {"bytes": file.st_size, "mtime_ns": file.st_mtime_ns}

    @property
    def owned(self) -> list[str]:
        """The endings of all files that belong to an image."""
        return [ending for ending in ENDINGS if ending != SEGMENTS or self.reading]

    @property
    def endings(self) -> list[str]:
        """Of the files of one image, the label map last: where it exists, all others do."""
        optional = [SEGMENTS] * bool(self.reading) + [".attention.jpg"] * self.attention
        return [".overlay.jpg", *optional, ".png"]


# ---- one image


@torch.no_grad()
def predict(
    tada: Tada, path: str, words: list[str] | None, *, settings: Settings
) -> tuple[dict, dict[str, Image.Image]]:
    """The entries of an image's line, and its results by their `endings`. Raises Unreadable."""
    config, device = tada.config, tada.unet.conv_in.weight.device
    image, size = read_image(path)
    small = fit(size, *config.box) if config.box else size
    x = model_input(image, small).to(device)  # (1, 3, h, w)
    original = x if settings.scales == [1.0] else model_input(image, size).to(device)  # as in eval.py
    how = {"window": config.crop, "stride": config.stride, "scales": settings.scales, "flip": settings.flip}
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        tags, seen = tada.resolve_tags(x, None if words is None else [words])
        if config.decoder == "mask2former":
            prediction = inference.segment(tada, x, tags, seen=seen, size=size, **settings.reading)
        else:
            seen = seen if original is x else None
            prediction = inference.predict(tada, original, tags, seen=seen, size=size, base=small, **how)
        maps = inference.attention_in_windows(tada, x, tags)[0] if settings.attention else None  # (T, h, w)
    labels = prediction.labels[0].byte().cpu().numpy()  # (H, W)

    tags = tags and tags[0]
    counts = Image.fromarray(labels).histogram()
    order = sorted((k for k in range(len(config.classes)) if counts[k]), key=lambda k: -counts[k])
    shares = {config.classes[k]: counts[k] / labels.size for k in order}
    record = {"size": [*size], "tags": tags, "shares": shares}
    palette = np.array(config.palette or [*map(distinct_colour, range(1, len(config.classes) + 1))], np.uint8)
    names, results = {"palette": palette, "classes": config.classes, "words": tags}, {}
    if config.decoder == "mask2former":
        ids, segments = prediction.panoptic[0]
        ids = ids.cpu().numpy()
        entries = [{"id": s.id, "class": config.classes[s.label], "score": s.score} for s in segments]
        record["segments"] = entries
        results[".overlay.jpg"] = segment_overlay(np.asarray(image), ids, segments, **names)
        results[SEGMENTS] = Image.fromarray(to_colours(ids))
    else:
        results[".overlay.jpg"] = overlay(np.asarray(image), labels, **names)
    if maps is not None:
        results[".attention.jpg"] = attention_mosaic(image, maps.cpu().numpy(), config.classes, words=tags)
    return record, results | {".png": Image.fromarray(labels)}


# ---- what is written


def read_list(out: Path) -> dict[str, dict]:
    """Label map -> its line, the last if there are several, of images that have any result."""
    file = out / LIST
    lines = file.read_bytes().splitlines(keepends=True) if file.is_file() else []
    records = {}
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            records[record["labels"]] = record | {"path": record["path"]}
        except (ValueError, KeyError, TypeError):
            if line.endswith(b"\n") or not b'{"path"'.startswith(line[:7]):  # else a crash truncated it
                raise TadaError(f"{file}, line {number}, is not of predict.py: give another --out") from None
    return {
        labels: record
        for labels, record in sorted(records.items())
        if any((out / f"{labels.removesuffix('.png')}{ending}").exists() for ending in ENDINGS)
    }


def tidy(out: Path) -> None:
    """Delete files that an interrupted process left half-written, and lines without a result."""
    try:
        for left in out.rglob(".tmp-*"):
            if re.fullmatch(rf"\.tmp-(\d+|{re.escape(LIST)})", left.name) and left.is_file():
                left.unlink()
        replace_text(out / LIST, "".join(json.dumps(record) + "\n" for record in read_list(out).values()))
    except OSError as error:
        raise TadaError(f"{out} cannot be written ({error.strerror}): give another --out") from None


def to_do(names: dict[str, str], words: dict, out: Path, settings: Settings) -> list[str]:
    """The images without such a result. Raises TadaError where a file belongs to another image or program."""
    records, todo = {name.removesuffix(".png"): x for name, x in read_list(out).items()}, []
    taken = {name.lower() for name in (*records, *names.values())}
    for path, name in names.items():
        record = records.get(name, {})
        if settings.reading and f"{name}{SEGMENTS}".removesuffix(".png").lower() in taken:
            raise TadaError(f"{out / name}{SEGMENTS} is another image's label map: give another --out")
        for file in [out / f"{name}{ending}" for ending in settings.owned]:
            if not record and file.exists():
                raise TadaError(f"{file} exists and {LIST} has no line for it: give another --out")
        made, files = settings.of(path, words[path]), [out / f"{name}{x}" for x in settings.endings]
        if not made or not made.items() <= record.items() or not all(file.is_file() for file in files):
            todo.append(path)
    return todo


def write(out: Path, name: str, record: dict, results: dict[str, Image.Image], rank: int) -> None:
    """Append the line, then write the files, each whole or not at all, the label map last. Raises OSError."""
    file = out / LIST
    try:
        with file.open("a") as f:
            fcntl.flock(f, fcntl.LOCK_EX)  # of the ranks one at a time
            f.write(json.dumps(record) + "\n")
        for ending, image in results.items():
            file = out / f"{name}{ending}"
            new = file.with_name(f".tmp-{rank}")
            file.parent.mkdir(parents=True, exist_ok=True)
            image.save(new, "PNG" if ending.endswith(".png") else "JPEG", quality=92)
            os.replace(new, file)
    except OSError as error:
        raise OSError(f"{file} cannot be written ({error.strerror or error}): earlier results stay") from None


# ---- the command


def main(argv: Sequence[str] | None = None) -> int:
    sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show is escaped
    options, ranks = parse(argv), init_distributed()
    work = partial(run, ranks=ranks, **vars(options))
    return run_command("predict.py", work, "interrupted: results stay, re-run the command to continue")


def run(
    checkpoint: str,
    inputs: Sequence[str],
    *,
    ranks: Ranks,
    out: str,
    weights: str | None,
    tags: str | None,
    words: str | None,
    tag_threshold: float | None,
    scales: Sequence[float],
    flip: bool,
    attention: bool,
    **segments: Any,
) -> int:
    """Cheapest checks first; predict this rank's share; return 1 if some image could not be read."""
    file = find_model(Path(checkpoint)).resolve()  # `best` may point elsewhere soon
    config = read_config(read_about(file)["config"], file)
    if attention and config.condition in ("none", "caption", "implicit"):
        raise TadaError(f"--attention: condition {config.condition} has no words to attend to; leave it out")
    reading = segment_options(segments, config.decoder, {"flip": flip, "scales": scales != [1.0]})
    trained = {"condition": config.condition, "trained": (config.tags, config.tag_threshold)}
    source, given, threshold = choose_source(tags, words, tag_threshold, **trained)
    own = given is not None or (source, threshold) == (config.tags, config.tag_threshold)
    tagger = {} if own else {"tagger": source, "tag_threshold": threshold}
    settings = Settings(digest(file), tagger, scales, flip, attention, reading)
    folder = Path(out).absolute()
    taken = {labels.removesuffix(".png").lower(): x["path"] for labels, x in read_list(folder).items()}
    names = find_images(inputs, folder, taken)
    words_by_path = choose_words(source, given, config.condition, [*names], threshold)
    with lock(folder, "--out") if ranks.is_main else nullcontext():
        if ranks.is_main:
            tidy(folder)
        ranks.barrier()
        todo = to_do(names, words_by_path, folder, settings)
        ranks.barrier()  # only now may files appear
        tada = load_model(file, weights, ranks.device, source, threshold) if todo else None
        if ranks.is_main:
            print(kernels.describe(ranks.device), f"tags: {source}; of training: {config.tags}", sep="\n")
            if config.weights == "random":
                print("random weights: without a prior")
        failed, mine = 0, todo[ranks.rank :: ranks.world]
        with tqdm(mine, "predicting", disable=None if ranks.is_main else True) as bar:
            for path in bar:
                made = {"path": path, "labels": f"{names[path]}.png"} | settings.of(path, words_by_path[path])
                try:
                    record, results = predict(tada, path, words_by_path[path], settings=settings)
                except Unreadable as error:
                    failed += 1
                    tqdm.write(f"skipped: {error}", file=sys.stderr)
                    continue
                for ending in settings.owned:  # also those of an earlier result that this one lacks
                    (folder / f"{names[path]}{ending}").unlink(missing_ok=True)
                write(folder, names[path], made | record, results=results, rank=ranks.rank)
                if ranks.is_main and bar.disable:
                    most = [f"{name} {percent(share)}" for name, share in [*record["shares"].items()][:3]]
                    print(f"{folder / made['labels']}: {', '.join(most)}")
        failed = int(ranks.all_reduce(torch.tensor(failed, device=ranks.device)))
        if ranks.is_main:
            tidy(folder)
            done = len(todo) - failed
            print(f"{folder}: {done} predicted, {len(names) - len(todo)} skipped, {failed} unreadable")
    cleanup()
    return 1 if failed else 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; argparse ends the command with code 2 where a flag is wrong."""
    parser = argparse.ArgumentParser(
        prog="predict.py",
        description="Predict: for x.jpg the label map x.png, x.overlay.jpg, and a line of predictions.jsonl.",
    )
    parser.add_argument("checkpoint", help="a run folder (its best step), a step folder, model.safetensors")
    add = parser.add_argument_group("the images").add_argument
    add("inputs", nargs="+", metavar="INPUT", help="an image, a folder or a quoted glob")
    add("--out", metavar="DIR", default="predictions", help="of the results (default: predictions)")
    add = parser.add_argument_group("the model").add_argument
    add("--weights", metavar="DIR", help="its frozen files (default: their folder in training)")
    add_word_flags(add)
    sizes = "sizes, as multiples of the model's own, whose predictions are averaged (default: 1)"
    add("--scales", type=scale, nargs="+", metavar="X", default=[1.0], help=sizes)
    add("--flip", action="store_true", help="average with the mirrored image's prediction")
    add("--attention", action="store_true", help="draw the attention to each word")
    add_segment_flags(parser)
    return parser.parse_intermixed_args(argv)  # images may follow flags too


if __name__ == "__main__":
    sys.exit(main())
