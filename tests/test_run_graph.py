"""run/graph.py and run/step.py: a step that a CUDA graph can hold, and what surrounds the graph."""

import weakref
from functools import partial

import pytest
import torch
from test_run_masters import SCENES, WORDS, adamw, copied, start  # noqa: F401 (a fixture)
from test_train import HERE
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from assemble import build, move
from errors import RunError
from loading.augment import Augment
from loading.stream import Batch, TrainStream
from loading.tags import TagSource
from model import Tada, TadaConfig
from run.graph import Recorded
from run.masters import Masters
from run.step import Inputs, inputs_of, train_step, update

pytestmark = pytest.mark.usefixtures("one_thread")
RATES = [2.0**-n for n in (10, 11, 9, 10, 8, 12, 10, 9)]  # exact in float32


class Replayed(Recorded):
    """On a CPU: a graph is a call with the inputs and learning rates at the addresses that were recorded."""

    def warm_up(self, inputs: list[Inputs], flags: Tensor) -> dict[str, Tensor]:
        return self.update(inputs, flags)

    def capture(self, inputs: list[Inputs], flags: Tensor) -> dict[str, Tensor]:
        numbers, groups = {}, self.optimizer.param_groups
        assert [group["lr"] for group in groups] == self.rates and all(x["capturable"] for x in groups)

        def replay() -> None:
            for group, rate in zip(groups, self.rates, strict=True):
                group["lr"] = float(rate)
            numbers.update(self.update(inputs, flags))

        self.replay = replay
        return numbers


def batches(n: int, size: tuple[int, int] = (64, 128)) -> list[Batch]:
    """Batches of two images; the numbers of words differ, between images and between batches."""
    stream = TrainStream(SCENES, Augment(size, 128, 512), batch=2, seed=0).batches()
    found = [next(stream) for _ in range(n)]
    stream.close()
    return [x._replace(image=x.image.clone(), labels=x.labels.clone()) for x in found]


def results(tada: Tada, kind: type[Recorded] | None, steps: list[list[Batch]], device: str = "cpu") -> list:
    """What each step returns, with the rates above; without a `kind` the update is run as it is."""
    ranks = HERE._replace(device=torch.device(device))
    masters, optimizer = Masters(tada), adamw(tada)
    work = partial(update, masters, tada, optimizer, ranks, 1.0, masters)
    how = {
        "words": WORDS,
        "ranks": ranks,
        "masters": masters,
        "recorded": kind(work, optimizer) if kind else work,
    }
    found = []
    for rate, step in zip(RATES, steps, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = rate
        found.append(train_step(masters, tada, optimizer, step, **how))
    return found


@pytest.mark.parametrize("accumulate", [1, 2])
def test_replayed_steps_are_those_without_a_graph(start, accumulate):  # noqa: F811
    """Every input, flag and learning rate reaches the place that the graph reads."""
    made = batches(8 * accumulate)
    assert len({len(x.present[0]) for x in made}) > 1
    made[-1] = made[-1]._replace(skipped=["a.jpg", "b.jpg"])
    steps = [made[i : i + accumulate] for i in range(0, len(made), accumulate)]
    plain, replayed = results(copied(start), None, steps), results(copied(start), Replayed, steps)
    assert replayed == plain
    assert plain[-1]["replaced"] == 2 and len({x["loss"] for x in plain}) == 8


class OnlyDevice(TorchDispatchMode):
    """Refuses operations that read a tensor's values, or make a tensor of the CPU's."""

    READS = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "_unique2",
        "is_nonzero",
        "equal",
        "lift_fresh",
    )

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        mask = name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1])
        drawn = kwargs.get("generator") is not None
        assert not (name in self.READS or mask or drawn), f"{name} needs the CPU"
        return function(*args, **kwargs)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"condition": "tags"}, {"condition": "classes", "decoder": "upernet", "attention_maps": True}]
    + [{"condition": "implicit", "dropout": 0.1}],
)
def test_an_update_needs_nothing_of_the_cpu(options, checkpointed, monkeypatch):
    """From the second on: images, labels and words are on the device before."""
    options = {"model": "tiny", "weights": "weights/tiny", "tags": "oracle", **options}
    tada = build(TadaConfig(tuple(SCENES.classes), prompts=tuple(SCENES.prompts), **options)).train()
    first, second = batches(2)
    tada.unet.checkpoint_activations = checkpointed
    masters, optimizer = Masters(tada), adamw(tada)
    how = (masters, tada, optimizer, HERE, 1.0, masters)
    for batch, mode in ((first, torch.no_grad), (second, OnlyDevice)):
        inputs = [inputs_of(tada, batch, WORDS, HERE.device, seed=0, fixed=True)]
        flags = torch.zeros(2)
        monkeypatch.setattr(torch, "get_rng_state", None)  # a capture refuses a GPU's
        with mode(), torch.enable_grad():
            numbers = update(*how, inputs, flags)
    assert all(x.isfinite() for x in numbers.values())
    with pytest.raises(AssertionError, match="_local_scalar_dense needs the CPU"), OnlyDevice():
        numbers["seg"].item()


class Reads(TorchDispatchMode):
    """The storages that operations make, and weakly those that they read and did not make."""

    def __init__(self):
        super().__init__()
        self.made, self.read = {}, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for storage in storages((args, kwargs)):
            if id(storage) not in self.made:
                self.read[id(storage)] = function, weakref.ref(storage)
        result = function(*args, **(kwargs or {}))
        self.made |= {id(x): x for x in storages(result) if id(x) not in self.read}
        return result


def storages(values: object) -> list[torch.UntypedStorage]:
    return [x.untyped_storage() for x in tree_leaves(values) if isinstance(x, Tensor)]


def test_what_a_graph_reads_is_not_freed(start):  # noqa: F811
    """It would read what is there next. A validation comes between: another size, another word."""
    tada = copied(start)
    masters, optimizer = Masters(tada), adamw(tada)
    flags = torch.zeros(2)
    for batch in batches(2):
        inputs = [inputs_of(tada, batch, WORDS, HERE.device, seed=0, fixed=True)]
        with Reads() as reads:
            update(masters, tada, optimizer, HERE, 1.0, masters, inputs, flags)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        tada.eval()(torch.zeros(1, 3, 64, 64), [["a word of its own"]])
    reads.made.clear()
    assert len(reads.read) > 1000
    assert [function for function, storage in reads.read.values() if storage() is None] == []


def test_other_shapes_than_recorded_are_refused(start):  # noqa: F811
    """An image of another size, and words where there were none: one sentence, nothing is changed."""
    steps = [[x] for x in [*batches(4), *batches(1, size=(128, 64))]]
    sentence = (
        r"--cuda-graph recorded image 0 of the shape \(2, 3, 64, 128\), and step 5 has \(2, 3, 128, 64\)"
    )
    tada = copied(start)
    with pytest.raises(RunError, match=f"{sentence}: give all batches one shape, or leave"):
        results(tada, Replayed, steps)
    graph = Replayed(lambda inputs, flags: {"loss": flags.sum()}, adamw(tada))
    x = Inputs(torch.zeros(1, 3, 4, 8), torch.zeros(1, 4, 8), None, None, [])
    for _ in range(4):
        graph([x], torch.zeros(2))
    text = tada.text([["sea"]])
    with pytest.raises(RunError, match=r"vectors 0 of the shape None, and step 5 has \(1, 1, 128\)"):
        graph([x._replace(text=text)], torch.zeros(2))


def test_words_have_one_length_in_all_steps(start):  # noqa: F811
    """The longest list of all images; the padding is masked, so that nothing changes."""
    tada = copied(start).eval()
    words = TagSource("file", SCENES.prompts, {"a": ["sea"], "b": ["sea", "sky", "sand"], "c": []})
    assert (
        words.longest == 3 and WORDS.longest == len(SCENES.prompts) and TagSource("clip", ["x"]).longest == 1
    )
    image = torch.rand(2, 3, 64, 128) * 2 - 1
    tags = [words("a", []), words("c", [])]
    text = tada.text(tags, words.longest)
    assert text.vectors.shape == (2, 3, 128) and text.lengths.tolist() == [1, 1]
    with torch.no_grad():
        padded, plain = (tada(image, x).condition.context for x in (text, tags))
    assert (padded - plain).norm() <= 1e-5 * plain.norm()


@pytest.mark.parametrize(
    ("flags", "world", "gpu", "fault"),
    [
        ([], "1", False, "no GPU is used here"),
        (["--device", "cpu"], "1", True, "no GPU is used here"),
        ([], "2", True, "it is for one process"),
        (["--decoder", "mask2former"], "1", True, "mask2former matches segments on the CPU"),
    ],
)
def test_where_there_can_be_no_graph_the_flag_is_refused(flags, world, gpu, fault, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(SystemExit, match="2"):
        train.parse(["--dataset", "scenes", "--cuda-graph", *flags])
    assert f"--cuda-graph: {fault}; leave it out" in capsys.readouterr().err


# ---- on a GPU


@pytest.mark.gpu
def test_a_graph_makes_the_steps_of_plain_launches_on_a_gpu(start):  # noqa: F811
    steps = [[x] for x in batches(8)]
    models = [move(copied(start), "cuda", "oracle", training=True) for _ in range(2)]
    plain, replayed = (
        results(x, kind, steps, "cuda") for x, kind in zip(models, (None, Recorded), strict=True)
    )
    for one, other in zip(plain, replayed, strict=True):
        assert one == pytest.approx(other, rel=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("flags", [[], ["--cuda-graph"], ["--compile"], ["--lora", "4"], ["--freeze-unet"]])
def test_train_py_on_a_gpu(flags, tmp_path):
    """Six steps of the tiny model, while a thread pins memory, and a validation after every second one."""
    run = ["--run", str(tmp_path / "run"), "--batch", "2", "--workers", "2", *flags]
    run += ["--weights", "weights/tiny", "--crop", "64", "--save-every", "6", "--eval-every", "2"]
    assert train.main([*run, "--iterations", "6"]) == 0
    assert train.main([*run, "--iterations", "6", "--check"]) == 0
