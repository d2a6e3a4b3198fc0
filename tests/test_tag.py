"""tag.py, run/tagging.py: tags line by line, captions of TADP, the quality of tags; RAM in runs."""

import errno
import json
import os
import re
import shlex
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from oracle import SMALL_RAM, shake
from PIL import Image
from safetensors.torch import save_file

import assemble
import predict
import tag
import train
from clip import zero_shot_tags
from data import open_dataset, prompt
from errors import DataError
from images import scenes
from images.classes import read_classes
from loading.augment import normalise, to_tensor
from loading.tags import choose_source, read_tags, split_words, tag_key
from metrics.tagging import SYNONYMS, classes_named, measure_tags
from model import TadaConfig
from ram import RAM, likely_tags
from run.checkpoint import read_about
from run.folder import lock
from run.tagging import cache_vectors, drop_text_tower, report_cut
from weights.ram import MODEL, NAMES, THRESHOLDS, load_ram, ram_folder
from weights.words import word_vectors

ROOT = Path(__file__).parents[1]
WORDS = "sea, boat, sky, snow"
CLIP = ["--by", "clip", "--model", "tiny", "--workers", "0", "--names", WORDS]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Twelve images of four sizes: more than one batch."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(12):
        image = Image.fromarray(scenes.draw(i).image).crop((0, 0, 128 - 8 * (i % 4), 120))
        image.save(folder / f"{i:02d}.png")
    return folder


@pytest.fixture(scope="module")
def expected(photos):
    """CLIP's tags of the photos, image by image."""
    tada = SimpleNamespace(clip=assemble.load_part(assemble.CLIP, assemble.CLIPConfig.tiny(), "weights/tiny"))
    tokenizer = assemble.Tokenizer("weights/tiny/tokenizer")
    names = WORDS.split(", ")
    vectors = word_vectors("weights/tiny", tada.clip, tokenizer, names, 80, shared=True)
    tags = {}
    for path in sorted(photos.iterdir()):
        image = Image.open(path).convert("RGB").resize((128, 128), Image.Resampling.BICUBIC)
        (tags[str(path)],) = zero_shot_tags(tada.clip, normalise(to_tensor(image)[None]), names, vectors)
    return tags


def lines_of(file: Path) -> dict[str, list]:
    return {entry["image"]: entry["tags"] for entry in map(json.loads, file.read_text().splitlines())}


def agree(found: dict[str, list], expected: dict[str, list]) -> bool:
    """The same tags, and scores up to the rounding of a batch."""
    return [*found] == [*expected] and all(
        [tag for tag, _ in found[path]] == [tag for tag, _ in tags]
        and np.allclose([x for _, x in found[path]], [x for _, x in tags], atol=1e-4)
        for path, tags in expected.items()
    )


# ---- the file of tags


def test_clip_tags_a_folder(photos, expected, tmp_path, capsys):
    """Absolute paths in the folder's order, scores with every tag; a second call has nothing to do."""
    file = tmp_path / "tags.jsonl"
    assert tag.main([*CLIP, str(photos), "--out", str(file)]) == 0
    assert agree(lines_of(file), expected)
    assert "12 of 12 images tagged by clip of 4 names" in capsys.readouterr().out
    before = file.read_bytes()
    assert tag.main([*CLIP, str(photos), "--out", str(file)]) == 0
    assert file.read_bytes() == before


def test_an_interrupted_file_is_finished(photos, expected, tmp_path):
    """Whole lines are kept, a cut one is made again, and the result is that of one call."""
    whole, file = tmp_path / "whole.jsonl", tmp_path / "tags.jsonl"
    assert tag.main([*CLIP, str(photos), "--out", str(whole)]) == 0
    lines = whole.read_bytes().splitlines(keepends=True)
    kept = lines[7].replace(b'"tags": [[', b'"tags": [["kept", 1.0], [')
    for cut in (0, 1, len(lines[3]) // 2, len(lines[3]) - 1):
        file.write_bytes(kept + lines[3][:cut])
        assert tag.main([*CLIP, str(photos), "--out", str(file)]) == 0
        assert [json.loads(line)["image"] for line in file.read_bytes().splitlines()] == [*expected]
        assert lines_of(file)[[*expected][7]][0] == ["kept", 1.0]


def test_ctrl_c_loses_no_finished_image(photos, tmp_path, monkeypatch, capsys):
    """After one of two batches: its lines are whole, and the same command makes the bytes of one call."""
    whole, file, calls = tmp_path / "whole.jsonl", tmp_path / "tags.jsonl", []
    assert tag.main([*CLIP, str(photos), "--out", str(whole)]) == 0
    assert capsys.readouterr().out.startswith(f"{whole}: tags of 12 images by clip\n")

    def interrupted(*arguments, **named):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return zero_shot_tags(*arguments, **named)

    with monkeypatch.context() as m:
        m.setattr(assemble, "zero_shot_tags", interrupted)
        assert tag.main([*CLIP, str(photos), "--out", str(file)]) == 130
    assert file.read_bytes().splitlines() == whole.read_bytes().splitlines()[:8]
    assert tag.main([*CLIP, str(photos), "--out", str(file)]) == 0
    assert file.read_bytes() == whole.read_bytes()


def test_a_full_disk_loses_no_finished_image(photos, expected, tmp_path, monkeypatch, capsys):
    file, calls = tmp_path / "tags.jsonl", []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as m:
        m.setattr("run.tagging.os.fsync", full)
        assert tag.main([*CLIP, str(photos), "--out", str(file)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "cannot be written (No space left on device): finished lines stay, run again" in error
    assert len(lines_of(file)) >= 8
    assert tag.main([*CLIP, str(photos), "--out", str(file)]) == 0
    assert agree(lines_of(file), expected)


def test_a_broken_image_is_listed_and_not_fatal(photos, expected, tmp_path, capsys):
    folder = Path(shutil.copytree(photos, tmp_path / "photos"))
    (folder / "05.png").write_bytes((photos / "05.png").read_bytes()[:200])
    (folder / "99.jpg").write_text("no image")
    assert tag.main([*CLIP, str(folder), "--out", str(tmp_path / "tags.jsonl")]) == 1
    out, err = capsys.readouterr()
    assert "skipped: " in err and "05.png" in err and "99.jpg is not an image" in err
    assert "11 of 13 images tagged" in out
    assert len(lines_of(tmp_path / "tags.jsonl")) == 11


def test_two_processes_share_the_images(photos, expected, tmp_path):
    """As ranks of one run: each tags every other image, and the file is in order at the end."""
    from threading import Barrier, Thread

    file, both, codes = tmp_path / "tags.jsonl", Barrier(2), []

    class Rank(SimpleNamespace):
        is_main = property(lambda self: self.rank == 0)
        barrier = staticmethod(both.wait)

        def all_gather_object(self, part: list) -> list:
            both.wait()
            return part

    options = tag.parse([*CLIP, str(photos), "--out", str(file)])
    ranks = [Rank(rank=rank, world=2, device=torch.device("cpu")) for rank in range(2)]
    threads = [Thread(target=lambda r=r: codes.append(tag.tag(options, r))) for r in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert codes == [0, 0]
    assert agree(lines_of(file), expected)


def test_names_may_stand_in_a_file(photos, expected, tmp_path, capsys):
    """One a line, as many as one likes; each once."""
    names, file = tmp_path / "names.txt", tmp_path / "tags.jsonl"
    names.write_text("\n".join([*WORDS.split(", "), "SEA", ""]) + "\n")
    assert tag.main([*CLIP[:-1], str(names), str(photos), "--out", str(file)]) == 0
    assert agree(lines_of(file), expected)
    names.write_bytes(b"caf\xe9\n")
    assert tag.main([*CLIP[:-1], str(names), str(photos), "--out", str(file)]) == 2
    assert "is not a list of names, one a line" in capsys.readouterr().err


def test_a_threshold_takes_the_place_of_chance(photos, tmp_path):
    """CLIP's own is 1 / names; the best name stays a tag."""
    for least, count in ((0.0, 4), (0.999, 1)):
        file = tmp_path / f"{least}.jsonl"
        assert tag.main([*CLIP, str(photos / "00.png"), "--threshold", str(least), "--out", str(file)]) == 0
        assert [len(tags) for tags in lines_of(file).values()] == [count]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"image": "a.png", "tags": [], "by": "ram"}', "line 1, was made by ram, not by clip of 4 names"),
        ('{"image": "a.png", "tags": []}', "line 1, was made by another program, not by clip of 4 names"),
        (
            '{"image": "a.png", "tags": [], "by": "clip of 4 names 00000000"}',
            "was made by clip of 4 names 0",
        ),
        ("no json", "line 1, is not of a tagger"),
        ('{"image": 3, "tags": []}', "line 1, is not of a tagger"),
    ],
)
def test_lines_of_others_are_not_mixed(photos, tmp_path, capsys, line, message):
    file = tmp_path / "tags.jsonl"
    file.write_text(line + "\n")
    assert tag.main([*CLIP, str(photos), "--out", str(file)]) == 2
    assert message in capsys.readouterr().err
    assert file.read_text() == line + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*CLIP, "EMPTY"], "has no image"),
        ([*CLIP, "nowhere"], "nowhere does not exist"),
        (["--by", "clip", "--model", "tiny", "PHOTOS"], "needs the names it chooses from"),
        (["--by", "ram", "--weights", "nowhere/sd15", "PHOTOS"], "python -m weights.fetch --ram"),
        (["--by", "clip", "--dataset", "folder"], "--dataset folder: give its folder with --data"),
        (
            ["--by", "tadp", "--dataset", "folder", "--data", "x", "nowhere.json"],
            "nowhere.json cannot be read",
        ),
    ],
)
def test_bad_input_is_one_sentence(photos, tmp_path, capsys, arguments, message):
    (tmp_path / "empty").mkdir()
    places = {"EMPTY": str(tmp_path / "empty"), "PHOTOS": str(photos)}
    arguments = [places.get(x, x) for x in arguments]
    assert tag.main([*arguments, "--out", str(tmp_path / "tags.jsonl")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("tag.py: ") and message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--by", "clip", "x.png"], "--out is missing"),
        (["--judge", "tags.jsonl"], "give --dataset"),
        (["--by", "ram", "--out", "x", "--dataset", "ade20k", "x.png"], "give either images or --dataset"),
        (["--by", "ram", "--out", "x"], "give either images or --dataset"),
        (["--by", "ram", "--out", "x", "y.png", "--names", "sea"], "--names are what --by clip chooses from"),
        (["--by", "ram", "--out", ".", "y.png"], "--out . is a folder"),
        (["--by", "ram", "--out", "x", "y.png", "--threshold", "2"], "--threshold 2: give a score in 0..1"),
        (["--by", "tadp", "--out", "x"], "needs one file of captions"),
    ],
)
def test_flags_that_do_not_fit(capsys, arguments, message):
    with pytest.raises(SystemExit) as end:
        tag.main(arguments)
    assert end.value.code == 2 and message in capsys.readouterr().err


# ---- captions and quality


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data set of six images for training and two for validation."""
    root = tmp_path_factory.mktemp("folder")
    for split, indices in (("train", range(6)), ("val", range(6, 8))):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for i in indices:
            scene = scenes.draw(i)
            Image.fromarray(scene.image[:96]).save(root / "images" / split / f"{i}.png")
            Image.fromarray(scene.labels[:96]).save(root / "labels" / split / f"{i}.png")
    (root / "classes.txt").write_text("\n".join(scenes.CLASSES))
    return root


def test_captions_of_tadp_become_lines(folder, tmp_path, capsys):
    """Found by the end of the path; the first caption counts, with single blanks."""
    file, out = tmp_path / "captions.json", tmp_path / "blip.jsonl"
    entries = {"train/0.png": ["a  boat ", "another"], "7.png": ["snow"], "elsewhere/9.png": ["nothing"]}
    file.write_text(json.dumps({name: {"captions": x} for name, x in entries.items()}))
    flags = ["--dataset", "folder", "--data", str(folder), "--out", str(out)]
    assert tag.main(["--by", "tadp", str(file), *flags]) == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(x["image"], x["caption"]) for x in found] == [
        ("images/train/0.png", "a boat"),
        ("images/val/7.png", "snow"),
    ]
    assert "captions of 2 of 8 images" in capsys.readouterr().out
    for text, fault in (
        ('{"train/0.png": ["a boat"]}', '"captions" is missing, not a list'),
        ('{"train/0.png": {"captions": "a boat"}}', '"captions" is "a boat", not a list'),
        ('{"train/0.png": {"captions": []}}', "a tag or caption must be"),
        ("[5]", '"content" is [5], not a dict'),
    ):
        file.write_text(text)
        assert tag.main(["--by", "tadp", str(file), *flags]) == 2
        assert f"cannot be read as captions of TADP ({fault}" in capsys.readouterr().err


def test_the_quality_of_tags_by_hand():
    """Three images, classes sofa, rug, sea; a synonym, a tag that names no class, an image without tags."""
    tags = {
        "a": [("Couch", 0.9), ("carpet", 0.8), ("zebra", 0.7)],  # right, wrong, names none
        "b": [("sea", 0.6), ("SOFA", 0.5)],  # right, wrong
        "c": [],
    }
    report = measure_tags(tags, {"a": [0], "b": [2], "c": [0, 2]}, ["sofa", "rug", "sea"])
    assert (report.tags, report.naming, report.right, report.untagged) == (5, 4, 2, 1)
    assert (report.precision, report.recall) == (2 / 4, 2 / 4)
    # sofa: ranks a 0.9, b 0.5, c none; a and c show it: (1 + 2/3) / 2. sea: b first, then a and c tie.
    assert report.mAP == pytest.approx(((1 + 2 / 3) / 2 + (1 + 2 / 3) / 2) / 2)
    assert report.never == []
    assert "images without a tag: 1 of 3" in str(report)
    report = measure_tags({"a": [("sea", 1.0)]}, {"a": [1, 2]}, ["sofa", "rug", "sea"])
    assert report.never == ["rug"] and "never found: 1 of 2 classes: rug" in str(report)


def test_synonyms_are_of_classes_that_exist(tmp_path):
    """Every line names a class of the three sets; a synonym names it as its own name does."""
    known = set()
    for name in ("ade20k", "cocostuff", "cityscapes"):
        classes = read_classes(ROOT / "labels" / f"{name}.txt").names
        known |= {tag_key(prompt(x, name)) for x in classes}
    lines = [line for line in SYNONYMS.read_text().splitlines() if line and not line.startswith("#")]
    assert {tag_key(line.partition(":")[0]) for line in lines} <= known
    named = classes_named(["sidewalk", "road"])
    assert named["pavement"] == {0} and named["street"] == {1} and named["sidewalk"] == {0}
    (tmp_path / "wrong.txt").write_text("sofa couch\n")
    with pytest.raises(DataError, match="line 1: write `class: tag, tag`"):
        classes_named(["sofa"], tmp_path / "wrong.txt")


def test_a_file_of_tags_is_judged(folder, tmp_path, capsys):
    """Ground-truth tags are right; images without a line do not count."""
    dataset, file = open_dataset("folder", folder, "val"), tmp_path / "tags.jsonl"
    present = [scenes.CLASSES[k] for k in np.unique(dataset.load(0).labels) if k != 255]
    file.write_text(json.dumps({"image": "images/val/6.png", "tags": present}) + "\n")
    flags = ["--dataset", "folder", "--data", str(folder), "--split", "val", "--workers", "0"]
    assert tag.main(["--judge", str(file), *flags]) == 0
    out = capsys.readouterr().out
    assert "folder val: 1 of 2 images" in out
    assert "precision 100.0%" in out and "recall 100.0%" in out and "mAP 100.0%" in out
    assert "never found: 0 of" in out


# ---- RAM in a run


@pytest.fixture
def ram(tmp_path, monkeypatch):
    """A small RAM with the names of scenes in the folder that a run with random weights reads."""
    model = shake(RAM(SMALL_RAM)).eval()
    with torch.no_grad():
        model.fc.weight.mul_(20)
    names = [*scenes.CLASSES, *(f"thing {i}" for i in range(37))][:37]
    folder = tmp_path / "weights" / "ram"
    folder.mkdir(parents=True)
    save_file(model.state_dict(), folder / MODEL)
    (folder / NAMES).write_text("\n".join(names) + "\n")
    (folder / THRESHOLDS).write_text("0.5\n" * 36 + "1.0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(assemble, "load_ram", partial(load_ram, config=SMALL_RAM))
    return folder


def test_likely_tags_exceed_their_own_thresholds(ram):
    """Strictly; a given threshold takes their place, but what RAM's authors switched off stays off."""
    model, names, thresholds = load_ram(ram, config=SMALL_RAM)
    image = torch.rand(2, 3, 60, 90) * 2 - 1
    p = model(image).sigmoid()
    for given in (None, 0.0, 0.7):
        least = thresholds.clone() if given is None else torch.full_like(thresholds, given)
        least[thresholds == 1] = 1
        for row, tags in zip(p, likely_tags(model, image, names, thresholds, given), strict=True):
            order = sorted((k for k in range(37) if row[k] > least[k]), key=lambda k: -row[k])
            assert [name for name, _ in tags] == [names[k] for k in order]
            assert [score for _, score in tags] == pytest.approx([float(row[k]) for k in order])
    at = thresholds.clone()
    at[3] = p[0, 3]
    assert names[3] not in [name for name, _ in likely_tags(model, image[:1], names, at)[0]]


def test_ram_from_photos_to_a_label_map(ram, folder, tmp_path, capsys):
    """Trained with its tags, a model predicts new images with them, and only with the same files."""
    run, out = tmp_path / "run", tmp_path / "out"
    flags = f"--dataset folder --data {folder} --model tiny --weights random --run {run} --crop 64 --short 96"
    flags += " --batch 2 --iterations 1 --workers 0 --threads 1 --tags ram"
    assert train.main(flags.split()) == 0
    tags = lines_of(run / "tags-train.jsonl")
    assert [*tags] == [f"images/train/{i}.png" for i in range(6)] and any(tags.values())

    frozen = read_about(run / "last" / "model.safetensors")["frozen"]
    assert {*frozen} == {f"ram/{name}" for name in (MODEL, NAMES, THRESHOLDS)}
    photo = folder / "images" / "val" / "6.png"
    assert predict.main([str(run), str(photo), "--out", str(out)]) == 0
    record = json.loads((out / "predictions.jsonl").read_text())
    tagger = assemble.ram_tagger("random", torch.device("cpu"))
    image = normalise(to_tensor(Image.open(photo).convert("RGB"))[None])
    assert record["tags"] == [name for name, _ in tagger(image)[0]]

    more = [str(run), str(photo), "--out", str(tmp_path / "more")]
    (ram / THRESHOLDS).write_text("0.9\n" * 37)
    assert predict.main(more) == 2
    assert "ram_tag_list_threshold.txt is not the file that" in capsys.readouterr().err
    assert predict.main([*more, "--words", "sea, boat"]) == 0, "other words need no RAM"
    (ram / MODEL).unlink()
    assert predict.main([*more, "--tags", "ram"]) == 2
    error = capsys.readouterr().err
    assert "ram/model.safetensors is missing" in error and "weights.fetch --ram" in error


def test_missing_ram_is_one_sentence_before_training(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("weights.load.CODE", tmp_path)  # a fetched RAM lies beside the code
    flags = f"--dataset folder --data {folder} --model tiny --weights random --run run --tags ram --workers 0"
    assert train.main(flags.split()) == 2
    error = capsys.readouterr().err
    assert "weights/ram/model.safetensors does not exist" in error and "weights.fetch --ram" in error
    assert ram_folder("random") == Path("weights/ram") and ram_folder("/a/sd15") == Path("/a/ram")


def test_tags_go_straight_to_the_unet(folder, tmp_path):
    """`--condition tags`: the context is the vectors of the tags, with any source."""
    run = tmp_path / "run"
    flags = f"--dataset folder --data {folder} --model tiny --weights random --run {run} --crop 64 --short 96"
    flags += " --batch 2 --iterations 1 --workers 0 --threads 1 --condition tags"
    assert train.main(flags.split()) == 0
    tada = train.checkpoint.read_model(run)
    assert (tada.config.condition, tada.config.tags) == ("tags", "clip")
    text = tada.text([["sea", "boat"]])
    condition = tada.adapter(None, None, text)
    assert torch.equal(condition.context, tada.vectors[[tada.rows["sea"], tada.rows["boat"]]][None])
    out = tmp_path / "out"
    photo = str(folder / "images" / "val" / "6.png")
    assert predict.main([str(run), photo, "--out", str(out), "--words", "sea, boat", "--attention"]) == 0
    assert json.loads((out / "predictions.jsonl").read_text())["tags"] == ["sea", "boat"]


def test_the_two_lines_of_the_readme_work_one_below_the_other(folder, tmp_path, monkeypatch):
    """A model of one's own data reads words; only the length of the training is cut here."""
    readme = (ROOT / "README.md").read_text()
    (training,) = re.findall(r"^python train\.py (--dataset folder .*?) +#", readme, re.MULTILINE)
    (prediction,) = re.findall(r"^python predict\.py (runs/folder.*?) +#", readme, re.MULTILINE)
    assert training == "--dataset folder --data DIR --model tiny"
    monkeypatch.chdir(tmp_path)
    run = train.parse(training.split()).run
    short = f" --run {run} --iterations 1 --batch 2 --workers 0 --threads 1 --weights {ROOT}/weights/tiny"
    assert train.main((training.replace("DIR", str(folder)) + short).split()) == 0
    shutil.copy(folder / "images" / "val" / "6.png", "photo.png")
    assert predict.main(shlex.split(prediction.replace("photo.jpg", "photo.png"))) == 0
    assert json.loads(Path("predictions/predictions.jsonl").read_text())["tags"] == ["sea", "boat"]


def test_what_is_cut_is_counted_and_said(folder):
    """Single tags inside their prompt, or all tags of an image as one."""
    said: list[str] = []
    run = SimpleNamespace(print0=said.append)
    tokenizer = assemble.Tokenizer("weights/tiny/tokenizer")

    def report(lists: list[list[str]], **settings: object) -> list[str]:
        said.clear()
        config = SimpleNamespace(
            **{"condition": "tagging", "tag_tokens": "pooled", "templates": 1} | settings
        )
        report_cut(run, SimpleNamespace(config=config, tokenizer=tokenizer), lists)
        return [*said]

    long = "xyz " * 60
    assert report([["sea", "boat"], []]) == []
    assert report([["sea", long], [long, "q" * 200]])[0].startswith(
        "2 of 3 texts are cut to 77 tokens, such as"
    )
    many = [f"number {i}" for i in range(60)]
    assert report([many, ["sea"]]) == []
    assert report([many, ["sea"]], tag_tokens="prompt")[0].startswith("1 of 2 texts are cut to 77 tokens")


def test_words_and_sources():
    """A comma means words; a name of a source is never read as a word, nor the name of a missing file."""

    def choose(
        tags: str | None, words: str | None = None, least: float | None = None, trained=("clip", None)
    ):
        return choose_source(tags, words, least, condition="tagging", trained=trained)

    assert choose(None) == ("clip", None, None)
    assert choose("sea, boat") == ("words", "sea, boat", None)
    assert choose(None, "clip", trained=("ram", None)) == ("words", "clip", None)
    assert choose("ram") == ("ram", None, None) and choose("none") == ("none", None, None)
    assert choose(None, trained=("clip", 0.3)) == choose("clip", trained=("clip", 0.3)) == ("clip", None, 0.3)
    assert choose("ram", trained=("clip", 0.3)) == ("ram", None, None), "another tagger has another scale"
    assert choose(None, None, 0.5) == ("clip", None, 0.5)
    for given in ((None, "sea", 0.5), ("classes", None, 0.5), ("none", None, 0.5)):
        with pytest.raises(DataError, match="have no scores; leave it out"):
            choose(*given)
    for name in ("my,tags.jsonl", "tags.jsonl"):
        with pytest.raises(DataError, match="names a file: give a file of tags as --tags"):
            split_words(name, "tagging")


def test_a_file_without_any_tag_is_refused(folder, tmp_path, capsys):
    """Captions alone, or a threshold above every score: one sentence before training."""
    file, run = tmp_path / "tags.jsonl", tmp_path / "run"
    paths = [f"images/{split}/{i}.png" for split, n in (("train", range(6)), ("val", (6, 7))) for i in n]
    flags = f"--dataset folder --data {folder} --model tiny --weights random --run {run} --workers 0"
    for entry, more, message in (
        ({"caption": "a boat"}, "", "has no tag for any image: captions need --condition caption"),
        ({"tags": [["sea", 0.4]]}, " --tag-threshold 0.5", "has no tag of at least 0.5 for any image"),
    ):
        file.write_text("".join(json.dumps({"image": path} | entry) + "\n" for path in paths))
        assert train.main(f"{flags} --tags {file}{more}".split()) == 2
        assert message in capsys.readouterr().err


def test_a_second_tagger_waits_for_its_own_file(photos, tmp_path, capsys):
    """Two commands never write one file; captions never replace tags."""
    file = tmp_path / "tags.jsonl"
    with lock(tmp_path, "--out", ".tags.jsonl.lock"):
        assert tag.main([*CLIP, str(photos), "--out", str(file)]) == 2
    assert "is being written by another process: wait, or give another --out" in capsys.readouterr().err
    assert tag.main([*CLIP, str(photos / "00.png"), "--out", str(file)]) == 0
    before = file.read_bytes()
    captions = tmp_path / "captions.json"
    captions.write_text(json.dumps({"train/0.png": {"captions": ["a boat"]}}))
    with pytest.MonkeyPatch.context() as m:
        m.setattr(tag, "open_sets", lambda _: [Listed(["images/train/0.png"])])
        flags = ["--dataset", "folder", "--out", str(file)]
        assert tag.main(["--by", "tadp", str(captions), *flags]) == 2
    assert "was made by clip of 4 names" in capsys.readouterr().err and file.read_bytes() == before


class Listed:
    """A data set of which only the paths are asked for."""

    def __init__(self, paths: list[str]):
        self.paths = paths


def test_a_name_that_is_not_utf8_is_tagged(photos, tmp_path):
    name = os.fsdecode(b"z\xff.png")
    shutil.copy(photos / "00.png", tmp_path / name)
    file = tmp_path / "tags.jsonl"
    assert tag.main([*CLIP, str(tmp_path), "--out", str(file)]) == 0
    assert [*lines_of(file)] == [str(tmp_path / name)]
    assert len(read_tags(file, tmp_path, [name]).tags[name]) >= 1


@torch.no_grad()
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize(
    ("options", "words"),
    [({"tags": "clip"}, ["sea", "sand"]), ({"tags": "oracle"}, ["sea", "sand"]), ({}, ["owl", "sea"])]
    + [({"condition": "none"}, [])],
)
def test_the_text_tower_goes_once_all_words_have_vectors(options, words, known):
    """As on a GPU: whatever the images' words, the context is what it was. `{}` stands for RAM's names,
    `known` for tags of the training images that are all there are.
    """
    tada = assemble.build(TadaConfig(("sea", "sand"), model="tiny", weights="weights/tiny", **options))
    if not options:
        tada.config = replace(tada.config, tags="ram")
        tada.tagger = partial(likely_tags, None, names=("owl", "sea"))
    image = torch.rand(2, 3, 64, 128)
    before = tada(image, [words, []]).condition.context
    tada.rows.clear()
    cache_vectors(tada, words * known)
    drop_text_tower(tada)
    assert tada.clip.text_model is None
    assert torch.equal(tada(image, [words, []]).condition.context, before)


@pytest.mark.parametrize("options", [{"condition": "caption"}, {"tag_tokens": "prompt"}])
def test_prompts_keep_the_text_tower(options):
    tada = assemble.build(TadaConfig(("sea",), model="tiny", tags="oracle", **options))
    drop_text_tower(tada)
    assert tada.clip.text_model is not None
