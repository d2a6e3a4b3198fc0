"""Mask2Former and transformers' one, on the same maps, weights, segments and points: for bench.py and tests.

transformers' model takes an image and needs maps at strides 4 to 32. So its backbone is replaced by the
UNet's maps, upsampled to twice their size, which is 2 % of its forward time; ours does that in the decoder.
"""

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decoders import CHANNELS
from mask2former import COCO_THINGS, Mask2Former, Target

CLASSES = len(COCO_THINGS)
SEGMENTS = 12  # per image, about as many as in COCO

NAMES = {  # theirs: ours, in this order
    "model.pixel_level_module.decoder.encoder.": "pixel_decoder.",
    "model.pixel_level_module.decoder.": "pixel_decoder.",
    "adapter_1.1.": "lateral.2.",
    "adapter_1.": "lateral.",
    "layer_1.": "output.",
    "model.transformer_module.decoder.": "",
    "model.transformer_module.": "",
    "queries_embedder.weight": "query_places",
    "queries_features.weight": "query_features",
    "level_embed.weight": "level_embed",
    "mask_predictor.mask_embedder.0.0": "mask_head.0",
    "mask_predictor.mask_embedder.1.0": "mask_head.2",
    "mask_predictor.mask_embedder.2.0": "mask_head.4",
    "class_predictor": "class_head",
    "layernorm": "norm",
    "cross_attn_layer_norm": "cross_norm",
    "cross_attn.out_proj": "cross_attention.out",
    "cross_attn": "cross_attention",
    "fc1": "ffn.0",
    "fc2": "ffn.2",
    "final_layer_norm": "ffn_norm",
}


def our_names(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename transformers' tensors to ours; packed queries, keys and values are split."""
    ours = {}
    for name, x in theirs.items():
        for old, new in NAMES.items():
            name = name.replace(old, new)
        if name.startswith("pixel_decoder."):
            name = name.replace("self_attn_layer_norm", "attention_norm").replace("self_attn", "attention")
            if "input_projections" in name:
                name = name.replace(".1.weight", ".2.weight").replace(".1.bias", ".2.bias")
        else:
            name = name.replace("self_attn_layer_norm", "self_norm").replace("self_attn", "self_attention")
            name = name.replace("_proj.", ".")
        if "in_proj" in name:
            ours |= {name.replace("in_proj_", part + "."): y for part, y in zip("qkv", x.chunk(3))}
        elif name != "criterion.empty_weight":
            ours[name] = x
    return ours


class Maps(nn.Module):
    """A backbone that returns the maps it was given."""

    def forward(self, pixels: Tensor) -> SimpleNamespace:
        return SimpleNamespace(feature_maps=self.maps)


def peer_mask2former(channels: Sequence[int] = CHANNELS, classes: int = CLASSES, **options) -> nn.Module:
    """transformers' model for given maps; `options` are its configuration's, by default the paper's."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, ResNetConfig

    stages = [f"stage{i}" for i in (1, 2, 3, 4)]  # only their widths are used
    backbone = ResNetConfig(hidden_sizes=list(channels), depths=[1] * 4, out_features=stages)
    config = Mask2FormerConfig(backbone_config=backbone, num_labels=classes, **options)
    model = Mask2FormerForUniversalSegmentation(config)
    model.model.pixel_level_module.encoder = Maps()
    return model.eval()


def run_peer(model: nn.Module, features: Sequence[Tensor], **labels) -> SimpleNamespace:
    """transformers' output; features are at our strides, 8 to 64."""
    model.model.pixel_level_module.encoder.maps = [twice(x) for x in features]
    B, _, h, w = features[0].shape
    return model(torch.zeros(B, 3, 8 * h, 8 * w), **labels)


def twice(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


# ---- what is measured: x is four maps, then classes `(T,)` and masks `(T, H, W)`, 0 or 1, of one image


def maps_and_segments(size: int, channels: Sequence[int] = CHANNELS, classes: int = CLASSES) -> list[Tensor]:
    """Random maps of an image of `size` pixels a side, and squares as its segments."""
    maps = [torch.randn(1, C, size // (8 << i), size // (8 << i)) for i, C in enumerate(channels)]
    masks = torch.zeros(SEGMENTS, size, size)
    for mask in masks:
        y, x = torch.randint(size // 2, (2,))
        mask[y : y + size // 2, x : x + size // 2] = 1
    return [*maps, torch.randint(classes, (SEGMENTS,)), masks]


def predict(model: Mask2Former, x: list[Tensor]) -> list[Tensor]:
    """The class and mask logits after the last layer."""
    prediction = model(x[:4])
    return [prediction.classes[-1], prediction.masks[-1]]


def predict_peer(model: nn.Module, x: list[Tensor]) -> list[Tensor]:
    output = run_peer(model, x[:4])
    return [output.class_queries_logits, output.masks_queries_logits]


def our_loss(model: Mask2Former, maps: list[Tensor], classes: Tensor, masks: Tensor) -> Tensor:
    losses = model.loss(model(maps), [Target(classes, masks.bool())])
    return sum(x / count.clamp(min=1) for x, count in losses.values())


def peer_loss(model: nn.Module, maps: list[Tensor], classes: Tensor, masks: Tensor) -> Tensor:
    return run_peer(model, maps, class_labels=[classes], mask_labels=[masks]).loss


def learn(loss: Callable[..., Tensor], model: nn.Module, x: list[Tensor]) -> list[Tensor]:
    """The loss, and the norms of its gradients: of each map, and of all weights together.

    Norms, since rounding decides which of two equally uncertain points is taken: that rotates a gradient by
    up to 7e-4 in float32 (5e-9 in float64) and keeps its norm.
    """
    *maps, classes, masks = x
    maps = [x.detach().requires_grad_() for x in maps]
    torch.manual_seed(0)  # equal seeds, equal points
    value = loss(model, maps, classes, masks)
    gradients = torch.autograd.grad(value, [*maps, *model.parameters()])
    sizes = [x.norm() for x in gradients[: len(maps)]]
    return [value.detach(), *sizes, nn.utils.get_total_norm(gradients[len(maps) :])]
