"""What every test shares: the interpreter for kernels, the thread count, the reference data, a panoptic
data set.
"""

import importlib.metadata
import os
from pathlib import Path

import pytest
import torch

DATA = (
    Path(__file__).parents[2] / "shared" / "data"
)  # real photographs, tables and golden numbers, beside the project


def pytest_configure(config: pytest.Config) -> None:
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


@pytest.fixture(scope="session")
def data() -> Path:
    """The reference data. A clone that lacks it skips, saying so; continuous integration fails."""
    if not DATA.is_dir():
        message = f"the reference data is not at {DATA}"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    return DATA


@pytest.fixture(scope="session")
def segments(tmp_path_factory) -> Path:
    """Eight pictures of 4:3 with their segments, in the form of COCO panoptic, and three to validate."""
    from images.panoptic import annotation, write_annotations, write_ids
    from panoptic_data import PanopticScenes

    root = tmp_path_factory.mktemp("segments")
    for split, indices in (("train", range(8)), ("val", range(3))):
        drawn, images, entries = PanopticScenes(split), [], []
        (root / split).mkdir()
        for i in indices:
            picture, ids, found = drawn.panoptic(i)
            ids = ids[:96]
            found = [segment for segment in found if (ids == segment.id).any()]
            picture.crop((0, 0, 128, 96)).save(root / split / f"{i}.png")
            write_ids(ids, root / "annotations" / f"panoptic_{split}" / f"{i}.png")
            images.append({"id": i, "file_name": f"{i}.png", "height": 96, "width": 128})
            entries.append(annotation(i, f"{i}.png", ids, found, drawn.categories.ids))
        write_annotations(root / "annotations" / f"panoptic_{split}.json", drawn.categories, images, entries)
    return root
