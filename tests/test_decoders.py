"""decoders.py equals plain references: predictions, losses, gradients; and it refuses wrong inputs.

Semantic FPN against a functional version written here from mmsegmentation's `FPN` and `FPNHead`; UperNet
against transformers' heads, their BatchNorms replaced by GroupNorm.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from oracle import shake
from proof import BAR, error
from torch import Tensor, nn
from transformers import UperNetConfig
from transformers.models.upernet.modeling_upernet import UperNetConvModule, UperNetFCNHead, UperNetHead

from decoders import Logits, SemanticFPN, UperNet
from kernels import upsampled_cross_entropy

CHANNELS, CLASSES, GROUPS = (16, 24, 32, 40), 7, 4
H, W = 128, 192
SMALL = {"channels": CHANNELS, "classes": CLASSES, "groups": GROUPS, "dropout": 0.0}


def pyramid(B: int = 2, height: int = H, width: int = W, channels=CHANNELS) -> list[Tensor]:
    """Four random maps at strides 8, 16, 32, 64."""
    return [torch.randn(B, C, height // (8 << i), width // (8 << i)) for i, C in enumerate(channels)]


def example_labels() -> Tensor:
    """Two label maps of which the first is a third ignored, the second not at all."""
    labels = torch.randint(CLASSES, (2, H, W))
    labels[0, :, : W // 3] = 255
    return labels


def fpn() -> SemanticFPN:
    decoder = shake(SemanticFPN(width=24, **SMALL))
    nn.init.normal_(decoder.classifier[1].weight)  # at its start of 0.01, the bias would hide it
    return decoder


def upernet() -> UperNet:
    decoder = shake(UperNet(width=24, auxiliary_width=16, **SMALL))
    nn.init.normal_(decoder.classifier[1].weight)
    nn.init.normal_(decoder.auxiliary_head[1][1].weight)
    return decoder


def plain_fpn(p: dict[str, Tensor], features: list[Tensor], groups: int) -> Tensor:
    """Semantic FPN's logits, level by level, from weights `p` by name."""

    def norm_relu(x: Tensor, name: str) -> Tensor:
        return F.relu(F.group_norm(x, groups, p[name + ".weight"], p[name + ".bias"], eps=1e-5))

    def twice(x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)

    c8, c16, c32, c64 = (
        F.conv2d(x, p[f"lateral_convs.{i}.weight"], p[f"lateral_convs.{i}.bias"])
        for i, x in enumerate(features)
    )
    c32 = c32 + c64.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)  # nearest neighbour
    c16 = c16 + c32.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    c8 = c8 + c16.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    c8, c16, c32, c64 = (
        F.conv2d(x, p[f"fpn_convs.{i}.weight"], p[f"fpn_convs.{i}.bias"], padding=1)
        for i, x in enumerate((c8, c16, c32, c64))
    )

    def step(x: Tensor, name: str) -> Tensor:
        return norm_relu(F.conv2d(x, p[name + ".0.weight"], padding=1), name + ".1")

    s8 = step(c8, "scale_heads.0.0")
    s16 = twice(step(c16, "scale_heads.1.0"))
    s32 = twice(step(twice(step(c32, "scale_heads.2.0")), "scale_heads.2.2"))
    s64 = twice(step(c64, "scale_heads.3.0"))
    s64 = twice(step(twice(step(s64, "scale_heads.3.2")), "scale_heads.3.4"))
    return F.conv2d(s8 + s16 + s32 + s64, p["classifier.1.weight"], p["classifier.1.bias"])


def reference_heads(ours: UperNet, channels: tuple[int, ...], groups: int) -> nn.ModuleDict:
    """transformers' two heads with GroupNorm and with our weights."""
    classes, width = ours.classifier[1].weight.shape[:2]
    config = UperNetConfig(
        hidden_size=width, num_labels=classes, auxiliary_channels=ours.auxiliary_head[1][1].in_channels
    )
    assert list(config.pool_scales) == [1, 2, 3, 6] and config.auxiliary_loss_weight == 0.4
    heads = nn.ModuleDict()
    heads["main"], heads["auxiliary"] = UperNetHead(config, channels), UperNetFCNHead(config, channels)
    for module in heads.modules():
        if isinstance(module, UperNetConvModule):
            module.batch_norm = nn.GroupNorm(groups, module.conv.out_channels)
    weights = ours.state_dict()
    heads.load_state_dict({name: weights.pop(our_name(name)) for name in heads.state_dict()})
    assert not weights  # every weight of ours has its counterpart
    return heads


def our_name(name: str) -> str:
    name = name.replace(".conv.", ".0.").replace(".batch_norm.", ".1.")
    name = name.replace("classifier.", "classifier.1.")
    name = name.replace("main.psp_modules", "pyramid_pooling").removeprefix("main.")
    name = name.replace("auxiliary.convs.0", "auxiliary_head.0")
    return name.replace("auxiliary.classifier.1", "auxiliary_head.1.1")


def plain_loss(logits: Tensor, labels: Tensor) -> Tensor:
    logits = F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=False)
    return F.cross_entropy(logits, labels, ignore_index=255, reduction="sum")


@pytest.mark.parametrize(("B", "height", "width"), [(2, 128, 192), (1, 64, 64), (2, 192, 64)])
def test_semantic_fpn_equals_the_plain_version(B, height, width):
    """Logits at the finest map's size, and no auxiliary ones."""
    decoder, features = fpn(), pyramid(B, height, width)
    prediction = decoder(features)
    assert prediction.main.shape == (B, CLASSES, height // 8, width // 8)
    assert prediction.auxiliary is None
    assert error(prediction.main, plain_fpn(decoder.state_dict(), features, GROUPS)) <= BAR


@pytest.mark.parametrize(("B", "height", "width"), [(2, 128, 192), (1, 64, 64), (2, 448, 128)])
def test_upernet_equals_transformers(B, height, width):
    """Both heads; the coarsest maps are 2x3, 1x1 (one image, where BatchNorm fails) and 7x2."""
    decoder, features = upernet(), pyramid(B, height, width)
    heads = reference_heads(decoder, CHANNELS, GROUPS)
    prediction = decoder(features)
    assert prediction.main.shape == (B, CLASSES, height // 8, width // 8)
    assert prediction.auxiliary.shape == (B, CLASSES, height // 32, width // 32)
    assert error(prediction.main, heads["main"](features)) <= BAR
    assert error(prediction.auxiliary, heads["auxiliary"](features)) <= BAR


def test_gradients_of_semantic_fpn_equal_the_plain_version():
    """The loss, and its gradient for every weight and feature map."""
    decoder, features, labels = fpn(), pyramid(), example_labels()
    weights = {name: x.detach().clone().requires_grad_() for name, x in decoder.named_parameters()}
    theirs = [x.clone().requires_grad_() for x in features]
    ours = [x.requires_grad_() for x in features]

    losses = decoder.loss(decoder(ours), labels)
    expected = plain_loss(plain_fpn(weights, theirs, GROUPS), labels)
    assert list(losses) == ["seg"]
    total, count = losses["seg"]
    assert total.dtype == torch.float32 and count.dtype == torch.int64
    assert count == H * W + H * W * 2 // 3
    assert error(total, expected) <= BAR

    total.backward()
    expected.backward()
    for name, parameter in decoder.named_parameters():
        assert error(parameter.grad, weights[name].grad) <= BAR, name
    for x, y in zip(ours, theirs):
        assert error(x.grad, y.grad) <= BAR


def test_gradients_of_upernet_equal_transformers():
    """Both losses, the auxiliary one times 0.4, and the gradient of their sum for every weight and feature
    map.
    """
    decoder, features, labels = upernet(), pyramid(), example_labels()
    heads = reference_heads(decoder, CHANNELS, GROUPS)
    theirs = [x.clone().requires_grad_() for x in features]
    ours = [x.requires_grad_() for x in features]

    losses = decoder.loss(decoder(ours), labels)
    expected = {
        "seg": plain_loss(heads["main"](theirs), labels),
        "aux": 0.4 * plain_loss(heads["auxiliary"](theirs), labels),
    }
    assert list(losses) == ["seg", "aux"]
    for name, (total, count) in losses.items():
        assert count == H * W + H * W * 2 // 3
        assert error(total, expected[name]) <= BAR, name

    sum(total for total, _ in losses.values()).backward()
    sum(expected.values()).backward()
    weights = dict(decoder.named_parameters())
    for name, parameter in heads.named_parameters():
        assert error(weights[our_name(name)].grad, parameter.grad) <= BAR, name
    for x, y in zip(ours, theirs):
        assert error(x.grad, y.grad) <= BAR


def test_loss_by_hand():
    """Probabilities 1/4 and 3/4 of one logit pixel under three label pixels: class 0, class 1, ignored."""
    logits = torch.tensor([0.0, math.log(3)]).reshape(1, 2, 1, 1).requires_grad_()
    total, count = upsampled_cross_entropy(logits, torch.tensor([[[0, 1, 255]]]))
    assert total.item() == pytest.approx(math.log(4) + math.log(4 / 3))
    assert count == 2
    total.backward()
    assert logits.grad.flatten().tolist() == pytest.approx([2 / 4 - 1, 2 * 3 / 4 - 1])


def test_another_label_can_be_ignored():
    """`ignore` names it; 255 is only the default."""
    total, count = upsampled_cross_entropy(torch.zeros(1, 4, 1, 1), torch.tensor([[[3, 3, 1]]]), ignore=3)
    assert total.item() == pytest.approx(math.log(4))
    assert count == 1


def test_labels_by_hand():
    """Two pixels widened to four: weights 1, 3/4, 1/4, 0 of the left one; the classes cross between 3/4 and
    1/4.
    """
    main = torch.tensor([[[[4.0, 0.0]], [[1.0, 2.0]]], [[[0.0, 4.0]], [[3.0, 3.0]]]])  # (2, 2, 1, 2)
    decoder, prediction = fpn(), Logits(main, None)
    logits = decoder.logits(prediction, (1, 4))
    assert logits[0].tolist() == [[[4.0, 3.0, 1.0, 0.0]], [[1.0, 1.25, 1.75, 2.0]]]
    assert logits[1].tolist() == [[[0.0, 1.0, 3.0, 4.0]], [[3.0, 3.0, 3.0, 3.0]]]
    labels = decoder.labels(prediction, (2, 4))
    assert labels.dtype == torch.int64
    assert labels[0].tolist() == [[0, 0, 1, 1]] * 2
    assert labels[1, 0, [0, 1, 3]].tolist() == [1, 1, 0]  # the third is a tie


@pytest.mark.parametrize("build", [fpn, upernet])
def test_logits_and_labels_at_any_size(build):
    """Logits and labels of the main head only, at an odd size."""
    decoder, features = build(), pyramid()
    prediction = decoder(features)
    logits = decoder.logits(prediction, (75, 101))
    expected = F.interpolate(prediction.main, size=(75, 101), mode="bilinear", align_corners=False)
    assert error(logits, expected) <= BAR
    assert torch.equal(decoder.labels(prediction, (75, 101)), expected.argmax(1))


@pytest.mark.parametrize("build", [fpn, upernet])
def test_an_ignored_batch_has_zero_gradients(build):
    """Sums and counts of 0, and a graph whose gradients are all zeros: DDP needs them."""
    decoder = build()
    losses = decoder.loss(decoder(pyramid()), torch.full((2, H, W), 255))
    for total, count in losses.values():
        assert total == 0 and count == 0
    sum(total / count.clamp(min=1) for total, count in losses.values()).backward()
    assert all((parameter.grad == 0).all() for parameter in decoder.parameters())


@pytest.mark.parametrize("build", [fpn, upernet])
def test_a_batch_is_the_sum_of_its_images(build):
    """In training too, with unequal counts: how a batch is split over processes does not matter."""
    decoder, features, labels = build().train(), pyramid(), example_labels()
    whole = decoder.loss(decoder(features), labels)
    parts = [decoder.loss(decoder([x[i : i + 1] for x in features]), labels[i : i + 1]) for i in range(2)]
    for name, (total, count) in whole.items():
        assert parts[0][name][1] != parts[1][name][1]
        assert error(total, parts[0][name][0] + parts[1][name][0]) <= BAR
        assert count == parts[0][name][1] + parts[1][name][1]


@pytest.mark.parametrize("build", [fpn, upernet])
@pytest.mark.parametrize("ignored", ["some", "all"])
def test_counts_are_known_before_the_losses(build, ignored):
    """From the labels only: the same scalars, to the type, that come with each part of the loss."""
    decoder = build()
    labels = example_labels() if ignored == "some" else torch.full((2, H, W), 255)
    counts = decoder.counts(labels)
    for name, (_, count) in decoder.loss(decoder(pyramid()), labels).items():
        assert torch.equal(counts[name], count) and counts[name].dtype == count.dtype
    assert counts["seg"] == (H * W * 5 // 3 if ignored == "some" else 0)


@pytest.mark.parametrize("build", [fpn, upernet])
def test_losses_and_predictions_are_float32_under_autocast(build):
    """bfloat16 logits are upsampled and summed in float32; one labelled pixel, since over many the roundings
    average out.
    """
    decoder, features, labels = build(), pyramid(), torch.full((2, H, W), 255)
    labels[1, 50, 60] = 3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prediction = decoder(features)
        losses = decoder.loss(prediction, labels)
        logits = decoder.logits(prediction, (H, W))
    assert prediction.main.dtype == torch.bfloat16
    assert all(total.dtype == torch.float32 for total, _ in losses.values())
    assert error(losses["seg"][0], plain_loss(prediction.main.float(), labels)) <= BAR
    assert logits.dtype == torch.float32
    expected = F.interpolate(prediction.main.float(), size=(H, W), mode="bilinear", align_corners=False)
    assert error(logits, expected) <= BAR


@pytest.mark.parametrize("build", [fpn, upernet])
def test_training_and_evaluation_predict_the_same(build):
    """Without dropout: the same type and the same numbers."""
    decoder, features = build(), pyramid()
    trained, evaluated = decoder.train()(features), decoder.eval()(features)
    assert type(trained) is type(evaluated) is Logits
    for x, y in zip(trained, evaluated):
        assert x is y is None or torch.equal(x, y)


@pytest.mark.parametrize("decoder_class", [SemanticFPN, UperNet])
def test_dropout_takes_whole_channels(decoder_class):
    """With an identity classifier each channel of an image is either 0 or doubled."""
    decoder = decoder_class(CHANNELS, classes=32, width=32, groups=4, dropout=0.5)
    nn.init.dirac_(decoder.classifier[1].weight)
    features = pyramid()
    kept, dropped = decoder.eval()(features).main, decoder.train()(features).main
    gone = (dropped == 0).all(dim=(2, 3))  # (B, 32)
    assert 10 <= gone.sum() <= 54 and not torch.equal(gone[0], gone[1])
    assert error(dropped, 2 * kept * ~gone[:, :, None, None]) <= BAR


def test_sizes_at_full_width():
    """Parameters counted by hand for Stable Diffusion's maps and 150 classes."""
    with torch.device("meta"):
        fpn, upernet = SemanticFPN(), UperNet()
    maps = 320 + 640 + 1280 + 1280
    norm = 2  # a GroupNorm's weight and bias per channel
    laterals, outputs = (maps + 4) * 256, 4 * (9 * 256 + 1) * 256
    scale_heads = (1 + 1 + 2 + 3) * (9 * 256 + norm) * 256
    total = laterals + outputs + scale_heads + (256 + 1) * 150
    assert sum(x.numel() for x in fpn.parameters()) == total == 7_433_366

    pooling = 4 * (1280 + norm) * 512
    bottleneck = (9 * (1280 + 4 * 512) + norm) * 512
    laterals = (320 + 640 + 1280 + 3 * norm) * 512
    outputs, fusion = 3 * (9 * 512 + norm) * 512, (9 * 4 * 512 + norm) * 512
    auxiliary = (9 * 1280 + norm) * 256 + (256 + 1) * 150
    total = pooling + bottleneck + laterals + outputs + fusion + (512 + 1) * 150 + auxiliary
    assert sum(x.numel() for x in upernet.parameters()) == total == 38_696_236


def test_initialisation_equals_mmsegmentation():
    """Xavier-uniform pyramid of FPN, He-normal (fan out) before norms, N(0, 0.01) classifiers, biases 0,
    norms 1 and 0.
    """
    fpn, upernet = SemanticFPN(width=64), UperNet(width=64, auxiliary_width=64)
    for conv in [*fpn.lateral_convs, *fpn.fpn_convs]:
        _, fan_in, k, _ = conv.weight.shape
        limit = math.sqrt(6 / ((fan_in + 64) * k * k))
        assert 0.99 * limit < conv.weight.abs().max() <= limit
    for head in (fpn.scale_heads[3][2], upernet.bottleneck, upernet.lateral_convs[0]):
        k = head[0].kernel_size[0]
        assert head[0].weight.std().item() == pytest.approx(math.sqrt(2 / (64 * k * k)), rel=0.03)
    for classifier in (fpn.classifier, upernet.classifier, upernet.auxiliary_head[1]):
        assert classifier[1].weight.std().item() == pytest.approx(0.01, rel=0.05)
    for decoder in (fpn, upernet):
        for name, parameter in decoder.named_parameters():
            if parameter.ndim == 1:
                assert (parameter == (0 if name.endswith("bias") else 1)).all(), name


@pytest.mark.parametrize("build", [fpn, upernet])
def test_wrong_features_are_refused(build):
    """Coarsest first; of an unpadded image; one too few."""
    decoder, features = build(), pyramid()
    with pytest.raises(AssertionError, match=r"\(40, 32, 24, 16\) channels.*finest first"):
        decoder(features[::-1])
    with pytest.raises(AssertionError, match=r"\(16, 23\).*pad the image to multiples of 64"):
        decoder([features[0][..., :23], *features[1:]])
    with pytest.raises(AssertionError, match="pass all of them"):
        decoder(features[:3])


def test_wrong_labels_are_refused():
    """Another type, a one-hot axis, another batch."""
    decoder = fpn()
    prediction = decoder(pyramid())
    with pytest.raises(AssertionError, match=r"torch.uint8 \(2, 128, 192\).*int64"):
        decoder.loss(prediction, torch.zeros(2, H, W, dtype=torch.uint8))
    with pytest.raises(AssertionError, match=r"\(2, 1, 128, 192\): give one int64 map per image"):
        decoder.loss(prediction, torch.zeros(2, 1, H, W, dtype=torch.int64))
    with pytest.raises(AssertionError, match=r"\(3, 128, 192\).*\(2, H, W\)"):
        decoder.loss(prediction, torch.zeros(3, H, W, dtype=torch.int64))


def test_groups_of_one_channel_are_refused():
    """The 1x1 pooled map would be normalised to a constant."""
    with pytest.raises(
        AssertionError, match="width 8 is too small.*at least two channels in each of 8 groups"
    ):
        UperNet(CHANNELS, width=8, groups=8)


@pytest.mark.slow
def test_full_width_equals_the_references():
    """Stable Diffusion's maps, 150 classes."""
    fpn, upernet = shake(SemanticFPN()), shake(UperNet())
    features = pyramid(2, 64, 128, fpn.channels)
    with torch.no_grad():
        assert error(fpn(features).main, plain_fpn(fpn.state_dict(), features, 32)) <= BAR
        heads, prediction = reference_heads(upernet, upernet.channels, 32), upernet(features)
        assert error(prediction.main, heads["main"](features)) <= BAR
        assert error(prediction.auxiliary, heads["auxiliary"](features)) <= BAR
