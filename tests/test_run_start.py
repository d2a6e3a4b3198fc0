"""run/start.py: what a new model takes from a trained one (a run that starts so: tests/test_train.py)."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_run_checkpoint import NAMES, config, make
from torch import Tensor

from assemble import build
from errors import CheckpointError
from model import Tada
from run.checkpoint import frozen_digests, save_model, write_step
from run.options import parse
from run.start import PER_CLASS, fitting, start_from

OTHER = ("boat", "road", "sea")  # two of NAMES in another order, and a new one
SAME = [(0, NAMES.index("boat")), (2, NAMES.index("sea"))]


def saved(tada: Tada, place: Path) -> Path:
    save_model(tada, place / "model.safetensors", frozen={}, metrics={})
    return place / "model.safetensors"


def parameters(tada: Tada) -> dict[str, Tensor]:
    return {name: x.detach().clone() for name, x in tada.named_parameters()}


def started(trained: Tada, place: Path, **options) -> tuple[str, dict, dict, dict]:
    """The report; the parameters of the trained model, of the new one before and after its start."""
    torch.manual_seed(0)  # the same random prior
    tada = build(config(**options))
    before = parameters(tada)
    report = start_from(saved(trained, place), tada)
    return report, parameters(trained), before, parameters(tada)


@pytest.mark.parametrize("decoder", ["fpn", "upernet", "mask2former"])
def test_outputs_of_classes_are_taken_by_name(decoder, tmp_path):
    """All other tensors are the trained ones; vectors of the class names are those of the new classes."""
    trained = make(decoder=decoder, things=(True,) * 5)
    report, old, new, after = started(trained, tmp_path, decoder=decoder, classes=OTHER, things=(True,) * 3)
    rows = [name for name in after if name.startswith(PER_CLASS)]
    assert len(rows) == {"fpn": 2, "upernet": 4, "mask2former": 2}[decoder]
    for name in after.keys() - rows:
        assert torch.equal(after[name], old[name]), name
    for name in rows:
        for k, place in SAME + [(3, 5)] * (decoder == "mask2former"):  # "no object" comes last
            assert torch.equal(after[name][k], old[name][place]), name
        assert torch.equal(after[name][1], new[name][1]), name
    assert "  unet     taken\n  adapter  taken\n" in report
    assert "  decoder  taken, but new for 1 of 3 classes, such as road" in report


def test_equal_classes_take_the_whole_model(tmp_path):
    report, old, _, after = started(make(), tmp_path, timestep=7)
    assert all(torch.equal(after[name], old[name]) for name in old)
    assert report.splitlines()[1:] == [
        "  unet     taken", "  adapter  taken", "  decoder  taken", "  timestep was 0, is 7"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "part", "tensor"),
    [
        ({"decoder": "upernet"}, "decoder", "decoder.auxiliary_head"),
        ({"condition": "implicit"}, "adapter", "adapter."),
        ({"queries": 16}, "adapter", "adapter.queries"),
    ],
)
def test_a_part_that_does_not_fit_stays_new_as_a_whole(options, part, tensor, tmp_path):
    report, old, new, after = started(make(), tmp_path, **options)
    for name in after:
        expected = new if name.startswith(f"{part}.") else old
        assert torch.equal(after[name], expected[name]), name
    assert re.search(rf"  {part:8} new: {tensor}\S* is not in both, or has another shape\n", report)
    assert f"{next(iter(options))} was " in report


def test_a_model_that_cannot_fit_is_refused(tmp_path):
    file, here = saved(make(freeze_unet=True), tmp_path), config()
    assert len(fitting(file, here, {})) == 64
    prior = replace(here, weights="weights/tiny")
    cases = [
        (replace(here, model="sd15"), {}, "has the size tiny: give --model tiny"),
        (prior, frozen_digests(prior), "was trained on other weights, random: give --weights"),
    ]
    for other, frozen, message in cases:
        with pytest.raises(CheckpointError, match=message):
            fitting(file, other, frozen)
    with pytest.raises(CheckpointError, match="a UNet of its own, --freeze-unet"):
        fitting(saved(make(), tmp_path), replace(here, freeze_unet=True), {})
    torch.manual_seed(1)
    with pytest.raises(CheckpointError, match="random weights of another seed: give --seed"):
        start_from(file, build(here))
    step = write_step(tmp_path, 1, make(), {}, {}, tensors={"x": torch.zeros(1)}, facts={})
    saved(make(), step)
    with pytest.raises(CheckpointError, match="changed after it was written"):
        fitting(step / "model.safetensors", here, {})


def test_the_prior_is_compared_and_not_its_path(tmp_path):
    """A frozen UNet comes from the prior's files: the model that takes it trains it from there."""
    moved = shutil.copytree("weights/tiny", tmp_path / "moved")
    frozen = config(weights="weights/tiny", freeze_unet=True)
    tada = build(frozen)
    save_model(tada, tmp_path / "model.safetensors", frozen_digests(frozen), metrics={})
    here = config(weights=str(moved))
    fitting(tmp_path / "model.safetensors", here, frozen_digests(here))
    report = start_from(tmp_path / "model.safetensors", build(here))
    assert "  unet     the prior's, which that model did not train\n  adapter  taken" in report
    unet = next((moved / "unet").glob("*.safetensors"))
    unet.write_bytes(unet.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="other weights, weights/tiny: give --weights"):
        fitting(tmp_path / "model.safetensors", here, frozen_digests(here))


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("runs/ade20k-sd15", "ade20k_sd15"),
        ("runs/a/best/", "a"),
        ("/x/runs/a/step-000006/model.safetensors", "a_step_000006"),
    ],
)
def test_the_run_is_named_after_its_source(given, name):
    assert parse(["--from", given]).run == f"runs/scenes-tiny-fpn-tagging-from_run_{name}"
