"""The paper's settings as the defaults of train.py's command line: which data set and model gets which.

Section 4.1 and the captions of Tables 1 to 3; what the paper leaves open is marked in PAPER.md. Top to
bottom: the recipes, the flags, their values, the model they ask for; and the flags of segments, which
eval.py and predict.py share.
"""

import argparse
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from data import LAYOUTS, Dataset, open_dataset
from errors import ModelError
from loading.jitter import SCALES
from mask2former import OVERLAP, SCORE
from model import TadaConfig
from panoptic_data import PANOPTIC_LAYOUTS, PanopticDataset, open_panoptic

WORDS = ("classes", "clip", "oracle")  # values of --tags that are not a file
DROPS = (8 / 9, 26 / 27)  # of a panoptic run: where its rate falls to a tenth (ODISE configs/common/schedule)


@dataclass(frozen=True)
class Recipe:
    """The defaults that depend on what is trained."""

    crop: tuple[int, int]
    iterations: int
    lr: float = 6e-5  # section 4.1
    batch: int = 16  # the paper does not say; mmsegmentation's and VPD's
    weight_decay: float = 0.01  # of mmsegmentation's Swin recipe, which has the paper's 6e-5
    short: int | None = None  # of the box that pictures are resized into; None = the crop's short side
    whole: bool = False  # test pictures keep their own size
    dropout: float = 0.1
    unet_lr_scale: float = 1.0
    clip: float | None = None  # the largest gradient norm
    warmup: int = 1500  # iterations, at most a tenth of the run
    scales: tuple[float, float] | None = None  # of large-scale jitter, which mask2former is trained with
    paper: str = ""  # what the paper says of this run


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


def recipe(dataset: str, model: str, decoder: str) -> Recipe:
    """Section 4.1 and the captions of Tables 1 to 3; what the paper leaves open is marked in PAPER.md."""
    if decoder == "mask2former":
        if model == "sd15":
            return PANOPTIC if dataset == "coco-panoptic" else replace(PANOPTIC, paper="")
        # Scenes are 128 pixels wide: a tenth of that would show nothing.
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


def stride_of(side: int) -> int:
    """Two thirds of a test window, as mmsegmentation has it: 341 of 512, 683 of 1024, but 426 of 640."""
    return 426 if side == 640 else max(round(side * 2 / 3), 1)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description="Train TADA. A default marked * depends on the other flags.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        argument_default=argparse.SUPPRESS,  # `parse` gives the value of a flag that has no default here
    )
    data = p.add_argument_group("what is trained on")
    names = [*LAYOUTS, *PANOPTIC_LAYOUTS, "scenes"]
    data.add_argument("--dataset", choices=names, default="scenes", help="the data set")
    data.add_argument("--data", metavar="DIR", help="its folder; * data/<official name>")
    data.add_argument(
        "--crop", type=int, nargs="+", metavar="N", help="height and width of training pictures; *"
    )
    data.add_argument(
        "--short", type=int, metavar="N", help="short side a picture is resized to; * the crop's"
    )
    data.add_argument("--workers", type=int, default=2, help="processes that load pictures, per rank")

    model = p.add_argument_group("the model")
    model.add_argument("--model", choices=["sd15", "tiny"], help="its size; * tiny for scenes, else sd15")
    model.add_argument("--weights", metavar="DIR", help="the prior, or `random`; * weights/<model>")
    decoders = "mask2former needs instances, as scenes have; * coco-panoptic, panoptic: mask2former, else fpn"
    model.add_argument("--decoder", choices=["fpn", "upernet", "mask2former"], help=decoders)
    conditions = ["none", "caption", "classes", "implicit", "tagging", "oracle"]
    model.add_argument(
        "--condition", choices=conditions, default="tagging", help="a row of the paper's Table 5"
    )
    tags = (
        "where a picture's words come from: classes, clip, oracle or FILE.jsonl; * scenes: clip, else classes"
    )
    model.add_argument("--tags", help=tags)
    tokens = "a tag is one pooled vector, or all tags are one prompt"
    model.add_argument("--tag-tokens", choices=["pooled", "prompt"], default="pooled", help=tokens)
    model.add_argument("--templates", type=int, choices=[1, 80], default=1, help="prompts averaged per name")
    model.add_argument("--queries", type=int, default=32, help="of the tagging adapter")
    model.add_argument("--blocks", type=int, default=2, help="of the tagging adapter")
    start = "the adapter's first context: the empty prompt's, or its own"
    model.add_argument("--adapter-start", choices=["empty", "random"], default="random", help=start)
    model.add_argument("--tag-loss-weight", type=float, default=1.0, help="of Eq. 7; 0 turns it off")
    model.add_argument("--timestep", type=int, default=0, help="of the minor noise, 0 to 999")
    model.add_argument(
        "--noise", choices=["fixed", "none"], default="fixed", help="one for all pictures, or none"
    )
    maps = "the UNet's cross-attention beside its features (VPD)"
    model.add_argument("--attention-maps", action="store_true", help=maps)
    model.add_argument("--freeze-unet", action="store_true", help="train the adapter and decoder alone")
    model.add_argument("--dropout", type=float, help="before the classifier; * 0.1, tiny 0")

    run = p.add_argument_group("the run")
    run.add_argument("--preset", choices=["vpd"], help="VPD's own recipe; flags with a value still win")
    iterations = "* of COCO panoptic 9,000 as printed; ODISE's schedule is 92,188"
    run.add_argument("--iterations", type=int, metavar="N", help=iterations)
    run.add_argument("--batch", type=int, metavar="N", help="pictures per update, over all processes; *")
    run.add_argument("--accumulate", type=int, default=1, metavar="N", help="micro-batches per update")
    run.add_argument("--lr", type=float, help="of AdamW; *")
    run.add_argument("--unet-lr-scale", type=float, metavar="X", help="the UNet's share of it; *")
    run.add_argument("--weight-decay", type=float, metavar="X", help="on weights of Linear and Conv; *")
    warmup = "iterations; * min(1500, iterations / 10), 250 of COCO panoptic"
    run.add_argument("--warmup", type=int, metavar="N", help=warmup)
    clip = "largest gradient norm; * none, of mask2former 0.01"
    run.add_argument("--clip", type=float, metavar="X", help=clip)
    run.add_argument("--seed", type=int, default=0, help="of weights, order, augmentation and dropout")
    run.add_argument("--threads", type=int, metavar="N", help="per process; * the CPUs / processes")
    kernels = "Triton kernels: where they won the benchmark, never, or by name"
    run.add_argument("--kernels", choices=["auto", "torch", "triton"], default="auto", help=kernels)
    run.add_argument("--compile", action="store_true", help="torch.compile the UNet and the decoder")
    run.add_argument(
        "--checkpoint-activations", action="store_true", help="less memory, about a third slower"
    )

    out = p.add_argument_group("what it writes")
    out.add_argument(
        "--run-dir",
        "--run",  # torchrun would take it for an abbreviation of its own --run-path
        dest="run",
        metavar="DIR",
        help="its folder; * runs/<dataset>-<model>-<decoder>-<condition>",
    )
    out.add_argument("--fresh", action="store_true", help="put an earlier run in that folder aside")
    out.add_argument(
        "--check", action="store_true", help="check the data, draw inputs.jpg, evaluate a little, stop"
    )
    out.add_argument("--log-every", type=int, metavar="N", help="iterations; * 50, tiny 10")
    out.add_argument(
        "--save-every", type=int, metavar="N", help="iterations; * 2000, at most iterations / 10"
    )
    out.add_argument("--eval-every", type=int, metavar="N", help="iterations; * iterations / 10, tiny / 2")
    return p


VPD = {  # fpn_vpd_sd1-5_512x512_gpu8x2.py and vpd_seg.py
    "condition": "classes",
    "timestep": 1,
    "noise": "none",
    "attention_maps": True,
    "lr": 8e-5,
    "weight_decay": 0.001,
    "unet_lr_scale": 0.1,
}


SWITCHES = ("attention_maps", "freeze_unet", "compile", "checkpoint_activations", "fresh", "check")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Every option with its value: the flags, then the preset, then the recipe."""
    p = parser()
    if getattr(p.parse_known_args(argv)[0], "preset", None) == "vpd":
        p.set_defaults(**VPD)
    given = vars(p.parse_args(argv))
    dataset, condition = given["dataset"], given["condition"]
    model = given.get("model", "tiny" if dataset == "scenes" else "sd15")
    decoder = given.get("decoder", "mask2former" if dataset in PANOPTIC_LAYOUTS else "fpn")
    r = recipe(dataset, model, decoder)
    iterations, tiny = given.get("iterations", r.iterations), model == "tiny"
    crop = given.get("crop", r.crop)
    short = given.get("short", r.short or min(crop))
    defaults = dict.fromkeys(SWITCHES, False) | {
        "data": default_data(dataset),
        "model": model,
        "weights": f"weights/{model}",
        "decoder": decoder,
        "tags": default_tags(dataset, condition),
        "dropout": r.dropout,
        "preset": None,
        "iterations": iterations,
        "batch": r.batch,
        "lr": r.lr,
        "unet_lr_scale": r.unet_lr_scale,
        "weight_decay": r.weight_decay,
        "warmup": min(r.warmup, iterations // 10),
        "clip": r.clip,
        "threads": max((os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1),
        "run": f"runs/{dataset}-{model}-{decoder}-{condition}",
        "log_every": 10 if tiny else 50,
        "save_every": max(min(2000, iterations // 10), 1),
        "eval_every": max(math.ceil(iterations / (2 if tiny else 10)), 1),
    }
    o = argparse.Namespace(**defaults | given)
    o.crop = tuple(crop) * (2 if len(crop) == 1 else 1)
    o.scales, o.whole, o.scale_latent = r.scales, r.whole, o.preset != "vpd"
    # mmsegmentation's boxes: 2048 x 1024, 2048 x 512
    o.short, o.long = short, short * (2 if dataset == "cityscapes" else 4)
    refuse_nonsense(p, o)
    return o


def default_data(dataset: str) -> str:
    """Where a data set lies if nobody says; scenes lie nowhere, and "panoptic" wherever its owner put it."""
    if dataset in ("scenes", "panoptic"):
        return "scenes" if dataset == "scenes" else ""
    return f"data/{(LAYOUTS | PANOPTIC_LAYOUTS)[dataset].root}"


def default_tags(dataset: str, condition: str) -> str:
    """Where words come from if nobody says."""
    if condition == "oracle":
        return "oracle"
    return "clip" if dataset == "scenes" and condition == "tagging" else "classes"


LEAST = {
    1: "iterations batch accumulate threads queries blocks short log_every save_every eval_every",
    0: "workers seed warmup tag_loss_weight unet_lr_scale weight_decay",
}


def refuse_nonsense(p: argparse.ArgumentParser, o: argparse.Namespace) -> None:
    """What argparse's types let through."""
    if not o.data:
        p.error(f"--dataset {o.dataset}: give its folder with --data")
    for least, names in LEAST.items():
        for name in names.split():
            if not least <= getattr(o, name) < math.inf:
                p.error(f"--{name.replace('_', '-')} {getattr(o, name)}: give {least} or more")
    if len(o.crop) != 2 or min(o.crop) < 1:
        p.error(f"--crop {' '.join(map(str, o.crop))}: give one or two sizes in pixels")
    if not 0 <= o.timestep < 1000:
        p.error(f"--timestep {o.timestep}: give 0 to 999")
    if not 0 < o.lr < math.inf:
        p.error(f"--lr {o.lr}: give a positive number")
    if o.clip is not None and not o.clip > 0:
        p.error(f"--clip {o.clip}: give a positive number")
    if not 0 <= o.dropout < 1:
        p.error(f"--dropout {o.dropout}: give 0 or more, and less than 1")
    if o.seed >= 2**63:
        p.error(f"--seed {o.seed}: give less than 2**63")
    if o.tags not in WORDS and not os.path.isfile(o.tags):
        p.error(f"--tags {o.tags}: choose classes, clip, oracle, or a file of JSON lines that exists")
    if o.condition == "oracle" and o.tags != "oracle":
        p.error(f"--condition oracle is told the true classes: leave --tags {o.tags} out")
    if o.condition == "caption" and o.tags in WORDS:
        p.error(f"--condition caption --tags {o.tags}: give a FILE.jsonl with a caption for every picture")
    if o.decoder == "mask2former" and o.dataset in LAYOUTS:
        p.error(
            f"--decoder mask2former needs instances, and {o.dataset} has none: "
            f"choose --dataset {', '.join(PANOPTIC_LAYOUTS)} or scenes"
        )
    if o.condition in ("none", "classes", "implicit") and o.tags != "classes":
        p.error(f"--condition {o.condition} takes no words per picture: leave --tags {o.tags} out")


def open_set(dataset: str, root: str, split: str, decoder: str) -> Dataset:
    """A split of any data set; with its instances where it has some on disk, or the decoder needs them."""
    needed = dataset in PANOPTIC_LAYOUTS or decoder == "mask2former"
    return (open_panoptic if needed else open_dataset)(dataset, root, split)


def config_of(options: argparse.Namespace, dataset: Dataset) -> TadaConfig:
    """The model that the options ask for, over the classes of a data set."""
    box = None if options.whole else (options.short, options.long)
    names = (
        "dataset model weights decoder condition tags tag_tokens templates queries blocks adapter_start "
        "tag_loss_weight timestep noise scale_latent attention_maps freeze_unet dropout crop"
    )
    things = dataset.categories.things.tolist() if isinstance(dataset, PanopticDataset) else ()
    return TadaConfig(
        classes=tuple(dataset.classes),
        things=tuple(things),
        prompts=tuple(dataset.prompts),
        palette=tuple(tuple(map(int, colour)) for colour in dataset.palette),
        box=box,
        stride=tuple(stride_of(side) for side in options.crop),
        **{name: getattr(options, name) for name in names.split()},
    )


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
