"""PAPER.md and README.md point at lines that hold what they say. `python tests/test_paper.py` renews the line
numbers.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ["PAPER.md", "README.md"]
ANCHOR = re.compile(r"\[`(?P<file>[\w/]+\.py):(?P<line>\d+) (?P<name>\w+)`\]\((?P<link>[^)]*)\)")


def definition(file: str, name: str) -> int:
    """The line on which `name` is defined: a function or class first, else a constant or field. 0 if none."""
    lines = (ROOT / file).read_text().splitlines()
    for pattern in (rf"\s*(def|class) {name}\b", rf"\s*{name}\b[^=(]* = "):
        for number, line in enumerate(lines, start=1):
            if re.match(pattern, line):
                return number
    return 0


@pytest.mark.parametrize("page", PAGES)
def test_every_anchor_holds(page):
    text = (ROOT / page).read_text()
    anchors = list(ANCHOR.finditer(text))
    assert len(anchors) == len(re.findall(r"\.py#L", text)), "an anchor is malformed"
    assert anchors or page != "PAPER.md"
    for found in anchors:
        file, line, name, link = found.group("file", "line", "name", "link")
        wanted = definition(file, name)
        assert wanted, f"{page}: {name} is not defined in {file}"
        assert (int(line), link) == (wanted, f"{file}#L{line}"), (
            f"{page}: {name} is on line {wanted} of {file}, not {line}: run `python tests/test_paper.py`"
        )


def test_files_said_to_be_missing_are_missing():
    """ "Not yet" is true."""
    for claim in re.findall(r"not yet \(([^)]*)\)", (ROOT / "PAPER.md").read_text()):
        for file in re.findall(r"`([\w/]+\.py)`", claim):
            assert not (ROOT / file).exists(), f"PAPER.md says not yet of {file}, which is there"


def renew() -> None:
    for page in PAGES:
        text = (ROOT / page).read_text()

        def renumber(found: re.Match) -> str:
            file, name = found.group("file", "name")
            line = definition(file, name)
            return f"[`{file}:{line} {name}`]({file}#L{line})"

        (ROOT / page).write_text(ANCHOR.sub(renumber, text))


if __name__ == "__main__":
    renew()
