"""What every test shares: the interpreter for kernels, the thread count, the reference data, the error
measure.
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
