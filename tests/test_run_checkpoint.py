"""run/checkpoint.py: a model is loaded as it was saved; a crash at any moment leaves only intact
checkpoints.
"""

import errno
import hashlib
import json
import math
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracle import tiny_folder
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import inference
from assemble import SCALE_FILE, build, parameter_groups
from errors import CheckpointError
from model import Tada, TadaConfig
from run import checkpoint
from run.checkpoint import (
    clean,
    corruption_of,
    find_model,
    frozen_digests,
    newest_step,
    point,
    read_about,
    read_config,
    read_model,
    read_step,
    restore_training,
    save_model,
    steps,
    training_state,
    write_step,
)
from run.ranks import Ranks
from run.tagging import cache_vectors

CONDITIONS = ("none", "caption", "classes", "implicit", "tagging", "oracle")
QUICK = ("none", "classes", "tagging")  # the similar ones are in the slow tests
NAMES = ("sea", "snow", "tall tree", "boat", "cloud")
TAGS = [["boat"], ["tall tree", "cloud", "sea"]]


def config(**options) -> TadaConfig:
    sizes = {"crop": (128, 128), "box": (128, 512), "stride": (85, 85)}
    colours = tuple((i, 2 * i, 255 - i) for i in range(len(NAMES)))
    return TadaConfig(
        **{"classes": NAMES, "model": "tiny", "dataset": "scenes", "palette": colours, **sizes, **options}
    )


def make(**options) -> Tada:
    """A tiny model as after training: every trained parameter differs from its initial value."""
    tada = build(config(**options))
    with torch.no_grad():
        for parameter in tada.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return tada.eval()


@torch.no_grad()
def predictions(tada: Tada) -> list[Tensor]:
    """Logits of two images with tags, and labels of two without, where the condition needs none."""
    image = torch.rand(2, 3, 40, 60, generator=torch.Generator().manual_seed(1)) * 2 - 1
    steers = tada.config.condition in ("caption", "oracle")
    labels = inference.predict(tada, image, TAGS if steers else None, window=(64, 40), stride=(64, 20)).labels
    return [tada(image, TAGS).prediction.main, labels]


def equal(actual: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))


# The file of a trained model


@pytest.mark.parametrize(
    "condition",
    [pytest.param(x, marks=() if x in QUICK else pytest.mark.slow) for x in CONDITIONS],
)
def test_saved_and_loaded_is_the_same(condition, tmp_path):
    """Bit-equal predictions, the same settings, the same parameters trained."""
    decoder = "upernet" if condition in ("none", "oracle") else "fpn"
    tada = make(condition=condition, decoder=decoder, tags="clip" if condition == "tagging" else "classes")
    save_model(tada, tmp_path / "model.safetensors", {}, {"mIoU": 0.5})
    torch.manual_seed(9)
    before = torch.get_rng_state()
    loaded = read_model(tmp_path / "model.safetensors")
    assert torch.equal(torch.get_rng_state(), before)
    assert equal(predictions(loaded), predictions(tada))
    assert loaded.config == tada.config and isinstance(loaded.config.palette[0], tuple)
    assert not loaded.training
    assert {name: p.requires_grad for name, p in loaded.named_parameters()} == {
        name: p.requires_grad for name, p in tada.named_parameters()
    }
    if condition == "tagging":
        image = torch.rand(1, 3, 50, 60)
        assert loaded.zero_shot_tags(image) == tada.zero_shot_tags(image)


@pytest.mark.parametrize("decoder", ["fpn", "mask2former"])
def test_loading_does_not_import_the_compiler(decoder, tmp_path):
    """As normal numbers and products on meta would: 892 modules, 1.4 s."""
    file = tmp_path / "model.safetensors"
    save_model(build(config(condition="tagging", decoder=decoder, things=(True,) * 5)), file, {}, {})
    code = f"import sys; from run.checkpoint import read_model; read_model({str(file)!r});"
    command = [sys.executable, "-c", code + "sys.exit('torch._dynamo' in sys.modules)"]
    assert subprocess.run(command, check=False, cwd=Path(__file__).parents[1]).returncode == 0


def test_equal_models_make_equal_files(tmp_path):
    """Byte by byte, wherever and whenever they are written; the metadata is one key of sorted JSON."""
    files = []
    for run in ("a", "another run"):
        torch.manual_seed(3)
        file = tmp_path / run / "model.safetensors"
        file.parent.mkdir()
        save_model(make(), file, {"vae/x": "0" * 64}, {"pixel_accuracy": 0.75, "mIoU": 0.25})
        files.append(file)
    assert files[0].read_bytes() == files[1].read_bytes()
    with safe_open(files[0], "pt") as f:
        metadata = f.metadata()
    assert list(metadata) == ["tada"]
    about = json.loads(metadata["tada"])
    assert metadata["tada"] == json.dumps(about, sort_keys=True)
    assert about == read_about(files[0]) and sorted(about) == ["config", "format", "frozen", "metrics"]
    assert about["config"]["classes"] == list(NAMES) and about["metrics"]["mIoU"] == 0.25
    assert str(tmp_path) not in metadata["tada"]


def test_random_weights_are_saved_with_the_model(tmp_path):
    """No other file has them: the model's own holds every tensor."""
    tada = make()
    assert frozen_digests(tada.config) == {}
    save_model(tada, tmp_path / "model.safetensors", {}, {})
    state = load_file(tmp_path / "model.safetensors")
    assert state.keys() == tada.state_dict().keys()
    assert {name.split(".")[0] for name in state} == {"vae", "unet", "clip", "adapter", "decoder"}
    read_model(tmp_path / "model.safetensors", weights="elsewhere")  # which is not read


# Weights from a folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A folder of `tiny` weights in the official layout."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    tiny_folder(folder)
    return folder


@pytest.fixture
def weights(tiny, tmp_path) -> Path:
    """The same files, to be changed."""
    return shutil.copytree(tiny, tmp_path / "weights", ignore=shutil.ignore_patterns(".vectors"))


VAE, UNET = ("vae/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.safetensors")
FROZEN = (VAE, SCALE_FILE, "clip/model.safetensors", "tokenizer/vocab.json", "tokenizer/merges.txt")


@pytest.mark.parametrize("freeze_unet", [False, True])
def test_frozen_parts_stay_in_their_files(weights, freeze_unet, tmp_path):
    """The model's file lists their hashes; the UNet is one of them if it was not trained."""
    tada = make(weights=str(weights), freeze_unet=freeze_unet, adapter_start="empty")
    frozen = frozen_digests(tada.config)
    assert set(frozen) == {*FROZEN, UNET} if freeze_unet else set(frozen) == set(FROZEN)
    for name, sha256 in frozen.items():
        assert sha256 == hashlib.sha256((weights / name).read_bytes()).hexdigest()
    save_model(tada, tmp_path / "model.safetensors", frozen, {})
    state = load_file(tmp_path / "model.safetensors")
    parts = {"adapter", "decoder"} if freeze_unet else {"unet", "adapter", "decoder"}
    assert {name.split(".")[0] for name in state} == parts
    assert "adapter.empty" in state and "adapter.classes" in state
    if not freeze_unet:
        shutil.rmtree(weights / "unet")
    loaded = read_model(tmp_path / "model.safetensors")
    assert loaded.state_dict().keys() == tada.state_dict().keys()
    assert equal([*loaded.state_dict().values()], [*tada.state_dict().values()])


@pytest.fixture
def trained(weights, tmp_path) -> tuple[Path, list[Tensor]]:
    """The file of a model whose UNet stayed frozen, and its predictions."""
    tada = make(weights=str(weights), freeze_unet=True)
    file = tmp_path / "model.safetensors"
    save_model(tada, file, frozen_digests(tada.config), {})
    return file, predictions(tada)


def test_a_missing_or_changed_file_is_named(trained, weights):
    """Each by its path; `weights.fetch` is no cure, since it has no files of the tiny model."""
    file, _ = trained
    for name in (*FROZEN, UNET):
        refuse_without(weights / name, file)


def refuse_without(frozen: Path, file: Path) -> None:
    """Loading fails if a frozen file is missing or one bit of it is flipped; the file is restored."""
    good = frozen.read_bytes()
    frozen.unlink()
    with pytest.raises(CheckpointError, match=f"^{frozen} is missing: give its folder with --weights$"):
        read_model(file)
    frozen.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    sentence = f"^{frozen} is not the file that {file} was trained with: give its folder with --weights$"
    with pytest.raises(CheckpointError, match=sentence):
        read_model(file)
    frozen.write_bytes(good)


def test_weights_may_have_moved(trained, weights, tmp_path):
    """`weights` is their folder now: the old path is not read, not even for vectors of new words."""
    file, expected = trained
    moved = weights.rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=f"{weights}.* is missing"):
        read_model(file)
    loaded = read_model(file, weights=str(moved))
    assert equal(predictions(loaded), expected)
    cache_vectors(loaded, ["owl"])
    assert list((moved / ".vectors").iterdir())
    assert loaded.config.weights == str(moved) and not weights.exists()
    (moved / UNET).write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"{moved / UNET} is not the file"):
        read_model(file, weights=str(moved))


def test_the_file_that_was_hashed_is_the_one_loaded(weights, tmp_path):
    """Not another in the same folder, though `load` prefers that."""
    fp16 = weights / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    (weights / UNET).rename(fp16)
    tada = make(weights=str(weights), freeze_unet=True)
    save_model(tada, tmp_path / "model.safetensors", frozen_digests(tada.config), {})
    other = {name: torch.zeros_like(x) for name, x in load_file(fp16).items()}
    save_file(other, weights / UNET)
    assert equal(predictions(read_model(tmp_path / "model.safetensors")), predictions(tada))


# Files that are not a model


def rewritten(file: Path, change: Callable[[dict], object], tensors: dict | None = None) -> Path:
    """A copy with changed metadata, and other tensors if given."""
    about = read_about(file)
    change(about)
    new = file.with_name("changed.safetensors")
    save_file(tensors or load_file(file), new, metadata={"tada": json.dumps(about)})
    return new


class Bomb:
    """A pickle that writes a file when it is opened."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory) -> Path:
    """A small file: only the decoder is trained."""
    file = tmp_path_factory.mktemp("saved") / "model.safetensors"
    tada = build(config(condition="none", weights=str(tiny), freeze_unet=True))
    save_model(tada, file, frozen_digests(tada.config), {})
    return file


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_model(path)
    sentence = str(caught.value)
    assert str(path) in sentence and "\n" not in sentence and ": " in sentence
    return sentence


def test_foreign_files_are_refused(tmp_path):
    """In one sentence with the file and the cure; a pickle is never opened."""
    file = tmp_path / "model.safetensors"
    assert "holds no model.safetensors: give a run folder" in refusal(tmp_path)
    assert "holds no model.safetensors" in refusal(tmp_path / "nowhere")
    file.write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    assert "is not a whole safetensors file" in refusal(file)
    assert not (tmp_path / "exploded").exists()
    torch.save({"state": torch.zeros(3)}, file)
    assert "is not a whole safetensors file" in refusal(file)
    for content in (b"", b"version https://git-lfs.github.com/spec/v1\n", b"<html>", b"\0" * 100):
        file.write_bytes(content)
        assert "is not a whole safetensors file" in refusal(file)
    save_file({"x": torch.zeros(3)}, file)
    assert "was not written by train.py: give a run folder" in refusal(file)
    save_file({"x": torch.zeros(3)}, file, metadata={"format": "pt"})
    assert "was not written by train.py" in refusal(file)
    for name in (
        "vae/../../other.safetensors",
        "/vae/other.safetensors",
        "text_encoder/model.safetensors",
        "",
    ):  # of the prior's files
        save_model(make(), file, {name: "0" * 64}, {})
        assert "was not written by train.py" in refusal(file)


@pytest.mark.parametrize("bytes_kept", [4, 100, -1])
def test_truncated_files_are_refused(saved, tmp_path, bytes_kept):
    file = tmp_path / "model.safetensors"
    file.write_bytes(saved.read_bytes()[:bytes_kept])
    assert "is not a whole safetensors file" in refusal(file)


def test_files_of_other_versions_are_refused(saved):
    """A newer format, unknown settings, tensors that do not fit the settings."""
    newer = rewritten(saved, lambda about: about.update(format=2))
    assert "has format 2, not 1: use a newer TADA" in refusal(newer)
    unknown = rewritten(saved, lambda about: about["config"].update(depth=3, attention="flash"))
    assert "has unknown settings attention, depth: use a newer TADA" in refusal(unknown)
    state = load_file(saved)
    extra = state | {"adapter.gate": torch.zeros(2)}
    assert "does not fit the model it describes: adapter.gate" in refusal(
        rewritten(saved, lambda about: None, extra)
    )
    name = "decoder.classifier.1.bias"
    lacking = {key: x for key, x in state.items() if key != name}
    assert f"does not fit the model it describes: {name}" in refusal(
        rewritten(saved, lambda about: None, lacking)
    )
    for dtype in (torch.int8, torch.float8_e4m3fn, torch.float64, torch.complex64):
        cast = rewritten(saved, lambda about: None, state | {name: state[name].to(dtype)})
        assert f"does not fit the model it describes: {name}" in refusal(cast)
    for value in (math.nan, math.inf):
        poisoned = rewritten(saved, lambda about: None, state | {name: torch.full_like(state[name], value)})
        assert f"has NaN or infinity in {name}: use another step" in refusal(poisoned)
    other = rewritten(saved, lambda about: about["config"].update(classes=["sea"], prompts=["sea"]))
    assert f"does not fit the model it describes: {name}" in refusal(other).replace(
        "decoder.classifier.1.weight, ", ""
    )
    missing = rewritten(
        saved, lambda about: about["config"].pop("blocks")
    )  # of an older version: the default
    assert read_model(missing).config.blocks == 2


# The folder of a step. What is written is small here: `write_step` asks for no more of a model.


class Small(nn.Module):
    """Settings and a state."""

    def __init__(self, value: float):
        super().__init__()
        self.config = config()
        self.x = nn.Parameter(torch.full((300,), float(value)))


def write(run: Path, step: int) -> Path:
    run.mkdir(exist_ok=True)
    tensors = {"rng/0/cpu": torch.full((50,), step % 256, dtype=torch.uint8), "step": torch.tensor(step)}
    return write_step(run, step, Small(step), {}, {"mIoU": step / 100}, tensors, {"step": step})


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_step_folder(tmp_path):
    """Four files, the last with the hashes of the others; no path or time of the run."""
    first, second = write(tmp_path / "a", 7), write(tmp_path / "b", 7)
    assert first == tmp_path / "a" / "step-000007"
    sums = json.loads((first / "sha256.json").read_text())
    assert {*sums, "sha256.json"} == set(content(first))
    for name in ("model.safetensors", "train.safetensors", "train.json"):
        assert sums[name] == hashlib.sha256((first / name).read_bytes()).hexdigest()
    assert content(first) == content(second)
    assert json.loads((first / "train.json").read_text()) == {"step": 7}
    assert read_about(first / "model.safetensors")["metrics"] == {"mIoU": 0.07}
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["last", "step-000007"]


def test_links_are_relative(tmp_path):
    """A run folder may be moved or copied."""
    run = tmp_path / "run"
    write(run, 1), write(run, 2)
    point(run, "best", "step-000001")
    point(run, "best", "step-000002")
    point(run, "best", "step-000001")
    assert os.readlink(run / "last") == "step-000002" and os.readlink(run / "best") == "step-000001"
    moved = run.rename(tmp_path / "moved")
    assert (moved / "last").resolve() == moved / "step-000002"
    assert (moved / "best" / "model.safetensors").is_file()


def test_which_file_a_path_means(tmp_path):
    """A run folder means its best step, or the last until there is one; other paths mean themselves."""
    run, name = tmp_path / "run", "model.safetensors"
    write(run, 1), write(run, 2)
    assert find_model(run) == run / "last" / name
    point(run, "best", "step-000001")
    assert find_model(run) == run / "best" / name
    for path in (run / "last", run / "best", run / "step-000001"):
        assert find_model(path) == path / name == find_model(path / name)
    other = shutil.copy(run / "last" / name, tmp_path / "mine.safetensors")
    assert find_model(other) == other


def test_two_newest_and_the_best_stay(tmp_path):
    """Sorted as numbers, not as text; copies under other names are left alone."""
    for step in (999_998, 999_999):
        write(tmp_path, step)
    point(tmp_path, "best", "step-999998")
    (tmp_path / "step-000001.bak").mkdir()
    (tmp_path / "step-by-step").mkdir()
    for step in (1_000_000, 1_000_001):
        write(tmp_path, step)
    names = ["step-999998", "step-1000000", "step-1000001"]
    assert [path.name for path in steps(tmp_path)] == names
    assert {path.name for path in tmp_path.iterdir()} == {
        *names,
        "last",
        "best",
        "step-000001.bak",
        "step-by-step",
    }
    assert newest_step(tmp_path) == (tmp_path / "step-1000001", [])


def test_a_step_is_restored_in_place(tmp_path):
    """The optimiser keeps its parameters; the state of training is restored as it was written."""
    tada, torch_state = make(), torch.get_rng_state()
    optimizer = torch.optim.AdamW(parameter_groups(tada, 1e-3, 0.01))
    own = {name: p.data_ptr() for name, p in tada.named_parameters()}
    state = {name: x.clone() for name, x in tada.state_dict().items()}
    tensors, facts = {"rng/0/cpu": torch_state, "step": torch.tensor(3.5)}, {"step": 5, "best": {"mIoU": 0.1}}
    folder = write_step(tmp_path, 5, tada, {}, {}, tensors, facts)
    with torch.no_grad():
        for parameter in tada.parameters():
            parameter.zero_()
    read_tensors, read_facts = read_step(folder, tada)
    assert all(torch.equal(x, state[name]) for name, x in tada.state_dict().items())
    assert {name: p.data_ptr() for name, p in tada.named_parameters()} == own
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} <= set(
        map(id, tada.parameters())
    )
    assert read_tensors.keys() == tensors.keys() and read_facts == facts
    assert all(torch.equal(read_tensors[name], x) for name, x in tensors.items())
    assert all(read_tensors[name].dtype == x.dtype for name, x in tensors.items())
    with pytest.raises(CheckpointError, match="does not fit the model it describes"):
        read_step(folder, build(config(condition="none")))


DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
NAMED = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
SHAPES = st.lists(st.integers(0, 4), max_size=3)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def tensors(draw, contiguous: bool = False) -> Tensor:
    """Of any dtype, shape and bits, empty ones too; those that are not contiguous are every second entry."""
    shape, dtype = draw(SHAPES), draw(st.sampled_from(DTYPES))
    r = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    size = 2 * math.prod(shape) * torch.empty((), dtype=dtype).element_size()
    values = torch.randint(0, 2 if dtype == torch.bool else 256, (size,), dtype=torch.uint8, generator=r)
    x = values.view(dtype).reshape(*shape, 2)[..., 0]
    return x.clone(memory_format=torch.contiguous_format) if contiguous else x


class Any:
    """A model of any state, as `save_model` and `read_own_state` see one."""

    def __init__(self, state: dict[str, Tensor], settings: TadaConfig):
        self.state, self.config = state, settings

    def state_dict(self) -> dict[str, Tensor]:
        return self.state

    def load_state_dict(self, state: dict[str, Tensor], strict: bool) -> None:
        self.state = state


def same(x: Tensor, y: Tensor) -> bool:
    """To the last bit, NaN too."""
    plain = [z.detach().clone(memory_format=torch.contiguous_format).flatten() for z in (x, y)]
    return x.dtype == y.dtype and x.shape == y.shape and torch.equal(*(z.view(torch.uint8) for z in plain))


@given(
    st.dictionaries(NAMED, tensors(), min_size=1, max_size=5),
    st.dictionaries(NAMED, tensors(contiguous=True), min_size=1, max_size=5),
    st.dictionaries(st.text(max_size=9), JSON, max_size=4),
    st.dictionaries(st.text(max_size=9), st.floats(allow_nan=False), max_size=3),
    st.lists(st.text(min_size=1, max_size=9), min_size=1, max_size=4, unique=True),
)
@settings(max_examples=50)
def test_what_is_saved_is_read(state, more, facts, metrics, names):
    """Any names, dtypes, shapes and bits of both files, any JSON, any names of classes."""
    assume("__metadata__" not in {*state, *more})  # safetensors' own
    settings_of = config(classes=tuple(names), palette=(), tag_threshold=metrics.get("", None))
    model = Any(state, settings_of)
    with tempfile.TemporaryDirectory() as folder:
        step = write_step(Path(folder), 3, model, {"vae/x": "00"}, metrics, more, facts)
        assert newest_step(Path(folder)) == (step, [])
        about = read_about(step / "model.safetensors")
        other = Any({name: torch.empty_like(x) for name, x in state.items()}, settings_of)
        read_tensors, read_facts = read_step(step, other)
    assert read_config(about["config"], step) == settings_of
    assert about["metrics"] == metrics and about["frozen"] == {"vae/x": "00"}
    assert other.state.keys() == state.keys() and all(same(x, other.state[name]) for name, x in state.items())
    assert read_tensors.keys() == more.keys() and read_facts == facts
    assert all(same(x, read_tensors[name]) for name, x in more.items())


@given(st.lists(SHAPES, min_size=1, max_size=4), st.integers(0, 3), st.integers(0, 99))
@settings(max_examples=30)
def test_an_optimizer_and_its_random_numbers_are_restored(shapes, steps, seed):
    """Parameters of any shape, after any number of steps: the next one is the same to the last bit."""
    ranks = Ranks(0, 1, torch.device("cpu"))

    def made(values: list[Tensor]) -> torch.optim.AdamW:
        parameters = [nn.Parameter(x.clone()) for x in values]
        halves = [slice(0, 1), slice(1, None)]
        return torch.optim.AdamW(
            [{"params": parameters[x], "names": names[x], "lr": 0.1} for x in halves if names[x]]
        )

    def step(optimizer: torch.optim.AdamW) -> list[Tensor]:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for p in parameters:
            p.grad = torch.randn_like(p)
        optimizer.step()
        return [p.detach() for p in parameters]

    names = [f"part.{i}.weight" for i in range(len(shapes))]
    torch.manual_seed(seed)
    first, values = made([torch.randn(shape) for shape in shapes]), []
    for _ in range(steps + 1):
        values = step(first)
    with tempfile.TemporaryDirectory() as folder:
        folder = write_step(Path(folder), 1, Small(1), {}, {}, training_state(first, ranks), {})
        second = made(values)
        expected = step(first)
        saved, _ = read_step(folder, Small(0))
    torch.manual_seed(seed + 1)
    assert restore_training(saved, second, ranks)
    assert all(same(x, y) for x, y in zip(step(second), expected, strict=True))


# Faults


class Crash(BaseException):
    """The process is killed: nothing catches it."""


CALLS = (
    "replace",
    "fsync",
    "open",
    "mkdir",
    "symlink",
    "unlink",
    "rmdir",
)  # of os; pathlib's and shutil's too


def crash_at(n: int, before: bool, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Crash before or after the n-th change of the file system; a list that will hold the calls."""
    calls = []

    def watch(name: str, call: Callable) -> Callable:
        def watched(*arguments, **options):
            calls.append(name)
            here = len(calls) == n
            if here and before:
                if name == "save_file":
                    Path(arguments[1]).write_bytes(b"half of it")
                raise Crash
            try:
                return call(*arguments, **options)
            finally:
                if here:
                    raise Crash

        return watched

    for name in CALLS:
        monkeypatch.setattr(os, name, watch(name, getattr(os, name)))
    monkeypatch.setattr(checkpoint, "save_file", watch("save_file", save_file))
    monkeypatch.setattr(Path, "write_text", watch("write_text", Path.write_text))
    return calls


def intact(run: Path) -> Path:
    """The newest step; asserts that every step under its own name and both links are intact."""
    folder, refused = newest_step(run)
    assert not refused
    assert all(corruption_of(path) is None for path in steps(run))
    for name in ("last", "best"):
        if (run / name).is_symlink():
            assert corruption_of(run / name) is None
    return folder


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("number", [1, 4])
def test_a_crash_at_any_moment_leaves_intact_steps(number, before, tmp_path, monkeypatch):
    """While the first step is written, and while one is written that removes an older one."""
    n = 0
    while True:
        n += 1
        run = tmp_path / f"{n}"
        run.mkdir()
        for step in range(1, number):
            write(run, step)
            point(run, "best", "step-000001")
        with monkeypatch.context() as patch:
            calls = crash_at(n, before, patch)
            try:
                write(run, number)
                assert len(calls) < n
                break
            except Crash:
                pass
        folder = intact(run)
        kept = folder and folder.name
        assert kept in {f"step-{number:06d}", f"step-{number - 1:06d}" if number > 1 else None}, calls
        names = {path.name for path in run.iterdir()}
        assert number == 1 or {"step-000001", "step-000003", "last", "best"} <= names
        clean(run)
        assert not list(run.glob(".tmp*")) and intact(run) == folder
        write(run, number)  # the next write works
        assert intact(run).name == f"step-{number:06d}" == os.readlink(run / "last")
        assert not list(run.glob(".tmp*"))
    assert n > 20 and {"replace", "fsync", "symlink", "save_file", "write_text"} <= set(calls)
    assert number == 1 or "rmdir" in calls


def test_a_crash_while_a_refused_step_is_written_again(tmp_path, monkeypatch):
    """The corrupt folder may be gone or not; the step before it is kept."""
    for n in range(1, 60):
        run = tmp_path / f"{n}"
        write(run, 1), write(run, 2)
        (run / "step-000002" / "train.json").write_text("{}")
        with monkeypatch.context() as patch:
            crash_at(n, True, patch)
            try:
                write(run, 2)
                break
            except Crash:
                pass
        folder, refused = newest_step(run)
        assert folder is not None and len(refused) <= 1
        clean(run)
        write(run, 2)
        assert intact(run).name == "step-000002"
    assert 20 < n < 59 and intact(run).name == "step-000002"


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_a_crash_while_a_step_is_written_again(before, tmp_path, monkeypatch):
    """As after its evaluation: at any moment the old or the new version of the step is there."""
    for n in range(1, 60):
        run = tmp_path / f"{n}"
        write(run, 1), write(run, 2)
        with monkeypatch.context() as patch:
            crash_at(n, before, patch)
            try:
                write(run, 2)
                break
            except Crash:
                pass
        clean(run)
        assert intact(run).name == "step-000002"
        write(run, 2)
        assert intact(run).name == "step-000002" == os.readlink(run / "last")
        assert {path.name for path in run.iterdir()} == {"step-000001", "step-000002", "last"}
    assert 20 < n < 59


def test_a_full_disk_while_a_step_is_written_again(tmp_path, monkeypatch):
    """Between its old name and its new one."""
    folder, replace, calls = write(tmp_path, 1), os.replace, []

    def refuse_second(*paths) -> None:
        calls.append(paths)
        return disk_full() if len(calls) == 2 else replace(*paths)

    before = content(folder)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse_second)
        with pytest.raises(CheckpointError, match="could not be written"):
            write(tmp_path, 1)
    assert content(folder) == before and not list(tmp_path.glob(".*"))


def test_files_are_synced_before_the_rename(tmp_path, monkeypatch):
    """Power may fail: each file and the folder are synced before the rename, the run folder after each."""
    events = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: events.append(os.fstat(handle).st_ino) or sync(handle))

    def rename(old: Path, new: Path) -> None:
        replace(old, new)
        events.append(Path(new).name)

    monkeypatch.setattr(os, "replace", rename)
    folder = write(tmp_path / "run", 1)
    first = events.index("step-000001")
    assert {folder.stat().st_ino, *(path.stat().st_ino for path in folder.iterdir())} == set(events[:first])
    home = (tmp_path / "run").stat().st_ino
    assert events[first:] == ["step-000001", home, "last", home]


def disk_full(*arguments: object, **options: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "call", ["save_file", "second save_file", "write_text", "replace", "fsync", "symlink"]
)
def test_a_full_disk_leaves_earlier_steps(call, tmp_path, monkeypatch):
    """One sentence, no leftovers, all older steps unchanged."""
    write(tmp_path, 1), write(tmp_path, 2)
    before = {path.name: content(path) for path in steps(tmp_path)}
    with monkeypatch.context() as patch:
        match call:
            case "save_file" | "second save_file":
                left = [1] if call == "second save_file" else []

                def half(tensors: dict, file: Path, **options: object) -> None:
                    if left:
                        left.pop()
                        return save_file(tensors, file, **options)
                    Path(file).write_bytes(b"half of it")
                    return disk_full()

                patch.setattr(checkpoint, "save_file", half)
            case "write_text":
                patch.setattr(Path, "write_text", disk_full)
            case _:
                patch.setattr(os, call, disk_full)
        with pytest.raises(CheckpointError) as caught:
            write(tmp_path, 3)
    sentence = str(caught.value)
    assert str(tmp_path / "step-000003") in sentence and "No space left" in sentence and "\n" not in sentence
    assert {name: content(tmp_path / name) for name in before} == before
    assert corruption_of(tmp_path / "last") is None
    written = {path.name for path in steps(tmp_path)} - set(before)
    assert written == (
        {"step-000003"} if call == "symlink" else set()
    )  # it is complete, only `last` is behind
    assert not list(tmp_path.glob(".tmp*"))
    write(tmp_path, 3)
    assert intact(tmp_path).name == "step-000003"


def test_an_error_of_the_operating_system(tmp_path):
    """Files of at most 1,000 bytes: the library's own error, not an injected one."""
    write(tmp_path, 1)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with pytest.raises(CheckpointError, match=r"step-000002 could not be written \(.*free space"):
            write(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert intact(tmp_path).name == "step-000001" and not list(tmp_path.glob(".tmp*"))


@pytest.mark.parametrize("name", ["model.safetensors", "train.safetensors", "train.json", "sha256.json"])
def test_a_flipped_byte_is_detected(name, tmp_path):
    """Anywhere in any file: the step before is used, and a sentence names the reason."""
    write(tmp_path, 1)
    file = write(tmp_path, 2) / name
    good = file.read_bytes()
    for place in (0, 9, len(good) // 2, len(good) - 2):
        file.write_bytes(good[:place] + bytes([good[place] ^ 0x11]) + good[place + 1 :])
        folder, (sentence,) = newest_step(tmp_path)
        assert folder == tmp_path / "step-000001"
        assert sentence.startswith(f"{tmp_path / 'step-000002'} is skipped: ") and "\n" not in sentence
    file.write_bytes(good)
    assert newest_step(tmp_path) == (tmp_path / "step-000002", [])


@pytest.mark.parametrize("text", ["{}", "[]", "5", "null", '"model.safetensors"', "[" * 2000, "\xe9"])
def test_hashes_of_another_shape_are_refused(tmp_path, text):
    """And hashes of other files."""
    write(tmp_path, 1)
    folder = write(tmp_path, 2)
    file = folder / "sha256.json"
    hashes = json.loads(file.read_text())
    texts = [text, json.dumps({**hashes, "/etc/hostname": "0"}), json.dumps([*hashes])]
    for wrong in (*texts, json.dumps({"model.safetensors": hashes["model.safetensors"]})):
        file.write_text(wrong, encoding="latin-1")
        step, (sentence,) = newest_step(tmp_path)
        assert step == tmp_path / "step-000001" and f"{file} is corrupt" in sentence
        assert f"{file} is corrupt (" in refusal(folder)


def test_a_file_without_hashes(saved, tmp_path):
    """A lone copy is used, with a warning; in a step folder, or under its links, it is refused."""
    lone = shutil.copy(saved, tmp_path / "mine.safetensors")
    with pytest.warns(UserWarning, match=f"{lone} is used unchecked: no sha256.json is beside it"):
        read_model(lone)
    folder = write(tmp_path / "run", 1)
    (folder / "sha256.json").unlink()
    for path in (folder, tmp_path / "run", tmp_path / "run" / "last" / "model.safetensors"):
        assert "lacks the sha256.json of its step folder: use another step" in refusal(path)


def test_the_hash_is_checked_before_the_metadata(tmp_path):
    """A changed file is named as such, wherever the change is."""
    file = write(tmp_path, 1) / "model.safetensors"
    content = file.read_bytes()
    for old, new in ((b'\\"format', b'\\"formas'), (b"{\\", b"[\\"), (b'"tada"', b'"tadb"')):
        assert content.count(old)
        file.write_bytes(content.replace(old, new))
        assert "changed after it was written: use another step" in refusal(file)


@pytest.mark.parametrize(
    "text", ["{", "[]", "5", "[" * 2000, "{}", '{"format": "1"}', '{"format": 1, "config": 5}']
)
def test_metadata_of_another_shape(tmp_path, text):
    """Of a lone file, which has no hash."""
    file = tmp_path / "model.safetensors"
    save_file({"x": torch.zeros(3)}, file, metadata={"tada": text})
    assert "was not written by train.py: give a run folder" in refusal(file)


def test_settings_that_lack(saved):
    """Of a file that someone else wrote."""
    without = rewritten(saved, lambda about: about["config"].pop("classes"))
    assert "has classes None, which is not of type tuple[str, ...]: use another step" in refusal(without)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("classes", []),
        ("crop", [0, 64]),
        ("crop", [10**9, 64]),
        ("stride", [0, 0]),
        ("box", [10**8, 64]),
        ("timestep", 5000),
        ("noise", "a"),
        ("dropout", 5),
    ],
)
def test_settings_that_cannot_be(saved, name, value):
    changed = rewritten(saved, lambda about: about["config"].update({name: value}))
    assert f"has {name} " in refusal(changed) and "which cannot be: use another step" in refusal(changed)


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("classes", 5, "tuple[str, ...]"),
        ("prompts", [["../x"]], "tuple[str, ...]"),
        ("palette", [[1, 2]], "tuple[tuple[int, int, int], ...]"),
        ("weights", 5, "str"),
        ("lora", "x", "int"),
        ("lora", True, "int"),
        ("freeze_unet", None, "bool"),
        ("tag_threshold", "x", "float | None"),
        ("crop", [1e9, 64], "tuple[int, int]"),
        ("box", 5, "tuple[int, int] | None"),
    ],
)
def test_settings_of_another_type(saved, name, value, kind):
    """Each is named, with what it should be, before any part is built."""
    said = refusal(rewritten(saved, lambda about: about["config"].update({name: value})))
    assert f" has {name} {value if type(value) is not list else ''}" in said
    assert said.endswith(f", which is not of type {kind}: use another step")


def test_whole_numbers_are_floats(tmp_path):
    config = checkpoint.read_config({"classes": ["sea"], "dropout": 0, "tag_threshold": 1}, tmp_path)
    assert (config.dropout, config.tag_threshold, config.box) == (0, 1, (512, 2048))


def test_incomplete_steps_are_skipped(tmp_path):
    """A file missing or truncated, an empty folder, invalid hashes: the newest intact step is found, or
    none.
    """
    assert newest_step(tmp_path) == (None, [])
    for step in range(1, 7):
        write(tmp_path, step)
        point(tmp_path, "best", f"step-{step:06d}")
        shutil.copytree(tmp_path / f"step-{step:06d}", tmp_path / f"keep-{step}")
    for step in range(1, 7):
        shutil.rmtree(tmp_path / f"step-{step:06d}", ignore_errors=True)
        (tmp_path / f"keep-{step}").rename(tmp_path / f"step-{step:06d}")
    (tmp_path / "step-000006" / "train.safetensors").unlink()
    file = tmp_path / "step-000005" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    shutil.rmtree(tmp_path / "step-000004")
    (tmp_path / "step-000004").mkdir()
    (tmp_path / "step-000003" / "sha256.json").write_text("[1, 2]")
    folder, refused = newest_step(tmp_path)
    assert folder == tmp_path / "step-000002"
    reasons = (
        "6 .* incomplete .*train.safetensors",
        "5 .* model.safetensors changed",
        "4 .* incomplete",
        "3 .*",
    )
    for sentence, reason in zip(refused, reasons, strict=True):
        assert re.search(f"step-00000{reason}", sentence)
    for step in (1, 2):
        (tmp_path / f"step-{step:06d}" / "train.json").write_text("")
    assert newest_step(tmp_path)[0] is None and len(newest_step(tmp_path)[1]) == 6


def test_clean_removes_only_leftovers(tmp_path):
    write(tmp_path, 1)
    (tmp_path / ".tmp-step-000002").mkdir()
    (tmp_path / ".tmp-step-000002" / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".tmp-last").symlink_to("nowhere")
    (tmp_path / "log.jsonl").write_text("{}")
    clean(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"step-000001", "last", "log.jsonl"}


def test_the_removed_pixel_decoder_setting(tmp_path):
    """Older checkpoints with the deformable pixel decoder load; any other value is refused."""
    config = checkpoint.read_config({"classes": ["sea"], "pixel_decoder": "deformable"}, tmp_path)
    assert config.classes == ("sea",)
    with pytest.raises(CheckpointError, match="has pixel_decoder 'fpn', only 'deformable' is"):
        checkpoint.read_config({"classes": ["sea"], "pixel_decoder": "fpn"}, tmp_path)
