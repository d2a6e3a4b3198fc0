"""inference.py: images of any size, windows, scales, flips; CLIP's tags are those of the whole image.

Attention maps are tested in tests/test_predict.py, segments in tests/test_mask2former.py.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from proof import BAR, error
from tiny_tada import NAMES, TAGS, H, K, W, make
from torch import Tensor

import inference
from adapter import Condition
from clip import TEMPLATES, name_vectors
from decoders import Logits
from errors import ModelError
from inference import predict, vote, windows
from model import Output, Tada


@pytest.fixture(scope="module")
def tagging() -> Tada:
    """Shared by all tests of this file: do not modify it."""
    torch.manual_seed(0)
    return make()


@pytest.fixture
def image() -> Tensor:
    return torch.rand(2, 3, H, W) * 2 - 1


sides = st.integers(1, 200)


@given(st.tuples(sides, sides), st.tuples(sides, sides), st.tuples(sides, sides))
def test_windows_are_mmsegmentation_s(size, window, stride):
    """Its formula; every pixel is in a window, and all windows have the same size."""
    stride = tuple(min(pair) for pair in zip(stride, window, strict=True))

    def spans(whole: int, part: int, step: int) -> list[tuple[int, int]]:
        intervals = []
        for i in range(max(whole - part + step - 1, 0) // step + 1):
            end = min(i * step + part, whole)
            intervals.append((max(end - part, 0), end))
        return intervals

    rows, columns = (spans(*sizes) for sizes in zip(size, window, stride, strict=True))
    boxes = windows(size, window, stride)
    assert boxes == [(top, left, bottom, right) for top, bottom in rows for left, right in columns]
    assert len({(bottom - top, right - left) for top, left, bottom, right in boxes}) == 1
    for i, whole in enumerate(size):
        covered = {x for box in boxes for x in range(box[i], box[i + 2])}
        assert covered == set(range(whole))


def test_windows_of_the_protocol():
    """512 every 341 in a 512x683 image; smaller, equal and one pixel larger than the window."""
    assert windows((512, 683), (512, 512), (341, 341)) == [(0, 0, 512, 512), (0, 171, 512, 683)]
    assert windows((300, 512), (512, 512), (341, 341)) == [(0, 0, 300, 512)]
    assert windows((513, 512), (512, 512), (341, 341)) == [(0, 0, 512, 512), (1, 0, 513, 512)]
    assert len(windows((1024, 2048), (512, 1024), (341, 683))) == 3 * 3
    for stride in (0, 513):
        with pytest.raises(AssertionError, match=f"a stride of {stride} .* windows of 512: give 1..512"):
            windows((600, 600), (512, 512), (341, stride))


@torch.no_grad()
def test_overlapping_windows_are_averaged(tagging, image):
    """Per pixel, over the windows that contain it; tag logits are the maximum over all windows."""
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
    logits, tag_logits = inference.slide(tada, image, TAGS, window, stride)
    assert count.max() == 4 and error(logits, total / count) <= BAR
    torch.testing.assert_close(tag_logits, torch.stack(tags).amax(dim=0))  # to rounding: read together
    predicted = predict(tada, image, TAGS, window=window, stride=stride)
    assert torch.equal(predicted.labels, (total / count).argmax(dim=1))
    assert torch.equal(predicted.tag_logits, tag_logits)
    assert (predicted.labels != predict(tada, image, TAGS).labels).any()


@pytest.mark.parametrize(("pixels", "calls"), [(2 * 30 * 45, 6), (9 * 30 * 45, 2), (2**18, 1)])
def test_windows_are_read_together(tagging, image, pixels, calls, monkeypatch):
    """As many as `BATCH` lets; each window's tags are its image's, so results stay."""
    how = {"window": (30, 45), "stride": (20, 45)}
    monkeypatch.setitem(inference.BATCH, "cpu", 1)
    labels, tag_logits, *_ = predict(tagging, image, TAGS, **how)
    sizes, forward = [], tagging.forward
    monkeypatch.setitem(inference.BATCH, "cpu", pixels)
    monkeypatch.setattr(tagging, "forward", lambda x, *rest: sizes.append(len(x)) or forward(x, *rest))
    result = predict(tagging, image, TAGS, **how)
    assert len(sizes) == calls and sum(sizes) == 2 * 6
    assert torch.equal(result.labels, labels) and error(result.tag_logits, tag_logits) <= BAR


def scores(image: Tensor) -> Tensor:
    """Logits `(B, K, H, W)`, a function of each pixel's own colour."""
    mixed = torch.linspace(-9, 9, 3 * K).reshape(3, K)
    return torch.einsum("BCHW,CK->BKHW", image, mixed).cos() * 5


@pytest.mark.parametrize("window", [None, (64, 64), (33, 70)])
def test_padding_never_leaks(tagging, image, window, monkeypatch):
    """A model that classifies colours, and gives class 0 a huge logit in the padding, is right everywhere."""

    def classify_colours(part: Tensor, tags: object, seen: object) -> Output:
        return Output(Logits(tagging.padded(scores(part), 1e9), None), Condition(None))

    monkeypatch.setattr(tagging, "forward", classify_colours)
    predicted = predict(tagging, image, window=window, stride=window and (20, 33))
    assert torch.equal(predicted.labels, scores(image).argmax(dim=1)) and predicted.tag_logits is None
    assert (predicted.labels == 0).any(dim=0).float().mean() < 0.9


@pytest.mark.parametrize("base", [None, (42, 70)])
@torch.no_grad()
def test_scales_and_flip_are_averaged(tagging, image, base):
    """The mean softmax at the output size over every scale of the base size and its mirror image."""
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
    predicted = predict(tada, image, TAGS, size=size, base=base, scales=(1.0, 1.5), flip=True)
    assert predicted.labels.shape == (2, *size) and predicted.labels.dtype == torch.int64
    sure = mean.topk(2, dim=1).values.diff(dim=1)[:, 0].abs() > 1e-4
    assert torch.equal(predicted.labels[sure], mean.argmax(dim=1)[sure]) and sure.float().mean() > 0.99
    assert error(predicted.tag_logits, torch.stack(tags).mean(dim=0)) <= BAR


@pytest.mark.parametrize(("small", "size"), [((9, 13), (50, 31)), ((40, 21), (17, 60)), ((1, 1), (6, 4))])
@pytest.mark.parametrize("rows", [1, 5])
def test_strips_are_the_whole(small, size, rows, monkeypatch):
    """Whatever the number of rows per strip, enlarging or shrinking: the labels are those of whole maps."""
    maps = [3 * torch.randn(2, K, *small), 3 * torch.randn(2, K, small[1], small[0])]
    probabilities = [F.interpolate(x, size, mode="bilinear").softmax(dim=1) for x in maps]
    mean = sum(probabilities) / 2
    assert torch.equal(vote(maps, size), mean.argmax(dim=1))
    monkeypatch.setattr(inference, "STRIP", rows * 2 * K * size[1])
    labels = vote(maps, size)
    sure = mean.topk(2, dim=1).values.diff(dim=1)[:, 0].abs() > 1e-5
    assert torch.equal(labels[sure], mean.argmax(dim=1)[sure]) and sure.float().mean() > 0.99
    for top in range(0, size[0], rows):
        part = inference.resize_rows(maps[0], size, top, min(top + rows, size[0]))
        whole = F.interpolate(maps[0], size, mode="bilinear")
        assert error(part, whole[:, :, top : top + rows]) <= BAR


@pytest.mark.parametrize("size", [(50, 31), (5, 9), (7, 40), (30, 6), (7, 11), (64, 88)])
@pytest.mark.parametrize("blocks", [1, 3, 11])
@pytest.mark.parametrize("rows", [4, 1000])
def test_only_borders_are_interpolated(size, blocks, rows, monkeypatch):
    """Of blocks of classes, or noise: the labels of interpolating every pixel, from one pixel a block on."""
    x = F.interpolate(5 * torch.randn(2, K, blocks, blocks), (7, 11)) + 0.1 * torch.randn(2, K, 7, 11)
    expected = F.interpolate(x, size, mode="bilinear").topk(2, dim=1)
    sure = expected.values.diff(dim=1)[:, 0].abs() > 1e-5
    calls, resize = [], inference.resize
    monkeypatch.setattr(inference, "STRIP", rows * 2 * K * size[1])
    monkeypatch.setattr(inference, "resize", lambda *args: calls.append(1) or resize(*args))
    assert torch.equal(vote([x], size)[sure], expected.indices[:, 0][sure]) and sure.float().mean() > 0.99
    assert not calls or (blocks > 1 and size != (7, 11))


def test_a_class_of_one_value_keeps_its_corners(monkeypatch):
    """Where three of the four logits have one argmax and the one across has another; the rest is not read."""
    monkeypatch.setattr(inference, "resize", None)
    x = torch.ones(1, 2, 12, 12)
    x[0, 1] = 0
    x[0, 1, 5, 6] = 3
    for size in ((96, 96), (101, 57)):
        expected = F.interpolate(x, size, mode="bilinear").max(dim=1).indices
        assert torch.equal(vote([x], size), expected) and expected.any()


@pytest.mark.parametrize("size", [(1, 1), (1, 130), (65, 3), (64, 128), (63, 129)])
def test_any_size(tagging, size):
    """From one pixel up, whole and in windows."""
    image = torch.rand(2, 3, *size) * 2 - 1
    for window in (None, (64, 64)):
        labels, tag_logits, *_ = predict(tagging, image, TAGS, window=window)
        assert labels.shape == (2, *size) and 0 <= labels.min() and labels.max() < K
        assert tag_logits.shape == (2, K) and tag_logits.isfinite().all()


@torch.no_grad()
def test_tags_from_clip_are_those_of_the_whole_image(image, monkeypatch):
    """The classes above chance, best first, are the tags of every window, scale and mirror image."""
    tada = make(tags="clip")
    tada.clip.logit_scale.fill_(3.0)
    scored = tada.zero_shot_tags(image)
    embedding = F.normalize(tada.clip.image(image)[1], dim=-1)
    assert error(tada.names, name_vectors(tada.clip, tada.tokenizer, NAMES, TEMPLATES, shared=True)) <= BAR
    for p, tags in zip((20.0855369 * embedding @ tada.names.T).softmax(dim=-1), scored, strict=True):
        likely = [NAMES[k] for k in p.argsort(descending=True) if p[k] >= 1 / K]
        assert [name for name, _ in tags] == likely and 1 <= len(likely) < K
        assert [x for _, x in tags] == pytest.approx([float(p[NAMES.index(name)]) for name in likely])

    calls, forward = [], tada.forward

    def record(part: Tensor, tags: list[list[str]], *seen: object) -> Output:
        calls.append(tags)
        return forward(part, tags, *seen)

    monkeypatch.setattr(tada, "forward", record)
    words = [[name for name, _ in tags] for tags in scored]
    predict(tada, image, window=(50, 60), scales=(1.0, 1.25), flip=True)
    assert calls == 2 * [2 * words] + 2 * [3 * words]  # two windows at once, then three
    calls.clear()
    predict(tada, image, TAGS)
    assert calls == [TAGS]  # given tags take precedence


@torch.no_grad()
def test_clip_reads_an_image_once(image, monkeypatch):
    """For the tags and the adapter together, where the model reads the whole image; results do not change."""
    tada, calls = make(tags="clip"), []
    words, encode = [[name for name, _ in tags] for tags in tada.zero_shot_tags(image)], tada.clip.image
    expected = predict(tada, image, words)
    monkeypatch.setattr(tada.clip, "image", lambda x: calls.append(tuple(x.shape)) or encode(x))
    result = predict(tada, image)
    assert calls == [(2, 3, H, W)]
    assert torch.equal(result.labels, expected.labels)
    assert torch.equal(result.tag_logits, expected.tag_logits)
    calls.clear()
    predict(tada, image, flip=True)
    assert len(calls) == 2  # CLIP sees a mirrored image differently


@pytest.mark.parametrize("how", [{"scales": (1.25,)}, {"window": (30, 45), "stride": (20, 45)}])
def test_other_sizes_and_windows_have_features_of_their_own(image, how, monkeypatch):
    """The tags alone are those of the whole image, also of windows that are read one by one."""
    tada = make(tags="clip")
    words = [[name for name, _ in tags] for tags in tada.zero_shot_tags(image[:1])]
    monkeypatch.setitem(inference.BATCH, "cpu", 1)
    result, expected = predict(tada, image[:1], **how), predict(tada, image[:1], words, **how)
    assert torch.equal(result.labels, expected.labels)
    assert torch.equal(result.tag_logits, expected.tag_logits)


@pytest.mark.parametrize("words", ["sea", "sea, boat", ["sea, boat", "sky"], [["sea"], "sky"]])
@pytest.mark.parametrize("condition", ["tagging", "none"])
def test_words_are_never_read_letter_by_letter(tagging, image, words, condition):
    """A bare string in place of a list of words is refused, wherever it enters."""
    tada = tagging if condition == "tagging" else make(condition=condition)
    for read in (predict, inference.attention, Tada.forward) if condition == "tagging" else (predict,):
        with pytest.raises(
            ModelError, match=r'give a list of words for each image, as \[\["sea", "boat"\]\]'
        ):
            read(tada, image, words)
