"""Measure whether `weights/tiny` is a text-to-image model, on scenes that it was not trained on.

    python -m lab.evidence    # about 10 minutes on 2 cores; prints numbers, writes weights/tiny/prompts.png

VAE: the error of reconstruction. CLIP: zero-shot tags, and retrieval of an image's caption among 128. UNet:
the denoising loss with an image's own caption, the empty one and another image's. Drawing: the tags that a
classifier, trained on real scenes, finds in images drawn from prompts. weights/tiny/README.md lists results.
"""

import argparse
import json
import math
import sys
from itertools import pairwise
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from tqdm import tqdm

from assemble import prior
from clip import CLIP, TEMPLATES, Tokenizer, name_vectors, zero_shot
from errors import run_command
from images import scenes
from images.draw import INK, PAPER, mosaic
from lab.draw import ddim_times, sample
from lab.pretrain import DrawnScenes, caption, draw_scenes
from metrics.report import average_precision
from unet import TIMES, UNet, alphas_cumprod
from vae import VAE

HELD_OUT = 1_900_000  # first index of the range "pretrain" that is not trained on
COUNT = 512  # scenes
CLASSIFIER_STEPS, CLASSIFIER_BATCH = 1500, 32
PER_TAG = 8  # images drawn for each of the 24 tags
PROMPT_TAGS = 3
STEPS, GUIDANCE = 50, 4.0
PROMPTS = (  # rows of prompts.png
    "sheep, grass, sky",
    "boat, sea, sky",
    "snow, tree, mountain",
    "car, road, house",
    "sand, umbrella, sea",
    "lamp, building, car",
)
SEEDS = 6  # columns


def psnr(vae: VAE, held_out: DrawnScenes) -> float:
    """Mean PSNR of reconstructed images, in dB of 8-bit values."""
    values = []
    for part in torch.arange(len(held_out.tags)).split(32):
        image = held_out.batch(part)
        decoded = vae.decode(vae.encode(image)).clamp(-1, 1)
        mse = (((image - decoded) * 127.5).round() ** 2).mean(dim=(1, 2, 3))
        values.append(10 * torch.log10(255**2 / mse))
    return float(torch.cat(values).mean())


def retrieval(clip: CLIP, tokenizer: Tokenizer, held_out: DrawnScenes) -> dict[str, float]:
    """Zero-shot mAP of tags, and how often an image's own caption ranks first among 128."""
    embeddings = torch.cat([clip.image(held_out.batch(part))[1] for part in torch.arange(COUNT).split(64)])
    names = name_vectors(clip, tokenizer, scenes.CLASSES, TEMPLATES, shared=True)
    targets = tags_matrix(held_out.tags)
    mAP, chance = mean_average_precision(zero_shot(clip, embeddings, names), targets)

    r = Random("retrieval")
    ids = tokenizer([caption(tags, r) for tags in held_out.tags])
    texts = F.normalize(clip.text_projection(clip.text(ids)[1]), dim=-1)
    blocks = zip(F.normalize(embeddings, dim=-1).split(128), texts.split(128), strict=True)
    hits = [(image @ text.T).argmax(dim=1) == torch.arange(128) for image, text in blocks]
    return {"tag_mAP": mAP, "chance_mAP": chance, "caption_recall": float(torch.cat(hits).float().mean())}


def tags_matrix(tags: list[tuple[str, ...]]) -> Tensor:
    """Multi-hot targets `(N, 24)`, bool, of N lists of tags."""
    return torch.tensor([[name in words for name in scenes.CLASSES] for words in tags])


def mean_average_precision(scores: Tensor, targets: Tensor) -> tuple[float, float]:
    """mAP over the classes, and its chance level: the share of positives."""
    values = [average_precision(scores[:, k], targets[:, k]) for k in range(targets.shape[1])]
    return sum(values) / len(values), float(targets.float().mean())


def denoising(parts: tuple[VAE, UNet, CLIP, Tokenizer], held_out: DrawnScenes) -> dict[str, float]:
    """Denoising loss (Eq. 2) with an image's own caption, the empty one and the next image's.

    The three losses share times and noises; `*_error` is the standard error of the paired difference to
    "empty".
    """
    vae, unet, clip, tokenizer = parts
    r, noise = Random("denoising"), torch.Generator().manual_seed(0)
    captions = [caption(tags, r) for tags in held_out.tags]
    prompts = {"right": captions, "empty": [""] * COUNT, "wrong": captions[1:] + captions[:1]}
    losses = {name: [] for name in prompts}
    for part in torch.arange(COUNT).split(32):
        x = vae.encode(held_out.batch(part))
        eps, t = torch.randn(x.shape, generator=noise), torch.randint(TIMES, (len(x),), generator=noise)
        alpha = alphas_cumprod()[t][:, None, None, None]
        z = alpha.sqrt() * x + (1 - alpha).sqrt() * eps
        for name, texts in prompts.items():
            context, _ = clip.text(tokenizer([texts[i] for i in part.tolist()]))
            losses[name].append((unet(z, t, context) - eps).square().mean(dim=(1, 2, 3)))
    losses = {name: torch.cat(values) for name, values in losses.items()}
    result = {name: float(values.mean()) for name, values in losses.items()}
    for name in ("right", "wrong"):
        difference = losses[name] - losses["empty"]
        result[f"{name}_error"] = float(difference.std() / math.sqrt(COUNT))
    return result


def train_classifier(drawn: DrawnScenes, seed: int = 0) -> nn.Module:
    """Train a small convolutional network on scenes: images in [-1, 1] -> tag logits `(B, 24)`."""
    torch.manual_seed(seed)
    widths, layers = (3, 32, 64, 128, 128), []
    for a, b in pairwise(widths):
        layers += [nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GroupNorm(8, b), nn.SiLU()]
    model = nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(128, len(scenes.CLASSES)))
    targets = tags_matrix(drawn.tags).float()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, CLASSIFIER_STEPS)
    for _ in tqdm(range(CLASSIFIER_STEPS), desc="classifier", disable=None):
        indices = torch.randint(len(targets), (CLASSIFIER_BATCH,))
        loss = F.binary_cross_entropy_with_logits(model(drawn.batch(indices)), targets[indices])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def draw_images(parts: tuple[VAE, UNet, CLIP, Tokenizer], prompts: list[str], seeds: list[int]) -> Tensor:
    """Draw an image of each of N prompts as `python -m lab.draw` does: `(N, 3, 128, 128)` in [-1, 1]."""
    vae, unet, clip, tokenizer = parts
    images = []
    for i in tqdm(range(0, len(prompts), 24), desc="drawing from prompts", disable=None):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[i : i + 24]]
        noise = torch.cat([torch.randn(1, 4, 16, 16, generator=generator) for generator in generators])
        context, _ = clip.text(tokenizer(prompts[i : i + 24]))
        empty, _ = clip.text(tokenizer([""] * len(noise)))
        latent = sample(unet, noise, context, empty, ddim_times(STEPS), GUIDANCE)
        images.append(vae.decode(latent).clamp(-1, 1))
    return torch.cat(images)


def sample_prompts(held_out: DrawnScenes) -> list[tuple[str, ...]]:
    """Prompts: for every class eight sets of three tags that held-out scenes show together."""
    r, prompts = Random("prompts"), []
    for name in scenes.CLASSES:
        candidates = [tags for tags in held_out.tags if name in tags and len(tags) >= PROMPT_TAGS]
        for tags in r.sample(candidates, PER_TAG):
            others = [tag for tag in tags if tag != name]
            prompts.append((name, *r.sample(others, PROMPT_TAGS - 1)))
    return prompts


def drawn_tags(
    parts: tuple[VAE, UNet, CLIP, Tokenizer], classifier: nn.Module, held_out: DrawnScenes
) -> dict[str, float]:
    """mAP of the classifier for the prompted tags of drawn images and for the tags of held-out scenes."""
    prompts = sample_prompts(held_out)
    images = draw_images(parts, [", ".join(tags) for tags in prompts], list(range(len(prompts))))
    with torch.no_grad():
        drawn = classifier(images)
        real = torch.cat([classifier(held_out.batch(part)) for part in torch.arange(COUNT).split(64)])
    mAP, chance = mean_average_precision(drawn, tags_matrix(prompts))
    real_mAP, real_chance = mean_average_precision(real, tags_matrix(held_out.tags))
    return {"mAP": mAP, "chance": chance, "real_mAP": real_mAP, "real_chance": real_chance}


def grid(parts: tuple[VAE, UNet, CLIP, Tokenizer]) -> Image.Image:
    """Draw every prompt of PROMPTS: a row of six images under the text."""
    prompts = [prompt for prompt in PROMPTS for _ in range(SEEDS)]
    images = draw_images(parts, prompts, list(range(SEEDS)) * len(PROMPTS))
    levels = ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    rows = []
    for i, prompt in enumerate(PROMPTS):
        row = np.concatenate(list(levels[i * SEEDS : (i + 1) * SEEDS]), axis=1)
        canvas = Image.new("RGB", (row.shape[1], row.shape[0] + 20), PAPER)
        ImageDraw.Draw(canvas).text((2, 3), prompt, INK, ImageFont.load_default(13))
        canvas.paste(Image.fromarray(row), (0, 20))
        rows.append(canvas)
    return mosaic(rows, 2)


def measure(weights: Path, run: Path) -> None:
    """Print all results as JSON and write `prompts.png` into `weights`; `run` caches the scenes."""
    parts = prior("tiny", weights)
    for part in parts[:3]:
        part.eval()
    held_out = draw_scenes(run, COUNT, HELD_OUT)
    with torch.no_grad():
        results = {
            "psnr": psnr(parts[0], held_out),
            "clip": retrieval(parts[2], parts[3], held_out),
            "denoising": denoising(parts, held_out),
        }
        grid(parts).save(weights / "prompts.png", optimize=True)
    print(json.dumps(results, indent=1), flush=True)
    classifier = train_classifier(draw_scenes(run, 8192))
    print(json.dumps({"drawing": drawn_tags(parts, classifier, held_out)}, indent=1))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lab.evidence",
        description="Measure the tiny Stable Diffusion on scenes that it was not trained on.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default="weights/tiny", metavar="DIR", help="the weights")
    parser.add_argument("--run", type=Path, default="runs/pretrain", metavar="DIR", help="cache of scenes")
    options = parser.parse_args(argv)

    def work() -> int:
        measure(options.out, options.run)
        return 0

    return run_command("lab.evidence", work)


if __name__ == "__main__":
    sys.exit(main())
