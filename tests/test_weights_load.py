"""weights/load.py: every official layout gives the same tensors; everything else is refused by name."""

import json
import os
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from oracle import (
    SMALL_CLIP,
    SMALL_UNET,
    SMALL_VAE,
    official_folder,
    reference_clip,
    reference_unet,
    reference_vae,
)
from safetensors.torch import load_file, save_file

from clip import CLIP
from errors import WeightsError
from unet import UNet
from vae import VAE, VAEConfig
from weights.load import CODE, OFFICIAL, load, locate, match

MANIFESTS = Path(__file__).parents[1] / "weights" / "manifests"


def manifest(name: str) -> dict[str, tuple[int, ...]]:
    """Official names and shapes, as the reference libraries build them with the official configuration."""
    rows = [line.split() for line in (MANIFESTS / f"{name}.txt").read_text().splitlines()]
    return {row[0]: tuple(map(int, row[1:])) for row in rows}


def count(shapes: dict[str, tuple[int, ...]], prefix: str = "") -> tuple[int, int]:
    """Tensors and numbers whose name begins with `prefix`."""
    held = [torch.Size(shape).numel() for name, shape in shapes.items() if name.startswith(prefix)]
    return len(held), sum(held)


def shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(x.shape) for name, x in module.state_dict().items()}


# Official names and shapes, on meta: no download, no memory.


@pytest.mark.parametrize(("name", "module"), [("unet", UNet), ("vae", VAE), ("clip", CLIP)])
def test_ours_has_the_official_names_and_shapes(name, module):
    with torch.device("meta"):
        assert shapes(module()) == manifest(name)


@pytest.mark.parametrize(
    ("name", "reference", "config"),
    [("unet", reference_unet, UNet), ("vae", reference_vae, VAE), ("clip", reference_clip, CLIP)],
)
def test_the_manifests_are_the_references_own(name, reference, config):
    with torch.device("meta"):
        assert shapes(reference(config().config)) == manifest(name)


def test_the_manifests_have_the_published_counts():
    """Tensors and parameters of Stable Diffusion v1.5 and CLIP ViT-L/14."""
    assert count(manifest("unet")) == (686, 859_520_964)
    assert count(manifest("vae")) == (248, 83_653_863)
    clip = manifest("clip")
    assert count(clip, "text_model.") == (196, 123_060_480)
    assert count(clip, "vision_model.") == (391, 303_179_776)
    assert count(clip, "visual_projection.") == (1, 1024 * 768)
    assert count(clip) == (590, 427_616_513)


# Layouts. Each writes random weights in one official layout and compares tensor by tensor.


def compvis_unet(state: dict) -> dict:
    """diffusers' names -> the single file's, written out block by block, independent of weights/load.py."""
    blocks = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    blocks |= {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
    blocks |= {"mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2"}
    blocks |= {"mid_block.attentions.0": "middle_block.1"}
    for level in range(4):
        for i in range(2):
            blocks[f"down_blocks.{level}.resnets.{i}"] = f"input_blocks.{1 + 3 * level + i}.0"
            blocks[f"down_blocks.{level}.attentions.{i}"] = f"input_blocks.{1 + 3 * level + i}.1"
        blocks[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{3 + 3 * level}.0.op"
        for i in range(3):
            blocks[f"up_blocks.{level}.resnets.{i}"] = f"output_blocks.{3 * level + i}.0"
            blocks[f"up_blocks.{level}.attentions.{i}"] = f"output_blocks.{3 * level + i}.1"
        blocks[f"up_blocks.{level}.upsamplers.0"] = f"output_blocks.{3 * level + 2}.{1 if level == 0 else 2}"
    inner = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1"}
    inner |= {"norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}

    renamed = {}
    for name, x in state.items():
        block = next(b for b in sorted(blocks, key=len, reverse=True) if name.startswith(b + "."))
        part = name.removeprefix(block + ".")
        if "resnets" in block:
            head, tail = part.split(".", 1)
            part = f"{inner[head]}.{tail}"
        renamed[f"model.diffusion_model.{blocks[block]}.{part}"] = x
    return renamed


def compvis_vae(state: dict) -> dict:
    """diffusers' names -> the single file's; the attention's matrices become 1x1 convolutions."""
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    renamed = {}
    for name, x in state.items():
        short = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        for level in range(4):
            short = short.replace(f"down_blocks.{level}.resnets", f"down.{level}.block")
            short = short.replace(f"down_blocks.{level}.downsamplers.0", f"down.{level}.downsample")
            short = short.replace(f"up_blocks.{level}.resnets", f"up.{3 - level}.block")
            short = short.replace(f"up_blocks.{level}.upsamplers.0", f"up.{3 - level}.upsample")
        short = short.replace("mid_block.resnets.0", "mid.block_1").replace(
            "mid_block.resnets.1", "mid.block_2"
        )
        for ours, theirs in attention.items():
            short = short.replace(f"mid_block.attentions.0.{ours}.", f"mid.attn_1.{theirs}.")
        if "attn_1" in short and x.ndim == 2:
            x = x[:, :, None, None]
        renamed[f"first_stage_model.{short}"] = x.contiguous()
    return renamed


def equal(module: torch.nn.Module, state: dict) -> bool:
    ours = module.state_dict()
    return ours.keys() == state.keys() and all(torch.equal(ours[name], x) for name, x in state.items())


@pytest.fixture(scope="module")
def single_file(tmp_path_factory):
    """One file with all parts, as v1-5-pruned-emaonly.safetensors: UNet, autoencoder, text encoder, schedule,
    EMA.
    """
    unet, vae, clip = reference_unet(SMALL_UNET), reference_vae(SMALL_VAE), reference_clip(SMALL_CLIP)
    text = {
        f"cond_stage_model.transformer.text_model.{k}": v for k, v in clip.text_model.state_dict().items()
    }
    text["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    others = {"betas": torch.zeros(1000), "model_ema.decay": torch.zeros(1)}
    file = tmp_path_factory.mktemp("single") / "v1-5-pruned-emaonly.safetensors"
    state = compvis_unet(unet.state_dict()) | compvis_vae(vae.state_dict()) | text | others
    save_file({name: x.contiguous() for name, x in state.items()}, file)
    return file, unet, vae, clip


def test_single_file_gives_every_part(single_file):
    file, unet, vae, clip = single_file
    assert equal(load(UNet(SMALL_UNET), file), unet.state_dict())
    assert equal(load(VAE(SMALL_VAE), file), vae.state_dict())
    assert equal(load(CLIP(SMALL_CLIP).text_model, file), clip.text_model.state_dict())


def test_the_single_file_of_this_test_is_the_official_layout(single_file):
    """diffusers' own converter reads it back to its own names."""
    file, unet, vae, _ = single_file
    state = load_file(file)
    config = {"layers_per_block": 2, "down_block_types": ["x"] * 4, "up_block_types": ["x"] * 4}
    config |= {"class_embed_type": None, "addition_embed_type": None}
    converted = convert_ldm_unet_checkpoint(dict(state), config)
    assert converted.keys() == unet.state_dict().keys()
    assert all(torch.equal(converted[name], x) for name, x in unet.state_dict().items())
    converted = convert_ldm_vae_checkpoint(dict(state), config)
    assert all(torch.equal(converted[name].reshape(x.shape), x) for name, x in vae.state_dict().items())


def test_single_file_names_of_the_official_size():
    """Every one of the 686 and 248 names of v1.5 is found, by shape too."""
    for name, module, rename in (("unet", UNet, compvis_unet), ("vae", VAE, compvis_vae)):
        official = manifest(name)
        theirs = rename({key: torch.empty(shape, device="meta") for key, shape in official.items()})
        theirs = {key: tuple(x.shape) for key, x in theirs.items()}
        assert match(official, theirs, Path("v1-5.safetensors"), OFFICIAL[module]).keys() == official.keys()


def test_old_spelling_of_the_autoencoders_attention(tmp_path):
    """The official diffusers file has query, key, value, proj_attn; diffusers reads it, and so do we."""
    reference = reference_vae(SMALL_VAE)
    folder = official_folder(reference, tmp_path)
    file = folder / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for name, x in load_file(file).items():
        for new, spelling in old.items():
            name = name.replace(f".attentions.0.{new}.", f".attentions.0.{spelling}.")
        state[name] = x
    assert sum(".query." in name for name in state) == 4
    save_file(state, file)
    assert equal(load(VAE(SMALL_VAE), folder), reference.state_dict())
    assert equal(AutoencoderKL.from_pretrained(folder), reference.state_dict())


def test_half_precision_variant(tmp_path):
    """`*.fp16.safetensors` alone in the folder; the module keeps its own dtype."""
    folder = official_folder(reference_unet(SMALL_UNET).half(), tmp_path, variant="fp16")
    assert [x.name for x in folder.glob("*.safetensors")] == ["diffusion_pytorch_model.fp16.safetensors"]
    halves = load_file(folder / "diffusion_pytorch_model.fp16.safetensors")
    assert equal(load(UNet(SMALL_UNET), folder), {name: x.float() for name, x in halves.items()})
    assert equal(load(UNet(SMALL_UNET).half(), folder), halves)


@pytest.mark.parametrize("prefix", ["text_model.", ""])
def test_text_tower_alone(tmp_path, prefix):
    """Stable Diffusion's text_encoder/: with the prefix of older files or without, position_ids or not."""
    tower = reference_clip(SMALL_CLIP).text_model
    state = {prefix + name: x for name, x in tower.state_dict().items()}
    if prefix:
        state[prefix + "embeddings.position_ids"] = torch.arange(77)[None]
    save_file(state, tmp_path / "model.safetensors")
    assert equal(load(CLIP(SMALL_CLIP).text_model, tmp_path), tower.state_dict())


def test_clip_file_with_position_ids(tmp_path):
    """As openai/clip-vit-large-patch14 has them, in both towers; its text tower can be had alone."""
    reference = reference_clip(SMALL_CLIP)
    state = dict(reference.state_dict())
    state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    state["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(state, tmp_path / "model.safetensors")
    assert equal(load(CLIP(SMALL_CLIP), tmp_path), reference.state_dict())
    assert equal(load(CLIP(SMALL_CLIP).text_model, tmp_path), reference.text_model.state_dict())


def test_meta_and_built_modules_load_alike(tmp_path):
    """On `meta` nothing is initialised, and nothing is left there; what was frozen stays frozen."""
    folder = official_folder(reference_unet(SMALL_UNET), tmp_path)
    with torch.device("meta"):
        lazy = UNet(SMALL_UNET).requires_grad_(False)
    built = UNet(SMALL_UNET)
    load(lazy, folder), load(built, folder / "diffusion_pytorch_model.safetensors")
    assert equal(lazy, built.state_dict())
    assert not any(p.is_meta or p.requires_grad for p in lazy.parameters())
    assert all(p.requires_grad for p in built.parameters())


# Refusals: one sentence with the file, the fault and the cure.


@pytest.fixture
def file(tmp_path):
    """A good file to spoil."""
    return official_folder(reference_unet(SMALL_UNET), tmp_path) / "diffusion_pytorch_model.safetensors"


def refusal(path: Path, module: torch.nn.Module | None = None) -> str:
    with pytest.raises(WeightsError) as caught:
        load(module or UNet(SMALL_UNET), path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    assert (
        "get unet/diffusion_pytorch_model.safetensors of stable-diffusion-v1-5/stable-diffusion-v1-5"
        in message
    )
    assert "python -m weights.fetch" in message
    return message


def test_names_and_shapes_that_do_not_fit(file):
    """At most ten of each kind, with the count; nothing is loaded."""
    state = load_file(file)
    lost = [name for name in state if name.startswith("down_blocks.0.")][:12]
    for name in lost:
        state[f"extra.{name}"] = state.pop(name)
    state["conv_out.weight"] = state["conv_out.weight"][:3].clone()
    save_file(state, file)
    unet = UNet(SMALL_UNET)
    before = {name: x.clone() for name, x in unet.state_dict().items()}
    message = refusal(file, unet)
    assert "12 missing: " in message and "12 unexpected: " in message
    assert message.count("extra.") == 10
    assert "1 of the wrong shape: conv_out.weight (3, 32, 3, 3) instead of (4, 32, 3, 3)" in message
    assert equal(unet, before)


def test_the_same_tensor_twice(file):
    """Two spellings of one name in one file: which one is meant?"""
    state = load_file(file)
    state["out.2.bias"] = state["conv_out.bias"].clone()
    save_file(state, file)
    assert "1 unexpected: out.2.bias" in refusal(file)


def test_another_components_folder(tmp_path):
    """The autoencoder's weights for the UNet: a sentence, not a page of names."""
    folder = official_folder(reference_vae(SMALL_VAE), tmp_path)
    message = refusal(folder / "diffusion_pytorch_model.safetensors")
    assert "missing: " in message and len(message) < 3000


@pytest.mark.parametrize(
    ("start", "named"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:19da\nsize 3438167540\n",
            "Git LFS pointer",
        ),
        (b"<!DOCTYPE html><html><head><title>404</title>", "HTML page"),
        (b"\n  <html>", "HTML page"),
        (b"PK\x03\x04" + bytes(60), "pickle"),
        (b"\x80\x02}q\x00", "pickle"),
        (b"", "empty file"),
        (b"garbage of no kind", "unknown kind"),
        (struct.pack("<Q", 1 << 40) + b'{"a":1}', "truncated or corrupt"),
        (struct.pack("<Q", 2) + b"{}", "truncated or corrupt"),
        (struct.pack("<Q", 7) + b'{"a":1}', "truncated or corrupt"),
    ],
)
def test_what_is_not_weights_is_named(file, start, named):
    file.write_bytes(start)
    assert named in refusal(file)


def test_a_truncated_file_is_named(file):
    """Both sizes are given."""
    size = file.stat().st_size
    os.truncate(file, size - 100)
    assert f"truncated: it has {size - 100:,} bytes and its header declares {size:,}" in refusal(file)


def test_an_inconsistent_header_is_refused(file):
    """Offsets that do not fit their shapes: the safetensors library refuses, and we name the file."""
    header = b'{"a":{"dtype":"F32","shape":[1000000],"data_offsets":[0,4]}}'
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    assert "corrupt" in refusal(file)


@pytest.mark.parametrize("header", ['{"a":' * 2000, '{"__metadata__":' + "[" * 2000])
def test_a_nested_header_is_refused(file, header):
    """Which the JSON library refuses with an error of its own."""
    file.write_bytes(struct.pack("<Q", len(header)) + header.encode())
    assert "truncated or corrupt: its header cannot be read" in refusal(file)


def test_a_header_has_a_largest_size(file, monkeypatch):
    """It is read into memory."""
    monkeypatch.setattr("weights.load.HEADER_LIMIT", 1000)
    assert "its header cannot be read" in refusal(file)


def retyped(file: Path, name: str, dtype: str, size: float) -> None:
    """Give tensor `name` the `dtype` of `size` bytes a number, all zero, whatever torch knows of it."""
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8:start]), b""
    for key, entry in header.items():
        if key != "__metadata__":
            begin, end = (start + x for x in entry["data_offsets"])
            held = content[begin:end]
            if key == name:
                held = bytes(int(size * torch.Size(entry["shape"]).numel()))
                entry["dtype"] = dtype
            entry["data_offsets"] = [len(data), len(data) + len(held)]
            data += held
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        ("I8", 1),
        ("U8", 1),
        ("I64", 8),
        ("BOOL", 1),
        ("C64", 8),
        ("F4", 0.5),
        ("F6_E2M3", 0.75),
        ("F8_E8M0", 1),
    ],
)
def test_types_that_are_no_floating_point_are_refused(file, dtype, size):
    """As int8 codes whose scales are in another file: a cast would take them for weights."""
    retyped(file, "conv_in.weight", dtype, size)
    sentence = f"has 1 tensors that are none of F64, F32, F16, BF16: conv_in.weight ({dtype}); get"
    assert sentence in refusal(file)


def test_types_of_tensors_that_are_not_used(single_file, tmp_path):
    """Other parts of a single file may have any type."""
    file = shutil.copy(single_file[0], tmp_path / "single.safetensors")
    retyped(file, "betas", "I8", 1)
    assert equal(load(UNet(SMALL_UNET), file), single_file[1].state_dict())


@pytest.mark.parametrize(
    ("dtype", "kind"), [(torch.float8_e4m3fn, "F8_E4M3"), (torch.float8_e5m2, "F8_E5M2")]
)
def test_eight_bits_are_used_with_a_warning(file, dtype, kind):
    state = load_file(file)
    rounded = {name: x.to(dtype) if x.ndim > 1 else x for name, x in state.items()}
    save_file(rounded, file)
    count = sum(x.ndim > 1 for x in state.values())
    with pytest.warns(UserWarning, match=f"{file} has {count} tensors of {kind}, 8 bits: results differ"):
        unet = load(UNet(SMALL_UNET), file)
    assert equal(unet, {name: x.float() for name, x in rounded.items()})


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_not_finite_are_named(file, value):
    """Also opposite ones, and those that become infinite in the module's own type."""
    state = load_file(file)
    state["conv_out.bias"][3], state["conv_in.weight"][0, 0, 0, 1] = value, -value
    save_file(state, file)
    message = refusal(file)
    names = "NaN or infinity in 2 of 686 tensors: conv_in.weight, conv_out.bias;"
    assert names in message or "conv_out.bias, conv_in.weight;" in message


def test_numbers_beyond_half_precision(file):
    """70,000 is infinite there. Finite numbers are right whose sum is not."""
    state = load_file(file)
    state["conv_out.bias"] = torch.tensor([3e38, 3e38, 3e38, 0])
    save_file(state, file)
    assert equal(load(UNet(SMALL_UNET), file), state)
    state["conv_out.bias"] = torch.tensor([0.0, 7e4, 0, 0])
    save_file(state, file)
    assert "NaN or infinity in 1 of 686 tensors: conv_out.bias;" in refusal(file, UNet(SMALL_UNET).half())


def test_a_pickle_is_never_executed(tmp_path, file):
    """Neither by its own name nor behind a safetensors name."""

    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "exploded",)

    torch.save({"weight": Bomb()}, file)
    refusal(file)
    file.write_bytes(pickle.dumps(Bomb()))
    refusal(file)
    file.rename(file.with_name("diffusion_pytorch_model.bin"))
    assert "holds none of" in refusal(file.parent)
    assert not (tmp_path / "exploded").exists()


def test_what_is_missing_is_named(tmp_path):
    assert "does not exist" in refusal(tmp_path / "nowhere")
    (tmp_path / "unet").mkdir()
    assert "but unet;" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["unet", "unet/diffusion_pytorch_model.safetensors"])
def test_a_dangling_link_is_named_with_its_target(tmp_path, name):
    """As in a cache of the Hub whose blobs were deleted; the folder itself or its file."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).symlink_to("/gone/blob")
    assert refusal(tmp_path / "unet").startswith(f"{tmp_path / name} is a link to /gone/blob, which does not")


def test_weights_beside_the_code_are_found_from_any_folder(tmp_path, monkeypatch):
    """A folder of that name here comes first; what is nowhere keeps its name."""
    monkeypatch.chdir(tmp_path)
    assert locate("weights/tiny") == CODE / "weights" / "tiny"
    assert locate("weights/nothing") == Path("weights/nothing")
    assert locate(tmp_path / "weights/tiny") == tmp_path / "weights/tiny", "an absolute path is meant"
    (tmp_path / "weights" / "tiny").mkdir(parents=True)
    assert locate("weights/tiny") == Path("weights/tiny")


def test_the_cure_can_be_typed_where_the_user_is(tmp_path, monkeypatch):
    """`python -m weights.fetch` runs in the clone alone."""
    for folder, where in ((CODE, ""), (tmp_path, f" in {CODE}")):
        monkeypatch.chdir(folder)
        assert refusal(tmp_path / "nowhere").endswith(f"`python -m weights.fetch`{where}")


def test_a_file_of_tiny_is_recognised(tmp_path):
    """Its cure is no download; a damaged one, and one beside no latent scale of tiny, keep theirs."""
    with torch.device("meta"):
        vae, clip, tiny = VAE(), CLIP(), VAE(VAEConfig.tiny())
    for module, part in ((vae, "vae"), (clip, "clip")):
        with pytest.raises(
            WeightsError, match=rf"^weights/tiny/{part}/\S+ is of the size tiny: give --model tiny$"
        ):
            load(module, f"weights/tiny/{part}")
    moved = Path(shutil.copytree("weights/tiny/vae", tmp_path / "vae"))
    save_file({"x": torch.zeros(1)}, next(moved.glob("*.safetensors")))
    for module, kept in ((tiny, True), (vae, False)):
        if not kept:
            (moved / "sha256.json").unlink()
        with pytest.raises(WeightsError, match=r"does not fit \(.*weights.fetch"):
            load(module, moved)
