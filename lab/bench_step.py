"""Compare one training step of sd15's sizes with the same step made of diffusers and transformers.

    python -m lab.bench_step

float32, one image, the condition `caption`. Both sides have the same weights, image, labels and caption: ours
is `train_step`; the peer is AutoencoderKL, CLIP's text model and UNet2DConditionModel with our Semantic FPN,
torch's cross-entropy and `AdamW(foreach=True)`. The loss and the gradient's norm of the first step are
compared before anything is timed.

A side takes up to 20 GB, so each runs in a process of its own, in the order A B, B A, ... Times are CPU
seconds of all threads: also on a busy machine they say how much work a step is. Peak memory is that of the
same processes, with weights and optimiser, without imports and construction.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapter import Words
from assemble import parameter_groups, shrink
from clip import CLIP, Tokenizer
from decoders import SemanticFPN
from errors import run_command
from kernels import IGNORE
from lab import bench_peers
from lab.bench_peers import peer_clip, peer_unet, peer_vae
from loading.augment import normalise
from loading.stream import Batch
from loading.tags import TagSource
from model import Tada, TadaConfig
from run.graph import Recorded
from run.masters import Masters
from run.memory import keep_freed_memory
from run.ranks import Ranks
from run.step import train_step, update
from unet import UNet
from vae import VAE

CLASSES = 150  # of ADE20K
CAPTION = "a boat on the sea under a blue sky"
RATE, DECAY = 0.0, 1e-3  # the rate does not change the time; at 0 every step computes the same
BOUNDS = 1e-5, 1e-4  # relative errors of the loss, and of the gradient's norm (6e-6 seen at these sizes)
COMPILED = ("vae.encoder", "unet", "decoder")  # parts of the peer, where it is compiled
STEPS, ROUNDS = 3, 2  # timed steps of each process, processes of each side
PHASES = ("vae", "text", "unet", "decoder", "backward", "optimiser")

Step = Callable[[Batch], tuple[float, float]]  # takes one step: the loss, and the norm of its gradient


@dataclass(frozen=True)
class Work:
    """What both sides are made of, and how they compute."""

    size: int = 256  # of the image
    device: str = "cpu"
    half: bool = False  # in bfloat16: ours as train.py on a GPU, the peer by autocast and channels-last
    peers: tuple[Callable[[], nn.Module], ...] = (peer_vae, peer_unet, peer_clip)
    kinds: tuple[Callable[[], nn.Module], ...] = (VAE, UNet, CLIP)
    decoder: Callable[..., SemanticFPN] = SemanticFPN
    context: int = 768  # channels of CLIP's text

    def prior(self) -> tuple[nn.Module, nn.Module, nn.Module, SemanticFPN]:
        """The peer's VAE, UNet and CLIP, and our decoder: the same random weights each time."""
        torch.manual_seed(0)
        with torch.device(self.device):
            decoder, parts = self.decoder(classes=CLASSES, dropout=0.0), [build() for build in self.peers]
            # A new one's logits are so small that any image would do.
            nn.init.normal_(decoder.classifier[-1].weight)
        return *parts, decoder

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.half)


def batch_of(size: int, images: int = 1) -> Batch:
    """Random images, and random labels in squares of 16 pixels; the first row of squares is ignored."""
    generator = torch.Generator().manual_seed(1)
    image = torch.randint(256, (images, 3, size, size), generator=generator).byte()
    labels = torch.randint(CLASSES, (images, size // 16, size // 16), generator=generator).byte()
    labels[:, 0] = IGNORE
    labels = labels.repeat_interleave(16, dim=1).repeat_interleave(16, dim=2)
    facts = {"present": [[]] * images, "positions": [*range(images)], "paths": ["random"] * images}
    return Batch(image, labels, **facts, skipped=[])


def part(work: Work, i: int, half: bool, last: bool, ours: bool) -> nn.Module:
    """The VAE, 0, or the UNet, 1: the peer's, or ours with its weights; in bfloat16, channels-last."""
    torch.manual_seed(0)
    with torch.device(work.device):
        peer = work.peers[i]()
    layout = {"memory_format": torch.channels_last} if last else {}
    return (our_part(work.kinds[i], peer) if ours else peer).to(torch.bfloat16 if half else None, **layout)


def our_part(kind: Callable[[], nn.Module], peer: nn.Module) -> nn.Module:
    """Our part with the peer's weights, which the two share."""
    with torch.device("meta"):
        part = kind()
    part.load_state_dict(peer.state_dict(), assign=True)
    return part


def our_model(work: Work, training: bool = True) -> Tada:
    """Our model; in half precision its frozen parts are bfloat16, as on a GPU."""
    *peers, decoder = work.prior()
    parts = [our_part(*pair) for pair in zip(work.kinds, peers, strict=True)]
    config = TadaConfig(tuple(map(str, range(CLASSES))), condition="caption", noise="none")
    tokenizer = Tokenizer.spelling(parts[-1].config.vocabulary)
    tada = Tada(config, *parts, tokenizer, Words(), decoder)
    if work.half:
        shrink(tada, config.tags, training)
    return tada


def ours(work: Work, graph: type[Recorded] | None = None) -> tuple[nn.Module, torch.optim.Optimizer, Step]:
    """The model, its optimiser, and a step as train.py takes it; with `graph` as by its --cuda-graph."""
    keep_freed_memory()
    tada = our_model(work).train()
    optimizer = torch.optim.AdamW(parameter_groups(tada, RATE, weight_decay=DECAY), fused=True)
    masters = Masters(tada) if work.half else None
    words, ranks = TagSource("", (), {"random": [CAPTION]}), Ranks(0, 1, torch.device(work.device))
    how = {"words": words, "ranks": ranks, "masters": masters}
    if graph:
        plain = partial(update, masters or tada, tada, optimizer, ranks, None, masters)
        how["recorded"] = graph(plain, optimizer)

    def step(batch: Batch) -> tuple[float, float]:
        result = train_step(masters or tada, tada, optimizer, [batch], **how)
        return result["loss"], result["grad_norm"]

    return tada, optimizer, step


def tapped(unet: nn.Module) -> Callable[..., list[Tensor]]:
    """The peer's UNet without its noise head, as a function that returns four maps, finest first."""
    unet.conv_norm_out = unet.conv_act = unet.conv_out = nn.Identity()
    maps, blocks = [], unet.up_blocks  # maps: of the last call, coarsest first
    for block in (blocks[0].resnets[1], blocks[1].attentions[1], blocks[2].attentions[1], blocks[3]):
        block.register_forward_hook(lambda _, x, y: maps.append(y[0] if isinstance(y, tuple) else y))

    def features(*inputs: Tensor) -> list[Tensor]:
        maps.clear()
        unet(*inputs)
        return maps[::-1]

    return features


def peer_model(work: Work) -> tuple[nn.ModuleDict, Callable[[Tensor], Tensor]]:
    """The same of the peers' parts, and its logits of images in bytes, at stride 8."""
    vae, unet, clip, decoder = work.prior()
    text, features = clip.text_model, tapped(unet)
    ids = Tokenizer.spelling(clip.config.text_config.vocab_size)([CAPTION]).to(work.device)
    model = nn.ModuleDict({"vae": vae, "text": text, "unet": unet, "decoder": decoder})
    if work.half:
        model.to(memory_format=torch.channels_last)

    def logits(image: Tensor) -> Tensor:
        with torch.no_grad():
            pixels = normalise(image.to(work.device, non_blocking=True)).to(vae.dtype)
            latent = vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor
            context = text(ids.expand(len(image), -1)).last_hidden_state
        t = torch.zeros(len(image), dtype=torch.int64, device=work.device)
        return decoder(features(latent, t, context)).main

    return model, logits


def peer(work: Work) -> tuple[nn.Module, torch.optim.Optimizer, Step]:
    """The same, of the peers' parts."""
    model, logits = peer_model(work)
    for part in ("vae", "text"):
        model[part].requires_grad_(False)
    model["unet"].train()
    model["decoder"].train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=DECAY, foreach=True)

    def step(batch: Batch) -> tuple[float, float]:
        labels = batch.labels.to(work.device, non_blocking=True).long()
        with work.autocast():
            large = F.interpolate(logits(batch.image), size=labels.shape[1:], mode="bilinear")
            loss = F.cross_entropy(large, labels, ignore_index=IGNORE)
        loss.backward()
        norm = nn.utils.get_total_norm([p.grad for p in trained])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item(), norm.item()

    return model, optimizer, step


def measure(side: str, work: Work, steps: int) -> dict:
    """The first step's loss and norm, the CPU seconds of each phase of the others, and the peak in MiB."""
    with torch.device("meta"):
        [build() for build in work.peers]  # imports the peers
    before = bench_peers.memory("VmRSS")
    model, optimizer, step = {"ours": ours, "peer": peer}[side](work)
    batch = batch_of(work.size)
    bench_peers.watch_peak()

    times = []

    def mark(*_) -> None:
        times.append(time.process_time())

    # Both sides call these in this order: the ends of the phases.
    model.get_submodule("vae.quant_conv").register_forward_hook(mark)
    model.get_submodule("unet.time_embedding").register_forward_pre_hook(mark)
    model.get_submodule("decoder").register_forward_pre_hook(mark)
    model.get_submodule("decoder").register_forward_hook(mark)
    optimizer.register_step_pre_hook(mark)
    first, rows = step(batch), []  # also the warm-up
    for _ in range(steps):
        times.clear()
        mark()
        step(batch)
        mark()
        rows.append([end - start for start, end in pairwise(times)])
    return {"first": first, "phases": rows, "MiB": bench_peers.memory("VmHWM") - before}


def compare(work: Work, steps: int, rounds: int) -> dict:
    """Measure the row of the table, and the median of each phase of both sides."""
    row = {"case": "training step, sd15", "image": work.size, "dtype": "float32"}
    run = lambda side: lambda _: bench_peers.apart(measure, side, work, steps)
    sides = {side: run(side) for side in ("ours", "peer")}
    runs = dict(zip(sides, bench_peers.in_turns(rounds, *sides.values()), strict=True))
    print(json.dumps(runs), flush=True)
    results = [runs[side][0]["first"] for side in runs]
    errors = [abs(mine / theirs - 1) for mine, theirs in zip(*results, strict=True)]
    row["error"] = errors[0]
    if not all(error <= bound for error, bound in zip(errors, BOUNDS, strict=True)):
        return row | {"verdict": "FAIL"}
    seconds = [[statistics.median(map(sum, run["phases"])) for run in runs[side]] for side in runs]
    row["ours s"], row["peer s"] = map(statistics.median, seconds)
    row["ratio"], row["min ratio"] = bench_peers.ratio(*seconds), min(seconds[0]) / min(seconds[1])
    for side, measured in runs.items():
        row[f"{side} MiB"] = statistics.median(run["MiB"] for run in measured)
        phases = zip(*(phases for run in measured for phases in run["phases"]), strict=True)
        row[f"{side} phases"] = dict(zip(PHASES, map(statistics.median, phases), strict=True))
    return row


def main() -> int:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # in the processes: threads sleep while they wait
    print(bench_peers.header(), flush=True)
    row = compare(Work(), STEPS, ROUNDS)
    print(bench_peers.table([row], bench_peers.COLUMNS))
    if "verdict" not in row:
        pairs = [(phase, row["ours phases"][phase], row["peer phases"][phase]) for phase in PHASES]
        phases = [{"CPU seconds": x, "ours s": mine, "peer s": y, "ratio": mine / y} for x, mine, y in pairs]
        print("", bench_peers.table(phases), sep="\n")
    return int("verdict" in row)


if __name__ == "__main__":
    sys.exit(run_command("bench", main))
