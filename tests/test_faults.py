"""What goes wrong around the commands, by kind: outputs that are closed or full, links and folders of others,
files that changed between two commands. Each ends in one sentence and code 2, or ends nothing.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import predict
from assemble import build
from model import TadaConfig
from run.checkpoint import save_model

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A random model of two classes, one with a name that is not ASCII."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("model") / "model.safetensors"
    config = TadaConfig(("Straße", "sea"), model="tiny", crop=(64, 64), box=(64, 64), stride=(43, 43))
    save_model(build(config), file, {}, {})
    return str(file)


@pytest.fixture
def photos(tmp_path) -> Path:
    """Three images of 64 x 64."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in "abc":
        Image.fromarray(np.full((64, 64, 3), ord(name), np.uint8)).save(folder / f"{name}.png")
    return folder


# ---- stdout and stderr closed, full, narrow


PRINTS = """
import sys, tqdm
from errors import TadaError, run_command

def work():
    for i in tqdm.tqdm(range(2000), disable=False):
        print("Straße", i)
    tqdm.tqdm.write("done")
    print("skipped", file=sys.stderr, flush=True)
    open(sys.argv[1], "w").write("done")
    if sys.argv[2:]:
        raise TadaError("one sentence")
    return 0

sys.exit(run_command("x", work))
"""


@pytest.mark.parametrize("code", [0, 2])
@pytest.mark.parametrize(
    "where", [">/dev/full", ">&-", "2>&-", "2>/dev/full", ">&- 2>&-", "| head -1", "2>&1 | head -1", "| cat"]
)
def test_no_output_ends_a_command(where, code, tmp_path):
    """The work is done, and the exit code is its own."""
    line = f"PYTHONIOENCODING=ascii {sys.executable} -c '{PRINTS}' {tmp_path}/done {'fail' * (code > 0)} "
    command = ["bash", "-c", f"{line} {where}; exit ${{PIPESTATUS[0]}}"]
    ended = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert ended.returncode == code and (tmp_path / "done").read_text() == "done"
    assert "Traceback" not in ended.stderr and "Exception ignored" not in ended.stderr
    if where == "| cat":
        assert ended.stdout.startswith("Stra\\xdfe 0\n") and ended.stdout.endswith("done\n")


def test_a_closed_pipe_stops_no_image(model, photos, tmp_path, monkeypatch):
    """As `predict.py RUN DIR | head -1` leaves it."""
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert predict.main([model, str(photos), "--out", str(tmp_path / "out"), "--tags", "classes"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").glob("?.png")) == ["a.png", "b.png", "c.png"]
