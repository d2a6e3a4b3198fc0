"""Measure whether `weights/tiny` is a text-to-image model, on scenes that it was not trained on.

    python -m lab.evidence    # about 10 minutes on 2 cores; prints numbers as JSON

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

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from assemble import prior
from clip import CLIP, TEMPLATES, Tokenizer, name_vectors, zero_shot
from errors import Parser, run_command
from images import scenes
from lab.draw import ddim_times, sample
from lab.pretrain import DrawnScenes, draw_scenes, noised
from metrics.report import mean_average_precision
from unet import UNet
from vae import VAE

HELD_OUT = 1_900_000  # first index of the range "pretrain" that is not trained on
COUNT = 512  # scenes
CLASSIFIER_STEPS, CLASSIFIER_BATCH = 1500, 32
PER_TAG = 8  # images drawn for each of the 24 tags
PROMPT_TAGS = 3
STEPS, GUIDANCE = 50, 4.0
Parts = tuple[VAE, UNet, CLIP, Tokenizer]


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
    mAP, chance = precision_and_chance(zero_shot(clip, embeddings, names), tags_matrix(held_out.tags))

    captions = held_out.captions(range(COUNT), Random("retrieval"))
    texts = clip.text_projection(clip.text(tokenizer(captions))[1])
    blocks = zip(*(F.normalize(x, dim=-1).split(128) for x in (embeddings, texts)), strict=True)
    hits = [(image @ text.T).argmax(dim=1) == torch.arange(128) for image, text in blocks]
    return {"tag_mAP": mAP, "chance_mAP": chance, "caption_recall": float(torch.cat(hits).float().mean())}


def tags_matrix(tags: list[tuple[str, ...]]) -> Tensor:
    """Multi-hot targets `(N, 24)`, bool, of N lists of tags."""
    return torch.tensor([[name in words for name in scenes.CLASSES] for words in tags])


def precision_and_chance(scores: Tensor, targets: Tensor) -> tuple[float, float]:
    """mAP over the classes, and its chance level: the share of positives."""
    return mean_average_precision(scores, targets), float(targets.float().mean())


def denoising(parts: Parts, held_out: DrawnScenes) -> dict[str, float]:
    """Denoising loss (Eq. 2) with an image's own caption, the empty one and the next image's.

    The three losses share times and noises; `*_error` is the standard error of the paired difference to
    "empty".
    """
    vae, unet, clip, tokenizer = parts
    noise = torch.Generator().manual_seed(0)
    captions = held_out.captions(range(COUNT), Random("denoising"))
    prompts = {"right": captions, "empty": [""] * COUNT, "wrong": captions[1:] + captions[:1]}
    losses = {name: [] for name in prompts}
    for part in torch.arange(COUNT).split(32):
        z, eps, t = noised(vae.encode(held_out.batch(part)), noise)
        for name, texts in prompts.items():
            context, _ = clip.text(tokenizer([texts[i] for i in part.tolist()]))
            losses[name].append((unet(z, t, context) - eps).square().mean(dim=(1, 2, 3)))
    losses = {name: torch.cat(values) for name, values in losses.items()}
    result = {name: float(values.mean()) for name, values in losses.items()}
    for name in ("right", "wrong"):
        difference = losses[name] - losses["empty"]
        result[f"{name}_error"] = float(difference.std() / math.sqrt(COUNT))
    return result


@torch.enable_grad()
def train_classifier(drawn: DrawnScenes) -> nn.Module:
    """Train a small convolutional network on scenes: images in [-1, 1] -> tag logits `(B, 24)`."""
    torch.manual_seed(0)
    layers = []
    for a, b in pairwise((3, 32, 64, 128, 128)):
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


def drawn_tags(parts: Parts, classifier: nn.Module, held_out: DrawnScenes) -> dict[str, float]:
    """mAP of the classifier for the prompted tags of drawn images and for the tags of held-out scenes.

    The prompts are, for every class, eight sets of three tags that held-out scenes show together; prompt i is
    drawn as `python -m lab.draw` does with seed i.
    """
    vae, unet, clip, tokenizer = parts
    r, prompts = Random("prompts"), []
    for name in scenes.CLASSES:
        candidates = [tags for tags in held_out.tags if name in tags and len(tags) >= PROMPT_TAGS]
        for tags in r.sample(candidates, PER_TAG):
            prompts.append((name, *r.sample([tag for tag in tags if tag != name], PROMPT_TAGS - 1)))
    logits = []
    for part in tqdm(torch.arange(len(prompts)).split(24), desc="drawing from prompts", disable=None):
        generators = [torch.Generator().manual_seed(seed) for seed in part.tolist()]
        noise = torch.cat([torch.randn(1, 4, 16, 16, generator=generator) for generator in generators])
        context, _ = clip.text(tokenizer([", ".join(prompts[i]) for i in part.tolist()]))
        empty, _ = clip.text(tokenizer([""] * len(noise)))
        latent = sample(unet, noise, context, empty, ddim_times(STEPS), GUIDANCE)
        logits.append(classifier(vae.decode(latent).clamp(-1, 1)))  # of images (24, 3, 128, 128)
    real = torch.cat([classifier(held_out.batch(part)) for part in torch.arange(COUNT).split(64)])
    mAP, chance = precision_and_chance(torch.cat(logits), tags_matrix(prompts))
    real_mAP, real_chance = precision_and_chance(real, tags_matrix(held_out.tags))
    return {"mAP": mAP, "chance": chance, "real_mAP": real_mAP, "real_chance": real_chance}


@torch.no_grad()
def measure(weights: Path, run: Path) -> None:
    """Print all results as JSON; `run` caches the scenes."""
    *modules, tokenizer = prior("tiny", weights)
    vae, unet, clip = (module.eval() for module in modules)
    parts, held_out = (vae, unet, clip, tokenizer), draw_scenes(run, COUNT, HELD_OUT)
    results = {"psnr": psnr(vae, held_out), "clip": retrieval(clip, tokenizer, held_out)}
    print(json.dumps(results | {"denoising": denoising(parts, held_out)}, indent=1), flush=True)
    classifier = train_classifier(draw_scenes(run, 8192))
    print(json.dumps({"drawing": drawn_tags(parts, classifier, held_out)}, indent=1))


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m lab.evidence",
        description="Measure the tiny Stable Diffusion on scenes that it was not trained on.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default="weights/tiny", metavar="DIR", help="the weights")
    parser.add_argument("--run", type=Path, default="runs/pretrain", metavar="DIR", help="cache of scenes")
    options = parser.parse_args(argv)
    return run_command("lab.evidence", lambda: measure(options.out, options.run))


if __name__ == "__main__":
    sys.exit(main())
