"""What lies in the place of a file: pipes, sockets and devices, links that are planted while a command works.
No pipe is waited for, no link is written through, each is refused by its name.
"""

import json
import os
import shutil
import socket
import subprocess
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluation
import page
import predict
import tag
import train
from assemble import build
from data import open_dataset
from errors import DataError, TadaError
from images.classes import read_classes
from images.panoptic import read_annotations, read_map
from images.read import FORMATS, SUFFIXES, label_table, read_image, read_labels
from lab.tables import read_record
from loading.stream import EvaluationStream
from loading.tags import read_tags
from metrics.judge import PanopticEvaluator
from model import TadaConfig
from run.checkpoint import read_hashes, save_model
from run.predictions import read_list
from run.ranks import Ranks
from run.tagging import read_tag_lines

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.timeout(60)  # who opens a pipe waits for ever
TINY = TadaConfig(("sky", "sea"), model="tiny", crop=(64, 64), box=(64, 64), stride=(43, 43))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A random model of two classes."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_model(build(TINY), file, {}, {})
    return str(file)


@pytest.fixture(scope="module")
def complete(tmp_path_factory) -> Path:
    """A data set of two images of 64 x 64, two of validation, and a run of one step on it."""
    root = tmp_path_factory.mktemp("attack")
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (root / "data" / kind / split).mkdir(parents=True)
        for i in range(2):
            pixels = np.random.default_rng(i).integers(0, 256, (64, 64, 3), np.uint8)
            Image.fromarray(pixels).save(root / "data" / "images" / split / f"{i}.png")
            Image.fromarray(pixels[..., 0] // 128).save(root / "data" / "labels" / split / f"{i}.png")
    (root / "data" / "classes.txt").write_text("sky\nsea\n")
    assert training(root) == 0
    return root


@pytest.fixture
def own(complete, tmp_path) -> Path:
    """A copy of the data set and its run."""
    return shutil.copytree(complete, tmp_path / "own", symlinks=True)


def training(root: Path, *more: str) -> int:
    flags = (
        f"--dataset folder --data {root}/data --model tiny --weights random --crop 64 --short 64 --batch 2 "
    )
    flags += "--iterations 1 --log-every 1 --workers 0 --threads 1 --tags clip --device cpu"
    return train.main([*flags.split(), "--run-dir", f"{root}/run", *more])


def evaluating(root: Path, *more: str) -> int:
    return evaluation.main([f"{root}/run", "--workers", "0", "--data", f"{root}/data", *more])


def pipe(file: Path) -> Path:
    """Put a named pipe in the place of a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    os.mkfifo(file)
    return file


# ---- pipes, sockets and devices


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("config.json", "lacks the settings of its run"),
        ("log.jsonl", "is a pipe, socket or device, which is not opened"),
        (".lock", "is a pipe, socket or device, which is not opened"),
        ("step-000001/sha256.json", "no intact checkpoint"),
        ("step-000001/model.safetensors", "no intact checkpoint"),
        ("step-000001/train.json", "no intact checkpoint"),
        ("tags-train.jsonl", None),
        ("tags-train.sha256", None),
        (".tmp-config.json", None),
        (".tmp-log.jsonl", None),
        (".tmp-step-000002", None),
        (".tmp-best", None),
    ],
)
def test_a_run_waits_for_no_pipe(own, name, said, capsys):
    """In the place of what is read it is refused, of what is written anew replaced."""
    file = pipe(own / "run" / name)
    code, output = training(own), capsys.readouterr()
    if said is None:
        assert code == 0 and not file.is_fifo()
    else:
        assert code == 2 and output.err.count("\n") == 1
        assert said in output.err and str(file) in output.out + output.err


def test_a_start_waits_for_no_pipe(own, capsys):
    """All that a run writes, in the folder of an earlier start; only the drawings of val/ are not made."""
    run = own / "run"
    for name in ("last", "best", "log.jsonl", "inputs.jpg", "curve.png"):
        (run / name).unlink()
    shutil.rmtree(run / "step-000001"), shutil.rmtree(run / "val")
    names = ["log.jsonl", "inputs.jpg", "curve.png", "val", "tags-train.jsonl", "tags-train.sha256"]
    for name in (*names, *(f".tmp-{name}" for name in (*names, "last", "step-000001", "config.json"))):
        pipe(run / name)
    assert training(own) == 0
    left = {path.name for path in run.rglob("*") if path.is_fifo()}
    assert left == {"val", ".tmp-val"} and "step-000001.jpg is not drawn" in capsys.readouterr().out
    assert evaluating(own, "--limit", "1") == 0


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("run/config.json", "is a pipe, socket or device, which is not opened"),
        ("run/step-000001/sha256.json", "is a pipe, socket or device, which is not opened"),
        ("run/step-000001/model.safetensors", "holds no model.safetensors"),
        ("run/eval-val/.lock", "is a pipe, socket or device, which is not opened"),
        ("run/eval-val/result.json", "holds result.json without a result.json of eval.py"),
        ("data/classes.txt", "is a pipe, socket or device, which is not opened"),
        ("data/images/val/1.png", "is empty or missing"),
        ("data/labels/val/1.png", "is empty or missing"),
    ],
)
def test_an_evaluation_waits_for_no_pipe(own, name, said, capsys):
    pipe(own / name)
    data = [] if name == "run/config.json" else ["--data", f"{own}/data"]
    where = os.path.dirname(name) if "result" in name else "run" if "model" in name else name
    assert evaluation.main([f"{own}/run", "--workers", "0", *data]) == 2
    error = capsys.readouterr().err
    assert said in error and str(own / where) in error


@pytest.mark.parametrize("place", ["classes.txt", "images/train/1.png", "labels/train/1.png", "tags.jsonl"])
@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
def test_a_data_set_is_checked_without_what_is_no_file(own, place, kind, capsys, monkeypatch):
    file = own / "data" / place
    file.unlink(missing_ok=True)
    monkeypatch.chdir(file.parent)  # a socket's path is at most 108 bytes
    if kind == "device":
        file.symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(file.name)
    else:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(file.name)
    if place == "tags.jsonl":
        with pytest.raises(SystemExit, match="2"):
            training(own, "--check", "--fresh", "--tags", str(file))
    else:
        assert training(own, "--check", "--fresh") == 2
    assert str(file) in capsys.readouterr().err


def test_a_panoptic_data_set_waits_for_no_pipe(segments, tmp_path):
    root = shutil.copytree(segments, tmp_path / "segments")
    pipe(root / "val" / "0.png"), pipe(root / "annotations" / "panoptic_val" / "1.png")
    dataset = open_dataset("panoptic", root, "val")
    for i in range(2):
        with pytest.raises(DataError, match=rf"/{i}\.png is a folder, pipe, socket or device"):
            dataset.load(i)
    file = pipe(root / "annotations" / "panoptic_val.json")
    with pytest.raises(DataError, match=rf"{file} cannot be read \({file} is a pipe"):
        open_dataset("panoptic", root, "val")


@pytest.mark.parametrize(
    "name",
    [".lock", "predictions.jsonl", ".tmp-predictions.jsonl", ".predictions.jsonl.tmp-0", "0.png"],
)
def test_a_prediction_waits_for_no_pipe(complete, model, name, tmp_path, capsys):
    file = pipe(tmp_path / "out" / name)
    command = [model, f"{complete}/data/images/val", "--out", str(tmp_path / "out"), "--tags", "classes"]
    said = {".lock": "is a pipe, socket", "0.png": "has no line for it"}.get(name)
    assert predict.main(command) == (2 if said else 0)
    error = capsys.readouterr().err
    assert said in error and str(file) in error if said else not file.is_fifo()


def test_what_predictions_are_made_of_is_no_pipe(model, tmp_path, capsys, monkeypatch):
    """Images below a folder are listed as unreadable; a model and a file of tags are refused."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64)).save("a.png"), os.mkfifo("b.png"), os.symlink("/dev/zero", "c.jpg")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("d.tif")
    assert predict.main([model, ".", "--tags", "classes"]) == 1
    output = capsys.readouterr()
    assert "1 predicted, 0 skipped, 3 unreadable" in output.out
    for name in ("b.png", "c.jpg", "d.tif"):
        assert f"unreadable: {tmp_path / name} is a folder, pipe, socket or device" in output.err
    assert predict.main(["b.png", "a.png"]) == 2 and "b.png holds no model" in capsys.readouterr().err
    assert predict.main([model, "a.png", "--tags", "b.png"]) == 2
    assert "--tags b.png: no such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        "a.png --by clip --names {pipe} --out tags.jsonl",
        "a.png --by clip --names sea,sky --out {pipe}",
        "{pipe} --by tadp --dataset folder --data {data} --out tags.jsonl",
        "--judge {pipe} --dataset folder --data {data}",
    ],
)
def test_tags_wait_for_no_pipe(complete, command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64)).save("a.png")
    words = command.format(pipe=pipe(tmp_path / "pipe"), data=complete / "data").split()
    assert (
        tag.main([*words, "--model", "tiny", "--weights", "random", "--workers", "0", "--device", "cpu"]) == 2
    )
    assert f"{tmp_path / 'pipe'} is a pipe, socket or device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("vae/config.json", "is a pipe, socket or device"),
        ("vae/sha256.json", "is a pipe, socket or device"),
        ("clip/model.safetensors", "holds none of"),
        ("tokenizer/vocab.json", "is missing"),
        ("tokenizer/merges.txt", "is missing"),
        (".vectors", None),
    ],
)
def test_weights_wait_for_no_pipe(name, said, tmp_path, monkeypatch, capsys):
    weights = shutil.copytree(ROOT / "weights" / "tiny", tmp_path / "tiny", ignore=lambda *_: [".vectors"])
    pipe(weights / name)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64)).save("a.png")
    words = "a.png --by clip --names sea,sky --out tags.jsonl --model tiny --workers 0 --device cpu"
    assert tag.main([*words.split(), "--weights", str(weights)]) == (2 if said else 0)
    error = capsys.readouterr().err
    assert said in error and str((weights / name).parent) in error if said else not error.count("Traceback")


# ---- links that are planted while a command works


def planting(monkeypatch, module, name: str, link: Path, target: Path):
    """After the first call of a function, put a link to a folder in the place of another."""
    real, done = getattr(module, name), []

    def planted(*args, **kwargs):
        result = real(*args, **kwargs)
        if not done:
            shutil.rmtree(link, ignore_errors=True)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(target)
            done.append(True)
        return result

    monkeypatch.setattr(module, name, planted)


@pytest.fixture
def elsewhere(tmp_path) -> Path:
    """A folder of others, with a file of a name that results have."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "b.png").write_text("mine")
    return folder


def test_no_prediction_follows_a_planted_link(model, elsewhere, tmp_path, monkeypatch, capsys):
    """The folder of results is a link from the first image's on."""
    photos, out = tmp_path / "photos", tmp_path / "out"
    (photos / "sub").mkdir(parents=True)
    for name in ("a.png", "sub/b.png", "sub/c.png"):
        Image.new("RGB", (64, 64)).save(photos / name)
    planting(monkeypatch, predict, "write", out / "sub", elsewhere)
    assert predict.main([model, str(photos), "--out", str(out), "--tags", "classes"]) == 2
    assert f"{out / 'sub'} is a link, which is not followed" in capsys.readouterr().err
    assert [path.name for path in elsewhere.iterdir()] == ["b.png"]
    assert (elsewhere / "b.png").read_text() == "mine" and (out / "a.png").is_file()


def test_no_drawing_follows_a_planted_link(complete, elsewhere, tmp_path, monkeypatch, capsys):
    """val/ of a run, in its second validation; worst/ of an evaluation: the results are written before."""
    own = shutil.copytree(complete, tmp_path / "own", ignore=lambda *_: ["run"])
    planting(monkeypatch, train, "draw_val", own / "run" / "val", elsewhere)
    assert training(own, "--iterations", "2", "--eval-every", "1") == 0
    assert "step-000002.jpg is not drawn" in capsys.readouterr().out
    planting(monkeypatch, evaluation, "evaluate", own / "run" / "eval-val" / "worst", elsewhere)
    assert evaluating(own, "--worst", "2") == 2
    assert "worst is a link, which is not followed" in capsys.readouterr().err
    assert [path.name for path in elsewhere.iterdir()] == ["b.png"]
    assert (own / "run" / "eval-val" / "result.json").is_file()


def test_no_segments_follow_a_planted_link(segments, elsewhere, tmp_path):
    """The PNGs of an evaluation, in a folder of theirs and in the place of one; its JSON."""
    dataset = open_dataset("panoptic", segments, "val")
    (tmp_path / "out").mkdir()
    items = [*EvaluationStream(dataset, None, None).items(range(3))]
    evaluator = PanopticEvaluator(dataset, "how", tmp_path / "out" / "panoptic")
    evaluator.add(items[0], items[0].ids, items[0].segments)
    new = tmp_path / "out" / ".tmp-panoptic"
    (new / "1.png").symlink_to(elsewhere / "b.png")
    (tmp_path / "out" / "panoptic.json").symlink_to(elsewhere / "b.png")
    evaluator.add(items[1], items[1].ids, items[1].segments)
    alone = Ranks(0, 1, torch.device("cpu"))
    evaluator.finish(alone, evaluator.measure(alone))
    assert len(read_annotations(tmp_path / "out" / "panoptic.json")) == 2
    new.symlink_to(elsewhere)
    with pytest.raises(OSError, match=r"\.tmp-panoptic is a link, which is not followed"):
        evaluator.add(items[2], items[2].ids, items[2].segments)
    assert (elsewhere / "b.png").read_text() == "mine" and len([*elsewhere.iterdir()]) == 1


# ---- formats: only those of the short list are opened, whatever the name


HEADERS = {  # of formats that Pillow can only open, or would hand to another program; harmless and short
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n",
    "PSD": b"8BPS\0\1" + bytes(20),
    "FITS": b"SIMPLE  =                    T".ljust(2880),
    "WMF": b"\xd7\xcd\xc6\x9a" + bytes(60),
    "XPM": b"/* XPM */\n",
    "MIC": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600),
    "PCD": bytes(2048) + b"PCD_" + bytes(100),
    "FLI": bytes(4) + b"\x11\xaf" + bytes(130),
    "GBR": b"\0\0\0\x20\0\0\0\x01" + bytes(40),
    "SUN": b"\x59\xa6\x6a\x95" + bytes(40),
}


@pytest.fixture(scope="module")
def foreign(tmp_path_factory) -> dict[str, bytes]:
    """Format -> a file of it, of all that Pillow writes and some that it only opens, but ours."""
    Image.init()
    found, file = dict(HEADERS), tmp_path_factory.mktemp("foreign") / "x"
    for form in sorted({*Image.SAVE} - {*FORMATS, "MPO"}):
        for mode in ("RGB", "1"):
            with suppress(Exception):
                Image.new(mode, (64, 64)).save(file, form)
                found[form] = file.read_bytes()
                break
    assert len(found) > 20 and {"PPM", "TGA", "ICO", "GIF"} - {*found} == {"GIF"}
    return found


@pytest.fixture
def watched(monkeypatch) -> list:
    """What should not be: decoders of other formats, and processes."""
    seen = []
    Image.init()
    for form, (_, accept) in Image.OPEN.items():
        if form not in FORMATS:
            fails = partial(lambda form, *_: seen.append(form), form)
            monkeypatch.setitem(Image.OPEN, form, (fails, accept and (lambda _: True)))
    for owner, name in [(subprocess, "Popen"), (os, "posix_spawn"), (os, "fork"), (os, "system")]:
        monkeypatch.setattr(owner, name, lambda *args, **_: seen.append(args))
    monkeypatch.setattr("run.folder.commit", lambda: None)  # asks git
    return seen


def test_every_other_format_is_refused_under_every_name(foreign, watched, tmp_path):
    table = label_table(range(255), ())
    for form, content in foreign.items():
        for suffix in SUFFIXES:
            file = tmp_path / f"x{suffix}"
            file.write_bytes(content)
            for read in (read_image, lambda x: read_labels(x, table), lambda x: read_map(x, [])):
                with pytest.raises(DataError, match=rf"^{file} "):
                    pytest.fail(f"{form} is read: {read(file)}")
    assert not watched


def test_every_command_refuses_every_other_format(foreign, watched, own, model, tmp_path, capsys):
    """predict.py, train.py's check and samples, eval.py: as images and as labels."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for i, (form, content) in enumerate(foreign.items()):
        (photos / f"{form}{SUFFIXES[i % len(SUFFIXES)]}").write_bytes(content)
    out = str(tmp_path / "out")
    assert predict.main([model, str(photos), "--out", out, "--tags", "classes"]) == 1
    output = capsys.readouterr()
    assert f"0 predicted, 0 skipped, {len(foreign)} unreadable" in output.out
    for kind in ("images", "labels"):
        for form, content in foreign.items():
            file = own / "data" / kind / "val" / "1.png"
            before = file.read_bytes()
            file.write_bytes(content)
            with pytest.raises(DataError, match=rf"{file} "):
                open_dataset("folder", own / "data", "val").load(1)
            if form in ("EPS", "PPM", "FITS"):
                assert evaluating(own) == 2 and str(file) in capsys.readouterr().err
                assert training(own, "--check", "--fresh") == 2 and str(file) in capsys.readouterr().err
            file.write_bytes(before)
    assert not watched


def test_the_page_refuses_every_other_format(foreign, watched):
    for form, content in foreign.items():
        with pytest.raises(DataError, match=rf"^x\.{form} "):
            page.decoded(content, f"x.{form}")
    assert not watched


# ---- text that is long


@pytest.mark.parametrize(
    "text", [" " * 100_000 + ",", "," * 100_000, "1" * 100_000, "names" + " " * 100_000, "[" * 100_000]
)
def test_no_reader_takes_long_for_long_text(text, tmp_path):
    """More digits than Python converts (4,300) and lists in lists are one sentence, too."""
    file = tmp_path / "predictions.jsonl"
    readers = [
        read_classes,
        lambda x: read_tags(x, "/", {"a"}),
        read_annotations,
        read_hashes,
        read_tag_lines,
        read_record,
    ]
    started = time.perf_counter()
    for form in ("sea, %s\nsky\n", '{"image": %s, "tags": [["sea", %s]]}\n', '{"images": [{"id": %s}]}\n'):
        file.write_text(form.replace("%s", text))
        for read in (*readers, lambda x: read_list(x.parent)):
            with pytest.raises(TadaError, match=r"predictions\.jsonl"):
                pytest.fail(str(read(file))[:80])
    assert time.perf_counter() - started < 10  # a pattern that grows with the square takes minutes


def test_a_small_png_of_many_pixels_keeps_the_limit(tmp_path):
    """Of ids as of images; 21 megapixels of one colour are below it."""
    file = tmp_path / "x.png"
    Image.new("RGB", (5250, 4000)).save(file)
    assert read_map(file, []).shape == (4000, 5250)
    Image.new("1", (8001, 8000)).save(file)
    for read in (read_image, lambda x: read_map(x, [])):
        with pytest.raises(DataError, match="x.png is too large .*at most 64,000,000 pixels"):
            read(file)


@pytest.mark.parametrize("name", ["../x.png", "/x.png", "a/../../x.png"])
@pytest.mark.parametrize("key", ["images", "annotations"])
def test_no_file_name_leads_out(segments, tmp_path, name, key):
    content = json.loads((segments / "annotations" / "panoptic_val.json").read_text())
    content[key][0]["file_name"] = name
    (tmp_path / "x.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=rf"{key}\[0\]: the file_name '{name}' leads out"):
        read_annotations(tmp_path / "x.json")
