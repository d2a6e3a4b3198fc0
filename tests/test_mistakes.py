"""The suite detects wrong details: each mistake below keeps every shape, so it would pass a test of shapes.

A mistake is planted in a copy of the source; the comparison that the other files make must then miss its bar.
"""

import types

import pytest
import torch
from oracle import (
    SMALL_CLIP,
    SMALL_UNET,
    SMALL_VAE,
    feature_maps,
    reference_clip,
    reference_unet,
    reference_vae,
)
from proof import BAR, error, planted


def unet_error(module: types.ModuleType) -> float:
    """The largest error of noise and maps; one row's context is shorter than the other's."""
    reference, ours = reference_unet(SMALL_UNET), module.UNet(SMALL_UNET)
    ours.load_state_dict(reference.state_dict())
    latent, t, context = 0.1 * torch.randn(2, 4, 16, 24), torch.tensor([1, 731]), torch.randn(2, 40, 48)
    with torch.no_grad():
        noise, maps = feature_maps(reference, latent, t, context)
        pairs = [
            (ours(latent, t, context), noise),
            *zip(ours.features(latent, t, context), maps, strict=True),
        ]
        alone = ours.features(latent[:1], t[:1], context[:1, :7])[0]
        together = ours.features(latent, t, context, torch.tensor([7, 40]))[0]
    return max(error(*pair) for pair in [*pairs, (together[:1], alone)])


def vae_error(module: types.ModuleType) -> float:
    reference, ours = reference_vae(SMALL_VAE), module.VAE(SMALL_VAE)
    ours.load_state_dict(reference.state_dict())
    image = torch.rand(2, 3, 64, 40) * 2 - 1
    with torch.no_grad():
        posterior = reference.encode(image).latent_dist
        decoded = reference.decode(posterior.mean).sample
        encoded = ours.encode(image)
        return max(
            error(encoded, posterior.mean * 0.18215), error(ours.decode(posterior.mean * 0.18215), decoded)
        )


def clip_error(module: types.ModuleType) -> float:
    reference, ours = reference_clip(SMALL_CLIP), module.CLIP(SMALL_CLIP)
    ours.load_state_dict(reference.state_dict())
    ids = torch.randint(0, 500, (2, 77))
    ids[0, 9:], ids[1, 50:] = 599, 599
    pixels = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        text, image = reference.text_model(ids), reference.vision_model(pixels)
        hidden, pooled = ours.text(ids)
        # Undo the normalisation, so that the tower reads these pixels if it normalises correctly.
        mean, std = (torch.tensor(x)[:, None, None] for x in (MEAN, STD))
        tokens, embedding = ours.image((pixels * std + mean) * 2 - 1)
        embedded = reference.visual_projection(image.pooler_output)
    pairs = ((hidden, text.last_hidden_state), (pooled, text.pooler_output))
    return max(error(*x) for x in (*pairs, (tokens, image.last_hidden_state), (embedding, embedded)))


# Written out again on purpose (openai/CLIP clip/clip.py).
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

MISTAKES = {
    "GroupNorm eps of the VAE": ("vae.py", "EPS = 1e-6", "EPS = 1e-5"),
    "symmetric padding in the VAE": (
        "vae.py",
        "self.conv(F.pad(x, (0, 1, 0, 1)))",
        "F.conv2d(x, self.conv.weight, self.conv.bias, stride=2, padding=1)",
    ),
    "latent not scaled": ("vae.py", "return mean * self.config.scale", "return mean"),
    "sample instead of mean": ("vae.py", "mean, _ = self.moments(image)", "_, mean = self.moments(image)"),
    "GEGLU halves swapped": ("unet.py", "value, gate =", "gate, value ="),
    "GEGLU with tanh": ("unet.py", "F.gelu(gate)", "F.gelu(gate, approximate='tanh')"),
    "sines before cosines": ("unet.py", "[angle.cos(), angle.sin()]", "[angle.sin(), angle.cos()]"),
    "frequencies divided by half - 1": ("unet.py", "* i / half", "* i / (half - 1)"),
    "heads split wrongly": ("unet.py", "B N (n d) -> B N n d", "B N (d n) -> B N n d"),
    "eps of the transformer's GroupNorm": ("unet.py", "eps=1e-6", "eps=1e-5"),
    "eps of the residual blocks' GroupNorm": (
        "unet.py",
        "nn.GroupNorm(groups, in_channels)",
        "nn.GroupNorm(groups, in_channels, eps=1e-6)",
    ),
    "asymmetric padding in the UNet": (
        "unet.py",
        "        return self.conv(x)",
        "        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.conv.weight, self.conv.bias, stride=2)",
    ),
    "maps taken one block late": ("unet.py", "TAP = 1", "TAP = 2"),
    "skip before the map": ("unet.py", "torch.cat([x, skips.pop()]", "torch.cat([skips.pop(), x]"),
    "self-attention of the wrong input": (
        "unet.py",
        "self.attn1.keys_values(x_norm)",
        "self.attn1.keys_values(x)",
    ),
    "lengths not passed on": (
        "unet.py",
        "k, v, lengths)\n        return self.to_out",
        "k, v)\n        return self.to_out",
    ),
    "gelu instead of quick_gelu": ("clip.py", "x * torch.sigmoid(1.702 * x)", "F.gelu(x)"),
    "pooled at the last position": ("clip.py", ".int().argmax(dim=1)", ".int().argmax(dim=1) * 0 + L - 1"),
    "text tower not causal": ("clip.py", "causal=True", "causal=False"),
    "heads of CLIP split wrongly": ("clip.py", "B N (n d) -> B n N d", "B N (d n) -> B n N d"),
    "class token behind the patches": ("clip.py", "[first, patches]", "[patches, first]"),
    "no pre-norm before the image tower": (
        "clip.py",
        "self.pre_layrnorm(self.embeddings(pixels))",
        "self.embeddings(pixels)",
    ),
    "tokens after the post-norm": (
        "clip.py",
        "return self.encoder(self.pre_layrnorm(self.embeddings(pixels)), causal=False)",
        "return self.post_layernorm(self.encoder(self.pre_layrnorm(self.embeddings(pixels)), causal=False))",
    ),
    "mean and deviation swapped": (
        "clip.py",
        "image.unbind(dim=1), MEAN, STD",
        "image.unbind(dim=1), STD, MEAN",
    ),
}
ERRORS = {"unet.py": unet_error, "vae.py": vae_error, "clip.py": clip_error}


@pytest.mark.parametrize("file", ERRORS)
def test_the_right_source_passes(file, tmp_path):
    """The comparison itself is sound: without a mistake it meets the bar."""
    assert ERRORS[file](planted(tmp_path, file, "import torch", "import torch")) <= BAR


@pytest.mark.parametrize("name", MISTAKES)
def test_the_mistake_is_detected(name, tmp_path):
    file, right, wrong = MISTAKES[name]
    assert ERRORS[file](planted(tmp_path, file, right, wrong)) > 2 * BAR
