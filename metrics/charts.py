"""Charts by matplotlib: the confusion matrix of an evaluation, the curves of a run.

matplotlib takes a while to import, so only the functions that draw do; they use no global state of it.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from images.text import note, readable
from run.files import read_bytes, replacing

CELL = 0.24  # inches of a class in a confusion matrix, 24 pixels
LARGE = 40  # classes; the names of more stand on all four sides
LOSSES = ("loss", "seg", "aux", "class", "mask", "dice", "tag")  # of log.jsonl; `loss` is their sum
PANELS = {"losses": LOSSES, "validation, %": ("mIoU", "PQ"), "learning rate": ("lr",)}


def confusion_matrix(file: Path, confusion: Tensor, names: Sequence[str]) -> None:
    """Draw the share of each row, as its root, so that rare confusions show; in percent from 1 on.

    confusion `(K, K)` pixels [truth, prediction]. Only the classes that occur; a row without pixels is grey.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    occur = confusion.sum(0) + confusion.sum(1) > 0
    kept = (occur if occur.any() else ~occur).nonzero().flatten()
    names = [names[k] for k in kept.tolist()]
    counts = confusion[kept][:, kept].double()
    shares = counts / counts.sum(1, keepdim=True)  # NaN without pixels
    figure = Figure((CELL * len(names),) * 2, dpi=100)  # the names lie around it: a tight box includes them
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(shares.sqrt().numpy(), colormaps["Blues"].with_extremes(bad="0.88"), vmin=0, vmax=1)
    style = {"labels": [*map(readable, names)], "fontsize": 9, "parse_math": False}
    axes.set_xticks(range(len(names)), rotation=90, **style)
    axes.set_yticks(range(len(names)), **style)
    large = len(names) > LARGE
    axes.tick_params(length=0, labeltop=True, labelbottom=large, labelright=large)
    axes.set_xlabel("\n".join([*note(names), "prediction, % of the row"]), color="gray")
    axes.set_ylabel("truth", color="gray")
    axes.xaxis.set_label_position("top")
    axes.spines[:].set_color("lightgray")
    for row, column in (shares >= 0.01).nonzero().tolist():
        share = float(shares[row, column])
        ink = "white" if share > 0.25 else "black"
        axes.text(column, row, f"{100 * share:.0f}", color=ink, fontsize=7, ha="center", va="center")
    with replacing(file) as new:
        figure.savefig(new, bbox_inches="tight", pad_inches=0.15)


def curves(file: Path, log: Path) -> None:
    """Draw what `log`, a log.jsonl, holds: losses, mIoU and PQ of the validations, the learning rate."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    entries = [json.loads(line) for line in read_bytes(log).splitlines()]
    entries = [x | {name: 100 * share for name, share in x.get("val", {}).items()} for x in entries]
    figure = Figure((9, 9), dpi=100, layout="constrained")
    figure.suptitle(readable(log.absolute().parent.name), parse_math=False)
    losses, measures, rate = panels = figure.subplots(3, sharex=True, height_ratios=(3, 3, 1))
    for axes, (title, names) in zip(panels, PANELS.items(), strict=True):
        for name in names:
            if points := [(x["step"], x[name]) for x in entries if name in x]:
                style = {"marker": "." if axes is measures else "", "lw": 2 if name == names[0] else 1}
                axes.plot(*zip(*points, strict=True), label=name, **style)
        axes.set_title(title, loc="left")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    losses.set_yscale("log")
    losses.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}")
    losses.minorticks_off()
    measures.set_ylim(0)
    rate.set_xlabel("step")
    rate.xaxis.get_major_locator().set_params(integer=True)
    with replacing(file) as new:
        figure.savefig(new)
