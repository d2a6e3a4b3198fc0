"""The official files are what they should be: `python -m pytest -m weights`, for whoever has weights/sd15.

Each proof is a function of a weights folder that returns the line to print, or fails with what it measured.
Those marked `weights` give it the official files; the others rehearse it with weights/tiny, and see it fail.
"""

import csv
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import reference_clip
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTokenizer

from assemble import load_clip, load_part, part_configs, prior
from clip import PROMPT, TEMPLATES, CLIPConfig, name_vectors, zero_shot
from images import scenes
from lab.draw import draw
from lab.evidence import psnr
from lab.pretrain import DrawnScenes
from unet import alphas_cumprod
from vae import VAE
from weights.fetch import File, mismatch, official
from weights.words import digest

ROOT = Path(__file__).parents[1]
TINY, SD15 = ROOT / "weights" / "tiny", ROOT / "weights" / "sd15"
TABLE = ROOT / "tests" / "fixtures" / "vpd_text_vectors.csv"
COORDINATES = (7, 200, 393, 586)  # of each vector in the table: any would do
# Of a row, relative. Two of VPD's vectors differ by 0.48 at least; TF32, torch's default on GPUs when those
# were made, rounds factors to 5e-4.
ROW_ERROR = 0.02
SEEN = (100_000, 100_004, 100_008, 100_026)  # of the scenes `val`: a mountain, an island, a street, a beach
TIMES = (200, 400, 600, 800)  # of the noise: between, all in all, seeing the image and seeing nothing

slow_on_cpu = pytest.mark.timeout(4 * 3600)  # the whole UNet


@pytest.fixture
def passed(capsys):
    """Print a line, captured or not."""

    def say(line: str) -> None:
        with capsys.disabled():
            print(f"\nPASS {line}")

    return say


def owned(folder: Path = SD15) -> tuple[File, ...]:
    """The official files in `folder`, in single or half precision; fail unless all are there."""
    half = (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    files = official("fp16" if half else "fp32")
    if missing := [file.local for file in files if not (folder / file.local).is_file()]:
        cure = "`python -m weights.fetch` downloads the official files"
        pytest.fail(f"{folder} lacks {', '.join(missing)}: {cure}", pytrace=False)
    return files


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


# ---- the files


def prove_files(files: Sequence[File], folder: Path) -> str:
    """Every file has the size and hash of the table in weights/fetch.py."""
    wrong = {file.local: mismatch(folder / file.local, file) for file in files}
    wrong = {name: difference for name, difference in wrong.items() if difference}
    assert not wrong, f"not the pinned files: {wrong}"
    return f"files: {len(files)} sizes and hashes agree with the table of weights/fetch.py"


@pytest.mark.weights
def test_the_official_files_are_the_pinned_ones(passed):
    passed(prove_files(owned(), SD15))


def test_rehearsal_of_files(tmp_path):
    names = ("unet/diffusion_pytorch_model.safetensors", "tokenizer/merges.txt")
    files = [File("", "", "", name, (TINY / name).stat().st_size, digest(TINY / name)) for name in names]
    assert prove_files(files, TINY).startswith("files: 2 sizes and hashes")
    folder = copy_of_tiny(tmp_path)
    changed = bytearray((folder / names[1]).read_bytes())
    changed[100] ^= 1
    (folder / names[1]).write_bytes(changed)
    with pytest.raises(AssertionError, match=r"not the pinned files: \{'tokenizer/merges.txt': 'sha256 "):
        prove_files(files, folder)


def test_without_the_official_files_the_cure_is_named(tmp_path):
    """Failed, not skipped: in one sentence."""
    with pytest.raises(pytest.fail.Exception) as failure:
        owned(tmp_path)
    sentence = str(failure.value)
    assert sentence.startswith(f"{tmp_path} lacks unet/") and "\n" not in sentence
    assert sentence.endswith(": `python -m weights.fetch` downloads the official files")
    for file in official("fp16"):
        (tmp_path / file.local).parent.mkdir(exist_ok=True)
        (tmp_path / file.local).touch()
    assert owned(tmp_path) == official("fp16")
    (tmp_path / "tokenizer" / "merges.txt").unlink()
    with pytest.raises(pytest.fail.Exception, match=r"lacks tokenizer/merges\.txt: "):
        owned(tmp_path)


# ---- the text tower


class Vectors(NamedTuple):
    """What the table keeps of N text vectors."""

    names: list[str]
    norms: Tensor  # (N,)
    values: Tensor  # (N, 4)


def kept(names: Sequence[str], vectors: Tensor) -> Vectors:
    """Of vectors `(N, C)`; the coordinates are taken modulo C, which is 128 in tiny."""
    coordinates = [x % vectors.shape[1] for x in COORDINATES]
    return Vectors([*names], vectors.norm(dim=1).double(), vectors[:, coordinates].double())


def published(name: str) -> Vectors:
    """Set `name` of the table, "ade20k" or "nyu"."""
    lines = [line for line in TABLE.read_text().splitlines() if not line.startswith("#")]
    rows = [row for row in csv.DictReader(lines) if row["set"] == name]
    numbers = torch.tensor([[float(row[f"x{i}"]) for i in COORDINATES] for row in rows]).double()
    norms = torch.tensor([float(row["norm"]) for row in rows]).double()
    return Vectors([row["name"] for row in rows], norms, numbers)


# One prompt, or the mean over several. Of those that a test tries, the likely one is first.
ONE, MEAN = {f'"{PROMPT}"': (PROMPT,)}, {"the mean over 80 templates": TEMPLATES}
OTHERS = ("a photo of a {}.", "{}", "a {}", "{}.", "a {}.", "a photo of {}", "a photo of {}.")
OTHERS += ("a photo of the {}", "a photo of the {}.", "an image of a {}", "a picture of a {}")
OTHER_PROMPTS = {f'"{prompt}"': (prompt,) for prompt in OTHERS}


def row_errors(ours: Vectors, theirs: Vectors, width: int) -> Tensor:
    """The larger of the relative errors of the norm and of the four coordinates, `(N,)`."""
    typical = theirs.norms / width**0.5
    values = (ours.values - theirs.values).square().mean(dim=1).sqrt() / typical
    return torch.maximum(values, (ours.norms / theirs.norms - 1).abs())


def prove_text(
    weights: Path,
    model: str,
    expected: Vectors,
    prompts: dict[str, Sequence[str]],
    others: dict[str, Sequence[str]] | None = None,
    bar: float = ROW_ERROR,
) -> str:
    """The text tower gives the `expected` vectors under one of the prompts; else the nearest is named."""
    config = part_configs(model, weights)[2]
    clip, tokenizer = load_clip(config, weights)
    clip = clip.to(device()).eval()
    names, tried = expected.names, {}
    for prompt, templates in (prompts | (others or {})).items():
        ours = kept(names, name_vectors(clip, tokenizer, names, templates).cpu())
        errors = row_errors(ours, expected, config.text.width)
        if errors.max() <= bar and prompt in prompts:
            norms = f"norms {ours.norms.mean():.2f} +- {ours.norms.std(correction=0):.2f}"
            return f"{len(names)} vectors of {prompt}: {norms}, largest error of a row {errors.max():.1e}"
        tried[prompt] = errors
    nearest = min(tried, key=lambda prompt: tried[prompt].mean())
    errors = tried[nearest]
    worst = names[int(errors.argmax())]
    raise AssertionError(
        f"no prompt of {len(prompts)} gives the vectors to within {bar}: the nearest is {nearest}, "
        f"mean error {errors.mean():.3f}, {int((errors <= bar).sum())} of {len(names)} rows agree, "
        f"the farthest is {worst!r} with {errors.max():.3f}"
    )


@pytest.mark.weights
def test_the_text_tower_gives_the_vectors_of_ade20k(passed):
    owned()
    passed("text, ADE20K: " + prove_text(SD15, "sd15", published("ade20k"), ONE | OTHER_PROMPTS | MEAN))


@pytest.mark.weights
def test_the_text_tower_gives_the_vectors_of_nyu(passed):
    owned()
    passed("text, NYU: " + prove_text(SD15, "sd15", published("nyu"), MEAN, ONE | OTHER_PROMPTS))


def test_the_table_is_of_the_published_vectors(clip_class_embeddings):
    for name, file, norm, spread in (("ade20k", "ade20k_150", 28.27, 0.28), ("nyu", "nyu", 22.54, 0.54)):
        table, vectors = published(name), torch.from_numpy(np.load(clip_class_embeddings / f"{file}.npy"))
        ours = kept(table.names, vectors)
        for x, y in ((table.norms, ours.norms), (table.values, ours.values)):
            assert torch.allclose(x, y, rtol=0, atol=5.1e-5)
        assert abs(table.norms.mean() - norm) < 5e-3 and abs(table.norms.std() - spread) < 1e-2


def test_the_names_of_the_table():
    lines = (ROOT / "labels" / "ade20k.txt").read_text().splitlines()
    assert published("ade20k").names == [line.split(",")[0] for line in lines]
    rooms = published("nyu").names
    assert len(set(rooms)) == 27 and rooms[:2] == ["printer room", "bathroom"]


def test_two_published_vectors_are_never_taken_for_each_other():
    """By the few numbers that the table keeps: the bar is a fraction of their differences."""
    for name in ("ade20k", "nyu"):
        table = published(name)
        for i in range(1, len(table.names)):
            rolled = Vectors(table.names, table.norms.roll(i), table.values.roll(i, 0))
            assert row_errors(rolled, table, 768).min() > ROW_ERROR
            assert row_errors(rolled, table, 768).median() > 5 * ROW_ERROR


@pytest.fixture(scope="module")
def transformers_vectors():
    """Tiny's text vectors by another implementation: of a prompt or several."""
    reference = reference_clip(CLIPConfig.tiny())
    state = {name: x.float() for name, x in load_file(TINY / "clip" / "model.safetensors").items()}
    reference.load_state_dict(state, strict=True)
    files = [str(TINY / "tokenizer" / name) for name in ("vocab.json", "merges.txt")]
    tokenizer = CLIPTokenizer(*files)

    def vectors(templates: Sequence[str], names: Sequence[str] = scenes.CLASSES) -> Vectors:
        texts = [template.format(name) for name in names for template in templates]
        ids = tokenizer(texts, padding="max_length", max_length=77, return_tensors="pt")
        with torch.no_grad():
            pooled = reference.text_model(**ids).pooler_output
        return kept(names, pooled.unflatten(0, (len(names), -1)).mean(dim=1))

    return vectors


def copy_of_tiny(folder: Path) -> Path:
    for part in ("clip", "unet", "vae", "tokenizer"):
        shutil.copytree(TINY / part, folder / part)
    return folder


def damage(file: Path, name: str) -> None:
    """Set a tensor to zero."""
    tensors = load_file(file)
    save_file(tensors | {name: torch.zeros_like(tensors[name])}, file, metadata={"format": "pt"})


def test_rehearsal_of_one_prompt(transformers_vectors, tmp_path):
    """Right; another prompt that is a candidate; one that is none; a damaged tower."""
    expected = transformers_vectors((PROMPT,))
    line = prove_text(TINY, "tiny", expected, ONE | OTHER_PROMPTS)
    assert line.startswith('24 vectors of "a photo of a {}": norms 11.3') and "error of a row" in line
    line = prove_text(TINY, "tiny", transformers_vectors(("a {}.",)), ONE | OTHER_PROMPTS)
    assert line.startswith('24 vectors of "a {}."')

    odd = transformers_vectors(("a photo of the {}!",))
    named = r"no prompt of 12 gives .* nearest is \"a photo of a \{\}\.\", mean error 0\.0\d\d, 0 of 24"
    with pytest.raises(AssertionError, match=named):
        prove_text(TINY, "tiny", odd, ONE | OTHER_PROMPTS)

    folder = copy_of_tiny(tmp_path)
    damage(folder / "clip" / "model.safetensors", "text_model.encoder.layers.2.mlp.fc2.weight")
    with pytest.raises(AssertionError, match="0 of 24 rows agree, the farthest is "):
        prove_text(folder, "tiny", expected, ONE)


def test_rehearsal_of_the_80_templates(transformers_vectors):
    mean = transformers_vectors(TEMPLATES, ("sea", "cow", "umbrella"))
    assert prove_text(TINY, "tiny", mean, MEAN).startswith("3 vectors of the mean over 80 templates: ")
    with pytest.raises(
        AssertionError, match="no prompt of 1 .* the nearest is the mean over 80 .* 3 of 3 rows"
    ):
        prove_text(TINY, "tiny", mean, ONE, MEAN)


def test_one_row_of_another_name_is_named(transformers_vectors):
    expected = transformers_vectors((PROMPT,))
    expected.values[3] = expected.values[4]
    with pytest.raises(AssertionError, match="23 of 24 rows agree, the farthest is 'sheep' with "):
        prove_text(TINY, "tiny", expected, ONE)


# ---- the autoencoder


def seen(zoom: int) -> DrawnScenes:
    """The scenes `SEEN`, enlarged."""
    drawn = [scenes.draw(index) for index in SEEN]
    images = torch.from_numpy(np.stack([scene.image for scene in drawn])).permute(0, 3, 1, 2).float()
    images = F.interpolate(images, scale_factor=zoom, mode="bicubic").clamp(0, 255).round().byte()
    return DrawnScenes(images.permute(0, 2, 3, 1).numpy(), [scene.tags for scene in drawn])


class Blocks:
    """As an autoencoder with one colour per 8x8 pixels for a latent."""

    def encode(self, image: Tensor) -> Tensor:
        return F.avg_pool2d(image, 8)

    def decode(self, latent: Tensor) -> Tensor:
        return F.interpolate(latent, scale_factor=8)


@torch.no_grad()
def prove_autoencoder(weights: Path, model: str, zoom: int, least: float) -> str:
    """Drawn scenes come back at `least` dB of PSNR or more, and better than as one colour per 8x8 pixels."""
    vae, drawn = load_part(VAE, part_configs(model, weights)[0], weights).eval(), seen(zoom)
    ours, blocks = psnr(vae, drawn), psnr(Blocks(), drawn)
    size = drawn.images.shape[1]
    line = f"autoencoder: PSNR {ours:.1f} dB on {len(SEEN)} scenes of {size}x{size}"
    line += f", at least {max(least, blocks):.1f} (one colour per 8x8 pixels: {blocks:.1f})"
    assert ours >= least and ours > blocks, line
    return line


@pytest.mark.weights
@slow_on_cpu
def test_the_autoencoder_reconstructs_scenes(passed):
    """Of 256x256, the size of its training. Published for it are 23.4 +- 3.8 dB on photographs of COCO of
    that size (stabilityai/sd-vae-ft-mse, README.md), which have more detail than enlarged scenes of 128x128.
    """
    owned()
    passed(prove_autoencoder(SD15, "sd15", zoom=2, least=25))


def test_rehearsal_of_the_autoencoder(tmp_path):
    assert prove_autoencoder(TINY, "tiny", zoom=1, least=25.5).startswith("autoencoder: PSNR 26.")
    with pytest.raises(AssertionError, match=r"PSNR 26\.\d dB .* at least 40\.0"):
        prove_autoencoder(TINY, "tiny", zoom=1, least=40)
    folder = copy_of_tiny(tmp_path)
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    damage(file, "decoder.up_blocks.1.upsamplers.0.conv.weight")
    with pytest.raises(AssertionError, match=r"at least 22\.2 \(one colour per 8x8 pixels: 22\.2\)"):
        prove_autoencoder(folder, "tiny", zoom=1, least=0)


# ---- the UNet


@torch.no_grad()
def prove_denoising(
    weights: Path, model: str, form: str, zoom: int, noises: int, most: float, shift: int = 1
) -> str:
    """The loss of scenes under their own words is below `most` times that under the words of another scene.

    Both are in one batch, with the same noise and time; `shift` is from one scene to the other.
    """
    vae, unet, clip, tokenizer = prior(model, weights)
    vae, unet, clip = (part.to(device()).eval() for part in (vae, unet, clip))
    drawn, seeded = seen(zoom), torch.Generator().manual_seed(0)
    context = clip.text(tokenizer([form.format(", ".join(tags)) for tags in drawn.tags]).to(device()))[0]
    losses = []
    for i in range(len(SEEN)):
        latent = vae.encode(drawn.batch(torch.tensor([i])).to(device()))
        words = context[[(i + 1 - shift) % len(SEEN), (i + 1) % len(SEEN)]]
        for t in TIMES * noises:
            eps = torch.randn(latent.shape, generator=seeded).to(device())
            alpha = alphas_cumprod()[t].to(device())
            z = (alpha.sqrt() * latent + (1 - alpha).sqrt() * eps).expand(2, -1, -1, -1)
            predicted = unet(z, torch.full((2,), t, device=device()), words)
            losses.append((predicted - eps).square().mean(dim=(1, 2, 3)).cpu())
    losses = torch.stack(losses)  # of own and others' words
    own, other = losses.mean(dim=0).tolist()
    wins = int((losses[:, 0] < losses[:, 1]).sum())
    ratio = own / other
    line = f"UNet: loss {own:.4f} under a scene's own words, {other:.4f} under another's, ratio {ratio:.3f}"
    line += f", below {most}; lower in {wins} of {len(losses)} noises"
    assert ratio < most and 2 * wins > len(losses) and other < 1, line  # 1: a guess of zero
    return line


@pytest.mark.weights
@slow_on_cpu
def test_the_unet_denoises_better_under_the_right_words(passed):
    owned()
    passed(prove_denoising(SD15, "sd15", "a drawing of {}", zoom=4, noises=2, most=1))


def test_rehearsal_of_denoising():
    settings = {"model": "tiny", "form": "{}", "zoom": 1, "noises": 1, "most": 0.95}
    line = prove_denoising(TINY, **settings)
    assert line.startswith("UNet: loss 0.") and "of 16 noises" in line
    with pytest.raises(AssertionError, match=r"UNet: loss .* ratio 1\.000, below 0\.95; lower in \d+ of"):
        prove_denoising(TINY, **settings, shift=0)  # the same words twice


# ---- drawing


@torch.no_grad()
def prove_drawing(
    weights: Path, model: str, names: Sequence[str], prompts: dict[str, str], size: int, steps: int
) -> str:
    """CLIP's most probable of `names` for each drawing is the one of its prompt."""
    clip, tokenizer = load_clip(part_configs(model, weights)[2], weights)
    vectors = name_vectors(clip.to(device()).eval(), tokenizer, names, TEMPLATES, shared=True)
    found = []
    for name, prompt in prompts.items():
        how = {"size": (size, size), "seed": 1, "steps": steps, "guidance": 7.5 if model == "sd15" else 4.0}
        levels = torch.from_numpy(np.array(draw(prompt, model, str(weights), **how)))
        image = levels.permute(2, 0, 1)[None].float().to(device()) / 127.5 - 1
        p = zero_shot(clip, clip.image(image)[1], vectors)[0].cpu()
        rank = 1 + int((p > p[names.index(name)]).sum())
        first = f"{names[int(p.argmax())]} {p.max():.2f}"
        found.append((rank, f"{prompt!r} is {first}" + (f", {name} is number {rank}" if rank > 1 else "")))
    line = f"drawing: of {len(names)} names, " + "; ".join(text for _, text in found)
    assert all(rank == 1 for rank, _ in found), line
    return line


@pytest.mark.weights
@slow_on_cpu
def test_clip_tags_drawings_with_their_prompts(passed):
    """Among ADE20K's names; these have no near synonym there."""
    owned()
    names = published("ade20k").names
    prompts = {name: f"a photo of a {name}" for name in ("bicycle", "airplane", "waterfall")}
    passed(prove_drawing(SD15, "sd15", names, prompts, size=512, steps=25))


def test_rehearsal_of_drawing():
    names = [*scenes.CLASSES]
    prompts = {name: PROMPT.format(name) for name in ("mountain", "house")}
    line = prove_drawing(TINY, "tiny", names, prompts, size=128, steps=10)
    assert line.startswith("drawing: of 24 names, 'a photo of a mountain' is mountain 0.")
    with pytest.raises(AssertionError, match=r"'a photo of a house' is house 0\.\d\d, boat is number \d"):
        prove_drawing(TINY, "tiny", names, {"boat": PROMPT.format("house")}, size=128, steps=10)
