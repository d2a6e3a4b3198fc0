"""assemble.py and weights/words.py: the prior's files, sizes, cached vectors, the optimiser's groups."""

import copy
import errno
import json
import re
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fuzz import mutate
from oracle import tiny_folder
from proof import BAR, error
from safetensors.torch import load_file, save_file
from tiny_tada import NAMES, TAGS, K, config, trained
from torch import Tensor, nn

import weights.words as vectors_file
from assemble import (
    SCALE_FILE,
    build,
    load_clip,
    make_adapter,
    make_decoder,
    open_tagger,
    parameter_groups,
    part_configs,
    shrink,
)
from clip import CLIPConfig, token_ids
from errors import ModelError, WeightsError
from images import scenes
from loading.augment import normalise
from mask2former import DeformablePixelDecoder
from model import Tada
from unet import UNetConfig


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder of `tiny` weights in the official layout, and the reference models that wrote it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    return folder, *tiny_folder(folder)


@pytest.fixture
def weights(tiny, tmp_path) -> Path:
    """A copy of these files that a test may change."""
    shutil.copytree(tiny[0], tmp_path / "weights", ignore=shutil.ignore_patterns(".vectors"))
    return tmp_path / "weights"


def test_the_weights_are_those_of_the_files(weights, tiny):
    """Every tensor of the reference's files is in the model; names and classes come from its text tower."""
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


def cached(weights: Path) -> list[str]:
    """The files of cached vectors."""
    return sorted(file.name for file in (weights / ".vectors").iterdir())


def test_vectors_are_cached(weights, monkeypatch):
    """A second build computes none; another list, other prompts, another CLIP or vocabulary recompute."""
    options = {"weights": str(weights), "tags": "clip", "classes": ("sea", "snow")}
    first = build(config(**options))
    first.cache_words(["owl"])  # in memory only
    before = cached(weights)
    assert len(before) == 2 and all(re.fullmatch(r"[0-9a-f]{32}\.safetensors", name) for name in before)

    computed = []
    compute = vectors_file.name_vectors
    monkeypatch.setattr(vectors_file, "name_vectors", lambda *a: computed.append(a[2]) or compute(*a))
    again = build(config(**options))
    assert not computed and cached(weights) == before
    assert torch.equal(first.names, again.names)
    assert torch.equal(first.adapter.classes, again.adapter.classes)

    build(config(**options | {"tags": "classes", "classes": ("snow", "sea")}))
    build(config(**options | {"tags": "classes", "templates": 80}))
    assert computed == [("snow", "sea"), ("sea", "snow")] and len(cached(weights)) == 4

    other = build(config())  # another CLIP in the same folder
    save_file(other.clip.state_dict(), weights / "clip" / "model.safetensors")
    third = build(config(**options | {"tags": "classes"}))
    assert len(computed) == 4 and error(third.adapter.classes, first.adapter.classes) > 0.1

    file = weights / "tokenizer" / "vocab.json"
    file.write_text(json.dumps(json.loads(file.read_text()), indent=1))
    build(config(**options | {"tags": "classes"}))
    assert len(computed) == 5


def test_files_are_hashed_once(weights, monkeypatch):
    """CLIP's file has 1.7 GB: a second list of words must not read it again."""
    files, digest = [], vectors_file.digest
    monkeypatch.setattr(vectors_file, "digest", lambda file: files.append(file.name) or digest(file))
    build(config(weights=str(weights), tags="clip"))
    assert sorted(files) == ["merges.txt", "model.safetensors", "vocab.json"]


def test_a_truncated_file_of_vectors_is_rewritten(weights):
    first = build(config(weights=str(weights)))
    (name,) = cached(weights)
    file = weights / ".vectors" / name
    file.write_bytes(file.read_bytes()[:100])
    assert torch.equal(build(config(weights=str(weights))).adapter.classes, first.adapter.classes)
    assert torch.equal(load_file(file)["vectors"], first.adapter.classes)


def test_a_changed_byte_of_cached_vectors_is_detected(weights):
    """A warning, and the vectors are computed again and written."""
    clip, tokenizer = load_clip(CLIPConfig.tiny(), weights)

    def vectors() -> list[list[float]]:
        return vectors_file.word_vectors(str(weights), clip, tokenizer, ("sea", "snow"), 1).tolist()

    expected = vectors()
    file = weights / ".vectors" / cached(weights)[0]
    content = file.read_bytes()
    for number in range(9):
        file.write_bytes(mutate(content, number, 9))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert vectors() == expected, f"mutation {number} is used"
        assert not caught or f"{file} changed after it was written" in str(caught[0].message)
        assert file.read_bytes() == content
    file.write_bytes(content[:-1] + b"\0")
    with pytest.warns(UserWarning, match="changed after it was written: its vectors are"):
        vectors()


def test_vectors_of_older_versions_are_computed_again(weights):
    """Their files have no hash."""
    first = build(config(weights=str(weights)))
    file = weights / ".vectors" / cached(weights)[0]
    content = file.read_bytes()
    save_file({"vectors": torch.zeros_like(first.adapter.classes)}, file)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = build(config(weights=str(weights)))
    assert torch.equal(again.adapter.classes, first.adapter.classes) and file.read_bytes() == content


def test_the_vocabulary_of_another_model_is_refused(weights):
    """The end token has another id there, and no text would have an end."""
    (weights / "tokenizer" / "vocab.json").write_text(json.dumps(token_ids([], 600)))
    with pytest.raises(WeightsError, match=f"^{weights}/tokenizer has 600 ids, and CLIP 1,024: use"):
        build(config(weights=str(weights)))


@pytest.mark.parametrize(
    "scale", ["0", "-1", "NaN", "Infinity", "1e999", '"0.85"', "true", "null", "1" * 400]
)
def test_the_latent_scale_is_a_positive_number(weights, scale):
    (weights / SCALE_FILE).write_text(f'{{"scaling_factor": {scale}}}')
    with pytest.raises(WeightsError, match=f"^{weights / SCALE_FILE} has no valid scaling_factor .*pretrain"):
        part_configs("tiny", weights)


@pytest.mark.parametrize("text", ["[" * 2000, "[]", "5", '{"scaling_factor": 1'])
def test_a_damaged_latent_scale(weights, text):
    (weights / SCALE_FILE).write_text(text)
    with pytest.raises(WeightsError, match=f"^{weights / SCALE_FILE} has no valid scaling_factor .*pretrain"):
        part_configs("tiny", weights)


@pytest.mark.parametrize("fault", ["read-only", "full"])
def test_vectors_that_cannot_be_written_are_not_an_error(weights, fault, monkeypatch):
    """A read-only folder, a full disk: no file is left, and the model is the same."""
    if fault == "read-only":
        (weights / ".vectors").write_bytes(b"")  # a file instead of the folder: root ignores permissions
        weights.chmod(0o555)
    else:

        def full(tensors: dict, file: Path, metadata: dict) -> None:
            file.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(vectors_file, "save_file", full)
    tada = build(config(weights=str(weights)))
    weights.chmod(0o755)
    expected = tada.clip.text(tada.tokenizer([f"a photo of a {name}" for name in NAMES]))[1]
    assert error(tada.adapter.classes, expected) <= BAR
    assert fault == "read-only" or not cached(weights)


def test_random_weights_write_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    build(config(tags="clip")).cache_words(["car"])
    assert not list(tmp_path.iterdir())


def test_the_seed_determines_the_model():
    """All initialisation draws from torch's global random state."""
    first, same, other = (torch.manual_seed(seed) and build(config()).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(x, same[name]) for name, x in first.items())
    assert not torch.equal(first["adapter.queries"], other["adapter.queries"])
    assert not torch.equal(first["decoder.classifier.1.weight"], other["decoder.classifier.1.weight"])


@pytest.mark.parametrize(
    ("decoder", "size", "parameters"), [("fpn", "sd15", 7_433_366), ("upernet", "sd15", 38_696_236)]
)
def test_sizes_of_the_model_of_the_paper(decoder, size, parameters):
    """The adapter of 768 and decoders of 256 and 512 (see their tests), for 150 classes; tiny is smaller."""
    settings = config(model=size, decoder=decoder, classes=tuple(map(str, range(150))), dropout=0.1)
    with torch.device("meta"):
        adapter = make_adapter(settings, CLIPConfig(), torch.empty(77, 768), torch.empty(150, 768))
        head = make_decoder(settings, UNetConfig())
    assert sum(x.numel() for x in adapter.parameters()) == 25_612_034
    assert sum(x.numel() for x in head.parameters()) == parameters
    assert {x.p for x in head.modules() if isinstance(x, nn.Dropout2d)} == {0.1}
    small = make_decoder(replace(settings, model="tiny"), UNetConfig.tiny())
    assert sum(x.numel() for x in small.parameters()) < parameters / 10


def test_sizes_of_mask2former():
    """100 queries, 9 layers, width 256 for COCO's 133 classes; tiny has 20, 3 and 64."""
    settings = config(
        model="sd15",
        decoder="mask2former",
        classes=tuple(map(str, range(133))),
        things=(True,) * 80 + (False,) * 53,
    )
    with torch.device("meta"):
        head = make_decoder(settings, UNetConfig())
        small = make_decoder(replace(settings, model="tiny"), UNetConfig.tiny())
    assert (head.query_features.shape, len(head.layers)) == ((100, 256), 9)
    assert (small.query_features.shape, len(small.layers)) == ((20, 64), 3)
    assert head.class_head.out_features == 134 and head.channels == tuple(UNetConfig().channels)
    assert type(head.pixel_decoder) is DeformablePixelDecoder


@pytest.mark.parametrize(("size", "heads"), [("sd15", 8), ("tiny", 4)])
def test_settings_of_the_adapter(size, heads):
    """Each setting reaches the adapter; none is the default."""
    settings = config(model=size, queries=5, blocks=3, adapter_start="random")
    clip = CLIPConfig() if size == "sd15" else CLIPConfig.tiny()
    with torch.device("meta"):
        adapter = make_adapter(
            settings, clip, torch.empty(77, clip.text.width), torch.empty(K, clip.text.width)
        )
    assert adapter.queries.shape == (5, clip.text.width) and len(adapter.blocks) == 3 and adapter.g is None
    assert {block.attend_text.heads for block in adapter.blocks} == {heads}
    assert adapter.image.in_features == clip.image.width


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"model": "sd21"}, "unknown model 'sd21': choose sd15 or tiny"),
        ({"condition": "words"}, "unknown condition 'words': choose none, caption, .* or oracle"),
        ({"decoder": "mask"}, "unknown decoder 'mask': choose fpn, upernet or mask2former"),
        ({"decoder": "mask2former"}, "--decoder mask2former needs `things` for 5 classes, got 0: .*"),
        ({"templates": 7}, "--templates 7: choose 1 or 80"),
    ],
)
def test_settings_that_are_refused(options, sentence):
    with pytest.raises(ModelError, match=f"^{sentence}$"):
        build(config(**options))


@pytest.mark.parametrize("part", ["vae", "unet", "clip", "tokenizer"])
def test_missing_weights_are_named(weights, part):
    """With the command that creates them."""
    shutil.rmtree(weights / part)
    with pytest.raises((WeightsError, FileNotFoundError), match=rf"{part}.*(weights\.fetch|lab\.pretrain)"):
        build(config(weights=str(weights)))


def test_decay_and_rates():
    """Decay only for the weights of Linear and Conv layers; the learning rate of the whole UNet is scaled."""
    tada = build(config(decoder="upernet"))
    groups = parameter_groups(tada, lr=1e-3, weight_decay=0.01, unet_scale=0.1)
    settings = {}
    for group in groups:
        assert len(group["names"]) == len(group["params"])
        for name, parameter in zip(group["names"], group["params"], strict=True):
            assert tada.get_parameter(name) is parameter and name not in settings
            settings[name] = (group["lr"], group["weight_decay"])
    assert settings.keys() == trained(tada)

    for path, module in tada.named_modules():
        for name, _ in module.named_parameters(prefix=path, recurse=False):
            if name in settings:
                matrix = isinstance(module, (nn.Linear, nn.Conv2d)) and name.endswith(".weight")
                rate = 1e-4 if name.startswith("unet.") else 1e-3
                assert settings[name] == (pytest.approx(rate), 0.01 if matrix else 0.0), name
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
        assert settings[name] == pytest.approx(expected), name

    frozen = build(config(freeze_unet=True, condition="none"))
    names = [name for group in parameter_groups(frozen, 1e-3, 0.01) for name in group["names"]]
    assert sorted(names) == sorted(trained(frozen)) and all(name.startswith("decoder.") for name in names)


@pytest.mark.parametrize(
    ("options", "source"),
    [({}, "classes"), ({"freeze_unet": True}, "classes"), ({"lora": 4}, "ram"), ({"tags": "clip"}, "oracle")]
    + [({}, "clip"), ({"tags": "clip"}, "clip")],
)
def test_frozen_parts_in_bfloat16_move_no_result(options, source):
    """As on a GPU: latents, CLIP's tokens and the maps differ from float32 by no more than twice as much as
    under autocast (relative RMS error, about 0.5 %, 0.5 % and 2 %); CLIP's tags not at all, whether it was
    trained with them or takes them from this `source` now.
    """
    torch.manual_seed(0)
    tada = build(config(weights="weights/tiny", **options)).eval()
    small = copy.deepcopy(tada)
    small.run_unet = small.unet.features
    shrink(small, source, training=True)
    image = torch.stack([torch.from_numpy(scenes.draw(i).image[:96].copy()).permute(2, 0, 1) for i in (1, 2)])
    image = normalise(image)

    def stages(tada: Tada, autocast: bool) -> list[Tensor]:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            latent, (tokens, embedding) = tada.vae.encode(tada.padded(image)), tada.image_features(image)
            condition = tada.adapter(tokens, embedding, tada.text(TAGS))
            return [latent, tokens, *tada.unet_features(tada.noised(latent), condition)]

    exact, rounded, ours = stages(tada, False), stages(tada, True), stages(small, True)
    for x, autocast, expected in zip(ours, rounded, exact, strict=True):
        assert 0 < error(x, expected) <= 2 * error(autocast, expected) + 0.003
    if "clip" in (source, tada.config.tags):
        assert open_tagger(small, "clip")(image) == open_tagger(tada, "clip")(image)
    assert small.vae.decoder is None  # on the CPU it would be refused by DDP, on a GPU only take memory
    assert {p.dtype for p in small.parameters() if p.requires_grad} == {torch.float32}
    weights = {p.dtype for name, p in small.unet.named_parameters() if ".lora_" not in name}
    assert weights == {torch.bfloat16 if tada.config.keeps_unet else torch.float32}

    shrink(small, source, training=False)  # the weights of autocast, cast once
    assert {p.dtype for name, p in small.unet.named_parameters() if ".lora_" not in name} == {torch.bfloat16}
    for x, autocast, expected in zip(stages(small, True), rounded, exact, strict=True):
        assert 0 < error(x, expected) <= 2 * error(autocast, expected) + 0.003
