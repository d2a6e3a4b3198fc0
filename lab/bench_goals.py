"""The goals of `python -m lab.bench --suite gpu`, and its tables: a row is a dictionary, as in the JSON file.

The times of a row, "ours" and "peers", are microseconds of each side's passes: forward, or forward and
backward.
"""

import math
import statistics
from collections import defaultdict

LIMIT = 11_900  # characters of the summary: where only the last 12,000 of a log are kept, it is whole
NOISE = 1.05  # the highest ratio of a row, and the goal of one that need not be faster
GOALS = (  # name, part, start of the rows, pass (None: the sum), peer ("": the fastest), the highest ratio
    ("G1", "kernels", "cross-attention B 16", 0, "", 0.80),
    ("G2", "kernels", "cross-attention B 16", 1, "", 0.60),
    ("G2", "kernels", "cross-attention B 2", 1, "", 0.40),
    ("G3", "kernels", "cross-attention block", 0, "eager", 0.60),
    ("G3", "kernels", "cross-attention block", 0, "compiled", 0.85),
    ("G4", "kernels", "GroupNorm + SiLU", 0, "eager", 0.40),
    ("G4", "kernels", "GroupNorm + SiLU", 0, "compiled", 0.90),
    ("G4", "kernels", "GroupNorm + SiLU", None, "eager", 0.40),
    ("G4", "kernels", "GroupNorm + SiLU", None, "compiled", 0.90),
    ("G5", "kernels", "keys and values B 1", 0, "", 0.25),
    ("G5", "kernels", "keys and values B 16", 0, "", 0.60),
    ("G6", "kernels", "upsampling", None, "eager", 0.15),
    ("G7", "unknowns", "self-attention B 16 N 4096", None, "cudnn", NOISE),
    ("G8", "encoder", "VAE encoder B 16", None, "", 0.75),
    ("G8", "compiled", "VAE encoder B 16", None, "", 0.95),
    ("G9", "unet", "UNet B 16", None, "", 0.70),
    ("G9", "compiled", "UNet B 16", None, "", 0.92),
    ("G10", "train", "training step B 16", None, "", 0.65),
    ("G10", "train", "training step B 2", None, "", 0.65),
    ("G10", "train", "training step by CUDA graph B 2", None, "", 0.65),
    ("G10", "compiled", "training step B 16", None, "", 0.90),
    ("G10", "compiled", "training step B 2", None, "", 0.90),
    ("G11", "inference", "inference by CUDA graph B 1", None, "", 0.50),
    ("G11", "inference", "inference B 16", None, "", 0.75),
)
HEAD = "| case | ours us | best peer us | ratio | of the floor | error, peer's | |\n" + "|---" * 7 + "|"
GOALS_HEAD = "| goal | case | ours us | peer us | ratio | at most | |\n" + "|---" * 7 + "|"


def all_rows(facts: dict) -> list[tuple[str, dict]]:
    return [(name, row) for name, part in facts["parts"].items() for row in part["rows"]]


def best(times: dict[str, list[float]]) -> list[tuple[float, str]]:
    """The least time of each pass, and whose it is."""
    named = [[(x, name.removesuffix("_ATTENTION").lower()) for x in y] for name, y in times.items()]
    return [min(x) for x in zip(*named, strict=True)]


def pairs(row: dict, peer: str = "") -> list[tuple[float, float]]:
    """Ours and the fastest peer's time, or those of one name, of each pass and of all; [] without times."""
    peers = {name: x for name, x in row.get("peers", {}).items() if name.lower().startswith(peer)}
    passes = [(x, y) for (x, _), (y, _) in zip(best(row.get("ours", {})), best(peers), strict=False)]
    return [*passes, tuple(map(sum, zip(*passes, strict=True)))] if passes else []


def ratios(row: dict) -> list[float]:
    """Ours / the fastest peer of each pass; [] without times."""
    return [x / y for x, y in pairs(row)[:-1]]


def won_by(facts: dict) -> dict[str, list[int]]:
    """The value of kernels.WINS for this GPU: the sizes at which no row was slower than the fastest peer."""
    rows, sizes = [row for _, row in all_rows(facts) if row.get("key")], defaultdict(list)
    lost = {tuple(row["key"]) for row in rows if not max(ratios(row), default=math.inf) < 1}
    for kernel, size in sorted({tuple(row["key"]) for row in rows} - lost):
        sizes[kernel].append(size)
    return dict(sizes)


def line(row: dict) -> str:
    """A row of the table: forward / backward."""
    ours, peers = (best(row.get(side, {})) for side in ("ours", "peers"))
    cells = [" / ".join(f"{us:,.{int(us < 1e4)}f} {name}" for us, name in x) for x in (ours, peers)]
    cells += [" / ".join(f"{x:.2f}" for x in ratios(row))]
    cells += [" / ".join(f"{x / us:.0%}" for x, (us, _) in zip(row.get("floor", []), ours, strict=False))]
    cells += [f"{row['error']:.1e}, {row['plain']:.1e}" if "error" in row else ""]
    notes = [row["note"]] if "note" in row else []
    notes += [f"{name}: {why}" for name, why in row.get("failed", {}).items()]
    notes += [f"{name} {mib:,.0f} MiB" for name, mib in row.get("MiB", {}).items()]
    if not row.get("right", True):
        cells[0] = f"FAIL {cells[0]}".strip()
    return f"| {' | '.join([row['case'], *cells, '; '.join(notes)])} |"


def judged(facts: dict, goal: tuple) -> str:
    """A line of the table of goals: sums of times, the ratios' geometric mean; no row may exceed NOISE."""
    name, part, start, i, peer, highest = goal
    rows = [row for x, row in all_rows(facts) if x == part and f"{row['case']} ".startswith(start + " ")]
    found = [x[-1 if i is None else i] for x in (pairs(row, peer) for row in rows) if len(x) > (i or 0) + 1]
    way = "" if i is None else (", forward", ", backward")[i]
    text = f"| {name} | {start}{way}{f' against {peer}' if peer else ''} |"
    if not found:
        return f"{text} | | | {highest:.2f} | not measured |"
    (ours, theirs), each = map(sum, zip(*found, strict=True)), [x / y for x, y in found]
    mean, worst = statistics.geometric_mean(each), max(each)
    verdict = "reached" if mean <= highest and worst <= NOISE else "missed"
    most = f"{mean:.2f}, the worst of {len(each)} {worst:.2f}"
    return f"{text} {ours:,.0f} | {theirs:,.0f} | {most} | {highest:.2f} | {verdict} |"


def summary(facts: dict) -> str:
    """The last of the output: all rows, the goals, what is missing."""
    lines = [HEAD, *(line(row) for _, row in all_rows(facts)), "", facts["machine"], ""]
    lines += [f"kernels.WINS of this GPU: {won_by(facts)}", "", GOALS_HEAD]
    lines += [judged(facts, goal) for goal in GOALS]
    lines += ["", "G10 against VPD's code, at most 0.40: no case, that code is not a package."]
    for name, part in facts["parts"].items():
        again = f"; alone: python -m lab.bench --suite gpu --only {name}" if part["verdict"] != "done" else ""
        lines.append(f"{name}: {part['verdict']}{again}")
    return "\n".join(lines)[-LIMIT:]
