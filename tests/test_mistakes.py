"""The suite detects wrong details: each mistake below keeps every shape, so a test of shapes would pass.

A mistake is planted in a copy of the source; the comparison of the other test files must then fail its bar.
"""

import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from oracle import (
    SMALL_CLIP,
    SMALL_RAM,
    SMALL_UNET,
    SMALL_VAE,
    feature_maps,
    official_ram,
    reference_clip,
    reference_ram,
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
        # Undo the normalisation, so that a correct tower gets exactly these pixels.
        mean, std = (torch.tensor(x)[:, None, None] for x in (MEAN, STD))
        tokens, embedding = ours.image((pixels * std + mean) * 2 - 1)
        embedded = reference.visual_projection(image.pooler_output)
    pairs = ((hidden, text.last_hidden_state), (pooled, text.pooler_output))
    return max(error(*x) for x in (*pairs, (tokens, image.last_hidden_state), (embedding, embedded)))


def ram_error(module: types.ModuleType, folder: Path) -> float:
    """The largest error of tokens and logits; the images are squashed from 90x200.

    With the reference's weights and with a tenth of them, which leaves so little variance that an eps shows.
    """
    reference, errors = reference_ram(SMALL_RAM), []
    image = torch.rand(2, 3, 90, 200)
    mean, std = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    pixels = (F.interpolate(image, (128, 128), mode="bilinear", antialias=True) - mean) / std
    with torch.no_grad():
        for scale in (1, 0.1):
            for parameter in reference.parameters():
                parameter.mul_(scale)
            ours = module.RAM(SMALL_RAM)
            ours.load_state_dict(official_ram(reference, folder))
            errors.append(error(ours.visual_encoder(pixels), reference.swin(pixels).last_hidden_state))
            errors.append(error(ours(image * 2 - 1), reference(pixels)))
    return max(errors)


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
    "class token after the patches": ("clip.py", "[class_token, patches]", "[patches, class_token]"),
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
    "merging takes rows first": ("ram.py", "(j i C)", "(i j C)"),
    "the last stage shifts": ("ram.py", " if self.side > self.window else 0", ""),
    "even blocks shift": ("ram.py", "if i % 2 and self.shift", "if not i % 2 and self.shift"),
    "windows shift down alone": ("ram.py", "(-shift, -shift)", "(-shift, 0)"),
    "shifted windows without a mask": ("ram.py", "MASKED = -100.0", "MASKED = 0.0"),
    "relative positions of key and query swapped": ("ram.py", ".flip(3, 4)", ".flip(1, 2)"),
    "heads before queries, keys and values": ("ram.py", "(three n d)", "(n three d)"),
    "eps of Swin's norms": ("ram.py", "nn.LayerNorm(width)", "nn.LayerNorm(width, eps=1e-6)"),
    "GELU of RAM with tanh": ("ram.py", "F.gelu(self.fc1(y))", "F.gelu(self.fc1(y), approximate='tanh')"),
    "no mean token": ("ram.py", "[tokens.mean(dim=1, keepdim=True), tokens]", "[tokens]"),
    "only the mean token is attended to": (
        "ram.py",
        "[tokens.mean(dim=1, keepdim=True), tokens]",
        "[tokens.mean(dim=1, keepdim=True)]",
    ),
    "queries without ReLU": (
        "ram.py",
        "F.relu(self.wordvec_proj(self.label_embed[None]))",
        "self.wordvec_proj(self.label_embed[None])",
    ),
    "a norm on the queries": (
        "ram.py",
        "F.relu(self.wordvec_proj(self.label_embed[None]))",
        "F.layer_norm(F.relu(self.wordvec_proj(self.label_embed[None])), (48,))",
    ),
    "eps of the head's norms": ("ram.py", "HEAD_EPS = 1e-12", "HEAD_EPS = 1e-5"),
    "pre-norm in the head": (
        "ram.py",
        "self.LayerNorm(self.dense(y).add_(x))",
        "self.dense(self.LayerNorm(y) if y.shape[-1] == x.shape[-1] else y).add_(x)",
    ),
    "heads of the head split wrongly": ("ram.py", "B N (n d) -> B n N d", "B N (d n) -> B n N d"),
    "CLIP's mean": ("ram.py", "(0.485, 0.456, 0.406)", "(0.481, 0.458, 0.408)"),
    "resize without antialiasing": ("ram.py", "antialias=True", "antialias=False"),
}


def planted_error(file: str, right: str, wrong: str, folder: Path) -> float:
    """The error of a copy of `file` with `right` replaced by `wrong`."""
    module = planted(folder, file, right, wrong)
    if file == "ram.py":
        return ram_error(module, folder)
    return {"unet.py": unet_error, "vae.py": vae_error, "clip.py": clip_error}[file](module)


@pytest.mark.parametrize("file", ["unet.py", "vae.py", "clip.py", "ram.py"])
def test_the_right_source_passes(file, tmp_path):
    """The comparison itself is sound: without a mistake it meets the bar."""
    assert planted_error(file, "import torch", "import torch", tmp_path) <= BAR


@pytest.mark.parametrize("name", MISTAKES)
def test_the_mistake_is_detected(name, tmp_path):
    assert planted_error(*MISTAKES[name], tmp_path) > 2 * BAR
