"""Checkpoints: the file of a trained model, and step folders written atomically.

    write_step(run, step, ...)  # runs/NAME/step-000123, and the link `last` to it
    folder, refused = newest_step(run)  # the newest one whose files have their hashes
    tada = read_model("runs/NAME")  # or last, best, a step folder, a model.safetensors

Only safetensors and JSON: no file that is read can run code. A step folder is written under another name,
synced to the disk, and renamed: a folder under its own name is complete, whenever the process is killed.
"""

import json
import os
import re
import shutil
import warnings
from contextlib import suppress
from dataclasses import asdict, fields, replace
from inspect import formatannotation
from pathlib import Path
from types import UnionType
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import weights.load as weights_loader
from assemble import SCALE_FILE, Undrawn, assemble, move, open_tagger, part_configs
from clip import CLIP, Tokenizer
from errors import CheckpointError
from model import Tada, TadaConfig
from run.files import read_bytes, sync
from run.ranks import Ranks
from unet import TIMES, UNet
from vae import VAE
from weights.ram import ram_folder, require_files
from weights.words import digest, digest_once, prior_files

FORMAT = 1  # of a model's file; a change that older code cannot read raises it
MODEL, TENSORS, FACTS, HASHES = "model.safetensors", "train.safetensors", "train.json", "sha256.json"
KEPT = 2  # newest steps that are kept besides the best
# What a killed process leaves in a run folder: no other file is removed.
STEP, OTHERS = r"step-\d+", r"last|best|config\.json|log\.jsonl|tags-train\.\w+|inputs\.jpg|curve\.png"


# ---- the file of a trained model


def frozen_digests(config: TadaConfig) -> dict[str, str]:
    """Path -> sha256 of the files that are not trained: the prior's (not of random weights), and RAM's."""
    files = []
    if config.weights != "random":
        files += prior_files(config.weights, ("vae", "clip", "tokenizer") + ("unet",) * config.keeps_unet)
        files += [SCALE_FILE] * (config.model == "tiny")
    if config.tags == "ram":
        files += [f"ram/{name}" for name in require_files(ram_folder(config.weights))]
    return {file: digest(frozen_file(config.weights, file)) for file in files}


def frozen_file(weights: str, name: str) -> Path:
    """Where a file of `frozen_digests` is: RAM has a folder beside the prior's."""
    if name.startswith("ram/"):
        return ram_folder(weights) / name[4:]
    return weights_loader.locate(weights) / name


def own_state(tada: Tada) -> dict[str, Tensor]:
    """Every tensor that is trained or does not come from the prior's files: the content of a model's file."""
    random, frozen = tada.config.weights == "random", ("vae.", "clip.") + ("unet.",) * tada.config.keeps_unet
    own = {name: random or ".lora_" in name or not name.startswith(frozen) for name in tada.state_dict()}
    return {name: x for name, x in tada.state_dict().items() if own[name]}


def save_model(tada: Tada, file: Path, frozen: dict[str, str], metrics: dict[str, float]) -> None:
    """Write the trained tensors, with the settings to use them as one metadata key of sorted JSON: no time,
    host or path of the run, so equal models make equal files. `frozen` comes from `frozen_digests`.
    """
    about = {"format": FORMAT, "config": asdict(tada.config), "frozen": frozen, "metrics": metrics}
    state = {name: x.detach().cpu().contiguous() for name, x in own_state(tada).items()}
    save_file(state, file, metadata={"tada": json.dumps(about, sort_keys=True)})


def read_model(
    path: str | Path,
    weights: str | None = None,
    device: torch.device | str = "cpu",
    source: str | None = None,
    threshold: float | None = None,
) -> Tada:
    """Load a model that `save_model` wrote, in eval mode; its frozen parts from where they were, or
    `weights`. The tagger is that of training or, if they are given, of another source of words or threshold.
    Raises CheckpointError if `path` is not a model, or a frozen file is missing or differs.
    """
    file = find_model(Path(path))
    about = read_about(file)
    config = read_config(about["config"], file)
    random = config.weights == "random"
    if weights and not random:
        config = replace(config, weights=str(weights))
    folder = weights_loader.locate(config.weights)
    if threshold is None and source in (None, config.tags):
        threshold = config.tag_threshold
    source = source or config.tags
    for name, expected in about["frozen"].items():
        place, ram = frozen_file(config.weights, name), name.startswith("ram/")
        present = place.is_file()
        if (source == "ram" or not ram) and (not present or digest(place) != expected):
            fault = f"not the file that {file} was trained with" if present else "missing"
            cure = "give its folder with --weights"
            if ram or config.model == "sd15":
                cure = f"get it with `python -m weights.fetch{' --ram' * ram}`, or {cure}"
            raise CheckpointError(f"{place} is {fault}: {cure}")

    with torch.device("meta"), Undrawn():  # skip initialisation; every tensor comes from one of the files
        configs = part_configs(config.model, config.weights)
        parts = {kind.__name__.lower(): kind(x) for kind, x in zip((VAE, UNet, CLIP), configs, strict=True)}
    for name in about["frozen"]:  # the files whose hash was compared
        if name.endswith(".safetensors") and not name.startswith("ram/"):
            weights_loader.load(parts[name.split("/")[0]], folder / name)
    vae, unet, clip = parts.values()
    with torch.device("meta"), Undrawn():
        empty = torch.empty(clip.config.positions, clip.config.text.width)
        classes = torch.empty(len(config.classes), clip.config.text.width)
        names = torch.empty(len(config.classes), clip.config.projection) if config.tags == "clip" else None
        tokenizer = Tokenizer.spelling(clip.config.vocabulary) if random else Tokenizer(folder / "tokenizer")
        tada = assemble(config, vae, unet, clip, tokenizer, empty, classes, names)
    # Clone: on the CPU, rounding depends on how a tensor is aligned in memory, in a mapped file otherwise.
    own = {name: x.clone() for name, x in read_own_state(tada, file).items()}
    if bad := [name for name, x in own.items() if not x.sum().isfinite() and not x.isfinite().all()]:
        raise CheckpointError(f"{file} has NaN or infinity in {', '.join(bad[:10])}: use another step")
    tada.load_state_dict({**tada.state_dict(), **own}, strict=True, assign=True)
    tada = move(tada, device, source).eval()
    if source == "ram" or (source, threshold) != (config.tags, config.tag_threshold):
        tada.tagger = open_tagger(tada, source, threshold)
    return tada


def read_own_state(tada: Tada, file: Path) -> dict[str, Tensor]:
    """The tensors of a model's file; CheckpointError unless names, shapes, dtypes are of `own_state`."""
    own, state = own_state(tada), load_file(file)
    wrong = sorted(set(own) ^ set(state))
    wrong = wrong or [x for x in own if (own[x].shape, own[x].dtype) != (state[x].shape, state[x].dtype)]
    if wrong:
        names = ", ".join(wrong[:10])
        raise CheckpointError(f"{file} does not fit the model it describes: {names}; use another step")
    return state


def find_model(path: Path) -> Path:
    """The model's file of a run folder (the best step, else the last), of a step folder, or `path` itself."""
    for file in (path, path / MODEL, path / "best" / MODEL, path / "last" / MODEL):
        if file.is_file():
            if not is_utf8(file):
                raise CheckpointError(f"{str(file.resolve())!r} is not UTF-8: rename what is not")
            return file
    raise CheckpointError(f"{path} holds no {MODEL}: give a run folder, a step folder or the file")


def is_utf8(path: Path) -> bool:
    """Whether the name and those of its folders are: safetensors 0.8 opens no other."""
    return os.fsencode(path.resolve()).decode(errors="replace") == str(path.resolve())


def read_about(file: Path) -> dict:
    """The format, config, frozen hashes and metrics of a model's file, whose hash is checked first.

    A file without `sha256.json` is used with a warning, in a step folder refused. Raises CheckpointError.
    """
    real = file.resolve()
    stat, hashes = real.stat(), real.with_name(HASHES)
    if hashes.exists():
        if digest_once(real, stat.st_size, stat.st_mtime_ns) not in read_hashes(hashes).values():
            raise CheckpointError(f"{file} changed after it was written: use another step")
    elif real.parent.name.startswith("step-"):
        raise CheckpointError(f"{file} lacks the {HASHES} of its step folder: use another step")
    try:
        with safe_open(file, "pt") as f:
            about = json.loads((f.metadata() or {})["tada"])
        newer = about["format"] > FORMAT
        _ = {**about["config"], **about["frozen"], **about["metrics"]}
        if not all(re.fullmatch(r"(vae|unet|clip|tokenizer|ram)/\w[\w.-]*", x) for x in about["frozen"]):
            raise ValueError  # these files are read
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is not a whole safetensors file ({error}): use another step") from None
    except (ValueError, LookupError, TypeError, RecursionError):
        raise CheckpointError(
            f"{file} was not written by train.py: give a run folder or its {MODEL}"
        ) from None
    if newer:
        raise CheckpointError(f"{file} has format {about['format']}, not {FORMAT}: use a newer TADA")
    if not hashes.exists():
        warnings.warn(f"{file} is used unchecked: no {HASHES} is beside it", stacklevel=1)  # once a process
    return about


REMOVED = {"pixel_decoder": "deformable"}  # settings of older checkpoints -> the only value still supported


def read_config(entries: dict, file: Path) -> TadaConfig:
    """The settings of a checkpoint. Raises CheckpointError for one that this code lacks."""
    for name, supported in REMOVED.items():
        if entries.get(name, supported) != supported:
            fault = f"has {name} {entries[name]!r}, only {supported!r} is still supported"
            raise CheckpointError(f"{file} {fault}: use TADA 0.1.0")
    entries = {name: as_tuples(value) for name, value in entries.items() if name not in REMOVED}
    if unknown := sorted(set(entries) - {field.name for field in fields(TadaConfig)}):
        raise CheckpointError(f"{file} has unknown settings {', '.join(unknown)}: use a newer TADA")
    for field in fields(TadaConfig):
        name, value = field.name, entries.get(field.name, None if field.name == "classes" else field.default)
        fault = "" if is_of(field.type, value) else f"is not of type {formatannotation(field.type)}"
        if fault or not POSSIBLE.get(name, lambda x: True)(value):
            fault = f"has {name} {str(value)[:80]}, which {fault or 'cannot be'}"
            raise CheckpointError(f"{file} {fault}: use another step")
    return TadaConfig(**entries)


def is_of(kind: Any, x: object) -> bool:
    """Whether a value, with tuples for JSON's lists, is of the type of a setting."""
    if isinstance(kind, UnionType):
        return any(is_of(part, x) for part in get_args(kind))
    if not (parts := get_args(kind)):
        return type(x) is kind or (kind is float and type(x) is int)
    parts = parts[:1] * len(x) if isinstance(x, tuple) and ... in parts else parts
    return isinstance(x, tuple) and len(x) == len(parts) and all(map(is_of, parts, x))


POSSIBLE = {  # settings whose values nothing later compares with the tensors
    "classes": bool,
    **dict.fromkeys(("crop", "stride", "box"), lambda x: x is None or all(0 < n < 2**16 for n in x)),
    "timestep": lambda x: 0 <= x < TIMES,
    "noise": lambda x: x in ("fixed", "none"),
    "dropout": lambda x: 0 <= x < 1,
}


def as_tuples(value: object) -> object:
    """Turn JSON's lists back into tuples."""
    return tuple(map(as_tuples, value)) if isinstance(value, list) else value


# ---- the state of training


def training_state(optimizer: torch.optim.Optimizer, ranks: Ranks) -> dict[str, Tensor]:
    """AdamW's moments by parameter name (on rank 0, which writes them), and every rank's RNG state."""
    tensors = {}
    for group in optimizer.param_groups if ranks.is_main else ():  # the same on all ranks
        for name, p in zip(group["names"], group["params"], strict=True):
            for key, value in optimizer.state[p].items():
                tensors[f"optimizer/{name}/{key}"] = value.detach().cpu().contiguous()
    generators = {"cpu": torch} | ({"cuda": torch.cuda} if ranks.device.type == "cuda" else {})
    for kind, module in generators.items():
        states = ranks.all_gather_object([module.get_rng_state()])
        tensors |= {f"rng/{rank}/{kind}": state for rank, state in enumerate(states)}
    return tensors


def restore_training(tensors: dict[str, Tensor], optimizer: torch.optim.Optimizer, ranks: Ranks) -> bool:
    """Restore a `training_state`; false if it lacks RNG states: there are more ranks, or now a GPU."""
    for group in optimizer.param_groups:
        for name, p in zip(group["names"], group["params"], strict=True):
            state = {"step": torch.empty((), device=p.device)}
            # In the parameter's order in memory, by which a fused step pairs them.
            state |= {key: torch.empty_like(p) for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[p] = {
                key: x.copy_(tensors[f"optimizer/{name}/{key}"]) for key, x in state.items()
            }
    generators = {"cpu": torch} | ({"cuda": torch.cuda} if ranks.device.type == "cuda" else {})
    for kind, module in generators.items():
        if f"rng/{ranks.rank}/{kind}" in tensors:
            module.set_rng_state(tensors[f"rng/{ranks.rank}/{kind}"])
    return all(f"rng/{ranks.world - 1}/{kind}" in tensors for kind in generators)


# ---- the folder of a step


def write_step(
    run: Path,
    step: int,
    tada: Tada,
    frozen: dict[str, str],
    metrics: dict[str, float],
    tensors: dict[str, Tensor],
    facts: dict,
) -> Path:
    """Write `run/step-000123`, point `last` to it, remove all steps but the two newest and the best.

    `tensors` and `facts` (JSON) are the state to resume from. Raises CheckpointError if the disk is full or
    fails; earlier folders are untouched then.
    """
    final, new = run / step_name(step), run / f".tmp-{step_name(step)}"
    shutil.rmtree(new, ignore_errors=True)
    try:
        new.mkdir()
        save_model(tada, new / MODEL, frozen, metrics)
        save_file(tensors, new / TENSORS)
        (new / FACTS).write_text(json.dumps(facts, sort_keys=True, indent=1))
        hashes = {name: digest(new / name) for name in (MODEL, TENSORS, FACTS)}
        (new / HASHES).write_text(json.dumps(hashes, indent=1))
        for path in (*new.iterdir(), new):
            sync(path)
        old = run / f".old-{final.name}"
        if final.exists():  # written before its evaluation, or refused when the run resumed
            shutil.rmtree(old, ignore_errors=True)
            os.replace(final, old)
        os.replace(new, final)
        sync(run)
        shutil.rmtree(old, ignore_errors=True)
        point(run, "last", final.name)
        prune(run)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(new, ignore_errors=True)
        with suppress(OSError):
            restore_replaced(run)
        cure = "free space on its disk, or make it writable"
        raise CheckpointError(f"{final} could not be written ({error}): {cure}") from None
    return final


def point(run: Path, name: str, target: str) -> None:
    """Point the link `run/name` to `target`, atomically."""
    new = run / f".tmp-{name}"
    new.unlink(missing_ok=True)
    new.symlink_to(target)
    os.replace(new, run / name)
    sync(run)


def step_name(step: int) -> str:
    return f"step-{step:06d}"


def steps(run: Path) -> list[Path]:
    """The step folders, oldest first; a copy under another name, `step-000123.bak`, is skipped."""
    numbers = {path: path.name.removeprefix("step-") for path in run.glob("step-*")}
    return sorted((path for path, x in numbers.items() if x.isdecimal()), key=lambda path: int(numbers[path]))


def prune(run: Path) -> None:
    """Remove all step folders except the newest and those that `last` and `best` point to."""
    linked = {os.readlink(run / name) for name in ("last", "best") if (run / name).is_symlink()}
    for folder in [folder for folder in steps(run)[:-KEPT] if folder.name not in linked]:
        renamed = run / f".tmp-old-{folder.name}"  # under its own name a step is complete or gone
        shutil.rmtree(renamed, ignore_errors=True)
        os.replace(folder, renamed)
        shutil.rmtree(renamed, ignore_errors=True)


def clean(run: Path) -> None:
    """Remove leftovers of an interrupted `write_step` or `point`."""
    restore_replaced(run)
    for path in run.glob(".*"):
        if re.fullmatch(rf"\.(tmp|old|tmp-old)-{STEP}|\.tmp-({OTHERS})", path.name):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def restore_replaced(run: Path) -> None:
    """Restore a step that `write_step` had moved away, if the new one did not take its name."""
    for old in run.glob(".old-*"):
        final = run / old.name.removeprefix(".old-")
        if re.fullmatch(STEP, final.name) and not final.exists():
            os.replace(old, final)


def newest_step(run: Path) -> tuple[Path | None, list[str]]:
    """The newest intact step folder (None if there is none), and a sentence for each newer one."""
    refused = []
    for folder in reversed(steps(run)):
        corruption = corruption_of(folder)
        if corruption is None:
            return folder, refused
        refused.append(f"{folder} is skipped: {corruption}")
    return None, refused


def corruption_of(folder: Path) -> str | None:
    """A sentence if a step folder is incomplete or a file lacks its hash, else None."""
    try:
        hashes = read_hashes(folder / HASHES)
        wrong = [name for name, expected in hashes.items() if digest(folder / name) != expected]
    except (OSError, CheckpointError) as error:
        return f"it is incomplete ({error})"
    return f"{', '.join(wrong)} changed after it was written" if wrong else None


def read_hashes(file: Path) -> dict[str, str]:
    """A step folder's `sha256.json`; CheckpointError unless it lists the other three files."""
    try:
        hashes = json.loads(read_bytes(file))
        if not isinstance(hashes, dict) or hashes.keys() != {MODEL, TENSORS, FACTS}:
            raise ValueError(f"it does not list {MODEL}, {TENSORS} and {FACTS}")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is corrupt ({error}): use another step") from None
    return hashes


def read_step(folder: Path, tada: Tada) -> tuple[dict[str, Tensor], dict]:
    """Copy a step folder into the model, in place; return the `tensors` and `facts` of `write_step`."""
    tada.load_state_dict({**tada.state_dict(), **read_own_state(tada, folder / MODEL)}, strict=True)
    return load_file(folder / TENSORS), json.loads((folder / FACTS).read_text())
