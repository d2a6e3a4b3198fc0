"""bench_gpu.py without a GPU: every part at small sizes, kernels in the interpreter, timed by the CPU."""

import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
from test_lab_bench_kernels import SMALL, cpu_clock
from test_lab_bench_step import UNET, WORK
from test_run_graph import Replayed
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels
from lab import bench, bench_gpu, bench_kernels
from lab.bench_goals import GOALS, LIMIT, judged, line, pairs, summary, won_by
from lab.bench_gpu import PARTS, Plan, suite


def plainly(forward):
    """In place of a CUDA graph."""
    return forward


class Soon(Replayed):
    """Recorded by the second call."""

    WARM_UP = 1


WHOLE = {"encoder": "VAE encoder", "unet": "UNet", "train": "training step", "inference": "inference"}
PLAN = Plan(
    {name: (function, 0.1) for name, (function, _) in PARTS.items()},
    sizes=replace(SMALL, levels=((20, 8),), convolutions=((8, 8, 8, 4), (2, 8, 8, 4))),
    clock=cpu_clock,
    call_clock=cpu_clock,
    work=replace(WORK, half=True, context=UNET.context_width),
    batches=(1,),
    predicted=(2, 1),
    choices=("torch",),
    turns=(1, 1),
    options={"backend": "eager"},
    capture=plainly,
    recorded=Soon,
    start="forkserver",
)


def raising(plan: Plan) -> Iterator[dict]:
    yield {"case": "before"}
    raise RuntimeError("illegal access")


def dying(plan: Plan) -> Iterator[dict]:
    yield {"case": "before"}
    os.abort()


def endless(plan: Plan) -> Iterator[dict]:
    yield {"case": "before", "process": os.getpid()}
    time.sleep(600)


def wrong(plan: Plan) -> Iterator[dict]:
    yield {"case": "wrong", "error": 1.0, "plain": 0.1, "right": False}


def fine(plan: Plan) -> Iterator[dict]:
    yield {"case": "fine"}


@pytest.fixture(scope="module", autouse=True)
def server():
    """One import of torch and of the peers for all parts; Python 3.11 ignores sys.path there."""
    multiprocessing.set_forkserver_preload([__name__])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        forkserver.ensure_running()


@pytest.fixture(autouse=True)
def by_default():
    """The choice of kernels is of the whole process."""
    yield
    kernels.use("auto")


def read(file: Path) -> dict[str, dict]:
    return json.loads(file.read_text())["parts"]


def test_every_part_runs_and_is_right(tmp_path, capfd):
    """All that a GPU will run but the sizes, the clocks and bfloat16 in the kernels."""
    assert list(PARTS) == list(bench.PARTS)
    (tmp_path / "test_small.py").write_text("def test_small():\n    pass\n")
    tests = ("-q", "--noconftest", "-p", "no:cacheprovider", str(tmp_path / "test_small.py"))
    assert suite(replace(PLAN, tests=tests), 9, out=tmp_path / "gpu.json") == 0
    output, parts = capfd.readouterr().out, read(tmp_path / "gpu.json")
    assert {name: part["verdict"] for name, part in parts.items()} == dict.fromkeys(PARTS, "done")
    assert "1 passed" in parts["tests"]["rows"][0]["note"]
    cases = {name: [row["case"] for row in part["rows"]] for name, part in parts.items()}
    assert cases["unknowns"] == [
        "rates",
        "convolution B 8 8 -> 8 4x4",
        "convolution B 2 8 -> 8 4x4",
        "self-attention B 2 N 20 M 20 d 8",
        "cross-attention B 2 N 20 M 5 d 8",
        "wide attention B 1 N 20 d 24",
    ]
    assert cases["kernels"] == [
        "upsampling + cross-entropy B 1 K 5 3 -> 12",
        "wide attention B 1 N 20 d 24",
        "keys and values B 2 M 5, 16 layers",
        "keys and values B 1 M 5, 16 layers",
        "cross-attention block B 2 N 20 M 5 C 16",
        "GroupNorm + SiLU UNet B 2 C 16 4x4",
        "GroupNorm + SiLU VAE B 1 C 16 8x8",
        "GroupNorm of a sum UNet B 2 C 16 4x4",
        "cross-attention B 2 N 20 M 5 d 8",
    ]
    for part, name in WHOLE.items():
        graph = [f"{name} by CUDA graph B 1"] * (part in ("train", "inference"))
        assert cases[part] == [*[f"{name} B 2"] * (part == "inference"), f"{name} B 1", *graph]
        assert all(row["peers"].keys() >= {"channels-last"} for row in parts[part]["rows"])
    assert cases["compiled"] == ["VAE encoder B 1", "UNet B 1", "training step B 1"]
    assert all(row["peers"].keys() == {"compiled"} for row in parts["compiled"]["rows"])
    for part in (*WHOLE, "compiled"):
        for row in parts[part]["rows"]:
            assert row["right"] and row["error"] > 1e-4 and row["failed"] == {}  # bfloat16
            assert row["ours"].keys() == {"torch"}
            assert all(x > 0 for times in (row["ours"] | row["peers"]).values() for x in times)
    assert "rehearsal on a CPU, torch 2" in output and "FAIL" not in output
    assert all(f"| {case} |" in output for names in cases.values() for case in names)


def test_a_part_that_fails_or_hangs_does_not_harm_the_others(capfd, monkeypatch):
    """What a part measured before its end is kept, and written at once."""
    saved = []
    monkeypatch.setattr(bench_gpu, "replace_text", lambda file, text: saved.append(json.loads(text)["parts"]))
    parts = {"raises": (raising, 20), "dies": (dying, 20), "hangs": (endless, 4), "fine": (fine, 20)}
    plan = replace(PLAN, parts=parts | {"long": (fine, 1000)})  # which leaves the others what they need
    assert suite(plan, 2, out="gpu.json") == 1
    output, parts = capfd.readouterr().out, saved[-1]
    assert saved[0]["raises"] == {"rows": [{"case": "before"}], "verdict": "cut"}
    assert len(saved) == 10 and all(len(x) == 5 for x in saved)  # after each row and each part
    verdicts = {name: part["verdict"] for name, part in parts.items()}
    failed = {"raises": "FAIL, exit code 1", "dies": "FAIL, exit code -6", "hangs": "FAIL, stopped after 4 s"}
    assert verdicts == failed | {"fine": "done", "long": "left out"}
    error = {"case": "error", "note": "RuntimeError: illegal access", "right": False}
    assert parts["raises"]["rows"] == [{"case": "before"}, error]
    assert parts["dies"]["rows"] == [{"case": "before"}]
    assert len(parts["hangs"]["rows"]) == 1
    assert "long: left out; alone: python -m lab.bench --suite gpu --only long" in output


def test_the_minutes_are_kept(capfd):
    """A part that hangs takes no more than is left; the next one is named."""
    start, parts = time.monotonic(), {"hangs": (endless, 2), "late": (fine, 1.5)}
    assert suite(replace(PLAN, parts=parts), 3 / 60) == 1
    assert time.monotonic() - start < 4
    assert "hangs: FAIL, stopped after 2 s" in (output := capfd.readouterr().out)
    assert "late: left out; alone: python -m lab.bench --suite gpu --only late" in output


def test_a_killed_suite_has_written_what_finished(tmp_path):
    """And its part, which would keep a GPU busy, ends with it."""
    out, parts = tmp_path / "gpu.json", {"fine": (fine, 9), "hangs": (endless, 9), "late": (fine, 9)}
    plan = replace(PLAN, parts=parts, start="fork")
    process = multiprocessing.get_context("fork").Process(target=suite, args=(plan, 9), kwargs={"out": out})
    process.start()
    while process.is_alive() and not (out.exists() and read(out)["hangs"]["rows"]):
        time.sleep(0.05)
    process.kill()
    process.join()
    parts = read(out)
    assert parts["fine"] == {"rows": [{"case": "fine"}], "verdict": "done"}
    assert {name: parts[name]["verdict"] for name in ("hangs", "late")} == {
        "hangs": "cut",
        "late": "left out",
    }
    (row,) = parts["hangs"]["rows"]
    assert row["case"] == "before" and ended(row["process"])


def ended(process: int) -> bool:
    """Whether it ends within five seconds; nobody may be there to bury it."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_a_wrong_result_fails(tmp_path, capfd):
    assert suite(replace(PLAN, parts={"wrong": (wrong, 0), "fine": (fine, 0)}), 1) == 1
    assert "| wrong | FAIL |" in capfd.readouterr().out


def test_a_wrong_side_has_no_time():
    right, off = torch.ones(3), torch.tensor([1.0, 1.0, 1.1])
    sides = {
        "ours": lambda: lambda x: [off],
        "a": lambda: lambda x: [right],
        "exact": lambda: lambda x: [right],
    }
    plan = replace(PLAN, work=replace(WORK, half=False))
    (row,) = bench_gpu.contest(plan, "case", sides, torch.zeros, (1,))
    assert not row["right"] and not row["ours"] and row["failed"] == {"torch": "error 5.8e-02"}
    assert "| case B 1 | FAIL |" in line(row)
    (row,) = bench_gpu.contest(plan, "case", sides | {"ours": sides["a"]}, torch.zeros, (1,))
    assert row["right"] and row["ours"].keys() == {"torch"} and row["peers"].keys() == {"a"}


def test_a_choice_of_kernels_that_fails_leaves_the_other():
    def choose(inputs):
        if kernels.chosen("cross_attention", torch.ones(1), 40):
            raise RuntimeError("no such kernel")
        return [torch.ones(1)]

    plan, sides = replace(PLAN, choices=("torch", "triton")), {"ours": lambda: choose, "peer": lambda: choose}
    (row,) = bench_gpu.contest(plan, "case", sides, torch.zeros, (1,))
    assert row["failed"] == {"triton": "RuntimeError: no such kernel"} and not row["right"]
    assert row["ours"].keys() == {"torch"} and row["peers"].keys() == {"peer"}


def test_a_side_without_memory_is_named():
    def exhaust(inputs):
        if inputs == 16:
            raise torch.OutOfMemoryError("tried to allocate 1 TiB")
        return [torch.ones(1)]

    sides = {"ours": lambda: lambda x: [torch.ones(1)], "peer": lambda: exhaust}
    large, small = bench_gpu.contest(PLAN, "case", sides, lambda B: B, (16, 2))
    ours = {"ours": sides["peer"], "peer": sides["ours"]}
    failing, fitting = bench_gpu.contest(PLAN, "case", ours, lambda B: B, (16, 2))
    assert not failing["right"] and fitting["right"]
    assert line(failing).startswith("| case B 16 | FAIL |") and "torch: out of memory" in line(failing)
    assert large["failed"] == {"peer": "out of memory"} and large["peers"] == {} and large["ours"]["torch"]
    assert "| peer: out of memory" in line(large) and pairs(large) == []
    assert small["failed"] == {} and small["peers"]["peer"]


def test_goals_are_judged_and_the_summary_is_short():
    """With all rows of a GPU the table loses its first lines at most, which stand above and in the file."""

    def row(case: str, ours: list[float], **peers: list[float]) -> dict:
        facts = {"case": case, "floor": [1000.0] * 2, "error": 1e-3, "plain": 1e-3}
        return facts | {"ours": {"triton": ours}, "peers": {"FLASH_ATTENTION": [1e5] * 2} | peers}

    sizes = bench_kernels.Sizes(compiled=False)
    cross = [x.name for x in bench_kernels.attention_cases(sizes)]
    ours = [row(case, [60.0, 40.0], CUDNN_ATTENTION=[100.0, 100.0]) for case in cross]
    for case in bench_kernels.norm_cases(sizes):
        ours.append(row(case.name, [30.0, 20.0], eager=[100.0] * 2, compiled=[40.0, 15.0]))
    unknown = [
        row(x, [100.0] * 2, CUDNN_ATTENTION=[90.0] * 2) for x in ["self-attention B 16 N 4096 M", *cross]
    ]
    parts = {"unknowns": {"rows": unknown, "verdict": "done"}}
    parts |= {"kernels": {"rows": ours, "verdict": "stopped after 99 s"}}
    text = summary({"machine": "x" * 150, "parts": parts})
    for goal in (
        "| G1 | cross-attention B 16, forward | 720 | 1,200 | 0.60, the worst of 12 0.60 | 0.80 | reached |",
        "| G2 | cross-attention B 2, backward | 480 | 1,200 | 0.40, the worst of 12 0.40 | 0.40 | reached |",
        "| G4 | GroupNorm + SiLU against eager | 600 | 2,400 | 0.25, the worst of 12 0.25 | 0.40 | reached |",
        "| G4 | GroupNorm + SiLU against compiled | 600 | 660 | 0.91, the worst of 12 0.91 | 0.90 | missed |",
        "| G7 | self-attention B 16 N 4096 against cudnn | 200 | 180 | 1.11, the worst of 1 1.11 | 1.05 |",
        "| G9 | UNet B 16 | | | | 0.70 | not measured |",
    ):
        assert goal in text[-4000:]
    assert "kernels: stopped after 99 s; alone: python -m lab.bench --suite gpu --only kernels" in text
    assert len(text) == LIMIT


def test_wins_are_the_sizes_that_never_lost():
    """A row without a time lost; one without a kernel does not count."""
    times = [(40, 1), (40, 2), (80, 1), (80, 3), (160, None)]
    rows = [{"case": "", "key": ("kernel", d), "peers": {"torch": [2.5]}} for d, _ in times]
    rows = [row | {"ours": {"triton": [us]} if us else {}} for row, (_, us) in zip(rows, times, strict=True)]
    rows += [{"case": "", "key": None}, {"case": ""}]
    assert won_by({"parts": {"kernels": {"rows": rows}}}) == {"kernel": [40]}


def test_a_case_that_fails_leaves_the_others():
    """And a size at which a kernel failed has not won."""

    def measured(case):
        if case.name == "a":
            raise torch.OutOfMemoryError("tried to allocate 1 TiB")
        return {"case": case.name, "key": case.key, "ours": {"triton": [1.0]}, "peers": {"torch": [2.0]}}

    case = bench_kernels.Case("a", None, None, None, {}, ("kernel", 1), (0.0, 0.0))
    cases = [case, replace(case, name="b", key=("kernel", 2)), replace(case, name="c")]
    rows = list(bench_gpu.each(cases, measured))
    assert line(rows[0]).startswith("| a | FAIL |") and "out of memory" in line(rows[0])
    assert won_by({"parts": {"kernels": {"rows": rows}}}) == {"kernel": [2]}


class OfTheHost(TorchDispatchMode):
    """Refuse what a CUDA graph cannot capture: reads of values, and copies from the CPU to the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero"), name
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.dim()]
        result = func(*args, **kwargs or {})
        made = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        assert not (any(x.is_cpu for x in given) and any(x.is_meta for x in made)), name
        return result


def test_a_graph_reads_nothing_of_the_host(monkeypatch):
    """On meta tensors, which have no values."""

    def refusing(forward):
        def run(*inputs):
            with OfTheHost():
                captured.append(forward(*inputs))
            raise KeyError("captured")  # the labels need values

        return run

    captured, work = [], replace(WORK, device="meta", context=UNET.context_width)
    monkeypatch.setattr(torch, "autocast", lambda *_, auto=torch.autocast, **how: auto("cpu", enabled=False))
    monkeypatch.setattr(bench_gpu, "contest", lambda plan, name, sides, *rest: iter([(name, sides["ours"])]))
    plan = replace(PLAN, work=work, capture=refusing)
    (_, _), (name, build) = bench_gpu.predict(plan)
    with pytest.raises(KeyError, match="captured"):
        build()(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    assert name == "inference by CUDA graph" and captured[0].prediction.main.device.type == "meta"


@pytest.mark.parametrize(
    ("ours", "verdict"), [([1, 10], "reached"), ([1, 106], "missed"), ([90, 90], "missed")]
)
def test_a_goal_needs_the_mean_and_every_row(ours, verdict):
    """G1: the geometric mean at most 0.80, and no row above 1.05, however fast the others are."""
    rows = [
        {"case": f"cross-attention B 16 N {us}", "ours": {"auto": [us]}, "peers": {"x": [100]}} for us in ours
    ]
    facts = {"parts": {"kernels": {"rows": rows}}}
    assert judged(facts, GOALS[0]).endswith(f"| 0.80 | {verdict} |")
