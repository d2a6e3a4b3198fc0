"""predict.py: its label maps are the model's, for any image; nothing is overwritten, nothing is done twice;
words steer; and where each word is attended to.
"""

import fcntl
import json
import multiprocessing
import os
import re
import runpy
import socket
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, replace
from io import BytesIO
from pathlib import Path
from time import sleep
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import inference
import kernels
import predict as module
from assemble import build
from clip import CLIP
from errors import DataError, ModelError, TadaError, WeightsError
from images import draw, scenes
from images.panoptic import from_colours
from images.read import find_images, label_table, read_labels
from loading.augment import evaluation, model_input, normalise
from loading.tags import LONGEST_TAG, choose_words
from model import Tada, TadaConfig
from predict import load_model, main, predict_image
from run.checkpoint import FACTS, HASHES, MODEL, TENSORS, save_model
from run.predictions import tidy
from weights.words import digest

ROOT = Path(__file__).parents[1]
CONFIG = TadaConfig(
    classes=scenes.CLASSES,
    palette=tuple(tuple(map(int, colour)) for colour in scenes.PALETTE),
    model="tiny",
    dataset="scenes",
    crop=(64, 64),
    box=(64, 128),
    stride=(43, 43),
    dropout=0.0,
    tags="clip",
)


def restless(config: TadaConfig) -> Tada:
    """A random model that sees many classes, and whose words matter: what starts at 0 or 1 is moved."""
    torch.manual_seed(0)
    tada = build(config).eval()
    with torch.no_grad():
        for parameter in tada.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
        last = [layer for layer in tada.decoder.modules() if isinstance(layer, nn.Conv2d)][-1]
        last.weight.normal_()
        image, words = 2 * torch.rand(1, 3, 64, 128) - 1, [["sea", "boat"]]
        last.bias -= tada.decoder.logits(tada(image, words).prediction, (64, 128)).mean((0, 2, 3))
    return tada


pytestmark = pytest.mark.usefixtures("one_thread")  # sums in one order, also in the processes started


@pytest.fixture(scope="module")
def steered(tmp_path_factory, one_thread) -> str:
    """Condition tagging, tags by CLIP: the embedded default."""
    file = tmp_path_factory.mktemp("steered") / "model.safetensors"
    save_model(restless(CONFIG), file, {}, {})
    return str(file)


@pytest.fixture(scope="module")
def tada(steered) -> Tada:
    return load_model(steered)


def stub(folder: Path, **changes) -> str:
    """A checkpoint that says what it is and holds nothing: what is refused is refused before it is loaded."""
    about = {"format": 1, "config": asdict(replace(CONFIG, **changes)), "frozen": {}, "metrics": {}}
    file = folder / "stub.safetensors"
    save_file({"x": torch.zeros(1)}, file, metadata={"tada": json.dumps(about)})
    return str(file)


def noise(*size: int) -> np.ndarray:
    """A smooth random image `(H, W, 3)` uint8."""
    H, W = size
    small = np.random.default_rng(H * W).integers(0, 256, (5, 6, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((W, H), Image.Resampling.BICUBIC))


def truncated() -> Image.Image:
    """A file that Pillow opens, and cannot decode."""
    file = BytesIO()
    Image.fromarray(noise(40, 40)).save(file, "PNG")
    return Image.open(BytesIO(file.getvalue()[:-40]))


def save(path: Path, pixels: np.ndarray | None = None, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(60, 90) if pixels is None else pixels).save(path, **options)
    return path


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]


def results(out: Path) -> list[str]:
    """Every visible file below `out`."""
    files = (path.relative_to(out) for path in out.rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in files if not path.name.startswith("."))


def labels(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        assert image.mode == "P" and image.format == "PNG"
        return np.asarray(image)


# ---- the label map


@pytest.mark.parametrize("ways", [[], ["--scales", "1", "1.5", "--flip"]])
def test_the_label_map_is_the_model_s(steered, tada, tmp_path, ways):
    """Read as eval.py reads it: resized into the box, in windows, at the image's own size."""
    picture = save(tmp_path / "beach.png", noise(300, 500))
    out = tmp_path / "out"
    assert (
        main([steered, str(picture), "--out", str(out), "--words", " sea, fishing  boat,,Sea ", *ways]) == 0
    )
    assert results(out) == ["beach.overlay.jpg", "beach.png", "predictions.jsonl"]

    whole = Image.open(picture), np.zeros((300, 500), np.uint8)
    small = normalise(evaluation(*whole, 64, 128)[0][None])
    assert small.shape[2:] == (64, 107)
    seen, scales = (
        (small, [1.0]) if not ways else (normalise(evaluation(*whole, None, None)[0][None]), [1, 1.5])
    )
    words = [["sea", "fishing boat"]]
    expected = inference.predict(
        tada,
        seen,
        words,
        size=(300, 500),
        base=(64, 107),
        window=(64, 64),
        stride=(43, 43),
        scales=scales,
        flip=bool(ways),
    ).labels[0]
    found = labels(out / "beach.png")
    assert len(np.unique(found)) > 5
    assert np.array_equal(found, expected.numpy())

    (line,) = lines(out)
    assert line["path"] == str(picture) and line["labels"] == "beach.png" and line["size"] == [300, 500]
    assert line["tags"] == words[0] and line["checkpoint"] == digest(Path(steered))
    assert sum(line["shares"].values()) == pytest.approx(1, abs=1e-9)
    shares = {scenes.CLASSES[k]: (found == k).mean() for k in np.unique(found)}
    assert line["shares"] == pytest.approx(shares)
    assert list(line["shares"].values()) == sorted(shares.values(), reverse=True)


@pytest.fixture(scope="module")
def surest(tmp_path_factory, one_thread) -> tuple[str, Tada]:
    """A random mask2former that is sure of its segments: its file, and itself."""
    things = tuple(name in scenes.THINGS for name in scenes.CLASSES)
    torch.manual_seed(0)
    tada = build(replace(CONFIG, decoder="mask2former", things=things, adapter_start="empty")).eval()
    with torch.no_grad():
        tada.decoder.class_head.weight.mul_(20)  # so that queries are sure,
        for i in (0, 2, 4):
            tada.decoder.mask_head[i].bias.normal_(std=0.5)  # and their masks large
    file = tmp_path_factory.mktemp("surest") / "model.safetensors"
    save_model(tada, file, {}, {})
    return str(file), tada


def test_segments_are_the_model_s(surest, tmp_path, monkeypatch):
    """Of mask2former: the map of ids in COCO's colours, a line of what they are; done once."""
    file, tada = surest
    picture, out = save(tmp_path / "1.png"), tmp_path / "out"
    assert main([file, str(picture), "--out", str(out)]) == 0
    assert results(out) == ["1.overlay.jpg", "1.png", "1.segments.png", "predictions.jsonl"]

    image = model_input(Image.open(picture), (64, 96))
    found = inference.segment(tada, image, [lines(out)[0]["tags"]], size=(60, 90))
    ids, segments = found.panoptic[0]
    assert segments, "the model finds something"
    with Image.open(out / "1.segments.png") as written:
        assert np.array_equal(from_colours(np.asarray(written)), ids.numpy())
    assert np.array_equal(labels(out / "1.png"), found.labels[0].numpy())
    said = [(x["id"], x["class"], x["score"]) for x in lines(out)[0]["segments"]]
    assert said == [(s.id, scenes.CLASSES[s.label], pytest.approx(s.score, rel=1e-5)) for s in segments]

    monkeypatch.setattr(module, "read_model", None)  # nothing is left to do
    assert main([file, str(picture), "--out", str(out)]) == 0
    (out / "1.segments.png").unlink()
    with pytest.raises(TypeError):
        main([file, str(picture), "--out", str(out)])


def test_score_and_overlap_say_what_a_segment_is(surest, tmp_path, monkeypatch):
    """Each as `Tada.segment` takes it; read otherwise, an image is done anew."""
    file, tada = surest
    picture, out = save(tmp_path / "1.png"), tmp_path / "out"
    image = model_input(Image.open(picture), (64, 96))
    usual = inference.segment(tada, image, [["sea"]], size=(60, 90)).panoptic[0].ids
    command = [file, str(picture), "--out", str(out), "--words", "sea"]
    for how in ({"score": 0.9999}, {"overlap": 0.1}):
        flags = [x for name, value in how.items() for x in (f"--{name}", str(value))]
        assert main([*command, *flags]) == 0
        expected = inference.segment(tada, image, [["sea"]], size=(60, 90), **how).panoptic[0]
        with Image.open(out / "1.segments.png") as written:
            assert np.array_equal(from_colours(np.asarray(written)), expected.ids.numpy())
        assert not torch.equal(expected.ids, usual)
    monkeypatch.setattr(module, "read_model", None)
    assert main([*command, *flags]) == 0  # nothing is left to do
    with pytest.raises(TypeError):
        main(command)


def test_a_map_of_ids_overwrites_nothing(tmp_path, capsys):
    """Neither another image's labels, nor what another program wrote; and there are no windows."""
    file = stub(tmp_path, decoder="mask2former", things=(True,) * len(scenes.CLASSES))
    save(tmp_path / "in" / "1.png"), save(tmp_path / "in" / "1.segments.png")
    assert main([file, str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 2
    assert "1.segments.png is another image's label map" in capsys.readouterr().err
    save(tmp_path / "other" / "1.segments.png")
    assert main([file, str(tmp_path / "in" / "1.png"), "--out", str(tmp_path / "other")]) == 2
    assert "give another --out" in capsys.readouterr().err
    assert main([file, str(tmp_path / "in"), "--flip"]) == 2
    assert "--flip: mask2former reads an image whole" in capsys.readouterr().err


def test_how_segments_are_read_is_mask2formers_alone(tmp_path, capsys):
    """--score and --overlap; their defaults are those of eval.py, and its sentence."""
    picture, out = str(save(tmp_path / "x.jpg")), tmp_path / "out"
    for flag in ("score", "overlap"):
        assert main([stub(tmp_path), picture, "--out", str(out), "--words", "sea", f"--{flag}", "0.8"]) == 2
        assert capsys.readouterr().err == (
            f"predict.py: --{flag} is for mask2former's segments, this decoder is fpn: leave it out\n"
        )
    assert not out.exists()
    with pytest.raises(SystemExit):
        main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "minimum probability of a segment's class (default: 0.8, Mask2Former's; ODISE's is 0.0)" in said
    assert "that a segment keeps after overlaps (default: 0.8)" in said


def test_the_words_are_those_that_clip_finds(steered, tada, tmp_path):
    """In the whole image; --words take their place, and changes what is seen."""
    picture = save(tmp_path / "x.png", noise(140, 400))
    assert main([steered, str(picture), "--out", str(tmp_path / "a")]) == 0
    (line,) = lines(tmp_path / "a")
    image = normalise(evaluation(Image.open(picture), np.zeros((140, 400), np.uint8), 64, 128)[0][None])
    expected = [word for word, _ in tada.zero_shot_tags(image)[0]]
    assert line["tags"] == expected and line["asked"] is None
    own = inference.predict(
        tada, image, [expected], size=(140, 400), window=(64, 64), stride=(43, 43)
    ).labels[0]
    assert np.array_equal(labels(tmp_path / "a" / "x.png"), own.numpy())

    assert main([steered, str(picture), "--out", str(tmp_path / "b"), "--words", "tractor"]) == 0
    assert lines(tmp_path / "b")[0]["tags"] == ["tractor"]
    assert not np.array_equal(labels(tmp_path / "b" / "x.png"), own.numpy())


def rotated(path: Path) -> tuple[int, int]:
    """Stored lying on its side; EXIF says how to turn it. (H, W) upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    save(path, np.rot90(noise(70, 40)), exif=exif)  # 6: turn clockwise
    return 70, 40


def sixteen_bits(path: Path) -> tuple[int, int]:
    Image.fromarray(np.arange(40 * 30, dtype=np.uint16).reshape(40, 30) * 54).save(path)
    return 40, 30


def mode(name: str, size: tuple[int, int]):
    def write(path: Path) -> tuple[int, int]:
        Image.fromarray(noise(*size)).convert(name).save(path)
        return size

    return write


ANY = {
    "one.png": mode("RGB", (1, 1)),
    "flat.png": mode("RGB", (1, 400)),
    "thin.png": mode("RGB", (400, 1)),
    "grey.jpg": mode("L", (50, 70)),
    "cmyk.jpg": mode("CMYK", (50, 70)),
    "rgba.png": mode("RGBA", (50, 70)),
    "palette.bmp": mode("P", (50, 70)),
    "bits.png": mode("1", (50, 70)),
    "deep.png": sixteen_bits,
    "turned.jpg": rotated,
    "größe 字 [1].webp": mode("RGB", (33, 65)),
    "x" * 240 + ".tif": mode("RGB", (33, 65)),
}


def test_any_image(steered, tmp_path):
    """The label map has the image's size, upright; what is drawn can be opened and read."""
    (tmp_path / "in").mkdir()
    sizes = {Path(name).stem: write(tmp_path / "in" / name) for name, write in ANY.items()}
    out = tmp_path / "out"
    assert main([steered, str(tmp_path / "in"), "--out", str(out), "--words", "sea", "--attention"]) == 0
    assert {Path(line["labels"]).stem: tuple(line["size"]) for line in lines(out)} == sizes
    for name, size in sizes.items():
        assert labels(out / f"{name}.png").shape == size
        for ending in ("overlay", "attention"):
            with Image.open(out / f"{name}.{ending}.jpg") as drawn:
                assert drawn.mode == "RGB" and max(drawn.size) >= 512
                drawn.load()


def test_a_rotated_image_is_read_upright(steered, tmp_path):
    """The same pixels, stored lying and stored standing."""
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / "lying.png", np.rot90(noise(150, 90)), exif=exif)
    save(tmp_path / "standing.png", noise(150, 90))
    out = tmp_path / "out"
    assert main([steered, *map(str, tmp_path.glob("*.png")), "--out", str(out), "--words", "sea"]) == 0
    assert np.array_equal(labels(out / "lying.png"), labels(out / "standing.png"))


@pytest.mark.slow
def test_a_large_photograph(steered, ram, tmp_path):
    """14 megapixels: the label map at its size, the overlay small, memory bounded."""
    command = [sys.executable, "predict.py", steered, str(ram / "images" / "demo3.jpg")]
    # Not getrusage's ru_maxrss, which a process inherits from the one that started it.
    measure = (
        "import sys, predict; code = predict.main(sys.argv[1:]); status = open('/proc/self/status').read()"
    )
    measure += "; print(status.split('VmHWM:')[1].split()[0]); sys.exit(code)"
    command = [sys.executable, "-c", measure, *command[2:], "--out", str(tmp_path), "--attention"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert int(said.split()[-1]) < 2 * 2**20  # KiB
    assert labels(tmp_path / "demo3.png").shape == (4288, 3216)
    assert max(Image.open(tmp_path / "demo3.overlay.jpg").size) <= 1600


# ---- many images, many names


def test_folders_and_globs_are_mirrored(steered, tmp_path):
    """Hidden files, other files and links that lead back are left out."""
    photos = tmp_path / "photos"
    for name in ("top.jpg", "a/1.PNG", "a/deep/2.jpeg", ".hidden.jpg", ".cache/4.jpg"):
        save(photos / name)
    (photos / "notes.txt").write_text("no image")
    (photos / "a" / "back").symlink_to(photos)
    (photos / "linked").symlink_to(save(tmp_path / "elsewhere" / "5.jpg").parent)
    names = ["a/1", "a/deep/2", "linked/5", "top"]
    out = tmp_path / "out"
    assert main([steered, str(photos), "--out", str(out), "--words", "sea"]) == 0
    assert [line["labels"] for line in lines(out)] == [f"{name}.png" for name in names]
    assert results(out) == sorted(
        ["predictions.jsonl", *(f"{name}{end}" for name in names for end in (".png", ".overlay.jpg"))]
    )
    out = tmp_path / "globbed"
    assert main([steered, str(photos / "*" / "*.*"), "--out", str(out), "--words", "sea"]) == 0
    assert [line["labels"] for line in lines(out)] == ["a/1.png", "linked/5.png"]


@pytest.mark.parametrize(
    ("inputs", "names"),
    [
        (["a"], {"a/1.jpg": "1", "a/1.png": "1.png", "a/2.png": "2"}),
        (["a/1.png"], {"a/1.png": "1"}),
        (["a/2.png", "b"], {"a/2.png": "a/2", "b/1.jpg": "b/1"}),
        (["a/1.jpg", "b/1.jpg"], {"a/1.jpg": "a/1", "b/1.jpg": "b/1"}),
        (["a", "b"], {"a/1.jpg": "a/1", "a/1.png": "a/1.png", "a/2.png": "a/2", "b/1.jpg": "b/1"}),
        (["a", "a/2.png", "a"], {"a/1.jpg": "1", "a/1.png": "1.png", "a/2.png": "2"}),
        (["*/1.jpg"], {"a/1.jpg": "a/1", "b/1.jpg": "b/1"}),
        (["**/2*"], {"a/2.png": "a/2"}),
        (["a", "b", "c"], "all"),
    ],
)
def test_no_two_images_share_a_name(tmp_path, inputs, names):
    """1.jpg next to 1.png; 1.jpg in two folders; case alone does not tell two files apart on every disk."""
    for name in ("a/1.jpg", "a/1.png", "a/2.png", "b/1.jpg", "c/X.jpg", "c/x.jpg", "c/x.png.jpg", "c/x.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    given = find_images([str(tmp_path / x) for x in inputs], tmp_path / "out", {})
    assert len({name.lower() for name in given.values()}) == len(given)
    if names == "all":
        assert len(given) == 8 and given[str(tmp_path / "c/x.png")] == "c/x.png"
    else:
        assert given == {str(tmp_path / path): name for path, name in names.items()}


def test_what_another_run_or_program_wrote_stays(steered, tmp_path, capsys):
    """b/1.jpg after a/1.jpg keeps its suffix; a third is refused, as is a place that is someone else's."""
    pictures = [save(tmp_path / x / "1.jpg", noise(40, 50 + i)) for i, x in enumerate("abc")]
    out = tmp_path / "out"
    arguments = ["--out", str(out), "--words", "sea"]
    for picture in pictures[:2]:
        assert main([steered, str(picture), *arguments]) == 0
    assert [(line["path"], line["labels"]) for line in lines(out)] == [
        (str(pictures[1]), "1.jpg.png"),
        (str(pictures[0]), "1.png"),
    ]
    assert labels(out / "1.png").shape == (40, 50) and labels(out / "1.jpg.png").shape == (40, 51)
    assert main([steered, str(pictures[2]), *arguments]) == 2
    assert f"{pictures[2]} and {pictures[0]} would share 1.png" in capsys.readouterr().err

    drawing = save(out / "mine.png").read_bytes()
    assert main([steered, str(save(tmp_path / "mine.jpg")), *arguments]) == 2
    assert "mine.png exists and predictions.jsonl has no line for it" in capsys.readouterr().err
    assert (out / "mine.png").read_bytes() == drawing


def test_a_folder_may_have_the_name_of_a_result(steered, tmp_path, capsys):
    """The image beside it keeps its suffix; where the result came first, all is refused at the start."""
    for name in ("x.jpg", "x.png/1.jpg", "y.jpg", "y.overlay.jpg/1.jpg", "z.jpg"):
        save(tmp_path / "in" / name)
    out = tmp_path / "out"
    arguments = [steered, str(tmp_path / "in"), "--out", str(out), "--words", "sea"]
    for done in ("5 predicted, 0 skipped", "0 predicted, 5 skipped"):
        assert main(arguments) == 0
        assert done in capsys.readouterr().out
    stems = ("x.jpg", "x.png/1", "y.jpg", "y.overlay.jpg/1", "z")
    files = [f"{stem}{ending}" for stem in stems for ending in (".overlay.jpg", ".png")]
    assert results(out) == sorted([*files, "predictions.jsonl"])
    save(tmp_path / "in" / "z.png" / "1.jpg")
    assert main(arguments) == 2
    assert (
        f"{out / 'z.png'} is a link, which is not followed, or a file: give another --out"
        in capsys.readouterr().err
    )
    assert results(out) == sorted([*files, "predictions.jsonl"])


@pytest.mark.parametrize(
    "content", [b'{"id": 1}\n{"id": 2}\n', b'{"id": 1}\n', b'{"id": 1}', b"gr\xf6\xdfe\n"]
)
def test_a_list_that_another_program_wrote_stays(tmp_path, capsys, content):
    file = tmp_path / "out" / "predictions.jsonl"
    file.parent.mkdir()
    file.write_bytes(content)
    command = [stub(tmp_path), str(save(tmp_path / "1.jpg")), "--out", str(file.parent), "--words", "sea"]
    assert main(command) == 2
    assert "predictions.jsonl, line 1, is not of predict.py" in capsys.readouterr().err
    assert file.read_bytes() == content


@pytest.mark.parametrize("ending", [".png", ".overlay.jpg", ".attention.jpg"])
def test_no_file_of_another_program_is_overwritten(tmp_path, capsys, ending):
    foreign = save(tmp_path / "out" / f"1{ending}")
    before = foreign.read_bytes()
    command = [
        stub(tmp_path),
        str(save(tmp_path / "1.jpg")),
        "--out",
        str(tmp_path / "out"),
        "--words",
        "sea",
    ]
    assert main([*command, "--attention"]) == 2
    sentence = f"{foreign} exists and predictions.jsonl has no line for it: give another --out"
    assert sentence in capsys.readouterr().err and foreign.read_bytes() == before


def test_results_are_no_inputs(steered, tmp_path, capsys):
    """--out inside the folder that is read is left out of it; --out that holds the input is refused."""
    save(tmp_path / "x.png")
    inside = ["--out", str(tmp_path / "seen"), "--words", "sea"]
    for _ in range(2):
        assert main([steered, str(tmp_path), *inside]) == 0
        assert results(tmp_path / "seen") == ["predictions.jsonl", "x.overlay.jpg", "x.png"]
    for asked in (tmp_path, tmp_path / "x.png", tmp_path / "*.png"):
        before = (tmp_path / "x.png").read_bytes()
        assert main([steered, str(asked), "--out", str(tmp_path), "--words", "sea"]) == 2
        assert f"{asked} has no image" in capsys.readouterr().err
        assert (tmp_path / "x.png").read_bytes() == before


def test_what_is_done_is_skipped(steered, tmp_path, capsys):
    """By the same model, words and way, with all files there, and the image unchanged since."""
    pictures = [save(tmp_path / f"{i}.png", noise(8, 12 + i)) for i in range(2)]
    out = tmp_path / "out"

    def again(*flags: str, model: str = steered, tags: str = "sea", inputs: list[Path] = pictures[:1]) -> str:
        assert main([model, *map(str, inputs), "--out", str(out), "--words", tags, *flags]) == 0
        said = capsys.readouterr().out.splitlines()
        return next(line.removeprefix(f"{out}: ") for line in said if " skipped, " in line)

    new, old = "1 predicted, 0 skipped, 0 unreadable", "0 predicted, 1 skipped, 0 unreadable"
    assert again(inputs=pictures) == "2 predicted, 0 skipped, 0 unreadable"
    before = {name: (out / name).stat().st_mtime_ns for name in ("0.png", "0.overlay.jpg")}
    assert again() == old
    (out / "1.overlay.jpg").unlink()
    assert again(inputs=pictures) == "1 predicted, 1 skipped, 0 unreadable"
    assert before == {name: (out / name).stat().st_mtime_ns for name in before}
    for time in (2e9, 1e9):  # replaced by a newer one, by an older one
        os.utime(pictures[0], (time, time))
        assert again() == new
        assert again() == old
    save(pictures[0], noise(9, 13))  # by one that lies about its age
    os.utime(pictures[0], (1e9, 1e9))
    assert again() == new
    assert again("--attention") == new
    assert again() == old
    assert again(tags="sea,boat") == new
    assert again("--flip", tags="sea,boat") == new
    assert [line["tags"] for line in lines(out)] == [["sea", "boat"], ["sea"]]  # one line each

    other = load_model(steered)
    with torch.no_grad():
        next(iter(other.decoder.parameters())).add_(0.1)
    save_model(other, tmp_path / "other.safetensors", {}, {})
    assert again("--flip", tags="sea, boat", model=str(tmp_path / "other.safetensors")) == new


def test_after_a_crash(steered, tmp_path, capsys):
    """A truncated line, a temporary file, a line without label map: cleaned up."""
    for i in range(3):
        save(tmp_path / "in" / f"{i}.jpg")
    out = tmp_path / "out"
    arguments = [steered, str(tmp_path / "in"), "--out", str(out), "--words", "sea"]
    assert main(arguments) == 0
    complete = lines(out)
    text = (out / "predictions.jsonl").read_text().splitlines(keepends=True)
    (out / "predictions.jsonl").write_text("".join(text) + text[2][:30])
    (out / "2.png").unlink()
    (out / "0.png").unlink(), (out / "0.overlay.jpg").unlink()
    for name in (".predictions.jsonl.tmp-7", ".tmp-predictions.jsonl"):
        (out / name).write_text("half a file")
    (out / ".tmp-7").write_text("another program's")
    assert main([steered, str(tmp_path / "in" / "1.jpg"), *arguments[2:]]) == 0
    assert lines(out) == complete[1:]  # of 2 the overlay is there: it is ours
    capsys.readouterr()
    assert main(arguments) == 0
    assert "2 predicted, 1 skipped" in capsys.readouterr().out
    assert lines(out) == complete
    assert sorted(path.name for path in out.glob(".*")) == [".lock", ".tmp-7"]


def test_a_crash_between_two_files_is_resumed(steered, tmp_path, monkeypatch):
    """The overlay exists and no label map: the line makes it ours."""
    arguments = [steered, str(save(tmp_path / "1.jpg")), "--out", str(tmp_path / "out"), "--words", "sea"]
    real = os.replace

    def crash(source, target):
        if str(target).endswith("1.png"):
            raise SystemExit
        real(source, target)

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(SystemExit):
        main(arguments)
    assert results(tmp_path / "out") == ["1.overlay.jpg", "predictions.jsonl"]
    monkeypatch.undo()
    assert main(arguments) == 0
    assert results(tmp_path / "out") == ["1.overlay.jpg", "1.png", "predictions.jsonl"]


def test_a_crash_before_the_line_skips_nothing(steered, tmp_path, monkeypatch, capsys):
    """A result made anew with other words: its old files are removed before the new line is written."""
    arguments = [steered, str(save(tmp_path / "1.jpg")), "--out", str(tmp_path / "out"), "--words"]
    assert main([*arguments, "sea"]) == 0

    def crash(out, *rest, **more):
        assert not (out / "1.png").exists()
        raise SystemExit

    monkeypatch.setattr(module, "write", crash)
    with pytest.raises(SystemExit):
        main([*arguments, "boat"])
    monkeypatch.undo()
    capsys.readouterr()
    assert main([*arguments, "sea"]) == 0
    assert "1 predicted, 0 skipped" in capsys.readouterr().out


def test_images_of_one_size_are_read_together(steered, tmp_path, monkeypatch):
    """Twelve images, one damaged, one of another size: the lines and files of one by one, in order; CLIP sees
    each image once; with --attention, whose tags differ in number.
    """
    for i in range(12):
        save(tmp_path / "in" / f"{i:02}.png", noise(64, 100 if i == 5 else 96) // (i + 1))
    (tmp_path / "in" / "03.png").write_bytes(b"")
    calls, forward, encode = {"model": [], "clip": []}, Tada.forward, CLIP.image
    monkeypatch.setattr(
        Tada, "forward", lambda t, x, *rest: calls["model"].append(len(x)) or forward(t, x, *rest)
    )
    monkeypatch.setattr(CLIP, "image", lambda c, x: calls["clip"].append(len(x)) or encode(c, x))
    save_model(restless(replace(CONFIG, crop=(64, 128))), tmp_path / "wide.safetensors", {}, {})
    calls["clip"].clear()
    calls["model"].clear()
    command = [str(tmp_path / "wide.safetensors"), str(tmp_path / "in"), "--out"]
    assert main([*command, str(tmp_path / "together")]) == 1
    assert calls == {"model": [4, 1, 6], "clip": [4, 1, 6]}
    assert main([*command, str(tmp_path / "attention"), "--attention"]) == 1
    calls["model"].clear()
    monkeypatch.setitem(inference.BATCH, "cpu", 1)
    assert main([*command, str(tmp_path / "alone"), "--attention"]) == 1
    assert calls["model"] == [1] * 11
    assert results(tmp_path / "attention") == results(tmp_path / "alone")
    together, alone = (lines(tmp_path / out) for out in ("attention", "alone"))
    assert len({len(line["tags"]) for line in alone}) > 1
    for ours, line in zip(together, alone, strict=True):
        assert [ours[key] for key in ("path", "labels", "tags")] == [
            line[key] for key in ("path", "labels", "tags")
        ]
        a, b, c = (labels(tmp_path / out / line["labels"]) for out in ("together", "attention", "alone"))
        assert np.array_equal(a, b) and (a != c).mean() < 1e-3  # ties by rounding


def test_other_scales_have_features_of_their_own(steered, tmp_path, monkeypatch):
    """CLIP's features of the image at the model's size are no other size's."""
    kept, real = [], inference.predict

    def record(*args, seen, **how):
        kept.append(seen is not None)
        return real(*args, seen=seen, **how)

    monkeypatch.setattr(inference, "predict", record)
    command = [steered, str(save(tmp_path / "1.png")), "--out", str(tmp_path / "out")]
    assert main(command) == main([*command, "--scales", "2"]) == 0
    assert kept == [True, False]


def test_no_attention_of_other_words_is_left(steered, tmp_path):
    """A drawing that this result lacks goes with the result it belonged to."""
    arguments = [steered, str(save(tmp_path / "1.jpg")), "--out", str(tmp_path / "out"), "--words"]
    assert main([*arguments, "sea", "--attention"]) == 0
    assert main([*arguments, "boat"]) == 0
    assert results(tmp_path / "out") == ["1.overlay.jpg", "1.png", "predictions.jsonl"]


def test_ctrl_c_keeps_what_is_done(steered, tmp_path, capsys, monkeypatch):
    """The images that threads were drawing at that time are predicted again."""
    for i in range(8):
        save(tmp_path / "in" / f"{i}.jpg", noise(60, 90 + i))  # of sizes of their own: one by one
    real = module.read_image

    def interrupted(path, *box):
        if path.endswith("7.jpg"):
            raise KeyboardInterrupt
        return real(path, *box)

    monkeypatch.setattr(module, "read_image", interrupted)
    arguments = [steered, str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--words", "sea"]
    assert main(arguments) == 130
    assert "results stay" in capsys.readouterr().err
    done = [line["labels"] for line in lines(tmp_path / "out")]
    assert done and done == [f"{i}.png" for i in range(len(done))]
    monkeypatch.undo()
    assert main(arguments) == 0
    assert f"{8 - len(done)} predicted, {len(done)} skipped" in capsys.readouterr().out


def test_an_unreadable_image_is_listed_and_the_rest_continues(steered, tmp_path, capsys):
    """Damaged, empty, no image, gone, too large: exit code 1, and they are tried again the next time."""
    good = save(tmp_path / "in" / "good.jpg")
    whole = good.read_bytes()
    (tmp_path / "in" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "in" / "empty.png").touch()
    (tmp_path / "in" / "page.jpg").write_text("<html>not found</html>")
    (tmp_path / "in" / "gone.jpg").symlink_to("nowhere.jpg")
    Image.new("1", (9000, 8000)).save(tmp_path / "in" / "large.png")
    out = tmp_path / "out"
    for done in ("1 predicted, 0", "0 predicted, 1"):
        assert main([steered, str(tmp_path / "in"), "--out", str(out), "--words", "sea"]) == 1
        said = capsys.readouterr()
        assert f"{done} skipped, 5 unreadable" in said.out
        for name in ("cut.jpg", "empty.png", "page.jpg", "gone.jpg", "large.png"):
            assert said.err.count(f"unreadable: {tmp_path / 'in' / name} ") == 1
        assert "Traceback" not in said.err
    assert results(out) == ["good.overlay.jpg", "good.png", "predictions.jsonl"]


def process(rank: int, port: int, said: Path, arguments: list[str]) -> None:
    """What torchrun starts; its exit code is that of the command."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with said.open("w") as file, redirect_stdout(file), redirect_stderr(file):
        code = main(arguments)
    os._exit(code)


def test_two_processes_share_the_images(steered, tmp_path, monkeypatch):
    """Together they leave, byte for byte, what one leaves; an unreadable image's exit code is that of both.
    None ends before rank 0 has said all: at a code of 1 torchrun would end rank 0, too.
    """
    for i in range(5):
        save(tmp_path / "in" / f"{i}.jpg", noise(30 + i, 40))
    (tmp_path / "in" / "bad.jpg").write_text("no image")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [steered, str(tmp_path / "in"), "--words", "sea", "--out"]
    files, two = [tmp_path / "said-0", tmp_path / "said-1"], [*arguments, str(tmp_path / "two")]
    monkeypatch.setattr(module, "tidy", lambda out: (sleep(0.5), tidy(out)))  # as of many images
    fork = multiprocessing.get_context("fork")  # no second import of torch
    both = [fork.Process(target=process, args=(rank, port, files[rank], two)) for rank in (0, 1)]
    try:
        for one in both:
            one.start()
        both[1].join(60)
        assert files[0].read_text().endswith("5 predicted, 0 skipped, 1 unreadable\n")
        both[0].join(60)
        assert [one.exitcode for one in both] == [1, 1]
    finally:
        for one in both:
            one.kill()
    said = [file.read_text() for file in files]
    assert "".join(said).count("unreadable: ") == 1
    assert all(line.startswith("unreadable: ") for line in said[1].splitlines())  # only rank 0 says the rest

    assert main([*arguments, str(tmp_path / "one")]) == 1
    assert results(tmp_path / "two") == results(tmp_path / "one")
    for name in results(tmp_path / "one"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name
    assert [path.name for path in (tmp_path / "two").glob(".*")] == [".lock"]


# ---- words


@pytest.mark.parametrize(
    ("changes", "options", "sentence"),
    [
        (
            {"condition": "none", "tags": "classes"},
            ["--words", "sea"],
            "condition none uses no words per image",
        ),
        (
            {"condition": "classes", "tags": "classes"},
            ["--words", "sea"],
            "--words: a model of condition classes",
        ),
        ({"condition": "implicit", "tags": "classes"}, ["--tags", "sea, boat"], "leave it out"),
        (
            {"condition": "none", "tags": "classes"},
            ["--tags", "ram"],
            "--tags ram: a model of condition none",
        ),
        ({"condition": "oracle", "tags": "oracle"}, [], "give them, as --words 'sea, boat'"),
        ({"condition": "tagging", "tags": "oracle"}, [], "give them, as --words 'sea, boat'"),
        ({"condition": "tagging"}, ["--tags", "oracle"], "give them, as --words 'sea, boat'"),
        ({"condition": "oracle", "tags": "oracle"}, ["--tags", "classes"], "needs the words of each image"),
        ({"condition": "tagging", "tags": "gone.jsonl"}, [], "gone.jsonl cannot be read"),
        ({"condition": "caption", "tags": "gone.jsonl"}, [], "gone.jsonl cannot be read"),
        (
            {"condition": "tagging"},
            ["--tags", "sea"],
            "no such file; choose classes, clip, ram, oracle",
        ),
        ({"condition": "tagging"}, ["--tags", "sea"], "or give words as --words 'sea'"),
        ({"condition": "tagging"}, ["--tags", "gone.jsonl"], "--tags gone.jsonl: no such file"),
        ({"condition": "tagging"}, ["--tags", "clip", "--words", "sea"], "exclude each other"),
        ({"condition": "tagging"}, ["--words", " , "], "--words ' , ' has 0 words"),
        ({"condition": "tagging"}, ["--words", "x" * (LONGEST_TAG + 1)], "1 to 200 printable characters"),
        ({"condition": "tagging"}, ["--words", "a\0b"], "printable characters"),
        ({"condition": "tagging"}, ["--words", "ok\ud800bad"], "printable characters"),
        ({"condition": "none", "tags": "classes"}, ["--attention"], "condition none has no words to attend"),
        ({"condition": "caption", "tags": "x"}, ["--attention", "--words", "sea"], "no words to attend to"),
    ],
)
def test_words_that_cannot_be(tmp_path, capsys, changes, options, sentence):
    """One sentence and exit code 2, before the model is loaded or anything is written."""
    picture = save(tmp_path / "x.jpg")
    out = tmp_path / "out"
    assert main([stub(tmp_path, **changes), str(picture), "--out", str(out), *options]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1 and error.startswith("predict.py: ")
    assert not out.exists()


def test_words_from_the_file_of_training(tmp_path, monkeypatch):
    """Found by the end of the image's path, the longest first; a caption where captions are read."""
    paths = [str(save(tmp_path / name)) for name in ("root/train/1.jpg", "root/val/1.jpg", "2.jpg")]
    entries = [
        {"image": "val/1.jpg", "tags": [["sea", 0.9], ["boat", 0.5]], "caption": "a boat at sea"},
        {"image": "1.jpg", "tags": [["cow", 0.9]], "caption": "a cow"},
        {"image": "2.jpg", "tags": [], "caption": "nothing"},
        {"image": "another.jpg", "tags": [["sheep", 0.9]]},
    ]
    file = tmp_path / "tags.jsonl"
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    config = replace(CONFIG, tags=str(file))

    def words(paths: list[str], given: str | None = None, threshold: float | None = None) -> dict:
        return choose_words(str(file), given, config.condition, paths, threshold)

    assert words(paths) == dict(zip(paths, [["cow"], ["sea", "boat"], []], strict=True))
    assert words(paths, threshold=0.9) == dict(zip(paths, [["cow"], ["sea"], []], strict=True))
    assert words(paths[:1], "sky") == {paths[0]: ["sky"]}
    assert choose_words("none", None, "tagging", paths, None) == {path: [] for path in paths}
    assert choose_words("ram", None, "tagging", paths, None) == dict.fromkeys(paths)
    config = replace(config, condition="caption")
    assert words(paths) == dict(zip(paths, [["a cow"], ["a boat at sea"], ["nothing"]], strict=True))
    assert words(paths[:1], " a dog, on  grass") == {paths[0]: ["a dog, on grass"]}
    with pytest.raises(DataError, match=r"lacks 1 of 2 images, such as .*new.jpg: tag them with tag.py, or"):
        words([paths[0], str(tmp_path / "new.jpg")])
    with pytest.raises(DataError, match=r"tags.jsonl lacks 1 of 1 images"):
        words(["/a/new.jpg"])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere.jpg"], "nowhere.jpg does not exist: give an image, a folder or a quoted glob"),
        (["nothing/*.jpg"], "nothing/*.jpg has no image"),
        (["--out", "file"], "file cannot be written or locked (File exists): give another --out"),
        (["--scales", "0"], "'0' is not in 0.1..10"),
        (["--scales", "big"], "invalid scale value: 'big'"),
        (["--score", "1.1"], "'1.1' is not in 0..1"),
    ],
)
def test_errors_are_one_sentence_and_exit_2(tmp_path, capsys, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "x.jpg")
    (tmp_path / "file").touch()
    try:
        code = main([stub(tmp_path), "x.jpg", "--words", "sea", *arguments])
    except SystemExit as end:
        code = end.code
    error = capsys.readouterr().err
    assert code == 2 and sentence in error and "Traceback" not in error


def test_no_checkpoint(tmp_path, capsys):
    picture = str(save(tmp_path / "x.jpg"))
    assert main([str(tmp_path), picture]) == 2
    assert "holds no model.safetensors" in capsys.readouterr().err
    assert main([picture, picture]) == 2
    assert "is not a whole safetensors file" in capsys.readouterr().err


def test_the_model_is_the_one_whose_hash_was_taken(steered, tmp_path, monkeypatch, capsys, tada):
    """Though `best` leads elsewhere meanwhile. Which kernels run is said."""
    run, loaded = tmp_path / "run", []
    for i in (1, 2):
        (run / f"copy-{i}").mkdir(parents=True)
        os.link(steered, run / f"copy-{i}" / "model.safetensors")
    (run / "best").symlink_to("copy-1")

    def overtaken(out: Path) -> None:
        (run / "best").unlink()
        (run / "best").symlink_to("copy-2")
        tidy(out)

    def load(file: Path, *rest: object, **more: object) -> Tada:
        loaded.append(file)
        return tada

    tidy, once = module.tidy, iter([overtaken])
    monkeypatch.setattr(module, "tidy", lambda out: next(once, tidy)(out))
    monkeypatch.setattr(module, "read_model", load)
    assert (
        main([str(run), str(save(tmp_path / "x.jpg")), "--out", str(tmp_path / "out"), "--words", "sea"]) == 0
    )
    assert loaded == [run / "copy-1" / "model.safetensors"]
    assert capsys.readouterr().out.startswith(f"{kernels.describe('cpu')}\n")


def test_names_that_the_terminal_cannot_show_stop_nothing(monkeypatch, tmp_path):
    with (tmp_path / "said").open("w", encoding="ascii") as narrow, redirect_stdout(narrow):
        monkeypatch.setattr(module, "run", lambda **options: print("größe \udcff"))
        main(["run", "x.jpg"])
    assert (tmp_path / "said").read_text() == "gr\\xf6\\xdfe \\udcff\n"


def test_a_folder_in_use_is_refused(steered, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main([steered, str(save(tmp_path / "x.jpg")), "--out", str(tmp_path / "out")]) == 2
    assert "out is being written by another process" in capsys.readouterr().err


# ---- attention


def expected_maps(tada: Tada, image: Tensor, context: Tensor, lengths: Tensor | None) -> Tensor:
    """The UNet's maps at strides 16 and 32, each resized to the padded image, their mean `(B, L, H, W)`."""
    latent = tada.noised(tada.vae.encode(tada.padded(image)))
    t = torch.zeros(len(image), dtype=torch.int64)
    _, maps = tada.unet.features_and_attention(latent, t, context, lengths)
    assert [x.shape[2] * 2**i for i, x in enumerate(maps)] == [latent.shape[2]] * 3
    resized = [F.interpolate(x, tada.padded(image).shape[2:], mode="bilinear") for x in maps[1:]]
    return (resized[0] + resized[1]) / 2


IMAGE_SIZE = (100, 150)  # padded to 128x192
TAGS = [["sea", "boat"], ["cow", "grass", "sky"]]


@torch.no_grad()
def test_attention_to_tags_goes_through_the_queries(tada):
    """Tagging: what each query reads in the last block, head by head, times what each pixel reads of it."""
    image = 2 * torch.rand(2, 3, *IMAGE_SIZE) - 1
    adapter, text = tada.adapter, tada.text(TAGS)
    tokens, _ = tada.clip.image(image)
    context = adapter(tokens, None, text).context
    first, last = adapter.blocks
    q = first(adapter.queries.expand(2, -1, -1), text, adapter.image(tokens))
    n = last.norm1(q)
    n = last.norm2(q + last.attend_self(n, n))
    reads, part = torch.zeros(2, 32, 3), last.attend_text
    for row, words in enumerate(TAGS):
        vectors = torch.stack([tada.vectors[tada.rows[word]] for word in words])
        for head in range(4):
            width = slice(32 * head, 32 * head + 32)
            scores = part.to_q(n[row])[:, width] @ part.to_k(vectors)[:, width].T / 32**0.5
            reads[row, :, : len(words)] += scores.softmax(dim=1) / 4
    assert torch.allclose(adapter.attention(tokens, text), reads, atol=1e-5)
    assert reads.std(dim=1).max() > 0.01  # the queries differ

    maps = expected_maps(tada, image, context, None)  # (2, 32, 128, 192)
    expected = sum(reads[:, q, :, None, None] * maps[:, q, None] for q in range(32))[..., :100, :150]
    found = inference.attention(tada, image, TAGS)
    assert found.shape == (2, 3, *IMAGE_SIZE) and found.dtype == torch.float32
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.allclose(found.sum(dim=1), torch.ones(2, *IMAGE_SIZE), atol=1e-5)
    assert (found[0, 2] == 0).all()
    alone = inference.attention(tada, image[:1], TAGS[:1])
    assert torch.allclose(found[:1, :2], alone, atol=1e-5)
    classes = inference.attention(tada, image)  # no words: the class names
    assert classes.shape == (2, len(scenes.CLASSES), *IMAGE_SIZE)


@torch.no_grad()
def test_attention_where_words_are_the_tokens():
    """Oracle: the tags. Classes: the class names."""
    image = 2 * torch.rand(2, 3, *IMAGE_SIZE) - 1
    oracle = restless(replace(CONFIG, condition="oracle", tags="oracle"))
    text = oracle.text(TAGS)
    expected = expected_maps(oracle, image, text.vectors, text.lengths)[..., :100, :150]
    found = inference.attention(oracle, image, TAGS)
    assert found.shape == (2, 3, *IMAGE_SIZE) and torch.allclose(found, expected, atol=1e-5)
    assert (found[0, 2] == 0).all() and found[0, :2].std() > 1e-3
    assert torch.allclose(found.sum(dim=1), torch.ones(2, *IMAGE_SIZE), atol=1e-5)

    classes = restless(replace(CONFIG, condition="classes", tags="classes"))
    context = classes.adapter(None, None, None).context.expand(2, -1, -1)
    expected = expected_maps(classes, image, context, None)[..., :100, :150]
    assert torch.allclose(inference.attention(classes, image), expected, atol=1e-5)


@pytest.mark.parametrize("condition", ["caption", "none", "implicit"])
def test_attention_needs_words(tada, condition):
    image, wordless = torch.zeros(1, 3, 64, 64), SimpleNamespace(config=replace(CONFIG, condition=condition))
    with pytest.raises(ModelError, match=f"condition {condition} has no words to attend to"):
        inference.attention(wordless, image, [["sea"]])
    joined = SimpleNamespace(config=replace(CONFIG, tag_tokens="prompt"), adapter=tada.adapter)
    with pytest.raises(ModelError, match="joins the tags into one text"):
        inference.attention(joined, image, [["sea"]])


@torch.no_grad()
def test_attention_is_that_of_the_windows(tada):
    """Of an image larger than the crop: each window by itself, blended where two overlap."""
    image = 2 * torch.rand(1, 3, 64, 85) - 1
    found = inference.attention_in_windows(tada, image, TAGS[1:])
    left, right = (inference.attention(tada, image[..., x : x + 64], TAGS[1:]) for x in (0, 21))
    weight = torch.tensor([min(x + 1, 64 - x) for x in range(64)])
    share = weight[:43] / (weight[21:] + weight[:43])
    both = (1 - share) * left[..., 21:] + share * right[..., :43]
    expected = torch.cat([left[..., :21], both, right[..., 43:]], dim=3)
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("size", [(64, 200), (150, 64), (100, 170)])
def test_attention_has_no_seams(tada, size, monkeypatch):
    """Windows that agree stay as they are; those that differ are cross-faded, never by a step."""
    image, one = torch.zeros(1, 3, *size), torch.rand(1, 2, 1, 1)
    monkeypatch.setattr(inference, "attention", lambda tada, x, tags: one.expand(1, 2, *x.shape[2:]))
    assert torch.allclose(inference.attention_in_windows(tada, image), one.expand(1, 2, *size))
    turn = iter([0.0, 1.0] * 99)
    monkeypatch.setattr(inference, "attention", lambda tada, x, tags: torch.full((1, 1, 64, 64), next(turn)))
    found = inference.attention_in_windows(tada, image)
    assert found.min() == 0 and found.max() > 0.9  # the windows differ by 1,
    assert max(found.diff(dim=2).max(), found.diff(dim=3).max()) < 0.1  # and overlap by 21 pixels


@torch.no_grad()
def test_attention_does_not_jump_where_a_window_ends(tada):
    """Of a real model on a wide image: no larger steps at the windows' borders than elsewhere."""
    image = model_input(Image.fromarray(noise(64, 200)), (64, 200))
    steps = inference.attention_in_windows(tada, image, TAGS[:1]).diff(dim=3).abs().mean(dim=(0, 1, 2))
    windows = inference.windows((64, 200), (64, 64), (43, 43))
    at_border = torch.zeros(201, dtype=torch.bool)
    at_border[[x for _, left, _, right in windows for x in (left, right)]] = True
    at_border = at_border[1:200]  # of the steps
    assert at_border.sum() == 8 and steps[at_border].max() <= steps[~at_border].max()


def test_attention_has_a_tile_for_each_word(steered, tmp_path, monkeypatch):
    """Strongest first with its share; of the class names the ten that have most."""
    drawn = []
    monkeypatch.setattr(draw, "captioned", lambda image, title, *rest: drawn.append(title) or image)
    maps = np.stack([np.full((4, 6), x, np.float32) for x in (0.2, 0.5, 0.3)])
    draw.attention_mosaic(Image.new("RGB", (60, 40)), maps, CONFIG.classes, ["sea", "boat", "sky"])
    assert drawn[:-1] == ["boat  50%", "sky  30%", "sea  20%"]
    drawn.clear()
    shares = np.linspace(0, 0.1, len(CONFIG.classes), dtype=np.float32)
    draw.attention_mosaic(Image.new("RGB", (60, 40)), shares[:, None, None], CONFIG.classes, None)
    assert [title.split("  ")[0] for title in drawn[:-1]] == list(CONFIG.classes[:-11:-1])


# ---- from Python


def turned(path: Path) -> Path:
    exif = Image.Exif()
    exif[0x0112] = 6
    return save(path, np.rot90(noise(70, 40)), exif=exif, quality=95)


def of_python(image: Path, kind: str) -> object:
    """The image as a caller may hold it."""
    if kind == "path":
        return image
    opened = Image.open(image)
    return opened if kind == "image" else np.asarray(opened)


SHAPES = {
    "tall.png": lambda path: save(path, noise(300, 70)),
    "grey.png": lambda path: save(path, noise(50, 70)[..., 0]),
    "turned.jpg": turned,
}


@pytest.mark.parametrize("decoder", ["fpn", "mask2former"])
@pytest.mark.parametrize("words", [None, [], ["sea", "fishing boat"]])
def test_from_python_as_by_the_command(steered, surest, tmp_path, decoder, words):
    """The same labels to the pixel, drawings, tags and segments: of a path, an image and an array."""
    file = {"fpn": steered, "mask2former": surest[0]}[decoder]
    for name, write in SHAPES.items():
        write(tmp_path / "in" / name)
    out, flags = tmp_path / "out", {None: [], (): ["--tags", "none"]}
    given = flags.get(words if words is None else tuple(words), ["--words", ", ".join(words or [])])
    assert main([file, str(tmp_path / "in"), "--out", str(out), *given]) == 0
    tada = load_model(file)
    for line in lines(out):
        path, expected = Path(line["path"]), labels(out / line["labels"])
        for kind in ("path", "image", "array"):
            if kind == "array" and path.name == "turned.jpg":
                continue  # an array has no EXIF
            result = predict_image(tada, of_python(path, kind), words)
            assert np.array_equal(result.labels, expected) and result.labels.dtype == np.uint8
            assert result.tags == line["tags"] and result.shares == line["shares"]
        drawn = Image.open(out / f"{path.stem}.overlay.jpg")
        assert module.encoded(result.overlay(), ".jpg") == Path(drawn.filename).read_bytes()
        if decoder == "mask2former":
            ids = from_colours(np.asarray(Image.open(out / f"{path.stem}.segments.png")))
            assert np.array_equal(result.ids, ids) and [s.id for s in result.segments] == [
                x["id"] for x in line["segments"]
            ]
    assert len(lines(out)) == 3 and not tada.training


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        (np.zeros((4, 5, 3)), "float64 and shape (4, 5, 3) cannot be read: give uint8 in 0..255 of shape"),
        (np.zeros((3, 4, 5), np.uint8), "uint8 and shape (3, 4, 5)"),
        (np.zeros((1, 4, 5, 3), np.uint8), "shape (1, 4, 5, 3)"),
        (np.zeros(5, np.uint8), "shape (5,)"),
        (np.zeros((0, 5, 3), np.uint8), "shape (0, 5, 3)"),
        (torch.zeros(3, 4, 5), "type Tensor: give a path, a PIL image or a numpy array"),
        (Image.new("F", (4, 5)), "the image holds floating-point numbers"),
        (Image.new("RGB", (0, 5)), "the image cannot be read (its size is 0x5): give another"),
        (truncated(), "the image cannot be read (image file is truncated): give another"),
        ("gone.jpg", "gone.jpg cannot be read (No such file or directory)"),
    ],
)
def test_what_is_no_image_is_refused_in_one_sentence(tada, image, sentence):
    with pytest.raises(DataError, match=re.escape(sentence)):
        predict_image(tada, image, ["sea"])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("sea, boat", """words 'sea, boat' is one string: give a list, ["sea", "boat"]"""),
        ("sea", """words 'sea' is one string: give a list, ["sea"]"""),
        (["sky", "sea, boat"], """words 'sea, boat' is one string: give a list, ["sea", "boat"]"""),
        (["sea", 3], "1 to 200 printable characters, not '3'"),
        ([""], "1 to 200 printable characters, not ''"),
        ([f"word {i}" for i in range(1001)], "has 1001 words: give at most 1000"),
    ],
)
def test_words_are_a_list(tada, words, sentence):
    with pytest.raises(DataError, match=re.escape(sentence)):
        predict_image(tada, noise(8, 8), words)


def test_words_that_the_condition_cannot_use(tmp_path):
    """As of the command: none where there are no words, the ground truth is given; captions have commas."""
    plain = restless(replace(CONFIG, condition="none", tags="classes"))
    assert predict_image(plain, noise(8, 8)).tags is None
    with pytest.raises(DataError, match="condition none uses no words per image"):
        predict_image(plain, noise(8, 8), ["sea"])
    with pytest.raises(ModelError, match="condition none has no words to attend to"):
        predict_image(plain, noise(8, 8)).attention("sea")
    with pytest.raises(ModelError, match="score is for mask2former's segments"):
        predict_image(plain, noise(8, 8), score=0.5)
    caption = SimpleNamespace(config=replace(CONFIG, condition="caption", tags="oracle"), tagger=None)
    with pytest.raises(DataError, match=re.escape('give a list, ["a boat, at sea"]')):
        predict_image(caption, noise(8, 8), "a boat, at sea")
    with pytest.raises(DataError, match="ground-truth tags of new images are not at hand"):
        predict_image(caption, noise(8, 8))
    file = tmp_path / "tags.jsonl"
    file.write_text(json.dumps({"image": "1.png", "tags": ["sea"]}))
    by_file = restless(replace(CONFIG, tags=str(file)))
    assert predict_image(by_file, save(tmp_path / "1.png")).tags == ["sea"]
    with pytest.raises(DataError, match="lacks 1 of 1 images, such as the image"):
        predict_image(by_file, noise(8, 8))


@pytest.mark.parametrize("scales", [(), (0,), (-1,), (1, float("nan")), (11,)])
def test_scales_that_cannot_be(tada, scales):
    with pytest.raises(ModelError, match=r"^scales \(.*\): give numbers in 0.1..10$"):
        predict_image(tada, noise(8, 8), ["sea"], scales=scales)


@pytest.mark.parametrize("option", [{"score": 5}, {"overlap": -0.1}, {"score": float("nan")}])
def test_shares_of_segments_that_cannot_be(option):
    panoptic = SimpleNamespace(config=replace(CONFIG, decoder="mask2former"))
    with pytest.raises(ModelError, match="give a share in 0..1"):
        predict_image(panoptic, noise(8, 8), ["sea"], **option)


@pytest.mark.parametrize("option", [{"tags": x} for x in ("RAM", "none", "oracle", "sea")])
def test_a_tagger_that_cannot_be(steered, option):
    """None of them is a tagger: the model would be steered by all class names without a word."""
    with pytest.raises(TadaError, match=f'^tags \'{option["tags"]}\': give "clip" or "ram" here'):
        load_model(steered, "cpu", **option)
    with pytest.raises(TadaError, match="^tag_threshold 5: give a score in 0..1$"):
        load_model(steered, "cpu", tag_threshold=5)


@pytest.mark.parametrize("device", ["cuda:99", "gpu", torch.device("cuda", 99)])
def test_a_device_that_torch_cannot_use(device):
    """In one sentence, before the file is read."""
    with pytest.raises(TadaError, match=rf"^device {device}: torch \S+ lacks it here; choose another"):
        load_model("nowhere", device)


@pytest.mark.parametrize("decoder", ["fpn", "mask2former"])
def test_an_unknown_keyword_is_named_with_the_known_ones(decoder):
    tada = SimpleNamespace(config=replace(CONFIG, decoder=decoder))
    with pytest.raises(ModelError, match="^foo is unknown: give words, scales, flip, score or overlap$"):
        predict_image(tada, noise(8, 8), ["sea"], foo=1)


def test_scales_and_flip_from_python(steered, tada, tmp_path):
    path, flags = save(tmp_path / "x.png", noise(100, 150)), ["--scales", "1", "1.5", "--flip"]
    assert main([steered, str(path), "--out", str(tmp_path / "out"), *flags]) == 0
    result = predict_image(tada, path, scales=(1, 1.5), flip=True)
    assert np.array_equal(result.labels, labels(tmp_path / "out" / "x.png"))
    assert (result.labels != predict_image(tada, path).labels).any()


def test_attention_from_python(steered, tada, tmp_path):
    """Of one word at the size that the model reads; the drawing of the command; the caller's image stays."""
    image = Image.fromarray(noise(70, 150)).convert("RGBA")
    before = image.tobytes()
    result = predict_image(tada, image, ["sea", "Boat"])
    maps = inference.attention_in_windows(tada, result.input, [["sea", "Boat"]])[0].numpy()
    assert result.input.shape == (1, 3, 60, 128) and maps.shape == (2, 60, 128)
    assert np.array_equal(result.attention(" boat"), maps[1]) and result.attention("sea").dtype == np.float32
    with pytest.raises(ModelError, match=r"'cow' is not among the words \(sea, boat\): predict"):
        result.attention("cow")
    assert image.mode == "RGBA" and image.tobytes() == before
    image.convert("RGB").save(tmp_path / "x.png")
    assert main([steered, str(tmp_path / "x.png"), "--out", str(tmp_path), "--words", "sea, Boat"]) == 2
    flags = ["--out", str(tmp_path / "out"), "--words", "sea, Boat", "--attention"]
    assert main([steered, str(tmp_path / "x.png"), *flags]) == 0
    drawn = module.encoded(result.attention_overlay(), ".jpg")
    assert (tmp_path / "out" / "x.attention.jpg").read_bytes() == drawn


def test_label_maps_are_in_colour(steered, tada, tmp_path):
    """8-bit indices whatever the number of classes, shown in the model's palette; our reader reads them."""
    path, out = save(tmp_path / "x.png", noise(100, 150)), tmp_path / "out"
    assert main([steered, str(path), "--out", str(out), "--words", "sea"]) == 0
    result = predict_image(tada, path, ["sea"])
    everything = label_table(range(len(CONFIG.classes)), [])
    assert np.array_equal(read_labels(out / "x.png", everything), result.labels)
    assert (out / "x.png").read_bytes()[24:26] == bytes([8, 3])  # PNG's bit depth; palette
    shown = np.asarray(Image.open(out / "x.png").convert("RGB"))
    assert np.array_equal(shown, scenes.PALETTE[result.labels])
    grey = Image.fromarray(result.labels)
    grey.save(out / "x.png")  # an earlier version's
    before = (out / "x.png").stat().st_mtime_ns
    assert main([steered, str(path), "--out", str(out), "--words", "sea"]) == 0
    assert (out / "x.png").stat().st_mtime_ns == before


def test_what_to_open_is_printed_last(steered, tmp_path, monkeypatch, capsys):
    """The overlay of one image as --out was given; of many the folder; nothing where there is none."""
    monkeypatch.chdir(tmp_path)
    save(Path("in/1.png"))
    for inputs, code, last in (
        (["in/1.png"], 0, "predictions/1.overlay.jpg"),
        (["in/1.png"], 0, "predictions/1.overlay.jpg"),  # which was there
        (["in/1.png", "in/2.png"], 0, "predictions: 1 predicted, 1 skipped, 0 unreadable"),
        (["in/bad.png"], 1, "predictions: 0 predicted, 0 skipped, 1 unreadable"),
    ):
        for name in inputs:
            save(Path(name)) if "1" not in name else None
        Path("in/bad.png").write_bytes(b"")
        assert main([steered, *inputs, "--words", "sea"]) == code
        assert capsys.readouterr().out.splitlines()[-1] == last
    assert Path("predictions/1.overlay.jpg").is_file()


def test_a_model_is_loaded_where_there_is_a_gpu(steered, monkeypatch):
    """Unless a device is given."""
    devices, real = [], module.read_model
    monkeypatch.setattr(module, "read_model", lambda file, *rest: devices.append(rest[1]) or real(file))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    load_model(steered), load_model(steered, "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    tada = load_model(steered)
    assert devices == ["cuda", "cpu", "cpu"]
    assert not tada.training and not any(x.requires_grad for x in tada.parameters())


def test_importing_does_nothing():
    """No argument is parsed, nothing is printed, standard output stays as it is."""
    code = "import sys; before = sys.stdout.errors; from predict import load_model, predict_image"
    code += "; import torch; assert sys.stdout.errors == before and torch.is_grad_enabled()"
    command = [sys.executable, "-c", code, "--no-such-flag"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == done.stderr == ""


def run_text(code: str, names: dict) -> dict:
    """Run the lines with these names; return the names after them."""
    Path("lines.py").write_text(code)
    return names | runpy.run_path("lines.py", names)


def test_the_lines_of_the_documents_run(steered, tmp_path, monkeypatch):
    """As they are printed, in a folder with runs/NAME and photo.jpg; the official weights are not at hand."""
    monkeypatch.chdir(tmp_path)
    step = tmp_path / "runs" / "NAME" / "step-000100"
    step.mkdir(parents=True)
    os.link(steered, step / MODEL)
    (step / HASHES).write_text(json.dumps({MODEL: digest(Path(steered)), TENSORS: "", FACTS: ""}))
    for link in ("best", "last"):
        step.with_name(link).symlink_to(step.name)
    save(tmp_path / "photo.jpg", noise(90, 150))
    names, blocks = {}, []
    for page in ("README.md", "docs/using.md"):
        blocks += re.findall("^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    for block in blocks:
        if "weights/sd15" in block:
            with pytest.raises(WeightsError, match="weights/sd15/vae"):
                run_text(block, {})
        else:
            names = run_text(block, names)
    result, tada, features = names["result"], names["tada"], names["features"]
    assert result.tags == ["sea", "boat"] and result.labels.shape == (90, 150)
    seen = []
    with tada.decoder.register_forward_pre_hook(lambda decoder, given: seen.append(given[0])):
        tada(result.input, [result.tags])
    assert all(torch.equal(*pair) for pair in zip(features, seen[0], strict=True))
    assert not features[0].requires_grad and not tada.training
