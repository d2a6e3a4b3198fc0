"""A Stable Diffusion that fits in a repository: the `tiny` VAE, CLIP and UNet, trained on drawn scenes.

    python -m lab.pretrain                    # weights/tiny; 60 to 90 minutes on 2 cores
    python -m lab.pretrain --longer 10        # ten times the steps: for a GPU, used if there is one

Images are `scenes` of the range "pretrain", captions are lists of their tags; no label map is used. A stage's
randomness is a function of seed and step alone, so an interrupted run resumes from its last save to the same
numbers. `python -m lab.evidence` measures the result.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from assemble import part_configs
from clip import CLIP, PROMPT, TEMPLATES, CLIPConfig, Tokenizer, token_ids
from errors import Parser, RunError, run_command
from images import scenes
from run.files import replace_text, replacing, sync
from run.folder import commit, lock
from unet import TIMES, UNet, UNetConfig, alphas_cumprod
from vae import VAE, VAEConfig
from weights.load import load
from weights.words import digest

IMAGES = 20_480  # the first of the range "pretrain"; lab.evidence uses its end
SAVE_SECONDS = 60  # between two saves: the most that a killed run loses
WARMUP = 100  # steps until the full learning rate
EMA = 0.999  # decay of the weights' moving average; min(EMA, (1 + n) / (10 + n)) after n updates
KL_WEIGHT = 1e-3  # of the mean over latent values; CompVis' 1e-6 weighs the sum of all 1024
DROPPED = 0.2  # of the tags of a caption
SINGLE = 0.2  # of the captions name one tag alone
WRAPPED = 0.5  # of the captions are put into a prompt such as "a photo of a {}"
EMPTY = 0.1  # of the UNet's captions are "", for classifier-free guidance (Ho & Salimans 2022)
LARGEST_SCALE = math.log(100)  # upper limit of CLIP's logit scale (Radford et al. 2021, 2.5)


class Stage(NamedTuple):
    """Training budget of one part."""

    steps: int
    batch: int
    lr: float


class Job(NamedTuple):
    """Settings that the stages share."""

    run: Path  # folder of checkpoints and scenes
    out: Path  # folder of the weights
    seed: int
    device: str  # "cpu" or "cuda"


STAGES = {"vae": Stage(4000, 8, 1e-3), "clip": Stage(1000, 128, 1e-3), "unet": Stage(6000, 16, 1e-3)}
KINDS = {"vae": (VAE, VAEConfig), "clip": (CLIP, CLIPConfig), "unet": (UNet, UNetConfig)}
FILES = {"clip": "clip/model.safetensors"}
FILES |= {part: f"{part}/diffusion_pytorch_model.safetensors" for part in ("vae", "unet")}
RECORD = "training.json"  # in the folder of the weights: steps, time, losses, seed and commit of each part


class DrawnScenes(NamedTuple):
    """N drawn scenes: images `(N, 128, 128, 3)` uint8, memory-mapped, and the tags of each."""

    images: np.ndarray
    tags: list[tuple[str, ...]]

    def batch(self, indices: Tensor) -> Tensor:
        """Return images `(B, 3, 128, 128)` in [-1, 1]."""
        images = torch.from_numpy(self.images[indices.numpy()])
        return images.permute(0, 3, 1, 2).float() / 127.5 - 1

    def captions(self, indices: Iterable[int], r: Random) -> list[str]:
        return [caption(self.tags[int(i)], r) for i in indices]


def draw_scenes(run: Path, count: int, first: int = scenes.SPLITS["pretrain"].start) -> DrawnScenes:
    """Draw `count` scenes from index `first` on, or read them from the cache in `run`; 50 KB each."""
    images, tags = run / f"scenes-{first}-{count}.npy", run / f"tags-{first}-{count}.json"
    if not tags.is_file():
        run.mkdir(parents=True, exist_ok=True)
        array = np.lib.format.open_memmap(images, "w+", np.uint8, (count, scenes.SIZE, scenes.SIZE, 3))
        lists = []
        for i in tqdm(range(count), desc="drawing scenes", disable=None):
            scene = scenes.draw(first + i)
            array[i] = scene.image
            lists.append(scene.tags)
        array.flush()
        replace_text(tags, json.dumps(lists))
    return DrawnScenes(np.load(images, mmap_mode="r"), [tuple(x) for x in json.loads(tags.read_text())])


def caption(tags: tuple[str, ...], r: Random) -> str:
    """Join the tags in random order, some dropped, in a prompt or not.

    One caption in five names a single tag: Eq. 6 and the oracle use the vectors of single names.
    """
    words = r.sample(tags, len(tags))
    kept = words[:1] if r.random() < SINGLE else [word for word in words if r.random() >= DROPPED]
    text = ", ".join(kept or words[:1])
    if r.random() < WRAPPED:
        return (PROMPT if r.random() < 0.5 else r.choice(TEMPLATES)).format(text)
    return text


# ---- the three stages


def train_vae(drawn: DrawnScenes, stage: Stage, job: Job) -> None:
    """Train on reconstruction and KL; then write the scale that gives latents unit variance."""

    def loss(vae: VAE, indices: Tensor, r: Random, noise: torch.Generator) -> Tensor:
        image = drawn.batch(indices).to(job.device)
        mean, logvar = vae.moments(image)
        z = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=noise).to(job.device)
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        return F.l1_loss(vae.decoder(vae.post_quant_conv(z)), image) + KL_WEIGHT * kl

    fit("vae", loss, len(drawn.tags), stage, job)
    vae = load(VAE(VAEConfig.tiny()), job.out / "vae").to(job.device)
    with torch.no_grad():
        means = [vae.moments(drawn.batch(part).to(job.device))[0] for part in torch.arange(512).split(32)]
    write_config(vae.config, 1 / float(torch.cat(means).std()), job.out / "vae" / "config.json")


def train_clip(drawn: DrawnScenes, stage: Stage, job: Job) -> None:
    """Train the vocabulary, then both towers with the contrastive loss (Radford et al. 2021, Figure 3)."""
    tokenizer = train_tokenizer(drawn, job.out / "tokenizer", job.seed)

    def loss(clip: CLIP, indices: Tensor, r: Random, noise: torch.Generator) -> Tensor:
        ids = tokenizer(drawn.captions(indices, r))
        longest = int((ids != tokenizer.end).sum(dim=1).max()) + 1  # after it, end tokens only
        _, image = clip.image(drawn.batch(indices).to(job.device))
        text = clip.text_projection(clip.text(ids[:, :longest].to(job.device))[1])
        scale = clip.logit_scale.clamp(max=LARGEST_SCALE).exp()
        with torch.autocast(job.device, enabled=False):  # bfloat16 has steps of 0.5 at a logit of 100
            cosine = F.normalize(image.float(), dim=-1) @ F.normalize(text.float(), dim=-1).T  # (B, B)
        logits = scale * cosine
        own = torch.arange(len(ids), device=job.device)
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2

    fit("clip", loss, len(drawn.tags), stage, job)


def train_unet(drawn: DrawnScenes, stage: Stage, job: Job) -> None:
    """Train on Eq. 2: predict the noise in a latent at a random time, given its caption."""
    clip = load(CLIP(CLIPConfig.tiny()), job.out / "clip").to(job.device).eval()
    tokenizer = Tokenizer(job.out / "tokenizer")
    vae = load(VAE(part_configs("tiny", job.out)[0]), job.out / "vae").to(job.device).eval()
    parts = tqdm(torch.arange(len(drawn.tags)).split(32), desc="encoding", disable=None)
    with torch.no_grad():
        latents = torch.cat([vae.encode(drawn.batch(part).to(job.device)).cpu() for part in parts])

    def loss(unet: UNet, indices: Tensor, r: Random, noise: torch.Generator) -> Tensor:
        captions = ["" if r.random() < EMPTY else text for text in drawn.captions(indices, r)]
        with torch.no_grad():
            context, _ = clip.text(tokenizer(captions).to(job.device))  # (B, 77, 128)
        z, eps, t = noised(latents[indices], noise)
        return F.mse_loss(unet(z.to(job.device), t.to(job.device), context).float(), eps.to(job.device))

    fit("unet", loss, len(drawn.tags), stage, job)


def noised(x: Tensor, noise: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 1 at random times: latents `(B, 4, h, w)` with noise, that noise, and the times `(B,)`."""
    eps, t = torch.randn(x.shape, generator=noise), torch.randint(TIMES, (len(x),), generator=noise)
    alpha = alphas_cumprod()[t][:, None, None, None]
    return alpha.sqrt() * x + (1 - alpha).sqrt() * eps, eps, t


def train_tokenizer(drawn: DrawnScenes, folder: Path, seed: int) -> Tokenizer:
    """Train byte pairs on captions and write CLIP's two files: bytes first, merges, then start and end."""
    size = CLIPConfig.tiny().vocabulary
    spelling = Tokenizer.spelling(size)
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    settings = {"initial_alphabet": letters, "end_of_word_suffix": "</w>", "show_progress": False}
    # Less the 256 bytes that end a word, start and end.
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size - 258, **settings)
    r = Random(f"tokenizer {seed}")
    spelling.bpe.train_from_iterator((caption(tags, r) for tags in drawn.tags), trainer)
    merges = json.loads(spelling.bpe.to_str())["model"]["merges"]
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / "vocab.json", json.dumps(token_ids(merges, size), ensure_ascii=False))
    lines = [f"{left} {right}" for left, right in merges]
    replace_text(folder / "merges.txt", "\n".join(["#version: 0.2", *lines, ""]))
    return Tokenizer(folder)


# ---- the shared training loop


Loss = Callable[[nn.Module, Tensor, Random, torch.Generator], Tensor]


def fit(name: str, loss: Loss, count: int, stage: Stage, job: Job) -> nn.Module:
    """Train part `name` by AdamW on `loss` of random batches of `count` images; return the averaged weights,
    and write them and their training record into `out`.

    Resume from `RUN/NAME.safetensors`, replaced every minute; RunError if its budget is another.
    """
    torch.manual_seed(job.seed)
    kind, config = KINDS[name]
    model = kind(config.tiny()).to(job.device)
    averaged = AveragedModel(model, multi_avg_fn=average)
    optimizer = AdamW(model.parameters(), stage.lr, betas=(0.9, 0.99), weight_decay=0.01)
    file, trained = job.run / f"{name}.safetensors", (model, averaged, optimizer)
    budget = {**stage._asdict(), "pictures": count, "seed": job.seed}
    # Mean losses per 100 steps; sum and number of losses since the last multiple of 100.
    facts = {"budget": budget, "step": 0, "seconds": 0.0, "losses": [], "sums": (0.0, 0)}
    if file.is_file():
        facts = resume(file, budget, *trained)
    facts |= {"commit": commit(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    facts["device"] = job.device
    saved = time.monotonic()
    steps = range(facts["step"], stage.steps)
    bar = tqdm(steps, desc=name, initial=facts["step"], total=stage.steps, disable=None)
    for step in bar:
        start = time.monotonic()
        noise = torch.Generator().manual_seed(1_000_000 * job.seed + step)
        indices = torch.randint(count, (stage.batch,), generator=noise)
        for group in optimizer.param_groups:
            group["lr"] = stage.lr * rate(step, stage.steps)
        with torch.autocast("cuda", torch.bfloat16, enabled=job.device == "cuda"):
            value = loss(model, indices, Random(f"{name} {job.seed} {step}"), noise)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        averaged.update_parameters(model)
        assert value.isfinite(), f"{name}: the loss of step {step} is {value}"
        total, n = facts["sums"] if step % 100 else (0.0, 0)
        total, n = total + float(value.detach()), n + 1
        facts |= {"step": step + 1, "sums": (total, n)}
        facts["seconds"] += time.monotonic() - start
        last, hundred = step + 1 == stage.steps, (step + 1) % 100 == 0
        if hundred:
            facts["losses"].append(round(total / n, 5))
        if last or time.monotonic() - saved > SAVE_SECONDS:
            tensors = {x: y.cpu().contiguous().clone() for x, y in tensors_of(*trained).items()}
            save_replacing(tensors, file, {"facts": json.dumps(facts, sort_keys=True)})
            saved = time.monotonic()
        if last or hundred:
            bar.write(f"{name} {step + 1}/{stage.steps} loss {total / n:.4f} {facts['seconds']:.0f} s")
    write(averaged.module, job.out / FILES[name])
    record = job.out / RECORD
    parts = json.loads(record.read_text()) if record.is_file() else {}
    replace_text(record, json.dumps(parts | {name: read_facts(file)}, indent=1) + "\n")
    return averaged.module


def tensors_of(model: nn.Module, averaged: AveragedModel, optimizer: AdamW) -> dict[str, Tensor]:
    """Every tensor to resume from, by name, in the memory of the model and the optimiser."""
    tensors = {f"averaged/{name}": x for name, x in averaged.state_dict().items()}
    for name, p in model.named_parameters():
        tensors[f"model/{name}"] = p.detach()
        tensors |= {f"{key}/{name}": x for key, x in optimizer.state[p].items()}
    return tensors


def resume(file: Path, budget: dict, model: nn.Module, averaged: AveragedModel, optimizer: AdamW) -> dict:
    """Restore a stage's checkpoint in place, and return its facts."""
    facts = read_facts(file)
    if facts["budget"] != budget:
        cure = "give the same settings, or another --run"
        raise RunError(f"{file} was made with {facts['budget']}, not {budget}: {cure}")
    saved = load_file(file)
    for p in model.parameters():
        optimizer.state[p] = {"step": torch.zeros(())}
        optimizer.state[p] |= {key: torch.empty_like(p) for key in ("exp_avg", "exp_avg_sq")}
    for name, x in tensors_of(model, averaged, optimizer).items():
        x.copy_(saved[name])
    return facts


def read_facts(file: Path) -> dict:
    """Read steps, seconds, losses and budget of a stage's checkpoint."""
    with safe_open(file, "pt") as f:
        return json.loads(f.metadata()["facts"])


@torch.no_grad()
def average(averages: list[Tensor], weights: list[Tensor], n: Tensor | int) -> None:
    """Update the moving average in place, after n updates."""
    decay = min(EMA, (1 + int(n)) / (10 + int(n)))
    torch._foreach_lerp_(averages, weights, 1 - decay)


def rate(step: int, steps: int) -> float:
    """Return the factor of the learning rate: linear warm-up, then a cosine to 0."""
    warmup = min(WARMUP, steps // 10 + 1)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


# ---- files


def write(model: nn.Module, file: Path) -> None:
    """Write the weights in float16, under the official names; the file is replaced atomically."""
    state = {name: x.detach().cpu().to(torch.float16).contiguous() for name, x in model.state_dict().items()}
    overflow = [name for name, x in state.items() if not x.isfinite().all()]
    assert not overflow, f"{overflow[0]} and {len(overflow) - 1} more overflow float16: lower the rate"
    file.parent.mkdir(parents=True, exist_ok=True)
    save_replacing(state, file, {"format": "pt"})


def save_replacing(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically."""
    with replacing(file) as new:
        save_file(tensors, new, metadata=metadata)
        sync(new)


def write_config(config: VAEConfig, scale: float, file: Path) -> None:
    """Write config.json for diffusers' `AutoencoderKL.from_pretrained`; `read_scale` reads its scale, and its
    hash from the sha256.json beside it.
    """
    n = len(config.channels)
    settings = {
        "_class_name": "AutoencoderKL",
        "block_out_channels": config.channels,
        "layers_per_block": config.layers,
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.groups,
        "down_block_types": ["DownEncoderBlock2D"] * n,
        "up_block_types": ["UpDecoderBlock2D"] * n,
        "sample_size": scenes.SIZE,
        "scaling_factor": round(scale, 5),
    }
    replace_text(file, json.dumps(settings, indent=1))
    replace_text(file.with_name("sha256.json"), json.dumps({file.name: digest(file)}))


def train_all(job: Job, longer: float, count: int) -> None:
    """Train or resume the three stages on `count` scenes; `longer` multiplies their steps."""
    with lock(job.run, "--run"):
        drawn = draw_scenes(job.run, count)
        for stage, train in zip(STAGES.values(), (train_vae, train_clip, train_unet), strict=True):
            train(drawn, stage._replace(steps=max(round(longer * stage.steps), 1)), job)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m lab.pretrain",
        description="Train the tiny Stable Diffusion on drawn scenes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, default="weights/tiny", metavar="DIR", help="folder of the weights")
    add("--run", type=Path, default="runs/pretrain", metavar="DIR", help="folder of checkpoints and scenes")
    add("--longer", type=float, default=1, metavar="X", help="multiplies the steps")
    add("--images", type=int, default=IMAGES, metavar="N", help="number of scenes")
    add("--seed", type=int, default=0, help="of weights, batches, captions and noise")
    options = parser.parse_args(argv)
    if options.longer <= 0 or not 512 <= options.images <= len(scenes.SPLITS["pretrain"]) // 2:
        got = f"--longer {options.longer} --images {options.images}"
        parser.error(f"{got}: need --longer > 0 and 512 to 500000 images")

    job = Job(options.run, options.out, options.seed, "cuda" if torch.cuda.is_available() else "cpu")
    work = partial(train_all, job, longer=options.longer, count=options.images)
    return run_command("lab.pretrain", work, "interrupted: run the same command again to resume")


if __name__ == "__main__":
    sys.exit(main())
