"""Is `weights/tiny` a text-to-image model? Measures it on scenes that it has not seen, into its model card.

    python -m lab.evidence    # about 10 minutes on 2 cores; rewrites README.md and prompts.png there

VAE: how well pictures survive. CLIP: does a picture find its tags, and its caption among 128. UNet: is the
noise guessed better with a picture's own caption than with none, and worse with another picture's. Drawing: a
classifier that was trained on real scenes looks for the prompted tags in drawn pictures.
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
from eval import average_precision
from images import scenes
from images.draw import INK, PAPER, mosaic
from lab.draw import ddim_times, sample
from lab.pretrain import FILES, RECORD, Pictures, caption, draw_pictures
from run.checkpoint import replace_text
from unet import TIMES, UNet, alphas_cumprod
from vae import VAE

HELD_OUT = 1_900_000  # from here on, the range "pretrain" is not trained on
COUNT = 512
CLASSIFIER_STEPS, CLASSIFIER_BATCH = 1500, 32
PER_TAG = 8  # pictures that are drawn for each of the 24 tags
WORDS = 3  # in their prompts
STEPS, GUIDANCE = 50, 4.0
PROMPTS = (  # of the grid in the README
    "sheep, grass, sky",
    "boat, sea, sky",
    "snow, tree, mountain",
    "car, road, house",
    "sand, umbrella, sea",
    "lamp, building, car",
)
SEEDS = 6


def psnr(vae: VAE, held_out: Pictures) -> float:
    """Of pictures that went through the autoencoder, in dB of 8-bit values: the mean over pictures."""
    found = []
    for part in torch.arange(len(held_out.tags)).split(32):
        image = held_out.batch(part)
        again = vae.decode(vae.encode(image)).clamp(-1, 1)
        mse = (((image - again) * 127.5).round() ** 2).mean(dim=(1, 2, 3))
        found.append(10 * torch.log10(255**2 / mse))
    return float(torch.cat(found).mean())


def retrieval(clip: CLIP, tokenizer: Tokenizer, held_out: Pictures) -> dict[str, float]:
    """Tags by zero-shot classification, and each picture's caption among those of 128 pictures."""
    embeddings = torch.cat([clip.image(held_out.batch(part))[1] for part in torch.arange(COUNT).split(64)])
    names = name_vectors(clip, tokenizer, scenes.CLASSES, TEMPLATES, shared=True)
    there = tags_matrix(held_out.tags)
    mAP, chance = mean_average_precision(zero_shot(clip, embeddings, names), there)

    r = Random("retrieval")
    ids = tokenizer([caption(tags, r) for tags in held_out.tags])
    texts = F.normalize(clip.text_projection(clip.text(ids)[1]), dim=-1)
    blocks = zip(F.normalize(embeddings, dim=-1).split(128), texts.split(128), strict=True)
    hits = [(image @ text.T).argmax(dim=1) == torch.arange(128) for image, text in blocks]
    return {"tag_mAP": mAP, "chance_mAP": chance, "caption_recall": float(torch.cat(hits).float().mean())}


def tags_matrix(tags: list[tuple[str, ...]]) -> Tensor:
    """Which of the 24 classes each list names, `(T, 24)` bool."""
    return torch.tensor([[name in words for name in scenes.CLASSES] for words in tags])


def mean_average_precision(scores: Tensor, there: Tensor) -> tuple[float, float]:
    """Over the classes, and what scores without any information would give: how often a class is there."""
    values = [average_precision(scores[:, k], there[:, k]) for k in range(there.shape[1])]
    return sum(values) / len(values), float(there.float().mean())


def denoising(parts: tuple[VAE, UNet, CLIP, Tokenizer], held_out: Pictures) -> dict[str, float]:
    """Eq. 2 at the same times and noises, told each picture's own caption, nothing, or the next picture's."""
    vae, unet, clip, tokenizer = parts
    r, noise = Random("denoising"), torch.Generator().manual_seed(0)
    captions = [caption(tags, r) for tags in held_out.tags]
    told = {"right": captions, "empty": [""] * COUNT, "wrong": captions[1:] + captions[:1]}
    losses = {name: [] for name in told}
    for part in torch.arange(COUNT).split(32):
        x = vae.encode(held_out.batch(part))
        eps, t = torch.randn(x.shape, generator=noise), torch.randint(TIMES, (len(x),), generator=noise)
        alpha = alphas_cumprod()[t][:, None, None, None]
        z = alpha.sqrt() * x + (1 - alpha).sqrt() * eps
        for name, texts in told.items():
            context, _ = clip.text(tokenizer([texts[i] for i in part.tolist()]))
            losses[name].append((unet(z, t, context) - eps).square().mean(dim=(1, 2, 3)))
    losses = {name: torch.cat(values) for name, values in losses.items()}
    result = {name: float(values.mean()) for name, values in losses.items()}
    for name in ("right", "wrong"):  # paired: the same picture, time and noise
        difference = losses[name] - losses["empty"]
        result[f"{name}_error"] = float(difference.std() / math.sqrt(COUNT))
    return result


def train_classifier(pictures: Pictures, seed: int = 0) -> nn.Module:
    """Which tags a real scene has: a plain convolutional network, images in [-1, 1] -> logits `(B, 24)`."""
    torch.manual_seed(seed)
    widths, layers = (3, 32, 64, 128, 128), []
    for a, b in pairwise(widths):
        layers += [nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GroupNorm(8, b), nn.SiLU()]
    model = nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(128, len(scenes.CLASSES)))
    there = tags_matrix(pictures.tags).float()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, CLASSIFIER_STEPS)
    for _ in tqdm(range(CLASSIFIER_STEPS), desc="classifier", disable=None):
        indices = torch.randint(len(there), (CLASSIFIER_BATCH,))
        loss = F.binary_cross_entropy_with_logits(model(pictures.batch(indices)), there[indices])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def draw(
    parts: tuple[VAE, UNet, CLIP, Tokenizer], prompts: list[str], seeds: list[int], guidance: float
) -> Tensor:
    """A picture of each prompt `(T, 3, 128, 128)` in [-1, 1], as `python -m lab.draw` makes it."""
    vae, unet, clip, tokenizer = parts
    images = []
    for i in tqdm(range(0, len(prompts), 24), desc="drawing from prompts", disable=None):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[i : i + 24]]
        noise = torch.cat([torch.randn(1, 4, 16, 16, generator=generator) for generator in generators])
        context, _ = clip.text(tokenizer(prompts[i : i + 24]))
        empty, _ = clip.text(tokenizer([""] * len(noise)))
        latent = sample(unet, noise, context, empty, ddim_times(STEPS), guidance)
        images.append(vae.decode(latent).clamp(-1, 1))
    return torch.cat(images)


def prompted(held_out: Pictures) -> list[tuple[str, ...]]:
    """For every class eight prompts of three tags that held-out scenes show together."""
    r, prompts = Random("prompts"), []
    for name in scenes.CLASSES:
        showing = [tags for tags in held_out.tags if name in tags and len(tags) >= WORDS]
        for tags in r.sample(showing, PER_TAG):
            others = [tag for tag in tags if tag != name]
            prompts.append((name, *r.sample(others, WORDS - 1)))
    return prompts


def drawn_tags(parts: tuple, classifier: nn.Module, held_out: Pictures) -> dict[str, float]:
    """Does the classifier find what was prompted? Beside it, what it finds in real held-out scenes."""
    prompts = prompted(held_out)
    images = draw(parts, [", ".join(words) for words in prompts], list(range(len(prompts))), GUIDANCE)
    with torch.no_grad():
        found = classifier(images)
        real = torch.cat([classifier(held_out.batch(part)) for part in torch.arange(COUNT).split(64)])
    mAP, chance = mean_average_precision(found, tags_matrix(prompts))
    real_mAP, real_chance = mean_average_precision(real, tags_matrix(held_out.tags))
    return {"mAP": mAP, "chance": chance, "real_mAP": real_mAP, "real_chance": real_chance}


def grid(parts: tuple[VAE, UNet, CLIP, Tokenizer]) -> Image.Image:
    """Every prompt of PROMPTS, six pictures in a row under its words."""
    prompts = [prompt for prompt in PROMPTS for _ in range(SEEDS)]
    images = draw(parts, prompts, list(range(SEEDS)) * len(PROMPTS), GUIDANCE)
    levels = ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    rows = []
    for i, prompt in enumerate(PROMPTS):
        row = np.concatenate(list(levels[i * SEEDS : (i + 1) * SEEDS]), axis=1)
        canvas = Image.new("RGB", (row.shape[1], row.shape[0] + 20), PAPER)
        ImageDraw.Draw(canvas).text((2, 3), prompt, INK, ImageFont.load_default(13))
        canvas.paste(Image.fromarray(row), (0, 20))
        rows.append(canvas)
    return mosaic(rows, 2)


def card(out: Path, found: dict) -> str:
    """The model card: how it was made, from the record beside the weights, and what was measured."""
    rows, record = [], json.loads((out / RECORD).read_text())
    for name in FILES:
        facts = record[name]
        budget, size = facts["budget"], (out / FILES[name]).stat().st_size
        rows.append(
            f"| {name} | {size / 1e6:.1f} MB | {budget['steps']:,} of {budget['batch']}, lr {budget['lr']} "
            f"| {facts['seconds'] / 60:.0f} min | {facts['losses'][0]:.3f} -> {facts['losses'][-1]:.3f} |"
        )
    clip, noise, drawn = found["clip"], found["denoising"], found["drawing"]
    return CARD.format(
        rows="\n".join(rows),
        total=sum((out / file).stat().st_size for file in FILES.values()) / 1e6,
        pictures=budget["pictures"],
        commit=facts["commit"],
        seed=budget["seed"],
        version=scenes.VERSION,
        torch=facts["torch"],
        machine=f"{facts['device']}, {facts['threads']} threads",
        scale=json.loads((out / "vae" / "config.json").read_text())["scaling_factor"],
        psnr=found["psnr"],
        tag_mAP=clip["tag_mAP"],
        tag_chance=clip["chance_mAP"],
        recall=clip["caption_recall"],
        **noise,
        **drawn,
        ratio=drawn["mAP"] / drawn["chance"],
        guidance=GUIDANCE,
        steps=STEPS,
        count=COUNT,
        drawings=PER_TAG * len(scenes.CLASSES),
    )


CARD = """# TADA tiny: a Stable Diffusion of {total:.0f} MB

The classes of `vae.py`, `clip.py` and `unet.py` at their `tiny` sizes, for 128x128 pictures of the drawn
world of `scenes.py`. It exists so that the whole of TADA runs, and its thesis can be tried, on a laptop.
Float16 safetensors under the official names.

Made by `python -m lab.pretrain`, measured by `python -m lab.evidence`, which wrote this page.

| part | file | steps | time ({machine}) | loss, first and last 100 steps |
|---|---|---|---|---|
{rows}

- Data: {pictures:,} scenes, indices from 1,000,000 (`scenes.py`, version {version}). Captions: the visible
  tags in random order, each dropped with probability 0.2; one caption in five names a single tag; half stand
  in one of CLIP's prompts. No label map was ever looked at.
- VAE: mean absolute error + KL; its latents have unit variance at the scale {scale}, measured and kept in
  `vae/config.json`.
- CLIP: contrastive, its own vocabulary of byte pairs from the captions.
- UNet: Eq. 2, 10 % empty captions; the moving average of its weights.
- Seed {seed}, commit {commit}, torch {torch}. Licence: Apache-2.0, as the code; no other data or weights went
  into it.

## Evidence

On {count} scenes that were not trained on.

| question | measure | result | without information |
|---|---|---|---|
| do pictures survive the VAE? | PSNR | {psnr:.1f} dB | |
| does CLIP know a picture's tags? | zero-shot mAP, 24 tags, 80 prompts | {tag_mAP:.3f} | {tag_chance:.3f} |
| does a picture find its caption? | first of 128 | {recall:.3f} | 0.008 |
| does the UNet use the caption? | denoising loss, own caption | {right:.4f} | {empty:.4f} (empty) |
| | denoising loss, another picture's | {wrong:.4f} | {empty:.4f} (empty) |
| are prompted tags in its drawings? | mAP of a classifier, {drawings} drawings | {mAP:.3f} | {chance:.3f} |
| the same classifier on real scenes | mAP | {real_mAP:.3f} | {real_chance:.3f} |

The paired differences to the empty caption have standard errors of {right_error:.4f} (own) and
{wrong_error:.4f} (another's). Prompts have three tags; {steps} DDIM steps, guidance {guidance}. The drawings'
mAP is {ratio:.1f} times chance.

![{steps} DDIM steps per picture](prompts.png)

## Limits

It knows the 24 classes of `scenes.py` and no others, in one style and at one size. Two cores and an hour and
a half do not make a good painter: things are blurred, and several of them in one prompt may merge or be
missing. It says nothing about Stable Diffusion's own quality, and its results are never the paper's.
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lab.evidence",
        description="Measure the tiny Stable Diffusion on scenes it has not seen.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default="weights/tiny", metavar="DIR", help="the weights")
    parser.add_argument("--run", type=Path, default="runs/pretrain", metavar="DIR", help="keeps the scenes")
    o = parser.parse_args(argv)
    parts = prior("tiny", o.out)
    for part in parts[:3]:
        part.eval()
    held_out = draw_pictures(o.run, COUNT, HELD_OUT)
    with torch.no_grad():
        found = {
            "psnr": psnr(parts[0], held_out),
            "clip": retrieval(parts[2], parts[3], held_out),
            "denoising": denoising(parts, held_out),
        }
        grid(parts).save(o.out / "prompts.png", optimize=True)
    print(json.dumps(found, indent=1), flush=True)
    classifier = train_classifier(draw_pictures(o.run, 8192))
    found["drawing"] = drawn_tags(parts, classifier, held_out)
    print(json.dumps(found["drawing"], indent=1))
    if not (o.out / RECORD).is_file():
        print(f"{o.out / RECORD} is missing: how the weights were made is unknown, README.md stays as it is")
        return 0
    replace_text(o.out / "README.md", card(o.out, found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
