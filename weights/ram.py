"""RAM's files: from the official checkpoint to one safetensors file, and all that tagging needs in one call.

The checkpoint is a pickle of 5.6 GB. torch opens it with `weights_only=True`, which builds tensors and runs
no code, and maps it into memory, so only the 0.8 GB of the tagger are read.
"""

import pickle
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from errors import WeightsError
from ram import RAM, RAMConfig
from run.files import replacing
from weights.load import OFFICIAL, absence, kind, load, locate, match

MODEL = "model.safetensors"
NAMES = "ram_tag_list.txt"
THRESHOLDS = "ram_tag_list_threshold.txt"


def ram_folder(weights: str | Path) -> Path:
    """RAM's folder, next to that of the prior; weights/ram of random weights."""
    return locate(Path("weights" if str(weights) == "random" else Path(weights).parent, "ram"))


class LoadedRAM(NamedTuple):
    """RAM, its K tags in the order of its logits, and the probability `(K,)` that each tag must exceed.

    A tag whose threshold is 1 is never reported: RAM's authors switched ten of them off.
    """

    model: RAM
    names: list[str]
    thresholds: Tensor


def load_ram(
    folder: str | Path, device: str | torch.device = "cpu", config: RAMConfig | None = None
) -> LoadedRAM:
    """Load the three files of `python -m weights.fetch --ram`: a frozen RAM, names, thresholds.

    `config`: the sizes, None = the official ones. Raise WeightsError if a file is missing or does not fit.
    """
    folder, config = Path(folder), config or RAMConfig()
    require_files(folder)
    names = read_lines(folder / NAMES, config.tags)
    lines = read_lines(folder / THRESHOLDS, config.tags)
    try:
        thresholds = torch.tensor([float(line) for line in lines], device=device)
        if not ((thresholds >= 0) & (thresholds <= 1)).all():
            raise ValueError("a threshold is not in 0..1")
    except ValueError as error:
        raise WeightsError(f"{folder / THRESHOLDS} is corrupt ({error}); {cure(THRESHOLDS)}") from None
    with torch.device("meta"):
        model = RAM(config)
    load(model, folder)
    return LoadedRAM(model.to(device).eval().requires_grad_(False), names, thresholds)


def require_files(folder: Path) -> tuple[str, ...]:
    """The names of the three files; raise WeightsError if one is missing."""
    for name in (MODEL, NAMES, THRESHOLDS):
        if not (folder / name).is_file():
            raise WeightsError(f"{absence(folder / name)}; {OFFICIAL[RAM].cure}, or use other tags")
    return MODEL, NAMES, THRESHOLDS


def read_lines(file: Path, count: int) -> list[str]:
    """The lines of a text file, `count` of them, without blanks around them; LF or CRLF."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise WeightsError(f"{file} is not a text file ({error}); {cure(file.name)}") from None
    if len(lines) != count or "" in lines:
        filled = len(lines) - lines.count("")
        raise WeightsError(f"{file} has {filled:,} entries for {count:,} tags; {cure(file.name)}")
    return lines


def cure(name: str) -> str:
    return f"delete it and get {name} again: `python -m weights.fetch --ram`"


def convert(checkpoint: str | Path, file: str | Path, config: RAMConfig | None = None) -> None:
    """Write the tensors of the official `checkpoint` that RAM has to the safetensors `file`, atomically.

    Raise WeightsError if the checkpoint is truncated, holds more than tensors, or lacks or adds a name.
    """
    checkpoint, file = Path(checkpoint), Path(file)
    official = OFFICIAL[RAM]
    state = read_checkpoint(checkpoint)
    with torch.device("meta"):
        ours = {name: tuple(x.shape) for name, x in RAM(config or RAMConfig()).state_dict().items()}
    names = match(ours, {name: tuple(x.shape) for name, x in state.items()}, checkpoint, official)
    try:
        with replacing(file) as new:
            save_file({name: state[names[name]].contiguous() for name in ours}, new)
    except SafetensorError as error:  # the disk is full, ...
        raise WeightsError(f"{file} cannot be written ({error}): free 0.9 GB of its disk") from None


def read_checkpoint(checkpoint: Path) -> dict[str, Tensor]:
    """The tensors by name, mapped from the file and not yet read."""
    cure = OFFICIAL[RAM].cure
    if not checkpoint.is_file():
        raise WeightsError(f"{absence(checkpoint)}; {cure}")
    with checkpoint.open("rb") as stream:
        start = stream.read(512)
    if start[:4] != b"PK\x03\x04":  # torch's zip format, the only one that can be mapped
        raise WeightsError(f"{checkpoint} is {kind(start)}, not a zip file of torch; {cure}")
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:  # its message advises to load without weights_only
        raise WeightsError(f"{checkpoint} holds more than tensors and could run code; {cure}") from None
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise WeightsError(f"{checkpoint} is truncated or corrupt ({reason}); {cure}") from None
    state = state.get("model") if isinstance(state, dict) else None
    if not isinstance(state, dict) or not all(isinstance(x, Tensor) for x in state.values()):
        raise WeightsError(f"{checkpoint} has no table of tensors named 'model'; {cure}")
    return state
