"""LoRA (unet.py, `--lora`, run/merge.py): equal to peft's, saved without the UNet, merged on request."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from oracle import SMALL_UNET, official_folder, reference_unet
from peft import LoraConfig, inject_adapter_in_model
from proof import BAR, error
from safetensors.torch import load_file
from test_unet import inputs
from tiny_tada import TAGS, H, W, config, make, trained

from assemble import build
from errors import CheckpointError
from model import Tada
from run import merge
from run.checkpoint import frozen_digests, read_model, save_model
from run.options import parse
from run.start import fitting, start_from
from unet import LoRA, UNet, replace_projections
from weights.load import load
from weights.words import digest

RANK = 4
MERGE = "merge it first: python -m run.merge"
PROJECTIONS = ["to_q", "to_k", "to_v", "to_out.0"]


def awake(unet: UNet) -> UNet:
    """B starts at 0; other values make the update visible."""
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if name.endswith(".lora_B"):
                parameter.normal_(std=0.1)
    return unet


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """peft's LoRA in diffusers' UNet, and ours, with the same weights."""
    reference = reference_unet(SMALL_UNET)
    ours = load(UNet(SMALL_UNET), official_folder(reference, tmp_path_factory.mktemp("unet")))
    replace_projections(ours, partial(LoRA, rank=RANK))
    awake(ours)
    settings = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=PROJECTIONS)
    inject_adapter_in_model(settings, reference)
    state = {name: x for name, x in ours.state_dict().items() if ".lora_" in name}
    theirs = {
        name.replace("lora_A", "lora_A.default.weight").replace("lora_B", "lora_B.default.weight"): x
        for name, x in state.items()
    }
    missing = reference.load_state_dict({**reference.state_dict(), **theirs}, strict=True)
    assert not missing.missing_keys
    return reference, ours.eval()


def test_the_update_equals_peft_s(pair):
    """The noise, and the gradient of each A and B."""
    reference, ours = pair
    latent, t, context = inputs(SMALL_UNET)
    weight = torch.randn(2, 4, 16, 24)
    expected = reference(latent, t, context).sample
    result = ours(latent, t, context)
    assert error(result, expected) <= BAR
    (expected * weight).sum().backward()
    (result * weight).sum().backward()
    updates = {name: p.grad for name, p in ours.named_parameters() if ".lora_" in name}
    assert len(updates) == 2 * 4 * 32
    for name, gradient in updates.items():
        assert error(gradient, reference.get_parameter(f"{name}.default.weight").grad) <= 10 * BAR, name


def test_merged_layers_compute_the_same(pair):
    _, ours = pair
    latent, t, context = inputs(SMALL_UNET)
    with torch.no_grad():
        expected = ours(latent, t, context)
        state = ours.state_dict()
        merged = UNet(SMALL_UNET)
        replace_projections(merged, partial(LoRA, rank=RANK))
        merged.load_state_dict(state, strict=True)
        replace_projections(merged, merge.merged)
        assert merged.state_dict().keys() == UNet(SMALL_UNET).state_dict().keys()
        assert error(merged(latent, t, context), expected) <= BAR


def test_parameters_of_the_official_size():
    """Of rank 16: 32 attentions with four projections each."""
    with torch.device("meta"):
        unet = UNet()
        replace_projections(unet, partial(LoRA, rank=16))
    assert sum(p.numel() for name, p in unet.named_parameters() if ".lora_" in name) == 3_188_736


@pytest.fixture
def tada() -> Tada:
    """With the UNet and the VAE of the prior, which `make` shakes."""
    tada = make(weights="weights/tiny", lora=RANK)
    prior = {k: v for k, v in build(tada.config).state_dict().items() if k.startswith(("unet.", "vae."))}
    tada.load_state_dict({**tada.state_dict(), **prior})
    awake(tada.unet)
    return tada


def predicted(tada: Tada) -> torch.Tensor:
    image = torch.rand(2, 3, H, W, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        return tada.eval()(image, TAGS).prediction.main


def test_the_first_step_sees_the_prior():
    """B is 0: to the bit, the model without LoRA."""
    torch.manual_seed(0)
    plain = build(config(weights="weights/tiny"))
    torch.manual_seed(0)
    lora = build(config(weights="weights/tiny", lora=RANK))
    state = lora.state_dict() | {k: v for k, v in plain.state_dict().items() if not k.startswith("unet.")}
    lora.load_state_dict(state, strict=True)
    assert torch.equal(predicted(lora), predicted(plain))


def test_only_the_update_is_trained_and_saved(tada, tmp_path):
    """The file holds no weight of the prior, whose UNet's hash it has; it reads back to the bit."""
    unet = {name for name in trained(tada) if name.startswith("unet.")}
    assert unet == {name for name in tada.state_dict() if ".lora_" in name} and unet
    file = tmp_path / "model.safetensors"
    frozen = frozen_digests(tada.config)
    save_model(tada, file, frozen, {})
    assert {name for name in load_file(file) if name.startswith("unet.")} == unet
    assert "unet/diffusion_pytorch_model.safetensors" in frozen
    assert torch.equal(predicted(read_model(file)), predicted(tada))


def test_a_merged_model_is_one_of_full_training(tada, tmp_path, capsys):
    file, out = tmp_path / "model.safetensors", tmp_path / "merged" / "model.safetensors"
    save_model(tada, file, frozen_digests(tada.config), {"mIoU": 0.5})
    assert merge.main([str(file), "--out", str(out)]) == 0
    assert f"wrote {out}: the updates of rank {RANK}" in capsys.readouterr().out
    merged = read_model(out)
    assert merged.config == replace(tada.config, lora=0)
    assert error(predicted(merged), predicted(tada)) <= BAR
    for arguments, sentence in (
        ([str(file), "--out", str(out)], f"{out} exists, or its folder is a step's: give another --out"),
        ([str(out), "--out", str(tmp_path / "new")], "was trained without --lora: there is nothing to merge"),
        ([str(file), "--out", "/proc/new"], "/proc/new could not be written (Error while serializing"),
    ):
        assert merge.main(arguments) == 2
        assert sentence in capsys.readouterr().err
    (step := tmp_path / "step-000001").mkdir()
    save_model(tada, step / "model.safetensors", frozen_digests(tada.config), {})
    (step / "train.safetensors").touch()
    (step / "train.json").touch()
    hashes = {path.name: digest(path) for path in step.iterdir()}
    (step / "sha256.json").write_text(json.dumps(hashes))
    assert merge.main([str(step), "--out", str(step / "merged.safetensors")]) == 2  # none could read it there
    assert "its folder is a step's: give another --out" in capsys.readouterr().err


def test_which_models_a_run_with_lora_can_start_from(tada, tmp_path):
    """One of its own rank; one with a frozen UNet; not one with a UNet of its own, nor of another rank."""
    here = config(weights="weights/tiny", lora=RANK)
    files = {}
    for name, model in {
        "same": tada,
        "frozen": make(weights="weights/tiny", freeze_unet=True),
        "own": make(weights="weights/tiny"),
    }.items():
        (tmp_path / name).mkdir()
        files[name] = tmp_path / name / "model.safetensors"
        save_model(model, files[name], frozen_digests(model.config), {})
    files["merged"] = tmp_path / "merged" / "model.safetensors"
    merge.merge(files["same"], files["merged"])
    digests, frozen = frozen_digests(here), replace(here, lora=0, freeze_unet=True)
    for name, taken in (("same", "taken"), ("frozen", "the prior's, which that model did not train")):
        fitting(files[name], here, digests)
        new = build(here)
        assert f"  unet     {taken}\n" in start_from(files[name], new)
    start_from(files["same"], new)
    for name, x in tada.unet.named_parameters():
        if ".lora_" in name:
            assert torch.equal(x, new.unet.get_parameter(name)), name
    for name, other, sentence in (
        ("own", here, "has a UNet of its own, --lora keeps the prior's: leave it out"),
        ("same", replace(here, lora=8), "has LoRA of rank 4, not 8: give --lora 4"),
        ("same", replace(here, lora=0), f"not 0: give --lora 4, or {MERGE}"),
        ("same", frozen, "not 0: give --lora 4 instead of --freeze-unet"),
        ("merged", frozen, "has a UNet of its own, --freeze-unet keeps the prior's: leave it out"),
    ):
        with pytest.raises(CheckpointError) as caught:
            fitting(files[name], other, digests)
        assert str(caught.value).endswith(sentence)
    for name in ("merged", "own"):  # the advice, followed
        fitting(files[name], replace(here, lora=0), digests)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("4 --freeze-unet", "--lora 4 trains what --freeze-unet leaves as it is: give one of them"),
        ("-1", "--lora -1: give 0 or more, and less than 320"),
        ("320", "--lora 320: give 0 or more, and less than 320"),  # 320 x 320 is all of a projection
    ],
)
def test_a_rank_is_refused(flags, sentence, capsys):
    with pytest.raises(SystemExit):
        parse(["--lora", *flags.split()])
    assert sentence in capsys.readouterr().err
