"""errors.py: one sentence and an exit code for whatever a user can cure, a traceback for everything else; two
lines for a wrong flag.
"""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import errors
from errors import DataError, Parser, RunError, run_command


def fail(error: BaseException):
    def work() -> int:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (DataError("x.png is empty: remove it"), 2, "eval.py: x.png is empty: remove it\n"),
        (FileNotFoundError(2, "No such file", "x"), 2, "eval.py: [Errno 2] No such file: 'x'\n"),
        (KeyboardInterrupt(), 130, "interrupted: nothing was written\n"),
        (
            torch.OutOfMemoryError("CUDA out of memory"),
            2,
            "eval.py: CUDA out of memory: take smaller images, or --device cpu\n",
        ),
    ],
)
def test_becomes_a_sentence_and_a_code(error, code, message, capsys):
    assert run_command("eval.py", fail(error), "interrupted: nothing was written") == code
    assert capsys.readouterr().err == message


def test_returns_the_codes_of_the_work():
    assert [run_command("x", lambda code=code: code) for code in (0, 1, 143)] == [0, 1, 143]


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_command("x", lambda: 1 // 0)


def test_shared_errors_are_printed_once(monkeypatch, capsys):
    """Rank 1 prints only errors that rank 0 may not have."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(errors, "PATIENCE", 0)
    assert run_command("train.py", fail(RunError("shared")), on_all_ranks=RunError) == 2
    assert run_command("train.py", fail(DataError("own")), on_all_ranks=RunError) == 2
    assert capsys.readouterr().err == "train.py: own\n"


LATE = """
import os, sys, time
from errors import DataError, Parser, run_command

def work():
    raise DataError("one sentence")

time.sleep(1 if os.environ["RANK"] == "0" else 0)
Parser("x").parse_args() if sys.argv[1:] else sys.exit(run_command("x", work))
"""


@pytest.mark.parametrize("flags", [[], ["--szie"]])
def test_a_late_rank_0_still_says_it(flags, tmp_path):
    """torchrun ends all processes when one has ended."""
    (tmp_path / "late.py").write_text(LATE)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *torchrun, str(tmp_path / "late.py"), *flags]
    environment = os.environ | {"PYTHONPATH": str(Path(errors.__file__).parent)}
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stderr
    assert said.count("x: unknown flag --szie" if flags else "x: one sentence") == 1


def test_a_text_that_the_terminal_cannot_show_is_escaped(monkeypatch):
    """A file name in Latin-1 ends no command with a UnicodeEncodeError."""
    stream = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(stream, "ascii"))
    assert run_command("x", lambda: print("caf\udce9 \u65e5", flush=True) or 0) == 0
    assert stream.getvalue() == b"caf\\udce9 \\u65e5\n"


# ---- the flags


@pytest.fixture
def parser() -> Parser:
    parser = Parser("paint.py", {"--epochs": "give --steps", "sky": "mix one of your own"})
    parser.add_argument("words", nargs="*", metavar="WORD")
    parser.add_argument("--size", nargs="+", type=int)
    parser.add_argument("--sky", choices=["blue", "grey"])
    parser.add_argument("--part", nargs="+", choices=["left", "right"])
    parser.add_argument("--steps", type=int)
    return parser


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("--szie 3", "unknown flag --szie: did you mean --size?"),
        ("--epochs=3", "unknown flag --epochs: give --steps"),
        ("--frames 3", "unknown flag --frames: leave it out"),
        ("a --step 3", "unknown flag --step: did you mean --steps?"),
        ("-x", "unknown flag -x: leave it out"),
        ("--sky blu", "argument --sky: 'blu' is none of blue, grey: did you mean blue?"),
        ("--sky pink", "argument --sky: 'pink' is none of blue, grey: mix one of your own"),
        ("--part top", "argument --part: 'top' is none of left, right: choose one"),
        ("--size sheep", "argument --size: invalid int value: 'sheep'"),
        ("--size 1 2.5", "argument --size: invalid int value: '2.5'"),
    ],
)
def test_a_wrong_flag_is_two_lines_and_code_2(line, sentence, parser, capsys):
    """A flag has no abbreviations: one that is added later would change what they mean."""
    with pytest.raises(SystemExit) as end:
        parser.parse_args(line.split())
    assert end.value.code == 2
    usage = "usage: paint.py WORD [flags]; paint.py --help lists them"
    assert capsys.readouterr().err == f"{usage}\npaint.py: {sentence}\n"


def test_a_wrong_flag_is_printed_once(parser, monkeypatch, capsys):
    """torchrun gives all its processes the same flags."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(errors, "PATIENCE", 0)
    with pytest.raises(SystemExit):
        parser.parse_args(["--szie", "3"])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("line", "words", "size", "part"),
    [
        ("--size 128 sheep", ["sheep"], [128], None),
        ("--size 128 256 sheep cow", ["sheep", "cow"], [128, 256], None),
        ("sheep --size 128 256 cow --steps 3 hen", ["sheep", "cow", "hen"], [128, 256], None),
        ("--part left right sheep --size -1 2", ["sheep"], [-1, 2], ["left", "right"]),
        ("--part left sheep right", ["sheep", "right"], None, ["left"]),
        ("--size=128 256", ["256"], [128], None),
        ("--size 128 -- --size 3", ["--size", "3"], [128], None),
        ("- --steps 3", ["-"], None, None),
    ],
)
def test_a_flag_of_several_values_leaves_the_words_alone(line, words, size, part, parser):
    """It takes numbers or its choices, wherever it stands; `--` ends the flags."""
    options = parser.parse_args(line.split())
    assert (options.words, options.size, options.part) == (words, size, part)
