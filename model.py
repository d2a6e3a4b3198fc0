"""TADA: the UNet of Stable Diffusion, conditioned on image tags, as the backbone of segmentation (Figure 2).

    tada = build(TadaConfig(classes=("sea", "sky", "sand"), weights="weights/sd15"))  # assemble.py
    output = tada(image, tags)  # image (B, 3, H, W) in [-1, 1], a list of words per image
    labels = predict(tada.eval(), image, tags).labels  # (B, H, W), inference.py

On a GPU call it under `torch.autocast("cuda", torch.bfloat16)`, as frozen parts are bfloat16 there.
Top to bottom: the settings of a model, the model (its `forward` is Figure 2), its loss, words to vectors.
assemble.py builds models, inference.py predicts images of any size, run/checkpoint.py saves and loads;
predict.py's `predict_image` takes a path or an image and does the rest.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapter import Condition, Implicit, Tagging, Text, Words, asymmetric_loss, multi_hot
from clip import CLIP, PROMPT, TEMPLATES, Tokenizer, likely_names, name_vectors, zero_shot_tags
from decoders import Logits, SemanticDecoder
from errors import ModelError
from kernels import IGNORE
from mask2former import Mask2Former, Queries, Rand, Target
from unet import UNet, alphas_cumprod
from vae import VAE

Size = tuple[int, int]  # height, width
Tags = Sequence[Sequence[str]]  # the words of each image; for captions one sentence each
Features = tuple[Tensor, Tensor] | tuple[None, None]  # CLIP's image tokens (B, M, C) and embedding (B, E)

NOISE_SEED = 42  # our choice; like ODISE, one noise for all images


@dataclass(frozen=True)
class TadaConfig:
    """Every setting of a trained model, stored in its checkpoints."""

    classes: tuple[str, ...]  # the displayed names
    prompts: tuple[str, ...] = ()  # the names that CLIP encodes; () = classes
    palette: tuple[tuple[int, int, int], ...] = ()  # RGB, 0..255, per class
    dataset: str = "folder"
    model: str = "sd15"  # the sizes of all parts: sd15 or tiny
    weights: str = "random"  # the prior's folder, or random
    things: tuple[bool, ...] = ()  # per class, whether it has instances; () = unknown
    decoder: str = "fpn"  # fpn, upernet or mask2former
    condition: str = "tagging"  # none, caption, classes, implicit, tagging, tags, oracle: Table 5, Figure 1
    tags: str = "classes"  # the source of the tags: classes, clip, ram, oracle, or the path of a file
    tag_threshold: float | None = None  # the lowest score of a tag; None = the source's own
    tag_tokens: str = "pooled"  # pooled: one vector per tag; prompt: the 77 tokens of all tags joined
    templates: int = 1  # prompts averaged into a name's vector: 1 or 80
    queries: int = 32  # of the tagging adapter (section 4.1)
    blocks: int = 2  # of the tagging adapter
    adapter_start: str = "random"  # random or empty
    tag_loss_weight: float = 1.0  # of Eq. 7
    timestep: int = 0  # of the "minor noise" (section 3.2)
    noise: str = "fixed"  # fixed or none
    scale_latent: bool = True  # False: VPD's unscaled latent
    attention_maps: bool = False  # VPD adds the UNet's cross-attention to its features; the paper does not
    freeze_unet: bool = False
    lora: int = 0  # rank of the updates of the frozen UNet's attention projections; 0 = none
    dropout: float = 0.1  # before the classifier
    crop: Size = (512, 512)  # of training; the window of sliding inference
    box: Size | None = (512, 2048)  # short and long side that a test image is resized into; None = its size
    stride: Size = (341, 341)  # of the sliding window

    def __post_init__(self) -> None:
        if not self.prompts:
            object.__setattr__(self, "prompts", self.classes)

    @property
    def keeps_unet(self) -> bool:
        """Whether the prior's UNet stays as it is in its file."""
        return self.freeze_unet or self.lora > 0


class Output(NamedTuple):
    """The decoder's prediction for the padded image, and the condition that the UNet attended to."""

    prediction: Logits | Queries
    condition: Condition


class Tada(nn.Module):
    """Figure 2. The VAE and both towers of CLIP are frozen; UNet, adapter and decoder are trained.

    `vectors` `(1 + V, C)` caches the pooled text vectors of the V words in `rows`; row 0, zeros, is padding.
    `names` holds the class names `(K, E)` in CLIP's shared space, for zero-shot tags (None for other tags).
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
        # Images -> the scored tags of each; assemble.py sets that of other sources.
        self.tagger: Callable[[Tensor], list] | None = None if names is None else self.zero_shot_tags
        self.rows: dict[str, int] = {}
        self.vectors = torch.empty(0)
        self.noises: dict[tuple, Tensor] = {}  # all are kept: a CUDA graph reads one at its address
        self.alpha = 1.0  # alpha-bar_t of Eq. 1
        # run/masters.py replaces this with that of a copy.
        self.run_unet = unet.features_and_attention if config.attention_maps else unet.features
        self.multiple = vae.stride * 2 ** (len(unet.config.channels) - 1)  # of the image's sides: 64
        self.uses_image = isinstance(adapter, (Implicit, Tagging))  # whether the adapter uses image features
        self.uses_words = isinstance(adapter, (Words, Tagging))  # whether it uses words per image

        self.vae.requires_grad_(False)
        self.clip.requires_grad_(False)
        for name, parameter in self.unet.named_parameters():
            parameter.requires_grad_(".lora_" in name or not config.keeps_unet)
        self.unet.conv_norm_out.requires_grad_(False)  # noise head: unused for segmentation
        self.unet.conv_out.requires_grad_(False)
        if isinstance(adapter, Tagging) and not config.tag_loss_weight:
            # Unused without Eq. 7; DDP would hang waiting for their gradients.
            adapter.log_scale.requires_grad_(False)
            adapter.bias.requires_grad_(False)

    def forward(self, image: Tensor, tags: Tags | Text | None = None, seen: Features | None = None) -> Output:
        """Return Figure 2's output for images `(B, 3, H, W)` in [-1, 1] of any size and the words of each.

        Without tags the adapter uses the class names; tags may be encoded already (`text`). `seen`: the
        `image_features`, if they are at hand. The prediction covers the image padded with grey on the right
        and below to multiples of 64; `loss` pads the labels, inference.py crops the prediction.
        """
        # fmt: off
        with torch.no_grad():  # the frozen parts
            latent = self.noised(self.vae.encode(self.padded(image)))  # (B, 4, h, w)
            tokens, embedding = seen or self.image_features(image)     # (B, M, C), (B, E)
            text = self.text(tags)                                     # (B, T, C)
        condition = self.adapter(tokens, embedding, text)              # context (B, L, C), tag logits (B, K)
        features = self.unet_features(latent, condition)               # four maps (B, C_i, h_i, w_i)
        return Output(self.decoder(features), condition)               # logits (B, K, h, w), or Q masks
        # fmt: on

    def noised(self, latent: Tensor) -> Tensor:
        """Add the "minor noise" of section 3.2 by Eq. 1, the same noise for all images of one size."""
        if not self.config.scale_latent:
            latent = latent / self.vae.config.scale  # as VPD
        if self.config.noise == "none":
            return latent
        kind = latent.shape[1:], latent.dtype, latent.device
        if kind not in self.noises:
            generator = torch.Generator().manual_seed(NOISE_SEED)  # on the CPU: the same on every device
            self.noises[kind] = torch.randn(latent.shape[1:], generator=generator).to(latent)
            self.alpha = float(alphas_cumprod()[self.config.timestep])
        return self.alpha**0.5 * latent + (1 - self.alpha) ** 0.5 * self.noises[kind]

    def image_features(self, image: Tensor) -> Features:
        """CLIP's tokens and embedding of images; None if the adapter uses neither."""
        return self.clip.image(image) if self.uses_image else (None, None)

    def unet_features(self, latent: Tensor, condition: Condition) -> list[Tensor]:
        """The UNet's four maps (Eq. 3), finest first, with VPD's attention maps if those are set."""
        features = self.run_unet(*self.unet_input(latent, condition))
        return with_attention(*features) if self.config.attention_maps else features

    def unet_input(
        self, latent: Tensor, condition: Condition
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The arguments of `UNet.features`: latent, time step `(B,)`, context `(B, L, C)` and its lengths."""
        B = len(latent)
        t = torch.full((B,), self.config.timestep, device=latent.device)
        return latent, t, condition.context.expand(B, -1, -1), condition.lengths

    def padded(self, x: Tensor, value: float = 0) -> Tensor:
        """Pad `(..., H, W)` on the right and below to multiples of 64, with 0 (grey) as in training."""
        H, W = x.shape[-2:]
        return F.pad(x, (0, -W % self.multiple, 0, -H % self.multiple), value=value)

    # ---- loss

    def loss(
        self,
        output: Output,
        labels: Tensor,
        segments: Sequence[Target] | None = None,
        rand: Rand | Sequence[Rand] = torch.rand,
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Return (weighted sum, number of terms) of each part of the loss.

        The parts are seg, aux (UperNet) and tag (tagging, Eq. 7); for Mask2Former class, mask and dice
        instead of seg. labels `(B, H, W)` int64 of the images given to `forward`, 0..K-1 or 255 = ignore.
        Mask2Former needs the segments of each image, padded like the image, and draws points with `rand`. The
        caller divides each sum by its count over all processes and accumulation steps (`counts`).
        """
        if segments is None:
            losses = self.decoder.loss(output.prediction, self.padded(labels, IGNORE))
        else:
            losses = self.decoder.loss(output.prediction, segments, rand)
        if output.condition.logits is not None and self.config.tag_loss_weight:
            targets = multi_hot(labels, len(self.config.classes))
            total, count = asymmetric_loss(output.condition.logits, targets)
            losses["tag"] = (self.config.tag_loss_weight * total, count)
        return losses

    def counts(self, labels: Tensor, segments: Sequence[Target] | None = None) -> dict[str, Tensor]:
        """The counts of `loss`, computed from the targets only."""
        target = labels if segments is None else segments
        return {**self.decoder.counts(target), "tag": labels.new_full((), len(labels))}

    # ---- words

    def text(self, tags: Tags | Text | None, longest: int = 0) -> Text | None:
        """Encode each image's words, `(B, T, C)`; None if the condition uses class names or no text.

        An image without words gets the empty-prompt vector. T is the length of the longest list, or
        `longest`. Raises ModelError for a string in place of a list, which would be read letter by letter.
        """
        if isinstance(tags, Text):
            return tags
        if tags is not None and any(isinstance(words, str) for words in (tags, *tags)):
            raise ModelError(f'words {tags!r}: give a list of words for each image, as [["sea", "boat"]]')
        if tags is None or not self.uses_words:
            return None
        device = self.unet.conv_in.weight.device
        if self.config.condition == "caption" or self.config.tag_tokens == "prompt":
            prompts = [", ".join(words) for words in tags]
            return Text(self.clip.text(self.tokenizer(prompts).to(device))[0])  # (B, 77, C)
        lists = [list(words) or [""] for words in tags]
        self.cache_words([word for words in lists for word in words])
        lengths = [len(words) for words in lists]
        T = longest or max(lengths)
        rows = [[self.rows[word] for word in words] + [0] * (T - len(words)) for words in lists]
        self.vectors = self.vectors.to(device)
        vectors = self.vectors[torch.tensor(rows).to(device, non_blocking=True)]  # (B, T, C)
        ragged = longest or min(lengths) < T
        return Text(vectors, torch.tensor(lengths).to(device, non_blocking=True) if ragged else None)

    def cache_words(self, words: Sequence[str]) -> None:
        """Cache the text vectors of new words; "" is the empty prompt."""
        new = sorted(set(words) - set(self.rows) - {""})
        if new:
            prompts = (PROMPT,) if self.config.templates == 1 else TEMPLATES
            self.add_words(new, name_vectors(self.clip, self.tokenizer, new, prompts))
        if "" in words and "" not in self.rows:
            self.add_words([""], name_vectors(self.clip, self.tokenizer, [""], ["{}"]))

    def add_words(self, words: Sequence[str], vectors: Tensor) -> None:
        """Cache the pooled text vectors `(N, C)` of words."""
        old = self.vectors.to(vectors.device) if self.rows else torch.zeros_like(vectors[:1])
        self.vectors = torch.cat([old, vectors])  # first: memory may run out
        self.rows |= zip(words, range(len(old), len(self.vectors)), strict=True)

    @torch.no_grad()
    def resolve_tags(self, image: Tensor, tags: Tags | None) -> tuple[Tags | None, Features | None]:
        """Return `tags`, or those of the model's tagger if `tags` is None; and for `forward` the features of
        the image if the tags were made from them: None, or CLIP's.
        """
        if tags is not None or self.tagger is None or not self.uses_words:
            return tags, None
        if self.tagger != self.zero_shot_tags or not self.uses_image:
            return [[name for name, _ in scored] for scored in self.tagger(image)], None
        with torch.autocast(image.device.type, enabled=False):  # as in `zero_shot_tags`
            features = self.clip.image(image)
        names, least = self.config.prompts, self.config.tag_threshold
        scored_tags = likely_names(self.clip, features[1], names, self.names, least)
        return [[name for name, _ in scored] for scored in scored_tags], features

    def zero_shot_tags(self, image: Tensor) -> list[list[tuple[str, float]]]:
        """CLIP's tags of images `(B, 3, H, W)` among the class names, each with its probability."""
        assert self.names is not None, f"the tags come from {self.config.tags}: train with --tags clip"
        config = self.config
        return zero_shot_tags(self.clip, image, config.prompts, self.names, config.tag_threshold)


def with_attention(features: list[Tensor], maps: list[Tensor]) -> list[Tensor]:
    """Append each token's attention map `(B, L, h_i, w_i)` to the features at strides 16 and 32.

    As VPD (vpd/models.py, `UNetWrapper`): widths 320, 640 + L, 1280 + L, 1280.
    """
    finest, *middle, coarsest = features
    middle = [torch.cat([x, y.to(x.dtype)], dim=1) for x, y in zip(middle, maps[1:], strict=True)]
    return [finest, *middle, coarsest]
