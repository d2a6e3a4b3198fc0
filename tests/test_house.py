"""The layout of the project: which files there are, on which floor each stands, and how long they are.

A file may import files of its own floor or below; the imports are read from the source with `ast`.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("unet.py", "vae.py", "clip.py", "adapter.py", "decoders.py", "mask2former.py")
READING = ("model.py", "assemble.py", "inference.py", *PARTS)
TAGGER = "ram.py"  # an image tagger beside the model
COMMANDS = ("data.py", "train.py", "eval.py", "predict.py", "tag.py", "page.py")
SHELVES = ("images", "kernels", "lab", "loading", "metrics", "run", "weights")
LONG = ("mask2former.py", "images/scenes.py")  # may have more lines than other files, as kernels may

# From the ground up. A name that ends in "/" stands for all files of that shelf not named elsewhere.
FLOORS = (
    ("errors.py", "run/ranks.py", "run/files.py"),
    ("kernels/reference.py",),
    ("kernels/",),
    ("weights/load.py", "weights/ram.py", "weights/fetch.py", TAGGER, *PARTS),
    ("weights/words.py",),
    ("model.py",),
    ("assemble.py",),
    ("inference.py",),
    ("images/",),
    ("data.py",),
    ("loading/",),
    ("metrics/",),
    ("run/",),
    ("eval.py",),
    ("train.py", "predict.py", "tag.py"),
    ("page.py",),
    ("lab/",),
)


def sources() -> dict[str, str]:
    """Path -> text of every source file outside tests."""
    files = [*ROOT.glob("*.py"), *(path for shelf in SHELVES for path in (ROOT / shelf).rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in sorted(files)}


SOURCES = sources()


def floor(file: str) -> int:
    """The floor of a file: that of its own name, else that of its shelf."""
    for name in (file, f"{Path(file).parts[0]}/"):
        for number, names in enumerate(FLOORS):
            if name in names:
                return number
    raise AssertionError(f"{file} has no floor: add it to FLOORS")


def local_file(module: str) -> str | None:
    """The file of a module of ours, None for a library."""
    path = module.replace(".", "/")
    return next((name for name in (f"{path}.py", f"{path}/__init__.py") if name in SOURCES), None)


def imports(file: str) -> set[str]:
    """The files of ours that `file` imports, at its top or inside a function."""
    modules = set()
    for node in ast.walk(ast.parse(SOURCES[file])):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = list(Path(file).parent.parts) if node.level else []  # of a relative import
            module = ".".join([*parents, *([node.module] if node.module else [])])
            names = {f"{module}.{alias.name}" for alias in node.names}
            submodules = {name for name in names if local_file(name)}
            modules |= submodules if len(submodules) == len(names) else submodules | {module}
    return {found for module in modules if (found := local_file(module))} - {file}


IMPORTS = {file: imports(file) for file in SOURCES}


def lines(file: str) -> int:
    return len(SOURCES[file].splitlines())


def test_the_root_holds_the_reading_and_the_commands():
    assert {path.name for path in ROOT.glob("*.py")} == {*READING, *COMMANDS, TAGGER, "errors.py"}


def test_every_shelf_is_a_package_with_an_empty_init():
    """But kernels, whose __init__ chooses between the implementations; tests is flat and no package."""
    for shelf in SHELVES:
        if shelf != "kernels":
            assert SOURCES.get(f"{shelf}/__init__.py") == "", f"{shelf}/__init__.py is missing or not empty"
    assert not [*(ROOT / "tests").rglob("__init__.py")]


def test_every_folder_with_source_is_a_shelf():
    """A new folder needs a floor here."""
    found = {path.parent.name for path in ROOT.glob("*/*.py") if not path.parent.name.startswith(".")}
    assert found - {"tests", "runs"} == {*SHELVES}


@pytest.mark.parametrize("file", SOURCES)
def test_no_import_runs_upwards(file):
    upwards = {other for other in IMPORTS[file] if floor(other) > floor(file)}
    assert not upwards, f"{file} stands on floor {floor(file)} and imports {sorted(upwards)} above it"


def test_no_circle_of_imports():
    left = dict(IMPORTS)
    while ready := [file for file, needed in left.items() if not needed & left.keys()]:
        for file in ready:
            del left[file]
    assert not left, f"these files import each other in a circle, or depend on one: {sorted(left)}"


@pytest.mark.parametrize("file", READING)
def test_the_reading_imports_only_itself_errors_kernels_and_weights(file):
    shelves = ("kernels/", "weights/")
    others = {
        x for x in IMPORTS[file] if x not in (*READING, TAGGER, "errors.py") and not x.startswith(shelves)
    }
    assert not others


def test_nothing_outside_lab_imports_lab():
    for file, needed in IMPORTS.items():
        if not file.startswith("lab/"):
            assert not [other for other in needed if other.startswith("lab/")], file


@pytest.mark.parametrize(
    ("file", "forbidden"),
    [
        ("errors.py", (*SOURCES,)),
        ("eval.py", ("run/recipes.py", "train.py")),
        ("run/folder.py", ("data.py", "images/")),
        ("model.py", ("weights/words.py",)),  # `forward` writes no file
        ("weights/fetch.py", (*READING,)),
        ("images/", (*READING,)),
        ("metrics/", ("model.py", "assemble.py", "inference.py")),
        ("predict.py", ("tag.py", "train.py")),  # word sources lie below the commands
    ],
)
def test_what_a_file_must_not_import(file, forbidden):
    for name, needed in IMPORTS.items():
        if name == file or (file.endswith("/") and name.startswith(file)):
            assert not [x for x in needed if x.startswith(forbidden)], name


def test_no_file_is_too_long():
    limited = [file for file in SOURCES if file not in LONG and not file.startswith("kernels/")]
    assert {file: lines(file) for file in limited if lines(file) > 450} == {}


def test_the_reading_takes_an_afternoon():
    assert sum(map(lines, READING)) <= 3070


def test_the_source_stays_small():
    """The benches, which prove numbers in BENCH.md, are counted apart."""
    benches = [file for file in SOURCES if file.startswith("lab/bench")]
    assert sum(lines(file) for file in SOURCES if file not in benches) <= 15253  # lower it with every cut
    assert sum(map(lines, benches)) <= 2212
