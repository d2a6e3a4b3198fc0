"""The reference models with random weights, at the sizes of our configurations, and how far we are from them.

Every one-dimensional parameter is moved off its start (norms begin at 1 and 0), so that a norm in the wrong
place shows.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BlipTextConfig, CLIPModel, SwinConfig, SwinModel
from transformers import CLIPConfig as ReferenceCLIPConfig
from transformers.models.blip.modeling_blip_text import (
    BlipTextAttention,
    BlipTextIntermediate,
    BlipTextOutput,
)

from clip import CLIPConfig, TowerConfig, token_ids
from lab.bench_mask2former import peer_mask2former
from ram import RAMConfig
from unet import UNetConfig
from vae import VAEConfig

SMALL_UNET = UNetConfig(channels=(32, 64, 96, 96), heads=4, context_width=48, groups=8)
SMALL_VAE = VAEConfig(channels=(16, 32, 64, 64), groups=8)
SMALL_CLIP = CLIPConfig(
    text=TowerConfig(width=64, layers=3, heads=4),
    image=TowerConfig(width=96, layers=3, heads=6),
    vocabulary=600,
    image_size=56,
    patch=14,
    projection=48,
)
SMALL_RAM = RAMConfig(
    image_size=128,
    width=24,
    depths=(2, 2, 4, 2),
    heads=(2, 4, 8, 16),
    window=4,
    tags=37,
    label_width=20,
    head_width=48,
)
SMALL_MASK2FORMER = {"channels": (16, 32, 64, 128), "things": (True, False, True, True, False)}
SMALL_MASK2FORMER |= {"width": 64, "heads": 4, "queries": 7, "layers": 4, "pixel_layers": 2, "points": 300}


def reference_unet(config: UNetConfig) -> UNet2DConditionModel:
    model = UNet2DConditionModel(
        sample_size=64,
        block_out_channels=config.channels,
        layers_per_block=config.layers,
        attention_head_dim=config.heads,
        cross_attention_dim=config.context_width,
        in_channels=config.latent_channels,
        out_channels=config.latent_channels,
        norm_num_groups=config.groups,
    )
    return shake(model)


def reference_vae(config: VAEConfig) -> AutoencoderKL:
    levels = len(config.channels)
    model = AutoencoderKL(
        block_out_channels=config.channels,
        layers_per_block=config.layers,
        latent_channels=config.latent_channels,
        norm_num_groups=config.groups,
        scaling_factor=config.scale,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
    )
    return shake(model, 0.4)  # with less, the reference itself is 8e-6 from its float64 result at full width


def reference_clip(config: CLIPConfig) -> CLIPModel:
    def tower(x: TowerConfig) -> dict:
        return {
            "hidden_size": x.width,
            "intermediate_size": 4 * x.width,
            "num_hidden_layers": x.layers,
            "num_attention_heads": x.heads,
            "projection_dim": config.projection,
        }

    last = config.vocabulary - 1
    text = tower(config.text) | {
        "vocab_size": config.vocabulary,
        "bos_token_id": last - 1,
        "eos_token_id": last,
    }
    image = tower(config.image) | {"image_size": config.image_size, "patch_size": config.patch}
    reference = ReferenceCLIPConfig(projection_dim=config.projection, text_config=text, vision_config=image)
    return shake(CLIPModel(reference))


def reference_mask2former(**options) -> nn.Module:
    """`decoder_layers` counts the prediction before the first layer too."""
    small = SMALL_MASK2FORMER
    width = small["width"]
    sizes = {
        "feature_size": width,
        "mask_feature_size": width,
        "hidden_dim": width,
        "encoder_feedforward_dim": 4 * width,
        "dim_feedforward": 8 * width,
        "num_attention_heads": small["heads"],
        "encoder_layers": small["pixel_layers"],
        "decoder_layers": small["layers"] + 1,
        "num_queries": small["queries"],
        "train_num_points": small["points"],
    }
    return wake(shake(peer_mask2former(small["channels"], len(small["things"]), **sizes | options)))


class ReferenceRAM(nn.Module):
    """RAM of transformers' parts: its Swin, and BLIP's text layers without their self-attention."""

    def __init__(self, config: RAMConfig):
        super().__init__()
        sizes = {"image_size": config.image_size, "patch_size": config.patch, "window_size": config.window}
        sizes |= {"embed_dim": config.width, "depths": config.depths, "num_heads": config.heads}
        self.swin = SwinModel(SwinConfig(**sizes))
        head = BlipTextConfig(
            hidden_size=config.head_width,
            encoder_hidden_size=config.label_width,
            intermediate_size=4 * config.head_width,
            num_attention_heads=config.head_heads,
            hidden_act="gelu",
            layer_norm_eps=1e-12,
        )
        self.layers = nn.ModuleList()
        for _ in range(config.head_layers):
            attention = BlipTextAttention(head, is_cross_attention=True)
            parts = {"crossattention": attention, "intermediate": BlipTextIntermediate(head)}
            self.layers.append(nn.ModuleDict(parts | {"output": BlipTextOutput(head)}))
        self.image_proj = nn.Linear(self.swin.num_features, config.label_width)
        self.label_embed = nn.Parameter(torch.randn(config.tags, config.label_width))
        self.wordvec_proj = nn.Linear(config.label_width, config.head_width)
        self.fc = nn.Linear(config.head_width, 1)
        for name, x in self.named_parameters():  # transformers' start is so small that all images look alike
            if x.ndim > 1:
                nn.init.normal_(x, std=1 if name.endswith(("table", "label_embed")) else x[0].numel() ** -0.5)

    def forward(self, pixels: Tensor) -> Tensor:
        """The logits `(B, K)` of normalised pixels; the mean is SwinModel's own pooled output."""
        output = self.swin(pixels)
        tokens = torch.cat([output.pooler_output[:, None], output.last_hidden_state], dim=1)
        tokens = self.image_proj(tokens)
        x = F.relu(self.wordvec_proj(self.label_embed)).expand(len(pixels), -1, -1)
        for layer in self.layers:
            x = layer["crossattention"](x, encoder_hidden_states=tokens)[0]
            x = layer["output"](layer["intermediate"](x), x)
        return self.fc(x).squeeze(-1)


def reference_ram(config: RAMConfig) -> ReferenceRAM:
    return shake(ReferenceRAM(config))


SWIN_NAMES = {  # transformers' on disk -> the official checkpoint's
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "embeddings.norm": "patch_embed.norm",
    "encoder.layers": "layers",
    "attention.self.relative_position_bias_table": "attn.relative_position_bias_table",
    "attention.output.dense": "attn.proj",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}


def official_ram(reference: ReferenceRAM, folder: Path) -> dict[str, Tensor]:
    """The reference's tensors under the names of the official checkpoint.

    The tower's come from the file that transformers writes; its queries, keys and values become one matrix.
    """
    reference.swin.save_pretrained(folder)
    saved, tower = load_file(folder / "model.safetensors"), {}
    for name, x in saved.items():
        if ".attention.self.query." in name:
            x = torch.cat([saved[name.replace("query", part)] for part in ("query", "key", "value")])
            name = name.replace("attention.self.query", "attn.qkv")
        for theirs, ours in SWIN_NAMES.items():
            name = name.replace(theirs, ours)
        if "attention.self" not in name:
            tower["norm" + name.removeprefix("layernorm") if name.startswith("layernorm.") else name] = x
    state = {f"visual_encoder.{name}": x for name, x in tower.items()}
    for name, x in reference.state_dict().items():
        if not name.startswith("swin."):
            state[name.replace("layers.", "tagging_head.encoder.layer.")] = x
    return state


def wake(model: nn.Module) -> nn.Module:
    """Deformable attention starts with weights of 0, which would hide its queries."""
    for name, x in model.named_parameters():
        if name.endswith(("sampling_offsets.weight", "attention_weights.weight")):
            nn.init.normal_(x, std=0.2)
    return model


def shake(model: nn.Module, size: float = 0.2) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(size * torch.randn_like(parameter))
    return model.eval()


def official_folder(model: nn.Module, folder: Path, **options) -> Path:
    """The folder that the reference library itself writes."""
    model.save_pretrained(folder, **options)
    return folder


def tiny_folder(folder: Path) -> tuple[UNet2DConditionModel, AutoencoderKL, CLIPModel]:
    """Weights of `tiny` in the official layout, with a vocabulary of letters; the models that are in them."""
    unet, vae = reference_unet(UNetConfig.tiny()), reference_vae(VAEConfig.tiny())
    clip = reference_clip(CLIPConfig.tiny())
    for name, model in (("unet", unet), ("vae", vae), ("clip", clip)):
        official_folder(model, folder / name)
    (folder / "tokenizer").mkdir()
    vocabulary = token_ids([], CLIPConfig.tiny().vocabulary)
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    return unet, vae, clip


def feature_maps(
    unet: UNet2DConditionModel, latent: Tensor, t: Tensor, context: Tensor
) -> tuple[Tensor, list]:
    """The reference's noise, and its inner maps at our taps, finest first, caught by hooks."""
    caught = {}

    def catch(name):
        return lambda module, inputs, output: caught.update(
            {name: output[0] if isinstance(output, tuple) else output}
        )

    up = unet.up_blocks
    taps = (up[0].resnets[1], up[1].attentions[1], up[2].attentions[1], up[3])
    handles = [module.register_forward_hook(catch(i)) for i, module in enumerate(taps)]
    noise = unet(latent, t, context).sample
    for handle in handles:
        handle.remove()
    return noise, [caught[i] for i in (3, 2, 1, 0)]
