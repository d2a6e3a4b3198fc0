"""run/recipes.py, run/options.py: the paper's recipes, the flags, validation, the name of the run folder."""

import json
import re
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch.distributed.run

from data import open_dataset
from model import TadaConfig
from run.options import Options, config_of, parse, parser
from run.recipes import paper_row, recipe

# The keys of "options" in config.json of runs before a flag was an entry of `Options`.
KEYS = """
accumulate adapter_start attention_maps batch blocks check checkpoint_activations clip compile condition
crop cuda_graph data dataset decoder dropout eval_every freeze_unet fresh from_run iterations kernels
log_every long lora lr model noise preset queries run save_every scale_latent scales seed short
tag_loss_weight tag_threshold tag_tokens tags templates threads timestep unet_lr_scale warmup weight_decay
weights whole workers
"""


# ---- the recipes


def test_the_panoptic_recipe_is_the_papers():
    """Section 4.1: 1e-4, batch 64, 9k; the rest is ODISE's, and the decoder is Mask2Former by default."""
    o = parse(["--dataset", "coco-panoptic"])
    assert (o.decoder, o.model) == ("mask2former", "sd15")
    assert (o.lr, o.batch, o.iterations, o.crop) == (1e-4, 64, 9000, (640, 640))
    assert (o.weight_decay, o.clip, o.warmup, o.unet_lr_scale) == (0.05, 0.01, 250, 0.1)
    assert (o.scales, o.data) == ((0.1, 2.0), "data/coco")
    assert parse(["--dataset", "coco-panoptic", "--decoder", "fpn"]).clip is None


@pytest.mark.parametrize(
    ("flags", "crop", "iterations", "box"),
    [
        ("--dataset ade20k", (512, 512), 80_000, (512, 2048)),
        ("--dataset ade20k --decoder upernet", (512, 512), 160_000, (512, 2048)),
        ("--dataset ade20k --crop 640", (640, 640), 80_000, (640, 2560)),
        ("--dataset cocostuff", (640, 640), 80_000, (640, 2560)),
        ("--dataset cityscapes", (512, 1024), 90_000, (1024, 2048)),
    ],
)
def test_recipes_are_the_papers(flags, crop, iterations, box):
    """Section 4.1 and Tables 1 to 3: crops, iterations, 6e-5; mmsegmentation's boxes and warm-up."""
    o = parse(flags.split())
    assert (o.crop, o.iterations, (o.short, o.long)) == (crop, iterations, box)
    assert (o.lr, o.batch, o.weight_decay, o.warmup) == (6e-5, 16, 0.01, 1500)
    assert (o.model, o.unet_lr_scale) == ("sd15", 1)
    assert (o.queries, o.blocks, o.tag_loss_weight, o.dropout) == (32, 2, 1, 0.1)


def test_preset_vpd_is_vpds_and_flags_override_it():
    """fpn_vpd_sd1-5_512x512_gpu8x2.py: 8e-5, 0.001, UNet x0.1; vpd_seg.py: t = 1, unscaled, no noise."""
    vpd = ["--dataset", "ade20k", "--preset", "vpd"]
    o = parse(vpd)
    assert (o.lr, o.weight_decay, o.unet_lr_scale, o.condition) == (8e-5, 0.001, 0.1, "classes")
    assert (o.timestep, o.noise, o.scale_latent, o.attention_maps) == (1, "none", False, True)
    assert parse([*vpd, "--lr", "1e-4"]).lr == 1e-4


def test_preset_demo_mirrors_and_no_more():
    """It is a recipe for the drawn images; without it the augmentation is mmsegmentation's."""
    o, plain = parse(["--preset", "demo"]), parse([])
    assert (o.iterations, o.warmup, o.lr, o.scales, o.colours) == (350, 35, 2e-3, (1.0, 1.0), False)
    assert (plain.iterations, plain.lr, plain.scales, plain.colours) == (200, 1e-3, None, True)
    assert (o.dataset, o.model, o.batch) == ("scenes", "tiny", 8)
    assert parse(["--preset", "demo", "--lr", "1e-3"]).lr == 1e-3


@pytest.mark.parametrize("flags", ["--dataset folder --data x", "--decoder mask2former", "--model sd15"])
def test_preset_demo_is_refused_elsewhere(flags, capsys):
    with pytest.raises(SystemExit):
        parse(["--preset", "demo", *flags.split()])
    assert "--preset demo is for the drawn images, the tiny model" in capsys.readouterr().err


def test_test_windows_are_mmsegmentations():
    dataset = open_dataset("scenes", "", "val")
    for crop, stride in (("512", (341, 341)), ("640", (426, 426)), ("512 1024", (341, 683))):
        o = parse(f"--dataset folder --data x --model sd15 --crop {crop}".split())
        assert config_of(o, dataset).stride == stride
    assert recipe("cityscapes", "sd15", "fpn").whole


# ---- the tags


@pytest.mark.parametrize(
    ("flags", "tags"),
    [
        ("--dataset ade20k", "ram"),
        ("--dataset cocostuff", "ram"),
        ("--dataset cityscapes --condition tags", "ram"),
        ("--dataset coco-panoptic", "ram"),
        ("--dataset ade20k --model tiny", "clip"),
        ("--dataset folder --data x", "clip"),
        ("--dataset panoptic --data x", "clip"),
        ("", "clip"),
        ("--condition tags", "clip"),
        ("--dataset ade20k --condition classes", "classes"),
        ("--dataset ade20k --preset vpd", "classes"),
        ("--condition none", "classes"),
        ("--condition oracle", "oracle"),
        ("--dataset ade20k --tags classes", "classes"),
    ],
)
def test_the_tagger_is_the_papers_on_its_data_sets(flags, tags):
    """RAM at sd15, CLIP elsewhere; none where no words per image are used."""
    assert parse(flags.split()).tags == tags


def test_a_run_that_is_resumed_keeps_its_tags(tmp_path, monkeypatch):
    """An older run of the plain command was trained with the class names; --fresh takes today's default."""
    monkeypatch.chdir(tmp_path)
    plain = ["--dataset", "ade20k"]
    run = Path(parse(plain).run)
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"options": {"condition": "tagging", "tags": "classes"}}))
    assert parse(plain).tags == "ram", "without a checkpoint nothing is resumed"
    (run / "last").symlink_to("step-000010")
    (run / "step-000010").mkdir()
    assert (parse(plain).tags, parse(plain).run) == ("classes", str(run))
    assert parse([*plain, "--fresh"]).tags == "ram"
    assert parse([*plain, "--condition", "none", "--run", str(run)]).tags == "classes"
    assert parse([*plain, "--condition", "tags", "--run", str(run)]).tags == "ram", "of another condition"
    for text in ('{"options": 5}', "[" * 2000, "5"):
        (run / "config.json").write_text(text)
        assert parse(plain).tags == "ram", "which training will refuse"
    assert parse([*plain, "--tags", "ram"]).tags == "ram"


@pytest.mark.parametrize(
    ("settings", "row"),
    [
        (("ade20k", "tagging", "ram", 1.0), "Table 1: mIoU 55.8"),
        (("ade20k", "tagging", "clip", 1.0), "Table 1: .*there with RAM's tags, here clip"),
        (("ade20k", "tagging", "classes", 1.0), "Table 5 .*with loss, mIoU 55.5"),
        (("ade20k", "tagging", "classes", 0.0), "Table 5 .*no loss, mIoU 54.8"),
        (("ade20k", "none", "classes", 1.0), "Table 5 .*Uncondition, mIoU 53.9"),
        (("ade20k", "classes", "classes", 1.0), "Table 5 .*54.2"),
        (("coco-panoptic", "tagging", "ram", 1.0), "Table 4: PQ 56.1"),
        (("ade20k", "tagging", "oracle", 1.0), "Figure 1"),
        (("ade20k", "tags", "ram", 1.0), "section 3.4"),
        (("folder", "tagging", "clip", 1.0), "^$"),
    ],
)
def test_the_first_screen_names_the_row_of_the_paper(settings, row):
    assert re.search(row, paper_row(*settings))


# ---- the flags


def test_the_options_of_config_json_keep_their_names():
    assert sorted(asdict(parse([])).keys() - {"colours", "device"}) == KEYS.split()


def test_settings_of_the_model_have_one_default():
    """A flag for a setting of TadaConfig has its default, where that does not depend on the data set."""
    o, settings = parse(["--dataset", "ade20k"]), {x.name: x.default for x in fields(TadaConfig)}
    shared = settings.keys() & asdict(o).keys() - {"dataset", "weights", "tags"}
    assert len(shared) == 18
    assert all(getattr(o, name) == settings[name] for name in shared)
    assert len(parser()._actions) == 1 + sum(bool(option.metadata) for option in fields(Options))


def test_help_marks_computed_defaults():
    """Every flag prints its default or marks it with *, but switches and --preset, which are off."""
    o = parse([])
    for action in parser()._actions[1:]:
        off = action.nargs == 0 or action.dest == "preset"
        assert off or "*" in action.help or f"(default: {getattr(o, action.dest)})" in action.help


def test_torchrun_passes_our_flags_on():
    """It refuses a flag that may abbreviate one of its own."""
    for action in parser()._actions:
        flag = action.option_strings[0]
        parsed = torch.distributed.run.get_args_parser().parse_args(["train.py", flag, "1"])
        assert parsed.training_script_args == [flag, "1"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--dataset", "imagenet"],
        ["--lr", "-1"],
        ["--crop", "0"],
        ["--timestep", "1000"],
        ["--tags", "none.jsonl"],
        ["--condition", "caption"],
        ["--condition", "none", "--tags", "clip"],
        ["--iterations", "0"],
        ["--dataset", "ade20k", "--decoder", "mask2former"],
        ["--pixel-decoder", "fpn"],
        ["--dataset", "panoptic"],
        ["--condition", "oracle", "--tags", "clip"],
        ["--crop", "64", "64", "64"],
        ["--short", "0"],
        ["--eval-every", "0"],
        ["--workers", "-1"],
        ["--seed", "-1"],
        ["--clip", "-1"],
        ["--dropout", "1"],
        ["--unet-lr-scale", "-1"],
        ["--weight-decay", "inf"],
        ["--tag-loss-weight", "nan"],
        ["--seed", str(2**63)],
        ["--tags", "x" * 300],
    ],
)
def test_an_illegal_flag_exits_with_code_2(flags, capsys):
    with pytest.raises(SystemExit) as exited:
        parse(flags)
    assert exited.value.code == 2
    assert flags[-2] in capsys.readouterr().err


# ---- the run folder's name


def test_default_runs_keep_their_folders():
    """Also with flags that do not change the result, or that have their default value."""
    for flags, run in (
        ("", "scenes-tiny-fpn-tagging"),
        ("--workers 0 --threads 1 --check --fresh --log-every 5 --accumulate 2", "scenes-tiny-fpn-tagging"),
        ("--kernels torch --compile --checkpoint-activations --eval-every 7", "scenes-tiny-fpn-tagging"),
        ("--decoder mask2former", "scenes-tiny-mask2former-tagging"),
        ("--dataset ade20k --crop 512 --lr 6e-5", "ade20k-sd15-fpn-tagging"),
        ("--dataset folder --data x --model tiny --condition none", "folder-tiny-fpn-none"),
        ("--dataset coco-panoptic", "coco-panoptic-sd15-mask2former-tagging"),
        ("--condition oracle", "scenes-tiny-fpn-oracle"),
    ):
        assert parse(flags.split()).run == f"runs/{run}"


TABLES = """
--dataset ade20k --decoder fpn --crop 512 --tags RAM.jsonl
--dataset ade20k --decoder upernet --crop 512 --tags RAM.jsonl
--dataset ade20k --decoder fpn --crop 640 --tags RAM.jsonl
--dataset ade20k --decoder upernet --crop 640 --tags RAM.jsonl
--dataset cocostuff --decoder fpn --crop 640 --tags RAM.jsonl
--dataset cityscapes --decoder fpn --crop 512 1024 --tags RAM.jsonl
--dataset coco-panoptic --decoder mask2former --tags RAM.jsonl
--dataset ade20k --condition none
--dataset ade20k --condition caption --tags Tag2Text.jsonl
--dataset ade20k --condition classes
--dataset ade20k --condition caption --tags BLIP.jsonl
--dataset ade20k --condition implicit
--dataset ade20k --condition tagging --tags classes --tag-loss-weight 0
--dataset ade20k --condition tagging --tags classes
--dataset ade20k --tag-loss-weight 5
--dataset ade20k --tag-loss-weight 10
--dataset ade20k --tag-loss-weight 15
--dataset ade20k --blocks 4
--dataset ade20k --blocks 6
--dataset ade20k --blocks 8
--dataset ade20k --blocks 10
--dataset ade20k --preset vpd
"""


def test_each_row_of_the_papers_tables_has_its_own_folder(tmp_path, monkeypatch):
    """So that they can be typed one after the other."""
    monkeypatch.chdir(tmp_path)
    for name in ("RAM", "Tag2Text", "BLIP"):
        (tmp_path / f"{name}.jsonl").touch()
    runs = [parse(line.split()).run for line in TABLES.strip().splitlines()]
    assert len(set(runs)) == len(runs) == 22
    assert "runs/ade20k-sd15-upernet-tagging-crop640-tags_RAM" in runs
    assert "runs/ade20k-sd15-fpn-tagging-tag_loss_weight5" in runs
    assert "runs/ade20k-sd15-fpn-classes-preset_vpd" in runs
    assert "runs/cityscapes-sd15-fpn-tagging-tags_RAM" in runs


def test_any_flags_make_a_legal_folder_name(tmp_path, monkeypatch):
    """Every flag at once, with names that a file system may refuse."""
    monkeypatch.chdir(tmp_path)
    tags = tmp_path / f"{'ä' * 60} :*.jsonl"
    tags.touch()
    line = """
    --dataset ade20k --condition tagging --decoder upernet --crop 512 1024 --short 300 --weights ../a\\b/c:d
    --tag-tokens prompt --templates 80 --queries 48 --blocks 12 --adapter-start empty --tag-loss-weight 12.5
    --timestep 100 --noise none --attention-maps --freeze-unet --dropout 0.25 --preset vpd
    --iterations 123456 --batch 128 --lr 1.5e-7 --unet-lr-scale 1e-5 --weight-decay 1e-5 --warmup 12345
    --clip 0.001 --seed 123456789 --tags
    """
    run, other = (parse([*line.split(), str(tags), *more]).run[5:] for more in ([], ["--seed", "1"]))
    assert set(run) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.")
    assert "-crop512x1024-short300-weights_c_d-tags__-" in run and len(run) <= 200
    assert run != other, "what is cut off counts too"
    (tmp_path / run).mkdir()
