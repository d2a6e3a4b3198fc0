"""A Stable Diffusion that fits in a repository: the `tiny` VAE, CLIP and UNet, trained on drawn scenes.

    python -m lab.pretrain                    # weights/tiny; an hour to an hour and a half on 2 cores
    python -m lab.pretrain --longer 10        # ten times the steps: for a GPU, which it takes by itself

The pictures are `scenes` of the range "pretrain", their captions are lists of tags; a label map is never
looked at. Three stages, each with what the one before wrote: the autoencoder, CLIP with its own vocabulary,
the UNet on latents (Eq. 2). A stage's randomness is a function of seed and step alone, so a run that was
stopped goes on, from the last save, to the same numbers. `python -m lab.evidence` measures what came out.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable
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
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from assemble import part_configs
from clip import CLIP, END, PROMPT, START, TEMPLATES, CLIPConfig, Tokenizer
from errors import RunError, TadaError, WeightsError
from images import scenes
from run.checkpoint import replace_text, sync
from run.folder import commit, lock
from unet import TIMES, UNet, UNetConfig, alphas_cumprod
from vae import VAE, VAEConfig
from weights.load import load

PICTURES = 20_480  # of the range "pretrain", from its beginning; its end is for lab.evidence
SAVE_SECONDS = 60  # between two saves: as much is lost when a run is killed
WARMUP = 100  # steps until the full learning rate, which then falls to 0 as a cosine
EMA = 0.999  # decay of the moving average that is kept; at the start (1 + n) / (10 + n), if that is less
KL_WEIGHT = 1e-3  # per latent value, beside the mean absolute error; CompVis' 1e-6 is on the sum of all 1024
DROPPED = 0.2  # of the tags of a caption
SINGLE = 0.2  # of the captions name one tag alone
WRAPPED = 0.5  # of the captions stand in a prompt such as "a photo of a {}"
EMPTY = 0.1  # of the captions that the UNet sees are "": what guidance needs (Ho & Salimans 2022)
LARGEST_SCALE = math.log(100)  # of CLIP's logits (Radford et al. 2021, 2.5)


class Stage(NamedTuple):
    """The budget of one part."""

    steps: int
    batch: int
    lr: float


STAGES = {"vae": Stage(4000, 8, 1e-3), "clip": Stage(1000, 128, 1e-3), "unet": Stage(6000, 16, 1e-3)}
KINDS = {"vae": (VAE, VAEConfig), "clip": (CLIP, CLIPConfig), "unet": (UNet, UNetConfig)}
FILES = {
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "clip": "clip/model.safetensors",
    "unet": "unet/diffusion_pytorch_model.safetensors",
}
RECORD = "training.json"  # beside the weights: steps, time, losses, seed and commit of each part


class Pictures(NamedTuple):
    """Drawn scenes: images `(T, 128, 128, 3)` uint8 on the disk, and each one's tags."""

    images: np.ndarray
    tags: list[tuple[str, ...]]

    def batch(self, indices: Tensor) -> Tensor:
        """Images `(B, 3, 128, 128)` in [-1, 1]."""
        images = torch.from_numpy(self.images[indices.numpy()])
        return images.permute(0, 3, 1, 2).float() / 127.5 - 1

    def captions(self, indices: Tensor, r: Random) -> list[str]:
        return [caption(self.tags[i], r) for i in indices.tolist()]


def draw_pictures(run: Path, count: int, first: int = scenes.SPLITS["pretrain"].start) -> Pictures:
    """`count` scenes, drawn once and kept in `run`; 50 KB each."""
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
    return Pictures(np.load(images, mmap_mode="r"), [tuple(x) for x in json.loads(tags.read_text())])


def caption(tags: tuple[str, ...], r: Random) -> str:
    """The visible tags in random order, each dropped with probability 0.2, at times inside a prompt.

    One caption in five names a single tag: Eq. 6 and the oracle ask for the vector of one name.
    """
    words = r.sample(tags, len(tags))
    kept = words[:1] if r.random() < SINGLE else [word for word in words if r.random() >= DROPPED]
    text = ", ".join(kept or words[:1])
    if r.random() < WRAPPED:
        return (PROMPT if r.random() < 0.5 else r.choice(TEMPLATES)).format(text)
    return text


# ---- the three stages


def train_vae(pictures: Pictures, run: Path, out: Path, stage: Stage, seed: int, device: str) -> None:
    """Reconstruction and KL; then the scale that gives its latents unit variance goes beside the weights."""

    def loss(vae: VAE, indices: Tensor, r: Random, noise: torch.Generator) -> Tensor:
        image = pictures.batch(indices).to(device)
        mean, logvar = vae.moments(image)
        z = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=noise).to(device)
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        return F.l1_loss(vae.decoder(vae.post_quant_conv(z)), image) + KL_WEIGHT * kl

    vae = fit("vae", loss, len(pictures.tags), run, stage, seed, device)
    finish("vae", vae, run, out)
    vae = load(VAE(VAEConfig.tiny()), out / "vae").to(device)
    with torch.no_grad():
        means = [vae.moments(pictures.batch(part).to(device))[0] for part in torch.arange(512).split(32)]
    write_config(vae.config, 1 / float(torch.cat(means).std()), out / "vae" / "config.json")


def train_clip(pictures: Pictures, run: Path, out: Path, stage: Stage, seed: int, device: str) -> None:
    """The vocabulary, then both towers: each picture must find its caption in the batch and each caption its
    picture (Radford et al. 2021, Figure 3).
    """
    tokenizer = train_tokenizer(pictures, out / "tokenizer", seed)

    def loss(clip: CLIP, indices: Tensor, r: Random, noise: torch.Generator) -> Tensor:
        ids = tokenizer(pictures.captions(indices, r))
        longest = int((ids != tokenizer.end).sum(dim=1).max()) + 1  # behind it there are ends only
        _, image = clip.image(pictures.batch(indices).to(device))
        text = clip.text_projection(clip.text(ids[:, :longest].to(device))[1])
        scale = clip.logit_scale.clamp(max=LARGEST_SCALE).exp()
        with torch.autocast(device, enabled=False):  # bfloat16 has steps of 0.5 at a logit of 100
            cosine = F.normalize(image.float(), dim=-1) @ F.normalize(text.float(), dim=-1).T  # (B, B)
        logits = scale * cosine
        own = torch.arange(len(ids), device=device)
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2

    finish("clip", fit("clip", loss, len(pictures.tags), run, stage, seed, device), run, out)


def train_unet(pictures: Pictures, run: Path, out: Path, stage: Stage, seed: int, device: str) -> None:
    """Eq. 2: the noise of a latent at a random time, told its caption."""
    clip = load(CLIP(CLIPConfig.tiny()), out / "clip").to(device).eval()
    tokenizer = Tokenizer(out / "tokenizer")
    latents = encode_all(pictures, out, device)  # (T, 4, 16, 16)
    alphas = alphas_cumprod()

    def loss(unet: UNet, indices: Tensor, r: Random, noise: torch.Generator) -> Tensor:
        captions = ["" if r.random() < EMPTY else text for text in pictures.captions(indices, r)]
        with torch.no_grad():
            context, _ = clip.text(tokenizer(captions).to(device))  # (B, 77, 128)
        x = latents[indices]
        eps, t = torch.randn(x.shape, generator=noise), torch.randint(TIMES, (len(x),), generator=noise)
        alpha = alphas[t][:, None, None, None]
        z = alpha.sqrt() * x + (1 - alpha).sqrt() * eps  # Eq. 1
        return F.mse_loss(unet(z.to(device), t.to(device), context).float(), eps.to(device))

    finish("unet", fit("unet", loss, len(pictures.tags), run, stage, seed, device), run, out)


@torch.no_grad()
def encode_all(pictures: Pictures, out: Path, device: str) -> Tensor:
    vae = read_vae(out).to(device).eval()
    parts = tqdm(torch.arange(len(pictures.tags)).split(32), desc="encoding", disable=None)
    return torch.cat([vae.encode(pictures.batch(part).to(device)).cpu() for part in parts])


def train_tokenizer(pictures: Pictures, folder: Path, seed: int) -> Tokenizer:
    """Byte pairs of the captions, in CLIP's two files: all bytes, then what is merged, start and end last."""
    size = CLIPConfig.tiny().vocabulary
    spelling = Tokenizer.spelling(size)
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size - 258,  # without the bytes that end a word, start and end
        initial_alphabet=letters,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    r = Random(f"tokenizer {seed}")
    spelling.bpe.train_from_iterator((caption(tags, r) for tags in pictures.tags), trainer)
    merges = json.loads(spelling.bpe.to_str())["model"]["merges"]
    names = [*letters, *(f"{x}</w>" for x in letters)]
    names += [left + right for left, right in merges if left + right not in names]
    table = {name: i for i, name in enumerate(dict.fromkeys(names))} | {START: size - 2, END: size - 1}
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / "vocab.json", json.dumps(table, ensure_ascii=False))
    lines = [f"{left} {right}" for left, right in merges]
    replace_text(folder / "merges.txt", "\n".join(["#version: 0.2", *lines, ""]))
    return Tokenizer(folder)


# ---- the loop that they share


def fit(
    name: str,
    loss: Callable[[nn.Module, Tensor, Random, torch.Generator], Tensor],
    count: int,
    run: Path,
    stage: Stage,
    seed: int,
    device: str,
) -> nn.Module:
    """AdamW on `loss` of random batches out of `count` pictures; the moving average of its weights.

    Goes on from `run/NAME.safetensors`, which is replaced every minute.
    """
    torch.manual_seed(seed)
    kind, config = KINDS[name]
    model = kind(config.tiny()).to(device)
    averaged = AveragedModel(model, multi_avg_fn=average)
    optimizer = torch.optim.AdamW(model.parameters(), stage.lr, betas=(0.9, 0.99), weight_decay=0.01)
    budget = {**stage._asdict(), "pictures": count, "seed": seed}
    state = State(run / f"{name}.safetensors", budget, model, averaged, optimizer)
    saved = time.monotonic()
    bar = tqdm(range(state.step, stage.steps), desc=name, initial=state.step, total=stage.steps, disable=None)
    for step in bar:
        start = time.monotonic()
        noise = torch.Generator().manual_seed(1_000_000 * seed + step)
        indices = torch.randint(count, (stage.batch,), generator=noise)
        for group in optimizer.param_groups:
            group["lr"] = stage.lr * rate(step, stage.steps)
        with torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda"):
            value = loss(model, indices, Random(f"{name} {seed} {step}"), noise)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        averaged.update_parameters(model)
        state.count(float(value.detach()), time.monotonic() - start)
        last = state.step == stage.steps
        if last or time.monotonic() - saved > SAVE_SECONDS:
            state.save()
            saved = time.monotonic()
        if last or state.step % 100 == 0:
            bar.write(f"{name} {state.step}/{stage.steps} loss {state.recent():.4f} {state.seconds:.0f} s")
            sys.stdout.flush()
    return averaged.module.eval()


class State:
    """A stage on the disk: both sets of weights and the optimiser, the losses per 100 steps and the time."""

    def __init__(
        self,
        file: Path,
        budget: dict,
        model: nn.Module,
        averaged: AveragedModel,
        optimizer: torch.optim.Optimizer,
    ):
        self.file, self.budget = file, budget
        self.model, self.averaged, self.optimizer = model, averaged, optimizer
        self.step, self.seconds, self.losses, self.sums = 0, 0.0, [], (0.0, 0)
        if file.is_file():
            self.load()

    def count(self, loss: float, seconds: float) -> None:
        assert math.isfinite(loss), f"{self.file.stem}: the loss of step {self.step} is {loss}"
        total, n = self.sums if self.step % 100 else (0.0, 0)
        self.sums = (total + loss, n + 1)
        self.step, self.seconds = self.step + 1, self.seconds + seconds
        if self.step % 100 == 0:
            self.losses.append(round(self.recent(), 5))

    def recent(self) -> float:
        return self.sums[0] / self.sums[1]

    def tensors(self) -> dict[str, Tensor]:
        tensors = {f"averaged/{name}": x for name, x in self.averaged.state_dict().items()}
        for name, p in self.model.named_parameters():
            tensors[f"model/{name}"] = p.detach()
            tensors |= {f"{key}/{name}": x for key, x in self.optimizer.state[p].items()}
        return tensors

    def save(self) -> None:
        facts = {"step": self.step, "seconds": self.seconds, "losses": self.losses, "sums": self.sums}
        facts |= {"budget": self.budget, "commit": commit(), "torch": torch.__version__}
        facts |= {"device": next(self.model.parameters()).device.type, "threads": torch.get_num_threads()}
        new = self.file.with_suffix(".tmp")
        save_file(
            {name: x.cpu().contiguous().clone() for name, x in self.tensors().items()},
            new,
            metadata={"facts": json.dumps(facts, sort_keys=True)},
        )
        sync(new)
        os.replace(new, self.file)

    def load(self) -> None:
        facts = read_facts(self.file)
        if facts["budget"] != self.budget:
            raise TadaError(
                f"{self.file} was made with {facts['budget']}, not {self.budget}: "
                "give the same, or another --run"
            )
        tensors = load_file(self.file)
        for name, p in self.model.named_parameters():
            p.data.copy_(tensors[f"model/{name}"])
            keys = ("step", "exp_avg", "exp_avg_sq")
            state = {key: tensors[f"{key}/{name}"].clone() for key in keys}
            self.optimizer.state[p] = {k: x if k == "step" else x.to(p.device) for k, x in state.items()}
        self.averaged.load_state_dict(
            {name: tensors[f"averaged/{name}"] for name in self.averaged.state_dict()}
        )
        self.step, self.seconds = facts["step"], facts["seconds"]
        self.losses, self.sums = facts["losses"], tuple(facts["sums"])


def read_facts(file: Path) -> dict:
    """Steps, seconds, losses and budget of a stage's file."""
    with safe_open(file, "pt") as f:
        return json.loads(f.metadata()["facts"])


@torch.no_grad()
def average(averages: list[Tensor], weights: list[Tensor], n: Tensor | int) -> None:
    """The moving average after n updates."""
    decay = min(EMA, (1 + int(n)) / (10 + int(n)))
    torch._foreach_lerp_(averages, weights, 1 - decay)


def rate(step: int, steps: int) -> float:
    """The learning rate as a share of the full one."""
    warmup = min(WARMUP, steps // 10 + 1)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


# ---- files


def finish(name: str, model: nn.Module, run: Path, out: Path) -> None:
    """Put the weights of a part into `out`, and what is known of their training beside them."""
    write(model, out / FILES[name])
    record = out / RECORD
    parts = json.loads(record.read_text()) if record.is_file() else {}
    parts[name] = read_facts(run / f"{name}.safetensors")
    replace_text(record, json.dumps(parts, indent=1) + "\n")


def write(model: nn.Module, file: Path) -> None:
    """The weights in float16, under the official names."""
    state = {name: x.detach().cpu().to(torch.float16).contiguous() for name, x in model.state_dict().items()}
    broken = [name for name, x in state.items() if not x.isfinite().all()]
    assert not broken, f"float16 cannot hold {broken[0]} and {len(broken) - 1} more: lower the learning rate"
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, file.with_suffix(".tmp"), metadata={"format": "pt"})
    os.replace(file.with_suffix(".tmp"), file)


def write_config(config: VAEConfig, scale: float, file: Path) -> None:
    """What diffusers' `AutoencoderKL.from_pretrained` reads; we read the scale (`model.part_configs`)."""
    n = len(config.channels)
    about = {
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
    replace_text(file, json.dumps(about, indent=1))


def read_vae(folder: Path) -> VAE:
    """The autoencoder with its measured scale."""
    return load(VAE(part_configs("tiny", folder)[0]), folder / "vae")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lab.pretrain",
        description="Train the tiny Stable Diffusion on drawn scenes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--out", type=Path, default="weights/tiny", metavar="DIR", help="where the weights go"
    )
    parser.add_argument("--run", type=Path, default="runs/pretrain", metavar="DIR", help="its working folder")
    parser.add_argument("--longer", type=float, default=1, metavar="X", help="multiplies the steps")
    parser.add_argument("--pictures", type=int, default=PICTURES, metavar="N", help="how many scenes")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches, captions and noise")
    o = parser.parse_args(argv)
    if o.longer <= 0 or not 512 <= o.pictures <= len(scenes.SPLITS["pretrain"]) // 2:
        parser.error(f"--longer {o.longer} --pictures {o.pictures}: give more than 0, and 512 to 500000")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        with lock(o.run, "--run"):
            pictures = draw_pictures(o.run, o.pictures)
            for name, train in (("vae", train_vae), ("clip", train_clip), ("unet", train_unet)):
                stage = STAGES[name]._replace(steps=max(round(o.longer * STAGES[name].steps), 1))
                train(pictures, o.run, o.out, stage, o.seed, device)
    except KeyboardInterrupt:
        print("stopped: the same command goes on from the last save", file=sys.stderr)
        return 130
    except (TadaError, RunError, WeightsError, OSError) as error:
        print(f"lab.pretrain: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
