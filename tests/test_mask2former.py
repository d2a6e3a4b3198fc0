"""mask2former.py equals transformers' Mask2Former and plain references: predictions, losses, gradients,
panoptic and instance segmentation.

The reference has a tiny random configuration and gets the same maps (lab/bench_mask2former.py). Its weights
are copied to ours by name.
"""

import math
import os
from functools import partial
from shutil import which
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from oracle import SMALL_MASK2FORMER as SMALL
from oracle import reference_mask2former as reference
from oracle import shake, wake
from proof import error
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

import mask2former as module
from lab.bench_mask2former import our_names, run_peer, twice
from mask2former import (
    DeformableAttention,
    Instances,
    Mask2Former,
    Panoptic,
    PredictedSegment,
    Queries,
    Target,
    attention_mask,
    deformable_attention,
    match,
    matching_costs,
    pixel_centres,
    uncertain_points,
)
from run.compiled import OPTIONS

BAR = 1e-4  # relative RMS error
CHANNELS, THINGS, LAYERS, QUERIES = (SMALL[x] for x in ("channels", "things", "layers", "queries"))
K = len(THINGS)
H, W = 64, 128


def copied(model: Mask2FormerForUniversalSegmentation, **options) -> Mask2Former:
    """Our decoder with the reference's weights, all of them and no others."""
    ours = Mask2Former(**SMALL | options)
    ours.load_state_dict(our_names(model.state_dict()))
    return ours


def pyramid(B: int = 2, height: int = H, width: int = W, channels=CHANNELS) -> list[Tensor]:
    return [torch.randn(B, C, height // (8 << i), width // (8 << i)) for i, C in enumerate(channels)]


def segments(*numbers: int, height: int = H, width: int = W) -> list[Target]:
    """Targets with the given numbers of segments: rectangles, which may overlap."""
    targets = []
    for T in numbers:
        masks = torch.zeros(T, height, width, dtype=torch.bool)
        for mask in masks:
            y, x = torch.randint(height - 8, ()), torch.randint(width - 8, ())
            mask[y : y + 8 + torch.randint(height // 2, ()), x : x + 8 + torch.randint(width // 2, ())] = True
        targets.append(Target(torch.randint(K, (T,)), masks))
    return targets


def run_reference(model, features: list[Tensor], targets: list[Target] | None = None) -> SimpleNamespace:
    """Its output; features are at our strides."""
    labels = {}
    if targets is not None:
        labels["mask_labels"] = [x.masks.float() for x in targets]
        labels["class_labels"] = [x.classes for x in targets]
    return run_peer(model, features, output_auxiliary_logits=True, **labels)


def total(losses: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
    return sum(x / count.clamp(min=1) for x, count in losses.values())


def steady(*shape: int, device: torch.device) -> Tensor:
    """As `torch.rand`, but each row is the same, whatever their number."""
    rows, *rest = shape
    return torch.rand(rest, generator=torch.Generator().manual_seed(rest[0])).expand(rows, *rest)


# ---- the model


@pytest.mark.parametrize(("B", "height", "width"), [(2, 64, 128), (1, 128, 64)])
def test_predictions_equal_transformers(B, height, width):
    """The pixel decoder's four maps, and the predictions before the first layer and after each."""
    model, features = reference(), pyramid(B, height, width)
    decoder = copied(model)
    with torch.no_grad():
        expected = model.model.pixel_level_module.decoder([twice(x) for x in features])
        finest, maps = decoder.pixel_decoder(features)
        assert finest.shape == (B, 64, height // 4, width // 4)
        assert error(finest, expected.mask_features) <= BAR
        for x, y in zip(maps, expected.multi_scale_features, strict=True):
            assert error(x, y) <= BAR

        output, prediction = run_reference(model, features), decoder(features)
    assert len(prediction.classes) == len(prediction.masks) == LAYERS + 1
    layers = [*(x.values() for x in output.auxiliary_logits)]
    layers.append((output.masks_queries_logits, output.class_queries_logits))
    for i, (masks, classes) in enumerate(layers):
        assert error(prediction.masks[i], masks) <= BAR, i
        assert error(prediction.classes[i], classes) <= BAR, i
        assert i == 0 or error(prediction.masks[i], prediction.masks[i - 1]) > 0.1  # a layer does something


@pytest.mark.parametrize("numbers", [(3, 5), (0, 4), (9, 2)])
def test_gradients_equal_transformers(numbers):
    """Equal seeds, equal points: the total loss, and its gradient for every weight and map; with an empty
    image, and with more segments than queries.
    """
    model, features, targets = reference(), pyramid(), segments(*numbers)
    decoder = copied(model)
    theirs = [x.clone().requires_grad_() for x in features]
    ours = [x.requires_grad_() for x in features]

    torch.manual_seed(1)
    expected = run_reference(model, theirs, targets).loss
    torch.manual_seed(1)
    losses = decoder.loss(decoder(ours), targets)
    assert list(losses) == ["class", "mask", "dice"]
    assert all(x.dtype == count.dtype == torch.float32 for x, count in losses.values())
    assert losses["mask"][1] == losses["dice"][1] == sum(numbers)
    assert error(total(losses), expected) <= BAR

    expected.backward()
    total(losses).backward()
    gradients = our_names({name: x.grad for name, x in model.named_parameters()})
    for name, parameter in decoder.named_parameters():
        if name.endswith("attention.k.bias"):  # softmax is invariant to it: the gradient is rounding error
            assert parameter.grad.abs().max() < 1e-4 and gradients[name].abs().max() < 1e-4
        else:
            assert error(parameter.grad, gradients[name]) <= BAR, name
    for x, y in zip(ours, theirs):
        assert error(x.grad, y.grad) <= BAR


def test_matching_equals_transformers():
    """The same pairs for the same points."""
    model = reference()
    classes, masks = torch.randn(3, QUERIES, K + 1), 3 * torch.randn(3, QUERIES, H // 4, W // 4)
    targets = segments(4, 12, 1)
    torch.manual_seed(1)
    with torch.no_grad():
        labels = [x.masks.float() for x in targets], [x.classes for x in targets]
        expected = model.criterion.matcher(masks, classes, *labels)
    torch.manual_seed(1)
    matches = match(matching_costs(classes, masks, targets, 300, [torch.rand] * len(targets)))
    for ours, theirs, T in zip(matches, expected, (4, 12, 1), strict=True):
        assert len(ours[0]) == min(T, QUERIES)
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


def test_points_equal_transformers():
    """Equal seeds, equal points, but for their order."""
    logits = torch.randn(5, H // 4, W // 4)
    torch.manual_seed(1)
    expected = reference().criterion
    torch.manual_seed(1)
    expected = expected.sample_points_using_uncertainty(
        logits[:, None], expected.calculate_uncertainty, 300, 3, 0.75
    )
    torch.manual_seed(1)
    points = uncertain_points(logits, torch.ones(5, 1, 2), 300, torch.rand)
    assert points.shape == (5, 300, 2)
    for ours, theirs in zip(points, expected):
        assert sorted(map(tuple, ours.tolist())) == sorted(map(tuple, theirs.tolist()))


def test_points_are_at_most_a_quarter_of_the_pixels():
    """12,544 are asked for; a 64x128 image gets 2,048: for each image's matching, then for two masks."""
    decoder, shapes = Mask2Former(**SMALL | {"points": 12_544, "layers": 0}), []

    def rand(*shape: int, device: torch.device) -> Tensor:
        shapes.append(shape)
        return torch.rand(shape)

    decoder.loss(decoder(pyramid()), segments(2, 0), rand)
    drawn = [shape for shape in shapes if shape[0]]  # the second image has no masks
    assert drawn == [(1, 2048, 2), (1, 2048, 2), (2, 3 * 2048, 2), (2, 512, 2)]


def test_deformable_attention_equals_a_loop():
    """Per image, query, head, level and point: the four pixels around it; outside is 0."""
    B, N, n, d, P = 2, 5, 2, 3, 4
    sizes = [(2, 3), (4, 5), (1, 2)]
    value = torch.randn(B, sum(h * w for h, w in sizes), n, d)
    points = torch.rand(B, N, n, 3, P, 2) * 1.6 - 0.3
    weights = torch.rand(B, N, n, 3, P)
    expected = torch.zeros(B, N, n, d)
    for b, q, head, level, p in torch.cartesian_prod(*map(torch.arange, (B, N, n, 3, P))).tolist():
        start, (h, w) = sum(h * w for h, w in sizes[:level]), sizes[level]
        x, y = (points[b, q, head, level, p] * torch.tensor([w, h]) - 0.5).tolist()
        for i in (math.floor(y), math.floor(y) + 1):
            for j in (math.floor(x), math.floor(x) + 1):
                if 0 <= i < h and 0 <= j < w:
                    share = (1 - abs(y - i)) * (1 - abs(x - j)) * weights[b, q, head, level, p]
                    expected[b, q, head] += share * value[b, start + i * w + j, head]
    assert error(deformable_attention(value, sizes, points, weights), expected.flatten(2)) <= 1e-5


def test_deformable_attention_starts_on_rays():
    """Of 8 heads: head k reads the squares around a pixel in direction k, with equal weights."""
    attention = DeformableAttention(32, 8)
    offsets = attention.sampling_offsets.bias.view(8, 3, 4, 2)
    rays = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]  # x, y
    for distance in (1, 2, 3, 4):
        expected = torch.tensor(rays)[:, None] * float(distance)
        assert torch.allclose(offsets[:, :, distance - 1], expected.expand(8, 3, 2), atol=1e-6)
    # In the middle of a map whose values are x, all heads together read x itself.
    size, attention.output_proj, attention.value_proj = (16, 16), nn.Identity(), nn.Identity()
    x = pixel_centres(size, torch.device("cpu"))[None, :, :1].expand(-1, -1, 32)
    maps = [x, torch.zeros_like(x), torch.zeros_like(x)]
    centres = pixel_centres(size, torch.device("cpu")).repeat(3, 1)
    read = attention(torch.cat(maps, 1), torch.zeros(32), centres, [size] * 3)[0, :256].view(16, 16, 8, 4)
    assert error(3 * read.mean(2)[4:12, 4:12], x.view(16, 16, 32)[4:12, 4:12, :4]) <= 1e-5


def test_a_query_with_an_empty_mask_attends_to_all():
    """A query attends to the pixels of its mask at the level's size; to all pixels if there is none."""
    masks = torch.full((1, 3, 4, 8), -1.0)
    masks[0, 1, :, :4] = 1.0
    masks[0, 2, 0, 0] = 2.0  # gone at half the size: the mean of four pixels is below 0
    allowed = attention_mask(masks.requires_grad_(), (2, 4))
    assert allowed.dtype == torch.bool and not allowed.requires_grad
    assert allowed[0].view(3, 2, 4).tolist() == [
        [[True] * 4] * 2,
        [[True, True, False, False]] * 2,
        [[True] * 4] * 2,
    ]
    assert attention_mask(torch.full((1, 1, 4, 8), math.nan), (2, 4)).all()


# ---- the loss


def test_counts_are_known_before_the_losses():
    """From the targets only, by hand: 3 + 0 + 7 of 21 queries have a segment; 11 segments."""
    decoder, targets = Mask2Former(**SMALL), segments(3, 0, 8)
    counts = decoder.counts(targets)
    assert counts["class"].item() == pytest.approx(10 + 0.1 * 11)
    assert counts["mask"] == counts["dice"] == 11
    losses = decoder.loss(decoder(pyramid(3)), targets)
    assert all(torch.equal(losses[name][1], count) for name, count in counts.items())


def test_a_batch_is_the_sum_of_its_images():
    """However a batch is split over processes: losses, and gradients over the counts of all."""
    decoder, features, targets = wake(shake(Mask2Former(**SMALL))).train(), pyramid(3), segments(2, 0, 9)
    whole = decoder.loss(decoder(features), targets, steady)
    counts = {name: count for name, (_, count) in whole.items()}
    total(whole).backward()
    expected = {name: x.grad.clone() for name, x in decoder.named_parameters()}
    decoder.zero_grad()

    sums = dict.fromkeys(whole, 0)
    for part in (slice(0, 2), slice(2, 3)):  # two processes
        losses = decoder.loss(decoder([x[part] for x in features]), targets[part], steady)
        sum(x / counts[name] for name, (x, _) in losses.items()).backward()
        sums = {name: sums[name] + torch.stack([x.detach() for x in losses[name]]) for name in sums}
    for name, (x, count) in whole.items():
        assert error(sums[name], torch.stack([x, count])) <= 1e-5
    for name, x in decoder.named_parameters():
        if not name.endswith("attention.k.bias"):
            assert error(x.grad, expected[name]) <= BAR, name


def test_points_do_not_depend_on_the_batch():
    """With one generator per image its losses are the same in any batch, at any position."""
    decoder, features, targets = Mask2Former(**SMALL), pyramid(3), segments(2, 0, 9)
    order = [2, 0, 1]
    predictions = decoder(features), decoder([x[order] for x in features])
    for i, index in enumerate(order):
        losses = []
        for prediction, place in zip(predictions, (index, i)):
            rand = partial(torch.rand, generator=torch.Generator().manual_seed(index))
            single = Queries(*(tuple(x[place : place + 1] for x in part) for part in prediction))
            losses.append(total(decoder.loss(single, [targets[index]], rand)))
        assert error(*losses) <= 1e-5


def test_images_without_segments():
    """Only crowd or void: only the class loss, and a graph in which every parameter has a gradient."""
    decoder = Mask2Former(**SMALL)
    prediction = decoder(pyramid())
    losses = decoder.loss(prediction, segments(0, 0))
    assert losses["mask"] == losses["dice"] == (0, 0)
    labels = torch.full((2 * QUERIES,), K)
    expected = sum(
        0.1 * F.cross_entropy(x.flatten(0, 1), labels, reduction="sum") for x in prediction.classes
    )
    assert error(losses["class"][0], 2 * expected) <= 1e-5
    total(losses).backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in decoder.parameters())


def test_a_perfect_prediction_costs_nothing():
    """By hand: sure and right, matched in the order of the segments' queries."""
    target = Target(torch.tensor([3, 1]), torch.zeros(2, H, W, dtype=torch.bool))
    target.masks[0, :, : W // 2], target.masks[1, :, W // 2 :] = True, True
    masks = torch.full((1, QUERIES, H // 4, W // 4), -30.0)
    masks[0, 4, :, : W // 8], masks[0, 2, :, W // 8 :] = 30.0, 30.0
    labels = torch.full((QUERIES,), K)
    labels[4], labels[2] = 3, 1
    classes = 30.0 * F.one_hot(labels)[None]
    ((queries, matched),) = match(matching_costs(classes, masks, [target], 300, [torch.rand]))
    assert queries.tolist() == [2, 4] and matched.tolist() == [1, 0]

    decoder = Mask2Former(**SMALL)
    losses = decoder.loss(Queries((classes,), (masks,)), [target], lambda *s, device: 0.2 * torch.rand(s))
    assert losses["class"][0] < 1e-6 and losses["mask"][1] == 2
    assert losses["mask"][0] < 0.2 * 5 * 2 * 30  # points on the border of the image, whose outside is 0
    sure = decoder.loss(Queries((classes,), (masks,)), [target], lambda *s, device: 0.1 + 0.2 * torch.rand(s))
    assert sure["mask"][0] < 1e-5 and sure["dice"][0] < 1e-4


def test_padding_has_no_loss():
    """Predictions in the padding have no effect."""
    decoder = Mask2Former(**SMALL)
    prediction = decoder(pyramid(1))
    (target,) = segments(4)
    target.masks[:, 48:], target.masks[:, :, 64:] = False, False
    changed = [x.clone() for x in prediction.masks]
    for x in changed:
        x[:, :, 13:], x[:, :, :, 17:] = 40.0, 40.0  # one cell is between them
    for size, equal in ((None, False), ((48, 64), True)):
        losses = [
            total(decoder.loss(Queries(prediction.classes, x), [target._replace(size=size)], steady))
            for x in (prediction.masks, tuple(changed))
        ]
        assert equal == torch.equal(*losses)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_costs_that_are_not_finite_make_the_loss_nan(value):
    """Also of a query that no segment is matched to; the reference hides them."""
    decoder = Mask2Former(**SMALL)
    prediction = decoder(pyramid())
    for query in range(QUERIES):
        masks = prediction.masks[-1].detach().clone()
        masks[1, query] = value
        losses = decoder.loss(prediction._replace(masks=(*prediction.masks[:-1], masks)), segments(2, 2))
        assert losses["class"][0].isnan()


def test_wrong_targets_are_refused():
    decoder, (a, b) = Mask2Former(**SMALL), segments(2, 2)
    prediction = decoder(pyramid())
    with pytest.raises(AssertionError, match="1 targets for 2 images"):
        decoder.loss(prediction, [a])
    with pytest.raises(AssertionError, match="torch.float32 masks: pass int64 and bool"):
        decoder.loss(prediction, [a, b._replace(masks=b.masks.float())])
    with pytest.raises(AssertionError, match=r"\(2, 64, 64\): pass \(2, 64, 128\)"):
        decoder.loss(prediction, [a, b._replace(masks=b.masks[..., :64])])
    with pytest.raises(AssertionError, match=r"\(1, 64, 128\): pass \(2, 64, 128\), one per class"):
        decoder.loss(prediction, [a, b._replace(masks=b.masks[:1])])
    with pytest.raises(AssertionError, match="finest first"):
        decoder(pyramid()[::-1])


def test_losses_and_predictions_are_float32_under_autocast():
    """The pixel decoder too: positions within a pixel need it."""
    decoder, features, targets = Mask2Former(**SMALL), pyramid(), segments(3, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prediction = decoder([x.bfloat16() for x in features])
        finest, _ = decoder.pixel_decoder(features)
        losses = decoder.loss(prediction, targets, steady)
        semantic = decoder.semantic(prediction, (H, W))
    assert prediction.masks[-1].dtype == torch.bfloat16 and finest.dtype == torch.float32
    assert semantic.dtype == torch.float32 and all(x.dtype == torch.float32 for x, _ in losses.values())
    full = Queries(*(tuple(x.float() for x in part) for part in prediction))
    assert error(total(losses), total(decoder.loss(full, targets, steady))) <= 1e-6


def test_learns_in_bfloat16_as_in_float32(monkeypatch):
    """Autocast around forward and loss: predictions, loss and gradient within a few of bfloat16's
    roundings (2^-8); matching and mask losses run in float32.
    """
    decoder = wake(shake(Mask2Former(**SMALL)))
    features, targets, dtypes = pyramid(), segments(3, 5), []

    def spy(name: str):
        called = getattr(module, name)

        def record(*args):
            dtypes.append({x.dtype for x in args[:2]})
            return called(*args)

        monkeypatch.setattr(module, name, record)

    spy("matching_costs"), spy("mask_losses")
    results = []
    for enabled in (False, True):
        decoder.zero_grad()
        maps = [x.clone().requires_grad_() for x in features]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            prediction = decoder(maps)
            loss = total(decoder.loss(prediction, targets, steady))
        loss.backward()
        gradients = [x.grad.flatten() for x in (*maps, *decoder.parameters())]
        assert all(x.dtype == torch.float32 for x in gradients)
        results.append((prediction, loss, torch.cat(gradients)))
    assert prediction.masks[-1].dtype == prediction.classes[-1].dtype == torch.bfloat16
    assert dtypes == [{torch.float32}] * 2 * 2 * (LAYERS + 1)
    (full, loss, gradient), (half, other, another) = results
    for x, y in zip((*half.classes, *half.masks), (*full.classes, *full.masks), strict=True):
        assert error(x, y) <= 0.03
    assert error(other, loss) <= 0.005
    assert error(another, gradient) <= 0.05


class Made(TorchDispatchMode):
    """The tensors that every operation made: its name, their sizes and dtypes."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        if isinstance(result, Tensor):
            self.made.append((func.overloadpacket.__name__, result.shape, result.dtype))
        return result


@pytest.mark.parametrize("layers", [1, 4])
def test_masks_become_numbers_once(layers):
    """For all layers together, however many."""
    decoder, targets = Mask2Former(**SMALL | {"layers": layers}), segments(3, 4)
    prediction = decoder(pyramid())
    with Made() as operations:
        decoder.loss(prediction, targets, steady)
    copies = [shape[0] for name, shape, _ in operations.made if name == "_to_copy" and shape[1:] == (H, W)]
    assert copies == [3, 4]


def compiled(layers: int, pixel_layers: int, **how) -> None:
    """The decoder compiled in place, as train.py does it, has the same gradients."""
    sizes = SMALL | {"layers": layers, "pixel_layers": pixel_layers}
    decoder = wake(shake(Mask2Former(**sizes)))
    features, targets, results = pyramid(), segments(3, 5), []
    for compile in (False, True):
        if compile:
            decoder.compile(**how)
        decoder.zero_grad()
        maps = [x.clone().requires_grad_() for x in features]
        prediction = decoder(maps)
        total(decoder.loss(prediction, targets, steady)).backward()
        gradients = {name: x.grad.clone() for name, x in decoder.named_parameters()}
        results.append((prediction, gradients | dict(enumerate(x.grad for x in maps))))
    (plain, gradients), (other, others) = results
    assert error(other.masks[-1], plain.masks[-1]) <= 1e-5
    assert error(other.classes[-1], plain.classes[-1]) <= 1e-5
    for name, x in gradients.items():
        if not str(name).endswith("attention.k.bias"):
            assert error(others[name], x) <= BAR, name


def test_is_one_graph():
    """torch.compile traces forward and backward whole, for any backend."""
    compiled(1, 1, backend="aot_eager", fullgraph=True)


@pytest.mark.sweep
def test_learns_compiled():
    """As train.py --compile has it: without its option, no gradient comes through the pyramid."""
    if not which("c++"):
        message = "torch.compile needs a C++ compiler"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    compiled(3, 1, options=OPTIONS, fullgraph=True)


def test_overfits_two_images():
    """Fixed maps, 60 steps: each segment is found, with its class and its pixels."""
    decoder = Mask2Former(**SMALL | {"layers": 3})
    features, targets = pyramid(), segments(0, 0)
    masks = torch.zeros(2, 2, H, W, dtype=torch.bool)
    masks[:, 0, :32], masks[:, 1, 32:] = True, True
    targets = [Target(torch.tensor(x), mask) for x, mask in zip(([0, 1], [2, 4]), masks)]
    optimizer = torch.optim.AdamW(decoder.parameters(), 1e-3)
    for _ in range(60):
        optimizer.zero_grad()
        total(decoder.loss(decoder(features), targets)).backward()
        nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
    for read, target in zip(decoder.eval().panoptic(decoder(features), (H, W)), targets):
        assert sorted(x.label for x in read.segments) == target.classes.tolist()
        for segment in read.segments:
            ours, mask = read.ids == segment.id, target.masks[target.classes.tolist().index(segment.label)]
            assert (ours & mask).sum() / (ours | mask).sum() > 0.9


# ---- from a prediction to segments


def plain_panoptic(classes: Tensor, masks: Tensor, score: float, overlap: float) -> Panoptic:
    """Pixel by pixel, query by query; masks `(Q, H, W)` at the final size."""
    probabilities = [x.softmax(-1).tolist() for x in classes]
    kept = [
        (q, p.index(max(p)), max(p))
        for q, p in enumerate(probabilities)
        if p.index(max(p)) < K and max(p) > score
    ]
    ids, listed, stuff = torch.zeros(masks.shape[1:], dtype=torch.int64), [], {}
    best = {}
    for y, x in torch.cartesian_prod(*map(torch.arange, masks.shape[1:])).tolist():
        sure = [p * masks[q, y, x].sigmoid() for q, _, p in kept]
        if sure:
            best[y, x] = kept[max(range(len(kept)), key=sure.__getitem__)][0]
    for q, label, p in kept:
        own = [at for at, winner in best.items() if winner == q]
        drawn = [at for at in own if masks[q][at] >= 0]
        whole = (masks[q] >= 0).sum().item()
        if not drawn or len(own) / whole < overlap:
            continue
        if label in stuff:
            number = stuff[label]
            listed[number - 1] = listed[number - 1]._replace(score=max(listed[number - 1].score, p))
        else:
            listed.append(PredictedSegment(len(listed) + 1, label, p))
            number = len(listed)
            if not THINGS[label]:
                stuff[label] = number
        for at in drawn:
            ids[at] = number
    return Panoptic(ids, listed)


def blobs(B: int, Q: int, h: int, w: int) -> Tensor:
    """Smooth mask logits, positive in a part of the image."""
    coarse = 4 * torch.randn(B, Q, h // 4, w // 4) - 1
    return F.interpolate(coarse, size=(h, w), mode="bilinear", align_corners=False)


@pytest.mark.parametrize(("score", "overlap"), [(0.8, 0.8), (0.0, 0.8), (0.3, 0.3)])
def test_panoptic_equals_the_plain_version(score, overlap):
    """Void, dropped segments, merged stuff; at another size than the padded image's."""
    decoder = Mask2Former(**SMALL)
    classes, masks = 5 * torch.randn(6, 8, K + 1), blobs(6, 8, 16, 32)
    highest, second = masks.topk(2, dim=1).values.split(1, dim=1)
    masks = 3 * (masks - torch.where(masks == highest, second, highest))  # their shares of the image,
    masks = masks + 2 * torch.randn(6, 8, 1, 1)  # some too large, some too small
    prediction = Queries((classes,), (masks,))
    padded, real, size = (64, 128), (52, 100), (20, 30)
    final = F.interpolate(masks, size=padded, mode="bilinear", align_corners=False)[..., :52, :100]
    final = F.interpolate(final, size=size, mode="bilinear", align_corners=False)
    count = 0
    for i, read in enumerate(decoder.panoptic(prediction, padded, real, size, score, overlap)):
        expected = plain_panoptic(classes[i], final[i], score, overlap)
        assert torch.equal(read.ids, expected.ids) and read.ids.dtype == torch.int64
        assert [x[:2] for x in read.segments] == [x[:2] for x in expected.segments]
        assert [x.score for x in read.segments] == pytest.approx([x.score for x in expected.segments])
        assert set(read.ids.unique().tolist()) - {0} == {x.id for x in read.segments}
        count += len(read.segments)
    assert count > 3


def test_panoptic_by_hand():
    """Two patches of a stuff class are one segment; a thing half hidden is dropped and leaves void."""
    decoder = Mask2Former(**SMALL)
    masks = torch.full((1, 5, 4, 8), -9.0)
    masks[0, 0, :, :2], masks[0, 1, :, 6:] = 9.0, 9.0  # class 1, stuff, left and right
    masks[0, 2, :2, 2:6], masks[0, 3, :, 2:6] = 9.0, 9.0  # class 0, things: one in front of half of the other
    labels, sure = torch.tensor([[1, 1, 0, 0, K]]), torch.tensor([6.0, 9.0, 9.0, 5.0, 9.0])
    classes = sure[:, None] * F.one_hot(labels)
    (read,) = decoder.panoptic(Queries((classes,), (masks,)), (4, 8))
    assert [x[:2] for x in read.segments] == [(1, 1), (2, 0)]
    assert read.segments[0].score == classes[0, 1].softmax(0).max()
    assert read.ids.tolist() == [[1, 1, 2, 2, 2, 2, 1, 1]] * 2 + [[1, 1, 0, 0, 0, 0, 1, 1]] * 2
    (read,) = decoder.panoptic(Queries((classes,), (masks,)), (4, 8), overlap=0.5)
    assert [x.label for x in read.segments] == [1, 0, 0] and (read.ids > 0).all()
    (read,) = decoder.panoptic(Queries((classes,), (masks - 20,)), (4, 8))  # sure, but nowhere
    assert not read.segments and (read.ids == 0).all()
    (read,) = decoder.panoptic(Queries((classes,), (masks,)), (4, 8), (3, 5), (6, 10), score=1.0)
    assert read == (read.ids, []) and read.ids.tolist() == [[0] * 10] * 6
    equal = 9.0 * F.one_hot(torch.tensor([[0, 1, K]])).float(), torch.full((1, 3, 4, 8), 9.0)
    (read,) = decoder.panoptic(Queries(equal[:1], equal[1:]), (4, 8))
    assert [x.label for x in read.segments] == [0] and (read.ids == 1).all(), "of equal queries, the first"


def test_segments_make_no_tensor_of_all_masks():
    """The largest one has the pixels of one mask, with 4 queries and with 40; of instances, the largest of
    numbers, a view of which has them twice.
    """
    decoder = Mask2Former(**SMALL)
    for Q in (4, 40):
        classes = 9.0 * F.one_hot(torch.arange(Q) % K, K + 1)
        with Made() as operations:
            decoder.panoptic(Queries((classes[None],), (torch.randn(1, Q, 8, 8),)), (32, 32), size=(96, 96))
        assert max(shape.numel() for _, shape, _ in operations.made) == 96 * 96
        with Made() as operations:
            decoder.instances(Queries((classes[None],), (torch.randn(1, Q, 8, 8),)), (32, 32), size=(96, 96))
        assert max(x.numel() for _, x, dtype in operations.made if dtype != torch.bool) == 2 * 96 * 96


def test_panoptic_equals_transformers():
    """Where the two rules agree: sure classes, and every pixel inside its owner's mask. Theirs compares score
    x probability with 1/2, draws outside of the mask, and reads masks at 384x384 alone.
    """
    decoder, Q = Mask2Former(**SMALL), 6
    owner = blobs(2, Q, 96, 96).argmax(1).repeat_interleave(4, 1).repeat_interleave(4, 2)  # (2, 384, 384)
    masks = 20.0 * F.one_hot(owner, Q).movedim(3, 1) - 10
    masks[:, 0, :, :200] += 12.0  # hides others or is hidden: some are dropped
    labels = torch.tensor([[0, 2, 1, 1, 4, K], [3, 3, 4, 4, 1, 0]])
    classes = 20.0 * F.one_hot(labels, K + 1) + torch.rand(2, Q, K + 1)
    output = SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks)
    fused = {i for i, thing in enumerate(THINGS) if not thing}
    expected = Mask2FormerImageProcessorPil().post_process_panoptic_segmentation(
        output, threshold=0.8, label_ids_to_fuse=fused
    )
    reads = decoder.panoptic(Queries((classes,), (masks,)), (384, 384))
    for read, theirs in zip(reads, expected, strict=True):
        label = {x["id"]: x["label_id"] for x in theirs["segments_info"]}
        assert {x.label for x in read.segments} == set(label.values()) and len(read.segments) >= 2
        theirs = torch.stack([theirs["segmentation"] == x for x in label])
        ours = torch.stack([read.ids == x.id for x in read.segments])
        for mask in ours:  # they give a fused segment that is not the newest an id, and count on from it
            assert any(torch.equal(mask, x) for x in theirs)


def test_instances_equal_transformers():
    """All classes things, every pair asked for, at their one size."""
    decoder, Q = Mask2Former(**SMALL | {"things": (True,) * K}), 6
    classes, masks = 2 * torch.randn(2, Q, K + 1), blobs(2, Q, 96, 96)
    masks = F.interpolate(masks, size=(384, 384), mode="bilinear", align_corners=False)
    output = SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks)
    expected = Mask2FormerImageProcessorPil().post_process_instance_segmentation(
        output, threshold=0.0, return_binary_maps=True
    )
    reads = decoder.instances(Queries((classes,), (masks,)), (384, 384), top=Q)
    for read, theirs in zip(reads, expected, strict=True):
        info = theirs["segments_info"]
        order = sorted(range(len(info)), key=lambda i: -info[i]["score"])
        assert read.labels.tolist() == [info[i]["label_id"] for i in order]
        assert read.scores.tolist() == pytest.approx([info[i]["score"] for i in order], abs=1e-5)
        assert torch.equal(read.masks, theirs["segmentation"][order].bool())


def test_instances_by_hand():
    """Things alone, of the best pairs; the score is that of the class times that of the mask."""
    decoder = Mask2Former(**SMALL)
    masks = torch.full((1, 2, 4, 8), -9.0)
    masks[0, 0, :2], masks[0, 1, :, 4:] = 2.0, 1.0
    shares = torch.tensor([[0.5, 0.3, 0.1, 0.05, 0.03, 0.02], [0.1, 0.6, 0.25, 0.02, 0.02, 0.01]])
    (read,) = decoder.instances(Queries((shares.log()[None],), (masks,)), (4, 8), top=4)
    assert isinstance(read, Instances)
    assert read.labels.tolist() == [0, 2]  # the pairs are .6 and .3 of class 1, stuff; .5 of 0 and .25 of 2
    certainty = torch.tensor([2.0, 1.0]).sigmoid()
    assert torch.allclose(read.scores, torch.tensor([0.5, 0.25]) * certainty)
    assert torch.equal(read.masks, masks[0] > 0)
    (none,) = decoder.instances(Queries((shares.log()[None],), (masks,)), (4, 8), top=1)
    assert none.masks.shape == (0, 4, 8)


def test_semantic_equals_transformers():
    """Class scores at their one size; logits follow from them."""
    decoder = Mask2Former(**SMALL)
    classes, masks = 2 * torch.randn(2, 6, K + 1), blobs(2, 6, 32, 32)
    prediction = Queries((classes,), (masks,))
    output = SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks)
    expected = Mask2FormerImageProcessorPil().post_process_semantic_segmentation(
        output, return_segmentation_scores=True
    )
    semantic = decoder.semantic(prediction, (384, 384))
    for ours, theirs in zip(semantic, expected, strict=True):
        assert error(ours, theirs.segmentation_scores) <= 1e-5
    shares = decoder.logits(prediction, (384, 384)).softmax(1)
    assert error(shares, semantic / semantic.sum(1, keepdim=True)) <= 1e-5


# ---- sizes and initialisation


def test_sizes_at_full_width():
    """As many parameters as the reference's decoder, with its defaults, on Stable Diffusion's maps."""
    config = Mask2FormerConfig()
    assert (config.decoder_layers, config.encoder_layers, config.num_queries) == (10, 6, 100)
    assert (config.hidden_dim, config.num_attention_heads, config.train_num_points) == (256, 8, 12_544)
    assert (config.encoder_feedforward_dim, config.dim_feedforward) == (4 * 256, 8 * 256)
    assert (config.class_weight, config.mask_weight, config.dice_weight) == (2, 5, 5)
    assert (config.no_object_weight, config.oversample_ratio, config.importance_sample_ratio) == (
        0.1,
        3,
        0.75,
    )
    with torch.device("meta"):
        model = Mask2FormerForUniversalSegmentation(config)
        decoder = Mask2Former()
    theirs = sum(x.numel() for x in model.parameters())
    theirs -= sum(x.numel() for x in model.model.pixel_level_module.encoder.parameters())
    more_maps = sum(decoder.channels) - sum(model.model.pixel_level_module.decoder.feature_channels)
    more_classes = 133 - config.num_labels
    expected = theirs + 256 * more_maps + 257 * more_classes
    assert sum(x.numel() for x in decoder.parameters()) == expected


def test_initialisation_equals_upstream():
    """Xavier-uniform everywhere, but N(0, 1) queries and levels and PyTorch's own heads; queries, keys and
    values as parts of one matrix, three times as wide.
    """
    for name, x in Mask2Former(**SMALL | {"queries": 50}).named_parameters():
        if "embed" in name or "query_" in name:
            assert 0.8 < x.std() < 1.2, name
        elif "sampling_offsets" in name or "attention_weights" in name:
            assert name.endswith("offsets.bias") or (x == 0).all(), name
        elif x.ndim > 1:
            fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(x)
            if "head" in name:
                limit = fan_in**-0.5
            elif name.endswith((".q.weight", ".k.weight", ".v.weight")):
                limit = math.sqrt(6 / (fan_in + 3 * fan_out))
            else:
                limit = math.sqrt(6 / (fan_in + fan_out))
            assert 0.95 * limit < x.abs().max() <= limit, name
        elif not name.startswith(("class_head", "mask_head")) and ".ffn." not in name:
            norm = "norm" in name or name.endswith((".1.weight", ".2.weight"))
            assert (x == (1 if norm and name.endswith("weight") else 0)).all(), name


@pytest.mark.slow
def test_full_size_equals_the_reference():
    """Nine layers, 100 queries, width 256."""
    options = {"feature_size": 256, "mask_feature_size": 256, "hidden_dim": 256, "num_attention_heads": 8}
    options |= {"encoder_feedforward_dim": 1024, "dim_feedforward": 2048, "encoder_layers": 6}
    model = reference(**options, decoder_layers=10, num_queries=100, train_num_points=1000)
    decoder = copied(model, width=256, heads=8, pixel_layers=6, layers=9, queries=100, points=1000)
    features, targets = pyramid(1, 128, 192), segments(12, height=128, width=192)
    with torch.no_grad():
        torch.manual_seed(1)
        output, prediction = run_reference(model, features, targets), decoder(features)
        torch.manual_seed(1)
        losses = decoder.loss(prediction, targets)
    assert error(prediction.classes[-1], output.class_queries_logits) <= BAR
    assert error(prediction.masks[-1], output.masks_queries_logits) <= BAR
    assert error(total(losses), output.loss) <= BAR
