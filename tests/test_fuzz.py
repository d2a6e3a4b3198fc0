"""Every format that is read back, with one byte changed, deleted or inserted: never a traceback or a hang.

What we wrote ourselves carries a hash or is checked: a mutation is refused, or changes nothing. What users
bring, pixels, names and tags, cannot tell one value from another: it is read, or refused in one sentence.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fuzz import fuzz
from PIL import Image
from test_data import folder, noise, save
from test_data_panoptic import own
from test_run_checkpoint import Small, config
from test_run_checkpoint import write as write_small
from test_run_folder import HERE, start

from assemble import load_clip, part_configs
from clip import CLIP, CLIPConfig, Tokenizer
from data import open_dataset
from errors import CheckpointError, TadaError
from eval import data_folder
from images.classes import read_classes
from images.panoptic import Segment, from_instances, read_annotations, read_map
from images.read import label_table, read_image, read_labels
from lab.tables import read_record
from loading.tags import read_tags
from metrics.report import move_earlier_results
from metrics.tagging import classes_named
from run.checkpoint import newest_step, read_about, read_config, read_own_state
from run.folder import Run
from run.options import tags_of_run
from run.predictions import Settings, read_list, to_do
from run.predictions import write as write_results
from run.tagging import tag_all
from tag import read_names
from weights.load import load
from weights.ram import read_lines
from weights.words import read_vectors, word_vectors

Reader = Callable[[], object]
SCENE = Image.fromarray(noise(24, 36))


# ---- what we wrote: each returns the file and how it is read


def of_step(name: str):
    def make(root: Path) -> tuple[Path, Reader]:
        write_small(root, 1)
        step = write_small(root, 2)

        def read() -> tuple:
            newest, refused = newest_step(root)
            assert (newest, len(refused)) in ((step, 0), (root / "step-000001", 1))
            about = read_about(step / "model.safetensors")
            if refused:
                raise CheckpointError(refused[0])
            return newest, about

        return step / name, read

    return make


def of_config(root: Path) -> tuple[Path, Reader]:
    """A run's settings: read to resume it, and for the data set's folder by eval.py."""
    start(root)
    write_small(root, 1)
    start(root)
    file = root / "config.json"

    def read() -> tuple:
        tags_of_run(root, "tagging")
        data_folder(root, config())
        step, about = start(root), json.loads(file.read_text())
        return step, about["options"], about["model"]

    return file, read


def of_log(root: Path) -> tuple[Path, Reader]:
    file = root / "log.jsonl"
    lines = [{"step": i, "loss": 1.5 / i, "lr": 1e-4} for i in range(1, 9)]
    file.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"step": 8, "val": {"mIoU": 0.5}}]))

    def read() -> bytes:
        Run(root, HERE).truncate_log(6)
        return file.read_bytes()

    return file, read


def of_tags(name: str):
    def make(root: Path) -> tuple[Path, Reader]:
        """All images of the training set have tags already: no tagger is asked."""
        dataset = open_dataset("folder", folder(root / "data"), "train")
        settings = SimpleNamespace(
            tags="clip", weights="random", tag_threshold=0.5, prompts=("a", "b"), box=None
        )
        tada = SimpleNamespace(
            config=settings, tagger=lambda x: [[("sea", 0.5), ("tall tree", 0.25)]] * len(x)
        )
        run = Run(root, HERE)
        tag_all(run, tada, dataset, 0, resumed=False)
        return root / name, lambda: tag_all(run, tada, dataset, 0, resumed=True)

    return make


def of_predictions(root: Path) -> tuple[Path, Reader]:
    image, settings = root / "a.png", Settings("00", {}, [1.0], False, False, {})
    SCENE.save(image)
    record = {"path": str(image), "labels": "a.png"} | settings.of(str(image), ["sea"])
    record |= {"size": [24, 36], "tags": ["sea"], "shares": {"sea": 0.75, "sky": 0.25}}
    out = root / "out"
    out.mkdir()
    write_results(out, "a", record, {".overlay.jpg": b"", ".png": b""}, rank=0)

    def read() -> dict:
        if to_do({str(image): "a"}, {str(image): ["sea"]}, out, settings):
            raise TadaError("the image is predicted again")
        return read_list(out)

    return out / "predictions.jsonl", read


def of_vectors(root: Path) -> tuple[Path, Reader]:
    for part in ("clip", "tokenizer"):
        shutil.copytree(f"weights/tiny/{part}", root / part)
    clip, tokenizer = load_clip(CLIPConfig.tiny(), root)
    word_vectors(str(root), clip, tokenizer, ("sea", "snow"), 1)
    (file,) = (root / ".vectors").iterdir()

    def read() -> list:
        vectors = read_vectors(file)
        if vectors is None:
            raise TadaError("they are computed again")
        return vectors.tolist()

    return file, read


def of_tokenizer(name: str):
    def make(root: Path) -> tuple[Path, Reader]:
        shutil.copytree("weights/tiny/tokenizer", root, dirs_exist_ok=True)
        return root / name, lambda: Tokenizer(root).bpe.to_str()

    return make


def of_scale(name: str):
    def make(root: Path) -> tuple[Path, Reader]:
        shutil.copytree("weights/tiny/vae", root / "vae")
        return root / "vae" / name, lambda: part_configs("tiny", root)

    return make


CHECKED = {
    **{
        f"step: {x}": of_step(x)
        for x in ("model.safetensors", "train.safetensors", "train.json", "sha256.json")
    },
    "run: config.json": of_config,
    **{f"run: {x}": of_tags(x) for x in ("tags-train.jsonl", "tags-train.sha256")},
    "predictions.jsonl": of_predictions,
    ".vectors": of_vectors,
    **{f"tokenizer: {x}": of_tokenizer(x) for x in ("vocab.json", "merges.txt")},
    **{f"tiny: vae/{x}": of_scale(x) for x in ("config.json", "sha256.json")},
}


# ---- what users bring, or what only a drawing or a message shows


def of_lone_model(root: Path) -> tuple[Path, Reader]:
    """A model.safetensors without the sha256.json of its step, used with a warning."""
    file, small = root / "mine.safetensors", Small(2)
    shutil.copy(write_small(root, 2) / "model.safetensors", file)

    def read() -> tuple:
        settings = read_config(read_about(file)["config"], file)
        return settings, read_own_state(small, file)["x"].tolist()

    return file, read


def of_weights(root: Path) -> tuple[Path, Reader]:
    """Weights from elsewhere: the header, and the first values."""
    file = root / "model.safetensors"
    shutil.copy("weights/tiny/clip/model.safetensors", file)
    with torch.device("meta"):
        clip = CLIP(CLIPConfig.tiny())
    return file, lambda: load(clip, file).logit_scale.item()


def of_result(root: Path) -> tuple[Path, Reader]:
    file = root / "out" / "result.json"
    file.parent.mkdir()
    file.write_text(json.dumps({"mIoU": 0.5, "sha256": "00", "classes": {"sea": 0.5, "sky": None}}))

    def read() -> bool:
        moved = move_earlier_results(file.parent)
        shutil.move(moved / file.name, file)
        moved.rmdir()
        return True

    return file, read


def of_text(name: str, text: str, read: Callable[[Path], object]):
    def make(root: Path) -> tuple[Path, Reader]:
        file = root / name
        file.write_text(text, encoding="utf-8")
        return file, lambda: read(file)

    return make


def of_annotations(root: Path) -> tuple[Path, Reader]:
    file = own(root) / "annotations/panoptic_val.json"

    def read() -> list:
        annotations = read_annotations(file)
        return [(annotations.segments(i), annotations.pngs[i]) for i in range(len(annotations))]

    return file, read


def of_instances(root: Path) -> tuple[Path, Reader]:
    file, box = root / "instances.json", [2, 2, 20, 2, 20, 15, 2, 15]
    content = {"categories": [{"id": 5, "name": "car"}], "images": [], "annotations": []}
    content["images"].append({"id": 1, "file_name": "a.jpg", "height": 24, "width": 36})
    for shape in ([box], {"size": [24, 36], "counts": [100, 60, 704]}):
        entry = {"image_id": 1, "category_id": 5, "iscrowd": 0, "segmentation": shape}
        content["annotations"].append(entry)
    file.write_text(json.dumps(content))

    def read() -> tuple:
        shutil.rmtree(root / "out", ignore_errors=True)
        found = from_instances(file, root / "out" / "panoptic_train.json")
        return found, (root / "out" / "panoptic_train.json").read_text()

    return file, read


def of_ids(root: Path) -> tuple[Path, Reader]:
    file = own(root) / "annotations/panoptic_val/1.png"
    segments = [Segment(id, 0, True) for id in (70_000, 1, 300, 4)]
    return file, lambda: read_map(file, segments).tobytes()


def of_labels(suffix: str):
    def make(root: Path) -> tuple[Path, Reader]:
        labels = np.random.default_rng(0).integers(0, 5, (3, 4), dtype=np.uint8).repeat(8, 0).repeat(9, 1)
        file, table = save(labels, root / f"x{suffix}"), label_table(range(5), [])
        return file, lambda: read_labels(file, table).tobytes()

    return make


def of_image(suffix: str, **options):
    def make(root: Path) -> tuple[Path, Reader]:
        exif = Image.Exif()
        exif[0x0112], exif[0x010E] = 6, "a drawing"
        file = root / f"x{suffix}"
        SCENE.save(file, **options | ({"exif": exif} if suffix in (".jpg", ".png", ".webp", ".tif") else {}))

        def read() -> tuple:
            image, size = read_image(file, 12, 48)
            return image.tobytes(), size

        return file, read

    return make


LINE = {"image": "a.jpg", "tags": [["car", 0.93], "sky"], "caption": "a car below the sky"}
RECORD = Path("weights/tiny/ablation.jsonl").read_text().splitlines(keepends=True)
CLASSES = "ignore, 0 0 0\nsea, 0 0 255\nStraße, 128 64 128, 7\ntall tree\n"
BROUGHT = {
    "lone model.safetensors": of_lone_model,
    "official weights": of_weights,
    "log.jsonl": of_log,
    "result.json": of_result,
    "classes.txt": of_text("classes.txt", CLASSES, lambda file: str(read_classes(file))),
    "file of tags": of_text(
        "tags.jsonl", json.dumps(LINE) + "\n", lambda file: read_tags(file, "/x", ["a.jpg"])
    ),
    "file of names": of_text("names.txt", "sea\nStraße\ntall tree\n", lambda file: read_names(str(file))),
    "synonyms": of_text(
        "synonyms.txt", "# x\nsea: water, ocean\n", lambda file: classes_named(["sea"], file)
    ),
    "RAM's tags": of_text("names.txt", "sea\nsky\ntall tree\n", lambda file: read_lines(file, 3)),
    "record of ablations": of_text("runs.jsonl", "".join(RECORD[:2]), read_record),
    "panoptic JSON": of_annotations,
    "instances JSON": of_instances,
    "panoptic PNG": of_ids,
    **{f"labels {x}": of_labels(x) for x in (".png", ".bmp", ".tif")},
    **{f"image {x}": of_image(x) for x in (".jpg", ".png", ".bmp", ".tif", ".webp", ".gif", ".avif")},
    "image .jpg, progressive": of_image(".jpg", progressive=True),
    "image .tif, LZW": of_image(".tif", compression="tiff_lzw"),
}


HEADER = 17_000  # bytes of the weights that are mutated: those that hold the names, and a few more


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr("run.files.sync", lambda path: None)  # thousands of files are written


def report(name: str, make, root: Path, count: int, upto: int | None = None):
    file, read = make(root)
    counts = fuzz(file, read, count, upto)
    print(f"{name} | {count} | {counts.refused} | {counts.same} | {counts.used} | {len(counts.wrong)}")
    assert not counts.wrong, "\n".join(counts.wrong[:10])
    return counts


COUNTS = [200, pytest.param(2000, marks=pytest.mark.sweep)]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", CHECKED)
def test_what_we_wrote_is_the_same_or_refused(name, count, tmp_path):
    counts = report(name, CHECKED[name], tmp_path, count)
    assert not counts.used and counts.refused > count / 2


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", BROUGHT)
def test_what_users_bring_is_read_or_refused(name, count, tmp_path):
    counts = report(name, BROUGHT[name], tmp_path, count, HEADER if name == "official weights" else None)
    assert counts.refused or counts.used
