"""model.py: `forward` is Figure 2, part by part; words to vectors; what is trained; the loss.

Each part has its own tests; here the parts are called one after the other, by hand.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler
from proof import BAR, error
from tiny_tada import NAMES, SD15, TAGS, H, K, W, config, make, trained
from torch import Tensor

from adapter import Condition, Text, asymmetric_loss
from assemble import build
from clip import TEMPLATES
from decoders import Logits
from errors import ModelError
from model import Tada

CONDITIONS = ("none", "caption", "classes", "implicit", "tagging", "oracle")


@pytest.fixture(scope="module")
def tagging() -> Tada:
    """Shared by all tests of this file: do not modify it."""
    torch.manual_seed(0)
    return make()


@pytest.fixture
def image() -> Tensor:
    return torch.rand(2, 3, H, W) * 2 - 1


# Figure 2, part by part


def pooled(tada: Tada, words: list[str]) -> Tensor:
    """The pooled vector of "a photo of a {word}" for each word; for "", that of the empty prompt."""
    return tada.clip.text(tada.tokenizer([f"a photo of a {word}" if word else "" for word in words]))[1]


def ragged(tada: Tada, tags: list[list[str]]) -> Text:
    """The vectors of one and of three words, the shorter list padded with zeros."""
    rows = [pooled(tada, words) for words in tags]
    vectors = torch.zeros(2, 3, rows[0].shape[1])
    for row, words in enumerate(rows):
        vectors[row, : len(words)] = words
    return Text(vectors, torch.tensor([1, 3]))


def expected_condition(tada: Tada, image: Tensor, tags: list[list[str]] | None) -> Condition:
    """The condition by the adapter's formula or, for tagging, by the adapter itself."""
    adapter, B = tada.adapter, len(image)
    tokens, embedding = tada.clip.image(image)
    empty = tada.clip.text(tada.tokenizer([""]))[0].expand(B, -1, -1)
    match tada.config.condition:
        case "none":
            return Condition(empty)
        case "caption":
            return Condition(tada.clip.text(tada.tokenizer(["boat", "tall tree, cloud, sea"]))[0])
        case "classes":
            E = pooled(tada, list(NAMES)).expand(B, -1, -1)
            return Condition(E + adapter.gamma * adapter.mlp(E))
        case "implicit":
            caption = adapter.linear(embedding)[:, None] + adapter.position
            return Condition(empty + adapter.alpha.tanh() * caption)
        case "oracle":
            return Condition(*ragged(tada, tags))
        case "tagging":
            text = Text(pooled(tada, list(NAMES)).expand(B, -1, -1)) if tags is None else ragged(tada, tags)
            return adapter(tokens, embedding, text)


def by_hand(tada: Tada, image: Tensor, tags: list[list[str]] | None, t: int) -> tuple[Logits, Condition]:
    """Pad, encode, add noise as diffusers does, run the UNet, decode."""
    grey = torch.zeros(2, 3, 64, 128)
    grey[:, :, :H, :W] = image
    latent = tada.vae.encode(grey)
    noise = torch.randn(4, 8, 16, generator=torch.Generator().manual_seed(42))
    t = torch.tensor([t, t])
    noisy = DDPMScheduler(**SD15).add_noise(latent, torch.stack([noise, noise]), t)
    condition = expected_condition(tada, image, tags)
    return tada.decoder(tada.unet.features(noisy, t, condition.context, condition.lengths)), condition


@pytest.mark.parametrize(("decoder", "t"), [("fpn", 0), ("upernet", 261)])
@pytest.mark.parametrize("condition", CONDITIONS)
@torch.no_grad()
def test_forward_is_figure_2(condition, decoder, t, image):
    """Every condition, with tags and, where possible, without; both decoders; at t = 0 and at another t."""
    tada = make(condition=condition, decoder=decoder, timestep=t)
    for tags in [TAGS] if condition in ("caption", "oracle") else [TAGS, None]:
        prediction, condition = tada(image, tags)
        expected, by_formula = by_hand(tada, image, tags, t)
        assert prediction.main.shape == (2, K, 8, 16)
        assert error(prediction.main, expected.main) <= BAR
        assert (prediction.auxiliary is None) == (decoder == "fpn")
        if decoder == "upernet":
            assert error(prediction.auxiliary, expected.auxiliary) <= BAR
        assert (condition.logits is None) == (by_formula.logits is None)
        if condition.logits is not None:
            assert error(condition.logits, by_formula.logits) <= BAR


@pytest.mark.parametrize("condition", CONDITIONS)
@torch.no_grad()
def test_words_change_only_their_own_image(condition, image):
    """Other words change the prediction where the condition reads words per image; bit-equal elsewhere."""
    tada = make(condition=condition)
    first, other = (tada(image, tags).prediction.main for tags in (TAGS, [["snow"], *TAGS[1:]]))
    assert torch.equal(first[1], other[1])
    if condition in ("caption", "tagging", "oracle"):
        assert error(other[0], first[0]) > 1e-3
    else:
        assert torch.equal(first, other)


@pytest.mark.parametrize("t", [0, 1, 261, 999])
@torch.no_grad()
def test_noise_is_equation_1(tagging, t, monkeypatch):
    """As both of diffusers' schedulers add it; the same for every image, call and random state."""
    latent, tada = torch.randn(2, 4, 16, 8), tagging
    monkeypatch.setattr(tada, "config", replace(tada.config, timestep=t))
    monkeypatch.setattr(tada, "noises", {})
    noise = torch.randn(4, 16, 8, generator=torch.Generator().manual_seed(42)).expand(2, -1, -1, -1)
    before = torch.get_rng_state()
    for scheduler in (DDPMScheduler, DDIMScheduler):
        expected = scheduler(**SD15).add_noise(latent, noise, torch.tensor([t, t]))
        assert error(tada.noised(latent), expected) <= 1e-6
    assert torch.equal(tada.noised(latent[:1])[0], tada.noised(latent)[0])
    wide, half = tada.noised(latent.mT), tada.noised(latent.mT.bfloat16())  # another size, another type
    assert half.dtype == torch.bfloat16 and error(half, wide) <= 0.01
    assert error(tada.noised(latent), expected) <= 1e-6
    assert torch.equal(torch.get_rng_state(), before)


@torch.no_grad()
def test_vpd(image):
    """Unscaled, no noise, t = 1: the UNet gets the posterior mean; attention maps join the features."""
    vpd = {"condition": "classes", "scale_latent": False, "noise": "none", "timestep": 1}
    grey, t = F.pad(image, (0, 128 - W, 0, 64 - H)), torch.tensor([1, 1])
    tada = make(**vpd)
    mean, context = tada.vae.moments(grey)[0], expected_condition(tada, image, None).context
    expected = tada.decoder(tada.unet.features(mean, t, context))
    assert error(tada(image).prediction.main, expected.main) <= BAR
    scaled = tada.unet.features(tada.vae.config.scale * mean, t, context)
    assert error(tada.decoder(scaled).main, expected.main) > 1e-2

    tada = make(**vpd, attention_maps=True)
    mean, context = tada.vae.moments(grey)[0], expected_condition(tada, image, None).context
    features, (_, at_16, at_32) = tada.unet.features_and_attention(mean, t, context)
    features[1], features[2] = torch.cat([features[1], at_16], 1), torch.cat([features[2], at_32], 1)
    assert [x.shape[1] for x in features] == [32, 64 + K, 96 + K, 96]
    assert error(tada(image).prediction.main, tada.decoder(features).main) <= BAR


@pytest.mark.parametrize(
    ("condition", "tokens"), [("none", 77), ("caption", 77), ("implicit", 77), ("tagging", 9)]
)
@torch.no_grad()
def test_attention_maps_for_every_number_of_tokens(condition, tokens, image):
    """The decoder takes one attention map per token."""
    tada = build(config(condition=condition, queries=9, attention_maps=True))
    assert tada.decoder.channels == (32, 64 + tokens, 96 + tokens, 96)
    assert tada(image, TAGS).prediction.main.shape == (2, K, 8, 16)


def test_attention_maps_need_one_number_of_tokens():
    with pytest.raises(ModelError, match="needs the same number of tokens .* not --condition oracle"):
        build(config(condition="oracle", attention_maps=True))


# Words


@pytest.mark.parametrize("condition", ["tagging", "oracle"])
@torch.no_grad()
def test_ragged_tags_stay_with_their_image(condition):
    """Lists of one, three and no words in a batch: as in a batch of one image."""
    tada, images = make(condition=condition), torch.rand(3, 3, H, W) * 2 - 1
    tags = [*TAGS, []]
    together = tada(images, tags)
    for i in range(3):
        alone = tada(images[i : i + 1], tags[i : i + 1])
        assert error(together.prediction.main[i : i + 1], alone.prediction.main) <= BAR
    if condition == "oracle":
        assert together.condition.lengths.tolist() == [1, 3, 1] and alone.condition.lengths is None


@torch.no_grad()
def test_no_words_are_the_empty_prompt(image):
    """One vector, that of "", not of "a photo of a "; for captions and prompts the 77 tokens of ""."""
    no_words = [[], []]
    tada = make(condition="oracle")
    hidden, end = tada.clip.text(tada.tokenizer([""]))
    assert error(tada(image, no_words).condition.context, end.expand(2, 1, -1)) <= BAR
    assert torch.equal(tada(image, [[""], []]).condition.context, tada(image, no_words).condition.context)
    tada = make(condition="tagging")
    tokens, _ = tada.clip.image(image)
    end = tada.clip.text(tada.tokenizer([""]))[1]
    expected = tada.adapter(tokens, None, Text(end.expand(2, 1, -1)))
    assert error(tada(image, no_words).condition.context, expected.context) <= BAR
    for options in ({"condition": "caption"}, {"condition": "oracle", "tag_tokens": "prompt"}):
        tada = make(**options)
        hidden = tada.clip.text(tada.tokenizer([""]))[0]
        assert error(tada(image, no_words).condition.context, hidden.expand(2, -1, -1)) <= BAR


@torch.no_grad()
def test_tags_may_be_one_prompt(image):
    """`tag_tokens` "prompt": the 77 hidden states of the joined words, no lengths."""
    tada = make(tag_tokens="prompt")
    hidden = tada.clip.text(tada.tokenizer(["boat", "tall tree, cloud, sea"]))[0]
    assert hidden.shape == (2, 77, 128)
    expected = tada.adapter(tada.clip.image(image)[0], None, Text(hidden))
    assert error(tada(image, TAGS).condition.context, expected.context) <= BAR


@torch.no_grad()
def test_a_word_of_80_prompts(image):
    """The mean of its 80 vectors, for classes and tags alike; the empty prompt has one vector."""
    tada = make(condition="oracle", templates=80, classes=("sea",))
    ids = tada.tokenizer([template.format("boat") for template in TEMPLATES])
    expected = tada.clip.text(ids)[1].mean(dim=0)
    assert error(tada(image, [["boat"], []]).condition.context[0, 0], expected) <= BAR
    assert error(tada.vectors[tada.rows[""]], tada.clip.text(tada.tokenizer([""]))[1][0]) <= BAR


@torch.no_grad()
def test_prompts_are_what_the_text_tower_reads():
    """Not the displayed names; () means the same as those."""
    prompts = ("floor", "sea")
    tada = build(config(classes=("floor-wood", "sea"), prompts=prompts, tags="clip"))
    assert error(tada.adapter.classes, pooled(tada, list(prompts))) <= BAR
    assert {word for word, _ in tada.zero_shot_tags(torch.zeros(1, 3, 64, 64))[0]} <= set(prompts)
    assert config().prompts == NAMES


def test_zero_shot_tags_need_tags_from_clip(tagging, image):
    with pytest.raises(AssertionError, match="the tags come from classes: train with --tags clip"):
        tagging.zero_shot_tags(image)


# What is trained, and the loss


def expected_to_train(tada: Tada) -> set[str]:
    """UNet (without its noise head), adapter and decoder, without what the options exclude."""
    unused = ("unet.conv_norm_out.", "unet.conv_out.")
    parts = ("adapter.", "decoder.") if tada.config.freeze_unet else ("unet.", "adapter.", "decoder.")
    names = {name for name, _ in tada.named_parameters() if name.startswith(parts)}
    names = {name for name in names if not name.startswith(unused)}
    return names if tada.config.tag_loss_weight else names - {"adapter.log_scale", "adapter.bias"}


@pytest.mark.parametrize(
    "options",
    [
        *({"condition": condition} for condition in CONDITIONS),
        {"freeze_unet": True, "decoder": "upernet"},
        {"freeze_unet": True, "condition": "none"},
        {"tag_loss_weight": 0.0},
        {"tag_loss_weight": 0.0, "adapter_start": "random"},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_what_is_trained(options):
    """Exactly the trainable parameters have a gradient after one backward pass: DDP needs both directions."""
    tada = make(**options).train()
    assert trained(tada) == expected_to_train(tada)
    output = tada(torch.rand(2, 3, 60, 64) * 2 - 1, TAGS)
    losses = tada.loss(output, torch.randint(K, (2, 60, 64)))
    sum(total for total, _ in losses.values()).backward()
    moved = {name for name, p in tada.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert moved == trained(tada)
    assert all(p.grad is None for p in tada.parameters() if not p.requires_grad)


def test_every_trained_parameter_has_a_gradient_at_initialisation():
    """Gates are closed then: many gradients are zero, but none is missing."""
    tada = build(config())
    losses = tada.loss(tada(torch.rand(2, 3, 64, 64) * 2 - 1, TAGS), torch.randint(K, (2, 64, 64)))
    sum(total for total, _ in losses.values()).backward()
    assert {name for name, p in tada.named_parameters() if p.grad is not None} == trained(tada)


def example_labels() -> Tensor:
    """Two label maps: the first is half ignored and lacks class 1, the second has two classes only."""
    labels = torch.randint(K, (2, H, W))
    labels[0, :, : W // 2] = 255
    labels[0][labels[0] == 1] = 2
    labels[1] = torch.where(labels[1] > 2, 4, 0)
    return labels


@pytest.mark.parametrize("decoder", ["fpn", "upernet"])
@torch.no_grad()
def test_loss_and_counts(decoder, image):
    """Cross-entropy of the image's pixels without padding, 0.4 times that of the auxiliary head, Eq. 7."""
    tada, labels = make(decoder=decoder, tag_loss_weight=0.5), example_labels()
    output = tada(image, TAGS)
    losses, counts = tada.loss(output, labels), tada.counts(labels)

    def cross_entropy(logits: Tensor) -> Tensor:
        upsampled = F.interpolate(logits, size=(64, 128), mode="bilinear", align_corners=False)
        return F.cross_entropy(upsampled[:, :, :H, :W], labels, ignore_index=255, reduction="sum")

    present = torch.tensor([[1.0, 0, 1, 1, 1], [1, 0, 0, 0, 1]])
    expected = {"seg": cross_entropy(output.prediction.main)}
    if decoder == "upernet":
        expected["aux"] = 0.4 * cross_entropy(output.prediction.auxiliary)
    expected["tag"] = 0.5 * asymmetric_loss(output.condition.logits, present)[0]
    assert list(losses) == list(expected)
    for name, (total, count) in losses.items():
        assert error(total, expected[name]) <= BAR, name
        assert counts[name] == count == (2 if name == "tag" else 2 * H * W - H * W // 2)


@torch.no_grad()
def test_parts_of_the_loss(image):
    """No tag part without Eq. 7; images without labels count no pixels, and their loss is a finite 0."""
    for options in ({"tag_loss_weight": 0.0}, {"condition": "oracle"}):
        tada = make(**options)
        assert list(tada.loss(tada(image, TAGS), example_labels())) == ["seg"]
    ignored = torch.full((2, H, W), 255)
    losses, counts = tada.loss(tada(image, TAGS), ignored), tada.counts(ignored)
    assert losses["seg"] == (0, 0) and counts["seg"] == 0 and counts["tag"] == 2
