"""lab/draw.py equals diffusers: noise schedule, sampler, and the image of the whole pipeline."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from oracle import SMALL_UNET, reference_unet, tiny_folder
from PIL import Image
from proof import error

from clip import Tokenizer
from lab.draw import ddim_times, main, sample
from unet import UNet, alphas_cumprod

SD15 = {  # scheduler/scheduler_config.json of v1.5
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def test_the_noise_schedule_is_the_official_one():
    alphas = alphas_cumprod()
    assert torch.allclose(alphas, DDIMScheduler(**SD15).alphas_cumprod, rtol=1e-5, atol=0)
    sigma = (1 - alphas[[0, 1, 10, 100, 261]]).sqrt()
    assert torch.allclose(sigma, torch.tensor([0.02915, 0.04128, 0.09782, 0.32523, 0.58680]), atol=1e-5)


@pytest.mark.parametrize("steps", [1, 7, 10, 50, 999])
def test_the_time_steps_are_the_schedulers(steps):
    scheduler = DDIMScheduler(**SD15)
    scheduler.set_timesteps(steps)
    assert ddim_times(steps) == scheduler.timesteps.tolist()


def test_ten_steps_equal_the_reference():
    """The same noise, two prompts, guidance: every step by diffusers' scheduler and UNet."""
    reference, ours = reference_unet(SMALL_UNET), UNet(SMALL_UNET)
    ours.load_state_dict(reference.state_dict())
    noise, context, empty = torch.randn(2, 4, 16, 8), torch.randn(2, 77, 48), torch.randn(2, 77, 48)
    scheduler = DDIMScheduler(**SD15)
    scheduler.set_timesteps(10)
    latent = noise
    with torch.no_grad():
        for t in scheduler.timesteps:
            eps_empty, eps = (reference(latent, t, c).sample for c in (empty, context))
            latent = scheduler.step(eps_empty + 7.5 * (eps - eps_empty), t, latent).prev_sample
    assert error(sample(ours, noise, context, empty, ddim_times(10), 7.5), latent) <= 1e-4


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder of `tiny` weights in the official layout, and the reference models that are in it."""
    folder = tmp_path_factory.mktemp("tiny")
    return folder, *tiny_folder(folder)


def test_the_image_is_the_pipelines(tiny, tmp_path, capsys):
    """The command's PNG against diffusers' StableDiffusionPipeline, same noise: one grey level at most."""
    folder, unet, vae, clip = tiny
    out = tmp_path / "new" / "image.png"
    prompt = "sheep on grass"
    options = [
        "--model",
        "tiny",
        "--weights",
        str(folder),
        "--steps",
        "5",
        "--size",
        "128",
        "192",
        "--seed",
        "3",
    ]
    assert main([prompt, *options, "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out

    pipeline = StableDiffusionPipeline(
        vae, None, None, unet, DDIMScheduler(**SD15), None, None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        hidden = clip.text_model(Tokenizer(folder / "tokenizer")([prompt, ""])).last_hidden_state
    noise = torch.randn(1, 4, 16, 24, generator=torch.Generator().manual_seed(3))
    expected = pipeline(
        prompt_embeds=hidden[:1],
        negative_prompt_embeds=hidden[1:],
        latents=noise,
        height=128,
        width=192,
        num_inference_steps=5,
        guidance_scale=7.5,
    ).images[0]
    pixels = np.asarray(Image.open(out)).astype(int)
    assert pixels.shape == (128, 192, 3)
    assert np.abs(pixels - np.asarray(expected)).max() <= 1
    assert pixels.std() > 5  # not a flat image


def test_another_prompt_or_seed_gives_another_image(tiny, tmp_path):
    folder, *_ = tiny

    def image(prompt: str, seed: int) -> bytes:
        out = tmp_path / "x.png"
        options = ["--model", "tiny", "--weights", str(folder), "--steps", "2", "--seed", str(seed)]
        assert main([prompt, *options, "--out", str(out)]) == 0
        return out.read_bytes()

    first = image("sheep", 1)
    assert image("sheep", 1) == first
    assert image("snow", 1) != first
    assert image("sheep", 2) != first


def test_random_weights_are_announced(tmp_path, capsys):
    """They need no vocabulary: the prompt is spelled in bytes, so another prompt gives another image."""
    out = tmp_path / "x.png"
    options = ["--model", "tiny", "--weights", "random", "--steps", "1", "--out", str(out)]

    def image(prompt: str) -> bytes:
        assert main([prompt, *options]) == 0
        assert "random weights" in capsys.readouterr().out
        return out.read_bytes()

    first = image("Schaf, 羊")
    assert Image.open(out).size == (128, 128)
    assert image("Schaf, 羊") == first != image("Schaf, 牛")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--weights", "nowhere"], "nowhere/vae does not exist; get vae/"),
        (["--size", "500"], "--size 500: need one or two multiples of 64"),
        (["--steps", "0"], "--steps 0: need 1 to 999"),
        (["--out", "image"], "--out image: the name must end with one of .png"),
    ],
)
def test_errors_are_one_sentence_and_exit_2(options, named, capsys):
    try:
        code = main(["a horse", *options])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    message = capsys.readouterr().err
    assert named in message
    assert "Traceback" not in message


def test_a_missing_part_is_named(tiny, tmp_path, capsys):
    """Each of the four, with the other three present."""
    folder, *_ = tiny
    parts = ("vae", "unet", "clip", "tokenizer")
    cures = [f"{part} does not exist; get " for part in parts[:3]] + ["tokenizer/vocab.json is missing: "]
    for missing, cure in zip(parts, cures, strict=True):
        weights = tmp_path / f"without {missing}"
        weights.mkdir()
        for part in set(parts) - {missing}:
            (weights / part).symlink_to(folder / part)
        options = ["--model", "tiny", "--weights", str(weights), "--out", str(tmp_path / "x.png")]
        assert main(["a horse", *options]) == 2
        message = capsys.readouterr().err
        assert f"{weights}/{cure}" in message and "weights.fetch" in message
