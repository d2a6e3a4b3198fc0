"""Tag images with RAM or CLIP, convert captions, or judge a file of tags against the labels.

    python tag.py --by ram --dataset ade20k --out tags.jsonl        # every image of training and validation
    python tag.py --by clip --names "sea, boat, sky" photos --out tags.jsonl
    python tag.py --by tadp captions.json --dataset ade20k --out blip.jsonl   # TADP's captions by BLIP-2
    python tag.py --judge tags.jsonl --dataset ade20k               # precision, recall, mAP
    torchrun --nproc-per-node 8 tag.py --by ram photos --out tags.jsonl       # the processes share the images

The file has a JSON line per image, `{"image": path, "tags": [["sea", 0.93], ...], "by": tagger}`, written as
soon as it is tagged: after an interruption the same command resumes. The path is relative to --data, or
absolute for photos of your own. `train.py`, `eval.py` and `predict.py` take the file as `--tags FILE.jsonl`.
"""

from errors import DataError, Parser, TadaError, Unreadable, end_quietly, run_command

if __name__ == "__main__":
    end_quietly()  # at Ctrl-C during the imports below

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

from PIL import Image
from torch import Tensor
from tqdm import tqdm

from assemble import Tagger, clip_tagger, load_clip, part_configs, ram_tagger
from data import LAYOUTS, Dataset, default_data, open_dataset
from images.read import find_images, read_image
from loading.augment import to_tensor
from loading.stream import EvaluationStream, load_in_order
from loading.tags import LONGEST_CAPTION, LONGEST_TAG, checked_text, read_tags, split_words, unique_words
from metrics.tagging import measure_tags
from ram import RAMConfig
from run.files import entry, read_bytes, replace_text
from run.folder import lock, say
from run.options import DATASET_HINT
from run.ranks import DEVICE, DEVICE_HINTS, Ranks, cleanup, init_distributed
from run.tagging import read_tag_lines, tag_images, tagger_key

BATCH = 8  # images at once


class Photos:
    """Image files, squashed to the tagger's square: item i is a key, and the image or its file's error."""

    def __init__(self, files: Sequence[tuple[str, Path]], side: int, filter: Image.Resampling):
        self.files, self.side, self.filter = files, side, filter

    def __getitem__(self, i: int) -> tuple[str, Tensor | DataError]:
        key, file = self.files[i]
        try:
            image, _ = read_image(file, self.side, 1 << 20)
        except Unreadable as error:
            return key, error
        return key, to_tensor(image.resize((self.side, self.side), self.filter))


# ---- tags of images


def tag(options: argparse.Namespace, ranks: Ranks) -> int:
    """Tag all images of the command; return 1 if some file could not be read."""
    sets = open_sets(options) if options.dataset else []
    files = {path: Path(dataset.root, path) for dataset in sets for path in dataset.paths}
    if not sets:
        files = {path: Path(path) for path in find_images(options.inputs, options.out, {})}
    if ranks.is_main:
        say(f"{options.out}: tags of {len(files):,} images by {options.by}")
    tagger, side, filter, by = make_tagger(options, sets, ranks)

    def images(todo: list[str]) -> Iterator[list[tuple[str, Tensor | DataError]]]:
        photos = Photos([(path, files[path]) for path in todo], side, filter)
        groups = (range(i, min(i + BATCH, len(todo))) for i in range(0, len(todo), BATCH))
        yield from load_in_order(photos, groups, list, options.workers, ranks.device.type)

    hidden = f".{options.out.name}.lock"
    with lock(options.out.parent, "--out", hidden) if ranks.is_main else nullcontext():
        broken = tag_images(options.out, [*files], images, tagger, ranks, by)
    if ranks.is_main:
        for sentence in broken:
            print(f"skipped: {sentence}", file=sys.stderr)
        say(f"{options.out}: {len(files) - len(broken):,} of {len(files):,} images tagged by {by}")
    return 1 if broken else 0


def make_tagger(
    options: argparse.Namespace, sets: Sequence[Dataset], ranks: Ranks
) -> tuple[Tagger, int, Image.Resampling, str]:
    """The tagger, the side and filter of its square, and its name for the lines of the file."""
    asked = "" if options.threshold is None else f" at {options.threshold:g}"
    if options.by == "ram":
        tagger = ram_tagger(options.weights, ranks.device, options.threshold)
        by = f"ram {tagger_key('ram', options.weights)}{asked}"
        return tagger, RAMConfig.image_size, Image.Resampling.BILINEAR, by
    names = read_names(options.names) if options.names else sets[0].prompts if sets else []
    if not names:
        raise TadaError('--by clip needs the names it chooses from: give --names "sea, boat" or --dataset')
    clip, tokenizer = load_clip(part_configs(options.model, options.weights)[2], options.weights)
    tagger = clip_tagger(str(options.weights), clip.to(ranks.device), tokenizer, names, options.threshold)
    by = f"clip of {len(names)} names {tagger_key('clip', options.weights, names)}{asked}"
    return tagger, clip.config.image_size, Image.Resampling.BICUBIC, by


def read_names(given: str) -> list[str]:
    """The names in a file, one a line, or between the commas of `given`."""
    if not os.path.exists(given) or os.path.isdir(given):
        return split_words(given, "tagging", "--names")
    try:
        lines = read_bytes(given).decode("utf-8").splitlines()
        return unique_words(checked_text(line, LONGEST_TAG) for line in lines if line.strip())
    except (OSError, ValueError) as error:
        raise DataError(f"--names {given} is not a list of names, one a line ({error})") from None


def open_sets(options: argparse.Namespace) -> list[Dataset]:
    """The splits of --dataset, which must lie on the disk."""
    if options.dataset == "scenes":
        raise TadaError("--dataset scenes is drawn, not read: `python -m images.scenes` writes its images")
    root = options.data or default_data(options.dataset)
    if not root:
        raise TadaError(f"--dataset {options.dataset}: give its folder with --data")
    return [open_dataset(options.dataset, root, split) for split in options.split]


# ---- captions of TADP


def convert_captions(options: argparse.Namespace) -> None:
    """Write the captions of a file of TADP (captions/*.json) as lines for `--condition caption`.

    It has `{"file below the image folder": {"captions": ["..."]}}`; the first caption counts.
    """
    (file,) = options.inputs
    try:
        entries = entry({"content": json.loads(read_bytes(file))}, "content", dict)
        lists = {name: entry(x, "captions", list) for name, x in entries.items()}
        captions = {name: checked_text(x[0] if x else "", LONGEST_CAPTION) for name, x in lists.items()}
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file} cannot be read as captions of TADP ({error})") from None
    paths = [path for dataset in open_sets(options) for path in dataset.paths]
    lines = []
    for path in paths:
        parts = path.split("/")
        tails = ("/".join(parts[i:]) for i in range(len(parts)))
        name = next((tail for tail in tails if tail in captions), None)
        if name:
            line = {"image": path, "tags": [], "caption": captions[name], "by": "tadp"}
            lines.append(json.dumps(line) + "\n")
    if not lines:
        raise DataError(f"{file} has none of the {len(paths)} images, such as {paths[0]}")
    read_tag_lines(options.out, "tadp")  # refuses to replace a file of another tagger
    replace_text(options.out, "".join(lines))
    print(f"{options.out}: captions of {len(lines):,} of {len(paths):,} images")


# ---- the quality of tags


def judge_file(options: argparse.Namespace) -> None:
    """Print how well a file of tags names the classes of each image."""
    sets = open_sets(options)
    every = [path for dataset in sets for path in dataset.paths]
    tags = read_tags(options.judge, sets[0].root, every).tags
    for dataset in sets:
        tagged = [i for i, path in enumerate(dataset.paths) if path in tags]
        items = EvaluationStream(dataset, 1, 1, options.workers).items(tagged)
        present = {item.path: item.present for item in tqdm(items, "labels", len(tagged), disable=None)}
        print(f"{options.judge}, {dataset.name} {dataset.split}: {len(tagged):,} of {len(dataset):,} images")
        if tagged:
            print(measure_tags(tags, present, dataset.prompts))


# ---- the command


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)

    def work() -> int | None:
        if options.judge or options.by == "tadp":
            alone = judge_file if options.judge else convert_captions
            return alone(options) if os.environ.get("RANK", "0") == "0" else 0  # the work of one process
        code = tag(options, init_distributed(options.device))
        cleanup()
        return code

    return run_command("tag.py", work, "interrupted: tagged images are in the file, the same command resumes")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; argparse ends the command with code 2 where a flag is wrong."""
    about = "Tag images with RAM or CLIP; convert captions; judge a file of tags."
    parser = Parser("tag.py", DEVICE_HINTS | DATASET_HINT, description=about)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--by", choices=["ram", "clip", "tadp"], help="the tagger, or TADP's file of captions")
    what.add_argument("--judge", metavar="FILE.jsonl", help="compare its tags with the labels of --dataset")
    add = parser.add_argument
    add("inputs", nargs="*", metavar="INPUT", help="an image, a folder, a quoted glob; of tadp its JSON file")
    add("--dataset", choices=[*LAYOUTS], help="tag the images of a data set instead")
    add("--data", metavar="DIR", help="its folder (default: data/<official name>)")
    splits = ["train", "val"]
    add("--split", nargs="+", choices=splits, default=splits, help="of the data set (default: train val)")
    add("--out", type=Path, metavar="FILE.jsonl", help="the file of tags; images that it has are skipped")
    least = "the lowest score (default: RAM's per tag; CLIP's 1 / names, and its best name always is a tag)"
    add("--threshold", type=float, metavar="X", help=least)
    add("--names", metavar="WORDS", help="CLIP's choice, or its file (default: the classes of --dataset)")
    add("--model", choices=["sd15", "tiny"], default="sd15", help="whose CLIP (default: sd15)")
    folder = "its folder, RAM's lies next to it (default: weights/<model>)"
    add("--weights", type=Path, metavar="DIR", help=folder)
    add("--device", **DEVICE)
    add("--workers", type=int, default=2, metavar="N", help="processes that load images (default: 2)")
    options = parser.parse_args(argv)
    options.weights = options.weights or Path("weights", options.model)
    if options.judge and not options.dataset:
        parser.error("--judge needs the labels: give --dataset")
    if options.by and not options.out:
        parser.error("--out is missing: give the file of tags, as --out tags.jsonl")
    if options.by == "tadp" and (len(options.inputs) != 1 or not options.dataset):
        parser.error("--by tadp needs one file of captions and the --dataset of its images")
    if options.by in ("ram", "clip") and bool(options.inputs) == bool(options.dataset):
        parser.error("give either images or --dataset")
    if options.names and options.by != "clip":
        parser.error("--names are what --by clip chooses from: leave them out")
    if options.out and options.out.is_dir():
        parser.error(f"--out {options.out} is a folder: give a file, as --out {options.out}/tags.jsonl")
    if options.threshold is not None and not 0 <= options.threshold <= 1:
        parser.error(f"--threshold {options.threshold:g}: give a score in 0..1")
    return options


if __name__ == "__main__":
    sys.exit(main())
