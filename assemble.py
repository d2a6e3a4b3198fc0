"""Build a model, of size "sd15" or "tiny", from the files of the prior (Stable Diffusion).

    tada = build(TadaConfig(classes=("sea", "sky", "sand"), weights="weights/sd15"))

Top to bottom: the sizes of the parts, the prior, a new model, its adapter and decoder, taggers, the
optimiser's parameter groups.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import weights.load as weights_loader
from adapter import Classes, Implicit, Tagging, Unconditional, Words
from clip import CLIP, CLIPConfig, Tokenizer, zero_shot_tags
from decoders import SemanticDecoder, SemanticFPN, UperNet
from errors import ModelError, WeightsError
from mask2former import Mask2Former
from model import Tada, TadaConfig
from ram import likely_tags
from unet import LoRA, UNet, UNetConfig, replace_projections
from vae import VAE, VAEConfig
from weights.ram import load_ram, ram_folder
from weights.words import digest, word_vectors

Tagger = Callable[[Tensor], list[list[tuple[str, float]]]]  # images (B, 3, H, W) -> tags, scores, best first
SCALE_FILE = "vae/config.json"  # inside the weights folder of tiny


def part_configs(model: str, weights: str | Path) -> tuple[VAEConfig, UNetConfig, CLIPConfig]:
    """The configurations of "sd15" or "tiny"; tiny's latent scale is stored with its `weights`."""
    if model not in ("sd15", "tiny"):
        raise ModelError(f"unknown model {model!r}: choose sd15 or tiny")
    if model == "sd15":
        return VAEConfig(), UNetConfig(), CLIPConfig()
    vae = VAEConfig.tiny()
    if str(weights) != "random":
        folder = weights_loader.locate(weights)
        weights_loader.find(folder / "vae", weights_loader.OFFICIAL[VAE])  # reports a missing folder
        vae = replace(vae, scale=read_scale(folder / SCALE_FILE))
    return vae, UNetConfig.tiny(), CLIPConfig.tiny()


def read_scale(file: Path) -> float:
    """The scaling_factor of tiny's vae/config.json, whose hash is in the `sha256.json` beside it, if any."""
    hashes = file.with_name("sha256.json")
    try:
        found = {x.name: digest(x) for x in (file, hashes) if x.exists()}  # it opens no pipe
        if found.pop(hashes.name, None) and json.loads(hashes.read_bytes()) != found:
            raise ValueError(f"{hashes.name} has another hash")
        scale = json.loads(file.read_bytes())["scaling_factor"]
        if type(scale) not in (int, float) or not 0 < float(scale) < math.inf:
            raise ValueError(f"scaling_factor {scale} is not a positive number")
    except (OSError, ValueError, LookupError, TypeError, OverflowError, RecursionError) as error:
        cause = f"{type(error).__name__}: {error}"
        raise WeightsError(f"{file} has no valid scaling_factor ({cause}): see lab/pretrain.py") from None
    return float(scale)


def prior(model: str, weights: str | Path) -> tuple[VAE, UNet, CLIP, Tokenizer]:
    """Load the parts of Stable Diffusion from the folder `weights` with unet/, vae/, clip/ and tokenizer/.

    "random" initialises the parts instead, and the tokenizer encodes bytes (`Tokenizer.spelling`).
    """
    vae, unet, clip = part_configs(model, weights)
    return load_part(VAE, vae, weights), load_part(UNet, unet, weights), *load_clip(clip, weights)


def load_part(kind: type[nn.Module], config: Any, weights: str | Path) -> nn.Module:
    """One part of the prior from its folder, or initialised if `weights` is "random"."""
    if str(weights) == "random":
        return kind(config)
    with torch.device("meta"), Undrawn():  # skip initialisation; the weights are loaded next
        part = kind(config)
    return weights_loader.load(part, weights_loader.locate(weights) / kind.__name__.lower())


class Undrawn(TorchFunctionMode):
    """Draw no normal numbers: on meta the first ones import torch._dynamo, 1.4 s."""

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if function.__name__ == "normal_":  # nn.init's or Tensor's
            return args[0] if args else kwargs["tensor"]
        return (torch.empty if function is torch.randn else function)(*args, **(kwargs or {}))


def load_clip(config: CLIPConfig, weights: str | Path) -> tuple[CLIP, Tokenizer]:
    """CLIP and its tokenizer."""
    clip = load_part(CLIP, config, weights)
    if str(weights) == "random":
        return clip, Tokenizer.spelling(config.vocabulary)
    tokenizer = Tokenizer(folder := weights_loader.locate(weights) / "tokenizer")
    if tokenizer.end != config.vocabulary - 1:
        fault = f"has {tokenizer.end + 1:,} ids, and CLIP {config.vocabulary:,}"
        raise WeightsError(f"{folder} {fault}: use the tokenizer of the same model")
    return clip, tokenizer


def build(config: TadaConfig, device: torch.device | str = "cpu") -> Tada:
    """Build a new model: load the prior, initialise the rest from torch's global random state."""
    vae, unet, clip, tokenizer = prior(config.model, config.weights)
    clip.to(device)
    words = config.weights, clip, tokenizer, config.prompts
    if config.templates not in (1, 80):
        raise ModelError(f"--templates {config.templates}: choose 1 or 80")
    classes = word_vectors(*words, config.templates)  # (K, C)
    names = word_vectors(*words, 80, shared=True) if config.tags == "clip" else None  # (K, E)
    with torch.no_grad():
        empty = clip.text(tokenizer([""]).to(device))[0][0]  # (77, C)
    tada = assemble(config, vae, unet, clip, tokenizer, empty.cpu(), classes.cpu(), names)
    move(tada, device, config.tags, training=True)
    if config.tags == "ram":
        tada.tagger = open_tagger(tada, "ram", config.tag_threshold)
    return tada


def assemble(
    config: TadaConfig,
    vae: VAE,
    unet: UNet,
    clip: CLIP,
    tokenizer: Tokenizer,
    empty: Tensor,
    classes: Tensor,
    names: Tensor | None,
) -> Tada:
    """Join the prior with a new adapter and decoder: empty `(77, C)`, classes `(K, C)`, names `(K, E)`."""
    if config.lora:
        replace_projections(unet, partial(LoRA, rank=config.lora))
    adapter = make_adapter(config, clip.config, empty, classes)
    decoder = make_decoder(config, unet.config, tokens=len(empty))
    return Tada(config, vae, unet, clip, tokenizer, adapter, decoder, names)


def move(tada: Tada, device: torch.device | str, tags: str, training: bool = False) -> Tada:
    """Move a model to its device, in place; on a GPU its frozen parts become bfloat16 (not random ones, whose
    only file is the model's). `tags` is the source of those that it will use, its config's or another.
    """
    if torch.device(device).type == "cuda" and tada.config.weights != "random":
        shrink(tada, tags, training)
    return tada.to(device)


def shrink(tada: Tada, tags: str, training: bool) -> None:
    """Round the weights of frozen parts to bfloat16, channels-last: half the memory, and norms in their type.

    Without `training` the UNet is frozen too, and computes as the bfloat16 copy of training does; with it, it
    is channels-last as that copy is, so that a launch moves many weights or gradients between the two.
    CLIP keeps float32 where the tags are CLIP's: they are the same in training and test, on any device. So
    does its text tower, for the words. The VAE loses its decoder: nothing draws, and DDP wants one device.
    """
    tada.vae.decoder, parts = None, [tada.vae]
    if "clip" not in (tags, tada.config.tags):
        parts += [tada.clip.vision_model, tada.clip.visual_projection]
    for part in parts:
        part.to(torch.bfloat16, memory_format=torch.channels_last)
    if training and not tada.config.keeps_unet:
        tada.unet.to(memory_format=torch.channels_last)
    else:
        for name, parameter in tada.unet.named_parameters():
            if ".lora_" not in name:
                last = torch.channels_last if parameter.ndim == 4 else torch.preserve_format
                parameter.data = parameter.data.to(torch.bfloat16, memory_format=last)


def make_adapter(config: TadaConfig, clip: CLIPConfig, empty: Tensor, classes: Tensor) -> nn.Module:
    """Make the condition of a row of Table 5 from the vectors of "" `(77, C)` and of the classes `(K, C)`."""
    match config.condition:
        case "none":
            return Unconditional(empty)
        case "caption" | "tags" | "oracle":
            return Words()
        case "classes":
            return Classes(classes)
        case "implicit":
            return Implicit(empty, clip.projection)
        case "tagging":
            return Tagging(
                empty,
                classes,
                image_width=clip.image.width,
                heads=8 if config.model == "sd15" else 4,
                queries=config.queries,
                blocks=config.blocks,
                start=config.adapter_start,
            )
    choices = "none, caption, classes, implicit, tagging, tags or oracle"
    raise ModelError(f"unknown condition {config.condition!r}: choose {choices}")


def make_decoder(config: TadaConfig, unet: UNetConfig, tokens: int = 77) -> SemanticDecoder | Mask2Former:
    """Make the decoder.

    Semantic FPN (width 256; tiny 64), UperNet (512 and 256; tiny 64 and 32), or Mask2Former (100 queries, 9
    layers, width 256; tiny 20, 3, 64). With attention maps its input has one more channel per context token
    at strides 16 and 32; a prompt has `tokens` tokens.
    """
    channels = list(unet.channels)
    if config.attention_maps:
        if config.condition in ("oracle", "tags"):
            raise ModelError(
                "--attention-maps needs the same number of tokens for every image: "
                f"not --condition {config.condition}"
            )
        L = {"classes": len(config.classes), "tagging": config.queries}.get(config.condition, tokens)
        channels[1:3] = [width + L for width in channels[1:3]]
    kinds, tiny = {"fpn": SemanticFPN, "upernet": UperNet}, config.model == "tiny"
    if config.decoder == "mask2former":
        if len(config.things) != len(config.classes):
            raise ModelError(
                f"--decoder mask2former needs `things` for {len(config.classes)} classes, "
                f"got {len(config.things)}: use a data set with instances"
            )
        sizes = {"width": 64, "heads": 4, "queries": 20, "layers": 3, "pixel_layers": 2} if tiny else {}
        return Mask2Former(channels, config.things, groups=unet.groups, **sizes)
    if config.decoder not in kinds:
        raise ModelError(f"unknown decoder {config.decoder!r}: choose {', '.join(kinds)} or mask2former")
    widths = {"width": 64} if tiny else {}
    if tiny and config.decoder == "upernet":
        widths["auxiliary_width"] = 32
    return kinds[config.decoder](
        channels, len(config.classes), groups=unet.groups, dropout=config.dropout, **widths
    )


# ---- taggers


def open_tagger(tada: Tada, source: str, threshold: float | None = None) -> Tagger | None:
    """The tagger of `--tags` "clip" or "ram", None for any other source."""
    if source == "ram":
        return ram_tagger(tada.config.weights, tada.unet.conv_in.weight.device, threshold)
    if source == "clip":
        config = tada.config
        return clip_tagger(config.weights, tada.clip, tada.tokenizer, config.prompts, threshold, tada.names)
    return None


def ram_tagger(weights: str | Path, device: torch.device, threshold: float | None = None) -> Tagger:
    """RAM, from the folder next to the prior's; without a threshold each tag has its own."""
    ram, names, thresholds = load_ram(ram_folder(weights), device)
    return partial(likely_tags, ram, names=names, thresholds=thresholds, threshold=threshold)


def clip_tagger(
    weights: str,
    clip: CLIP,
    tokenizer: Tokenizer,
    names: Sequence[str],
    threshold: float | None = None,
    vectors: Tensor | None = None,
) -> Tagger:
    """CLIP, which chooses from `names`; vectors `(K, E)`: theirs, if they are at hand."""
    if vectors is None:
        vectors = word_vectors(weights, clip, tokenizer, names, 80, shared=True)
    return partial(zero_shot_tags, clip, names=names, vectors=vectors, threshold=threshold)


# ---- the optimiser


def parameter_groups(tada: Tada, lr: float, weight_decay: float, unet_scale: float = 1.0) -> list[dict]:
    """Group the trained parameters for AdamW.

    Only the weights of Linear and Conv layers decay; the UNet's learning rate is lr * unet_scale. (VPD
    selects by "norm" in the names, which also resets the UNet's rate: mmcv default_constructor.py.)
    """
    weights = {f"{name}.weight" for name, x in tada.named_modules() if isinstance(x, (nn.Linear, nn.Conv2d))}
    groups = []
    for part, part_lr in (("unet", lr * unet_scale), ("adapter", lr), ("decoder", lr)):
        parameters = getattr(tada, part).named_parameters(prefix=part)
        trained = {name: p for name, p in parameters if p.requires_grad}
        for decay, names in (
            (weight_decay, [name for name in trained if name in weights]),
            (0.0, [name for name in trained if name not in weights]),
        ):
            members = [trained[name] for name in names]
            if members:
                groups.append({"names": names, "params": members, "lr": part_lr, "weight_decay": decay})
    return groups
