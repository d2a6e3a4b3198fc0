"""Every relative link of the documents leads to a file, every `#section` to a heading, every test file they
name exists.
"""

import re
import shlex
from pathlib import Path

import pytest

import tag
from run.options import parse

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "PAPER.md", "BENCH.md", "weights/tiny/README.md"]
PAGES += [f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\((?P<target>[^)\s]+)\)")
TEST_FILE = re.compile(r"\btests/test_[\w*]+\.py\b")


def prose(page: Path) -> str:
    """The page without its blocks of code, in which brackets are not links."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def sections(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page: lower case, no punctuation, hyphens."""
    titles = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_leads_to_a_file_or_section(page):
    file = ROOT / page
    links = [x for x in LINK.findall(prose(file)) if not re.match(r"https?:|mailto:", x)]
    broken = []
    for link in links:
        path, _, section = link.partition("#")
        target = file.parent / path if path else file
        in_page = target.suffix == ".md" and section
        if not target.exists() or in_page and section not in sections(target):
            broken.append(link)
    assert not broken, f"{page} has links to what does not exist: {broken}"
    assert links


@pytest.mark.parametrize("page", PAGES)
def test_every_test_file_named_exists(page):
    missing = [
        x for x in TEST_FILE.findall((ROOT / page).read_text(encoding="utf-8")) if not list(ROOT.glob(x))
    ]
    assert not missing, f"{page} names test files that do not exist: {missing}"


def test_commands_of_tag_py_parse():
    """In every document: the flags are those of today."""
    texts = [(ROOT / page).read_text(encoding="utf-8") for page in PAGES]
    commands = [x for text in texts for x in re.findall(r"python tag\.py ([^`#\n]+)", text)]
    assert len(commands) >= 5
    for command in commands:
        tag.parse(shlex.split(command))


def test_rows_of_paper_md_are_commands_that_do_not_share_a_folder(tmp_path, monkeypatch):
    """Each parses; two have one default run folder only if they are the same run."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "PAPER.md").read_text(encoding="utf-8")
    commands = re.findall(r"`(?:torchrun[^`]*?|python) train\.py ?([^`]*)`", text)
    assert len(commands) > 20
    options = {}
    for command in commands:
        for name in re.findall(r"\S+\.jsonl", command):
            (tmp_path / name).touch()
        run = parse(shlex.split(command))
        assert options.setdefault(run.run, run) == run, f"{command} has the folder of another run, {run.run}"
