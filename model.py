"""TADA: Stable Diffusion's UNet, told what is in the picture, as the backbone of dense prediction (Figure 2).

    tada = build(TadaConfig(classes=("sea", "sky", "sand"), weights="weights/sd15"))
    output = tada(image, tags)  # image (B, 3, H, W) in [-1, 1], a list of words per picture
    labels = tada.eval().predict(image, tags).labels  # (B, H, W)

Top to bottom: the choices that make a model, the model (its `forward` is Figure 2), prediction of pictures of
any size, words to vectors, building, parameter groups. checkpoint.py saves and loads a trained model.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import weights.load as official
from adapter import (
    Caption,
    Classes,
    Condition,
    Implicit,
    Oracle,
    Tagging,
    Text,
    Unconditional,
    asymmetric_loss,
    present,
)
from clip import CLIP, CLIPConfig, Tokenizer, name_vectors, zero_shot
from decoders import IGNORE, Logits, SemanticDecoder, SemanticFPN, UperNet, resize
from errors import ModelError, WeightsError
from mask2former import OVERLAP, SCORE, Instances, Mask2Former, Panoptic, Queries, Rand, Target
from unet import UNet, UNetConfig, alphas_cumprod
from vae import VAE, VAEConfig
from weights.words import word_vectors

Size = tuple[int, int]  # height, width
Tags = Sequence[Sequence[str]]  # the words of each picture; for captions one whole sentence each

NOISE_SEED = 42  # ours; ODISE too takes one noise for every picture
SCALE_FILE = "vae/config.json"  # below the folder of tiny's weights
STRIP = 2**24  # values of the softmax that are held at once when a picture is read: 64 MiB


@dataclass(frozen=True)
class TadaConfig:
    """Every choice that makes a trained model what it is. Stored with it, so that no command asks again."""

    classes: tuple[str, ...]  # as shown to people
    prompts: tuple[str, ...] = ()  # as the text tower reads them; () = the same
    palette: tuple[tuple[int, int, int], ...] = ()
    dataset: str = "folder"
    model: str = "sd15"  # the sizes of all parts: or "tiny"
    weights: str = "random"  # the folder of the frozen files
    things: tuple[bool, ...] = ()  # of each class, whether its instances are told apart; () = unknown
    decoder: str = "fpn"  # or "upernet", "mask2former"
    pixel_decoder: str = "deformable"  # of mask2former: or "fpn"
    condition: str = "tagging"  # none, caption, classes, implicit, tagging, oracle: Table 5 and Figure 1
    tags: str = "classes"  # where a picture's words come from: classes, clip, oracle, or the name of a file
    tag_tokens: str = "pooled"  # one vector a tag; or "prompt": the 77 tokens of all tags in a row
    templates: int = 1  # prompts averaged into a name's vector: 1 or 80
    queries: int = 32  # of the tagging adapter (section 4.1)
    blocks: int = 2
    adapter_start: str = "random"  # or "empty"
    tag_loss_weight: float = 1.0
    timestep: int = 0  # of the "minor noise" (section 3.2)
    noise: str = "fixed"  # or "none"
    scale_latent: bool = True  # VPD leaves the latent as large as the autoencoder makes it
    attention_maps: bool = False  # VPD adds the UNet's cross-attention to its features; the paper does not
    freeze_unet: bool = False
    dropout: float = 0.1
    crop: Size = (512, 512)  # of training, and the window of a sliding test
    box: Size | None = (512, 2048)  # short and long side a test picture is resized into; None = its own size
    stride: Size = (341, 341)  # of the sliding window

    def __post_init__(self) -> None:
        if not self.prompts:
            object.__setattr__(self, "prompts", self.classes)


class Output(NamedTuple):
    """What one pass gives: the decoder's prediction for the padded picture, and what the UNet was told."""

    prediction: Logits | Queries
    condition: Condition


class Seen(NamedTuple):
    """What the frozen parts make of a picture: noised latent `(B, 4, h, w)`, CLIP's image tokens `(B, M, C)`
    and embedding `(B, P)`; None where the condition does not look.
    """

    latent: Tensor
    image_tokens: Tensor | None
    image_embedding: Tensor | None


class Prediction(NamedTuple):
    """labels `(B, H, W)` int64 in 0..K-1; tag_logits `(B, K)` of Eq. 7 over all windows, None without it."""

    labels: Tensor
    tag_logits: Tensor | None


class Segmented(NamedTuple):
    """What Mask2Former finds: `Prediction`'s labels and tag_logits, and the segments of each picture."""

    labels: Tensor
    tag_logits: Tensor | None
    panoptic: list[Panoptic]
    instances: list[Instances] | None  # None if they are not asked for


class Tada(nn.Module):
    """Figure 2. The VAE and both towers of CLIP are frozen; UNet, adapter and decoder are trained.

    `vectors` has the pooled text vector `(C,)` of every word seen so far; `names (K, P)` are the class names
    in CLIP's shared space, for zero-shot tags, None unless the tags come from CLIP.
    """

    def __init__(
        self,
        config: TadaConfig,
        vae: VAE,
        unet: UNet,
        clip: CLIP,
        tokenizer: Tokenizer,
        adapter: nn.Module,
        decoder: SemanticDecoder | Mask2Former,
        names: Tensor | None = None,
    ):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.vae, self.unet, self.clip, self.adapter, self.decoder = vae, unet, clip, adapter, decoder
        self.register_buffer("names", names)
        self.vectors: dict[str, Tensor] = {}
        # Training may put a compiled one here.
        self.features = unet.features_and_attention if config.attention_maps else unet.features
        self.multiple = vae.stride * 2 ** (len(unet.config.channels) - 1)  # of the picture's sides: 64
        self.looks = isinstance(adapter, (Implicit, Tagging))  # does the adapter read CLIP's view?
        self.steered = isinstance(adapter, (Caption, Oracle, Tagging))  # does it read a picture's words?

        self.vae.requires_grad_(False)
        self.clip.requires_grad_(False)
        self.unet.requires_grad_(not config.freeze_unet)
        self.unet.conv_norm_out.requires_grad_(False)  # they make the noise, which nobody reads here
        self.unet.conv_out.requires_grad_(False)
        if isinstance(adapter, Tagging) and not config.tag_loss_weight:
            # Without Eq. 7 they have no gradient, and DDP would wait for one.
            adapter.log_scale.requires_grad_(False)
            adapter.bias.requires_grad_(False)

    def forward(self, image: Tensor | None, tags: Tags | None = None, seen: Seen | None = None) -> Output:
        """Figure 2: image `(B, 3, H, W)` in [-1, 1], any size, and the words of each picture.

        Without tags the adapter reads the class names. The prediction is that of the picture padded with grey
        on the right and below to multiples of 64; `loss` and `predict` take that into account. `seen` stands
        for the image where `see` has read it before.
        """
        with torch.no_grad():
            seen = seen or self.see(image)
            text = self.text(tags)
        condition = self.adapter(seen.image_tokens, seen.image_embedding, text)
        features = self.features(*self.unet_input(seen.latent, condition))
        if self.config.attention_maps:
            features = with_attention(*features)
        return Output(self.decoder(features), condition)

    def see(self, image: Tensor) -> Seen:
        """The frozen view of a picture, by the VAE and, where the condition looks, CLIP's image tower."""
        latent = self.noised(self.encode(self.padded(image)))
        if not self.looks:
            return Seen(latent, None, None)
        return Seen(latent, *self.clip.image(image))

    def unet_input(
        self, latent: Tensor, condition: Condition
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Latent, time step `(B,)`, context `(B, L, C)` and its lengths, as `UNet.features` takes them."""
        B = len(latent)
        t = torch.full((B,), self.config.timestep, device=latent.device)
        return latent, t, condition.context.expand(B, -1, -1), condition.lengths

    def encode(self, image: Tensor) -> Tensor:
        """The latent `(B, 4, h, w)`: scaled by 0.18215 as Stable Diffusion's, or as VPD leaves it."""
        latent = self.vae.encode(image)
        return latent if self.config.scale_latent else latent / self.vae.config.scale

    def noised(self, latent: Tensor) -> Tensor:
        """Eq. 1 with the "minor noise" of section 3.2: pictures of one size have one noise, always."""
        if self.config.noise == "none":
            return latent
        seeded = torch.Generator().manual_seed(NOISE_SEED)  # on the CPU: the same on every device
        noise = torch.randn(latent.shape[1:], generator=seeded).to(latent)
        alpha = float(alphas_cumprod()[self.config.timestep])
        return alpha**0.5 * latent + (1 - alpha) ** 0.5 * noise

    def padded(self, x: Tensor, value: float = 0) -> Tensor:
        """`(..., H, W)` with both sides filled up to multiples of 64; 0 is the grey of training's padding."""
        H, W = x.shape[-2:]
        return F.pad(x, (0, -W % self.multiple, 0, -H % self.multiple), value=value)

    def loss(
        self,
        output: Output,
        labels: Tensor,
        segments: Sequence[Target] | None = None,
        rand: Rand | Sequence[Rand] = torch.rand,
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Per part, its weighted sum and how many terms it has: seg, aux (UperNet), tag (tagging, Eq. 7); of
        Mask2Former class, mask, dice in the place of seg.

        labels `(B, H, W)` int64 of the pictures that `forward` saw, 0..K-1 or 255 = ignore. Mask2Former needs
        the segments of each picture, `padded` as it was, and draws points by `rand`. Each part is divided by
        its count over all processes and accumulation steps (`counts`).
        """
        if segments is None:
            losses = self.decoder.loss(output.prediction, self.padded(labels, IGNORE))
        else:
            losses = self.decoder.loss(output.prediction, segments, rand)
        if output.condition.logits is not None and self.config.tag_loss_weight:
            targets = present(labels, len(self.config.classes))
            total, count = asymmetric_loss(output.condition.logits, targets)
            losses["tag"] = (self.config.tag_loss_weight * total, count)
        return losses

    def counts(self, labels: Tensor, segments: Sequence[Target] | None = None) -> dict[str, Tensor]:
        """The counts of `loss`, from its targets alone."""
        target = labels if segments is None else segments
        return {**self.decoder.counts(target), "tag": labels.new_tensor(len(labels))}

    # ---- prediction of pictures of any size

    @torch.no_grad()
    def predict(
        self,
        image: Tensor,
        tags: Tags | None = None,
        size: Size | None = None,
        base: Size | None = None,
        window: Size | None = None,
        stride: Size | None = None,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
    ) -> Prediction:
        """Image `(B, 3, H, W)` in [-1, 1] -> labels at `size` (H, W), by default the image's own.

        Each scale resizes the picture to that many times `base` (H, W), by default its own size, and reads
        it whole or in windows whose logits are averaged where they overlap; `flip` adds the mirrored picture.
        The softmax of all is averaged at `size` (VPD's and mmsegmentation's protocol). Where tags come from
        CLIP and none are given, they are those of the whole picture.
        """
        tags, own = self.own_tags(image, tags), tuple(image.shape[-2:])
        maps, tag_logits = [], []
        for scale in scales:
            wanted = tuple(max(int(scale * side + 0.5), 1) for side in base or own)
            scaled = image if wanted == own else F.interpolate(image, wanted, mode="bilinear", antialias=True)
            for mirrored in (False, True)[: 1 + flip]:
                seen = scaled.flip(3) if mirrored else scaled
                logits, tag = self.slide(seen, tags, window or wanted, stride or window or wanted)
                maps.append(logits.flip(3) if mirrored else logits)
                tag_logits.append(tag)
        tag = None if tag_logits[0] is None else torch.stack(tag_logits).mean(0)
        return Prediction(vote(maps, size or own), tag)

    @torch.no_grad()
    def segment(
        self,
        image: Tensor,
        tags: Tags | None = None,
        size: Size | None = None,
        score: float = SCORE,
        overlap: float = OVERLAP,
        instances: bool = False,
    ) -> Segmented:
        """Image `(B, 3, H, W)` in [-1, 1] -> its segments at `size` (H, W), by default the image's own.

        For Mask2Former alone; the labels are those of `predict`. The picture is read whole, once: windows
        would cut its objects. `score` and `overlap` are those of `Mask2Former.panoptic`.
        """
        output = self(image, self.own_tags(image, tags))
        sizes = tuple(self.padded(image).shape[-2:]), tuple(image.shape[-2:]), size
        H, W = image.shape[-2:]
        logits = self.decoder.logits(output.prediction, sizes[0])[..., :H, :W]
        labels = vote([logits], size or (H, W))
        panoptic = self.decoder.panoptic(output.prediction, *sizes, score, overlap)
        found = self.decoder.instances(output.prediction, *sizes) if instances else None
        return Segmented(labels, output.condition.logits, panoptic, found)

    def own_tags(self, image: Tensor, tags: Tags | None) -> Tags | None:
        """The tags, or where none are given and they come from CLIP, those of the whole picture."""
        if tags is None and self.names is not None and self.steered:
            return [[name for name, _ in found] for found in self.tag(image)]
        return tags

    def slide(
        self, image: Tensor, tags: Tags | None, window: Size, stride: Size
    ) -> tuple[Tensor, Tensor | None]:
        """Logits `(B, K, H, W)`, averaged where windows overlap, and tag logits `(B, K)`, the highest of all.

        The padding of a window is cut off before anything is added.
        """
        B, _, H, W = image.shape
        total = image.new_zeros(B, len(self.config.classes), H, W, dtype=torch.float32)
        count = image.new_zeros(1, 1, H, W)
        tag = None
        for top, left, bottom, right in windows((H, W), window, stride):
            part = image[..., top:bottom, left:right]
            output = self(part, tags)
            logits = self.decoder.logits(output.prediction, tuple(self.padded(part).shape[-2:]))
            total[..., top:bottom, left:right] += logits[..., : bottom - top, : right - left]
            count[..., top:bottom, left:right] += 1
            if output.condition.logits is not None:
                new = output.condition.logits
                tag = new if tag is None else torch.maximum(tag, new)
        return total.div_(count), tag

    @torch.no_grad()
    def attention(self, image: Tensor, tags: Tags | None = None) -> Tensor:
        """How much each pixel of `(B, 3, H, W)` attends to each word: `(B, T, H, W)` float32, sum 1 over T.

        The words are each picture's `tags`, with 0 behind the shorter lists, or the class names.
        The mean of the UNet's maps at strides 16 and 32, those that VPD keeps, resized to the picture. Where
        the UNet attends to the adapter's queries (tagging): the sum over q of A_unet[q, pixel] times
        A_text[q, word], the latter in the adapter's last block.
        """
        if not isinstance(self.adapter, (Classes, Oracle, Tagging)):
            raise ModelError(
                f"condition {self.config.condition} has no words to attend to: use classes, tagging or oracle"
            )
        if tags is not None and self.config.tag_tokens == "prompt":
            raise ModelError("tag_tokens 'prompt' joins the tags into one text: use a model with 'pooled'")
        (H, W), text, seen = image.shape[2:], self.text(tags), self.see(image)
        condition = self.adapter(seen.image_tokens, seen.image_embedding, text)
        _, (_, *maps) = self.unet.features_and_attention(*self.unet_input(seen.latent, condition))
        if isinstance(self.adapter, Tagging):
            shares = self.adapter.attention(seen.image_tokens, text)  # (B, Q, T)
            maps = [torch.einsum("BQhw,BQT->BThw", x, shares).float() for x in maps]
        size = self.padded(image).shape[-2:]
        return sum(resize(x, size) for x in maps)[..., :H, :W] / len(maps)

    # ---- words

    def text(self, tags: Tags | None) -> Text | None:
        """The vectors of each picture's words, None where the condition reads the class names or nothing.

        A picture without words has the empty prompt's vector.
        """
        if tags is None or not self.steered:
            return None
        device = self.unet.conv_in.weight.device
        if isinstance(self.adapter, Caption) or self.config.tag_tokens == "prompt":
            prompts = [", ".join(words) for words in tags]
            return Text(self.clip.text(self.tokenizer(prompts).to(device))[0])  # (B, 77, C)
        lists = [list(words) or [""] for words in tags]
        self.learn([word for words in lists for word in words])
        lengths = torch.tensor([len(words) for words in lists])
        rows = [torch.stack([self.vectors[word] for word in words]) for words in lists]
        vectors = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)  # (B, T, C)
        return Text(vectors, lengths.to(device) if len(set(map(len, lists))) > 1 else None)

    def learn(self, words: Sequence[str], keep: bool = False) -> None:
        """Make the vectors of words that are not known yet; "" is the empty prompt's.

        `keep` remembers them on the disk beside the weights, for a list that will be asked for again.
        """
        new = sorted(set(words) - set(self.vectors) - {""})
        if new:
            parts = self.config.weights if keep else None, self.clip, self.tokenizer
            self.vectors |= zip(new, word_vectors(*parts, new, self.config.templates), strict=True)
        if "" in words and "" not in self.vectors:
            self.vectors[""] = name_vectors(self.clip, self.tokenizer, [""], ["{}"])[0]

    @torch.no_grad()
    def tag(self, image: Tensor) -> list[list[tuple[str, float]]]:
        """Zero-shot tags of whole pictures `(B, 3, H, W)` by CLIP, best first, with their probabilities.

        The classes that are likelier than chance, 1/K, which is one at least.
        """
        assert self.names is not None, f"the tags come from {self.config.tags}: train with --tags clip"
        with torch.autocast(image.device.type, enabled=False):  # the same tags in training and test
            _, embedding = self.clip.image(image)
        found = []
        for p in zero_shot(self.clip, embedding, self.names).cpu():
            order = p.argsort(descending=True, stable=True).tolist()
            likely = [k for k in order if p[k] >= 1 / len(p)] or order[:1]
            found.append([(self.config.prompts[k], float(p[k])) for k in likely])
        return found


def with_attention(features: list[Tensor], maps: list[Tensor]) -> list[Tensor]:
    """The features at strides 16 and 32 with the attention of each token `(B, L, h_i, w_i)` beside them.

    VPD's (vpd/models.py, `UNetWrapper`): widths 320, 640 + L, 1280 + L, 1280.
    """
    finest, *middle, coarsest = features
    middle = [torch.cat([x, look.to(x.dtype)], dim=1) for x, look in zip(middle, maps[1:], strict=True)]
    return [finest, *middle, coarsest]


def windows(size: Size, window: Size, stride: Size) -> list[tuple[int, int, int, int]]:
    """Top, left, bottom, right of each window in a picture of `size`; the last ones are moved inside.

    The grid of mmsegmentation (segmentors/encoder_decoder.py, `slide_inference`). Where the picture is
    smaller than the window, the window is the picture.
    """
    starts = []
    for whole, part, step in zip(size, window, stride, strict=True):
        assert 1 <= step <= part, f"a stride of {step} leaves gaps between windows of {part}: give 1..{part}"
        part = min(part, whole)
        starts.append([min(i * step, whole - part) for i in range(math.ceil((whole - part) / step) + 1)])
    h, w = (min(part, whole) for part, whole in zip(window, size, strict=True))
    return [(top, left, top + h, left + w) for top in starts[0] for left in starts[1]]


def vote(maps: Sequence[Tensor], size: Size) -> Tensor:
    """The class `(B, H, W)` with the highest mean softmax of the maps `(B, K, h_i, w_i)`, resized to `size`.

    Strip by strip: a photograph of 14 megapixels and 150 classes would need 8 GB at once.
    """
    (H, W), (B, K) = size, maps[0].shape[:2]
    rows = max(STRIP // (B * K * W), 1)
    labels = torch.empty(B, H, W, dtype=torch.int64, device=maps[0].device)
    for top in range(0, H, rows):
        bottom = min(top + rows, H)
        mean = sum(resize_rows(x, size, top, bottom).softmax(dim=1) for x in maps)
        labels[:, top:bottom] = mean.argmax(dim=1)
    return labels


def resize_rows(x: Tensor, size: Size, top: int, bottom: int) -> Tensor:
    """Rows top..bottom-1 of `resize(x, size)`: `(B, K, h, w)` -> `(B, K, bottom - top, W)`."""
    h, (H, W) = x.shape[2], size
    if (top, bottom) == (0, H):
        return resize(x, size)
    place = ((torch.arange(top, bottom, device=x.device) + 0.5) * (h / H) - 0.5).clamp(0, h - 1)
    above = place.floor().long()
    share = (place - above)[:, None]  # of the row below
    mixed = x[:, :, above] * (1 - share) + x[:, :, (above + 1).clamp(max=h - 1)] * share
    return resize(mixed, (bottom - top, W))


# ---- building


def part_configs(model: str, weights: str | Path) -> tuple[VAEConfig, UNetConfig, CLIPConfig]:
    """The sizes of the prior, "sd15" or "tiny", and the latent scale that was measured with its weights."""
    if model not in ("sd15", "tiny"):
        raise ModelError(f"there is no model {model!r}: choose sd15 or tiny")
    if model == "sd15":
        return VAEConfig(), UNetConfig(), CLIPConfig()
    vae = VAEConfig.tiny()
    if str(weights) != "random":
        official.find(Path(weights, "vae"), official.OFFICIAL[VAE])  # a missing folder is named first
        vae = replace(vae, scale=measured_scale(Path(weights, SCALE_FILE)))
    return vae, UNetConfig.tiny(), CLIPConfig.tiny()


def measured_scale(file: Path) -> float:
    """`scaling_factor`, as diffusers calls it, of an autoencoder's config.json."""
    try:
        return float(json.loads(file.read_text())["scaling_factor"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"{file} gives no scaling_factor ({type(error).__name__}): `python -m lab.pretrain` writes it"
        ) from None


def prior(model: str, weights: str | Path) -> tuple[VAE, UNet, CLIP, Tokenizer]:
    """The parts of Stable Diffusion, from the folder `weights` with unet/, vae/, clip/ and tokenizer/.

    With "random" they are newly initialised, and the tokenizer spells.
    """
    parts = []
    for kind, config in zip((VAE, UNet, CLIP), part_configs(model, weights), strict=True):
        if str(weights) == "random":
            parts.append(kind(config))
            continue
        with torch.device("meta"):  # nothing is initialised in vain
            part = kind(config)
        parts.append(official.load(part, Path(weights) / kind.__name__.lower()))
    if str(weights) == "random":
        return *parts, Tokenizer.spelling(parts[-1].config.vocabulary)
    return *parts, Tokenizer(Path(weights) / "tokenizer")


def build(config: TadaConfig, device: torch.device | str = "cpu") -> Tada:
    """A new model: the prior from `config.weights`, the rest initialised from torch's global random state."""
    vae, unet, clip, tokenizer = prior(config.model, config.weights)
    clip.to(device)
    words = config.weights, clip, tokenizer, config.prompts
    if config.templates not in (1, 80):
        raise ModelError(f"--templates {config.templates}: choose 1 or 80")
    classes = word_vectors(*words, config.templates)  # (K, C)
    names = word_vectors(*words, 80, shared=True) if config.tags == "clip" else None  # (K, P)
    with torch.no_grad():
        empty = clip.text(tokenizer([""]).to(device))[0][0]  # (77, C)
    return assemble(config, vae, unet, clip, tokenizer, empty.cpu(), classes.cpu(), names).to(device)


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
    """The prior and its text vectors, with a new adapter and decoder."""
    adapter = make_adapter(config, clip.config, empty, classes)
    decoder = make_decoder(config, unet.config, tokens=len(empty))
    return Tada(config, vae, unet, clip, tokenizer, adapter, decoder, names)


def make_adapter(config: TadaConfig, clip: CLIPConfig, empty: Tensor, classes: Tensor) -> nn.Module:
    """The condition of a row of Table 5: empty `(77, C)` and classes `(K, C)` are its frozen vectors."""
    match config.condition:
        case "none":
            return Unconditional(empty)
        case "caption":
            return Caption()
        case "classes":
            return Classes(classes)
        case "implicit":
            return Implicit(empty, clip.projection)
        case "oracle":
            return Oracle()
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
    raise ModelError(
        f"there is no condition {config.condition!r}: "
        "choose none, caption, classes, implicit, tagging or oracle"
    )


def make_decoder(config: TadaConfig, unet: UNetConfig, tokens: int = 77) -> SemanticDecoder | Mask2Former:
    """Semantic FPN (width 256; tiny 64), UperNet (512 and 256; tiny 64 and 32), or Mask2Former (100 queries,
    9 layers, width 256; tiny 20, 3, 64).

    With attention maps it reads one more channel per context token at strides 16 and 32; `tokens` are those
    of a prompt.
    """
    channels = list(unet.channels)
    if config.attention_maps:
        if config.condition == "oracle":
            raise ModelError(
                "--attention-maps needs as many tokens for every picture: not --condition oracle"
            )
        L = {"classes": len(config.classes), "tagging": config.queries}.get(config.condition, tokens)
        channels[1:3] = [width + L for width in channels[1:3]]
    kinds, tiny = {"fpn": SemanticFPN, "upernet": UperNet}, config.model == "tiny"
    if config.decoder == "mask2former":
        if len(config.things) != len(config.classes):
            raise ModelError(
                f"--decoder mask2former must know which of {len(config.classes)} classes are things, and is "
                f"told of {len(config.things)}: take a data set with instances"
            )
        sizes = {"width": 64, "heads": 4, "queries": 20, "layers": 3, "pixel_layers": 2} if tiny else {}
        return Mask2Former(
            channels, config.things, pixel_decoder=config.pixel_decoder, groups=unet.groups, **sizes
        )
    if config.decoder not in kinds:
        raise ModelError(f"there is no decoder {config.decoder!r}: choose {', '.join(kinds)} or mask2former")
    widths = {"width": 64} if tiny else {}
    if tiny and config.decoder == "upernet":
        widths["auxiliary_width"] = 32
    return kinds[config.decoder](
        channels, len(config.classes), groups=unet.groups, dropout=config.dropout, **widths
    )


def parameter_groups(tada: Tada, lr: float, weight_decay: float, unet_scale: float = 1.0) -> list[dict]:
    """Trained parameters for AdamW: decay on the weights of Linear and Conv alone, the UNet's rate scaled.

    By explicit rule: VPD's search for "norm" in names also changes the UNet's learning rate (mmcv's
    default_constructor.py).
    """
    weights = {f"{name}.weight" for name, x in tada.named_modules() if isinstance(x, (nn.Linear, nn.Conv2d))}
    groups = []
    for part, rate in (("unet", lr * unet_scale), ("adapter", lr), ("decoder", lr)):
        parameters = getattr(tada, part).named_parameters(prefix=part)
        trained = {name: p for name, p in parameters if p.requires_grad}
        for decay, names in (
            (weight_decay, [name for name in trained if name in weights]),
            (0.0, [name for name in trained if name not in weights]),
        ):
            members = [trained[name] for name in names]
            if members:
                groups.append({"names": names, "params": members, "lr": rate, "weight_decay": decay})
    return groups
