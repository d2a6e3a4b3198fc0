"""The paper's claim in miniature: does a text-to-image prior segment better with the tags of the image?

    python -m lab.ablate                              # every run of every table; re-run to resume
    python -m lab.ablate --rows none oracle --seeds 1 # some of them
    python -m lab.ablate --report weights/tiny/ablation.jsonl  # the tables of recorded runs

Tables 5 (without BLIP), 6 and 7, Figure 1, and controls that the paper lacks, on synthetic scenes from
weights/tiny. All runs share one budget, the same 512 labelled images in the same order and, per seed, the
same initial decoder. Latents and CLIP's features are computed once, so images are mirrored but not resized.
Each run reads the test images once, at its end; steps, rate and the adapter's start were chosen on val.

Top to bottom: the rows, the cached images, one run, all runs, the tables, the figure, the command line.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from adapter import multi_hot
from assemble import build, make_decoder, parameter_groups
from decoders import resize
from errors import Parser, TadaError, run_command
from images import scenes
from images.draw import INK, PAPER, mosaic, overlay
from images.text import font_of, wrapped
from lab.tables import BATCH, OTHER, PROBE, ROWS, Row, read_record, report
from loading.augment import normalise
from loading.stream import Order, classes_in, randomness
from metrics.report import Result, confusion, none_if_nan, percent
from model import Output, Tada, TadaConfig, Tags
from run.files import replacing
from run.folder import lock
from train import learning_rate
from unet import UNet
from weights.load import locate
from weights.words import digest, prior_files

WEIGHTS = "weights/tiny"
STEPS = 400
LR = 2e-3  # of 1e-3, 2e-3 and 4e-3 the best mean of none and oracle on val, seed 0: 41, 44, 39
WEIGHT_DECAY, WARMUP = 0.01, 40
PROBE_LR = 1e-2  # one convolution from zero
EVALUATED = 20  # images per batch outside training
SHOWN, TILE = 6, 240  # images in the figure, evenly spread over the split, and their side in pixels


def configuration(row: Row) -> TadaConfig:
    palette = tuple(tuple(map(int, colour)) for colour in scenes.PALETTE)
    sizes = {"crop": (scenes.SIZE, scenes.SIZE), "box": None}
    data = {"classes": scenes.CLASSES, "palette": palette, "dataset": "scenes"} | sizes
    return TadaConfig(model="tiny", weights=WEIGHTS, dropout=0.0, **data, **row.config)


# ---- the cached images


class FrozenFeatures(NamedTuple):
    """Noised latent `(B, 4, h, w)`, CLIP's image tokens `(B, M, C)` and embedding `(B, E)` of B images."""

    latent: Tensor
    tokens: Tensor
    embedding: Tensor

    def at(self, rows: Tensor) -> Self:
        return FrozenFeatures(*(x[rows] for x in self))


@torch.no_grad()
def encode_image(tada: Tada, image: Tensor) -> FrozenFeatures:
    """Run the frozen parts of `Tada.forward` on images `(B, 3, H, W)` in [-1, 1]."""
    return FrozenFeatures(tada.noised(tada.vae.encode(tada.padded(image))), *tada.clip.image(image))


def forward_cached(tada: Tada, features: FrozenFeatures, tags: Tags | None) -> Output:
    """Run the trained parts of `Tada.forward` on cached features."""
    with torch.no_grad():
        text = tada.text(tags)
    condition = tada.adapter(features.tokens, features.embedding, text)
    return Output(tada.decoder(tada.unet_features(features.latent, condition)), condition)


@dataclass
class ImageSet:
    """The frozen features of n images, their labels `(n, H, W)` uint8, and CLIP's tags of each."""

    features: FrozenFeatures
    labels: Tensor
    tags: list[list[str]]

    def words(self, source: str, rows: Sequence[int]) -> list[list[str]] | None:
        """Return the tags of some images by `source`: None for classes, CLIP's, or the ground truth's."""
        if source == "classes":
            return None
        if source == "clip":
            return [self.tags[i] for i in rows]
        return [[scenes.CLASSES[k] for k in classes_in(self.labels[i])] for i in rows]


def batches(n: int) -> tuple[Tensor, ...]:
    return torch.arange(n).split(EVALUATED)


def encode_scenes(tada: Tada, indices: Sequence[int], ambiguity: float, mirrored: bool) -> dict[str, Tensor]:
    """Return the tensors of an `ImageSet`, mirrored images last; tags as classes `(n, K)`, padded with -1."""
    samples = [scenes.draw(i, ambiguity) for i in indices]
    image = torch.from_numpy(np.stack([x.image for x in samples])).permute(0, 3, 1, 2)
    labels = torch.from_numpy(np.stack([x.labels for x in samples]))
    if mirrored:
        image, labels = (torch.cat([x, x.flip(-1)]) for x in (image, labels))
    features, tags = [], torch.full((len(image), len(scenes.CLASSES)), -1)
    for rows in batches(len(image)):
        part = normalise(image[rows])
        features.append(encode_image(tada, part))
        for i, scored in zip(rows.tolist(), tada.zero_shot_tags(part), strict=True):
            tags[i, : len(scored)] = torch.tensor([scenes.CLASSES.index(word) for word, _ in scored])
    columns = zip(FrozenFeatures._fields, zip(*features, strict=True), strict=True)
    return {name: torch.cat(parts).contiguous() for name, parts in columns} | {"labels": labels, "tags": tags}


def read_images(file: Path) -> ImageSet:
    x = load_file(file)
    tags = [[scenes.CLASSES[k] for k in row if k >= 0] for row in x["tags"].tolist()]
    return ImageSet(FrozenFeatures(x["latent"], x["tokens"], x["embedding"]), x["labels"], tags)


def cache_file(folder: Path, split: str, ambiguity: float) -> Path:
    return folder / f"{split}-{ambiguity:g}.safetensors"


def cache_images(folder: Path, wanted: Sequence[tuple[str, float]]) -> None:
    """Encode the images of each (split, ambiguity) that has no file yet."""
    missing = [which for which in wanted if not cache_file(folder, *which).is_file()]
    if not missing:
        return
    tada = build(configuration(ROWS["tagging, loss, tags"])).eval()  # this row uses every frozen part
    for split, ambiguity in missing:
        print(f"encoding the images of {split} at ambiguity {ambiguity:g}", flush=True)
        with replacing(cache_file(folder, split, ambiguity)) as new:
            save_file(encode_scenes(tada, scenes.SPLITS[split], ambiguity, mirrored=split == "train"), new)


# ---- one run


def build_row(row: Row, seed: int) -> Tada:
    """Build the model of a row; the initial decoder, and a random UNet, depend on the seed only."""
    config = configuration(row)
    torch.manual_seed(seed)
    tada = build(config)
    torch.manual_seed(seed)
    tada.decoder = make_decoder(config, tada.unet.config)
    if row.random_unet:
        tada.unet.load_state_dict(UNet(tada.unet.config).state_dict())
    return tada


def order(n: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Yield each step's rows of `n` images followed by their mirror images; the same for every row."""
    place = Order(n, seed)
    for step in range(steps):
        samples = [place(position) for position in range(step * BATCH, (step + 1) * BATCH)]
        mirrored = [randomness(seed, epoch, index).random() < 0.5 for epoch, index in samples]
        yield torch.tensor([index + n * flip for (_, index), flip in zip(samples, mirrored, strict=True)])


def train(tada: Tada, images: ImageSet, steps: int, seed: int) -> None:
    """Train on cached features with AdamW."""
    optimizer = torch.optim.AdamW(parameter_groups(tada, LR, WEIGHT_DECAY), fused=True)
    tada.train()

    def loss(rows: Tensor) -> Tensor:
        tags = images.words(tada.config.tags, rows.tolist())
        output = forward_cached(tada, images.features.at(rows), tags)
        parts = tada.loss(output, images.labels[rows].long())
        return sum(total / number for total, number in parts.values())

    optimise(loss, optimizer, len(images.labels) // 2, steps=steps, seed=seed)


def optimise(
    loss: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer, n: int, *, steps: int, seed: int
) -> None:
    """Minimise the loss of each step's rows of `n` images, with train.py's schedule."""
    full = [group["lr"] for group in optimizer.param_groups]
    for step, rows in enumerate(order(n, steps, seed)):
        for group, lr in zip(optimizer.param_groups, full, strict=True):
            group["lr"] = lr * learning_rate(step, steps, WARMUP)
        optimizer.zero_grad(set_to_none=True)
        loss(rows).backward()
        optimizer.step()


@torch.no_grad()
def evaluate_cached(tada: Tada, images: ImageSet, shift: int = 0) -> tuple[Result, Tensor]:
    """Return the result and labels `(n, H, W)` uint8; image i gets the tags of image i + `shift`."""
    tada.eval()
    config, n = tada.config, len(images.labels)
    scores, labels = torch.zeros(n, len(scenes.CLASSES)), []
    for rows in batches(n):
        tags = images.words(config.tags, ((rows + shift) % n).tolist())
        output = forward_cached(tada, images.features.at(rows), tags)
        labels.append(tada.decoder.labels(output.prediction, tuple(images.labels.shape[1:])).byte())
        if output.condition.logits is not None:
            scores[rows] = output.condition.logits
    tag_head = config.condition == "tagging" and config.tag_loss_weight > 0
    return compare(images.labels, torch.cat(labels), scores if tag_head else None), torch.cat(labels)


def compare(labels: Tensor, predicted: Tensor, scores: Tensor | None) -> Result:
    """Score predicted labels `(n, H, W)`, and the tag head's logits `(n, K)` if there is one."""
    K, settings = len(scenes.CLASSES), {"tag_head": scores is not None, "condition": "none"}
    pixels, present = confusion(labels, predicted, K), multi_hot(labels.long(), K)
    scores = torch.zeros_like(present) if scores is None else scores
    return Result(scenes.CLASSES, settings, pixels, present, scores, torch.zeros(3), 0.0)


def probe(train: ImageSet, test: ImageSet, steps: int, seed: int) -> Result:
    """Train and test one linear layer from each of CLIP's 8x8 image tokens to the classes."""
    side = int((train.features.tokens.shape[1] - 1) ** 0.5)
    torch.manual_seed(seed)
    layer = nn.Conv2d(train.features.tokens.shape[2], len(scenes.CLASSES), 1)

    def logits(images: ImageSet, rows: Tensor) -> Tensor:
        maps = images.features.tokens[rows, 1:].mT.unflatten(2, (side, side))  # (B, C, 8, 8)
        return resize(layer(maps), images.labels.shape[1:])

    def loss(rows: Tensor) -> Tensor:
        return F.cross_entropy(logits(train, rows), train.labels[rows].long())

    optimizer = torch.optim.AdamW(layer.parameters(), PROBE_LR, weight_decay=WEIGHT_DECAY)
    optimise(loss, optimizer, len(train.labels) // 2, steps=steps, seed=seed)
    labels = [logits(test, rows).argmax(dim=1).byte() for rows in batches(len(test.labels))]
    return compare(test.labels, torch.cat(labels), None)


def run(name: str, seed: int, split: str, steps: int, folder: Path) -> dict:
    """Train and evaluate a row with a seed: a line of the record. Seed 0 saves labels for the figure."""
    row, start, entry = ROWS[name], time.perf_counter(), {"row": name, "seed": seed}
    torch.set_num_threads(1)
    files = (cache_file(folder, which, row.ambiguity) for which in ("train", split))
    train_set, test_set = map(read_images, files)
    if row is PROBE:
        result = probe(train_set, test_set, steps, seed)
    else:
        tada = build_row(row, seed)
        train(tada, train_set, steps * row.longer, seed)
        result, labels = evaluate_cached(tada, test_set)
        if row.config["condition"] == "oracle":
            entry[OTHER] = evaluate_cached(tada, test_set, shift=1)[0].mIoU
        if seed == 0:
            shown = labels[spread(len(labels))].flatten(0, 1).numpy()  # stacked vertically
            Image.fromarray(shown).save(folder / f"{split}-{name}.png")
    entry |= {"mIoU": result.mIoU, "pixel_accuracy": result.pixel_accuracy, "tag_mAP": result.tag_mAP}
    seconds = round(time.perf_counter() - start, 1)
    return entry | {"IoU": [none_if_nan(x) for x in result.iou.tolist()], "seconds": seconds}


def spread(n: int) -> list[int]:
    return [i * n // SHOWN for i in range(SHOWN)]


# ---- all runs


def conditions(split: str, steps: int) -> dict:
    """Return what all runs of a record share; runs under other conditions need another record."""
    files = prior_files(WEIGHTS, ("vae", "unet", "clip", "tokenizer"))
    weights = {file: digest(locate(WEIGHTS) / file)[:16] for file in files}
    shared = {"split": split, "scenes_version": scenes.VERSION, "weights": weights, "steps": steps}
    shared |= {"batch": BATCH, "lr": LR, "weight_decay": WEIGHT_DECAY, "warmup": WARMUP}
    return shared | {"adapter_start": TadaConfig.adapter_start}


def open_record(file: Path, shared: dict) -> set[tuple[str, int]]:
    """Start a record or truncate it to its last whole line; return the (row, seed) of its runs."""
    if not file.is_file():
        file.write_text(json.dumps(shared) + "\n", encoding="utf-8")
        return set()
    recorded, runs = read_record(file)
    if recorded != shared:
        raise TadaError(f"{file} was made with {recorded}, not {shared}: give another --out")
    whole = file.read_bytes().rfind(b"\n") + 1
    if whole < file.stat().st_size:
        os.truncate(file, whole)
    return {(x["row"], x["seed"]) for x in runs}


def run_all(
    rows: Sequence[str], seeds: int | None, *, split: str, steps: int, folder: Path, jobs: int
) -> None:
    """Make every run that the record in `folder` lacks, seed by seed, and record each when it ends."""
    file = folder / "runs.jsonl"
    done = open_record(file, conditions(split, steps))
    todo = [(name, seed) for name in rows for seed in range(seeds or ROWS[name].seeds)]
    todo = sorted((x for x in todo if x not in done), key=lambda x: (x[1], -ROWS[x[0]].longer))
    ambiguities = sorted({ROWS[name].ambiguity for name, _ in todo})
    cache_images(folder, [(which, x) for which in ("train", split) for x in ambiguities])
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, spawn) as pool, file.open("a", encoding="utf-8") as record:
        pending = [pool.submit(run, name, seed, split, steps, folder) for name, seed in todo]
        try:
            for number, finished in enumerate(as_completed(pending), 1):
                entry = finished.result()
                record.write(json.dumps(entry) + "\n")
                record.flush()
                score = f"{entry['row']}, seed {entry['seed']}: mIoU {percent(entry['mIoU'], '%')}"
                print(f"{number}/{len(todo)} {score}, {entry['seconds']:.0f} s", flush=True)
        except BaseException:  # Ctrl-C too: cancel the runs that have not started
            pool.shutdown(cancel_futures=True)
            raise


# ---- the figure


def figure(folder: Path, split: str) -> Image.Image:
    """Draw the labels predicted by none, tagging and oracle, each over the tags of its model."""
    files = {name: folder / f"{split}-{name}.png" for name in ("none", "tagging, loss, tags", "oracle")}
    if missing := [file for file in files.values() if not file.is_file()]:
        cure = "seed 0 of its row draws it: remove that line from runs.jsonl and run again"
        raise TadaError(f"{missing[0]} is missing: {cure}")
    predicted = {name: np.asarray(Image.open(file)) for name, file in files.items()}
    images, tiles = read_images(cache_file(folder, split, 1.0)), []
    for place, i in enumerate(spread(len(images.labels))):
        scene = scenes.draw(scenes.SPLITS[split][i])
        tiles += [tile(scene.image, None, "image"), tile(scene.image, scene.labels, "labels")]
        for name, stack in predicted.items():
            words = images.words(ROWS[name].config.get("tags", "classes"), [i])
            labels = stack[place * scenes.SIZE : (place + 1) * scenes.SIZE]
            tiles.append(tile(scene.image, labels, f"{name}: {', '.join(words[0]) if words else 'no tags'}"))
    return mosaic(tiles, 2 + len(files))


def tile(image: np.ndarray, labels: np.ndarray | None, text: str) -> Image.Image:
    """Draw a square image, under its labels if there are any, over up to four lines of text."""
    drawn = Image.fromarray(image)
    if labels is not None:
        drawn = overlay(image, labels, scenes.PALETTE, scenes.CLASSES)
        drawn = drawn.crop((0, 0, drawn.width, drawn.width))  # without the legend
    font, height = font_of(12), 17
    canvas = Image.new("RGB", (TILE, TILE + 4 * height + 2), PAPER)
    canvas.paste(drawn.resize((TILE, TILE)))
    for i, line in enumerate(wrapped(text, font, TILE, 4)):
        ImageDraw.Draw(canvas).text((0, TILE + 2 + i * height), line, INK, font)
    return canvas


# ---- the command line


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser("python -m lab.ablate", description="The paper's tables in miniature.")
    add, names = parser.add_argument, list(ROWS)
    add("--rows", nargs="+", choices=names, default=names, metavar="ROW", help="rows to run (default: all)")
    add("--seeds", type=int, metavar="N", help="of each row (default: its own, 1 to 5)")
    add("--steps", type=int, default=STEPS, metavar="N", help="of each run (default: %(default)s)")
    splits = "images to evaluate on (default: %(default)s); choose settings on val"
    add("--split", choices=["val", "test"], default="test", help=splits)
    jobs = "parallel runs (default: all cores)"
    add("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help=jobs)
    record = "folder of the record (default: %(default)s)"
    add("--out", type=Path, default=Path("runs/ablate"), metavar="DIR", help=record)
    add("--report", type=Path, metavar="FILE", help="print the tables of this record and run nothing")
    options = parser.parse_args(argv)
    for name in ("seeds", "steps", "jobs"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} {value}: give 1 or more")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    o = parse(argv)

    def work() -> None:
        if o.report:
            print(report(*read_record(o.report)))
            return
        with lock(o.out, "--out"):
            run_all(o.rows, o.seeds, split=o.split, steps=o.steps, folder=o.out, jobs=o.jobs)
            tables = report(*read_record(o.out / "runs.jsonl"))
            (o.out / "tables.md").write_text(tables + "\n", encoding="utf-8")
            print(tables)
            figure(o.out, o.split).save(o.out / "figure.jpg", quality=90)

    return run_command("ablate.py", work, "stopped: run the same command to resume")


if __name__ == "__main__":
    sys.exit(main())
