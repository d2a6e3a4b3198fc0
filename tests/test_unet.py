"""unet.py equals diffusers' UNet2DConditionModel: noise, the four maps, attention, gradients; and it refuses
wrong inputs.
"""

import pytest
import torch
from oracle import SMALL_UNET, feature_maps, official_folder, reference_unet
from proof import BAR, error, gradients

from kernels import attention_maps
from unet import UNet, UNetConfig
from weights.load import load


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The reference and ours with the same weights, by way of the official folder."""
    reference = reference_unet(SMALL_UNET)
    ours = load(UNet(SMALL_UNET), official_folder(reference, tmp_path_factory.mktemp("unet")))
    return reference, ours.eval()


def inputs(config: UNetConfig, h: int = 16, w: int = 24, L: int = 77):
    """Two different rows: latents, time steps at both ends, contexts."""
    width = config.context_width
    return torch.randn(2, config.latent_channels, h, w), torch.tensor([0, 731]), torch.randn(2, L, width)


WIDE = pytest.param(64, 128, 77, marks=pytest.mark.slow)  # 512x1024 images: 8192 tokens attend to each other


@pytest.mark.parametrize(("h", "w", "L"), [(8, 8, 1), (16, 24, 32), (24, 16, 150), (72, 56, 77), WIDE])
def test_noise_and_maps_equal_the_reference(pair, h, w, L):
    """Every size that is a multiple of 8, every length of context."""
    reference, ours = pair
    latent, t, context = inputs(SMALL_UNET, h, w, L)
    with torch.no_grad():
        noise, maps = feature_maps(reference, latent, t, context)
        assert error(ours(latent, t, context), noise) <= BAR
        features = ours.features(latent, t, context)
    for i, (feature, expected) in enumerate(zip(features, maps, strict=True)):
        assert feature.shape == (2, SMALL_UNET.channels[i], h >> i, w >> i)  # finest first
        assert error(feature, expected) <= BAR, f"map {i}"


def test_lengths_equal_each_image_alone(pair):
    """The values in the padding after an image's tokens have no effect."""
    _, ours = pair
    latent, t, context = inputs(SMALL_UNET, L=40)
    lengths = torch.tensor([3, 40])
    context[0, 3:] = 1e4
    with torch.no_grad():
        both = ours.features(latent, t, context, lengths)
        for row, length in enumerate(lengths.tolist()):
            alone = ours.features(latent[[row]], t[[row]], context[[row], :length])
            for together, one in zip(both, alone, strict=True):
                assert error(together[[row]], one) <= BAR


def test_gradients_equal_the_reference(pair):
    """With respect to every parameter, the latent and the context; also when activations are recomputed."""
    reference, ours = pair
    latent, t, context = inputs(SMALL_UNET)
    weight = torch.randn(2, 4, 16, 24)

    leaves = {"latent": latent.requires_grad_(), "context": context.requires_grad_()}
    loss = (reference(latent, t, context).sample * weight).sum()
    expected, whole = gradients(loss, reference, **leaves)
    for checkpointed in (False, True):
        ours.checkpoint_activations = checkpointed
        result, ours_whole = gradients((ours(latent, t, context) * weight).sum(), ours, **leaves)
        assert result.keys() == expected.keys()
        for name in leaves:
            assert error(result[name], expected[name]) <= BAR, name
        assert error(ours_whole, whole) <= BAR
        for name, value in expected.items():  # each by itself too; small ones are sums that nearly cancel
            assert error(result[name], value) <= 10 * BAR, name
    ours.checkpoint_activations = False


class Watched:
    """A diffusers attention processor with the softmax written out; it keeps the mean of the heads."""

    def __init__(self, lengths):
        self.lengths, self.kept = lengths, []

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **unused):
        crossed = encoder_hidden_states is not None
        tokens = encoder_hidden_states if crossed else hidden_states
        q, k, v = attn.to_q(hidden_states), attn.to_k(tokens), attn.to_v(tokens)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * attn.scale
        if crossed:
            for row, length in enumerate(self.lengths):
                scores[row, :, :, length:] = -torch.inf
        probability = scores.softmax(dim=-1)
        if crossed:
            self.kept.append(probability.mean(dim=1))  # (B, h w, L)
        y = torch.einsum("bhqk,bkhd->bqhd", probability, v).flatten(2)
        return attn.to_out[0](y)


@pytest.mark.parametrize("lengths", [None, [3, 40]])
@pytest.mark.parametrize("recomputed", [False, True])
def test_attention_equals_the_reference(pair, lengths, recomputed):
    """Mean over heads and the five layers of each resolution; the four feature maps are bit-equal."""
    reference, ours = pair
    latent, t, context = inputs(SMALL_UNET, 16, 24, L=40)
    watched = Watched(lengths or [40, 40])
    before = reference.attn_processors
    reference.set_attn_processor(watched)
    with torch.no_grad():
        reference(latent, t, context)
    reference.set_attn_processor(before)
    assert [x.shape[1] for x in watched.kept] == [384] * 2 + [96] * 2 + [24] * 2 + [6] + [24] * 3 + [
        96
    ] * 3 + [384] * 3  # 6 pixels: the middle block

    ours.checkpoint_activations = recomputed
    real = None if lengths is None else torch.tensor(lengths)
    features, attention = ours.features_and_attention(latent, t, context, real)
    again = ours.features(latent, t, context, real)
    ours.checkpoint_activations = False
    assert all(torch.equal(*x) for x in zip(features, again, strict=True))
    assert len(attention) == 3
    for i, result in enumerate(attention):
        h, w = 16 >> i, 24 >> i
        assert result.shape == (2, 40, h, w) and result.dtype == torch.float32
        layers = [x for x in watched.kept if x.shape[1] == h * w]
        expected = sum(layers) / 5  # (B, h w, L)
        assert len(layers) == 5
        assert error(result, expected.mT.unflatten(2, (h, w))) <= BAR, f"level {i}"
        assert (result.sum(dim=1) - 1).abs().max() < 1e-5
        if lengths:
            assert (result[0, 3:] == 0).all()
    sum(x.square().sum() for x in attention).backward()  # VPD learns through them
    assert ours.conv_in.weight.grad.abs().max() > 0
    ours.zero_grad()


def test_attention_is_exact_in_low_precision():
    """The scores of bfloat16 queries and keys are not rounded to 8 bits, nor under autocast."""
    q, k = torch.randn(2, 6, 4, 8).bfloat16(), torch.randn(2, 5, 4, 8).bfloat16()
    lengths = torch.tensor([5, 2])
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) / 8**0.5
    scores[1, :, :, 2:] = -torch.inf
    with torch.autocast("cpu", torch.bfloat16):
        result = attention_maps(q, k, lengths)
    assert result.dtype == torch.float32
    assert error(result, scores.softmax(dim=-1).mean(dim=1)) < 1e-6


def test_checkpointing_recomputes(pair):
    """With `checkpoint_activations` the blocks run again in the backward pass, otherwise they do not."""
    _, ours = pair
    runs = []
    handle = ours.mid_block.resnets[0].register_forward_pre_hook(lambda *_: runs.append(1))
    for checkpointed in (False, True):
        ours.checkpoint_activations = checkpointed
        ours(*inputs(SMALL_UNET)).sum().backward()
    ours.checkpoint_activations = False
    handle.remove()
    assert len(runs) == 1 + 2


def test_bfloat16_is_as_exact_as_the_reference(pair):
    """Within twice the error that the reference itself makes in bfloat16."""
    reference, ours = pair
    latent, t, context = inputs(SMALL_UNET)
    with torch.no_grad():
        exact = reference(latent, t, context).sample
        low = [x.bfloat16() if x.is_floating_point() else x for x in (latent, t, context)]
        theirs = reference_unet(SMALL_UNET)
        theirs.load_state_dict(reference.state_dict())
        mine = UNet(SMALL_UNET)
        mine.load_state_dict(ours.state_dict())
        bound = error(theirs.bfloat16()(*low).sample, exact)
        assert 1e-4 < bound < 0.1  # bfloat16 really was used
        assert error(mine.bfloat16()(*low), exact) <= 2 * bound


def test_context_of_any_length(pair):
    """1 to 1024 tokens; more or none are refused."""
    _, ours = pair
    latent, t, context = inputs(SMALL_UNET, 8, 8, L=1025)
    with torch.no_grad():
        assert ours(latent, t, context[:, :1024]).isfinite().all()
        for L in (0, 1025):
            with pytest.raises(AssertionError, match=rf"\(2, {L}, 48\)"):
                ours(latent, t, context[:, :L])


def test_wrong_inputs_are_refused(pair):
    """The message has the offending value."""
    _, ours = pair
    latent, t, context = inputs(SMALL_UNET)
    with pytest.raises(AssertionError, match="16x20.*multiples of 8"):
        ours(latent[..., :20], t, context)
    with pytest.raises(AssertionError, match="3 channels, not 4"):
        ours(latent[:, :3], t, context)
    with pytest.raises(AssertionError, match="float32"):
        ours(latent, t.float(), context)
    with pytest.raises(AssertionError, match=r"t is torch.int64 \(1,\)"):
        ours(latent, t[:1], context)
    with pytest.raises(AssertionError, match=r"\(2, 77, 40\)"):
        ours(latent, t, context[..., :40])
    with pytest.raises(AssertionError, match=r"lengths is \(1,\)"):
        ours(latent, t, context, torch.tensor([5]))


def test_sizes_of_tiny():
    """128x128 images have 16x16 latents; the miniature has about 5.7 million parameters."""
    unet = UNet(UNetConfig.tiny())
    features = unet.features(*inputs(UNetConfig.tiny(), 16, 16))
    assert [tuple(x.shape) for x in features] == [
        (2, 32, 16, 16),
        (2, 64, 8, 8),
        (2, 96, 4, 4),
        (2, 96, 2, 2),
    ]
    assert 5.5e6 < sum(p.numel() for p in unet.parameters()) < 6e6


@pytest.mark.slow
def test_full_width_equals_the_reference(tmp_path):
    """Stable Diffusion v1.5's own size: noise, maps and all gradients. One model after the other: each is 7
    GB.
    """
    config = UNetConfig()
    latent, t, context = inputs(config, 16, 24, 77)
    reference = reference_unet(config)
    noise, maps = feature_maps(reference, latent, t, context)
    maps = [x.detach() for x in maps]
    noise.square().mean().backward()
    expected = {name: p.grad for name, p in reference.named_parameters()}
    folder = official_folder(reference, tmp_path / "unet", max_shard_size="100GB")
    del reference

    with torch.device("meta"):
        ours = UNet(config)
    load(ours, folder)
    features = ours.features(latent, t, context)
    assert [x.shape[1] for x in features] == [320, 640, 1280, 1280]
    for feature, wanted in zip(features, maps, strict=True):
        assert error(feature, wanted) <= BAR
    result = ours(latent, t, context)
    assert error(result, noise) <= BAR
    result.square().mean().backward()
    square = sum((p.grad - expected[name]).double().square().sum() for name, p in ours.named_parameters())
    whole = sum(x.double().square().sum() for x in expected.values())
    assert (square / whole).sqrt() <= BAR
