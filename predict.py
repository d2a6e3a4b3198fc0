"""Predict: label maps and overlays of an image, a folder or a glob, and the effect of words on them.

    python predict.py runs/NAME photo.jpg  # predictions/photo.png, predictions/photo.overlay.jpg
    python predict.py runs/NAME photos --words "sea, boat" --attention --out seen
    torchrun --nproc-per-node 8 predict.py runs/NAME "photos/**/*.jpg"  # the processes share the images

For `x.jpg` it writes into --out:

    x.png            the class of every pixel, the image's size, upright by its EXIF tag: indices of a
                     palette (Pillow's mode P) of the classes' colours
    x.overlay.jpg    the image under its classes' colours (mask2former: and outlines), a legend, its words
    x.attention.jpg  with --attention: where the model attends to each word
    x.segments.png   mask2former: the segment of every pixel, its id as R + 256 G + 65536 B, 0 = none
    predictions.jsonl  per image "path", "labels" (x.png), "size" [height, width], "tags" (null: none),
        "shares" of its classes, mask2former's "segments", its settings, "bytes", "mtime_ns" of its file, and
        a "hash" of the line

Folders are mirrored below the folder that holds all inputs; where two results would share a name the later
image keeps its suffix (1.jpg -> 1.png, 1.png -> 1.png.png). Files of another image or program are never
overwritten: a line is written before the files that it lists, so files without a line belong to others. An
image is skipped if its line is whole and has the same model, settings, size and time, and its files exist.
"""

from errors import ModelError, Parser, TadaError, Unreadable, end_quietly, run_command

if __name__ == "__main__":
    end_quietly()  # at Ctrl-C during the imports below

import argparse
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import kernels
from eval import add_segment_flags, add_word_flags, groups, scale, segment_options
from images.draw import rounded
from images.panoptic import to_colours
from images.read import find_images, read_image
from loading.stream import in_order
from loading.tags import checked_words, choose_source, choose_words
from model import Size, Tada
from run.checkpoint import find_model, read_about, read_config, read_model
from run.files import place
from run.folder import lock
from run.predictions import SEGMENTS, Settings, fits, read_list, tidy, to_do, write
from run.ranks import DEVICE, DEVICE_HINTS, Ranks, cleanup, init_distributed
from run.segmentation import Photo, Segmentation, attend, open_image, predict_photos, sizes
from weights.words import digest

AHEAD = 4  # images that threads read, and as many that they draw, beside the model


# ---- from Python


def load_model(
    checkpoint: str | Path,
    device: torch.device | str | None = None,
    *,
    weights: str | None = None,
    tags: str | None = None,
    tag_threshold: float | None = None,
) -> Tada:
    """Load the model of a run folder (its best step), a step folder, `last`, `best` or a model.safetensors.

    It is in eval mode, without gradients; `device` is CUDA by default, where there is one. The others are the
    flags of predict.py: `tags`, "clip" or "ram", is another tagger than training's. Raises TadaError.
    """
    if tags not in (None, "clip", "ram"):
        raise TadaError(f'tags {tags!r}: give "clip" or "ram" here, and words to predict_image')
    if not 0 <= (tag_threshold or 0) <= 1:
        raise TadaError(f"tag_threshold {tag_threshold}: give a score in 0..1")
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError):
        raise TadaError(f"device {device}: torch {torch.__version__} lacks it here; choose another") from None
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return read_model(checkpoint, weights, device, tags, tag_threshold).requires_grad_(False)


def predict_image(
    tada: Tada,
    image: str | Path | Image.Image | np.ndarray,
    words: Iterable[str] | None = None,
    *,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    **segments: float,
) -> Segmentation:
    """Predict an image as predict.py does: the same labels to the pixel.

    image: a path, a PIL image (turned upright by its EXIF tag, as files are) or an array of uint8 in 0..255,
    `(H, W, 3)` in the order RGB or `(H, W)` grey. words: a list such as ["sea", "boat"]; [] for none, as
    `--tags none`; None for those of the model's tagger. `segments` are `score` and `overlap` of mask2former.
    Raises DataError or ModelError.
    """
    config = tada.config
    for name in segments.keys() - {"score", "overlap"}:
        raise ModelError(f"{name} is unknown: give words, scales, flip, score or overlap")
    if not scales or not all(0.1 <= x <= 10 for x in scales):
        raise ModelError(f"scales {scales}: give numbers in 0.1..10")
    reading = segment_options(segments, config.decoder, {"flip": flip, "scales": tuple(scales) != (1.0,)})
    if words is not None:
        words = checked_words(words, config.condition)
    elif tada.tagger is None:  # the class names, or a file of tags by the image's path
        path = os.path.abspath(image) if isinstance(image, (str, Path)) else "the image"
        words = choose_words(config.tags, None, config.condition, [path], config.tag_threshold)[path]
    photo = Photo.of(open_image(image), config.box, words, {})
    return predict_photos(tada, [photo], scales=scales, flip=flip, reading=reading)[0]


# ---- one image: read in a thread, and drawn in one


def read(path: str, words: dict[str, list[str] | None], box: Size | None, settings: Settings) -> Photo | str:
    """The image, or the reason why it cannot be read."""
    line = {"path": path} | settings.of(path, words[path])
    try:
        return Photo.of(read_image(path)[0], box, words[path], line)
    except Unreadable as error:
        return str(error)


def draw(found: Segmentation, settings: Settings) -> tuple[dict, dict[str, bytes]]:
    """An image's line, and its files by their `endings`, in their order."""
    line = found.photo.line | {"size": [*found.labels.shape], "tags": found.tags, "shares": found.shares}
    results = {".overlay.jpg": found.overlay()}
    if found.ids is not None:
        classes = found.tada.config.classes
        line["segments"] = [{"id": s.id, "class": classes[s.label], "score": s.score} for s in found.segments]
        results[SEGMENTS] = Image.fromarray(to_colours(found.ids))
    if settings.attention:
        results[".attention.jpg"] = found.attention_overlay()
    results[".png"] = found.label_map()
    return line, {ending: encoded(x, ending) for ending, x in results.items()}


def encoded(image: Image.Image, ending: str) -> bytes:
    file = BytesIO()
    kind = {"format": "PNG", "bits": 8} if ending.endswith(".png") else {"format": "JPEG", "quality": 92}
    image.save(file, **kind)  # 8 bits also of few classes: some programs misread 4
    return file.getvalue()


# ---- the command


def main(argv: Sequence[str] | None = None) -> int:
    options = vars(parse(argv))
    work = partial(run, ranks=init_distributed(options.pop("device")), **options)
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
    folder = Path(out)
    taken = {labels.removesuffix(".png").lower(): x["path"] for labels, x in read_list(folder).items()}
    names = find_images(inputs, folder, taken)
    long = [names.pop(path) for path, name in [*names.items()] if not fits(name)]
    words_by_path = choose_words(source, given, config.condition, [*names], threshold)
    with lock(folder, "--out") if ranks.is_main else nullcontext():
        if ranks.is_main:
            tidy(folder)
        ranks.barrier()
        todo = to_do(names, words_by_path, folder, settings)
        ranks.barrier()  # only now may files appear
        if ranks.is_main:
            print(kernels.describe(ranks.device))
            print(f"tags: {source}; of training: {config.tags}", flush=True)
            if config.weights == "random":
                print("random weights: without a prior")
            for name in long:
                print(f"skipped: {name} is too long a name for its results: shorten it", file=sys.stderr)
        tada = read_model(file, weights, ranks.device, source, threshold) if todo else None
        failed, mine = 0, todo[ranks.rank :: ranks.world]
        bar = tqdm(total=len(mine), desc="predicting", disable=None if ranks.is_main else True)

        def readable(photos: Iterable[Photo | str]) -> Iterator[Photo]:
            nonlocal failed
            for photo in photos:
                if isinstance(photo, Photo):
                    yield photo
                else:
                    failed += 1
                    bar.update()
                    tqdm.write(f"unreadable: {photo}", file=sys.stderr)

        def predicted(photos: Iterable[Photo]) -> Iterator[Segmentation]:
            for group in groups(photos, sizes, ranks.device, len(scales) * (1 + flip)):
                found = predict_photos(tada, group, scales=scales, flip=flip, reading=reading)
                if attention:
                    for one, maps in zip(found, attend(found), strict=True):
                        one.maps = maps
                yield from found

        with bar, ThreadPoolExecutor(AHEAD) as pool:
            reader = partial(read, words=words_by_path, box=config.box, settings=settings)
            photos = readable(in_order(pool, reader, mine, AHEAD))
            drawn = in_order(pool, partial(draw, settings=settings), predicted(photos), AHEAD)
            for record, results in drawn:
                name = names[record["path"]]
                for ending in settings.owned:  # also those of an earlier result that this one lacks
                    place(folder, f"{name}{ending}").unlink(missing_ok=True)
                record = {"path": record["path"], "labels": f"{name}.png"} | record
                write(folder, name, record, results=results, rank=ranks.rank)
                bar.update()
                if ranks.is_main and bar.disable:
                    most = [f"{name} {rounded(share)}" for name, share in [*record["shares"].items()][:3]]
                    print(f"{folder / record['labels']}: {', '.join(most)}")
        failed = int(ranks.all_reduce(torch.tensor(failed, device=ranks.device)))
        if ranks.is_main:
            tidy(folder)
            done, left = len(todo) - failed, len(names) - len(todo)
            print(f"{out}: {done} predicted, {left} skipped, {failed + len(long)} unreadable", flush=True)
            if len(names) == 1 and not failed:
                print(folder / f"{next(iter(names.values()))}.overlay.jpg")
    ranks.barrier()  # torchrun ends all processes when one ends with code 1
    cleanup()
    return 1 if failed or long else 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; argparse ends the command with code 2 where a flag is wrong."""
    parser = Parser(
        "predict.py",
        DEVICE_HINTS,
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
    add("--device", **DEVICE)
    add_segment_flags(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
