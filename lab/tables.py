"""The rows of the paper's tables in miniature, the record of their runs, and the tables in Markdown.

Top to bottom: the rows, a record, the tables, the claims that must hold. lab/ablate.py makes the runs.
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from errors import TadaError
from images import scenes

BATCH = 8  # images per step of a run
LOOKALIKES = {name for pair in scenes.PAIRS for name in pair}
OTHER = "mIoU_other"  # with the ground-truth tags of the next image


# ---- the rows


@dataclass(frozen=True)
class Row:
    """A row of a table: its changes to the defaults, its number of seeds and its factor of steps."""

    name: str
    config: dict = field(default_factory=dict)
    seeds: int = 5
    paper: float | None = None  # its mIoU on ADE20K
    longer: int = 1
    random_unet: bool = False
    ambiguity: float = 1.0


NONE = {"condition": "none"}
TAGGING = {"condition": "tagging", "tags": "classes"}
ORACLE = {"condition": "oracle", "tags": "oracle"}
FROZEN = {"freeze_unet": True}  # only the adapter, if any, and the decoder are trained
TABLE_5 = (
    Row("none", NONE, paper=53.9),
    Row("caption", {"condition": "caption", "tags": "clip"}, paper=53.5),
    Row("tags without adapter", {"condition": "tags", "tags": "clip"}),
    Row("classes", {"condition": "classes"}, paper=54.2),
    Row("implicit", {"condition": "implicit"}, paper=54.5),
    Row("tagging", TAGGING | {"tag_loss_weight": 0.0}, paper=54.8),
    Row("tagging, loss", TAGGING, paper=55.5),
    Row("tagging, loss, tags", TAGGING | {"tags": "clip"}, paper=55.8),
    Row("oracle", ORACLE),
)
TABLE_6 = tuple(
    Row(f"loss weight {weight}", TAGGING | {"tag_loss_weight": float(weight)}, 2, paper)
    for weight, paper in ((5, 55.72), (10, 55.04), (15, 54.96))
)
TABLE_7 = tuple(
    Row(f"{blocks} blocks", TAGGING | {"blocks": blocks}, 2, paper)
    for blocks, paper in ((4, 55.20), (6, 55.43), (8, 54.94), (10, 54.73))
)
CONTROLS = (
    Row("none, random UNet", NONE, 3, random_unet=True),
    Row("oracle, random UNet", ORACLE, 3, random_unet=True),
    Row("none, frozen UNet", NONE | FROZEN, 3),
    Row("oracle, frozen UNet", ORACLE | FROZEN, 3),
    Row("none, frozen random UNet", NONE | FROZEN, 3, random_unet=True),
    Row("oracle, frozen random UNet", ORACLE | FROZEN, 3, random_unet=True),
    Row("none, nothing alike", NONE, 2, ambiguity=0.0),
    Row("oracle, nothing alike", ORACLE, 2, ambiguity=0.0),
    Row("none, 10 times longer", NONE, 1, longer=10),
    Row("tagging from the empty prompt", TAGGING | {"tags": "clip", "adapter_start": "empty"}, 2),
)
PROBE = Row("CLIP's tokens alone")
ROWS = {row.name: row for row in (*TABLE_5, *CONTROLS, PROBE, *TABLE_6, *TABLE_7)}


# ---- a record

SHARED = {"split", "scenes_version", "steps"}  # the keys that the tables need of a record's first line,
RUN = {"row", "seed", "mIoU", "IoU", "tag_mAP"}  # and of every other line


def read_record(file: Path) -> tuple[dict, list[dict]]:
    """Return a record's shared conditions and its runs, without a truncated last line."""
    lines = []
    for number, line in enumerate(file.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break
        try:
            entry = json.loads(line)
            missing = (RUN if lines else SHARED).difference(entry)
        except (ValueError, TypeError, RecursionError):
            missing = SHARED
        if missing:
            raise TadaError(f"{file}, line {number}, is not from ablate.py: give the runs.jsonl of an --out")
        lines.append(entry)
    if not lines:
        raise TadaError(f"{file} has no runs: remove it, or give another --out")
    return lines[0], lines[1:]


# ---- the tables

Runs = dict[str, dict[int, dict]]  # row -> seed -> line of the record
HEAD = "| | seeds | mIoU | above none | look-alikes | tag mAP | the paper's |\n|---|--:|--:|--:|--:|--:|--:|"
OTHERS = "oracle, another's tags"
TABLES = {
    "Table 5 and Figure 1": [row.name for row in TABLE_5],
    "Controls": ["none", "oracle", OTHERS, *(row.name for row in CONTROLS), PROBE.name],
    "Table 6": ["tagging", "tagging, loss", *(row.name for row in TABLE_6)],
    "Table 7": ["tagging, loss", *(row.name for row in TABLE_7)],
}
SHORT = {"Table 6", "Table 7"}


def report(shared: dict, entries: Sequence[dict]) -> str:
    """Return all tables of a record in Markdown: mean and standard error over seeds, in per cent."""
    runs: Runs = {}
    for x in entries:
        runs.setdefault(x["row"], {})[x["seed"]] = x
    if "oracle" in runs:  # the same models with other tags
        runs[OTHERS] = {seed: x | {"mIoU": x[OTHER], "IoU": None} for seed, x in runs["oracle"].items()}
    version, split, steps = shared["scenes_version"], shared["split"], shared["steps"]
    text = [f"scenes version {version}, {split}, {steps} steps of {BATCH}"]
    for title, names in TABLES.items():
        lines = [table_row(name, runs, title in SHORT) for name in names if name in runs]
        text += ["", f"{title}:", "", HEAD, *lines] if lines else []
    return "\n".join([*text, "", *claims(runs)])


def table_row(name: str, all_runs: Runs, short: bool) -> str:
    """Format a row; a `short` table uses only the seeds that all its rows have."""
    none = all_runs.get("none", {})
    runs = {seed: x for seed, x in sorted(all_runs[name].items()) if not short or seed < TABLE_6[0].seeds}
    above = [x["mIoU"] - none[seed]["mIoU"] for seed, x in runs.items() if seed in none]
    alike = [lookalikes(x["IoU"]) for x in runs.values() if x["IoU"]]
    tags = [x["tag_mAP"] for x in runs.values() if x["tag_mAP"] is not None]
    row = ROWS.get(name, ROWS["oracle"])
    compared = name != "none" and row.ambiguity == ROWS["none"].ambiguity  # on the same images
    cells = [name, str(len(runs)), mean_error([x["mIoU"] for x in runs.values()])]
    cells += [mean_error(above, "+") if compared else "", mean_error(alike), mean_error(tags)]
    return f"| {' | '.join([*cells, f'{row.paper:g}' if row.paper else ''])} |"


def lookalikes(iou: Sequence[float]) -> float:
    """Return the mean IoU of the classes that share colour and texture with another class."""
    return statistics.fmean(x for name, x in zip(scenes.CLASSES, iou, strict=True) if name in LOOKALIKES)


def mean_error(values: Sequence[float], sign: str = "") -> str:
    """Format mean and, of several values, standard error of fractions in per cent; "" without values."""
    mean = f"{100 * statistics.fmean(values):{sign}.1f}" if values else ""
    error = f" ± {100 * statistics.stdev(values) / len(values) ** 0.5:.1f}" if len(values) > 1 else ""
    return mean + error


CLAIMS = (  # the first row's mIoU exceeds the second's by more than so many points
    ("oracle", "none", 10.0),
    ("none", OTHERS, 0.0),
    ("none", "none, random UNet", 0.0),
    ("oracle", "oracle, random UNet", 0.0),
    ("none, 10 times longer", "oracle", -5.0),
)


def claims(runs: Runs) -> list[str]:
    """Check the claims, then list the gain by ground-truth tags, with the controls' gains; points of mIoU."""

    def gaps(more: str, less: str) -> list[float]:
        seeds = sorted(runs.get(more, {}).keys() & runs.get(less, {}).keys())
        return [runs[more][seed]["mIoU"] - runs[less][seed]["mIoU"] for seed in seeds]

    lines = []
    for more, less, least in CLAIMS:
        if gap := gaps(more, less):
            verdict = "holds" if 100 * statistics.fmean(gap) > least else "FAILS"
            lines.append(f"- {more} - {less} > {least:g}: {verdict}, {mean_error(gap, '+')}")
    for kind in ("", ", random UNet", ", frozen UNet", ", frozen random UNet", ", nothing alike"):
        if gap := gaps(f"oracle{kind}", f"none{kind}"):
            lines.append(f"- gain by ground-truth tags{kind}: {mean_error(gap, '+')}")
    return lines
