"""errors.py: one sentence and an exit code for whatever a user can cure, a traceback for everything else."""

import pytest

from errors import DataError, RunError, run_command


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
    assert run_command("train.py", fail(RunError("shared")), on_all_ranks=RunError) == 2
    assert run_command("train.py", fail(DataError("own")), on_all_ranks=RunError) == 2
    assert capsys.readouterr().err == "train.py: own\n"
