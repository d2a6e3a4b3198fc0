"""The paper's settings: which data set, model and decoder are trained how.

Section 4.1 and the captions of Tables 1 to 3; what the paper leaves open is marked in PAPER.md. The flags of
train.py, in run/options.py, have these as defaults.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from loading.jitter import SCALES

PAPER = {  # the paper's data sets, and its results with RAM's tags (Tables 1 to 4)
    "ade20k": "Table 1: mIoU 55.8 with FPN, 55.3 with UperNet",
    "cocostuff": "Table 2: mIoU 50.6",
    "cityscapes": "Table 3: mIoU 82.6",
    "coco-panoptic": "Table 4: PQ 56.1",
}
ADAPTERS = {  # Table 5, on ADE20K
    "none": "Uncondition, mIoU 53.9",
    "caption": "a caption, mIoU 53.5 by Tag2Text, 54.2 by BLIP",
    "classes": "VPD*, mIoU 54.2",
    "implicit": "ODISE*, mIoU 54.5",
}

DROPS = (8 / 9, 26 / 27)  # of a panoptic run: the rate falls to a tenth (ODISE configs/common/schedule)


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
    scales: tuple[float, float] | None = None  # an image is resized by; None = (0.5, 2.0)
    colours: bool = True  # distorted; mask2former's never are
    paper: str = ""  # the paper's words on this run


# ODISE's, as the paper's Table 4: its 9,000 iterations are as printed, ODISE's schedule is 92,188.
ODISE = {"lr": 1e-4, "batch": 64, "weight_decay": 0.05, "unet_lr_scale": 0.1, "clip": 0.01, "warmup": 250}
SCHEDULE = "lr 1e-4, batch 64, 9k; ODISE 92,188 iterations"
PANOPTIC = Recipe((640, 640), 9000, **ODISE, scales=SCALES, paper=SCHEDULE)

CITYSCAPES = "crop 512x1024, 90k, FPN, batch unsaid"
SD15 = {
    "ade20k": Recipe((512, 512), 80_000, paper="lr 6e-5, 80k (FPN) or 160k (UperNet), batch unsaid"),
    "cocostuff": Recipe((640, 640), 80_000, paper="crop 640, 80k, batch unsaid"),
    "cityscapes": Recipe((512, 1024), 90_000, short=1024, whole=True, paper=CITYSCAPES),
}

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

# The most that `make demo` learns in its minutes. Drawn images are all of one size and style, so they are
# mirrored and no more, as in lab/ablate.py.
DEMO = {"iterations": 350, "lr": 2e-3, "scales": (1.0, 1.0), "colours": False}


def learning_rate(step: int, iterations: int, warmup: int, drops: Sequence[float] = ()) -> float:
    """The share of the full rate at step 0, 1, ...: linear decay to 0, times linear warm-up from 1e-6.

    mmsegmentation's poly policy of power 1 (mmcv/runner/hooks/lr_updater.py). With `drops`, shares of the
    run, the rate falls to a tenth at each instead of decaying.
    """
    warm = min(1e-6 + (1 - 1e-6) * step / warmup, 1.0) if warmup else 1.0
    if drops:
        return warm * 0.1 ** sum(step >= share * iterations for share in drops)
    return warm * (1 - step / iterations)


def paper_row(dataset: str, condition: str, tags: str, tag_loss_weight: float) -> str:
    """The result of the paper that such a model of Stable Diffusion's size is to be compared with, or ""."""
    if dataset not in PAPER:
        return ""
    if condition == "oracle" or tags == "oracle":
        return "Figure 1: ground-truth tags, an upper bound"
    if condition == "tags":
        return "section 3.4: tags without the adapter; no table has this row"
    if condition == "tagging" and tags != "classes":
        return PAPER[dataset] + ("" if tags == "ram" else f"; there with RAM's tags, here {tags}")
    loss = "with loss, mIoU 55.5" if tag_loss_weight else "no loss, mIoU 54.8"
    return f"Table 5 (ADE20K): {ADAPTERS.get(condition, loss)}"


def recipe(dataset: str, model: str, decoder: str) -> Recipe:
    """The defaults of a data set, a model and a decoder."""
    if decoder == "mask2former":
        if model == "sd15":
            return PANOPTIC if dataset == "coco-panoptic" else replace(PANOPTIC, paper="")
        # Scenes are 128 pixels wide: at a tenth of that nothing is visible.
        tiny = Recipe((128, 128), 1500, lr=1e-3, batch=8, dropout=0.0, clip=0.01, scales=(0.5, 2.0))
        return tiny if dataset == "scenes" else replace(tiny, iterations=3000, short=180)
    if model == "tiny":
        tiny = Recipe((128, 128), 1500, lr=1e-3, short=180, dropout=0.0)  # half an hour
        scenes = replace(tiny, iterations=200, batch=8, short=None)  # under three minutes on two CPU cores
        return scenes if dataset == "scenes" else tiny
    if (dataset, decoder) == ("ade20k", "upernet"):
        return replace(SD15[dataset], iterations=160_000)
    return SD15.get(dataset, Recipe((512, 512), 80_000))
