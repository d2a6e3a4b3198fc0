"""Predict: what a trained model sees in a picture, a folder or a glob, and how words steer it.

    python predict.py runs/NAME photo.jpg  # predictions/photo.png, predictions/photo.overlay.jpg
    python predict.py runs/NAME photos --tags "sea, boat" --attention --out seen
    torchrun --nproc-per-node 8 predict.py runs/NAME "photos/**/*.jpg"  # the processes share the pictures

For `x.jpg` it writes into --out:

    x.png            the class of every pixel: one channel, the picture's size, upright as EXIF says
    x.overlay.jpg    the picture under its classes' colours, a legend, the words that steered the model
    x.attention.jpg  with --attention: where each word is attended to
    x.segments.png   of mask2former: the segment of every pixel, its id as R + 256 G + 65536 B, 0 = none; the
        overlay then has a line around each segment, and its name
    a line of predictions.jsonl: "path" of the picture, "labels" (x.png), "size" [height, width], "tags" (null
        if the model reads none), "shares" (of each class that is seen, largest first), of mask2former
        "segments" (id, class and score of each), what made it, and "bytes" and "mtime_ns" of the picture's
        file as it was then

Folders are mirrored, and so is what a glob's wildcards match. Where two results would share a name the later
picture keeps its suffix (1.jpg -> 1.png, 1.png -> 1.png.png); inputs that share names (a/1.jpg b/1.jpg) are
mirrored from the folder that holds them all. What another picture or program wrote is never overwritten. What
the same model did with the same words, scales, flip, score and overlap is skipped, if the picture's file has
the same size and time.

Top to bottom: which pictures, under which names, with which words; one picture; what is written; the command.
"""

import argparse
import glob
import json
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import inference
import kernels
from errors import DataError, DataWarning, TadaError, Unreadable
from eval import add_segment_flags, scale, segment_options
from images.draw import TILE, heat, mosaic, overlay, percent, segment_overlay
from images.panoptic import to_colours
from images.read import PICTURES, distinct_colour, fit, read_image, walk
from inference import windows
from loading.augment import normalise, resize, to_tensor
from loading.tags import LONGEST_CAPTION, LONGEST_TAG, MOST_TAGS, read_tags
from loading.tags import text as clean
from model import Size, Tada, TadaConfig
from run.checkpoint import find_model, load_model, read_about, read_config
from run.folder import lock
from run.ranks import Ranks, cleanup, init_distributed
from weights.words import digest

LIST = "predictions.jsonl"
SEGMENTS = ".segments.png"  # how the map of ids ends
ENDINGS = (".png", ".overlay.jpg", ".attention.jpg", SEGMENTS)  # of all results
NAMES, WORDS = 10, 24  # the most class names, or words of a picture, whose attention is drawn


class Job(NamedTuple):
    """One picture: where it is, its results' name below --out, the words to steer with (None: not given)."""

    path: str
    name: str
    words: list[str] | None


# ---- which pictures, under which names


def find(inputs: Iterable[str], out: Path) -> dict[str, str]:
    """Absolute path of each picture -> the folder that it is mirrored from.

    A file is taken whatever its suffix; of folders and globs the pictures (`PICTURES`), hidden ones apart.
    What lies in `out` is never taken.
    """
    found: dict[str, str] = {}
    for asked in inputs:
        wild = re.search(r"[*?[]", asked)
        if os.path.exists(asked):
            base, roots = asked if os.path.isdir(asked) else os.path.dirname(asked), [asked]
        elif wild:
            base, roots = os.path.dirname(asked[: wild.start()]), sorted(glob.glob(asked, recursive=True))
            roots = [root for root in roots if os.path.isdir(root) or is_picture(root)]
        else:
            raise TadaError(f"{asked} does not exist: give a picture, a folder or a quoted glob")
        new = [path for root in roots for path in below(root, out)]
        if not new:
            raise TadaError(
                f"{asked} has no picture ({' '.join(PICTURES)}) outside of --out {out}: change one of them"
            )
        for path in new:
            found.setdefault(os.path.abspath(path), os.path.abspath(base))
    return found


def below(root: str, out: Path) -> Iterator[str]:
    """The file `root`, or the pictures below the folder `root`."""
    out = Path(os.path.realpath(out))
    if not os.path.isdir(root):
        if not Path(os.path.realpath(root)).is_relative_to(out):
            yield root
        return
    for where, folders, names in walk(root):
        if Path(os.path.realpath(where)).is_relative_to(out):
            folders.clear()
        else:
            yield from (os.path.join(where, name) for name in names if is_picture(name))


def is_picture(path: str) -> bool:
    return path.lower().endswith(PICTURES) and not os.path.basename(path).startswith(".")


def name_results(found: dict[str, str], taken: dict[str, str]) -> dict[str, str]:
    """Path of each picture -> the name of its results below --out, without ".png".

    taken: such names, in lower case -> the pictures that have them already.
    """
    first: dict[str, str] = {}
    stems = ((os.path.splitext(os.path.relpath(path, base))[0].lower(), base) for path, base in found.items())
    apart = all(first.setdefault(stem, base) == base for stem, base in stems)
    shared = "" if apart else os.path.commonpath(found.values())
    names, taken = {}, dict(taken)
    for path, base in found.items():
        whole = os.path.relpath(path, shared or base)
        stem = os.path.splitext(whole)[0]
        free = [name for name in (stem, whole) if taken.get(name.lower(), path) == path]
        if not free:
            raise TadaError(f"{path} and {taken[stem.lower()]} would share {stem}.png: give another --out")
        names[path] = free[0]
        taken[free[0].lower()] = path
    return names


# ---- with which words


def read_words(config: TadaConfig, given: str | None, paths: Iterable[str]) -> dict[str, list[str] | None]:
    """Path of each picture -> its words, from --tags or the file of training; None where neither is read."""
    if given is not None:
        if config.tags == "classes":
            raise TadaError(
                f"--tags {given!r}: this model reads no words of a picture "
                f"(condition {config.condition}, tags {config.tags}); leave --tags out"
            )
        return dict.fromkeys(paths, parse_words(config, given))
    if config.tags in ("classes", "clip"):
        return dict.fromkeys(paths)
    if config.tags == "oracle":
        raise TadaError(
            "this model was told what is in each picture (tags oracle): say it, as in --tags 'sea, boat'"
        )
    return look_up(config, list(paths))


def parse_words(config: TadaConfig, given: str) -> list[str]:
    """The words between the commas, each once; of a model that reads captions, one sentence."""
    try:
        if config.condition == "caption":
            return [clean(given, LONGEST_CAPTION)]
        words = [clean(word, LONGEST_TAG) for word in given.split(",") if word.strip()]
        words = list(dict.fromkeys(words))
    except ValueError as error:
        raise TadaError(f"--tags: {error}") from None
    if not 1 <= len(words) <= MOST_TAGS:
        raise TadaError(f"--tags {given[:80]!r} has {len(words)} words: give 1 to {MOST_TAGS}")
    return words


def look_up(config: TadaConfig, paths: list[str]) -> dict[str, list[str]]:
    """The words of each picture in the tag file of training, found by as much of its path as the file has."""
    cure = "say what is in the pictures with --tags"
    ends = {path: [path[i + 1 :] for i in range(len(path)) if path[i] == os.sep] for path in paths}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DataWarning)  # it has lines for many other pictures
            tags, captions, _ = read_tags(config.tags, "/", {end for some in ends.values() for end in some})
    except DataError as error:
        raise TadaError(f"the words of training are not there ({error}): {cure}") from None
    known = {path: [caption] for path, caption in captions.items()}
    if config.condition != "caption":
        known = {path: [tag for tag, _ in pairs] for path, pairs in tags.items()}
    words = {path: next((known[end] for end in ends[path] if end in known), None) for path in paths}
    lacking = [path for path in paths if words[path] is None]
    if lacking:
        raise TadaError(
            f"{config.tags} lacks {len(lacking)} of {len(paths)} pictures, such as {lacking[0]}: {cure}"
        )
    return words


# ---- one picture


@torch.no_grad()
def predict(tada: Tada, job: Job, options: argparse.Namespace, folder: "Folder") -> dict:
    """Read the picture, write its results; its line of predictions.jsonl. Raises Unreadable."""
    config, device = tada.config, folder.ranks.device
    before = on_disk(job.path)
    picture, size = read_image(job.path)
    small = fit(size, *config.box) if config.box else size
    image = model_input(picture, small).to(device)  # (1, 3, h, w)
    # As eval.py does: for other scales than 1 every size is made from the picture as it is.
    seen = image if options.scales == [1.0] else model_input(picture, size).to(device)
    how = {"window": config.crop, "stride": config.stride, "scales": options.scales, "flip": options.flip}
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        tags = tada.resolve_tags(image, None if job.words is None else [job.words])
        if config.decoder == "mask2former":
            found = inference.segment(tada, image, tags, size=size, **folder.reading)
        else:
            found = inference.predict(tada, seen, tags, size=size, base=small, **how)
        labels = found.labels[0].byte().cpu().numpy()  # (H, W)
        maps = attention(tada, image, tags)[0].cpu().numpy() if options.attention else None  # (T, h, w)

    words = tags and tags[0]
    counts = Image.fromarray(labels).histogram()
    order = sorted((k for k in range(len(config.classes)) if counts[k]), key=lambda k: -counts[k])
    shares = {config.classes[k]: counts[k] / labels.size for k in order}
    record = {"path": job.path, "labels": f"{job.name}.png", "size": [*size], "tags": words, "shares": shares}

    colours = config.palette or [distinct_colour(k + 1) for k in range(len(config.classes))]
    colours, ids = np.array(colours, np.uint8), None
    if config.decoder == "mask2former":
        ids, segments = found.panoptic[0]
        ids = ids.cpu().numpy()
        drawn = segment_overlay(np.asarray(picture), ids, segments, colours, config.classes, words)
        record["segments"] = [
            {"id": s.id, "class": config.classes[s.label], "score": s.score} for s in segments
        ]
    else:
        drawn = overlay(np.asarray(picture), labels, colours, config.classes, words)
    # The label map goes first and comes last: where there is one, all that belongs to it is there.
    # The line comes before any file: it says whose they are, also after a crash.
    (folder.out / record["labels"]).unlink(missing_ok=True)
    folder.append(record | folder.settings(job) | before)
    folder.save(drawn, f"{job.name}.overlay.jpg")
    if ids is not None:
        folder.save(Image.fromarray(to_colours(ids)), f"{job.name}{SEGMENTS}")
    if maps is not None:
        folder.save(draw_attention(picture, maps, config, words), f"{job.name}.attention.jpg")
    folder.save(Image.fromarray(labels), record["labels"])
    return record


def on_disk(path: str) -> dict[str, int]:
    """Size and time of a picture's file, by which a change is seen; {} where there is none."""
    try:
        about = os.stat(path)
    except OSError:
        return {}
    return {"bytes": about.st_size, "mtime_ns": about.st_mtime_ns}


def model_input(picture: Image.Image, size: Size) -> Tensor:
    """The picture at `size` (H, W) as the model takes it, `(1, 3, H, W)` in [-1, 1]."""
    return normalise(to_tensor(resize(picture, picture.size[::-1], size, (0, 0, *size)))[None])


def attention(tada: Tada, image: Tensor, tags: list[list[str]] | None) -> Tensor:
    """`Tada.attention` in the windows that the prediction was made in, averaged where they overlap."""
    total, count = None, image.new_zeros(image.shape[2:])
    for top, left, bottom, right in windows(image.shape[2:], tada.config.crop, tada.config.stride):
        part = inference.attention(tada, image[..., top:bottom, left:right], tags)
        if total is None:
            total = part.new_zeros(*part.shape[:2], *image.shape[2:])  # (1, T, h, w)
        total[..., top:bottom, left:right] += part
        count[top:bottom, left:right] += 1
    return total.div_(count)


def draw_attention(
    picture: Image.Image, maps: np.ndarray, config: TadaConfig, words: list[str] | None
) -> Image.Image:
    """A tile for each word, with its share of all attention; of many words, those with the most."""
    names = config.classes if words is None else words or ["(no word)"]
    strength = maps.mean(axis=(1, 2))
    order = np.argsort(-strength, kind="stable")[: NAMES if words is None else WORDS]
    picture = picture.copy()
    picture.thumbnail((TILE, TILE))
    tiles = [heat(np.asarray(picture), maps[i], f"{names[i]}  {percent(strength[i])}") for i in order]
    return mosaic(tiles, 3 if picture.width > picture.height else 4)


# ---- what is written


class Folder:
    """--out: every file appears whole, under its name, or not at all."""

    def __init__(
        self,
        out: Path,
        options: argparse.Namespace,
        checkpoint: str,
        ranks: Ranks,
        reading: dict[str, float],
    ):
        self.out, self.options, self.checkpoint, self.ranks = out, options, checkpoint, ranks
        self.reading = reading  # how segments are read; {}: no map of ids belongs to a picture
        self.lock = None
        self.list = out / (LIST if ranks.world == 1 else f".{ranks.rank}.{LIST}")  # each process has its own

    def release(self) -> None:
        """Let others have the folder."""
        if self.lock is not None:
            self.lock.close()

    def claim(self) -> None:
        """Make the folder ours until `release`; tidy up after a process that was interrupted."""
        self.lock = lock(self.out, "--out")
        try:
            for left in self.out.rglob(".tmp-*"):
                if re.fullmatch(rf"\.tmp-(\d+|{re.escape(LIST)})", left.name) and left.is_file():
                    left.unlink()
            self.merge()
        except OSError as error:
            raise TadaError(f"{self.out} cannot be written ({error.strerror}): give another --out") from None

    def merge(self) -> None:
        """One list out of those of all processes: a line for every picture of which some result is there."""
        records, parts = {}, sorted(self.out.glob(f".*.{LIST}"))
        for file in (self.out / LIST, *parts):
            records |= read_list(file)
        lines = [json.dumps(records[name]) for name in sorted(records) if self.is_there(name)]
        new = self.out / f".tmp-{LIST}"
        new.write_text("".join(f"{line}\n" for line in lines))
        os.replace(new, self.out / LIST)
        for file in parts:
            file.unlink()

    def is_there(self, labels: str) -> bool:
        """Is the label map there, or another result of its picture?"""
        name = labels.removesuffix(".png")
        return any(os.path.exists(self.out / f"{name}{ending}") for ending in ENDINGS)

    def plan(self, found: dict[str, str], words: dict[str, list[str] | None]) -> tuple[list[Job], list[Job]]:
        """All jobs, and those that are not done. Raises TadaError where a file is somebody else's."""
        records = {name.removesuffix(".png"): x for name, x in read_list(self.out / LIST).items()}
        names = name_results(found, {name.lower(): record["path"] for name, record in records.items()})
        jobs = [Job(path, name, words[path]) for path, name in names.items()]
        for job in jobs:
            there = [file for file in self.files(job) if job.name not in records and file.exists()]
            if there:
                raise TadaError(f"{there[0]} is there and {LIST} has no line for it: give another --out")
            ids = f"{job.name}{SEGMENTS}"
            if self.reading and ids.removesuffix(".png") in {*records, *names.values()}:
                raise TadaError(f"{self.out / ids} is another picture's label map: give another --out")
        return jobs, [job for job in jobs if not self.is_done(job, records.get(job.name))]

    def append(self, record: dict) -> None:
        with self.list.open("a") as f:
            f.write(json.dumps(record) + "\n")

    def save(self, image: Image.Image, name: str) -> None:
        """JPEG or PNG, as `name` ends. Raises OSError."""
        file = self.out / name
        new = file.with_name(f".tmp-{self.ranks.rank}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            image.save(new, "PNG" if name.endswith(".png") else "JPEG", quality=92)
            os.replace(new, file)
        except OSError as error:
            raise OSError(
                f"{file} cannot be written ({error.strerror or error}): what is done stays"
            ) from None

    def settings(self, job: Job) -> dict:
        """What a result depends on, beside its picture."""
        options = self.options
        asked = {"asked": job.words, "scales": options.scales, "flip": options.flip}
        return {"checkpoint": self.checkpoint, **asked, **self.reading}

    def is_done(self, job: Job, record: dict | None) -> bool:
        """Was all that is asked for made of this picture, and not changed since?"""
        now = on_disk(job.path)
        if not record or not now or not (self.settings(job) | now).items() <= record.items():
            return False
        return all(file.is_file() for file in self.files(job))

    def files(self, job: Job) -> list[Path]:
        """All that is asked for of this picture."""
        endings = [".png", ".overlay.jpg"] + [".attention.jpg"] * self.options.attention
        return [self.out / f"{job.name}{ending}" for ending in endings + [SEGMENTS] * bool(self.reading)]


def read_list(file: Path) -> dict[str, dict]:
    """Label map -> its line, the last if there are several. A last line that a crash cut off is left out."""
    lines = file.read_bytes().splitlines(keepends=True) if file.is_file() else []
    records = {}
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            records[record["labels"]] = record | {"path": record["path"]}
        except (ValueError, KeyError, TypeError):
            if line.endswith(b"\n"):
                raise TadaError(f"{file}, line {number}, is not of predict.py: give another --out") from None
    return records


# ---- the command line


def main(argv: Sequence[str] | None = None) -> int:
    sys.stdout.reconfigure(errors="backslashreplace")  # a name that it cannot show stops nothing
    options = parse(argv)
    ranks = init_distributed()
    try:
        code = run(options, ranks)
    except KeyboardInterrupt:
        if ranks.is_main:
            print("stopped: what was written stays, the same command goes on", file=sys.stderr)
        return 130
    except (TadaError, OSError) as error:
        if ranks.is_main or isinstance(error, OSError):  # the others are the same in all processes
            print(f"predict.py: {error}", file=sys.stderr)
        return 2
    cleanup()
    return code


def run(options: argparse.Namespace, ranks: Ranks) -> int:
    """Plan, what can be refused first; predict this process's share; 1 if some picture could not be read."""
    file = find_model(Path(options.checkpoint)).resolve()  # `best` may lead elsewhere soon
    config = read_config(read_about(file)["config"], file)
    if options.attention and config.condition in ("none", "caption", "implicit"):
        raise TadaError(
            f"--attention: a model of condition {config.condition} has no words to attend to; leave it out"
        )
    if config.decoder == "mask2former" and (options.flip or options.scales != [1.0]):
        name = "flip" if options.flip else "scales"
        raise TadaError(f"--{name}: mask2former reads a picture whole, once; leave it out")
    reading = segment_options(options, config.decoder)
    out = Path(options.out).absolute()
    found = find(options.inputs, out)
    words = read_words(config, options.tags, found)

    folder = Folder(out, options, digest(file), ranks, reading)
    try:
        if ranks.is_main:
            folder.claim()
        ranks.barrier()
        return predict_all(folder, found, words, config, file)
    finally:
        folder.release()


def predict_all(
    folder: Folder,
    found: dict[str, str],
    words: dict[str, list[str] | None],
    config: TadaConfig,
    file: Path,
) -> int:
    """This process's share of the pictures that are not done; 1 if some picture could not be read."""
    options, ranks, out = folder.options, folder.ranks, folder.out
    jobs, todo = folder.plan(found, words)
    ranks.barrier()  # only now may files appear
    if todo:
        tada = load_model(file, options.weights, ranks.device)
        if ranks.is_main:
            print(kernels.describe(ranks.device))
    if ranks.is_main and config.weights == "random":
        print("random weights: this model knows nothing but what it was trained on")

    mine, failed = todo[ranks.rank :: ranks.world], 0
    with tqdm(mine, "predicting", disable=None if ranks.is_main else True) as bar:
        for job in bar:
            try:
                record = predict(tada, job, options, folder)
            except Unreadable as error:
                failed += 1
                tqdm.write(f"skipped: {error}", file=sys.stderr)
                continue
            if ranks.is_main and bar.disable:
                most = [f"{name} {percent(share)}" for name, share in [*record["shares"].items()][:3]]
                print(f"{out / record['labels']}: {', '.join(most)}")
    failed = int(ranks.all_reduce(torch.tensor(failed, device=ranks.device)))  # and now all have written all
    if ranks.is_main:
        folder.merge()
        done = len(todo) - failed
        print(f"{out}: {done} predicted, {len(jobs) - len(todo)} done before, {failed} unreadable")
    return 1 if failed else 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; argparse ends the command with code 2 where a flag is wrong."""
    parser = argparse.ArgumentParser(
        prog="predict.py",
        description="Predict: for x.jpg the label map x.png, x.overlay.jpg, and a line of predictions.jsonl.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "checkpoint", help="a run folder (its best step), a step folder or a model.safetensors"
    )
    pictures = parser.add_argument_group("the pictures")
    pictures.add_argument("inputs", nargs="+", metavar="INPUT", help="a picture, a folder or a quoted glob")
    pictures.add_argument("--out", metavar="DIR", default="predictions", help="where the results go")
    model = parser.add_argument_group("the model")
    weights = "its frozen files (default: where training had them)"
    model.add_argument("--weights", metavar="DIR", default=argparse.SUPPRESS, help=weights)
    tags = "what is in the pictures, 'sea, boat', or their caption (default: as in training)"
    model.add_argument("--tags", metavar="WORDS", default=argparse.SUPPRESS, help=tags)
    scales = "sizes, as multiples of the model's own, whose predictions are averaged"
    model.add_argument("--scales", type=scale, nargs="+", metavar="X", default=[1.0], help=scales)
    model.add_argument("--flip", action="store_true", help="average with the mirrored picture's prediction")
    model.add_argument("--attention", action="store_true", help="draw where each word is attended to")
    add_segment_flags(parser)
    options = parser.parse_intermixed_args(argv)  # pictures may follow flags too
    options.weights, options.tags = getattr(options, "weights", None), getattr(options, "tags", None)
    return options


if __name__ == "__main__":
    sys.exit(main())
