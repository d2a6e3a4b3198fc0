"""The paper's claim in miniature: does a text-to-image prior segment better when it is told what is there?

    python -m lab.ablate                              # every run of every table; the same command again goes on
    python -m lab.ablate --rows none oracle --seeds 1 # some of them
    python -m lab.ablate --report weights/tiny/ablation.jsonl  # the tables of runs that were made before

On drawn scenes, from weights/tiny: Tables 5, 6 and 7 and Figure 1, and the controls that the paper lacks;
BLIP's row of Table 5 is not among them. All runs have one budget, the same 512 labelled pictures in the same
order, and per seed the same first decoder. The frozen views of all pictures, latents and CLIP's, are computed
once; so pictures are mirrored but not resized. Each run reads the test pictures once, at its end; steps, rate
and the adapter's start were chosen on val (README.md says how).

Top to bottom: the rows, the pictures, one run, all runs, the tables, the figure, the command line.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from adapter import Condition
from assemble import build, make_decoder, parameter_groups
from decoders import resize
from errors import TadaError
from eval import Result, count, known, percent
from images import scenes
from images.draw import INK, PAPER, mosaic, overlay, wrapped
from loading.augment import normalise
from loading.stream import Order, classes_in, randomness
from model import Output, Tada, TadaConfig, Tags
from run.folder import lock
from train import learning_rate
from unet import UNet
from weights.words import digest, prior_files

WEIGHTS = "weights/tiny"
STEPS, BATCH = 400, 8
LR = 2e-3  # of 1e-3, 2e-3 and 4e-3 the best mean of none and oracle on val, seed 0: 41, 44, 39
WEIGHT_DECAY, WARMUP = 0.01, 40
PROBE_LR = 1e-2  # one convolution from zero
EVALUATED = 20  # pictures at once
SHOWN, TILE = 6, 240  # pictures of the figure, evenly spread over the split, and their side in it
LOOKALIKES = {name for pair in scenes.PAIRS for name in pair}
OTHER = "mIoU_other"  # of a model that is told the tags of the next picture


# ---- the rows


@dataclass(frozen=True)
class Row:
    """A line of a table: what differs from the defaults, how often and how long it is trained."""

    name: str
    config: dict = field(default_factory=dict)
    seeds: int = 5
    paper: float | None = None  # its mIoU on ADE20K
    longer: int = 1
    random_unet: bool = False
    ambiguity: float = 1.0


TAGGING = {"condition": "tagging", "tags": "classes"}
ORACLE = {"condition": "oracle", "tags": "oracle"}
FROZEN = {"freeze_unet": True}  # the adapter, if any, and the decoder are trained alone
TABLE_5 = (
    Row("none", {"condition": "none"}, paper=53.9),
    Row("caption", {"condition": "caption", "tags": "clip"}, paper=53.5),
    Row("classes", {"condition": "classes"}, paper=54.2),
    Row("implicit", {"condition": "implicit"}, paper=54.5),
    Row("tagging", TAGGING | {"tag_loss_weight": 0.0}, paper=54.8),
    Row("tagging, loss", TAGGING, paper=55.5),
    Row("tagging, loss, tags", TAGGING | {"tags": "clip"}, paper=55.8),
    Row("oracle", ORACLE),
)
TABLE_6 = tuple(
    Row(f"loss weight {weight}", TAGGING | {"tag_loss_weight": float(weight)}, 2, paper)
    for weight, paper in ((5, 55.72), (10, 55.04), (15, 54.96))
)
TABLE_7 = tuple(
    Row(f"{blocks} blocks", TAGGING | {"blocks": blocks}, 2, paper)
    for blocks, paper in ((4, 55.20), (6, 55.43), (8, 54.94), (10, 54.73))
)
CONTROLS = (
    Row("none, random UNet", {"condition": "none"}, 3, random_unet=True),
    Row("oracle, random UNet", ORACLE, 3, random_unet=True),
    Row("none, frozen UNet", {"condition": "none"} | FROZEN, 3),
    Row("oracle, frozen UNet", ORACLE | FROZEN, 3),
    Row("none, frozen random UNet", {"condition": "none"} | FROZEN, 3, random_unet=True),
    Row("oracle, frozen random UNet", ORACLE | FROZEN, 3, random_unet=True),
    Row("none, nothing alike", {"condition": "none"}, 2, ambiguity=0.0),
    Row("oracle, nothing alike", ORACLE, 2, ambiguity=0.0),
    Row("none, 10 times longer", {"condition": "none"}, 1, longer=10),
    Row("tagging from the empty prompt", TAGGING | {"tags": "clip", "adapter_start": "empty"}, 2),
)
PROBE = Row("CLIP's tokens alone")
ROWS = {row.name: row for row in (*TABLE_5, *CONTROLS, PROBE, *TABLE_6, *TABLE_7)}


def configuration(row: Row) -> TadaConfig:
    return TadaConfig(
        classes=scenes.CLASSES,
        palette=tuple(tuple(map(int, colour)) for colour in scenes.PALETTE),
        dataset="scenes",
        model="tiny",
        weights=WEIGHTS,
        dropout=0.0,
        crop=(scenes.SIZE, scenes.SIZE),
        box=None,
        **row.config,
    )


# ---- the pictures


class FrozenFeatures(NamedTuple):
    """What the frozen parts make of images: noised latent `(B, 4, h, w)`, CLIP's image tokens `(B, M, C)` and
    embedding `(B, E)`.
    """

    latent: Tensor
    tokens: Tensor
    embedding: Tensor


@torch.no_grad()
def encode_image(tada: Tada, image: Tensor) -> FrozenFeatures:
    """The first half of `Tada.forward`, to be cached: image `(B, 3, H, W)` in [-1, 1]."""
    return FrozenFeatures(tada.noised(tada.vae.encode(tada.padded(image))), *tada.clip.image(image))


def forward_cached(tada: Tada, seen: FrozenFeatures, tags: Tags | None) -> Output:
    """`Tada.forward` from cached features; a condition that does not use them ignores them."""
    with torch.no_grad():
        text = tada.text(tags)
    condition: Condition = tada.adapter(seen.tokens, seen.embedding, text)
    return Output(tada.decoder(tada.unet_features(seen.latent, condition)), condition)


@dataclass
class Pictures:
    """What the frozen parts make of n pictures, their labels `(n, H, W)` uint8, and CLIP's tags of each."""

    seen: FrozenFeatures
    labels: Tensor
    tags: list[list[str]]

    def words(self, source: str, rows: Sequence[int]) -> list[list[str]] | None:
        """What the model is told of these pictures: nothing of each, CLIP's tags, or the truth."""
        if source == "classes":
            return None
        if source == "clip":
            return [self.tags[i] for i in rows]
        return [[scenes.CLASSES[k] for k in classes_in(self.labels[i])] for i in rows]


def look(tada: Tada, indices: Sequence[int], ambiguity: float, mirrored: bool) -> dict[str, Tensor]:
    """The tensors of `Pictures`, the mirrored ones last; tags as classes `(n, K)`, -1 = no more."""
    drawn = [scenes.draw(i, ambiguity) for i in indices]
    image = torch.from_numpy(np.stack([x.image for x in drawn])).permute(0, 3, 1, 2)
    labels = torch.from_numpy(np.stack([x.labels for x in drawn]))
    if mirrored:
        image, labels = (torch.cat([x, x.flip(-1)]) for x in (image, labels))
    views, tags = [], torch.full((len(image), len(scenes.CLASSES)), -1)
    for rows in torch.arange(len(image)).split(EVALUATED):
        part = normalise(image[rows])
        views.append(encode_image(tada, part))
        for i, found in zip(rows.tolist(), tada.zero_shot_tags(part), strict=True):
            tags[i, : len(found)] = torch.tensor([scenes.CLASSES.index(word) for word, _ in found])
    latent, tokens, embedding = (torch.cat(parts).contiguous() for parts in zip(*views, strict=True))
    return {"latent": latent, "tokens": tokens, "embedding": embedding, "labels": labels, "tags": tags}


def read_pictures(file: Path) -> Pictures:
    x = load_file(file)
    tags = [[scenes.CLASSES[k] for k in row if k >= 0] for row in x["tags"].tolist()]
    return Pictures(FrozenFeatures(x["latent"], x["tokens"], x["embedding"]), x["labels"], tags)


def picture_file(folder: Path, split: str, ambiguity: float) -> Path:
    return folder / f"{split}-{ambiguity:g}.safetensors"


def keep_pictures(folder: Path, wanted: Sequence[tuple[str, float]]) -> None:
    """Write what is not there yet of the pictures of each (split, ambiguity)."""
    files = {picture_file(folder, *which): which for which in wanted}
    missing = {file: which for file, which in files.items() if not file.is_file()}
    if not missing:
        return
    tada = build(configuration(ROWS["tagging, loss, tags"])).eval()  # it looks at all there is
    for file, (split, ambiguity) in missing.items():
        print(f"looking at {split} at ambiguity {ambiguity:g}", flush=True)
        new = file.with_suffix(".tmp")
        save_file(look(tada, scenes.SPLITS[split], ambiguity, mirrored=split == "train"), new)
        os.replace(new, file)


# ---- one run


def make(row: Row, seed: int) -> Tada:
    """The model of a row. The decoder, and a random UNet, depend on the seed alone."""
    config = configuration(row)
    torch.manual_seed(seed)
    tada = build(config)
    torch.manual_seed(seed)
    tada.decoder = make_decoder(config, tada.unet.config)
    if row.random_unet:
        tada.unet.load_state_dict(UNet(tada.unet.config).state_dict())
    return tada


def order(n: int, steps: int, seed: int) -> Iterator[Tensor]:
    """The rows of `n` pictures and their mirror images that each step sees; the same for every row."""
    place = Order(n, seed)
    for step in range(steps):
        rows = []
        for position in range(step * BATCH, (step + 1) * BATCH):
            epoch, index = place(position)
            mirrored = randomness(seed, epoch, index).random() < 0.5
            rows.append(index + n * mirrored)
        yield torch.tensor(rows)


def train(tada: Tada, pictures: Pictures, steps: int, seed: int) -> None:
    """`steps` updates from the frozen views: AdamW, warm-up, a line down to 0."""
    optimizer = torch.optim.AdamW(parameter_groups(tada, LR, WEIGHT_DECAY), fused=True)
    tada.train()

    def loss(rows: Tensor) -> Tensor:
        seen = FrozenFeatures(*(x[rows] for x in pictures.seen))
        output = forward_cached(tada, seen, pictures.words(tada.config.tags, rows.tolist()))
        parts = tada.loss(output, pictures.labels[rows].long())
        return sum(total / number for total, number in parts.values())

    descend(loss, optimizer, order(len(pictures.labels) // 2, steps, seed), steps)


def descend(
    loss: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer, batches: Iterator[Tensor], steps: int
) -> None:
    full = [group["lr"] for group in optimizer.param_groups]
    for step, rows in enumerate(batches):
        for group, lr in zip(optimizer.param_groups, full, strict=True):
            group["lr"] = lr * learning_rate(step, steps, WARMUP)
        optimizer.zero_grad(set_to_none=True)
        loss(rows).backward()
        optimizer.step()


@torch.no_grad()
def judge(tada: Tada, pictures: Pictures, other: bool = False) -> tuple[Result, Tensor]:
    """What is right of the pictures, and their predicted labels `(n, H, W)` uint8; `other`: each is told the
    tags of the next one."""
    tada.eval()
    config, n, K = tada.config, len(pictures.labels), len(scenes.CLASSES)
    confusion, scores, found = torch.zeros(K, K, dtype=torch.int64), torch.zeros(n, K), []
    for rows in torch.arange(n).split(EVALUATED):
        told = pictures.words(config.tags, ((rows + other) % n).tolist())
        output = forward_cached(tada, FrozenFeatures(*(x[rows] for x in pictures.seen)), told)
        labels = tada.decoder.labels(output.prediction, tuple(pictures.labels.shape[1:]))
        confusion += count(pictures.labels[rows], labels, K)
        found.append(labels.byte())
        if output.condition.logits is not None:
            scores[rows] = output.condition.logits
    present = torch.stack([torch.bincount(x.flatten(), minlength=K) > 0 for x in pictures.labels]).float()
    about = {"tag_head": config.condition == "tagging" and config.tag_loss_weight > 0, "condition": "none"}
    return Result(scenes.CLASSES, about, confusion, present, scores, torch.zeros(3), 0.0), torch.cat(found)


def probe(train: Pictures, test: Pictures, steps: int, seed: int) -> Result:
    """One linear layer from each of CLIP's 8x8 image tokens to the classes: what its view alone decides."""
    side = int((train.seen.tokens.shape[1] - 1) ** 0.5)
    maps = [x.seen.tokens[:, 1:].mT.unflatten(2, (side, side)) for x in (train, test)]  # (n, C, 8, 8)
    torch.manual_seed(seed)
    layer = nn.Conv2d(maps[0].shape[1], len(scenes.CLASSES), 1)

    def loss(rows: Tensor) -> Tensor:
        return F.cross_entropy(
            resize(layer(maps[0][rows]), train.labels.shape[1:]), train.labels[rows].long()
        )

    optimizer = torch.optim.AdamW(layer.parameters(), PROBE_LR, weight_decay=WEIGHT_DECAY)
    descend(loss, optimizer, order(len(train.labels) // 2, steps, seed), steps)
    K = len(scenes.CLASSES)
    confusion = torch.zeros(K, K, dtype=torch.int64)
    for rows in torch.arange(len(test.labels)).split(EVALUATED):
        labels = resize(layer(maps[1][rows]), test.labels.shape[1:]).argmax(dim=1)
        confusion += count(test.labels[rows], labels, K)
    nobody = torch.zeros(0, K)
    return Result(scenes.CLASSES, {"tag_head": False}, confusion, nobody, nobody, torch.zeros(3), 0.0)


def run(name: str, seed: int, split: str, steps: int, folder: Path) -> dict:
    """Train a row with a seed and read the split once: a line of the record. Draws what the figure needs."""
    row, start = ROWS[name], time.perf_counter()
    torch.set_num_threads(1)
    train_set, test_set = (
        read_pictures(picture_file(folder, which, row.ambiguity)) for which in ("train", split)
    )
    entry = {"row": name, "seed": seed}
    if row is PROBE:
        result = probe(train_set, test_set, steps, seed)
    else:
        tada = make(row, seed)
        train(tada, train_set, steps * row.longer, seed)
        result, labels = judge(tada, test_set)
        if row.config["condition"] == "oracle":
            entry[OTHER] = judge(tada, test_set, other=True)[0].mIoU
        if seed == 0:
            shown = labels[spread(len(labels))].flatten(0, 1).numpy()  # one below the other
            Image.fromarray(shown).save(folder / f"{split}-{name}.png")
    entry |= {"mIoU": result.mIoU, "pixel_accuracy": result.pixel_accuracy, "tag_mAP": result.tag_mAP}
    return entry | {
        "IoU": [known(x) for x in result.iou.tolist()],
        "seconds": round(time.perf_counter() - start, 1),
    }


def spread(n: int) -> list[int]:
    return [i * n // SHOWN for i in range(SHOWN)]


# ---- all runs


def conditions(split: str, steps: int) -> dict:
    """What all runs of a record share: of different ones no table must be made."""
    files = prior_files(WEIGHTS, ("vae", "unet", "clip", "tokenizer"))
    return {
        "split": split,
        "scenes_version": scenes.VERSION,
        "weights": {file: digest(Path(WEIGHTS, file))[:16] for file in files},
        "steps": steps,
        "batch": BATCH,
        "lr": LR,
        "weight_decay": WEIGHT_DECAY,
        "warmup": WARMUP,
        "adapter_start": TadaConfig.adapter_start,
    }


SHARED = {"split", "scenes_version", "steps"}  # what the tables need of the first line of a record,
RUN = {"row", "seed", "mIoU", "IoU", "tag_mAP"}  # and of every other


def read_record(file: Path) -> tuple[dict, list[dict]]:
    """The shared conditions and the runs of a record; a last line that was cut off is left out."""
    lines = []
    for number, line in enumerate(file.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break
        try:
            entry = json.loads(line)
            lacking = (RUN if lines else SHARED).difference(entry)
        except (ValueError, TypeError):
            lacking = SHARED
        if lacking:
            raise TadaError(f"{file}, line {number}, is not of ablate.py: give the runs.jsonl of an --out")
        lines.append(entry)
    if not lines:
        raise TadaError(f"{file} has no runs: remove it, or give another --out")
    return lines[0], lines[1:]


def make_all(rows: Sequence[str], seeds: int | None, split: str, steps: int, folder: Path, jobs: int) -> None:
    """Every run that the record in `folder` lacks, seed by seed; each is written down when it ends."""
    file, shared, done = folder / "runs.jsonl", conditions(split, steps), set()
    if file.is_file():
        before, runs = read_record(file)
        if before != shared:
            raise TadaError(f"{file} was made with {before}, not {shared}: give another --out")
        done = {(x["row"], x["seed"]) for x in runs}
        whole = file.read_bytes().rfind(b"\n") + 1
        if whole < file.stat().st_size:  # the last line was cut off
            os.truncate(file, whole)
    else:
        file.write_text(json.dumps(shared) + "\n", encoding="utf-8")

    todo = [(name, seed) for name in rows for seed in range(seeds or ROWS[name].seeds)]
    todo = sorted((x for x in todo if x not in done), key=lambda x: (x[1], -ROWS[x[0]].longer))
    looks = {ROWS[name].ambiguity for name, _ in todo}
    keep_pictures(folder, [(which, x) for which in ("train", split) for x in sorted(looks)])
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, spawn) as pool, file.open("a", encoding="utf-8") as record:
        waiting = [pool.submit(run, name, seed, split, steps, folder) for name, seed in todo]
        try:
            for number, finished in enumerate(as_completed(waiting), 1):
                entry = finished.result()
                record.write(json.dumps(entry) + "\n")
                record.flush()
                said = f"{entry['row']}, seed {entry['seed']}: mIoU {percent(entry['mIoU'])}"
                print(f"{number}/{len(todo)} {said}, {entry['seconds']:.0f} s", flush=True)
        except BaseException:  # Ctrl-C too: what has not begun must not be waited for
            pool.shutdown(cancel_futures=True)
            raise


# ---- the tables


def report(shared: dict, runs: Sequence[dict]) -> str:
    """All tables in Markdown, of what the record holds: mean and standard error over seeds, in per cent."""
    found = {}
    for x in runs:
        found.setdefault(x["row"], {})[x["seed"]] = x
    if "oracle" in found:  # the same models, told something else
        wrong = {seed: x | {"mIoU": x[OTHER], "IoU": None} for seed, x in found["oracle"].items()}
        found["oracle, another's tags"] = wrong
    head = (
        "| | seeds | mIoU | above none | look-alikes | tag mAP | the paper's |\n|---|--:|--:|--:|--:|--:|--:|"
    )
    tables = {
        "Table 5 and Figure 1": [row.name for row in TABLE_5],
        "Controls": ["none", "oracle", "oracle, another's tags", *(row.name for row in CONTROLS), PROBE.name],
        "Table 6": ["tagging", "tagging, loss", *(row.name for row in TABLE_6)],
        "Table 7": ["tagging, loss", *(row.name for row in TABLE_7)],
    }
    text = [
        f"scenes version {shared['scenes_version']}, {shared['split']}, {shared['steps']} steps of {BATCH}"
    ]
    for title, names in tables.items():
        lines = [
            line(name, found, pairs_only=title in ("Table 6", "Table 7")) for name in names if name in found
        ]
        text += ["", f"{title}:", "", head, *lines] if lines else []
    return "\n".join([*text, "", *claims(found)])


def line(name: str, found: dict[str, dict[int, dict]], pairs_only: bool) -> str:
    """A row of a table; `pairs_only`: of the seeds that the short tables have."""
    runs, none = found[name], found.get("none", {})
    seeds = [seed for seed in sorted(runs) if not pairs_only or seed < TABLE_6[0].seeds]
    above = [runs[seed]["mIoU"] - none[seed]["mIoU"] for seed in seeds if seed in none]
    alike = [lookalikes(runs[seed]["IoU"]) for seed in seeds if runs[seed]["IoU"]]
    tags = [runs[seed]["tag_mAP"] for seed in seeds if runs[seed]["tag_mAP"] is not None]
    row = ROWS.get(name, ROWS["oracle"])
    compared = name != "none" and row.ambiguity == ROWS["none"].ambiguity  # the same pictures
    cells = [name, str(len(seeds)), spelled([runs[seed]["mIoU"] for seed in seeds])]
    cells += [spelled(above, "+") if compared else "", spelled(alike), spelled(tags)]
    return f"| {' | '.join([*cells, f'{row.paper:g}' if row.paper else ''])} |"


def lookalikes(iou: Sequence[float]) -> float:
    """The mean IoU of the classes that share colour and texture with another."""
    return statistics.fmean(x for name, x in zip(scenes.CLASSES, iou, strict=True) if name in LOOKALIKES)


def spelled(values: Sequence[float], sign: str = "") -> str:
    """Mean and standard error of fractions, in per cent; nothing of nothing."""
    if not values:
        return ""
    mean = f"{100 * statistics.fmean(values):{sign}.1f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {100 * statistics.stdev(values) / len(values) ** 0.5:.1f}"


def claims(found: dict[str, dict[int, dict]]) -> list[str]:
    """What must be true of a miniature that shows anything, and whether it is; then what telling is worth,
    also where the UNet knows nothing, learns nothing, or nothing looks alike. Points of mIoU.
    """

    def gaps(more: str, less: str) -> list[float]:
        seeds = sorted(found.get(more, {}).keys() & found.get(less, {}).keys())
        return [found[more][seed]["mIoU"] - found[less][seed]["mIoU"] for seed in seeds]

    lines = []
    for more, less, least in (
        ("oracle", "none", 10.0),
        ("none", "oracle, another's tags", 0.0),
        ("none", "none, random UNet", 0.0),
        ("oracle", "oracle, random UNet", 0.0),
        ("none, 10 times longer", "oracle", -5.0),
    ):
        if between := gaps(more, less):
            verdict = "holds" if 100 * statistics.fmean(between) > least else "FAILS"
            lines.append(f"- {more} - {less} > {least:g}: {verdict}, {spelled(between, '+')}")
    for kind in ("", ", random UNet", ", frozen UNet", ", frozen random UNet", ", nothing alike"):
        if between := gaps(f"oracle{kind}", f"none{kind}"):
            lines.append(f"- what the truth is worth{kind}: {spelled(between, '+')}")
    return lines


# ---- the figure


def figure(folder: Path, split: str) -> Image.Image:
    """The same pictures under none, tagging and oracle, each over the words that its model was told."""
    names, indices = ("none", "tagging, loss, tags", "oracle"), scenes.SPLITS[split]
    missing = [file for name in names if not (file := folder / f"{split}-{name}.png").is_file()]
    if missing:
        raise TadaError(
            f"{missing[0]} is missing: seed 0 of its row draws it; take its line out of runs.jsonl, run again"
        )
    predicted = [np.asarray(Image.open(folder / f"{split}-{name}.png")) for name in names]
    told = read_pictures(picture_file(folder, split, 1.0))
    tiles = [heading(text) for text in ("picture", "labels", *names)]
    for place, i in enumerate(spread(len(indices))):
        scene = scenes.draw(indices[i])
        tiles += [tile(Image.fromarray(scene.image)), tile(painted(scene.image, scene.labels))]
        for name, stack in zip(names, predicted, strict=True):
            words = told.words(ROWS[name].config.get("tags", "classes"), [i])
            labels = stack[place * scenes.SIZE : (place + 1) * scenes.SIZE]
            tiles.append(tile(painted(scene.image, labels), ", ".join(words[0]) if words else "told nothing"))
    return mosaic(tiles, 2 + len(names))


def painted(image: np.ndarray, labels: np.ndarray) -> Image.Image:
    """The picture under its labels, without the legend."""
    drawn = overlay(image, labels, scenes.PALETTE, scenes.CLASSES)
    return drawn.crop((0, 0, drawn.width, drawn.width))


def tile(picture: Image.Image, text: str = "") -> Image.Image:
    """A square picture over up to three lines of text."""
    font, line = ImageFont.load_default(13), 17
    canvas = Image.new("RGB", (TILE, TILE + 3 * line + 2), PAPER)
    canvas.paste(picture.resize((TILE, TILE)))
    for i, part in enumerate(wrapped(text, font, TILE, 3)):
        ImageDraw.Draw(canvas).text((0, TILE + 2 + i * line), part, INK, font)
    return canvas


def heading(text: str) -> Image.Image:
    canvas = Image.new("RGB", (TILE, 20), PAPER)
    ImageDraw.Draw(canvas).text((0, 0), text, INK, ImageFont.load_default(16))
    return canvas


# ---- the command line


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="The paper's tables in miniature.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW", help="which"
    )
    quiet = {"default": argparse.SUPPRESS}
    seeds = "of each row (default: its own, 1 to 5)"
    parser.add_argument("--seeds", type=int, metavar="N", help=seeds, **quiet)
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help="of each run")
    which = "the pictures to judge by: val while anything may change"
    parser.add_argument("--split", choices=["val", "test"], default="test", help=which)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="runs at once")
    parser.add_argument("--out", type=Path, default=Path("runs/ablate"), metavar="DIR", help="the record")
    made = "make no run: the tables of this record"
    parser.add_argument("--report", type=Path, metavar="FILE", help=made, **quiet)
    options = parser.parse_args(argv)
    options.seeds, options.report = getattr(options, "seeds", None), getattr(options, "report", None)
    for name in ("seeds", "steps", "jobs"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} {value}: give 1 or more")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    o = parse(argv)
    try:
        if o.report:
            print(report(*read_record(o.report)))
            return 0
        with lock(o.out, "--out"):
            make_all(o.rows, o.seeds, o.split, o.steps, o.out, o.jobs)
            shared, runs = read_record(o.out / "runs.jsonl")
            tables = report(shared, runs)
            (o.out / "tables.md").write_text(tables + "\n", encoding="utf-8")
            print(tables)
            figure(o.out, o.split).save(o.out / "figure.jpg", quality=90)
    except KeyboardInterrupt:
        print("stopped: the same command goes on", file=sys.stderr)
        return 130
    except (TadaError, OSError) as error:
        print(f"ablate.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
