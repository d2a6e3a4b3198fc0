"""ram.py equals transformers' SwinModel and BLIP's text layers; its windows, masks and merging equal plain
loops; weights/ram.py reads the official checkpoint's layout and refuses all else by name.
"""

import itertools
import math
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import SMALL_RAM, official_ram, reference_ram
from PIL import Image
from proof import BAR, error
from safetensors.torch import load_file
from torch import Tensor

from errors import WeightsError
from ram import RAM, PatchMerging, RAMConfig, WindowAttention, shift_mask, squash, window_order
from weights.load import load
from weights.ram import MODEL, NAMES, THRESHOLDS, convert, load_ram, read_lines

MEAN, STD = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def normalised(image: Tensor) -> Tensor:
    """Written out again: ImageNet's normalisation of an image in [-1, 1]."""
    return ((image + 1) / 2 - MEAN) / STD


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The reference and ours with the same weights, by way of the file that transformers writes."""
    torch.manual_seed(0)
    reference = reference_ram(SMALL_RAM)
    ours = RAM(SMALL_RAM)
    ours.load_state_dict(official_ram(reference, tmp_path_factory.mktemp("swin")))
    return reference, ours.eval()


# Equality with transformers


def test_logits_and_tokens_equal_the_reference(pair):
    """Two different images."""
    reference, ours = pair
    image = torch.rand(2, 3, 128, 128) * 2 - 1
    pixels = normalised(image)
    with torch.no_grad():
        expected, logits = reference(pixels), ours(image)
        assert error(ours.visual_encoder(pixels), reference.swin(pixels).last_hidden_state) <= BAR
    assert logits.shape == (2, SMALL_RAM.tags)
    assert error(logits, expected) <= BAR
    assert error(logits[:1], expected[1:]) > 1000 * BAR  # the images differ in the result


def test_two_images_do_not_mix(pair):
    _, ours = pair
    image = torch.rand(2, 3, 128, 128) * 2 - 1
    with torch.no_grad():
        assert error(ours(image)[1:], ours(image[1:])) <= BAR


def test_chunks_change_nothing(pair, monkeypatch):
    """Also where the last chunk is shorter."""
    _, ours = pair
    image = torch.rand(2, 3, 128, 128) * 2 - 1
    with torch.no_grad():
        whole = ours(image)
        monkeypatch.setattr("ram.CHUNK", 30)
        assert error(ours(image), whole) <= BAR


def test_bfloat16_is_as_exact_as_the_reference(pair, tmp_path):
    """Within twice the error that the reference itself makes in bfloat16."""
    reference, ours = pair
    theirs, mine = reference_ram(SMALL_RAM), RAM(SMALL_RAM)
    theirs.load_state_dict(reference.state_dict())
    mine.load_state_dict(ours.state_dict())
    theirs.bfloat16(), mine.bfloat16().eval()
    image = torch.rand(2, 3, 128, 128) * 2 - 1
    pixels = normalised(image).bfloat16()
    with torch.no_grad():
        for exact, low, result in (
            (reference(pixels.float()), theirs(pixels), mine(image)),
            (
                reference.swin(pixels.float()).last_hidden_state,
                theirs.swin(pixels).last_hidden_state,
                mine.visual_encoder(pixels),
            ),
        ):
            bound = error(low, exact)
            assert 1e-4 < bound < 0.1  # bfloat16 really was used
            assert error(result, exact) <= 2 * bound


@pytest.mark.slow
def test_full_width_equals_the_reference(tmp_path):
    """Swin-L at 384x384 and 4,585 tags."""
    reference = reference_ram(RAMConfig())
    with torch.device("meta"):
        ours = RAM()
    ours.load_state_dict(official_ram(reference, tmp_path), assign=True)
    image = torch.rand(2, 3, 384, 384) * 2 - 1
    pixels = normalised(image)
    with torch.no_grad():
        logits = ours(image)
        assert logits.shape == (2, 4585)
        assert error(logits, reference(pixels)) <= BAR
        tokens = ours.visual_encoder(pixels)
        assert tokens.shape == (2, 144, 1536)
        assert error(tokens, reference.swin(pixels).last_hidden_state) <= BAR


# The input


@pytest.mark.parametrize("size", [(128, 128), (300, 300), (90, 200), (31, 17)])
def test_squash_equals_the_official_preprocessing(size):
    """Ours, in float, against Pillow's bilinear on 8-bit images: half a grey level apart on average."""
    H, W = size
    grain = torch.rand(1, 3, H // 8 + 1, W // 8 + 1)
    levels = (F.interpolate(grain, (H, W), mode="bilinear")[0] * 255).round().to(torch.uint8)
    resized = Image.fromarray(levels.permute(1, 2, 0).numpy())
    resized = resized.resize((128, 128), Image.Resampling.BILINEAR)
    pixels = torch.tensor(np.array(resized)).permute(2, 0, 1) / 255
    result = squash(levels[None].float() / 127.5 - 1, 128)
    grey_level = 1 / 255 / 0.225
    assert (result[0] - (pixels - MEAN) / STD).abs().mean() < 0.5 * grey_level
    assert (result[0] - (pixels - MEAN) / STD).abs().max() < 2 * grey_level


def test_any_size(pair):
    """A portrait, a strip, an image of one pixel."""
    for size in ((200, 90), (17, 400), (1, 1)):
        with torch.no_grad():
            assert pair[1](torch.rand(1, 3, *size) * 2 - 1).isfinite().all()


# Plain loops


def test_the_mask_joins_only_tokens_that_are_neighbours_in_the_image():
    """In every window: 0 for two tokens less than a window apart in the image, else -100."""
    side, window, shift = 16, 4, 2
    order = window_order(side, window, shift, torch.device("cpu"))
    mask = shift_mask(order, side, window, shift)
    assert mask.shape == (16, 1, 16, 16)
    for i, tokens in enumerate(order.reshape(16, 16).tolist()):
        for q, query in enumerate(tokens):
            for k, key in enumerate(tokens):
                rows, columns = abs(query // 16 - key // 16), abs(query % 16 - key % 16)
                assert mask[i, 0, q, k] == (0 if rows < window and columns < window else -100)


@pytest.mark.parametrize("shift", [0, 2])
def test_the_order_is_that_of_a_loop(shift):
    """Window (h, w) holds the tokens from row 4 h + shift and column 4 w + shift on, cyclically."""
    expected = []
    for h in range(3):
        for w in range(3):
            for i in range(4):
                for j in range(4):
                    expected.append((4 * h + i + shift) % 12 * 12 + (4 * w + j + shift) % 12)
    assert window_order(12, 4, shift, torch.device("cpu")).tolist() == expected


def test_attention_equals_a_loop():
    """Of every query, head and window: the bias by the difference of rows and columns, then the mask."""
    attention, x = WindowAttention(width=12, heads=2, window=3), torch.randn(2, 36, 12)
    torch.nn.init.normal_(attention.relative_position_bias_table)
    mask = torch.randn(4, 1, 9, 9)
    q, k, v = attention.qkv(x).chunk(3, dim=-1)
    expected = torch.zeros(2, 36, 12)
    for image, window, head, query in itertools.product(range(2), range(4), range(2), range(9)):
        part, scores = slice(6 * head, 6 * head + 6), []
        for key in range(9):
            row, column = query // 3 - key // 3 + 2, query % 3 - key % 3 + 2
            product = q[image, 9 * window + query, part] @ k[image, 9 * window + key, part] / math.sqrt(6)
            bias = attention.relative_position_bias_table[row * 5 + column, head]
            scores.append(product + bias + mask[window, 0, query, key])
        values = v[image, 9 * window : 9 * window + 9, part]
        expected[image, 9 * window + query, part] = torch.stack(scores).softmax(dim=0) @ values
    with torch.no_grad():
        assert error(attention(x, mask), attention.proj(expected)) <= BAR


def test_merging_takes_the_column_of_two_tokens_first():
    """The four tokens are (0, 0), (1, 0), (0, 1), (1, 1) in rows and columns."""
    merging, x = PatchMerging(width=3, side=6), torch.randn(2, 36, 3)
    grid, merged = x.reshape(2, 6, 6, 3), []
    for row in range(0, 6, 2):
        for column in range(0, 6, 2):
            four = [grid[:, row + i, column + j] for j in (0, 1) for i in (0, 1)]
            merged.append(torch.cat(four, dim=-1))
    expected = merging.reduction(merging.norm(torch.stack(merged, dim=1)))
    assert error(merging(x), expected) <= BAR


def test_the_mean_token_stands_first_and_is_attended_to(pair):
    """The head by loops over tags: 1 + 16 tokens of the small tower, the mean of the normed ones first."""
    _, ours = pair
    image = torch.rand(2, 3, 128, 128) * 2 - 1
    with torch.no_grad():
        tokens = ours.visual_encoder(normalised(image))
        assert tokens.shape == (2, 16, 192)
        mean = sum(tokens[:, i] for i in range(16)) / 16
        keys = ours.image_proj(torch.stack([mean, *tokens.unbind(dim=1)], dim=1))
        seen = []
        handle = ours.tagging_head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
        logits = ours(image)
        handle.remove()
        assert error(seen[0], keys) <= BAR
        for b in range(2):
            for tag in range(0, SMALL_RAM.tags, 7):
                x = F.relu(ours.wordvec_proj(ours.label_embed[tag]))
                for layer in ours.tagging_head.encoder["layer"]:
                    x = one_query(layer, x, keys[b])
                assert abs(ours.fc(x).item() - logits[b, tag].item()) < 1e-4


def one_query(layer: torch.nn.Module, x: Tensor, tokens: Tensor) -> Tensor:
    """A layer of the head for one query `(C,)`, head by head."""
    project, heads = layer.crossattention["self"], []
    q, k, v = project["query"](x), project["key"](tokens), project["value"](tokens)
    for part in torch.arange(len(x)).chunk(4):
        shares = (k[:, part] @ q[part] / math.sqrt(len(part))).softmax(dim=0)
        heads.append(shares @ v[:, part])
    output = layer.crossattention["output"]
    x = normed(output.dense(torch.cat(heads)) + x, output.LayerNorm)
    y = layer.output.dense(F.gelu(layer.intermediate["dense"](x)))
    return normed(y + x, layer.output.LayerNorm)


def normed(x: Tensor, norm: torch.nn.LayerNorm) -> Tensor:
    x = x - x.mean()
    return x / (x.pow(2).mean() + 1e-12).sqrt() * norm.weight + norm.bias


def test_odd_blocks_shift_by_half_a_window_but_none_of_the_last_stage(pair):
    """By the masks that the blocks get; stages of the official size shift by 6, 6, 6 and 0."""
    with torch.device("meta"):
        assert [stage.shift for stage in RAM().visual_encoder.layers] == [6, 6, 6, 0]
    masked = []
    blocks = [block for stage in pair[1].visual_encoder.layers for block in stage.blocks]
    handles = [
        block.register_forward_pre_hook(lambda _, inputs: masked.append(len(inputs) > 1)) for block in blocks
    ]
    with torch.no_grad():
        pair[1].visual_encoder(torch.randn(1, 3, 128, 128))
    for handle in handles:
        handle.remove()
    assert masked == [False, True] * 4 + [False, False]


# Names, shapes and files


def manifest() -> dict[str, tuple[int, ...]]:
    """The official names and shapes that tagging needs, from the checkpoint's own structure."""

    def linear(name: str, outputs: int, inputs: int) -> dict:
        return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}

    def norm(name: str, width: int) -> dict:
        return {f"{name}.weight": (width,), f"{name}.bias": (width,)}

    shapes = {"visual_encoder.patch_embed.proj.weight": (192, 3, 4, 4)}
    shapes["visual_encoder.patch_embed.proj.bias"] = (192,)
    shapes |= norm("visual_encoder.patch_embed.norm", 192)
    for i, (depth, C, heads) in enumerate([(2, 192, 6), (2, 384, 12), (18, 768, 24), (2, 1536, 48)]):
        stage = f"visual_encoder.layers.{i}"
        for block in (f"{stage}.blocks.{j}" for j in range(depth)):
            shapes |= norm(f"{block}.norm1", C) | norm(f"{block}.norm2", C)
            shapes |= linear(f"{block}.attn.qkv", 3 * C, C) | linear(f"{block}.attn.proj", C, C)
            shapes[f"{block}.attn.relative_position_bias_table"] = (529, heads)
            shapes |= linear(f"{block}.mlp.fc1", 4 * C, C) | linear(f"{block}.mlp.fc2", C, 4 * C)
        if i < 3:
            shapes |= norm(f"{stage}.downsample.norm", 4 * C)
            shapes[f"{stage}.downsample.reduction.weight"] = (2 * C, 4 * C)
    shapes |= norm("visual_encoder.norm", 1536) | linear("image_proj", 512, 1536)
    shapes["label_embed"] = (4585, 512)
    shapes |= linear("wordvec_proj", 768, 512) | linear("fc", 1, 768)
    for layer in ("tagging_head.encoder.layer.0", "tagging_head.encoder.layer.1"):
        shapes |= linear(f"{layer}.crossattention.self.query", 768, 768)
        shapes |= linear(f"{layer}.crossattention.self.key", 768, 512)
        shapes |= linear(f"{layer}.crossattention.self.value", 768, 512)
        shapes |= linear(f"{layer}.crossattention.output.dense", 768, 768)
        shapes |= norm(f"{layer}.crossattention.output.LayerNorm", 768)
        shapes |= linear(f"{layer}.intermediate.dense", 3072, 768) | linear(
            f"{layer}.output.dense", 768, 3072
        )
        shapes |= norm(f"{layer}.output.LayerNorm", 768)
    return shapes


def test_ours_has_the_official_names_and_shapes():
    """366 tensors, 212,117,045 parameters, 195,198,516 of them Swin's."""
    with torch.device("meta"):
        ours = {name: tuple(x.shape) for name, x in RAM().state_dict().items()}
    assert ours == manifest()
    counts = {name: math.prod(shape) for name, shape in ours.items()}
    assert (len(counts), sum(counts.values())) == (366, 212_117_045)
    assert sum(count for name, count in counts.items() if name.startswith("visual_encoder.")) == 195_198_516
    assert sum(count for name, count in counts.items() if name.startswith("tagging_head.")) == 13_389_312


def checkpoint(state: dict[str, Tensor], file: Path) -> Path:
    """A look-alike of the official checkpoint: RAM, a layer of its head by the old name, buffers, and
    the two BERTs of captions.
    """
    new, old = "tagging_head.encoder.layer.0", "vision_multi.encoder.layer.0"
    state = {name.replace(new, old): x for name, x in state.items()}
    for i in range(2):
        block = f"visual_encoder.layers.0.blocks.{i}"
        state[f"{block}.attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.int64)
    state["visual_encoder.layers.0.blocks.1.attn_mask"] = torch.zeros(64, 16, 16)
    query = state["vision_multi.encoder.layer.0.crossattention.self.query.weight"]
    state["tag_encoder.encoder.layer.0.crossattention.self.query.weight"] = query  # tied, as there
    state["text_decoder.bert.embeddings.word_embeddings.weight"] = torch.randn(9, 48)
    torch.save({"model": state}, file)
    return file


@pytest.fixture
def folder(pair, tmp_path):
    """The three files of a small RAM, converted from a look-alike of the checkpoint."""
    convert(checkpoint(pair[1].state_dict(), tmp_path / "ram.pth"), tmp_path / MODEL, SMALL_RAM)
    (tmp_path / NAMES).write_bytes(b"".join(b"tag %d\r\n" % i for i in range(37)))
    (tmp_path / THRESHOLDS).write_text("".join(f"{0.5 + i / 100}\n" for i in range(37)))
    return tmp_path


def test_the_checkpoint_becomes_one_file_that_loads_strictly(pair, folder):
    """Exactly RAM's tensors, bit by bit; frozen; names without their line ends."""
    _, ours = pair
    assert load_file(folder / MODEL).keys() == ours.state_dict().keys()
    assert not list(folder.glob(".*"))
    tagger = load_ram(folder, config=SMALL_RAM)
    for name, x in tagger.model.state_dict().items():
        assert torch.equal(x, ours.state_dict()[name])
    assert not tagger.model.training
    assert not any(x.requires_grad or x.is_meta for x in tagger.model.parameters())
    assert tagger.names == [f"tag {i}" for i in range(37)]
    assert tagger.thresholds.dtype == torch.float32
    assert tagger.thresholds[5] == 0.55


def test_the_checkpoint_is_mapped_not_read(folder, monkeypatch):
    """`weights_only=True` and `mmap=True` alone open it."""
    calls, opened = [], torch.load
    monkeypatch.setattr(torch, "load", lambda file, **how: calls.append(how) or opened(file, **how))
    convert(folder / "ram.pth", folder / MODEL, SMALL_RAM)
    assert calls == [{"map_location": "cpu", "weights_only": True, "mmap": True}]


def test_the_official_lists_fit_the_model(ram):
    """4,585 names and thresholds; ten tags are switched off by a threshold of 1."""
    names = read_lines(ram / "tag_lists" / NAMES, 4585)
    thresholds = [float(x) for x in read_lines(ram / "tag_lists" / THRESHOLDS, 4585)]
    off = {name for name, threshold in zip(names, thresholds, strict=True) if threshold == 1}
    assert off == {"body", "cocktail table", "French", "group", "lie", "show", "see", "set", "stop", "use"}
    assert min(thresholds) == 0.45
    assert thresholds.count(0.65) == 3414
    assert len(set(names)) == 4585


def refusal(call: Callable[[], object], *named: str) -> None:
    """One sentence that names the fault and the cure."""
    with pytest.raises(WeightsError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert "`python -m weights.fetch --ram`" in message
    for text in named:
        assert text in message


@pytest.mark.parametrize("kept", [0, 3, 300, 0.5, -1000])
def test_a_truncated_checkpoint_is_refused(folder, kept):
    data = (folder / "ram.pth").read_bytes()
    (folder / "ram.pth").write_bytes(data[: int(kept * len(data)) if kept == 0.5 else kept])
    before = (folder / MODEL).read_bytes()
    refusal(lambda: convert(folder / "ram.pth", folder / MODEL, SMALL_RAM), str(folder / "ram.pth"))
    assert (folder / MODEL).read_bytes() == before


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:15c7\nsize 5625634877\n",
            "Git LFS pointer",
        ),
        (b"<!DOCTYPE html><html>", "HTML page"),
        (pickle.dumps({"model": {}}), "a pickle"),
        (b"weights", "unknown kind"),
    ],
)
def test_what_is_no_checkpoint_is_named(tmp_path, content, named):
    (tmp_path / "ram.pth").write_bytes(content)
    refusal(lambda: convert(tmp_path / "ram.pth", tmp_path / MODEL, SMALL_RAM), named)
    assert not (tmp_path / MODEL).exists()


def test_a_pickle_is_never_executed(tmp_path):
    """A checkpoint with code in it is refused by torch, and we never ask torch to trust it."""

    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "exploded",)

    torch.save({"model": {"fc.weight": Bomb()}}, tmp_path / "ram.pth")
    refusal(lambda: convert(tmp_path / "ram.pth", tmp_path / MODEL, SMALL_RAM), "could run code")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("content", [{"state_dict": {}}, {"model": {"epoch": 3}}, [torch.zeros(2)]])
def test_a_foreign_checkpoint_is_named(tmp_path, content):
    torch.save(content, tmp_path / "ram.pth")
    refusal(lambda: convert(tmp_path / "ram.pth", tmp_path / MODEL, SMALL_RAM), "no table of tensors")


def test_missing_and_unexpected_names_are_listed(pair, tmp_path):
    """Tag2Text's checkpoint, say, or RAM++'s: names and shapes, before a byte is written."""
    state = pair[1].state_dict()
    state["label_embed.weight"] = state.pop("label_embed")
    state["fc.weight"] = torch.zeros(2, 48)
    file = checkpoint(state, tmp_path / "ram.pth")
    refusal(
        lambda: convert(file, tmp_path / MODEL, SMALL_RAM),
        "1 missing: label_embed;",
        "1 unexpected: label_embed.weight;",
        "1 of the wrong shape: fc.weight (2, 48) instead of (1, 48)",
    )
    assert [path.name for path in tmp_path.iterdir()] == ["ram.pth"]


def test_a_truncated_or_foreign_model_file_is_refused(folder):
    """Loading: the converted file cut short, and that of another size of RAM."""
    data = (folder / MODEL).read_bytes()
    refusal(lambda: load_ram(folder, config=RAMConfig(tags=37)), "of the wrong shape: ")
    (folder / MODEL).write_bytes(data[:-100])
    refusal(lambda: load_ram(folder, config=SMALL_RAM), str(folder / MODEL), "truncated")
    (folder / MODEL).unlink()
    refusal(lambda: load_ram(folder, config=SMALL_RAM), "model.safetensors does not exist")


@pytest.mark.parametrize("name", [NAMES, THRESHOLDS])
def test_a_list_of_another_length_is_refused(folder, name):
    """4,584 names for 4,585 tags; here 36 for 37, an empty line, no file, a binary file."""
    lines = (folder / name).read_text().splitlines()
    (folder / name).write_text("\n".join(lines[:-1]))
    refusal(lambda: load_ram(folder, config=SMALL_RAM), f"{folder / name} has 36 entries for 37 tags")
    (folder / name).write_text("\n".join([*lines[:5], "", *lines[6:]]))
    refusal(lambda: load_ram(folder, config=SMALL_RAM), f"{folder / name} has 36 entries for 37 tags")
    (folder / name).write_bytes(b"\xff\xfe\x00")
    refusal(lambda: load_ram(folder, config=SMALL_RAM), f"{folder / name} is not a text file")
    (folder / name).unlink()
    refusal(lambda: load_ram(folder, config=SMALL_RAM), f"{folder / name} does not exist")


def test_a_threshold_that_is_no_number_is_refused(folder):
    lines = (folder / THRESHOLDS).read_text().splitlines()
    (folder / THRESHOLDS).write_text("\n".join([*lines[:-1], "high"]))
    refusal(lambda: load_ram(folder, config=SMALL_RAM), "could not convert string to float: 'high'")


def test_load_takes_the_file_itself(pair, folder):
    with torch.device("meta"):
        ours = RAM(SMALL_RAM)
    load(ours, folder / MODEL)
    assert torch.equal(ours.label_embed, pair[1].label_embed)
