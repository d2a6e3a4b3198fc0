"""`train.py --from RUN`: a new model starts from a trained one, for other classes or a longer schedule.

    source = find_source(run, options, config=config, read=read, frozen=frozen)  # the model's file
    print(start_from(source, tada))  # copies what fits

What fits is decided part by part: the UNet, the adapter, the decoder. The optimiser and the steps start anew.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file

from errors import CheckpointError
from model import Tada, TadaConfig
from run.checkpoint import find_model, frozen_file, own_state, read_about, read_config, steps
from run.folder import Run
from run.options import Options
from weights.words import digest

# Layers with one output per class; that of mask2former has one more, "no object".
PER_CLASS = ("decoder.classifier.1.", "decoder.auxiliary_head.1.1.", "decoder.class_head.")
OWN = ("classes", "prompts", "palette", "things", "weights")  # settings in which any two models may differ


def find_source(
    run: Run, options: Options, *, config: TadaConfig, read: dict, frozen: dict[str, str]
) -> Path | None:
    """The file of --from, the same on all ranks; None without one, and if a run resumes whose file is gone.

    Adds its sha256 to what is `read`. Raises CheckpointError if a new run cannot start from it (`fitting`).
    """
    files = []
    if options.from_run and run.ranks.is_main:
        try:
            file = find_model(Path(options.from_run)).resolve()  # `best` may point elsewhere soon
            read["the model of --from"], files = fitting(file, config, frozen), [file]
        except CheckpointError:
            if options.fresh or not steps(run.folder):
                raise
    return (*run.ranks.all_gather_object(files), None)[0]


def fitting(file: Path, config: TadaConfig, frozen: dict[str, str]) -> str:
    """The sha256 of a model's file. Raises CheckpointError unless a model of `config` can start from it."""
    about = read_about(file)  # which compares its hash
    theirs = read_config(about["config"], file)
    if theirs.model != config.model:
        raise CheckpointError(f"{file} has the size {theirs.model}: give --model {theirs.model}")
    if config.keeps_unet and not theirs.keeps_unet:
        flag = "--lora" if config.lora else "--freeze-unet"
        raise CheckpointError(f"{file} has a UNet of its own, {flag} keeps the prior's: leave it out")
    if theirs.lora and config.lora != theirs.lora:
        cure = f"give --lora {theirs.lora}{' instead of --freeze-unet' * config.freeze_unet}"
        cure += "" if config.keeps_unet else ", or merge it first: python -m run.merge"
        raise CheckpointError(f"{file} has LoRA of rank {theirs.lora}, not {config.lora}: {cure}")
    prior = {name: expected for name, expected in about["frozen"].items() if not name.startswith("ram/")}
    places = {name: frozen_file(config.weights, name) for name in prior.keys() - frozen.keys()}
    ours = frozen | {name: digest(place) for name, place in places.items() if place.is_file()}
    if not prior.items() <= ours.items() or (theirs.weights == "random") != (config.weights == "random"):
        raise CheckpointError(f"{file} was trained on other weights, {theirs.weights}: give --weights")
    return digest(file)


@torch.no_grad()
def start_from(file: Path, tada: Tada) -> str:
    """Copy what fits of a trained model into a new one; return what, and which settings differ.

    A part is taken if its parameters have equal names and shapes, else it stays new as a whole. The outputs
    for classes are taken by the classes' names. Raises CheckpointError for random weights of another seed.
    """
    theirs, config, state = read_config(read_about(file)["config"], file), tada.config, load_file(file)
    for name, x in (own := own_state(tada)).items():
        if name.startswith(("vae.", "clip.")) and not torch.equal(x.cpu(), state[name]):
            raise CheckpointError(f"{file} has random weights of another seed: give --seed as its run had")
    place = {name: k for k, name in enumerate((*theirs.classes, None))}  # None: "no object"
    rows = [(k, place.get(name)) for k, name in enumerate((*config.classes, None))]
    new = [name for name in config.classes if name not in place]
    lines, buffers = [f"starting from {file}:"], dict(tada.named_buffers())  # such as vectors of class names
    for part in ("unet", "adapter", "decoder"):
        ours = {name: x for name, x in getattr(tada, part).named_parameters(prefix=part) if name in own}
        old = {name: state[name] for name in state if name.startswith(f"{part}.") and name not in buffers}
        shapes = ({(name, x[name].shape[name.startswith(PER_CLASS) :]) for name in x} for x in (ours, old))
        odd = set.symmetric_difference(*shapes)
        if part == "unet" and not old:
            lines.append("unet     the prior's, which that model did not train")
        elif odd:
            lines.append(f"{part:8} new: {min(odd)[0]} is not in both, or has another shape")
        else:
            for name, x in ours.items():
                if name.startswith(PER_CLASS):
                    for k, row in rows[: len(x)]:
                        x[k] = x[k] if row is None else old[name][row]
                else:
                    x.copy_(old[name])
            lines.append(f"{part:8} {'taken' if ours else 'has nothing to train'}")
    if new and lines[-1].endswith("taken"):
        lines[-1] += f", but new for {len(new)} of {len(config.classes)} classes, such as {new[0]}"
    settings = ((name, getattr(theirs, name), x) for name, x in vars(config).items() if name not in OWN)
    lines += [f"{name} was {old}, is {x}" for name, old, x in settings if old != x]
    return "\n  ".join(lines)
