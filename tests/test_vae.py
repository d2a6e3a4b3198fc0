"""vae.py equals diffusers' AutoencoderKL: encode, decode, moments; and it refuses wrong inputs."""

import pytest
import torch
from oracle import SMALL_VAE, official_folder, reference_vae
from proof import BAR, error, gradients

from vae import VAE, VAEConfig
from weights.load import load

SCALE = 0.18215  # written out again on purpose: the oracle leaves it to its caller


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The reference and ours with the same weights, by way of the official folder."""
    reference = reference_vae(SMALL_VAE)
    ours = load(VAE(SMALL_VAE), official_folder(reference, tmp_path_factory.mktemp("vae")))
    return reference, ours.eval()


@pytest.mark.parametrize(("H", "W"), [(64, 64), (64, 128), (72, 56), (8, 200)])
def test_encode_is_the_scaled_mean(pair, H, W):
    """Two different images, square and not."""
    reference, ours = pair
    image = torch.rand(2, 3, H, W) * 2 - 1
    with torch.no_grad():
        latent = ours.encode(image)
        assert latent.shape == (2, 4, H // 8, W // 8)
        assert error(latent, reference.encode(image).latent_dist.mean * SCALE) <= BAR


@pytest.mark.parametrize(("h", "w"), [(8, 8), (8, 16), (9, 7)])
def test_decode_inverts_the_scale(pair, h, w):
    """`decode` takes the output of `encode`."""
    reference, ours = pair
    latent = torch.randn(2, 4, h, w)
    with torch.no_grad():
        assert error(ours.decode(latent), reference.decode(latent / SCALE).sample) <= BAR


def test_moments_are_the_posterior(pair):
    """Mean and clamped log variance, unscaled."""
    reference, ours = pair
    image = torch.rand(2, 3, 64, 40) * 2 - 1
    with torch.no_grad():
        posterior = reference.encode(image).latent_dist
        mean, logvar = ours.moments(image)
    assert error(mean, posterior.mean) <= BAR
    assert error(logvar, posterior.logvar) <= BAR


def test_gradients_equal_the_reference(pair):
    """Of the image and of every parameter, through both halves."""
    reference, ours = pair
    image = (torch.rand(2, 3, 40, 64) * 2 - 1).requires_grad_()
    decoder_grad, logvar_grad = torch.randn(2, 3, 40, 64), torch.randn(2, 4, 5, 8)
    posterior = reference.encode(image).latent_dist
    loss = (reference.decode(posterior.mean).sample * decoder_grad).sum() + (
        posterior.logvar * logvar_grad
    ).sum()
    expected, whole = gradients(loss, reference, image=image)
    mean, logvar = ours.moments(image)
    loss = (ours.decode(mean * SCALE) * decoder_grad).sum() + (logvar * logvar_grad).sum()
    result, ours_whole = gradients(loss, ours, image=image)
    assert result.keys() == expected.keys() and len(result) == 1 + len(list(ours.parameters()))
    assert error(result["image"], expected["image"]) <= BAR
    assert error(ours_whole, whole) <= BAR


def test_log_variance_is_clamped(pair):
    """To -30..20, so that a variance stays finite."""
    _, ours = pair
    with torch.no_grad():
        bias = ours.quant_conv.bias.clone()
        ours.quant_conv.bias[4:] = torch.tensor([-99.0, 99.0, 0.0, 0.0])
        _, logvar = ours.moments(torch.zeros(2, 3, 16, 16))
        ours.quant_conv.bias.copy_(bias)
    assert (logvar[:, 0] == -30).all()
    assert (logvar[:, 1] == 20).all()


def test_bfloat16_is_as_exact_as_the_reference(pair):
    """Within twice the error that the reference itself makes in bfloat16."""
    reference, ours = pair
    image = torch.rand(2, 3, 64, 96) * 2 - 1
    with torch.no_grad():
        exact = reference.encode(image).latent_dist.mean * SCALE
        theirs, mine = reference_vae(SMALL_VAE), VAE(SMALL_VAE)
        theirs.load_state_dict(reference.state_dict())
        mine.load_state_dict(ours.state_dict())
        bound = error(theirs.bfloat16().encode(image.bfloat16()).latent_dist.mean * SCALE, exact)
        assert 1e-4 < bound < 0.1  # bfloat16 really was used
        assert error(mine.bfloat16().encode(image.bfloat16()), exact) <= 2 * bound


def test_sides_are_multiples_of_8(pair):
    """The message has the size and the required multiple."""
    with pytest.raises(AssertionError, match="64x60.*multiple of 8"):
        pair[1].encode(torch.zeros(1, 3, 64, 60))


def test_tiny_is_small():
    """The miniature: 16x16 latents of 128x128 images, about a million parameters."""
    vae = VAE(VAEConfig.tiny())
    image = torch.rand(2, 3, 128, 128) * 2 - 1
    assert vae.encode(image).shape == (2, 4, 16, 16)
    assert vae.decode(torch.randn(2, 4, 16, 16)).shape == (2, 3, 128, 128)
    assert sum(p.numel() for p in vae.parameters()) < 1e6


@pytest.mark.slow
def test_full_width_equals_the_reference(tmp_path):
    """Stable Diffusion v1.5's own size, both ways."""
    reference = reference_vae(VAEConfig())
    with torch.device("meta"):
        ours = VAE()
    load(ours, official_folder(reference, tmp_path))
    image = torch.rand(2, 3, 128, 192) * 2 - 1
    with torch.no_grad():
        latent = ours.encode(image)
        assert error(latent, reference.encode(image).latent_dist.mean * SCALE) <= BAR
        assert error(ours.decode(latent), reference.decode(latent / SCALE).sample) <= BAR
