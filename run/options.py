"""The flags of train.py: each is a field of one dataclass, with its type, default, help and range."""

import argparse
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

import torch

from data import LAYOUTS, Dataset, default_data
from errors import Parser
from inference import stride_of
from loading.tags import SOURCES
from model import TadaConfig
from run.files import read_bytes
from run.ranks import DEVICE_HINTS, usable_device
from run.recipes import DEMO, PAPER, VPD, recipe

LONGEST = 200  # characters of a run folder's name; file systems allow 255 bytes
WITH_INSTANCES = [name for name, layout in LAYOUTS.items() if layout.panoptic]  # on disk, for mask2former


def flag(help: str, default: Any = MISSING, **metadata: Any) -> Any:
    """A field of `Options` with its flag; without a default it depends on the other flags (* in --help).

    Numbers are legal from `least` and less than `below`. A run resumes only with the same value, unless its
    `role` is "free"; the name of the run folder begins with "start" options and contains "training" ones.
    """
    return field(default=default, metadata={"help": help, "role": "training", **metadata})


# Texts and choices too long for one line below.
DECODERS = "mask2former needs instances, as scenes have; * coco-panoptic, panoptic: mask2former, else fpn"
TOKENS = "a tag is one pooled vector, or all tags are one prompt"
FROM = "a run, step or file to start from: its UNet, adapter, decoder, where they fit; * none"
START = "the adapter's first context: the empty prompt's, or its own"
LORA = "rank of updates of a frozen UNet's attention; 0: none"
KERNELS = "what won the benchmark, plain torch, or the Triton kernels"
PRESET = "vpd: VPD's recipe; demo: a first look at scenes in minutes; flags override it"
PRESETS = {"vpd": VPD, "demo": DEMO}
FOLDER = "its folder; * runs/<dataset>-<model>-<decoder>-<condition> and the flags that change the result"
PLACE = "cpu, cuda, cuda:1, or mps, which is untested; * cuda where there is a GPU, else cpu"
SETS = [*LAYOUTS, "scenes"]
CONDITIONS = ["none", "caption", "classes", "implicit", "tagging", "tags", "oracle"]
TAGS = "of each image: classes, clip, ram, oracle or FILE.jsonl; * the paper's data sets: ram, else clip"
DATASET_HINT = {"dataset": "images and labels of your own are --dataset folder --data DIR"}
HINTS = {  # flags that other programs have
    "--epochs": "give --iterations, the number of updates",
    "--learning-rate": "did you mean --lr?",
    **DEVICE_HINTS,
    **DATASET_HINT,
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Every setting of a run, as config.json stores them; those of the model have TadaConfig's defaults."""

    dataset: str = flag("the data set", "scenes", role="start", choices=SETS, group="what is trained on")
    data: str = flag("its folder; * data/<official name>", role="free", metavar="DIR")
    crop: tuple[int, int] = flag("height and width of training images; *", nargs="+")
    short: int = flag("short side an image is resized to; * the crop's", least=1)
    workers: int = flag("processes that load images, per rank", 2, least=0, role="free")

    model: str = flag("* scenes: tiny, else sd15", role="start", choices=["sd15", "tiny"], group="the model")
    weights: str = flag("the prior, or `random`; * weights/<model>", metavar="DIR")
    from_run: str | None = flag(FROM, None, metavar="RUN")
    decoder: str = flag(DECODERS, role="start", choices=["fpn", "upernet", "mask2former"])
    condition: str = flag("a row of Table 5", TadaConfig.condition, role="start", choices=CONDITIONS)
    tags: str = flag(TAGS)
    tag_threshold: float | None = flag("lowest score of a tag; * the tagger's own", None)
    tag_tokens: str = flag(TOKENS, TadaConfig.tag_tokens, choices=["pooled", "prompt"])
    templates: int = flag("prompts averaged per name", TadaConfig.templates, choices=[1, 80])
    queries: int = flag("of the tagging adapter", TadaConfig.queries, least=1)
    blocks: int = flag("of the tagging adapter", TadaConfig.blocks, least=1)
    adapter_start: str = flag(START, TadaConfig.adapter_start, choices=["empty", "random"])
    tag_loss_weight: float = flag("of Eq. 7; 0 turns it off", TadaConfig.tag_loss_weight, least=0)
    timestep: int = flag("of the minor noise", TadaConfig.timestep, least=0, below=1000)
    noise: str = flag("one for all images, or none", TadaConfig.noise, choices=["fixed", "none"])
    attention_maps: bool = flag("add the UNet's cross-attention (VPD)", TadaConfig.attention_maps)
    freeze_unet: bool = flag("train only the adapter and the decoder", TadaConfig.freeze_unet)
    lora: int = flag(LORA, TadaConfig.lora, least=0, below=320)  # channels of the narrowest attention
    dropout: float = flag("before the classifier; * 0.1, tiny 0", least=0, below=1)

    preset: str | None = flag(PRESET, None, choices=[*PRESETS], group="the run")
    iterations: int = flag("* of COCO panoptic 9,000 as printed; ODISE's schedule is 92,188", least=1)
    batch: int = flag("images per update, over all processes; *", least=1)
    accumulate: int = flag("micro-batches per update", 1, least=1, role="free")
    lr: float = flag("of AdamW; *")
    unet_lr_scale: float = flag("the UNet's share of it; *", least=0)
    weight_decay: float = flag("on weights of Linear and Conv; *", least=0)
    warmup: int = flag("iterations; * min(1500, iterations / 10), 250 of COCO panoptic", least=0)
    clip: float | None = flag("largest gradient norm; * none, of mask2former 0.01")
    seed: int = flag("of weights, order, augmentation and dropout", 0, least=0, below=2**63)
    threads: int = flag("per process; * the CPUs / processes", least=1, role="free")
    kernels: str = flag(KERNELS, "auto", role="speed", choices=["auto", "torch", "triton"])
    device: str | None = flag(PLACE, None, role="free", type=usable_device, metavar="DEVICE")
    compile: bool = flag("torch.compile the UNet's transformers and the decoder", False, role="speed")
    cuda_graph: bool = flag(
        "record a step on the GPU, then replay it: for small batches", False, role="speed"
    )
    checkpoint_activations: bool = flag("less memory, about a third slower", False, role="speed")

    run: str = flag(FOLDER, role="free", metavar="DIR", group="what it writes")
    fresh: bool = flag("rename an earlier run in that folder and start over", False, role="free")
    check: bool = flag("check the data, draw inputs.jpg, evaluate a few images, stop", False, role="free")
    log_every: int = flag("iterations; * 50, tiny 10", least=1, role="free")
    save_every: int = flag("iterations; * 2000, at most iterations / 10", least=1, role="free")
    eval_every: int = flag("iterations; * iterations / 10, tiny / 2", least=1, role="speed")

    # Without a flag: they follow from the recipe, the preset and --short.
    scales: tuple[float, float] | None
    colours: bool = True
    whole: bool
    long: int
    scale_latent: bool = TadaConfig.scale_latent


FLAGS = [option for option in fields(Options) if option.metadata]


def parser() -> Parser:
    """The flags of `Options`; its result holds those that were given, `parse` adds the others."""
    p = Parser(
        "train.py",
        HINTS,
        description="Train TADA. A default marked * depends on the other flags.",
        argument_default=argparse.SUPPRESS,
    )
    for option in FLAGS:
        text, metadata = option.metadata["help"], option.metadata
        argument = {key: metadata[key] for key in ("choices", "metavar", "nargs", "type") if key in metadata}
        if "group" in metadata:
            group = p.add_argument_group(metadata["group"])
        if option.type is bool:
            argument["action"] = "store_true"
        else:
            kind = (get_args(option.type) or [option.type])[0]
            argument.setdefault("type", kind)
            if "choices" not in argument and kind in (int, float):
                argument["metavar"] = "N" if kind is int else "X"
            text += f" (default: {option.default})" if option.default not in (MISSING, None) else ""
        # torchrun takes --run alone for an abbreviation of its own --run-path.
        several = {"run": ["--run-dir", "--run"], "from_run": ["--from", "--from-run"]}
        names = several.get(option.name, [f"--{option.name.replace('_', '-')}"])
        group.add_argument(*names, dest=option.name, help=text, **argument)
    return p


# ---- their values


def parse(argv: Sequence[str] | None) -> Options:
    """Every option with its value: the flags, then the preset, then the recipe."""
    p = parser()
    given = vars(p.parse_args(argv))
    if "crop" in given:
        given["crop"] = tuple(given["crop"]) * (2 if len(given["crop"]) == 1 else 1)
    values = defaults(given) | given
    if "tags" not in given and not values["fresh"]:
        values["tags"] = tags_of_run(Path(values["run"]), values["condition"]) or values["tags"]
    options = Options(**values)
    refuse_nonsense(p, options)
    return options


def tags_of_run(folder: Path, condition: str) -> str | None:
    """The tags of the run of this condition that would be resumed: it keeps them when the default changes."""
    try:
        options = json.loads(read_bytes(folder / "config.json"))["options"]
        same = options["condition"] == condition and (folder / "last").exists()
        return str(options["tags"]) if same else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # open_run will refuse it
        return None


def defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """The default of every option, where those in `given` are set; given values of others may be missing."""
    values = {option.name: option.default for option in fields(Options) if option.default is not MISSING}
    preset = PRESETS.get(given.get("preset"), {})
    chosen = values | preset | given
    dataset, condition = chosen["dataset"], chosen["condition"]
    model = given.get("model", "tiny" if dataset == "scenes" else "sd15")
    decoder = given.get("decoder", "mask2former" if dataset in WITH_INSTANCES else "fpn")
    default, tiny = recipe(dataset, model, decoder), model == "tiny"
    iterations = (preset | given).get("iterations", default.iterations)
    short = default.short or min(given.get("crop", default.crop))
    values |= {
        **asdict(default),
        "data": default_data(dataset),
        "model": model,
        "weights": f"weights/{model}",
        "decoder": decoder,
        "tags": default_tags(dataset, model, condition),
        "short": short,
        # mmsegmentation's boxes: 2048 x 1024, 2048 x 512
        "long": given.get("short", short) * (2 if dataset == "cityscapes" else 4),
        "warmup": min(default.warmup, iterations // 10),
        "threads": max((os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1),
        "log_every": 10 if tiny else 50,
        "save_every": max(min(2000, iterations // 10), 1),
        "eval_every": max(math.ceil(iterations / (2 if tiny else 10)), 1),
        **preset,
    }
    del values["paper"]
    return values | {"run": f"runs/{run_name(values | given, values)}"}


def default_tags(dataset: str, model: str, condition: str) -> str:
    """RAM's where the paper has them, CLIP's elsewhere; no tags for a condition that uses none."""
    if condition == "oracle":
        return "oracle"
    if condition not in ("tagging", "tags"):
        return "classes"
    return "ram" if model == "sd15" and dataset in PAPER else "clip"


def run_name(values: Mapping[str, Any], default: Mapping[str, Any]) -> str:
    """`ade20k-sd15-fpn-tagging`, and changed options that change the result: `-crop640-tags_oracle`."""
    parts = [values[option.name] for option in FLAGS if option.metadata["role"] == "start"]
    names = [option.name for option in FLAGS if option.metadata["role"] == "training"]
    parts += [name + readable(values[name]) for name in names if values[name] != default[name]]
    name = "-".join(parts)
    if len(name) > LONGEST:
        name = f"{name[: LONGEST - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name


def readable(value: Any) -> str:
    """A value as part of a file name: "" (true), "640", "512x1024", "0.0001", "_oracle", a path's stem."""
    if isinstance(value, tuple):
        return "x".join(map(str, value[: 1 if len(set(value)) == 1 else None]))
    if isinstance(value, str):
        value = re.sub(r"(/(best|last|model\.safetensors))*/*$", "", value).replace("/step-", "-step-")
        return "_" + re.sub(r"[^A-Za-z0-9_.]+", "_", Path(value).stem)[:40]
    return "" if value is True else str(value) if isinstance(value, int) else f"{value:.10g}"


def refuse_nonsense(p: Parser, o: Options) -> None:
    """Validate ranges and combinations of flags; end with exit code 2 and one sentence."""
    if not o.data:
        p.error(f"--dataset {o.dataset}: give its folder with --data")
    if len(o.crop) != 2 or min(o.crop) < 1:
        p.error(f"--crop {' '.join(map(str, o.crop))}: give one or two sizes in pixels")
    for option in FLAGS:
        value, least, below = getattr(o, option.name), *map(option.metadata.get, ("least", "below"))
        if least is not None and not least <= value < (below or math.inf):
            limit = f", and less than {below}" if below else ""
            p.error(f"--{option.name.replace('_', '-')} {value}: give {least} or more{limit}")
    if not 0 < o.lr < math.inf:
        p.error(f"--lr {o.lr}: give a positive number")
    if o.clip is not None and not o.clip > 0:
        p.error(f"--clip {o.clip}: give a positive number")
    sources = [source for source in SOURCES if source != "none"]
    if o.tags not in sources and not os.path.isfile(o.tags):
        p.error(f"--tags {o.tags}: choose {', '.join(sources)}, or a file of JSON lines that exists")
    if o.tag_threshold is not None and not 0 <= o.tag_threshold <= 1:
        p.error(f"--tag-threshold {o.tag_threshold:g}: give a score in 0..1")
    if o.tag_threshold is not None and o.tags in ("classes", "oracle"):
        p.error(f"--tag-threshold {o.tag_threshold:g}: {o.tags} have no scores; leave it out")
    if o.cuda_graph:
        gpu = torch.cuda.is_available() and (o.device or "cuda").startswith("cuda")
        fault = "" if gpu else "no GPU is used here"
        fault = fault or ("it is for one process" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else "")
        fault = fault or ("mask2former matches segments on the CPU" if o.decoder == "mask2former" else "")
        if fault:
            p.error(f"--cuda-graph: {fault}; leave it out")
    if o.lora and o.freeze_unet:
        p.error(f"--lora {o.lora} trains what --freeze-unet leaves as it is: give one of them")
    if o.condition == "oracle" and o.tags != "oracle":
        p.error(f"--condition oracle takes the ground-truth tags: leave --tags {o.tags} out")
    if o.condition == "tags" and o.tags == "classes":
        p.error("--condition tags needs the tags of each image: give --tags clip, ram, oracle or a file")
    if o.condition == "caption" and o.tags in sources:
        p.error(f"--condition caption --tags {o.tags}: give a FILE.jsonl with a caption for every image")
    if o.preset == "demo" and (o.dataset != "scenes" or o.model != "tiny" or o.decoder == "mask2former"):
        p.error("--preset demo is for the drawn images, the tiny model, a semantic decoder: leave it out")
    if o.decoder == "mask2former" and o.dataset not in (*WITH_INSTANCES, "scenes"):
        choices = f"choose --dataset {', '.join(WITH_INSTANCES)} or scenes"
        p.error(f"--decoder mask2former needs instances, and {o.dataset} has none: {choices}")
    if o.condition in ("none", "classes", "implicit") and o.tags != "classes":
        p.error(f"--condition {o.condition} takes no tags per image: leave --tags {o.tags} out")


def config_of(options: Options, dataset: Dataset) -> TadaConfig:
    """The model that the options ask for, over the classes of a data set."""
    shared = {setting.name for setting in fields(TadaConfig)} & {option.name for option in fields(Options)}
    return TadaConfig(
        classes=tuple(dataset.classes),
        things=tuple(dataset.categories.things.tolist()) if dataset.categories else (),
        prompts=tuple(dataset.prompts),
        palette=tuple(tuple(map(int, colour)) for colour in dataset.palette),
        box=None if options.whole else (options.short, options.long),
        stride=tuple(stride_of(side) for side in options.crop),
        **{name: getattr(options, name) for name in shared},
    )
