"""lab/ablate.py: cached features equal the model's, runs are paired, records resume, tables are right."""

import fcntl
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from assemble import build
from data import Scenes
from errors import TadaError
from eval import evaluate
from images import scenes
from lab import ablate, tables
from lab.ablate import (
    ImageSet,
    build_row,
    cache_file,
    cache_images,
    configuration,
    evaluate_cached,
    figure,
    main,
    order,
    probe,
    read_images,
    train,
)
from lab.tables import CONTROLS, ROWS, report
from loading.tags import TagSource
from unet import UNet
from weights.load import load

FEW = {"train": range(12), "val": range(100_000, 100_008), "test": range(200_000, 200_008)}
TAGS = "tagging, loss, tags"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The cached features of a few images of each split."""
    folder = tmp_path_factory.mktemp("ablate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "SPLITS", scenes.SPLITS | FEW)
        cache_images(folder, [("train", 1.0), ("val", 1.0)])
    return folder


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(scenes, "SPLITS", scenes.SPLITS | FEW)


def cached(folder, split: str) -> ImageSet:
    return read_images(cache_file(folder, split, 1.0))


# ---- the cached images


def test_cached_features_equal_the_models_and_mirrored_images_come_last(folder):
    images, tada = cached(folder, "train"), build(configuration(ROWS[TAGS])).eval()
    assert len(images.labels) == 24
    scene = scenes.draw(FEW["train"][5])
    for row, image, labels in (
        (5, scene.image, scene.labels),
        (17, scene.image[:, ::-1], scene.labels[:, ::-1]),
    ):
        x = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.no_grad():
            for ours, theirs in zip(images.features, ablate.encode_image(tada, x), strict=True):
                assert torch.allclose(ours[row], theirs[0], atol=1e-4)
        assert torch.equal(images.labels[row], torch.from_numpy(labels.copy()))
        assert images.tags[row] == [word for word, _ in tada.zero_shot_tags(x)[0]]


def test_words_are_none_clips_or_the_ground_truths(folder):
    images = cached(folder, "val")
    assert images.words("classes", [0, 3]) is None
    assert images.words("clip", [0, 3]) == [images.tags[0], images.tags[3]]
    assert images.words("oracle", [3, 0]) == [list(scenes.draw(FEW["val"][i]).tags) for i in (3, 0)]


def test_without_ambiguity_look_alikes_are_drawn_apart_and_labels_stay(few, tmp_path):
    cache_images(tmp_path, [("val", 0.0), ("val", 1.0)])
    apart, alike = (read_images(cache_file(tmp_path, "val", x)) for x in (0.0, 1.0))
    assert torch.equal(apart.labels, alike.labels) and not torch.equal(
        apart.features.latent, alike.features.latent
    )


# ---- one run


@pytest.mark.parametrize("name", ["none", "caption", "classes", "implicit", TAGS, "oracle"])
def test_evaluation_of_cached_features_equals_eval(name, folder, few):
    """After two steps, so that every adapter has left its initial state: all pixels, and the tag scores."""
    tada, images = build_row(ROWS[name], 0), cached(folder, "val")
    train(tada, cached(folder, "train"), 2, 0)
    result, labels = evaluate_cached(tada, images)
    words = {Scenes("val").paths[i]: images.tags[i] for i in range(len(images.labels))}
    source, table = tada.config.tags, None
    if source == "clip":
        table = {path: [", ".join(tags)] for path, tags in words.items()} if name == "caption" else words
    whole = evaluate(tada, Scenes("val"), TagSource(source, scenes.CLASSES, table))
    assert (result.confusion - whole.confusion).abs().sum() <= 20  # of 131,072: float32 in other batches
    assert torch.allclose(result.scores, whole.scores, atol=1e-3) and torch.equal(
        result.present, whole.present
    )
    assert labels.shape == (8, 128, 128) and labels.dtype == torch.uint8
    right = (labels == images.labels).sum()
    assert right == result.confusion.diag().sum()


def test_shifted_tags_are_those_of_the_next_image(folder):
    tada, images = build_row(ROWS["oracle"], 0), cached(folder, "val")
    turned = ImageSet(images.features, images.labels.roll(-1, 0), images.tags)  # words come from the labels
    wrong, expected = evaluate_cached(tada, images, shift=1)[1], evaluate_cached(tada, turned)[1]
    assert torch.equal(wrong, expected) and not torch.equal(wrong, evaluate_cached(tada, images)[1])


def test_rows_of_a_seed_share_the_initial_decoder_and_the_prior():
    one, two, other = build_row(ROWS["none"], 0), build_row(ROWS[TAGS], 0), build_row(ROWS["none"], 1)
    same = [
        torch.equal(a, b) for a, b in zip(one.decoder.parameters(), two.decoder.parameters(), strict=True)
    ]
    assert all(same)
    weights = [x.decoder.classifier[1].weight for x in (one, other)]
    assert not torch.equal(*weights)
    with torch.device("meta"):
        unet = UNet(one.unet.config)
    unet = load(unet, "weights/tiny/unet")
    for name, x in unet.state_dict().items():
        assert torch.equal(one.unet.state_dict()[name], x)


def test_a_random_unet_depends_on_the_seed_but_not_on_the_row():
    none, oracle, other = (
        build_row(ROWS["none, random UNet"], 0),
        build_row(ROWS["oracle, random UNet"], 0),
        build_row(ROWS["none, random UNet"], 1),
    )
    name = "down_blocks.0.resnets.0.conv1.weight"
    assert torch.equal(none.unet.state_dict()[name], oracle.unet.state_dict()[name])
    assert not torch.equal(none.unet.state_dict()[name], other.unet.state_dict()[name])
    assert not torch.equal(none.unet.state_dict()[name], build_row(ROWS["none"], 0).unet.state_dict()[name])
    assert torch.equal(none.vae.encoder.conv_in.weight, build_row(ROWS["none"], 0).vae.encoder.conv_in.weight)


def test_every_epoch_has_every_image_once_half_of_them_mirrored():
    rows = torch.cat(list(order(512, 64, 0))).tolist()
    assert sorted(i % 512 for i in rows) == list(range(512)) and 200 < sum(i >= 512 for i in rows) < 312
    assert rows != torch.cat(list(order(512, 64, 1))).tolist()


def test_training_raises_accuracy_and_is_reproducible(folder):
    images = cached(folder, "train")
    first = [build_row(ROWS["none"], 0) for _ in range(2)]
    untrained = evaluate_cached(first[0], images)[0].pixel_accuracy
    for tada in first:
        train(tada, images, 8, 0)
    result = [evaluate_cached(tada, images)[0] for tada in first]
    assert torch.equal(result[0].confusion, result[1].confusion)
    assert result[0].pixel_accuracy > untrained + 0.05
    frozen = build_row(ROWS["none"], 0)
    assert torch.equal(first[0].vae.encoder.conv_in.weight, frozen.vae.encoder.conv_in.weight)
    assert not torch.equal(first[0].unet.conv_in.weight, frozen.unet.conv_in.weight)


def test_the_probe_reads_classes_from_planted_tokens():
    """Tokens that encode the class of their patch give accurate labels; constant tokens do not."""
    r = torch.Generator().manual_seed(0)
    patches = torch.randint(0, 24, (40, 8, 8), generator=r)
    tokens = torch.nn.functional.one_hot(patches, 24).float().flatten(1, 2)  # (n, 64, 24)
    tokens = 5 * torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1)
    labels = patches.repeat_interleave(2, 1).repeat_interleave(2, 2).byte()
    planted = ImageSet(
        ablate.FrozenFeatures(torch.zeros(40, 4, 2, 2), tokens, torch.zeros(40, 1)), labels, [[]] * 40
    )
    constant = ImageSet(planted.features._replace(tokens=torch.ones_like(tokens)), labels, [[]] * 40)
    assert probe(planted, planted, 400, 0).pixel_accuracy > 0.85
    assert probe(constant, constant, 400, 0).pixel_accuracy < 0.15


# ---- all runs


@pytest.mark.slow
def test_a_truncated_record_resumes(few, tmp_path, capsys):
    command = ["--rows", "none", "oracle", "tagging, loss, tags", "--split", "val", "--steps", "2"]
    command += ["--seeds", "1", "--jobs", "1", "--out", str(tmp_path)]
    assert main(command) == 0
    file = tmp_path / "runs.jsonl"
    whole = file.read_text().splitlines(keepends=True)
    assert len(whole) == 4 and "oracle, another's tags" in capsys.readouterr().out
    file.write_text("".join(whole[:3]) + whole[3][:40])  # the last run was being written
    assert main(command) == 0
    again = file.read_text().splitlines(keepends=True)
    assert again[:3] == whole[:3]
    before, after = (json.loads(lines[3]) for lines in (whole, again))
    assert {**before, "seconds": 0} == {**after, "seconds": 0}

    drawing = Image.open(tmp_path / "figure.jpg")
    assert drawing.width > 5 * ablate.TILE and len(np.unique(np.asarray(drawing))) > 50
    assert capsys.readouterr().out.count("/1 ") == 1  # one run was made
    assert main([*command[:-6], "--steps", "3", "--out", str(tmp_path)]) == 2
    assert "give another --out" in capsys.readouterr().err


@pytest.fixture
def nothing_to_run(few, monkeypatch):
    """Write only the record."""
    monkeypatch.setattr(ablate, "cache_images", lambda *arguments: None)
    monkeypatch.setattr(ablate, "figure", lambda *arguments: Image.new("RGB", (1, 1)))


def test_only_a_truncated_last_line_is_ever_removed_from_a_record(nothing_to_run, tmp_path):
    """A record is never rewritten, so a full disk or a kill cannot empty it."""
    command = ["--rows", "none", "--seeds", "1", "--split", "val", "--steps", "2", "--out", str(tmp_path)]
    file = tmp_path / "runs.jsonl"
    whole = json.dumps(ablate.conditions("val", 2)) + "\n" + json.dumps(record(none=[0.5])[0]) + "\n"
    file.write_text(whole)
    os.utime(file, (1e9, 1e9))
    assert main(command) == 0 and file.stat().st_mtime == 1e9
    with file.open("a") as f:
        f.write('{"row": "no')
    assert main(command) == 0 and file.read_text() == whole


def test_a_record_in_use_is_refused(nothing_to_run, tmp_path, capsys):
    with open(tmp_path / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["--rows", "none", "--split", "val", "--out", str(tmp_path)]) == 2
    assert "is being written by another process: wait, or give another --out" in capsys.readouterr().err
    assert not (tmp_path / "runs.jsonl").exists()


def test_the_figure_names_what_is_missing(folder, few):
    with pytest.raises(TadaError, match="val-none.png is missing"):
        figure(folder, "val")


# ---- the tables


SHARED = {"scenes_version": 1, "split": "val", "steps": 5}


def record(**rows: list[float]) -> list[dict]:
    """Runs of each row with seeds 0, 1, ..., every class as good as the mean."""

    def entry(name: str, seed: int, x: float) -> dict:
        iou = [x] * len(scenes.CLASSES)
        return {"row": name, "seed": seed, "mIoU": x, "mIoU_other": x - 0.3, "IoU": iou, "tag_mAP": None}

    return [entry(name, seed, x) for name, values in rows.items() for seed, x in enumerate(values)]


def test_tables_have_means_standard_errors_and_paired_differences():
    text = report(
        {"scenes_version": 1, "split": "val", "steps": 5}, record(none=[0.1, 0.3], oracle=[0.3, 0.6])
    )
    assert "| none | 2 | 20.0 ± 10.0 |  | 20.0 ± 10.0 |  | 53.9 |" in text
    assert "| oracle | 2 | 45.0 ± 15.0 | +25.0 ± 5.0 | 45.0 ± 15.0 |  |  |" in text
    assert "- oracle - none > 10: holds, +25.0 ± 5.0" in text
    assert "| oracle, another's tags | 2 | 15.0 ± 15.0 | -5.0 ± 5.0 |  |  |  |" in text
    assert "- none - oracle, another's tags > 0: holds, +5.0 ± 5.0" in text
    assert "Table 6" not in text


def test_a_claim_below_its_margin_fails():
    assert "oracle - none > 10: FAILS, +9.0" in report(SHARED, record(none=[0.1], oracle=[0.19]))


def test_gains_by_ground_truth_tags_are_listed_with_and_without_the_prior():
    runs = record(none=[0.2], oracle=[0.4])
    runs += [x | {"row": f"{x['row']}, random UNet", "mIoU": x["mIoU"] / 2} for x in runs]
    runs += [x | {"row": f"{x['row']}, nothing alike"} for x in runs[:2]]
    text = report(SHARED, runs)
    assert "- gain by ground-truth tags: +20.0\n- gain by ground-truth tags, random UNet: +10.0\n" in text
    assert "- none - none, random UNet > 0: holds, +10.0" in text
    (row,) = [x for x in text.splitlines() if x.startswith("| oracle, nothing alike")]
    assert row == "| oracle, nothing alike | 1 | 40.0 |  | 40.0 |  |  |"  # other images than those of none


def test_look_alikes_are_the_pairs_of_the_scenes(few):
    iou = [0.5 if name in {x for pair in scenes.PAIRS for x in pair} else 0.0 for name in scenes.CLASSES]
    assert tables.lookalikes(iou) == 0.5


def test_short_tables_use_the_seeds_that_all_their_rows_have():
    runs = record(tagging=[0.1, 0.2, 0.9]) + [x | {"row": "loss weight 5"} for x in record(x=[0.2, 0.4])]
    text = report(SHARED, runs)
    table6 = text[text.index("Table 6") :]
    assert "| tagging | 2 | 15.0 ± 5.0 |" in table6 and "| loss weight 5 | 2 | 30.0 ± 10.0 |" in table6


def test_rows_are_the_papers_and_the_controls():
    assert [row.seeds for row in tables.TABLE_5] == [5] * 9 and len(ROWS) == 9 + 10 + 1 + 3 + 4
    assert [row.config["tag_loss_weight"] for row in tables.TABLE_6] == [5, 10, 15]
    assert [row.config["blocks"] for row in tables.TABLE_7] == [4, 6, 8, 10]
    assert {row.name: row.longer for row in CONTROLS}["none, 10 times longer"] == 10


def test_bad_arguments_and_empty_records_are_refused_in_one_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--seeds", "0"])
    assert "--seeds 0" in capsys.readouterr().err
    empty = tmp_path / "runs.jsonl"
    empty.write_text("")
    assert main(["--report", str(empty)]) == 2 and "has no runs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "number"),
    [
        (b"not JSON\n", 1),
        (b"\xff\xfe\n", 1),
        (b"[1]\n", 1),
        (b'{"split": "val"}\n', 1),
        (json.dumps(SHARED).encode() + b'\n{"row": "none"}\n', 2),
    ],
)
def test_a_file_that_is_not_a_record_is_named_with_its_line(tmp_path, capsys, content, number):
    file = tmp_path / "other.jsonl"
    file.write_bytes(content)
    assert main(["--report", str(file)]) == 2
    message = f"ablate.py: {file}, line {number}, is not from ablate.py: give the runs.jsonl of an --out\n"
    assert capsys.readouterr().err == message


def test_help_has_no_default_of_none(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "of each row (default: its own, 1 to 5)" in text and "None" not in text
