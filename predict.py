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

from errors import Parser, TadaError, Unreadable, end_quietly, run_command

if __name__ == "__main__":
    end_quietly()  # at Ctrl-C during the imports below

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import inference
import kernels
from eval import add_segment_flags, add_word_flags, groups, scale, segment_options
from images.draw import attention_mosaic, overlay, percent, segment_overlay
from images.panoptic import to_colours
from images.read import distinct_colour, find_images, fit, read_image
from loading.augment import model_input, resize
from loading.stream import in_order
from loading.tags import choose_source, choose_words
from model import Size, Tada, TadaConfig
from run.checkpoint import find_model, load_model, read_about, read_config
from run.folder import lock
from run.predictions import SEGMENTS, Settings, read_list, tidy, to_do, write
from run.ranks import DEVICE, DEVICE_HINTS, Ranks, cleanup, init_distributed
from weights.words import digest

AHEAD = 4  # images that threads read, and as many that they draw, beside the model


# ---- one image: read in a thread, predicted in this one, drawn in a thread


class Photo(NamedTuple):
    """An image as it was read; its line so far, of the file before that."""

    path: str
    made: dict
    image: Image.Image  # upright
    small: Image.Image  # at the size that the model reads


class Found(NamedTuple):
    """What the model found in an image."""

    photo: Photo
    tags: list[str] | None
    labels: np.ndarray  # (H, W) uint8
    panoptic: tuple[np.ndarray, Sequence] | None  # ids (H, W) and segments of mask2former
    maps: np.ndarray | None  # (T, h, w) attention


def read(path: str, words: dict[str, list[str] | None], box: Size | None, settings: Settings) -> Photo | str:
    """The image, or the reason why it cannot be read."""
    made = {"path": path} | settings.of(path, words[path])
    try:
        image, size = read_image(path)
    except Unreadable as error:
        return str(error)
    small = fit(size, *box) if box else size
    return Photo(path, made, image, resize(image, size, small, (0, 0, *small)))


def sizes(photo: Photo) -> tuple[Size, Size]:
    """(H, W) that the model reads, and of the result."""
    return photo.small.size[::-1], photo.image.size[::-1]


@torch.no_grad()
def predict(
    tada: Tada, photos: Sequence[Photo], words: dict[str, list[str] | None], settings: Settings
) -> list[Found]:
    """Predict images of one size together."""
    config, device, (small, size) = tada.config, tada.unet.conv_in.weight.device, sizes(photos[0])
    x = torch.cat([model_input(photo.small, small) for photo in photos]).to(device)  # (B, 3, h, w)
    original = x  # as in eval.py
    if settings.scales != [1.0]:
        original = torch.cat([model_input(photo.image, size) for photo in photos]).to(device)
    how = {"window": config.crop, "stride": config.stride, "scales": settings.scales, "flip": settings.flip}
    given = [words[photo.path] for photo in photos]
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        tags, seen = tada.resolve_tags(x, None if given[0] is None else given)
        if config.decoder == "mask2former":
            prediction = inference.segment(tada, x, tags, seen=seen, size=size, **settings.reading)
        else:
            seen = seen if original is x else None
            prediction = inference.predict(tada, original, tags, seen=seen, size=size, base=small, **how)
        maps = inference.attention_in_windows(tada, x, tags) if settings.attention else None  # (B, T, h, w)
    found = []
    for i, (photo, labels) in enumerate(zip(photos, prediction.labels.byte().cpu().numpy(), strict=True)):
        own, panoptic, attended = tags and tags[i], None, None
        if prediction.panoptic:
            ids, segments = prediction.panoptic[i]
            panoptic = ids.cpu().numpy(), segments
        if maps is not None:  # (T, h, w), without the padding of shorter lists
            attended = maps[i, : max(len(own), 1) if tags else None].cpu().numpy()
        found.append(Found(photo, own, labels, panoptic, attended))
    return found


def draw(found: Found, config: TadaConfig, settings: Settings) -> tuple[dict, dict[str, bytes]]:
    """An image's line, and its files by their `endings`, in their order."""
    (_, made, image, _), tags, labels, panoptic, maps = found
    counts = Image.fromarray(labels).histogram()
    order = sorted((k for k in range(len(config.classes)) if counts[k]), key=lambda k: -counts[k])
    shares = {config.classes[k]: counts[k] / labels.size for k in order}
    record = made | {"size": [*labels.shape], "tags": tags, "shares": shares}
    palette = np.array(config.palette or [*map(distinct_colour, range(1, len(config.classes) + 1))], np.uint8)
    names, results = {"palette": palette, "classes": config.classes, "words": tags}, {}
    if panoptic is not None:
        ids, segments = panoptic
        entries = [{"id": s.id, "class": config.classes[s.label], "score": s.score} for s in segments]
        record["segments"] = entries
        results[".overlay.jpg"] = segment_overlay(image, ids, segments, **names)
        results[SEGMENTS] = Image.fromarray(to_colours(ids))
    else:
        results[".overlay.jpg"] = overlay(image, labels, **names)
    if maps is not None:
        results[".attention.jpg"] = attention_mosaic(image, maps, config.classes, words=tags)
    results[".png"] = Image.fromarray(labels)
    return record, {ending: encoded(x, ending) for ending, x in results.items()}


def encoded(image: Image.Image, ending: str) -> bytes:
    file = BytesIO()
    image.save(file, "PNG" if ending.endswith(".png") else "JPEG", quality=92)
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
        if ranks.is_main:
            print(kernels.describe(ranks.device))
            print(f"tags: {source}; of training: {config.tags}", flush=True)
            if config.weights == "random":
                print("random weights: without a prior")
        tada = load_model(file, weights, ranks.device, source, threshold) if todo else None
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
                    tqdm.write(f"skipped: {photo}", file=sys.stderr)

        shared = {"words": words_by_path, "settings": settings}
        with bar, ThreadPoolExecutor(AHEAD) as pool:
            photos = in_order(pool, partial(read, box=config.box, **shared), mine, AHEAD)
            together = groups(readable(photos), sizes, ranks.device, len(scales) * (1 + flip))
            found = (x for group in together for x in predict(tada, group, **shared))
            drawn = in_order(pool, partial(draw, config=config, settings=settings), found, AHEAD)
            for record, results in drawn:
                name = names[record["path"]]
                for ending in settings.owned:  # also those of an earlier result that this one lacks
                    (folder / f"{name}{ending}").unlink(missing_ok=True)
                record = {"path": record["path"], "labels": f"{name}.png"} | record
                write(folder, name, record, results=results, rank=ranks.rank)
                bar.update()
                if ranks.is_main and bar.disable:
                    most = [f"{name} {percent(share)}" for name, share in [*record["shares"].items()][:3]]
                    print(f"{folder / record['labels']}: {', '.join(most)}")
        failed = int(ranks.all_reduce(torch.tensor(failed, device=ranks.device)))
        if ranks.is_main:
            tidy(folder)
            done = len(todo) - failed
            print(f"{folder}: {done} predicted, {len(names) - len(todo)} skipped, {failed} unreadable")
    cleanup()
    return 1 if failed else 0


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
