"""What a run keeps: the file of a trained model, and step folders that a crash at any moment leaves whole.

    write_step(run, step, tada, frozen, metrics, tensors, facts)  # runs/NAME/step-000123, `last` points to it
    folder, refused = newest_step(run)  # the newest one whose files are what was written
    tada = load_model("runs/NAME")  # or last, best, a step folder, a model.safetensors

Safetensors and JSON alone: nothing that could run code is ever read. A step folder is written under another
name, synced to the disk, and renamed; a folder under its own name is complete. Top to bottom: the file of a
model, the folder of a step.
"""

import json
import os
import shutil
from contextlib import suppress
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import weights.load as weights_loader
from assemble import SCALE_FILE, assemble, part_configs
from clip import CLIP, Tokenizer
from errors import CheckpointError
from model import Tada, TadaConfig
from unet import UNet
from vae import VAE
from weights.words import digest, prior_files

FORMAT = 1  # of a model's file; a change that older code cannot read raises it
MODEL, TENSORS, FACTS, SUMS = "model.safetensors", "train.safetensors", "train.json", "sha256.json"
KEPT = 2  # the newest steps that stay, and the best


# ---- the file of a trained model


def frozen_digests(config: TadaConfig) -> dict[str, str]:
    """Relative path -> sha256 of the prior's files that stay where they are; none for random weights."""
    if config.weights == "random":
        return {}
    parts = ("vae", "clip", "tokenizer", "unet") if config.freeze_unet else ("vae", "clip", "tokenizer")
    files = prior_files(config.weights, parts)
    if config.model == "tiny":
        files.append(SCALE_FILE)
    return {file: digest(Path(config.weights, file)) for file in files}


def own_state(tada: Tada) -> dict[str, Tensor]:
    """What a trained model's file holds: every tensor that is trained or did not come from a file."""
    elsewhere = ("vae.", "clip.", "unet.") if tada.config.freeze_unet else ("vae.", "clip.")
    elsewhere = () if tada.config.weights == "random" else elsewhere
    return {name: x for name, x in tada.state_dict().items() if not name.startswith(elsewhere)}


def save_model(tada: Tada, file: Path, frozen: dict[str, str], metrics: dict[str, float]) -> None:
    """Write what was trained, with all that is needed to use it, as ONE metadata key of sorted JSON.

    `frozen` comes from `frozen_digests`. There is no time, host or path of the run in it: equal models make
    equal files.
    """
    about = {"format": FORMAT, "config": asdict(tada.config), "frozen": frozen, "metrics": metrics}
    state = {name: x.detach().cpu().contiguous() for name, x in own_state(tada).items()}
    save_file(state, file, metadata={"tada": json.dumps(about, sort_keys=True)})


def load_model(path: str | Path, weights: str | None = None, device: torch.device | str = "cpu") -> Tada:
    """The model that `save_model` wrote, ready to predict; frozen parts from where they were, or `weights`.

    Raises CheckpointError if `path` is no such model, or the frozen files are gone or not those of training.
    """
    file = find_model(Path(path))
    about = read_about(file)
    sums = file.with_name(SUMS)
    if sums.is_file() and digest(file).encode() not in sums.read_bytes():
        raise CheckpointError(f"{file} changed after it was written: take another step")
    config = read_config(about["config"], file)
    if weights and config.weights != "random":
        config = replace(config, weights=str(weights))
    folder = Path(config.weights)
    for name, expected in about["frozen"].items():
        cure = "get it with `python -m weights.fetch`, or give its folder with --weights"
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name} is missing: {cure}")
        if digest(folder / name) != expected:
            raise CheckpointError(f"{folder / name} is not the file that {file} was trained with: {cure}")

    with torch.device("meta"):  # every tensor comes from one of the files
        vae, unet, clip = (
            kind(x)
            for kind, x in zip((VAE, UNet, CLIP), part_configs(config.model, config.weights), strict=True)
        )
        empty = torch.empty(clip.config.positions, clip.config.text.width)
        classes = torch.empty(len(config.classes), clip.config.text.width)
        names = torch.empty(len(config.classes), clip.config.projection) if config.tags == "clip" else None
        random = config.weights == "random"
        tokenizer = Tokenizer.spelling(clip.config.vocabulary) if random else Tokenizer(folder / "tokenizer")
        tada = assemble(config, vae, unet, clip, tokenizer, empty, classes, names)
    for name in about["frozen"]:  # the very files whose hash was compared
        if name.endswith(".safetensors"):
            weights_loader.load(getattr(tada, name.split("/")[0]), folder / name)
    # Copies lie in memory as a built model's tensors do: on the CPU the last digits depend on that.
    own = {name: x.clone() for name, x in fitting(tada, file).items()}
    tada.load_state_dict({**tada.state_dict(), **own}, strict=True, assign=True)
    return tada.to(device).eval()


def fitting(tada: Tada, file: Path) -> dict[str, Tensor]:
    """The tensors of a model's file; every name and shape must be one of the model's own."""
    own, state = own_state(tada), load_file(file)
    wrong = sorted(set(own) ^ set(state)) or [name for name in own if own[name].shape != state[name].shape]
    if wrong:
        raise CheckpointError(f"{file} does not fit the model it describes: {', '.join(wrong[:10])}")
    return state


def find_model(path: Path) -> Path:
    """The model's file that a run folder, `last`, `best`, a step folder or the file itself stands for."""
    for file in (path, path / MODEL, path / "best" / MODEL, path / "last" / MODEL):
        if file.is_file():
            return file
    raise CheckpointError(f"{path} holds no {MODEL}: give a run folder, a step folder or the file")


def read_about(file: Path) -> dict:
    """The format, config, frozen and metrics of a model's file. Raises CheckpointError for any other file."""
    try:
        with safe_open(file, "pt") as f:
            metadata = f.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is not a whole safetensors file ({error}): take another step"
        ) from None
    if "tada" not in metadata:
        raise CheckpointError(f"{file} was not written by train.py: give a run folder or its {MODEL}")
    about = json.loads(metadata["tada"])
    if about["format"] > FORMAT:
        raise CheckpointError(
            f"{file} has format {about['format']}, this code knows {FORMAT}: use a newer TADA"
        )
    return about


REMOVED = {"pixel_decoder": "deformable"}  # settings of older checkpoints -> the only value still supported


def read_config(entries: dict, file: Path) -> TadaConfig:
    """The settings of a checkpoint. Raises CheckpointError for one that this code does not have."""
    for name, supported in REMOVED.items():
        if entries.get(name, supported) != supported:
            raise CheckpointError(
                f"{file} has {name} {entries[name]!r}, only {supported!r} is still supported: use TADA 0.1.0"
            )
    entries = {name: as_tuples(value) for name, value in entries.items() if name not in REMOVED}
    unknown = sorted(set(entries) - {field.name for field in fields(TadaConfig)})
    if unknown:
        raise CheckpointError(f"{file} has unknown settings {', '.join(unknown)}: use a newer TADA")
    return TadaConfig(**entries)


def as_tuples(value: object) -> object:
    """JSON's lists as the tuples they were."""
    return tuple(map(as_tuples, value)) if isinstance(value, list) else value


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
    """Write `run/step-000123`, point `last` to it, remove what is older than the two newest and the best.

    tensors and facts (JSON) are what training needs to go on. Raises CheckpointError if the disk is full or
    refuses; the folders that were there are untouched then.
    """
    final, new = run / step_name(step), run / f".tmp-{step_name(step)}"
    shutil.rmtree(new, ignore_errors=True)
    try:
        require_space(run)
        new.mkdir()
        save_model(tada, new / MODEL, frozen, metrics)
        save_file(tensors, new / TENSORS)
        (new / FACTS).write_text(json.dumps(facts, sort_keys=True, indent=1))
        sums = {name: digest(new / name) for name in (MODEL, TENSORS, FACTS)}
        (new / SUMS).write_text(json.dumps(sums, indent=1))
        for path in (*new.iterdir(), new):
            sync(path)
        old = run / f".old-{final.name}"
        if final.exists():  # without its metrics yet, or refused when the run was taken up
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
            bring_back(run)
        raise CheckpointError(
            f"{final} could not be written ({error}): see that its disk has room and may be written"
        ) from None
    return final


def require_space(run: Path) -> None:
    """Refuse to begin what will not fit: 1.2 times the last step's size must be free."""
    last = run / "last"
    needed = int(1.2 * sum(x.stat().st_size for x in last.iterdir())) if last.exists() else 0
    free = shutil.disk_usage(run).free
    if free < needed:
        raise CheckpointError(
            f"{run} has {free >> 20:,} MiB free and a checkpoint needs {needed >> 20:,} MiB: free some space"
        )


def replace_text(file: Path, text: str) -> None:
    """Write a file whole or not at all."""
    new = file.with_name(f".tmp-{file.name}")
    new.write_text(text, encoding="utf-8")
    sync(new)
    os.replace(new, file)


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def point(run: Path, name: str, target: str) -> None:
    """Make the link `run/name` lead to `target`, at once: it never leads nowhere."""
    new = run / f".tmp-{name}"
    new.unlink(missing_ok=True)
    new.symlink_to(target)
    os.replace(new, run / name)
    sync(run)


def step_name(step: int) -> str:
    return f"step-{step:06d}"


def steps(run: Path) -> list[Path]:
    """The step folders, oldest first; a copy under another name, `step-000123.bak`, is none."""
    numbers = {path: path.name.removeprefix("step-") for path in run.glob("step-*")}
    return sorted((path for path, x in numbers.items() if x.isdecimal()), key=lambda path: int(numbers[path]))


def prune(run: Path) -> None:
    """Remove all step folders but the newest and those that `last` and `best` lead to."""
    linked = {os.readlink(run / name) for name in ("last", "best") if (run / name).is_symlink()}
    for folder in steps(run)[:-KEPT]:
        if folder.name not in linked:
            remove(folder)


def remove(folder: Path) -> None:
    """Remove a step folder: under its own name it is whole or gone. What cannot be removed is left aside."""
    aside = folder.with_name(f".tmp-old-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(folder, aside)
    shutil.rmtree(aside, ignore_errors=True)


def clean(run: Path) -> None:
    """Remove what an interrupted `write_step` or `point` left behind."""
    bring_back(run)
    for path in (*run.glob(".tmp-*"), *run.glob(".old-*")):
        path.unlink() if path.is_symlink() or path.is_file() else shutil.rmtree(path)


def bring_back(run: Path) -> None:
    """The step whose new writing did not come to take its name, as it was."""
    for old in run.glob(".old-*"):
        final = run / old.name.removeprefix(".old-")
        if not final.exists():
            os.replace(old, final)


def newest_step(run: Path) -> tuple[Path | None, list[str]]:
    """The newest step folder whose files are what was written, and a sentence for each newer one."""
    refused = []
    for folder in reversed(steps(run)):
        fault = fault_of(folder)
        if fault is None:
            return folder, refused
        refused.append(f"{folder} is not used: {fault}")
    return None, refused


def fault_of(folder: Path) -> str | None:
    """What is wrong with a step folder, None if nothing is."""
    try:
        sums = json.loads((folder / SUMS).read_text())
        wrong = [name for name, expected in sums.items() if digest(folder / name) != expected]
    except (OSError, ValueError, AttributeError) as error:
        return f"it is not whole ({error})"
    return f"{', '.join(wrong)} changed after it was written" if wrong else None


def read_step(folder: Path, tada: Tada) -> tuple[dict[str, Tensor], dict]:
    """Copy a step folder into the model, in place; return what training needs to go on, as it was written."""
    tada.load_state_dict({**tada.state_dict(), **fitting(tada, folder / MODEL)}, strict=True)
    return load_file(folder / TENSORS), json.loads((folder / FACTS).read_text())
