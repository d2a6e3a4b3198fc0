"""Shared by all tests: the interpreter for kernels, seed, threads, reference data, a panoptic data set."""

import importlib.metadata
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

ROOT = Path(__file__).parents[1]
FETCHED = ROOT / "weights" / "sd15" / "tokenizer"  # where `python -m weights.fetch` puts CLIP's vocabulary
MISSING = pytest.StashKey[set[str]]()  # names of the reference data for which a test was skipped


def pytest_configure(config: pytest.Config) -> None:
    hypothesis.settings.register_profile("same", derandomize=True, deadline=None, max_examples=50)
    hypothesis.settings.load_profile("same")  # the examples of every run, on any machine
    config.stash[MISSING] = set()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # children of a job in the background ignore it
    # A killed compilation leaves half a library in torch's shared cache; later runs end in an ImportError.
    cache = tempfile.TemporaryDirectory(prefix="tada-inductor-")
    config.add_cleanup(cache.cleanup)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache.name
    selected = config.option.markexpr
    if "gpu" not in selected or "not gpu" in selected:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported; kernels then run on the CPU
    installed = {distribution.name for distribution in importlib.metadata.distributions()}
    if "kernels" in installed:
        pytest.exit(
            "The package `kernels` is installed; the oracles would take our kernels/ for it: uninstall it",
            2,
        )


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """Restore the number of threads after each test: a command's --threads sets it for the whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Compute on one thread in the whole module: the rounding of a sum depends on the number of threads.

    For tests that compare bits, or a curve in which rounding grows, with those of a process of one thread.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- reference data: photographs, official tables and golden numbers that the repository does not hold


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if missing := sorted(config.stash[MISSING]):
        cure = "set TADA_TEST_DATA to the folder that holds them"
        if "clip_bpe" in missing:
            cure += "; `python -m weights.fetch` brings CLIP's vocabulary"
        names = ", ".join(missing)
        terminalreporter.write_line(f"tests skipped for lack of reference data ({names}): {cure}")


def reference(config: pytest.Config, name: str) -> Path:
    """Return folder `name` of the reference data: below TADA_TEST_DATA, else ../shared/data.

    Skip the test if it is in neither; fail under continuous integration.
    """
    folders = [ROOT.parent / "shared" / "data"]
    if chosen := os.environ.get("TADA_TEST_DATA"):
        folders.insert(0, Path(chosen))
    for folder in folders:
        if (folder / name).is_dir():
            return folder / name
    config.stash[MISSING].add(name)
    message = f"the reference data {name} is in none of {', '.join(map(str, folders))}"
    pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)


@pytest.fixture(scope="session")
def clip_vocabulary(pytestconfig: pytest.Config) -> Path:
    """The folder with vocab.json and merges.txt of CLIP: the fetched one, else that of the reference data."""
    if all((FETCHED / name).is_file() for name in ("vocab.json", "merges.txt")):
        return FETCHED
    return reference(pytestconfig, "clip_bpe")


@pytest.fixture(scope="session")
def clip_bpe(pytestconfig: pytest.Config) -> Path:
    """Token ids of OpenAI's own tokenizer (golden_tokens_openai.json), made with the official vocabulary."""
    return reference(pytestconfig, "clip_bpe")


@pytest.fixture(scope="session")
def clip_class_embeddings(pytestconfig: pytest.Config) -> Path:
    """CLIP's text vectors of the class names of ADE20K."""
    return reference(pytestconfig, "clip_class_embeddings")


@pytest.fixture(scope="session")
def ade20k_samples(pytestconfig: pytest.Config) -> Path:
    """Three validation images with labels, the official tables, one pair of a full and a challenge label."""
    return reference(pytestconfig, "ade20k_samples")


@pytest.fixture(scope="session")
def camvid(pytestconfig: pytest.Config) -> Path:
    """CamVid as a `folder` data set."""
    return reference(pytestconfig, "camvid")


@pytest.fixture(scope="session")
def coco_stuff(pytestconfig: pytest.Config) -> Path:
    """COCO-Stuff's table of labels and example label maps."""
    return reference(pytestconfig, "coco_stuff")


@pytest.fixture(scope="session")
def panopticapi_samples(pytestconfig: pytest.Config) -> Path:
    """Two images of COCO panoptic with their segments, and the PQ that panopticapi computes."""
    return reference(pytestconfig, "panopticapi_samples")


@pytest.fixture(scope="session")
def ram(pytestconfig: pytest.Config) -> Path:
    """RAM's photographs, of which one has 14 megapixels."""
    return reference(pytestconfig, "ram")


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Eight images of 4:3 with labels, some of them mostly ignored."""
    from PIL import Image

    from images import scenes

    root = tmp_path_factory.mktemp("folder")
    for split, indices in (("train", range(8)), ("val", range(8, 11))):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for i in indices:
            scene = scenes.draw(i)
            labels = scene.labels[:96].copy()
            labels[: 12 * (i % 8)] = 255
            Image.fromarray(scene.image[:96]).save(root / "images" / split / f"{i}.png")
            Image.fromarray(labels).save(root / "labels" / split / f"{i}.png")
    (root / "classes.txt").write_text("\n".join(scenes.CLASSES))
    return root


@pytest.fixture(scope="session")
def uninterrupted(folder, tmp_path_factory) -> Path:
    """A run of six small steps in one go, on one thread."""
    from small_runs import command

    import train

    run, before = tmp_path_factory.mktemp("runs") / "uninterrupted", torch.get_num_threads()
    assert train.main(command(folder, run)) == 0
    torch.set_num_threads(before)
    return run


@pytest.fixture(scope="session")
def segments(tmp_path_factory) -> Path:
    """Eight training and three validation images of 4:3 with their segments, in COCO panoptic's format."""
    from data import open_dataset
    from images.panoptic import annotation, write_annotations, write_ids

    root = tmp_path_factory.mktemp("segments")
    for split, indices in (("train", range(8)), ("val", range(3))):
        drawn, images, entries = open_dataset("scenes", "", split), [], []
        (root / split).mkdir()
        for i in indices:
            image, _, ids, segments = drawn.load(i)
            ids = ids[:96]
            segments = [segment for segment in segments if (ids == segment.id).any()]
            image.crop((0, 0, 128, 96)).save(root / split / f"{i}.png")
            write_ids(ids, root / "annotations" / f"panoptic_{split}" / f"{i}.png")
            images.append({"id": i, "file_name": f"{i}.png", "height": 96, "width": 128})
            entries.append(annotation(i, f"{i}.png", ids, segments, drawn.categories.ids))
        write_annotations(root / "annotations" / f"panoptic_{split}.json", drawn.categories, images, entries)
    return root
