"""The reference models with random weights, at the sizes of our configurations, and how far we are from them.

Every one-dimensional parameter is moved off its start (norms begin at 1 and 0), so that a norm in the wrong
place shows.
"""

import json
import string
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPConfig as ReferenceCLIPConfig
from transformers import CLIPModel

from clip import END, START, CLIPConfig, TowerConfig
from lab.bench_mask2former import peer_mask2former
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
    letters = [x + end for x in string.ascii_lowercase for end in ("", "</w>")]
    last = CLIPConfig.tiny().vocabulary - 1
    vocabulary = {x: i for i, x in enumerate(letters)} | {START: last - 1, END: last}
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
