"""The paper's settings as the defaults of train.py, and the flags that change them.

Section 4.1 and the captions of Tables 1 to 3; what the paper leaves open is marked in PAPER.md. Top to
bottom: the recipes, the options with their flags, their defaults, validation, the model they ask for.
"""

import argparse
import hashlib
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_args

from data import LAYOUTS, Dataset, open_dataset
from errors import ModelError
from loading.jitter import SCALES
from mask2former import OVERLAP, SCORE
from model import TadaConfig
from panoptic_data import PANOPTIC_LAYOUTS, PanopticDataset, open_panoptic

LONGEST = 200  # characters of a run folder's name; file systems allow 255 bytes
TAG_SOURCES = ("classes", "clip", "oracle")  # values of --tags that are not a file
WITH_INSTANCES = tuple(PANOPTIC_LAYOUTS)  # data sets on disk for mask2former
DROPS = (
    8 / 9,
    26 / 27,
)  # shares of a panoptic run: the rate falls to a tenth (ODISE configs/common/schedule)


# ---- the recipes


@dataclass(frozen=True)
class Recipe:
    """The defaults that depend on the data set, the model and the decoder."""

    crop: tuple[int, int]
    iterations: int
    lr: float = 6e-5  # section 4.1
    batch: int = 16  # not in the paper; mmsegmentation's and VPD's
    weight_decay: float = 0.01  # of mmsegmentation's Swin recipe, which has the paper's 6e-5
    short: int | None = None  # short side of the box that images are resized into; None = the crop's
    whole: bool = False  # test images keep their own size
    dropout: float = 0.1
    unet_lr_scale: float = 1.0
    clip: float | None = None  # the largest gradient norm
    warmup: int = 1500  # iterations, at most a tenth of the run
    scales: tuple[float, float] | None = None  # of large-scale jitter, which mask2former is trained with
    paper: str = ""  # the paper's words on this run


# ODISE's, as the paper's Table 4: its 9,000 iterations are as printed, ODISE's schedule is 92,188.
PANOPTIC = Recipe(
    (640, 640),
    9000,
    lr=1e-4,
    batch=64,
    weight_decay=0.05,
    unet_lr_scale=0.1,
    clip=0.01,
    warmup=250,
    scales=SCALES,
    paper="lr 1e-4, batch 64, 9k; ODISE 92,188 iterations",
)

VPD = {  # fpn_vpd_sd1-5_512x512_gpu8x2.py and vpd_seg.py
    "condition": "classes",
    "timestep": 1,
    "noise": "none",
    "scale_latent": False,
    "attention_maps": True,
    "lr": 8e-5,
    "weight_decay": 0.001,
    "unet_lr_scale": 0.1,
}


def recipe(dataset: str, model: str, decoder: str) -> Recipe:
    """Section 4.1 and the captions of Tables 1 to 3; what the paper leaves open is marked in PAPER.md."""
    if decoder == "mask2former":
        if model == "sd15":
            return PANOPTIC if dataset == "coco-panoptic" else replace(PANOPTIC, paper="")
        # Scenes are 128 pixels wide: at a tenth of that nothing is visible.
        tiny = Recipe((128, 128), 1500, lr=1e-3, batch=8, dropout=0.0, clip=0.01, scales=(0.5, 2.0))
        return tiny if dataset == "scenes" else replace(tiny, iterations=3000, short=180)
    if model == "tiny":
        if dataset == "scenes":
            # Under three minutes on two CPU cores.
            return Recipe((128, 128), 200, lr=1e-3, batch=8, dropout=0.0)
        return Recipe((128, 128), 1500, lr=1e-3, short=180, dropout=0.0)  # half an hour
    if dataset == "ade20k":
        iterations = 160_000 if decoder == "upernet" else 80_000
        return Recipe((512, 512), iterations, paper="lr 6e-5, 80k (FPN) or 160k (UperNet), batch unsaid")
    if dataset == "cocostuff":
        return Recipe((640, 640), 80_000, paper="crop 640, 80k, batch unsaid")
    if dataset == "cityscapes":
        paper = "crop 512x1024, 90k, FPN, batch unsaid"
        return Recipe((512, 1024), 90_000, short=1024, whole=True, paper=paper)
    return Recipe((512, 512), 80_000)


# ---- the options, each with its flag


def flag(help: str, default: Any = MISSING, **metadata: Any) -> Any:
    """A field of `Options` with its flag; without a default it depends on the other flags (* in --help).

    Numbers are legal from `least` and less than `below`. `role` is what the flag changes: "training" (the
    result; the name of the run folder contains it), "start" (the result; the name begins with it), "speed" (a
    run resumes only with the same value), "free" (a run may resume with another: rounding depends on it at
    most).
    """
    return field(default=default, metadata={"help": help, "role": "training", **metadata})


# Texts and choices too long for one line below.
DECODERS = "mask2former needs instances, as scenes have; * coco-panoptic, panoptic: mask2former, else fpn"
TOKENS = "a tag is one pooled vector, or all tags are one prompt"
START = "the adapter's first context: the empty prompt's, or its own"
KERNELS = "Triton kernels: where they won the benchmark, never, or by name"
FOLDER = "its folder; * runs/<dataset>-<model>-<decoder>-<condition> and the flags that change the result"
SETS = [*LAYOUTS, *PANOPTIC_LAYOUTS, "scenes"]
CONDITIONS = ["none", "caption", "classes", "implicit", "tagging", "oracle"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Every setting of a run, as config.json stores them; TadaConfig holds the defaults of the model's."""

    dataset: str = flag("the data set", "scenes", role="start", choices=SETS, group="what is trained on")
    data: str = flag("its folder; * data/<official name>", role="free", metavar="DIR")
    crop: tuple[int, int] = flag("height and width of training images; *", nargs="+")
    short: int = flag("short side an image is resized to; * the crop's", least=1)
    workers: int = flag("processes that load images, per rank", 2, least=0, role="free")

    model: str = flag("* scenes: tiny, else sd15", role="start", choices=["sd15", "tiny"], group="the model")
    weights: str = flag("the prior, or `random`; * weights/<model>", metavar="DIR")
    decoder: str = flag(DECODERS, role="start", choices=["fpn", "upernet", "mask2former"])
    condition: str = flag("a row of Table 5", TadaConfig.condition, role="start", choices=CONDITIONS)
    tags: str = flag("of each image: classes, clip, oracle or FILE.jsonl; * scenes: clip, else classes")
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
    dropout: float = flag("before the classifier; * 0.1, tiny 0", least=0, below=1)

    preset: str | None = flag("VPD's recipe; flags override it", None, choices=["vpd"], group="the run")
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
    compile: bool = flag("torch.compile the UNet and the decoder", False, role="speed")
    checkpoint_activations: bool = flag("less memory, about a third slower", False, role="speed")

    run: str = flag(FOLDER, role="free", metavar="DIR", group="what it writes")
    fresh: bool = flag("rename an earlier run in that folder and start over", False, role="free")
    check: bool = flag("check the data, draw inputs.jpg, evaluate a few images, stop", False, role="free")
    log_every: int = flag("iterations; * 50, tiny 10", least=1, role="free")
    save_every: int = flag("iterations; * 2000, at most iterations / 10", least=1, role="free")
    eval_every: int = flag("iterations; * iterations / 10, tiny / 2", least=1, role="speed")

    # Without a flag: they follow from the recipe, the preset and --short.
    scales: tuple[float, float] | None
    whole: bool
    long: int
    scale_latent: bool = TadaConfig.scale_latent


FLAGS = [option for option in fields(Options) if option.metadata]


def parser() -> argparse.ArgumentParser:
    """The flags of `Options`; its result holds those that were given, `parse` adds the others."""
    p = argparse.ArgumentParser(
        description="Train TADA. A default marked * depends on the other flags.",
        argument_default=argparse.SUPPRESS,
    )
    for option in FLAGS:
        text, metadata = option.metadata["help"], option.metadata
        argument = {key: metadata[key] for key in ("choices", "metavar", "nargs") if key in metadata}
        if "group" in metadata:
            group = p.add_argument_group(metadata["group"])
        if option.type is bool:
            argument["action"] = "store_true"
        else:
            argument["type"] = kind = (get_args(option.type) or [option.type])[0]
            if "choices" not in argument and kind in (int, float):
                argument["metavar"] = "N" if kind is int else "X"
            text += f" (default: {option.default})" if option.default not in (MISSING, None) else ""
        # torchrun takes --run alone for an abbreviation of its own --run-path.
        names = ["--run-dir", "--run"] if option.name == "run" else [dashed(option.name)]
        group.add_argument(*names, dest=option.name, help=text, **argument)
    return p


def dashed(name: str) -> str:
    """The flag of an option."""
    return f"--{name.replace('_', '-')}"


# ---- their values


def parse(argv: Sequence[str] | None) -> Options:
    """Every option with its value: the flags, then the preset, then the recipe."""
    p = parser()
    given = vars(p.parse_args(argv))
    if "crop" in given:
        given["crop"] = tuple(given["crop"]) * (2 if len(given["crop"]) == 1 else 1)
    options = Options(**defaults(given) | given)
    refuse_nonsense(p, options)
    return options


def defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """The default of every option, where those in `given` are set; given values of others may be missing."""
    values = {option.name: option.default for option in fields(Options) if option.default is not MISSING}
    preset = VPD if given.get("preset") == "vpd" else {}
    chosen = values | preset | given
    dataset, condition = chosen["dataset"], chosen["condition"]
    model = given.get("model", "tiny" if dataset == "scenes" else "sd15")
    decoder = given.get("decoder", "mask2former" if dataset in WITH_INSTANCES else "fpn")
    default, tiny = recipe(dataset, model, decoder), model == "tiny"
    iterations = given.get("iterations", default.iterations)
    short = default.short or min(given.get("crop", default.crop))
    values |= {
        **asdict(default),
        "data": default_data(dataset),
        "model": model,
        "weights": f"weights/{model}",
        "decoder": decoder,
        "tags": default_tags(dataset, condition),
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


def default_tags(dataset: str, condition: str) -> str:
    """The source of the tags of each image."""
    if condition == "oracle":
        return "oracle"
    return "clip" if dataset == "scenes" and condition == "tagging" else "classes"


def run_name(values: Mapping[str, Any], default: Mapping[str, Any]) -> str:
    """`ade20k-sd15-fpn-tagging`, and the options that change the result and differ from their defaults:
    `-crop640-tags_oracle`.
    """
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
        return "_" + re.sub(r"[^A-Za-z0-9_.]+", "_", Path(value).stem)[:40]
    return "" if value is True else str(value) if isinstance(value, int) else f"{value:.10g}"


def refuse_nonsense(p: argparse.ArgumentParser, o: Options) -> None:
    """Validate ranges and combinations of flags; end with exit code 2 and one sentence."""
    if not o.data:
        p.error(f"--dataset {o.dataset}: give its folder with --data")
    if len(o.crop) != 2 or min(o.crop) < 1:
        p.error(f"--crop {' '.join(map(str, o.crop))}: give one or two sizes in pixels")
    for option in FLAGS:
        value, least, below = getattr(o, option.name), *map(option.metadata.get, ("least", "below"))
        if least is not None and not least <= value < (below or math.inf):
            limit = f", and less than {below}" if below else ""
            p.error(f"{dashed(option.name)} {value}: give {least} or more{limit}")
    if not 0 < o.lr < math.inf:
        p.error(f"--lr {o.lr}: give a positive number")
    if o.clip is not None and not o.clip > 0:
        p.error(f"--clip {o.clip}: give a positive number")
    if o.tags not in TAG_SOURCES and not os.path.isfile(o.tags):
        p.error(f"--tags {o.tags}: choose classes, clip, oracle, or a file of JSON lines that exists")
    if o.condition == "oracle" and o.tags != "oracle":
        p.error(f"--condition oracle takes the ground-truth tags: leave --tags {o.tags} out")
    if o.condition == "caption" and o.tags in TAG_SOURCES:
        p.error(f"--condition caption --tags {o.tags}: give a FILE.jsonl with a caption for every image")
    if o.decoder == "mask2former" and o.dataset not in (*WITH_INSTANCES, "scenes"):
        p.error(
            f"--decoder mask2former needs instances, and {o.dataset} has none: "
            f"choose --dataset {', '.join(WITH_INSTANCES)} or scenes"
        )
    if o.condition in ("none", "classes", "implicit") and o.tags != "classes":
        p.error(f"--condition {o.condition} takes no tags per image: leave --tags {o.tags} out")


def config_of(options: Options, dataset: Dataset) -> TadaConfig:
    """The model that the options ask for, over the classes of a data set."""
    shared = {setting.name for setting in fields(TadaConfig)} & {option.name for option in fields(Options)}
    things = dataset.categories.things.tolist() if isinstance(dataset, PanopticDataset) else ()
    return TadaConfig(
        classes=tuple(dataset.classes),
        things=tuple(things),
        prompts=tuple(dataset.prompts),
        palette=tuple(tuple(map(int, colour)) for colour in dataset.palette),
        box=None if options.whole else (options.short, options.long),
        stride=tuple(stride_of(side) for side in options.crop),
        **{name: getattr(options, name) for name in shared},
    )


def stride_of(side: int) -> int:
    """Two thirds of a test window, as mmsegmentation has it: 341 of 512, 683 of 1024, but 426 of 640."""
    return 426 if side == 640 else max(round(side * 2 / 3), 1)


def default_data(dataset: str) -> str:
    """Where a data set lies if nobody says; scenes lie nowhere, and "panoptic" wherever its owner put it."""
    if dataset in ("scenes", "panoptic"):
        return "scenes" if dataset == "scenes" else ""
    return f"data/{(LAYOUTS | PANOPTIC_LAYOUTS)[dataset].root}"


def open_set(dataset: str, root: str, split: str, decoder: str) -> Dataset:
    """A split of any data set; with its instances where it has some on disk, or the decoder needs them."""
    needed = dataset in PANOPTIC_LAYOUTS or decoder == "mask2former"
    return (open_panoptic if needed else open_dataset)(dataset, root, split)


# ---- the flags of segments


def add_segment_flags(parser: argparse.ArgumentParser) -> None:
    """--score and --overlap of eval.py and predict.py; the options lack one that is not given."""
    add = parser.add_argument_group("the segments of mask2former").add_argument
    some = {"type": share, "metavar": "X", "default": argparse.SUPPRESS}
    least = f"least probability of a segment's class (default: {SCORE}, Mask2Former's; ODISE's is 0.0)"
    add("--score", **some, help=least)
    kept = f"least share of its mask that a segment keeps of what others claim (default: {OVERLAP})"
    add("--overlap", **some, help=kept)


def segment_options(options: argparse.Namespace, decoder: str) -> dict[str, float]:
    """`score` and `overlap` of mask2former, {} of another decoder. Raises ModelError if that is given one."""
    given = {name: value for name, value in vars(options).items() if name in ("score", "overlap")}
    if decoder == "mask2former":
        return {"score": SCORE, "overlap": OVERLAP} | given
    for name in given:
        raise ModelError(
            f"--{name}: it is of mask2former's segments, and this model's decoder is {decoder}; leave it out"
        )
    return {}


def share(text: str) -> float:
    x = float(text)  # argparse reports a ValueError
    if not 0 <= x <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not in 0..1")
    return x
