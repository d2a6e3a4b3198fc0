"""The paper's settings: which data set, model and decoder are trained how.

Section 4.1 and the captions of Tables 1 to 3; what the paper leaves open is marked in PAPER.md. The flags of
train.py, in run/options.py, have these as defaults.
"""

import argparse
from dataclasses import dataclass, replace

from data import LAYOUTS, Dataset, open_dataset
from errors import ModelError
from loading.jitter import SCALES
from mask2former import OVERLAP, SCORE
from panoptic_data import PANOPTIC_LAYOUTS, open_panoptic

DROPS = (
    8 / 9,
    26 / 27,
)  # shares of a panoptic run: the rate falls to a tenth (ODISE configs/common/schedule)


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
