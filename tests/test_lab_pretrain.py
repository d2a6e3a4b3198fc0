"""lab/pretrain.py: captions, the vocabulary, exact resume; the committed weights/tiny."""

import json
from pathlib import Path
from random import Random

import pytest
import torch
from diffusers import AutoencoderKL
from proof import BAR, error
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from assemble import part_configs, prior
from clip import TEMPLATES, CLIPConfig, name_vectors, zero_shot
from errors import RunError, WeightsError
from images import scenes
from lab import pretrain
from lab.evidence import precision_and_chance, psnr, tags_matrix
from lab.pretrain import (
    FILES,
    RECORD,
    DrawnScenes,
    Job,
    Stage,
    average,
    caption,
    draw_scenes,
    fit,
    main,
    rate,
    read_facts,
    train_tokenizer,
    write,
    write_config,
)
from unet import TIMES, alphas_cumprod
from vae import VAE, VAEConfig
from weights.load import load

TINY = Path(__file__).parents[1] / "weights" / "tiny"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> DrawnScenes:
    """Scenes that the committed weights were not trained on."""
    return draw_scenes(tmp_path_factory.mktemp("scenes"), 512, 1_900_000)


# Scenes and captions


def test_images_are_scenes_in_our_range(drawn):
    scene = scenes.draw(1_900_007)
    image = drawn.batch(torch.tensor([7, 3]))
    assert image.shape == (2, 3, 128, 128) and image.min() >= -1 and image.max() <= 1
    levels = ((image[0] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0)
    assert torch.equal(levels, torch.from_numpy(scene.image)) and drawn.tags[7] == scene.tags


def test_captions_name_visible_tags_and_drop_a_fifth():
    tags, r = ("sea", "sky", "sand", "boat", "tree"), Random(0)
    captions = [caption(tags, r) for _ in range(4000)]
    prefixes = sorted({template.split("{}")[0] for template in TEMPLATES} - {""}, key=len, reverse=True)

    def words(text: str) -> list[str]:
        bare = next((text.removeprefix(x) for x in prefixes if text.startswith(x)), text)
        return [word for word in bare.removesuffix(" in a video game.").rstrip(".").split(", ") if word]

    lists = [words(text) for text in captions]
    assert all(set(x) <= set(tags) and len(set(x)) == len(x) >= 1 for x in lists)
    assert abs(sum(text in map(", ".join, [x]) for text, x in zip(captions, lists, strict=True)) - 2000) < 150
    whole = [x for x in lists if len(x) > 1]
    assert abs(sum(map(len, whole)) / len(whole) - 4.0) < 0.05  # 5 x 0.8; a lone survivor is rare
    assert abs(len([x for x in lists if len(x) == 1]) / len(lists) - 0.205) < 0.03
    assert len({x[0] for x in lists}) == 5 and max(map(len, lists)) == 5


def test_an_image_with_one_tag_has_a_caption():
    assert all("sea" in caption(("sea",), Random(i)) for i in range(50))


# The vocabulary


def test_the_vocabulary_is_clips_in_small(drawn, tmp_path):
    """Ids equal those that transformers reads from the same files; every class name is one token."""
    tokenizer = train_tokenizer(drawn, tmp_path, seed=0)
    size = CLIPConfig.tiny().vocabulary
    assert (tokenizer.start, tokenizer.end) == (size - 2, size - 1)
    reference = CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    r = Random(1)
    texts = [caption(tags, r) for tags in drawn.tags[:50]] + ["Zebra crossing 5%", "", "naïve 羊"]
    ids = tokenizer(texts)
    expected = reference(texts, padding="max_length", max_length=77)["input_ids"]
    for row, theirs in zip(ids.tolist(), expected, strict=True):
        assert row[: row.index(size - 1)] == theirs[: theirs.index(size - 1)]
    lengths = (tokenizer(list(scenes.CLASSES)) != tokenizer.end).sum(dim=1) - 1
    assert lengths.tolist() == [1] * 24


# The loop


STAGE = Stage(12, 2, 1e-3)


def job(run: Path, seed: int = 3) -> Job:
    return Job(run, run, seed, "cpu")


def noise_of(unet, indices, r, noise):
    x = torch.randn(2, 4, 8, 16, generator=noise)
    t = torch.randint(TIMES, (2,), generator=noise)
    return (unet(x, t, torch.full((2, 3, 128), r.random())) - x).square().mean()


def test_an_interrupted_stage_resumes_to_the_same_weights(tmp_path, monkeypatch):
    (tmp_path / "whole").mkdir()
    (tmp_path / "broken").mkdir()
    whole = fit("unet", noise_of, 10, STAGE, job(tmp_path / "whole"))

    calls = []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return noise_of(*arguments)

    monkeypatch.setattr(pretrain, "SAVE_SECONDS", 0)
    with pytest.raises(KeyboardInterrupt):
        fit("unet", interrupted, 10, STAGE, job(tmp_path / "broken"))
    assert read_facts(tmp_path / "broken" / "unet.safetensors")["step"] == 7
    resumed = fit("unet", interrupted, 10, STAGE, job(tmp_path / "broken"))
    assert len(calls) == 8 + 5
    for name, x in whole.state_dict().items():
        assert torch.equal(x, resumed.state_dict()[name]), name
    facts = [read_facts(tmp_path / x / "unet.safetensors") for x in ("whole", "broken")]
    assert facts[0]["sums"] == facts[1]["sums"] and facts[0]["step"] == 12


def test_a_stage_refuses_to_resume_with_another_budget(tmp_path):
    fit("unet", noise_of, 10, STAGE, job(tmp_path))
    with pytest.raises(RunError, match=r"'seed': 3.*'seed': 4.*give the same settings, or another --run"):
        fit("unet", noise_of, 10, STAGE, job(tmp_path, seed=4))


def test_the_rate_rises_then_falls_to_zero():
    rates = [rate(step, 4000) for step in range(4000)]
    assert rates[0] == 0.01 and rates[99] == 1 and max(rates) == 1 and rates[-1] < 1e-6
    assert abs(rates[2050] - 0.5) < 1e-3
    assert rate(0, 1) == 1


def test_the_decay_of_the_average_grows_to_its_limit():
    averages = [torch.zeros(1)]
    average(averages, [torch.ones(1)], 1)
    assert averages[0].item() == pytest.approx(1 - 2 / 11)
    average(averages, [torch.zeros(1)], 10**6)
    assert averages[0].item() == pytest.approx(0.999 * (1 - 2 / 11))


# The files


def test_diffusers_reads_the_autoencoder_and_its_scale(drawn, tmp_path):
    vae = VAE(VAEConfig.tiny())
    write(vae, tmp_path / FILES["vae"])
    write_config(vae.config, 2.5, tmp_path / "vae" / "config.json")
    reference = AutoencoderKL.from_pretrained(tmp_path / "vae", torch_dtype=torch.float32)
    ours = load(VAE(part_configs("tiny", tmp_path)[0]), tmp_path / "vae")
    image = drawn.batch(torch.arange(2))
    with torch.no_grad():
        mean = reference.encode(image).latent_dist.mode()
        assert error(ours.encode(image), mean * reference.config.scaling_factor) <= BAR
    assert ours.config.scale == reference.config.scaling_factor == 2.5
    file = tmp_path / "vae" / "config.json"
    file.write_text(file.read_text().replace("2.5", "2.6"))
    with pytest.raises(WeightsError, match="sha256.json has another hash"):
        part_configs("tiny", tmp_path)


def test_a_missing_scale_is_an_error(tmp_path):
    write(VAE(VAEConfig.tiny()), tmp_path / FILES["vae"])
    with pytest.raises(WeightsError, match=r"vae/config\.json has no valid scaling_factor"):
        prior("tiny", tmp_path)
    assert part_configs("tiny", "random")[0] == VAEConfig.tiny()


def test_weights_that_overflow_float16_are_not_written(tmp_path):
    vae = VAE(VAEConfig.tiny())
    vae.quant_conv.bias.data[0] = 1e5
    with pytest.raises(AssertionError, match=r"quant_conv\.bias and 0 more overflow float16"):
        write(vae, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [["--longer", "0"], ["--images", "100"]])
def test_impossible_budgets_are_refused(options, capsys):
    with pytest.raises(SystemExit):
        main(options)
    assert "need --longer > 0 and 512 to 500000 images" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_writes_a_folder_that_every_command_reads(tmp_path, capsys):
    """Every stage, in few steps; a second run changes nothing."""
    options = ["--longer", "0.001", "--images", "512", "--run", str(tmp_path / "run")]
    assert main([*options, "--out", str(tmp_path / "out")]) == 0
    files = {file: (tmp_path / "out" / file).read_bytes() for file in (*FILES.values(), RECORD)}
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert [(name, part["step"], part["budget"]["seed"]) for name, part in record.items()] == [
        ("vae", 4, 0),
        ("clip", 1, 0),
        ("unet", 6, 0),
    ]
    vae, unet, clip, tokenizer = prior("tiny", tmp_path / "out")
    with torch.no_grad():
        context, _ = clip.text(tokenizer(["sheep, grass"]))
        eps = unet(torch.randn(1, 4, 16, 16), torch.tensor([500]), context)
        assert eps.isfinite().all() and vae.decode(eps).shape == (1, 3, 128, 128)
    assert main([*options, "--out", str(tmp_path / "out")]) == 0
    assert all((tmp_path / "out" / file).read_bytes() == x for file, x in files.items())


# The committed weights. Thresholds are well below weights/tiny/README.md, which measures more images.


@pytest.fixture(scope="module")
def tiny():
    """The VAE, UNet, CLIP and tokenizer of weights/tiny."""
    parts = prior("tiny", TINY)
    return *(part.eval() for part in parts[:3]), parts[3]


def test_the_committed_weights_are_small_and_half_precision():
    files = [file for file in TINY.rglob("*") if file.is_file() and ".vectors" not in file.parts]
    assert sum(file.stat().st_size for file in files) <= 20e6
    for file in FILES.values():
        assert {x.dtype for x in load_file(TINY / file).values()} == {torch.float16}, file


def test_committed_latents_have_unit_variance(tiny, drawn):
    with torch.no_grad():
        latent = tiny[0].encode(drawn.batch(torch.arange(64)))
    assert 0.9 < latent.std() < 1.1


def test_committed_vae_reconstructs_images(tiny, drawn):
    """In dB; the mean colour of each image would have 16."""
    with torch.no_grad():
        assert psnr(tiny[0], DrawnScenes(drawn.images[:64], drawn.tags[:64])) > 24


def test_committed_unet_uses_captions(tiny, drawn):
    """Loss: own caption < empty < another image's, on average over the same times and noises."""
    vae, unet, clip, tokenizer = tiny
    n, r, seeded = 96, Random(0), torch.Generator().manual_seed(0)
    captions = [caption(tags, r) for tags in drawn.tags[:n]]
    t, alphas = torch.randint(TIMES, (n,), generator=seeded), alphas_cumprod()
    losses = []
    with torch.no_grad():
        x = vae.encode(drawn.batch(torch.arange(n)))
        eps, alpha = torch.randn(x.shape, generator=seeded), alphas[t][:, None, None, None]
        z = alpha.sqrt() * x + (1 - alpha).sqrt() * eps
        for prompts in (captions, [""] * n, captions[1:] + captions[:1]):
            losses.append(float((unet(z, t, clip.text(tokenizer(prompts))[0]) - eps).square().mean()))
    right, empty, wrong = losses
    assert right < empty < wrong < 1  # 1: a guess of zero


def test_committed_clip_finds_tags(tiny, drawn):
    _, _, clip, tokenizer = tiny
    with torch.no_grad():
        _, embedding = clip.image(drawn.batch(torch.arange(128)))
    names = name_vectors(clip, tokenizer, scenes.CLASSES, TEMPLATES, shared=True)
    targets = tags_matrix(drawn.tags[:128])
    found, chance = precision_and_chance(zero_shot(clip, embedding, names), targets)
    assert found > 2 * chance
