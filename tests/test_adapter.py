"""adapter.py: every condition equals its equation written out, starts safely, and learns from where it
should.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from adapter import (
    Classes,
    Implicit,
    Tagging,
    Text,
    Unconditional,
    Words,
    asymmetric_loss,
    multi_hot,
)
from errors import ModelError

C, K, P, N, T, Q, HEADS = 16, 5, 9, 6, 4, 3, 2  # width, classes, tokens of "", image tokens, tags, queries
IMAGE, EMBEDDING = 12, 10  # widths of the image tokens and of the image embedding
BAR = {"rtol": 1e-5, "atol": 1e-5}  # float32 against float64, values of order 1

# Logit, target, loss and its gradient, from Alibaba-MIIL/ASL's own `AsymmetricLoss()` in float64.
ASL = [
    (-20, 1, 18.42068071, 0),  # log 1e-8: eps ends the slope
    (-4, 0, 0, 0),  # p = 0.018 is below clip
    (-4, 1, 3.94587864, -0.9643510838),
    (-1, 0, 0.0005677975179, 0.0005784129391),
    (-1, 1, 0.9600712226, -0.5344466454),
    (0, 0, 0.02451505351, 0.01863920455),
    (0, 1, 0.3465735903, -0.25),
    (1, 0, 0.2458602247, 0.1326284881),
    (1, 1, 0.0842490435, -0.07232948813),
    (4, 0, 2.028576451, 0.1960314566),
    (4, 1, 0.0003264484143, -0.0003235037488),
    (20, 0, 2.440042605, 3.357644954e-08),
    (20, 1, 0, 0),
]


@pytest.fixture
def empty() -> Tensor:
    return torch.randn(P, C)


@pytest.fixture
def classes() -> Tensor:
    return torch.randn(K, C) + 1.5  # they share a direction, as the vectors of real class names do


@pytest.fixture
def image_tokens() -> Tensor:
    return torch.randn(2, N, IMAGE)


@pytest.fixture
def text() -> Text:
    """Two tags and four; the padding after the two must have no effect."""
    vectors = torch.randn(2, T, C)
    vectors[0, 2:] = 1e4
    return Text(vectors, torch.tensor([2, 4]))


def shake(module: nn.Module) -> nn.Module:
    """Perturb every parameter: gates open, norms and scalars no longer 0 or 1."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def double(module: nn.Module) -> dict[str, Tensor]:
    return {name: x.double() for name, x in module.state_dict().items()}


def learners(module: nn.Module, loss: Tensor) -> set[str]:
    """Return the parameters with a gradient, and take a step."""
    parameters = dict(module.named_parameters())
    found = torch.autograd.grad(loss, parameters.values(), allow_unused=True)
    moved = {name: x for name, x in zip(parameters, found, strict=True) if x is not None and x.norm() > 1e-9}
    with torch.no_grad():
        for name, gradient in moved.items():
            parameters[name].sub_(0.1 * gradient)
    return set(moved)


def task(context: Tensor) -> Tensor:
    """A loss that stands for the UNet."""
    return (context * torch.randn(context.shape, generator=torch.Generator().manual_seed(1))).sum()


# The simple conditions


def test_unconditional_is_the_empty_prompt(empty, image_tokens, text):
    """One row, whatever the images."""
    adapter = Unconditional(empty)
    for inputs in ((image_tokens, torch.randn(2, EMBEDDING), text), (None, None, None)):
        context, lengths, logits = adapter(*inputs)
        assert torch.equal(context, empty[None])
        assert lengths is None and logits is None
    assert not list(adapter.parameters())


def test_caption_and_oracle_return_the_text(text):
    context, lengths, logits = Words()(None, None, text)
    assert context is text.vectors and lengths is text.lengths and logits is None
    assert Words()(None, None, Text(text.vectors)).lengths is None
    assert not Words().state_dict()


def test_classes_equal_equation_4(classes, image_tokens):
    """T = E + gamma MLP(E), the same K tokens for every image; every channel's gamma starts at 1e-4."""
    adapter = Classes(classes)
    assert torch.equal(adapter.gamma, torch.full((C,), 1e-4))
    w = double(shake(adapter))
    context, lengths, logits = adapter(image_tokens, None, None)
    assert context.shape == (1, K, C) and lengths is None and logits is None
    for k, E in enumerate(classes.double()):
        assert_close(context[0, k].double(), E + w["gamma"] * two_layers(E, w, "mlp"), **BAR)
    assert torch.equal(adapter(None, None, None).context, context)


def test_classes_have_gradients_at_initialisation(classes):
    adapter = Classes(classes)
    every = {name for name, _ in adapter.named_parameters()}
    assert len(every) == 5
    assert learners(adapter, task(adapter(None, None, None).context)) == every


def test_implicit_equals_equation_5(empty):
    """T = "" + tanh(alpha) (Linear(embedding) + position), token by token."""
    adapter = shake(Implicit(empty, EMBEDDING))
    w = double(adapter)
    embedding = torch.randn(2, EMBEDDING)
    context, lengths, logits = adapter(None, embedding, None)
    assert context.shape == (2, P, C) and lengths is None and logits is None
    for row, e in enumerate(embedding.double()):
        caption = w["linear.weight"] @ e + w["linear.bias"]
        for i, token in enumerate(empty.double()):
            gate = (2 * w["alpha"][i]).exp()
            expected = token + (gate - 1) / (gate + 1) * (caption + w["position"][i])
            assert_close(context[row, i].double(), expected, **BAR)


def test_implicit_starts_unconditional_and_learns(empty):
    """Exactly the empty prompt at first, where only the gates learn; everything learns after one step."""
    adapter = Implicit(empty, EMBEDDING)
    assert 0.015 < adapter.position.std() < 0.025  # ODISE's 0.02
    embedding = 30 * torch.randn(2, EMBEDDING)
    context = adapter(None, embedding, None).context
    assert torch.equal(context, torch.stack([empty, empty]))
    assert learners(adapter, task(context)) == {"alpha"}
    every = {"alpha", "position", "linear.weight", "linear.bias"}
    assert learners(adapter, task(adapter(None, embedding, None).context)) == every


# The tagging adapter


def linear(x: Tensor, w: dict, name: str) -> Tensor:
    return w[name + ".weight"] @ x + w.get(name + ".bias", 0)


def two_layers(x: Tensor, w: dict, name: str) -> Tensor:
    hidden = linear(x, w, name + ".0")
    hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2  # GELU
    return linear(hidden, w, name + ".2")


def norm(x: Tensor, w: dict, name: str) -> Tensor:
    x = x - x.mean()
    return x / (x.square().mean() + 1e-5).sqrt() * w[name + ".weight"] + w[name + ".bias"]


def attend(x: Tensor, tokens: list[Tensor], w: dict, name: str) -> Tensor:
    """One query, one head after the other."""
    q = linear(x, w, name + ".to_q")
    keys = [linear(token, w, name + ".to_k") for token in tokens]
    values = [linear(token, w, name + ".to_v") for token in tokens]
    d, heads = C // HEADS, []
    for i in range(HEADS):
        head = slice(i * d, (i + 1) * d)
        scores = [(q[head] @ key[head] / math.sqrt(d)).exp() for key in keys]
        heads.append(sum(s * value[head] for s, value in zip(scores, values, strict=True)) / sum(scores))
    return linear(torch.cat(heads), w, name + ".to_out")


def equation_6(w: dict, image: Tensor, tags: Tensor) -> list[Tensor]:
    """m of one image, query by query, in float64."""
    image = [linear(token, w, "image") for token in image]
    queries = list(w["queries"])
    for i in range(2):
        block = f"blocks.{i}."
        normed = [norm(q, w, block + "norm1") for q in queries]
        queries = [
            q + attend(n, normed, w, block + "attend_self") for q, n in zip(queries, normed, strict=True)
        ]
        queries = [
            q + attend(norm(q, w, block + "norm2"), list(tags), w, block + "attend_text") for q in queries
        ]
        queries = [q + attend(norm(q, w, block + "norm3"), image, w, block + "attend_image") for q in queries]
        queries = [q + two_layers(norm(q, w, block + "norm4"), w, block + "mlp") for q in queries]
    return [norm(two_layers(q, w, "mlp"), w, "norm") for q in queries]


def equation_7(w: dict, m: list[Tensor]) -> Tensor:
    pooled = sum(m) / len(m)
    h = list(w["classes"])
    centred = [x - sum(h) / len(h) for x in h]
    cosine = [pooled @ x / (pooled.norm() * x.norm()) for x in centred]
    return torch.stack([w["log_scale"].exp() * x + w["bias"] for x in cosine])


@pytest.mark.parametrize("start", ["empty", "random"])
@pytest.mark.parametrize("tags", ["ragged", "full", "classes"])
def test_tagging_equals_equations_6_and_7(empty, classes, image_tokens, text, start, tags):
    """Against loops over images, queries, heads and tokens."""
    adapter = shake(Tagging(empty, classes, IMAGE, heads=HEADS, queries=Q, start=start))
    w = double(adapter)
    full = Text(torch.randn(2, T, C))
    given_text = {"ragged": text, "full": full, "classes": None}[tags]
    context, lengths, logits = adapter(image_tokens, None, given_text)
    assert context.shape == (2, Q, C) and lengths is None and logits.shape == (2, K)
    own = {"ragged": [text.vectors[0, :2], text.vectors[1]], "full": full.vectors, "classes": [classes] * 2}[
        tags
    ]
    for row in range(2):
        m = equation_6(w, image_tokens[row].double(), own[row].double())
        expected = m if start == "random" else [x + w["g"] * y for x, y in zip(empty.double(), m)]
        for i in range(Q):
            assert_close(context[row, i].double(), expected[i], rtol=1e-4, atol=1e-4)
        assert_close(logits[row].double(), equation_7(w, m), rtol=1e-4, atol=1e-4)


def test_tags_affect_only_their_own_image(empty, classes, image_tokens, text):
    """In a batch as alone; in any order, since tags are a set; both the tags and the image have an effect."""
    adapter = shake(Tagging(empty, classes, IMAGE, heads=HEADS, queries=Q))
    with torch.no_grad():
        together = adapter(image_tokens, None, text)
        for row, length in enumerate(text.lengths.tolist()):
            tags = text.vectors[[row], :length]
            for one in (tags, tags.flip(1)):
                alone = adapter(image_tokens[[row]], None, Text(one))
                assert_close(alone.context[0], together.context[row], **BAR)
                assert_close(alone.logits[0], together.logits[row], **BAR)
        other_tags = adapter(image_tokens, None, Text(text.vectors.roll(1, dims=0).clamp(-3, 3)))
        other_image = adapter(image_tokens.roll(1, dims=0), None, text)
    for other in (other_tags, other_image):
        assert (other.context - together.context).abs().amax(dim=(1, 2)).min() > 0.01
        assert (other.logits - together.logits).abs().amax(dim=1).min() > 0.01


def test_tagging_may_start_from_the_empty_prompt(empty, classes, image_tokens, text):
    """Exactly its first Q tokens, whatever the image and tags; logits exist from the first step."""
    adapter = Tagging(empty, classes, IMAGE, heads=HEADS, queries=Q, start="empty")
    context, _, logits = adapter(100 * image_tokens, None, text)
    assert torch.equal(context, torch.stack([empty[:Q], empty[:Q]]))
    assert not torch.equal(logits[0], logits[1])
    assert_close(adapter.log_scale.exp(), torch.tensor(10.0))
    assert adapter.bias == -2


def test_tagging_starts_from_random_queries(empty, classes, image_tokens, text):
    """The context is m itself: every token has the mean and norm of SD's own; "" is not stored."""
    adapter = Tagging(empty, classes, IMAGE, heads=HEADS, queries=P + 1)
    context = adapter(image_tokens, None, text).context
    assert context.shape == (2, P + 1, C)
    assert_close(context.mean(dim=-1), torch.zeros(2, P + 1), **BAR)
    assert_close(context.norm(dim=-1), torch.full((2, P + 1), C**0.5), rtol=1e-3, atol=0)
    assert adapter.state_dict().keys().isdisjoint({"g", "empty"})


def test_what_learns_and_when(empty, classes, image_tokens, text):
    """From "": the UNet reaches g alone at first, then all but Eq. 7's scalars; Eq. 7 reaches all but g,
    always.
    """
    targets = torch.eye(K)[:2]
    whole = {name for name, _ in Tagging(empty, classes, IMAGE, HEADS, Q, start="empty").named_parameters()}
    scalars = {"log_scale", "bias"}

    def moved(adapter: Tagging, by_task: bool, by_tags: bool) -> set[str]:
        context, _, logits = adapter(image_tokens, None, text)
        loss = by_task * task(context) + by_tags * asymmetric_loss(logits, targets)[0]
        return learners(adapter, loss)

    adapter = Tagging(empty, classes, IMAGE, heads=HEADS, queries=Q, start="empty")
    assert moved(adapter, True, False) == {"g"}
    assert moved(adapter, True, False) == whole - scalars
    adapter = Tagging(empty, classes, IMAGE, heads=HEADS, queries=Q, start="empty")
    assert moved(adapter, False, True) == whole - {"g"}
    adapter = Tagging(empty, classes, IMAGE, heads=HEADS, queries=Q, start="empty")
    assert moved(adapter, True, True) == whole
    adapter = Tagging(empty, classes, IMAGE, heads=HEADS, queries=Q)
    assert moved(adapter, True, False) == whole - scalars - {"g"}


def test_a_checkpoint_needs_no_text_tower(empty, classes, image_tokens):
    """The frozen vectors are in the state dict and are not trained."""
    zeros = torch.zeros(P, C), torch.zeros(K, C)
    for build in (
        lambda empty, classes: Unconditional(empty),
        lambda empty, classes: Classes(classes),
        lambda empty, classes: Tagging(empty, classes, IMAGE, heads=HEADS, queries=Q),
    ):
        adapter, other = shake(build(empty, classes)), build(*zeros)
        other.load_state_dict(adapter.state_dict())
        assert torch.equal(other(image_tokens, None, None).context, adapter(image_tokens, None, None).context)
        assert {name for name, _ in adapter.named_parameters()}.isdisjoint({"empty", "classes"})


def test_the_frozen_vectors_are_copies(empty, classes, image_tokens):
    """They share no memory, and training works even if the text tower ran in inference mode."""
    with torch.inference_mode():
        vectors = classes.clone()
    adapter = Tagging(empty, vectors, IMAGE, heads=HEADS, queries=Q)
    adapter(image_tokens, None, None).logits.sum().backward()
    with torch.inference_mode():
        vectors.zero_()
    assert torch.equal(adapter.classes, classes)


def test_logits_survive_low_precision(empty, classes, image_tokens, text):
    """Autocast rounds the attention before them, but not Eq. 7 itself."""
    adapter = shake(Tagging(empty, classes, IMAGE, heads=HEADS, queries=Q))
    with torch.no_grad():
        exact = adapter(image_tokens, None, text)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = adapter(image_tokens, None, text)
    assert low.logits.dtype == torch.float32
    assert 0 < (low.logits - exact.logits).abs().max() < 0.3
    assert (low.context - exact.context).norm() < 0.03 * exact.context.norm()
    m = torch.randn(2, Q, C)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = adapter.logits(m)
    assert torch.equal(low, adapter.logits(m))
    assert torch.equal(adapter.logits(m.bfloat16()), adapter.logits(m.bfloat16().float()))


def test_one_class_works(empty, classes, image_tokens):
    """A single class is 0 after centring: its logit is the bias, not NaN."""
    adapter = Tagging(empty, classes[:1], IMAGE, heads=HEADS, queries=Q)
    logits = adapter(image_tokens, None, None).logits
    assert torch.equal(logits, torch.full((2, 1), -2.0))
    asymmetric_loss(logits, torch.ones(2, 1))[0].backward()
    assert all(x.grad is None or x.grad.isfinite().all() for x in adapter.parameters())


def test_parameters_at_full_width():
    """25,612,034: queries, image projection, two blocks, output MLP and norm, scale and bias."""
    W = 768
    attention = 4 * W * W + W
    block = 4 * 2 * W + 3 * attention + (W * 4 * W + 4 * W) + (4 * W * W + W)
    expected = 32 * W + (1024 * W + W) + 2 * block + 2 * (W * W + W) + 2 * W + 2
    with torch.device("meta"):
        adapter = Tagging(torch.empty(77, W), torch.empty(150, W))
    assert sum(x.numel() for x in adapter.parameters()) == expected == 25_612_034
    assert "25,612,034" in Tagging.__doc__


# The start, with CLIP's real vectors of ADE20K's class names


@pytest.fixture(scope="module")
def ade20k(clip_class_embeddings) -> Tensor:
    return torch.from_numpy(np.load(clip_class_embeddings / "ade20k_150.npy"))


@pytest.fixture
def nine() -> Tensor:
    """Two images with nine classes each, about ADE20K's number."""
    targets = torch.zeros(2, 150)
    targets[0, :9] = targets[1, 70:79] = 1
    return targets


@pytest.mark.parametrize("image_scale", [1, 10])
@pytest.mark.parametrize("tags", ["classes", "true"])
def test_initial_logits_and_loss(ade20k, nine, image_scale, tags):
    """At full width, |logit| < 6 for every class and the loss of a image within 5..25, whatever the input's
    scale.
    """
    adapter = Tagging(torch.randn(77, 768), ade20k)
    image_tokens = image_scale * torch.randn(2, 257, 1024)
    text = Text(torch.stack([ade20k[row.bool()] for row in nine])) if tags == "true" else None
    with torch.no_grad():
        logits = adapter(image_tokens, None, text).logits
    assert logits.abs().max() < 6
    for row in range(2):
        assert 5 < asymmetric_loss(logits[[row]], nine[[row]])[0] < 25


def test_equation_7_as_printed_saturates(ade20k, nine):
    """Raw products call every class present, from any query that is a class vector; ours find the class.

    At the adapter's start too: many raw products are beyond 6 already, and the loss is in the hundreds.
    """
    raw = ade20k @ ade20k.T
    off = ~torch.eye(150, dtype=torch.bool)
    assert 798 < raw.diagonal().mean() < 800 and 364 < raw[off].mean() < 367
    assert raw.min() > 100 and (raw.sigmoid() == 1).all()

    adapter = Tagging(torch.randn(77, 768), ade20k)
    with torch.no_grad():
        ours = adapter.logits(ade20k[:, None])  # m is one class vector
    assert torch.equal(ours.argmax(dim=1), torch.arange(150))
    assert ours.diagonal().min() > 4 and ours[off].sigmoid().mean() < 0.2

    adapter = Tagging(torch.randn(77, 768), ade20k, start="random")  # its context is m
    with torch.no_grad():
        m = adapter(torch.randn(2, 257, 1024), None, None).context
    logits = m.mean(dim=1) @ ade20k.T
    loss, count = asymmetric_loss(logits, nine)
    assert (logits.abs() > 6).float().mean() > 0.4
    assert loss / count > 50


# The multi-label objective


def explicit_asymmetric_loss(x: float, y: int, gamma_negative=4, gamma_positive=1, clip=0.05) -> tuple:
    """One class of one image: the loss, and its derivative with the weight held constant."""
    p = 1 / (1 + math.exp(-x))
    if y:
        weight = (1 - p) ** gamma_positive
        return -weight * math.log(max(p, 1e-8)), -weight * (1 - p) if p > 1e-8 else 0.0
    if p < clip:
        return 0.0, 0.0
    q = 1 - p + clip
    weight = (1 - q) ** gamma_negative
    return -weight * math.log(q), weight * p * (1 - p) / q


def test_asymmetric_loss_equals_its_authors():
    """Values and gradients."""
    table = torch.tensor(ASL, dtype=torch.float64)
    logits = table[:, 0].float()[None].requires_grad_()
    for i, (x, y, value, slope) in enumerate(ASL):
        loss, count = asymmetric_loss(logits[:, [i]], torch.tensor([[float(y)]]))
        (gradient,) = torch.autograd.grad(loss, logits)
        assert math.isclose(loss.item(), value, rel_tol=1e-5, abs_tol=1e-9), (x, y)
        assert math.isclose(gradient[0, i], slope, rel_tol=1e-4, abs_tol=1e-9), (x, y)
        assert count == 1


@pytest.mark.parametrize("options", [(4, 1, 0.05), (7, 0, 0.05), (2, 2, 0.2)])
def test_asymmetric_loss_equals_the_formula(options):
    """Summed over classes and images; the count is that of the images. RAM's 7, 0 too."""
    logits = (3 * torch.randn(3, 7)).requires_grad_()
    targets = (torch.rand(3, 7) < 0.4).float()
    pairs = zip(logits.flatten().tolist(), targets.flatten().tolist(), strict=True)
    values, slopes = zip(*(explicit_asymmetric_loss(x, y, *options) for x, y in pairs), strict=True)
    loss, count = asymmetric_loss(logits, targets, *options)
    assert math.isclose(loss.item(), sum(values), rel_tol=1e-5)
    assert count.shape == () and count == 3
    (gradient,) = torch.autograd.grad(loss, logits)
    assert_close(gradient.flatten(), torch.tensor(slopes), rtol=1e-4, atol=1e-6)
    for same in (targets.bool(), targets.long()):
        assert torch.equal(asymmetric_loss(logits, same, *options)[0], loss)


def test_the_focusing_weight_carries_no_gradient():
    """With a gradient through the weight, a present class would have 1.5 times the gradient at p = 0.5."""
    logits = torch.zeros(1, 1, requires_grad=True)
    asymmetric_loss(logits, torch.ones(1, 1))[0].backward()
    p = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    (-(1 - p.sigmoid()) * p.sigmoid().log()).sum().backward()
    assert math.isclose(logits.grad, -0.25, rel_tol=1e-6)
    assert math.isclose(p.grad, -0.25 - 0.25 * math.log(2), rel_tol=1e-6)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_grad_mode_does_not_change(enabled):
    with torch.set_grad_enabled(enabled):
        loss, _ = asymmetric_loss(torch.zeros(1, 2, requires_grad=True), torch.eye(2)[:1])
        assert torch.is_grad_enabled() == enabled == loss.requires_grad


def test_scale_of_the_loss_of_an_image():
    """At p = 0.5, nine classes of 150: 9 x 0.5 ln 2 + 141 x 0.45 ** 4 x -ln 0.55, about 6.6."""
    targets = torch.zeros(1, 150)
    targets[0, 20:29] = 1
    loss, _ = asymmetric_loss(torch.zeros(1, 150), targets)
    expected = 9 * 0.5 * math.log(2) - 141 * 0.45**4 * math.log(0.55)
    assert math.isclose(loss, expected, rel_tol=1e-5) and math.isclose(expected, 6.576, abs_tol=1e-3)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(-15, 15), st.booleans()), min_size=1, max_size=20))
def test_without_focus_it_is_cross_entropy(pairs):
    """With both gammas and clip at 0; with the defaults it is never negative and never more."""
    logits = torch.tensor([[x for x, _ in pairs]])
    targets = torch.tensor([[float(y) for _, y in pairs]])
    entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
    plain, _ = asymmetric_loss(logits, targets, gamma_negative=0, gamma_positive=0, clip=0)
    assert_close(plain, entropy, **BAR)
    assert 0 <= asymmetric_loss(logits, targets)[0] <= entropy + 1e-6


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.floats(-12, 12), st.booleans()), min_size=1, max_size=12),
    st.integers(0, 7),
    st.integers(0, 3),
    st.sampled_from([0.0, 0.05, 0.2]),
)
def test_asymmetric_loss_for_any_focus(pairs, gamma_negative, gamma_positive, clip):
    """Value and gradient as the formula in float64; not negative; a better logit never costs more."""
    assume(all(abs(1 / (1 + math.exp(-x)) - clip) > 1e-3 for x, _ in pairs))  # the edge of the clip
    options = gamma_negative, gamma_positive, clip
    logits = torch.tensor([[x for x, _ in pairs]], requires_grad=True)
    targets = torch.tensor([[float(y) for _, y in pairs]])
    exact = [explicit_asymmetric_loss(x, y, *options) for x, (_, y) in zip(logits[0].tolist(), pairs)]
    values, slopes = zip(*exact, strict=True)
    loss, _ = asymmetric_loss(logits, targets, *options)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert math.isclose(loss.item(), sum(values), rel_tol=1e-4, abs_tol=1e-5) and loss >= 0
    assert_close(gradient[0], torch.tensor(slopes), rtol=1e-3, atol=1e-5)
    assert ((gradient <= 1e-6) | (targets == 0)).all() and ((gradient >= -1e-6) | (targets == 1)).all()
    line = torch.linspace(-12, 12, 97)[:, None]
    rows = [
        [asymmetric_loss(x[None], y, *options)[0] for x in line] for y in torch.tensor([[[1.0]], [[0.0]]])
    ]
    present, absent = (torch.stack(x).diff() for x in rows)
    assert (present <= 1e-6).all() and (absent >= -1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_a_float32_loss(dtype):
    """eps is 0 in float16, where certain mistakes would be infinite; the loss is float32, its gradient
    finite.
    """
    logits = torch.tensor([[-40.0, -3, 0.5, 40], [40, 3, -0.5, -40]]).to(dtype).requires_grad_()
    targets = torch.tensor([[1.0, 1, 0, 0]] * 2).to(dtype)
    loss, _ = asymmetric_loss(logits, targets)
    with torch.autocast("cpu", dtype=dtype):
        inside, _ = asymmetric_loss(logits, targets)
    exact, _ = asymmetric_loss(logits.float(), targets.float())
    assert loss.dtype == torch.float32 and torch.equal(loss, exact) and torch.equal(inside, exact)
    loss.backward()
    assert logits.grad.isfinite().all() and loss.isfinite()


def test_multi_hot_of_each_crop():
    """The classes of each crop's own pixels, not square; ignored pixels are no class."""
    labels = torch.randint(0, K, (3, 4, 6))
    labels[0, :, :3] = 255
    labels[1] = torch.where(labels[1] == 2, 255, labels[1])
    labels[2] = K - 1
    targets = multi_hot(labels, K)
    assert targets.shape == (3, K) and targets.dtype == torch.float32
    for row in range(3):
        present = set(labels[row].flatten().tolist()) - {255}
        assert targets[row].tolist() == [float(k in present) for k in range(K)]
    assert targets[1, 2] == 0 and targets[2].tolist() == [0, 0, 0, 0, 1]


def test_multi_hot_of_ignored_crops():
    """A crop of ignored pixels has no class and a finite loss; 255 classes leave room for the ignored."""
    ignored = torch.full((2, 3, 5), 255)
    assert torch.equal(multi_hot(ignored, K), torch.zeros(2, K))
    assert torch.equal(multi_hot(ignored, 255), torch.zeros(2, 255))
    assert multi_hot(torch.full((1, 2, 2), 254), 255)[0, 254] == 1
    assert asymmetric_loss(torch.randn(2, K), multi_hot(ignored, K))[0].isfinite()
    with pytest.raises(AssertionError, match="256 classes"):
        multi_hot(ignored, 256)


# What is refused


def test_wrong_sizes_are_refused(empty, classes):
    """The message has the value and the cure."""
    tiny = (empty, classes, IMAGE)
    with pytest.raises(ModelError, match="10 queries: the empty prompt has 9 tokens, use at most 9"):
        Tagging(*tiny, heads=HEADS, queries=P + 1, start="empty")
    with pytest.raises(ModelError, match="unknown start 'zero' .*: choose 'empty' or 'random'"):
        Tagging(*tiny, heads=HEADS, queries=Q, start="zero")
    with pytest.raises(ModelError, match="3 heads do not divide .* 16"):
        Tagging(*tiny, heads=3, queries=Q)
    for queries, blocks in ((0, 2), (3, 0)):
        with pytest.raises(
            ModelError, match=f"need at least 1 query and 1 block, got {queries} and {blocks}"
        ):
            Tagging(*tiny, heads=HEADS, queries=queries, blocks=blocks)
    assert issubclass(ModelError, ValueError)


def test_missing_and_misshapen_inputs(empty, classes, image_tokens, text):
    """The message names the input."""
    tagging = Tagging(empty, classes, IMAGE, heads=HEADS, queries=Q)
    for adapter, missing in (
        (tagging, "tokens"),
        (Implicit(empty, EMBEDDING), "embedding"),
        (Words(), "text"),
    ):
        with pytest.raises(AssertionError, match=f"{missing} is None"):
            adapter(None, None, None)
    for wrong, message in (
        (Text(text.vectors[:1]), r"\(1, 4, 16\).*\(2, T, 16\)"),
        (Text(text.vectors[..., :8]), r"\(2, 4, 8\)"),
        (Text(text.vectors[:, :0]), r"\(2, 0, 16\).*at least one"),
        (Text(text.vectors, text.lengths[:, None]), r"lengths is \(2, 1\).*\(2,\)"),
    ):
        with pytest.raises(AssertionError, match=message):
            tagging(image_tokens, None, wrong)
    with pytest.raises(AssertionError, match=r"\(2, 3\) logits for \(2, 4\) targets"):
        asymmetric_loss(torch.zeros(2, 3), torch.zeros(2, 4))
