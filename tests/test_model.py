"""model.py: `forward` is Figure 2, part by part; pictures of any size; what is trained; how a model is built.

Each part has tests of its own; here they are called by hand, one after the other.
"""

import errno
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st
from oracle import shake, tiny_folder
from proof import BAR, error
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import inference
import model
import weights.words as vectors_file
from adapter import Condition, Text, asymmetric_loss
from assemble import build, parameter_groups
from clip import TEMPLATES, CLIPConfig, name_vectors
from decoders import Logits
from errors import ModelError, WeightsError
from inference import vote, windows
from mask2former import DeformablePixelDecoder
from model import Output, Tada, TadaConfig
from unet import UNetConfig

CONDITIONS = ("none", "caption", "classes", "implicit", "tagging", "oracle")
NAMES = ("sea", "snow", "tall tree", "boat", "cloud")
K = len(NAMES)
H, W = 40, 100  # no multiples of 64: padded to 64x128
TAGS = [["boat"], ["tall tree", "cloud", "sea"]]
SD15 = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}  # its scheduler's settings


def config(**options) -> TadaConfig:
    sizes = {"crop": (128, 128), "box": (128, 512), "stride": (85, 85), "dropout": 0.0}
    return TadaConfig(**{"classes": NAMES, "model": "tiny", "dataset": "scenes", **sizes, **options})


def make(**options) -> Tada:
    """A tiny model with random weights, moved off its start: gates are open, so that every part matters."""
    tada = build(config(**options)).eval()
    for part in (tada.unet, tada.vae, tada.decoder):
        shake(part)
    with torch.no_grad():
        for parameter in tada.adapter.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        for name, parameter in tada.decoder.named_parameters():
            if "classifier" in name and parameter.ndim > 1:
                parameter.normal_()  # from its start of 0.01
    return tada


@pytest.fixture(scope="module")
def tagging() -> Tada:
    """Not to be changed."""
    torch.manual_seed(0)
    return make()


@pytest.fixture
def image() -> Tensor:
    return torch.rand(2, 3, H, W) * 2 - 1


# Figure 2, part by part


def pooled(tada: Tada, words: list[str]) -> Tensor:
    """Each word's vector at the end of "a photo of a word"; that of "" is the empty prompt's."""
    return tada.clip.text(tada.tokenizer([f"a photo of a {word}" if word else "" for word in words]))[1]


def ragged(tada: Tada, tags: list[list[str]]) -> Text:
    """The vectors of one and of three words, zeros behind the one."""
    rows = [pooled(tada, words) for words in tags]
    vectors = torch.zeros(2, 3, rows[0].shape[1])
    for row, words in enumerate(rows):
        vectors[row, : len(words)] = words
    return Text(vectors, torch.tensor([1, 3]))


def told(tada: Tada, image: Tensor, tags: list[list[str]] | None) -> Condition:
    """What the UNet is told, by the adapter's formula or, for tagging, by the adapter itself."""
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
    """Pad, encode, add noise as diffusers does, ask the UNet, decode."""
    grey = torch.zeros(2, 3, 64, 128)
    grey[:, :, :H, :W] = image
    latent = tada.vae.encode(grey)
    noise = torch.randn(4, 8, 16, generator=torch.Generator().manual_seed(42))
    t = torch.tensor([t, t])
    noisy = DDPMScheduler(**SD15).add_noise(latent, torch.stack([noise, noise]), t)
    condition = told(tada, image, tags)
    return tada.decoder(tada.unet.features(noisy, t, condition.context, condition.lengths)), condition


@pytest.mark.parametrize(("decoder", "t"), [("fpn", 0), ("upernet", 261)])
@pytest.mark.parametrize("condition", CONDITIONS)
@torch.no_grad()
def test_forward_is_figure_2(condition, decoder, t, image):
    """Every condition, with tags and, where it can, without; both decoders; at t = 0 and at another t."""
    tada = make(condition=condition, decoder=decoder, timestep=t)
    for tags in [TAGS] if condition in ("caption", "oracle") else [TAGS, None]:
        prediction, condition = tada(image, tags)
        expected, expected_condition = by_hand(tada, image, tags, t)
        assert prediction.main.shape == (2, K, 8, 16)
        assert error(prediction.main, expected.main) <= BAR
        assert (prediction.auxiliary is None) == (decoder == "fpn")
        if decoder == "upernet":
            assert error(prediction.auxiliary, expected.auxiliary) <= BAR
        assert (condition.logits is None) == (expected_condition.logits is None)
        if condition.logits is not None:
            assert error(condition.logits, expected_condition.logits) <= BAR


@pytest.mark.parametrize("condition", CONDITIONS)
@torch.no_grad()
def test_what_steers_a_prediction(condition, image):
    """Other words change it where the condition reads words per picture, and not by a bit elsewhere."""
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
    """As both of diffusers' schedulers add it; the same for every picture, call and random state."""
    latent, tada = torch.randn(2, 4, 16, 8), tagging
    monkeypatch.setattr(tada, "config", replace(tada.config, timestep=t))
    noise = torch.randn(4, 16, 8, generator=torch.Generator().manual_seed(42)).expand(2, -1, -1, -1)
    before = torch.get_rng_state()
    for scheduler in (DDPMScheduler, DDIMScheduler):
        expected = scheduler(**SD15).add_noise(latent, noise, torch.tensor([t, t]))
        assert error(tada.noised(latent), expected) <= 1e-6
    assert torch.equal(tada.noised(latent[:1])[0], tada.noised(latent)[0])
    assert torch.equal(torch.get_rng_state(), before)


@torch.no_grad()
def test_vpd(image):
    """Unscaled, no noise, t = 1: the UNet gets the posterior's mean; its attention joins the features."""
    vpd = {"condition": "classes", "scale_latent": False, "noise": "none", "timestep": 1}
    grey, t = F.pad(image, (0, 128 - W, 0, 64 - H)), torch.tensor([1, 1])
    tada = make(**vpd)
    mean, context = tada.vae.moments(grey)[0], told(tada, image, None).context
    expected = tada.decoder(tada.unet.features(mean, t, context))
    assert error(tada(image).prediction.main, expected.main) <= BAR
    scaled = tada.unet.features(tada.vae.config.scale * mean, t, context)
    assert error(tada.decoder(scaled).main, expected.main) > 1e-2

    tada = make(**vpd, attention_maps=True)
    mean, context = tada.vae.moments(grey)[0], told(tada, image, None).context
    features, (_, at_16, at_32) = tada.unet.features_and_attention(mean, t, context)
    features[1], features[2] = torch.cat([features[1], at_16], 1), torch.cat([features[2], at_32], 1)
    assert [x.shape[1] for x in features] == [32, 64 + K, 96 + K, 96]
    assert error(tada(image).prediction.main, tada.decoder(features).main) <= BAR


@pytest.mark.parametrize(
    ("condition", "tokens"), [("none", 77), ("caption", 77), ("implicit", 77), ("tagging", 9)]
)
@torch.no_grad()
def test_attention_maps_for_every_number_of_tokens(condition, tokens, image):
    """The decoder has room for one map a token."""
    tada = build(config(condition=condition, queries=9, attention_maps=True))
    assert tada.decoder.channels == (32, 64 + tokens, 96 + tokens, 96)
    assert tada(image, TAGS).prediction.main.shape == (2, K, 8, 16)


def test_attention_maps_need_one_number_of_tokens():
    with pytest.raises(ModelError, match="--attention-maps needs as many tokens .* not --condition oracle"):
        build(config(condition="oracle", attention_maps=True))


# TagSource


@pytest.mark.parametrize("condition", ["tagging", "oracle"])
@torch.no_grad()
def test_ragged_tags_are_each_picture_s_own(condition):
    """Lists of one, three and no words in a batch: as if each picture came alone."""
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
    """Its one vector, not that of "a photo of a "; a caption's and a prompt's 77 tokens are those of ""."""
    nothing = [[], []]
    tada = make(condition="oracle")
    hidden, end = tada.clip.text(tada.tokenizer([""]))
    assert error(tada(image, nothing).condition.context, end.expand(2, 1, -1)) <= BAR
    assert torch.equal(tada(image, [[""], []]).condition.context, tada(image, nothing).condition.context)
    tada = make(condition="tagging")
    tokens, _ = tada.clip.image(image)
    end = tada.clip.text(tada.tokenizer([""]))[1]
    expected = tada.adapter(tokens, None, Text(end.expand(2, 1, -1)))
    assert error(tada(image, nothing).condition.context, expected.context) <= BAR
    for options in ({"condition": "caption"}, {"condition": "oracle", "tag_tokens": "prompt"}):
        tada = make(**options)
        hidden = tada.clip.text(tada.tokenizer([""]))[0]
        assert error(tada(image, nothing).condition.context, hidden.expand(2, -1, -1)) <= BAR


@torch.no_grad()
def test_tags_may_be_one_prompt(image):
    """`tag_tokens` "prompt": the 77 hidden states of the words in a row, no lengths."""
    tada = make(tag_tokens="prompt")
    hidden = tada.clip.text(tada.tokenizer(["boat", "tall tree, cloud, sea"]))[0]
    assert hidden.shape == (2, 77, 128)
    expected = tada.adapter(tada.clip.image(image)[0], None, Text(hidden))
    assert error(tada(image, TAGS).condition.context, expected.context) <= BAR


@torch.no_grad()
def test_a_word_of_80_prompts(image):
    """The mean of its 80 vectors, for classes and tags alike; the empty prompt is no name."""
    tada = make(condition="oracle", templates=80, classes=("sea",))
    ids = tada.tokenizer([template.format("boat") for template in TEMPLATES])
    expected = tada.clip.text(ids)[1].mean(dim=0)
    assert error(tada(image, [["boat"], []]).condition.context[0, 0], expected) <= BAR
    assert error(tada.vectors[""], tada.clip.text(tada.tokenizer([""]))[1][0]) <= BAR


@torch.no_grad()
def test_prompts_are_what_the_text_tower_reads():
    """Not the names that people see; () means that they are the same."""
    prompts = ("floor", "sea")
    tada = build(config(classes=("floor-wood", "sea"), prompts=prompts, tags="clip"))
    assert error(tada.adapter.classes, pooled(tada, list(prompts))) <= BAR
    assert {word for word, _ in tada.zero_shot_tags(torch.zeros(1, 3, 64, 64))[0]} <= set(prompts)
    assert config().prompts == NAMES


# What is trained


def trained(tada: Tada) -> set[str]:
    return {name for name, parameter in tada.named_parameters() if parameter.requires_grad}


def expected_to_train(tada: Tada) -> set[str]:
    """UNet (without the layers that make noise), adapter and decoder, less what the options take away."""
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
    """Each such parameter has a gradient after one backward pass, and nothing else has: DDP needs both."""
    tada = make(**options).train()
    assert trained(tada) == expected_to_train(tada)
    output = tada(torch.rand(2, 3, 60, 64) * 2 - 1, TAGS)
    losses = tada.loss(output, torch.randint(K, (2, 60, 64)))
    sum(total for total, _ in losses.values()).backward()
    moved = {name for name, p in tada.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert moved == trained(tada)
    assert all(p.grad is None for p in tada.parameters() if not p.requires_grad)


def test_the_start_trains_the_same_parameters():
    """Gates are shut then: many gradients are zero, but none is missing."""
    tada = build(config())
    losses = tada.loss(tada(torch.rand(2, 3, 64, 64) * 2 - 1, TAGS), torch.randint(K, (2, 64, 64)))
    sum(total for total, _ in losses.values()).backward()
    assert {name for name, p in tada.named_parameters() if p.grad is not None} == trained(tada)


def picture_labels() -> Tensor:
    """Two maps of which the first is half ignored and lacks class 1, the second has two classes alone."""
    labels = torch.randint(K, (2, H, W))
    labels[0, :, : W // 2] = 255
    labels[0][labels[0] == 1] = 2
    labels[1] = torch.where(labels[1] > 2, 4, 0)
    return labels


@pytest.mark.parametrize("decoder", ["fpn", "upernet"])
@torch.no_grad()
def test_loss_and_counts(decoder, image):
    """Cross-entropy of the pixels of the picture alone, 0.4 of the second head's, Eq. 7 for what is there."""
    tada, labels = make(decoder=decoder, tag_loss_weight=0.5), picture_labels()
    output = tada(image, TAGS)
    losses, counts = tada.loss(output, labels), tada.counts(labels)

    def cross_entropy(logits: Tensor) -> Tensor:
        upsampled = F.interpolate(logits, size=(64, 128), mode="bilinear", align_corners=False)
        return F.cross_entropy(upsampled[:, :, :H, :W], labels, ignore_index=255, reduction="sum")

    there = torch.tensor([[1.0, 0, 1, 1, 1], [1, 0, 0, 0, 1]])
    expected = {"seg": cross_entropy(output.prediction.main)}
    if decoder == "upernet":
        expected["aux"] = 0.4 * cross_entropy(output.prediction.auxiliary)
    expected["tag"] = 0.5 * asymmetric_loss(output.condition.logits, there)[0]
    assert list(losses) == list(expected)
    for name, (total, count) in losses.items():
        assert error(total, expected[name]) <= BAR, name
        assert counts[name] == count == (2 if name == "tag" else 2 * H * W - H * W // 2)


@torch.no_grad()
def test_parts_of_the_loss(image):
    """No tag part without Eq. 7; ignored pictures count for no pixel, and their zero is finite."""
    for options in ({"tag_loss_weight": 0.0}, {"condition": "oracle"}):
        tada = make(**options)
        assert list(tada.loss(tada(image, TAGS), picture_labels())) == ["seg"]
    nothing = torch.full((2, H, W), 255)
    losses, counts = tada.loss(tada(image, TAGS), nothing), tada.counts(nothing)
    assert losses["seg"] == (0, 0) and counts["seg"] == 0 and counts["tag"] == 2


def test_decay_and_rates():
    """Decay for the weights of Linear and Conv layers alone; the UNet's rate is scaled, norms and all."""
    tada = build(config(decoder="upernet"))
    groups = parameter_groups(tada, lr=1e-3, weight_decay=0.01, unet_scale=0.1)
    found = {}
    for group in groups:
        assert len(group["names"]) == len(group["params"])
        for name, parameter in zip(group["names"], group["params"], strict=True):
            assert tada.get_parameter(name) is parameter and name not in found
            found[name] = (group["lr"], group["weight_decay"])
    assert found.keys() == trained(tada)

    for path, module in tada.named_modules():
        for name, _ in module.named_parameters(prefix=path, recurse=False):
            if name in found:
                matrix = isinstance(module, (nn.Linear, nn.Conv2d)) and name.endswith(".weight")
                rate = 1e-4 if name.startswith("unet.") else 1e-3
                assert found[name] == (pytest.approx(rate), 0.01 if matrix else 0.0), name
    samples = {
        "unet.conv_in.weight": (1e-4, 0.01),
        "unet.down_blocks.0.resnets.0.norm1.weight": (1e-4, 0),
        "unet.time_embedding.linear_1.bias": (1e-4, 0),
        "adapter.queries": (1e-3, 0),
        "adapter.norm.weight": (1e-3, 0),
        "adapter.log_scale": (1e-3, 0),
        "adapter.blocks.1.attend_text.to_q.weight": (1e-3, 0.01),
        "decoder.classifier.1.weight": (1e-3, 0.01),
        "decoder.bottleneck.1.weight": (1e-3, 0),
    }
    for name, expected in samples.items():
        assert found[name] == pytest.approx(expected), name

    frozen = build(config(freeze_unet=True, condition="none"))
    names = [name for group in parameter_groups(frozen, 1e-3, 0.01) for name in group["names"]]
    assert sorted(names) == sorted(trained(frozen)) and all(name.startswith("decoder.") for name in names)


# Pictures of any size


sides = st.integers(1, 200)


@given(st.tuples(sides, sides), st.tuples(sides, sides), st.tuples(sides, sides))
def test_windows_are_mmsegmentation_s(size, window, stride):
    """Its formula; every pixel is in a window, and all windows have one size."""
    stride = tuple(min(pair) for pair in zip(stride, window, strict=True))

    def spans(whole: int, part: int, step: int) -> list[tuple[int, int]]:
        found = []
        for i in range(max(whole - part + step - 1, 0) // step + 1):
            end = min(i * step + part, whole)
            found.append((max(end - part, 0), end))
        return found

    rows, columns = (spans(*sizes) for sizes in zip(size, window, stride, strict=True))
    found = windows(size, window, stride)
    assert found == [(top, left, bottom, right) for top, bottom in rows for left, right in columns]
    assert len({(bottom - top, right - left) for top, left, bottom, right in found}) == 1
    for i, whole in enumerate(size):
        seen = {x for box in found for x in range(box[i], box[i + 2])}
        assert seen == set(range(whole))


def test_windows_of_the_protocol():
    """512 every 341 in a 512x683 picture; smaller, equal and one pixel larger than the window."""
    assert windows((512, 683), (512, 512), (341, 341)) == [(0, 0, 512, 512), (0, 171, 512, 683)]
    assert windows((300, 512), (512, 512), (341, 341)) == [(0, 0, 300, 512)]
    assert windows((513, 512), (512, 512), (341, 341)) == [(0, 0, 512, 512), (1, 0, 513, 512)]
    assert len(windows((1024, 2048), (512, 1024), (341, 683))) == 3 * 3
    for stride in (0, 513):
        with pytest.raises(AssertionError, match=f"a stride of {stride} .* windows of 512: give 1..512"):
            windows((600, 600), (512, 512), (341, stride))


@torch.no_grad()
def test_overlapping_windows_are_averaged(tagging, image):
    """Pixel by pixel over the windows that see it; tag logits are the highest of all windows."""
    window, stride = (30, 45), (20, 45)
    tada, boxes = tagging, windows((H, W), window, stride)
    assert len(boxes) == 6 and boxes[-1] == (10, 55, 40, 100)
    total, count, tags = torch.zeros(2, K, H, W), torch.zeros(H, W), []
    for top, left, bottom, right in boxes:
        output = tada(image[:, :, top:bottom, left:right], TAGS)
        logits = F.interpolate(output.prediction.main, scale_factor=8, mode="bilinear")
        total[:, :, top:bottom, left:right] += logits[:, :, : bottom - top, : right - left]
        count[top:bottom, left:right] += 1
        tags.append(output.condition.logits)
    logits, tag_logits = tada.slide(image, TAGS, window, stride)
    assert count.max() == 4 and error(logits, total / count) <= BAR
    assert torch.equal(tag_logits, torch.stack(tags).amax(dim=0))
    predicted = inference.predict(tada, image, TAGS, window=window, stride=stride)
    assert torch.equal(predicted.labels, (total / count).argmax(dim=1))
    assert torch.equal(predicted.tag_logits, tag_logits)
    assert (predicted.labels != inference.predict(tada, image, TAGS).labels).any()


def scores(image: Tensor) -> Tensor:
    """Logits `(B, K, H, W)` that each pixel's own colour decides."""
    mixed = torch.linspace(-9, 9, 3 * K).reshape(3, K)
    return torch.einsum("BCHW,CK->BKHW", image, mixed).cos() * 5


@pytest.mark.parametrize("window", [None, (64, 64), (33, 70)])
def test_padding_never_leaks(tagging, image, window, monkeypatch):
    """A model that reads colours, and is sure of class 0 in the padding, is right all over the picture."""

    def read(part: Tensor, tags: object) -> Output:
        return Output(Logits(tagging.padded(scores(part), 1e9), None), Condition(None))

    monkeypatch.setattr(tagging, "forward", read)
    predicted = tagging.predict(image, window=window, stride=window and (20, 33))
    assert torch.equal(predicted.labels, scores(image).argmax(dim=1)) and predicted.tag_logits is None
    assert (predicted.labels == 0).any(dim=0).float().mean() < 0.9


@pytest.mark.parametrize("base", [None, (42, 70)])
@torch.no_grad()
def test_scales_and_flip_are_averaged(tagging, image, base):
    """The mean softmax at the output's size, of every scale of the base and its mirror image."""
    tada, size, mean, tags = tagging, (61, 97), 0, []
    for scale in (1.0, 1.5):
        h, w = (int(scale * side + 0.5) for side in base or (H, W))
        scaled = image
        if (h, w) != (H, W):
            scaled = F.interpolate(image, (h, w), mode="bilinear", antialias=True)
        for mirrored in (False, True):
            output = tada(scaled.flip(3) if mirrored else scaled, TAGS)
            logits = F.interpolate(output.prediction.main, scale_factor=8, mode="bilinear")[..., :h, :w]
            logits = logits.flip(3) if mirrored else logits
            mean = mean + F.interpolate(logits, size, mode="bilinear").softmax(dim=1) / 4
            tags.append(output.condition.logits)
    predicted = inference.predict(tada, image, TAGS, size=size, base=base, scales=(1.0, 1.5), flip=True)
    assert predicted.labels.shape == (2, *size) and predicted.labels.dtype == torch.int64
    sure = mean.topk(2, dim=1).values.diff(dim=1)[:, 0].abs() > 1e-4
    assert torch.equal(predicted.labels[sure], mean.argmax(dim=1)[sure]) and sure.float().mean() > 0.99
    assert error(predicted.tag_logits, torch.stack(tags).mean(dim=0)) <= BAR


@pytest.mark.parametrize(("small", "size"), [((9, 13), (50, 31)), ((40, 21), (17, 60)), ((1, 1), (6, 4))])
@pytest.mark.parametrize("rows", [1, 5])
def test_strips_are_the_whole(small, size, rows, monkeypatch):
    """However few rows are read at once, larger or smaller: the vote is that of whole maps."""
    maps = [3 * torch.randn(2, K, *small), 3 * torch.randn(2, K, small[1], small[0])]
    probabilities = [F.interpolate(x, size, mode="bilinear").softmax(dim=1) for x in maps]
    mean = sum(probabilities) / 2
    assert torch.equal(vote(maps, size), mean.argmax(dim=1))
    monkeypatch.setattr(model, "STRIP", rows * 2 * K * size[1])
    labels = vote(maps, size)
    sure = mean.topk(2, dim=1).values.diff(dim=1)[:, 0].abs() > 1e-5
    assert torch.equal(labels[sure], mean.argmax(dim=1)[sure]) and sure.float().mean() > 0.99
    for top in range(0, size[0], rows):
        part = model.resize_rows(maps[0], size, top, min(top + rows, size[0]))
        whole = F.interpolate(maps[0], size, mode="bilinear")
        assert error(part, whole[:, :, top : top + rows]) <= BAR


@pytest.mark.parametrize("size", [(1, 1), (1, 130), (65, 3), (64, 128), (63, 129)])
def test_any_size(tagging, size):
    """From one pixel on, whole and in windows."""
    image = torch.rand(2, 3, *size) * 2 - 1
    for window in (None, (64, 64)):
        labels, tag_logits = tagging.predict(image, TAGS, window=window)
        assert labels.shape == (2, *size) and 0 <= labels.min() and labels.max() < K
        assert tag_logits.shape == (2, K) and tag_logits.isfinite().all()


@torch.no_grad()
def test_tags_from_clip_are_the_whole_picture_s(image, monkeypatch):
    """Those likelier than chance, best first, are told to every window, scale and mirror image."""
    tada = make(tags="clip")
    tada.clip.logit_scale.fill_(3.0)
    found = tada.zero_shot_tags(image)
    embedding = F.normalize(tada.clip.image(image)[1], dim=-1)
    assert error(tada.names, name_vectors(tada.clip, tada.tokenizer, NAMES, TEMPLATES, shared=True)) <= BAR
    for p, tags in zip((20.0855369 * embedding @ tada.names.T).softmax(dim=-1), found, strict=True):
        likely = [NAMES[k] for k in p.argsort(descending=True) if p[k] >= 1 / K]
        assert [name for name, _ in tags] == likely and 1 <= len(likely) < K
        assert [x for _, x in tags] == pytest.approx([float(p[NAMES.index(name)]) for name in likely])

    calls, forward = [], tada.forward

    def listen(part: Tensor, tags: list[list[str]]) -> Output:
        calls.append(tags)
        return forward(part, tags)

    monkeypatch.setattr(tada, "forward", listen)
    words = [[name for name, _ in tags] for tags in found]
    inference.predict(tada, image, window=(50, 60), scales=(1.0, 1.25), flip=True)
    assert len(calls) == 2 * (1 * 2 + 1 * 3) and all(call == words for call in calls)
    calls.clear()
    inference.predict(tada, image, TAGS)
    assert calls == [TAGS]  # whoever names tags is obeyed


def test_only_such_a_model_tags(tagging, image):
    with pytest.raises(AssertionError, match="the tags come from classes: train with --tags clip"):
        tagging.tag(image)


# Building


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder of `tiny` weights in the official layout, and the reference models that are in it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    return folder, *tiny_folder(folder)


@pytest.fixture
def weights(tiny, tmp_path) -> Path:
    """The same files, to be changed."""
    shutil.copytree(tiny[0], tmp_path / "weights", ignore=shutil.ignore_patterns(".vectors"))
    return tmp_path / "weights"


def test_the_weights_are_the_files(weights, tiny):
    """Every tensor of the reference's files is in the model; names and classes are its text tower's."""
    _, unet, vae, clip = tiny
    tada = build(config(weights=str(weights), tags="clip", adapter_start="empty"))
    for ours, reference in ((tada.unet, unet), (tada.vae, vae), (tada.clip, clip)):
        state = ours.state_dict()
        for name, x in reference.state_dict().items():
            assert name.endswith("position_ids") or torch.equal(state[name], x), name
    with torch.no_grad():
        ids = tada.tokenizer([f"a photo of a {name}" for name in NAMES])
        assert error(tada.adapter.classes, clip.text_model(ids).pooler_output) <= BAR
        empty = clip.text_model(tada.tokenizer([""])).last_hidden_state[0, :32]
        assert error(tada.adapter.empty, empty) <= BAR
    assert tada.names.shape == (K, 128) and torch.allclose(tada.names.norm(dim=1), torch.ones(K))
    assert not any(p.is_meta for p in tada.parameters())


def kept(weights: Path) -> list[str]:
    return sorted(file.name for file in (weights / ".vectors").iterdir())


def test_vectors_are_kept(weights, monkeypatch):
    """A second start reads no name; another list, other prompts, another CLIP or another vocabulary do."""
    options = {"weights": str(weights), "tags": "clip", "classes": ("sea", "snow")}
    first = build(config(**options))
    first.learn(["car", "harbour"], keep=True)
    first.learn(["owl"])  # a word alone is not kept
    before = kept(weights)
    assert len(before) == 3 and all(re.fullmatch(r"[0-9a-f]{32}\.safetensors", name) for name in before)

    asked = []
    compute = vectors_file.name_vectors
    monkeypatch.setattr(vectors_file, "name_vectors", lambda *a: asked.append(a[2]) or compute(*a))
    again = build(config(**options))
    again.learn(["harbour", "car"], keep=True)
    assert not asked and kept(weights) == before
    for x, y in zip(
        (first.names, first.adapter.classes, first.vectors["car"]),
        (again.names, again.adapter.classes, again.vectors["car"]),
        strict=True,
    ):
        assert torch.equal(x, y)

    build(config(**options | {"tags": "classes", "classes": ("snow", "sea")}))
    build(config(**options | {"tags": "classes", "templates": 80}))
    assert asked == [("snow", "sea"), ("sea", "snow")] and len(kept(weights)) == 5

    other = build(config())  # another CLIP in the same folder
    save_file(other.clip.state_dict(), weights / "clip" / "model.safetensors")
    third = build(config(**options | {"tags": "classes"}))
    assert len(asked) == 4 and error(third.adapter.classes, first.adapter.classes) > 0.1

    file = weights / "tokenizer" / "vocab.json"
    vocabulary = json.loads(file.read_text())
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(vocabulary))
    build(config(**options | {"tags": "classes"}))
    assert len(asked) == 5


def test_files_are_hashed_once(weights, monkeypatch):
    """CLIP's has 1.7 GB: lists of words are many, and must not read it again."""
    read, digest = [], vectors_file.digest
    monkeypatch.setattr(vectors_file, "digest", lambda file: read.append(file.name) or digest(file))
    tada = build(config(weights=str(weights), tags="clip"))
    tada.cache_words(["car", "harbour"], keep=True)
    assert sorted(read) == ["merges.txt", "model.safetensors", "vocab.json"]


def test_a_cut_off_file_of_vectors_is_made_anew(weights):
    first = build(config(weights=str(weights)))
    (name,) = kept(weights)
    file = weights / ".vectors" / name
    file.write_bytes(file.read_bytes()[:100])
    assert torch.equal(build(config(weights=str(weights))).adapter.classes, first.adapter.classes)
    assert torch.equal(load_file(file)["vectors"], first.adapter.classes)


@pytest.mark.parametrize("fault", ["read-only", "full"])
def test_vectors_that_cannot_be_kept_are_no_error(weights, fault, monkeypatch):
    """A shared folder, a full disk: nothing is left there, and the model is the same."""
    if fault == "read-only":
        (weights / ".vectors").write_bytes(b"")  # in the place of the folder: root may write anywhere
        weights.chmod(0o555)
    else:

        def full(tensors: dict, file: Path) -> None:
            file.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(vectors_file, "save_file", full)
    tada = build(config(weights=str(weights)))
    weights.chmod(0o755)
    expected = tada.clip.text(tada.tokenizer([f"a photo of a {name}" for name in NAMES]))[1]
    assert error(tada.adapter.classes, expected) <= BAR
    assert fault == "read-only" or not kept(weights)


def test_random_weights_keep_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    build(config(tags="clip")).learn(["car"])
    assert not list(tmp_path.iterdir())


def test_the_seed_makes_the_model():
    """All that is new comes from torch's global random state."""
    first, same, other = (torch.manual_seed(seed) and build(config()).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(x, same[name]) for name, x in first.items())
    assert not torch.equal(first["adapter.queries"], other["adapter.queries"])
    assert not torch.equal(first["decoder.classifier.1.weight"], other["decoder.classifier.1.weight"])


@pytest.mark.parametrize(
    ("decoder", "size", "parameters"), [("fpn", "sd15", 7_433_366), ("upernet", "sd15", 38_696_236)]
)
def test_sizes_of_the_paper_s_model(decoder, size, parameters):
    """The adapter of 768 and decoders of 256 and 512 (see their tests), for 150 classes; tiny is smaller."""
    settings = config(model=size, decoder=decoder, classes=tuple(map(str, range(150))), dropout=0.1)
    with torch.device("meta"):
        adapter = model.make_adapter(settings, CLIPConfig(), torch.empty(77, 768), torch.empty(150, 768))
        head = model.make_decoder(settings, UNetConfig())
    assert sum(x.numel() for x in adapter.parameters()) == 25_612_034
    assert sum(x.numel() for x in head.parameters()) == parameters
    assert {x.p for x in head.modules() if isinstance(x, nn.Dropout2d)} == {0.1}
    small = model.make_decoder(replace(settings, model="tiny"), UNetConfig.tiny())
    assert sum(x.numel() for x in small.parameters()) < parameters / 10


@pytest.mark.parametrize("pixels", ["deformable", "fpn"])
def test_mask2former_is_the_paper_s(pixels):
    """100 queries, 9 layers, width 256 for COCO's 133 classes; tiny has 20, 3 and 64."""
    settings = config(
        model="sd15",
        decoder="mask2former",
        pixel_decoder=pixels,
        classes=tuple(map(str, range(133))),
        things=(True,) * 80 + (False,) * 53,
    )
    with torch.device("meta"):
        head = model.make_decoder(settings, UNetConfig())
        small = model.make_decoder(replace(settings, model="tiny"), UNetConfig.tiny())
    assert (head.query_features.shape, len(head.layers)) == ((100, 256), 9)
    assert (small.query_features.shape, len(small.layers)) == ((20, 64), 3)
    assert head.class_head.out_features == 134 and head.channels == tuple(UNetConfig().channels)
    kinds = {"deformable": DeformablePixelDecoder, "fpn": PyramidPixelDecoder}
    assert type(head.pixel_decoder) is kinds[pixels]


@pytest.mark.parametrize(("size", "heads"), [("sd15", 8), ("tiny", 4)])
def test_settings_of_the_adapter(size, heads):
    """Each reaches it, and none is its default."""
    settings = config(model=size, queries=5, blocks=3, adapter_start="random")
    clip = CLIPConfig() if size == "sd15" else CLIPConfig.tiny()
    with torch.device("meta"):
        adapter = model.make_adapter(
            settings, clip, torch.empty(77, clip.text.width), torch.empty(K, clip.text.width)
        )
    assert adapter.queries.shape == (5, clip.text.width) and len(adapter.blocks) == 3 and adapter.g is None
    assert {block.attend_text.heads for block in adapter.blocks} == {heads}
    assert adapter.image.in_features == clip.image.width


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"model": "sd21"}, "there is no model 'sd21': choose sd15 or tiny"),
        ({"condition": "tags"}, "there is no condition 'tags': choose none, caption, .* or oracle"),
        ({"decoder": "mask"}, "there is no decoder 'mask': choose fpn, upernet or mask2former"),
        ({"decoder": "mask2former"}, "--decoder mask2former must know .* 5 classes are things, .*"),
        ({"templates": 7}, "--templates 7: choose 1 or 80"),
    ],
)
def test_what_cannot_be_built(options, sentence):
    with pytest.raises(ModelError, match=f"^{sentence}$"):
        build(config(**options))


@pytest.mark.parametrize("part", ["vae", "unet", "clip", "tokenizer"])
def test_absent_weights_are_named(weights, part):
    """With the command that gets them."""
    shutil.rmtree(weights / part)
    with pytest.raises((WeightsError, FileNotFoundError), match=rf"{part}.*weights\.(fetch|pretrain)"):
        build(config(weights=str(weights)))
