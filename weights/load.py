"""Load official weights into our modules: by name, strictly, from safetensors only (no pickle).

Our attribute names are the official ones, so most names pass unchanged. The tables below translate the
single-file (CompVis) layout and the older spellings of the autoencoder's attention; diffusers renames them in
the same way (`scripts/convert_diffusers_to_original_stable_diffusion.py`, `models/modeling_utils.py`).
"""

import json
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from clip import CLIP, TextTower
from errors import WeightsError
from ram import RAM
from unet import UNet
from vae import VAE

Module = TypeVar("Module", bound=nn.Module)
Rename = tuple[str, str | Callable[[re.Match], str]]  # a pattern and its replacement, for re.sub

CODE = Path(__file__).parents[1]
FILES = ("diffusion_pytorch_model.safetensors", "model.safetensors")  # file names in a component's folder
FILES += tuple(name.replace(".safetensors", ".fp16.safetensors") for name in FILES)
FLOATS, BYTES = ("F64", "F32", "F16", "BF16"), ("F8_E4M3", "F8_E5M2")  # dtypes that a cast understands
HEADER_LIMIT = 100_000_000  # bytes; the safetensors library's own (tensor.rs, `MAX_HEADER_SIZE`)


def part(block: int, kind: str) -> str:
    """Translate part 0 (ResNet) or 1 (attention) of a CompVis block: `(4, "1")` -> "1.attentions.1."."""
    return f"{block // 3}.{'attentions' if kind == '1' else 'resnets'}.{block % 3}."


# CompVis numbers blocks across levels, three per level. Down (after conv_in, number 0): two blocks, then the
# downsampler. Up: three blocks, the third with the upsampler.
UNET_NAMES: tuple[Rename, ...] = (
    (r"^time_embed\.0\.", "time_embedding.linear_1."),
    (r"^time_embed\.2\.", "time_embedding.linear_2."),
    (r"^input_blocks\.0\.0\.", "conv_in."),
    (r"^input_blocks\.(\d+)\.0\.op\.", lambda m: f"down_blocks.{int(m[1]) // 3 - 1}.downsamplers.0.conv."),
    (r"^input_blocks\.(\d+)\.([01])\.", lambda m: "down_blocks." + part(int(m[1]) - 1, m[2])),
    (r"^middle_block\.([02])\.", lambda m: f"mid_block.resnets.{int(m[1]) // 2}."),
    (r"^middle_block\.1\.", "mid_block.attentions.0."),
    (r"^output_blocks\.(\d+)\.[12]\.conv\.", lambda m: f"up_blocks.{int(m[1]) // 3}.upsamplers.0.conv."),
    (r"^output_blocks\.(\d+)\.([01])\.", lambda m: "up_blocks." + part(int(m[1]), m[2])),
    (r"^out\.0\.", "conv_norm_out."),
    (r"^out\.2\.", "conv_out."),
    (r"\.in_layers\.0\.", ".norm1."),
    (r"\.in_layers\.2\.", ".conv1."),
    (r"\.emb_layers\.1\.", ".time_emb_proj."),
    (r"\.out_layers\.0\.", ".norm2."),
    (r"\.out_layers\.3\.", ".conv2."),
    (r"\.skip_connection\.", ".conv_shortcut."),
)

# The decoder's levels are numbered from the finest in CompVis, from the coarsest in diffusers. The attention
# has three spellings: CompVis (q), the official diffusers file (query), today's diffusers (to_q, as ours).
VAE_NAMES: tuple[Rename, ...] = (
    (r"^encoder\.down\.(\d)\.block\.", r"encoder.down_blocks.\1.resnets."),
    (r"^encoder\.down\.(\d)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
    (r"^decoder\.up\.(\d)\.block\.", lambda m: f"decoder.up_blocks.{3 - int(m[1])}.resnets."),
    (r"^decoder\.up\.(\d)\.upsample\.", lambda m: f"decoder.up_blocks.{3 - int(m[1])}.upsamplers.0."),
    (r"\.mid\.block_([12])\.", lambda m: f".mid_block.resnets.{int(m[1]) - 1}."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.attentions\.0\.norm\.", ".attentions.0.group_norm."),
    (r"\.attentions\.0\.q(uery)?\.", ".attentions.0.to_q."),
    (r"\.attentions\.0\.k(ey)?\.", ".attentions.0.to_k."),
    (r"\.attentions\.0\.v(alue)?\.", ".attentions.0.to_v."),
    (r"\.attentions\.0\.proj_(out|attn)\.", ".attentions.0.to_out.0."),
)


@dataclass(frozen=True)
class Official:
    """A module's official file, and how its names are spelled there."""

    file: str  # the official file, for messages
    prefixes: tuple[str, ...] = ()  # of its names in files that hold several modules
    names: tuple[Rename, ...] = ()
    ignored: str = r"(^|\.)position_ids$"  # a buffer 0, 1, 2, ... in older CLIP files
    command: str = "python -m weights.fetch"

    @property
    def cure(self) -> str:
        return f"get {self.file}: `{self.command}`{'' if Path.cwd() == CODE else f' in {CODE}'}"


WEIGHTS = "diffusion_pytorch_model.safetensors of stable-diffusion-v1-5/stable-diffusion-v1-5"
TEXT = "text_encoder/model.safetensors of stable-diffusion-v1-5/stable-diffusion-v1-5"
OFFICIAL: dict[type[nn.Module], Official] = {
    UNet: Official(f"unet/{WEIGHTS}", ("model.diffusion_model.",), UNET_NAMES),
    VAE: Official(f"vae/{WEIGHTS}", ("first_stage_model.",), VAE_NAMES),
    CLIP: Official("model.safetensors of openai/clip-vit-large-patch14"),
    RAM: Official(
        "ram_swin_large_14m.pth of xinyu1205/recognize_anything_model",
        names=((r"^vision_multi\.", "tagging_head."),),
        # Ignored: the two BERTs that write captions, and buffers that are computed from sizes.
        ignored=r"^(tag_encoder|text_decoder)\.|\.(relative_position_index|attn_mask)$",
        command="python -m weights.fetch --ram",
    ),
    TextTower: Official(TEXT, ("cond_stage_model.transformer.text_model.", "text_model.")),
}


def load(module: Module, path: str | Path) -> Module:
    """Load an official file, or the one in a folder, into a module of `OFFICIAL`'s types; return the module.

    The module may be built normally or on `meta` (faster: no initialisation). It keeps its dtype, and its
    device unless that was `meta`. Raise WeightsError, listing names, unless all names and shapes fit and all
    tensors hold finite floating-point numbers; warn of 8-bit ones.
    """
    assert type(module) in OFFICIAL, f"cannot load a {type(module).__name__}: need one of OFFICIAL's modules"
    official = OFFICIAL[type(module)]
    file = find(Path(path), official)
    refuse_foreign(file, official)
    ours = module.state_dict()
    try:
        weights = safe_open(file, "pt")
    except SafetensorError as error:
        raise WeightsError(f"{file} is corrupt ({error}); {official.cure}") from None
    with weights:
        names = weights.keys()
        shapes = {name: tuple(weights.get_slice(name).get_shape()) for name in names}
        try:
            theirs = match({name: tuple(x.shape) for name, x in ours.items()}, shapes, file, official)
        except WeightsError:
            tiny = (file.parent.parent / "vae" / "sha256.json").is_file()  # beside its latent scale
            if tiny and module.config != type(module.config).tiny():
                raise WeightsError(f"{file} is of the size tiny: give --model tiny") from None
            raise
        dtypes = {name: weights.get_slice(name).get_dtype() for name in theirs.values()}
        refuse_dtypes(dtypes, file, official)
        state, sums = {}, []
        for name, x in ours.items():
            device = "cpu" if x.is_meta else x.device
            state[name] = weights.get_tensor(theirs[name]).reshape(x.shape).to(device, x.dtype)
            sums.append(state[name].sum(dtype=torch.float32))
    # A finite sum has only finite terms; `isfinite` of every tensor would take 20 times as long.
    suspects = {} if torch.stack(sums).isfinite().all() else state
    if bad := [theirs[name] for name, x in suspects.items() if not x.isfinite().all()]:
        fault = f"NaN or infinity in {len(bad)} of {len(state)} tensors: {first_ten(bad)}"
        raise WeightsError(f"{file} has {fault}; {official.cure}")
    module.load_state_dict(state, strict=True, assign=True)
    return module


def refuse_dtypes(dtypes: dict[str, str], file: Path, official: Official) -> None:
    """Raise WeightsError for tensors that are quantised or no numbers; warn of 8-bit floating point."""
    foreign = [f"{name} ({dtype})" for name, dtype in dtypes.items() if dtype not in FLOATS + BYTES]
    if foreign:
        fault = f"{len(foreign)} tensors that are none of {', '.join(FLOATS)}: {first_ten(foreign)}"
        raise WeightsError(f"{file} has {fault}; {official.cure}")
    rounded = [dtype for dtype in dtypes.values() if dtype in BYTES]
    if rounded:
        effect = "results differ from those of the official file"
        warnings.warn(f"{file} has {len(rounded)} tensors of {rounded[0]}, 8 bits: {effect}", stacklevel=3)


def first_ten(names: list[str]) -> str:
    return ", ".join(names[:10] + ["..."][: len(names) > 10])


def locate(path: str | Path) -> Path:
    """`path`, or the same path beside the code where only that exists: weights/tiny, from any folder."""
    beside = CODE / path
    return Path(path) if Path(path).exists() or not beside.exists() else beside


def absence(path: Path) -> str:
    """Why a file that is needed is not there."""
    if path.is_symlink():
        return f"{path} is a link to {path.readlink()}, which does not exist"
    return f"{path} does not exist"


def find(path: Path, official: Official) -> Path:
    """Return `path` if it is a file, else the first official file in the folder `path`."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise WeightsError(f"{absence(path)}; {official.cure}")
    for name in FILES:
        if (path / name).is_file():
            return path / name
        if (path / name).is_symlink():
            raise WeightsError(f"{absence(path / name)}; {official.cure}")
    held = ", ".join(sorted(x.name for x in path.iterdir())[:10]) or "nothing"
    raise WeightsError(f"{path} holds none of {', '.join(FILES)} but {held}; {official.cure}")


def refuse_foreign(file: Path, official: Official) -> None:
    """Raise WeightsError unless `file` is whole: an 8-byte length, a JSON header, the bytes it declares."""
    size = file.stat().st_size
    with file.open("rb") as f:
        start = f.read(512)
        length = int.from_bytes(start[:8], "little")
        if start[8:9] != b"{":
            raise WeightsError(f"{file} is {kind(start)}, not a safetensors file; {official.cure}")
        f.seek(8)
        header = f.read(length) if 8 + length <= size and length <= HEADER_LIMIT else b""
    try:
        tensors = json.loads(header)
        declared = 8 + length + max(x["data_offsets"][1] for k, x in tensors.items() if k != "__metadata__")
        fault = "truncated" if size < declared else "corrupt"
        fault += f": it has {size:,} bytes and its header declares {declared:,}"
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        declared, fault = None, "truncated or corrupt: its header cannot be read"
    if size != declared:
        raise WeightsError(f"{file} is {fault}; {official.cure}")


def kind(start: bytes) -> str:
    """Name the kind of a file by its first bytes."""
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer (the repository was cloned without `git lfs pull`)"
    if start.lstrip()[:1] == b"<":
        return "an HTML page (an error or login page saved under this name)"
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return "a pickle, which could run code and is never opened"
    return "a file of an unknown kind" if start else "an empty file"


def match(
    ours: dict[str, tuple[int, ...]], theirs: dict[str, tuple[int, ...]], file: Path, official: Official
) -> dict[str, str]:
    """Map our names to the file's; raise WeightsError unless names and shapes fit one to one."""
    prefix = next((p for p in official.prefixes if any(name.startswith(p) for name in theirs)), "")
    names, duplicates = {}, []
    for name in theirs:
        if name.startswith(prefix) and not re.search(official.ignored, name):
            short = name.removeprefix(prefix)
            for pattern, replacement in official.names:
                short = re.sub(pattern, replacement, short)
            if names.setdefault(short, name) != name:
                duplicates.append(name)

    missing = [name for name in ours if name not in names]
    unexpected = [name for short, name in names.items() if short not in ours] + duplicates
    # The VAE's attention is a 1x1 convolution in CompVis: (512, 512, 1, 1) is our (512, 512).
    misshapen = [
        f"{names[name]} {theirs[names[name]]} instead of {shape}"
        for name, shape in ours.items()
        if name in names and theirs[names[name]] not in (shape, (*shape, 1, 1))
    ]
    faults = {"missing": missing, "unexpected": unexpected, "of the wrong shape": misshapen}.items()
    faults = [f"{len(x)} {what}: {first_ten(x)}" for what, x in faults if x]
    if faults:
        raise WeightsError(f"{file} does not fit ({'; '.join(faults)}); {official.cure}")
    return names
