"""Tiny models with random weights, for the tests of the whole model."""

import torch
from oracle import shake

from assemble import build
from model import Tada, TadaConfig

NAMES = ("sea", "snow", "tall tree", "boat", "cloud")
K = len(NAMES)
H, W = 40, 100  # not multiples of 64: padded to 64x128
TAGS = [["boat"], ["tall tree", "cloud", "sea"]]
# The settings of Stable Diffusion's scheduler.
SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def config(**options) -> TadaConfig:
    sizes = {"crop": (128, 128), "box": (128, 512), "stride": (85, 85), "dropout": 0.0}
    return TadaConfig(**{"classes": NAMES, "model": "tiny", "dataset": "scenes", **sizes, **options})


def make(**options) -> Tada:
    """A tiny model with random weights and open gates, so that every part changes the prediction."""
    tada = build(config(**options)).eval()
    for part in (tada.unet, tada.vae, tada.decoder):
        shake(part)
    with torch.no_grad():
        for parameter in tada.adapter.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        for name, parameter in tada.decoder.named_parameters():
            if "classifier" in name and parameter.ndim > 1:
                parameter.normal_()  # initialised with std 0.01
    return tada


def trained(tada: Tada) -> set[str]:
    """The names of the trainable parameters."""
    return {name for name, parameter in tada.named_parameters() if parameter.requires_grad}
