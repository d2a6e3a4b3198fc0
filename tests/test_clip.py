"""clip.py equals transformers' CLIPModel and OpenAI's tokenizer: ids, hidden states, pooled and projected
outputs.
"""

import hashlib
import json
import unicodedata
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from oracle import SMALL_CLIP, official_folder, reference_clip
from PIL import Image
from proof import BAR, error, gradients
from transformers import CLIPImageProcessorPil, CLIPTokenizer

from clip import CLIP, PROMPT, TEMPLATES, CLIPConfig, Tokenizer, name_vectors, pixels, token_ids, zero_shot
from errors import WeightsError
from weights.load import load

END = SMALL_CLIP.vocabulary - 1


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The reference and ours with the same weights, by way of the official file."""
    reference = reference_clip(SMALL_CLIP)
    ours = load(CLIP(SMALL_CLIP), official_folder(reference, tmp_path_factory.mktemp("clip")))
    return reference, ours.eval()


def prompts() -> torch.Tensor:
    """Three texts of different lengths: start, tokens, end tokens; the last one fills all positions."""
    ids = torch.randint(0, END - 1, (3, SMALL_CLIP.positions))
    ids[:, 0] = END - 1
    for row, length in zip(ids, (2, 30, 77), strict=True):
        row[length - 1 :] = END
    return ids


def test_text_equals_the_reference(pair):
    """Hidden states after the final norm, the one of the first end token, and its projection."""
    reference, ours = pair
    ids = prompts()
    with torch.no_grad():
        expected = reference.text_model(ids)
        hidden, pooled = ours.text(ids)
        assert error(hidden, expected.last_hidden_state) <= BAR
        assert error(pooled, expected.pooler_output) <= BAR
        projected = reference.text_projection(expected.pooler_output)
        assert error(ours.text_projection(pooled), projected) <= BAR


def test_padding_may_be_dropped_after_the_longest_text(pair):
    """The tower is causal: the pooled vector does not change."""
    _, ours = pair
    ids = prompts()[:2]
    with torch.no_grad():
        assert error(ours.text(ids[:, :30])[1], ours.text(ids)[1]) <= BAR


def test_image_equals_the_reference(pair):
    """The last hidden state before the post-norm, and the projection of the normed class token."""
    reference, ours = pair
    image = torch.rand(2, 3, 56, 56) * 2 - 1
    with torch.no_grad():
        expected = reference.vision_model(pixels(image, 56))
        tokens, embedding = ours.image(image)
        assert error(tokens, expected.last_hidden_state) <= BAR
        assert error(embedding, reference.visual_projection(expected.pooler_output)) <= BAR


def test_gradients_equal_the_reference(pair):
    """Of the image and of every parameter that either tower has."""
    reference, ours = pair
    ids, image = prompts(), (torch.rand(2, 3, 56, 56) * 2 - 1).requires_grad_()
    weights = [torch.randn(size) for size in ((3, 77, 64), (3, 48), (2, 17, 96), (2, 48))]
    text, image_output = reference.text_model(ids), reference.vision_model(pixels(image, 56))
    outputs = [text.last_hidden_state, reference.text_projection(text.pooler_output)]
    outputs += [image_output.last_hidden_state, reference.visual_projection(image_output.pooler_output)]
    loss = sum((x * weight).sum() for x, weight in zip(outputs, weights, strict=True))
    expected, whole = gradients(loss, reference, image=image)
    hidden, pooled = ours.text(ids)
    outputs = [hidden, ours.text_projection(pooled), *ours.image(image)]
    loss = sum((x * weight).sum() for x, weight in zip(outputs, weights, strict=True))
    result, ours_whole = gradients(loss, ours, image=image)
    assert (
        result.keys() == expected.keys() == dict(ours.named_parameters()).keys() - {"logit_scale"} | {"image"}
    )
    assert error(result["image"], expected["image"]) <= BAR
    assert error(ours_whole, whole) <= BAR


@pytest.mark.parametrize("size", [(56, 56), (300, 300), (90, 200), (31, 17)])
def test_pixels_equal_the_official_preprocessing(size):
    """Ours, in float and differentiable, against Pillow's bicubic on 8-bit images: half a grey level apart
    on average.
    """
    H, W = size
    grain = torch.rand(1, 3, H // 8 + 1, W // 8 + 1)
    smooth = torch.nn.functional.interpolate(grain, (H, W), mode="bilinear")
    levels = (smooth[0] * 255).round().to(torch.uint8)
    resized = Image.fromarray(levels.permute(1, 2, 0).numpy()).resize((56, 56), Image.Resampling.BICUBIC)
    processor = CLIPImageProcessorPil(do_resize=False, do_center_crop=False)  # rescales and normalises
    expected = processor(resized, return_tensors="pt")["pixel_values"]
    result = pixels(levels[None].float() / 127.5 - 1, 56)
    grey_level = 1 / 255 / 0.26
    assert (result - expected).abs().mean() < 0.5 * grey_level
    assert (result - expected).abs().max() < 2 * grey_level


def test_image_is_differentiable(pair):
    """With respect to the image, through the resize; two rows do not mix."""
    _, ours = pair
    image = (torch.rand(2, 3, 70, 90) - 0.5).requires_grad_()
    ours.image(image)[1][0].sum().backward()
    assert image.grad[0].abs().sum() > 0
    assert (image.grad[1] == 0).all()


def test_bfloat16_is_as_exact_as_the_reference(pair):
    """Both towers within twice the error that the reference itself makes in bfloat16."""
    reference, ours = pair
    ids, image = prompts(), torch.rand(2, 3, 56, 56) * 2 - 1
    theirs, mine = reference_clip(SMALL_CLIP), CLIP(SMALL_CLIP)
    theirs.load_state_dict(reference.state_dict())
    mine.load_state_dict(ours.state_dict())
    theirs.bfloat16(), mine.bfloat16()
    with torch.no_grad():
        for exact, low, result in (
            (reference.text_model(ids), theirs.text_model(ids), mine.text(ids)[0]),
            (
                reference.vision_model(pixels(image, 56)),
                theirs.vision_model(pixels(image, 56)),
                mine.image(image)[0],
            ),
        ):
            bound = error(low.last_hidden_state, exact.last_hidden_state)
            assert 1e-4 < bound < 0.1  # bfloat16 really was used
            assert error(result, exact.last_hidden_state) <= 2 * bound


def test_too_many_tokens_are_refused(pair):
    with pytest.raises(AssertionError, match="78 tokens for 77 positions"):
        pair[1].text(torch.zeros(1, 78, dtype=torch.int64))


def test_tiny_takes_128_pixels():
    clip = CLIP(CLIPConfig.tiny())
    tokens, embedding = clip.image(torch.zeros(2, 3, 96, 160))
    assert tokens.shape == (2, 65, 128)
    assert embedding.shape == (2, 128)


@pytest.mark.slow
def test_full_width_equals_the_reference(tmp_path):
    """CLIP ViT-L/14's own size: both towers."""
    config = CLIPConfig()
    reference = reference_clip(config)
    with torch.device("meta"):
        ours = CLIP(config)
    load(ours, official_folder(reference, tmp_path))
    ids = torch.randint(0, 49_000, (2, 77))
    ids[0, 9:], ids[1, 50:] = 49_407, 49_407
    image = torch.rand(2, 3, 224, 224) * 2 - 1
    with torch.no_grad():
        expected = reference.text_model(ids)
        hidden, pooled = ours.text(ids)
        assert error(hidden, expected.last_hidden_state) <= BAR
        assert error(pooled, expected.pooler_output) <= BAR
        expected = reference.vision_model(pixels(image, 224))
        tokens, embedding = ours.image(image)
        assert tokens.shape == (2, 257, 1024)
        assert error(tokens, expected.last_hidden_state) <= BAR
        assert error(embedding, reference.visual_projection(expected.pooler_output)) <= BAR


# The tokenizer, on OpenAI's own vocabulary.


@pytest.fixture(scope="module")
def tokenizer(clip_vocabulary):
    return Tokenizer(clip_vocabulary)


def golden(clip_bpe, group: str) -> list[dict]:
    return json.loads((clip_bpe / "golden_tokens_openai.json").read_text())[group]


def padded(ids: list[int]) -> list[int]:
    """The golden ids as for Stable Diffusion: 77, truncated before the end token, padded with end tokens."""
    ids = ids if len(ids) <= 77 else [*ids[:76], 49_407]
    return ids + [49_407] * (77 - len(ids))


@pytest.mark.parametrize("group", ["ade20k", "cityscapes", "coco_panoptic", "coco_stuff", "ram"])
def test_ids_of_every_class_name_and_tag(tokenizer, clip_bpe, group):
    entries = golden(clip_bpe, group)
    ids = tokenizer([x["text"] for x in entries])
    assert ids.dtype == torch.int64
    assert ids.tolist() == [padded(x["ids"]) for x in entries]


def test_ids_of_hard_texts(tokenizer, clip_bpe):
    """Accents, scripts, emoji, digits, blanks, contractions; six texts differ, for two stated reasons."""
    needs_ftfy = {"&amp;lt; html &eacute;", "ﬁne ﬂuid", "ＡＢＣ", "…—“quotes”"}  # OpenAI repairs them first
    markup = {"<|endoftext|> inside", "<|startoftext|>hello"}  # OpenAI obeys it, we spell it out
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        entries = golden(clip_bpe, "extra")
        different = {x["text"] for x in entries if tokenizer([x["text"]])[0].tolist() != padded(x["ids"])}
    assert different == needs_ftfy | markup


def test_ids_equal_transformers(tokenizer, clip_vocabulary):
    """The same files read by the library that Stable Diffusion is used with."""
    folder = clip_vocabulary
    reference = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    texts = [
        "a photograph of a horse",
        "",
        "A Photo, of \t\n SNOW; it's 12345!",
        "naïve café – 日本語 🚗",
        "x" * 60,
    ]
    expected = reference(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    assert torch.equal(tokenizer(texts), expected["input_ids"])


def test_truncation_warns(tokenizer):
    """75 tokens fit, the 76th is truncated with a warning; the end token is kept."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fits = tokenizer(["wall " * 75, "wall"])
    with pytest.warns(UserWarning, match="truncated 1 of 2 texts to 75 tokens.*'wall wall"):
        cut = tokenizer(["wall " * 76, "wall"])
    assert torch.equal(fits, cut)
    assert cut[0, 76] == 49_407 and cut[0, 75] == 2569


def test_missing_vocabulary_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="vocab.json is missing.*weights.fetch"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("vocabulary", "merges"),
    [
        ("<html>", ""),
        ("[" * 2000, ""),
        ("[]", ""),
        ('{"a": 0}', "#version: 0.2\n"),
        (token_ids([("a", "b")], 600), "#version: 0.2\n"),
        (token_ids([], 600), "#version: 0.2\na b\n"),
        (token_ids([("a", "b")], 600), "#version: 0.2\nab\n"),
        (token_ids([], 600) | {"a": 1, "b": 0}, "#version: 0.2\n"),
        (token_ids([], 10**30), "#version: 0.2\n"),
    ],
)
def test_a_corrupt_vocabulary_is_named(tmp_path, vocabulary, merges):
    """Also two files that do not belong together."""
    text = vocabulary if isinstance(vocabulary, str) else json.dumps(vocabulary)
    (tmp_path / "vocab.json").write_text(text)
    (tmp_path / "merges.txt").write_text(merges)
    with pytest.raises(WeightsError, match=r"vocab\.json or merges\.txt is corrupt \(.*\): .*weights\.fetch"):
        Tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text("[]")
    with pytest.raises(WeightsError, match=r"is corrupt \(they do not agree\): "):
        Tokenizer(tmp_path)


def test_the_ids_follow_from_the_merges(clip_vocabulary):
    """OpenAI's 49,408: `Tokenizer` accepts no other file."""
    lines = (clip_vocabulary / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    assert len(lines) == 48_894
    expected = json.loads((clip_vocabulary / "vocab.json").read_text(encoding="utf-8"))
    assert token_ids([line.split() for line in lines], 49_408) == expected and len(expected) == 49_408


def spelled(texts: list[str]) -> torch.Tensor:
    """The ids of the tokenizer without files, for the tiny CLIP's vocabulary."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Tokenizer.spelling(CLIPConfig.tiny().vocabulary)(texts)


def test_spelling_has_one_token_per_byte():
    """Start, the bytes of each word (the last one marked), end tokens, with the ids of CLIP."""
    start, end = 1022, 1023
    alphabet = "".join(map(chr, [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324)]))
    inner = {letter: i for i, letter in enumerate(sorted(alphabet))}  # GPT-2's: a visible letter per byte
    assert len(inner) == 256
    a_tree = [256 + inner["a"], inner["t"], inner["r"], inner["e"], 256 + inner["e"]]
    assert spelled(["A Tree", ""]).tolist() == [[start, *a_tree, *[end] * 71], [start, *[end] * 76]]
    lengths = {"é": 2, "日本": 6, "🚗": 4, "l'été": 7, "  ": 0, "a" * 75: 75}
    assert ((spelled([*lengths]) != end).sum(dim=1) - 1).tolist() == [*lengths.values()]


def test_different_names_are_spelled_differently(clip_bpe):
    """All class names and tags of the reference data; case, blanks and composition apart, as in CLIP."""
    names = {x["text"].lower() for group in ("ade20k", "coco_stuff", "ram") for x in golden(clip_bpe, group)}
    names |= {"ae", "æ", "a e", "日", "月", "🚗", "🚕", "e", "é", "ė", "snow", "snow.", "1 1", "1"}
    assert len(names) > 800
    assert len({tuple(ids) for ids in spelled([*names]).tolist()}) == len(names)
    assert torch.equal(*spelled(["Sea \n ice", "sea ice"]))
    assert torch.equal(*spelled(["é", unicodedata.normalize("NFD", "é")]))


@given(st.lists(st.text(max_size=90), min_size=1, max_size=3))
def test_any_text_can_be_spelled(texts):
    """Ids of the vocabulary; one start, no end before the last byte, at least one end. It never raises."""
    ids = spelled(texts)
    assert ids.shape == (len(texts), 77) and ids.dtype == torch.int64
    for row in ids.tolist():
        first_end = row.index(1023)
        assert row[0] == 1022 and set(row[first_end:]) == {1023}
        assert all(0 <= i < 512 for i in row[1:first_end])


def test_surrogates_are_joined_or_replaced():
    """JSON writes a car as two surrogates; a lone one has no character of its own."""
    assert torch.equal(*spelled(["\ud83d\ude97", "🚗"]))
    assert torch.equal(*spelled(["caf\udce9", "caf\ufffd"]))


def test_a_vocabulary_must_have_room_for_all_bytes():
    Tokenizer.spelling(514)
    with pytest.raises(AssertionError, match="a vocabulary of 513 is too small: bytes need 514"):
        Tokenizer.spelling(513)


# Names to vectors, and images to names, with OpenAI's vocabulary


@pytest.fixture(scope="module")
def wide_pair():
    """Small towers with the whole vocabulary: the reference and ours, the same weights."""
    config = replace(SMALL_CLIP, vocabulary=49_408)
    reference, ours = reference_clip(config), CLIP(config)
    ours.load_state_dict(reference.state_dict())
    return reference, ours.eval()


NAMES = ["sea", "traffic light", "naïve café", "person who rides a bicycle"]


def reference_ids(clip_vocabulary, texts: list[str]) -> dict[str, torch.Tensor]:
    folder = clip_vocabulary
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    return tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")


@pytest.mark.parametrize("templates", [(PROMPT,), TEMPLATES], ids=["one", "80"])
def test_name_vectors_equal_transformers(wide_pair, tokenizer, clip_vocabulary, templates):
    """Pooled: the mean of `pooler_output`; shared: that of the unit `get_text_features`, at unit length."""
    reference, ours = wide_pair
    ids = reference_ids(clip_vocabulary, [template.format(name) for name in NAMES for template in templates])
    each = len(NAMES), len(templates)
    with torch.no_grad():
        pooled = reference.text_model(**ids).pooler_output.unflatten(0, each)
        shared = reference.get_text_features(**ids).pooler_output.unflatten(0, each)
    shared = F.normalize(F.normalize(shared, dim=-1).mean(dim=1), dim=-1)
    result = name_vectors(ours, tokenizer, NAMES, templates)
    assert result.shape == (4, 64) and not result.requires_grad
    assert error(result, pooled.mean(dim=1)) <= BAR
    assert error(name_vectors(ours, tokenizer, NAMES, templates, shared=True), shared) <= BAR


@pytest.mark.parametrize("shared", [False, True])
def test_a_vector_depends_only_on_its_name(wide_pair, tokenizer, shared):
    """Bit-equal whatever the other names in the list: exact resume needs it."""
    _, ours = wide_pair
    for templates in ((PROMPT,), TEMPLATES[:3]):
        together = name_vectors(ours, tokenizer, NAMES, templates, shared)
        for name, vector in zip(NAMES[::-1], together.flip(0), strict=True):
            assert torch.equal(name_vectors(ours, tokenizer, [name], templates, shared)[0], vector)


def test_zero_shot_equals_transformers(wide_pair, tokenizer, clip_vocabulary):
    """The softmax of `logits_per_image`, two images and four names."""
    reference, ours = wide_pair
    image = torch.rand(2, 3, 56, 56) * 2 - 1
    ids = reference_ids(clip_vocabulary, [PROMPT.format(name) for name in NAMES])
    with torch.no_grad():
        reference.logit_scale.fill_(3.0)
        ours.logit_scale.fill_(3.0)
        expected = reference(**ids, pixel_values=pixels(image, 56)).logits_per_image.softmax(dim=-1)
        names = name_vectors(ours, tokenizer, NAMES, [PROMPT], shared=True)
        result = zero_shot(ours, ours.image(image)[1], names)
    assert result.shape == (2, 4)
    assert (expected.max(dim=-1).values > 0.3).all()  # not the same for every name
    assert error(result, expected) <= BAR


def test_autocast_rounds_neither_vectors_nor_tags(wide_pair, tokenizer):
    """Vectors are cached on disk, with or without autocast; bfloat16 rounds logits of 25 to 1/8."""
    _, ours = wide_pair
    embedding = torch.randn(2, 48)
    for shared in (False, True):
        exact = name_vectors(ours, tokenizer, NAMES, [PROMPT], shared)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(name_vectors(ours, tokenizer, NAMES, [PROMPT], shared), exact)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        result = zero_shot(ours, embedding, exact)
    with torch.no_grad():
        assert torch.equal(result, zero_shot(ours, embedding, exact))


def test_the_80_templates():
    """OpenAI's: all different, each with one place for a name; some of every form, and the hash of all."""
    assert len(TEMPLATES) == len(set(TEMPLATES)) == 80
    assert all(template.count("{}") == 1 for template in TEMPLATES)
    assert set("{}<>|").isdisjoint("".join(template.format("") for template in TEMPLATES))
    assert PROMPT == "a photo of a {}"
    assert set(TEMPLATES) > {
        "a bad photo of a {}.",
        "a photo of many {}.",
        "a sculpture of a {}.",
        "a photo of the hard to see {}.",
        "a low resolution photo of the {}.",
        "graffiti of a {}.",
        "the embroidered {}.",
        "a origami {}.",
        "a jpeg corrupted photo of the {}.",
        "a black and white photo of a {}.",
        "the {} in a video game.",
        "itap of my {}.",
        "itap of the {}.",
        "a photo of one {}.",
        "art of the {}.",
        "a photo of a {}.",
    }
    lines = "\n".join(sorted(TEMPLATES))  # as OpenAI's notebook lists them, sorted
    assert hashlib.sha256(lines.encode()).hexdigest().startswith("a8a4822f2921936e")
