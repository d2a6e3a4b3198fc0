"""The errors that a user can cure, and what turns them into one sentence and exit code 2: the wrapper of a
command's work, and the parser of its flags.

Every command ends with `sys.exit(main())`, and its `main` runs its work under `run_command`. Imports nothing
of this project, so that every file may raise and catch these.
"""

import argparse
import difflib
import io
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from typing import Any, NoReturn, TextIO

NUMBER = re.compile(r"-?[\d.]+(e-?\d+)?")
PATIENCE = 2  # seconds for rank 0 to say it: torchrun ends all processes when one has ended


class TadaError(ValueError):
    """What was wrong, the value, and the cure, in one sentence."""


class ModelError(TadaError):
    """A model, or a part of one, that cannot be built or run with these settings."""


class WeightsError(TadaError):
    """A file of weights that cannot be loaded or fetched."""


class DataError(TadaError):
    """A data set, image, label map or tag file that cannot be used."""


class Unreadable(DataError):
    """One file that cannot be decoded; training skips it."""


class CheckpointError(TadaError):
    """A checkpoint that cannot be written or read."""


class RunError(TadaError):
    """A run that cannot start, resume or continue."""


class DataWarning(UserWarning):
    """A sample was skipped; training continues."""


class Output:
    """Standard output or error of a command: what a closed pipe or a full disk does not take is lost."""

    def __init__(self, stream: TextIO | None):
        self.stream = stream or open(os.devnull, "w")  # noqa: SIM115

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str | None = None) -> None:
        try:
            self.stream.flush() if text is None else self.stream.write(text)
        except OSError:  # the rest too goes nowhere, as in Python's "Note on SIGPIPE" (library/signal)
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    flush = write


def run_command(
    name: str,
    work: Callable[[], int | None],
    interrupted: str = "interrupted",
    on_all_ranks: type[Exception] | tuple[type[Exception], ...] = TadaError,
) -> int:
    """Run `work` and return its exit code, 0 if it returns none; 2 after one sentence on stderr for an error
    that a user can cure, 130 after Ctrl-C.

    Errors of `on_all_ranks` are raised by every process of torchrun alike, so only rank 0 prints them; any
    other error is printed by the rank that has it. A name that the terminal cannot show is escaped, and an
    output that is closed or full ends nothing (`Output`).
    """
    main = os.environ.get("RANK", "0") == "0"
    if isinstance(sys.stdout, io.TextIOWrapper):  # not a notebook's
        sys.stdout.reconfigure(errors="backslashreplace")
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # after `end_quietly`
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with redirect_stdout(Output(sys.stdout)), redirect_stderr(Output(sys.stderr)):
        try:
            return work() or 0
        except KeyboardInterrupt:
            if main:
                print(interrupted, file=sys.stderr)
            return 130
        except (TadaError, OSError) as error:
            if main or not isinstance(error, on_all_ranks):
                print(f"{name}: {error}", file=sys.stderr)
            else:
                time.sleep(PATIENCE)
            return 2
        except getattr(sys.modules.get("torch"), "OutOfMemoryError", ()) as error:  # a GPU's
            print(f"{name}: {error}: take smaller images, or --device cpu", file=sys.stderr)
            return 2
        finally:
            sys.stdout.flush()  # at its end Python would report what cannot be written, with code 120


def end_quietly() -> None:
    """Let Ctrl-C end the process at once, without a traceback, until `run_command` handles it.

    A command calls this before its slow imports. A shell reports 130, as of any process that SIGINT ends.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where the shell ignores SIGINT
        signal.signal(signal.SIGINT, signal.SIG_DFL)


class Parser(argparse.ArgumentParser):
    """The flags of a command: an error is one line of usage and one sentence with the nearest flag or value.

    `hints` are what to say of a flag like "--epochs" that does not exist, or of a value that is none of the
    choices of "dataset". A flag is given by its whole name, and may stand before the other arguments.
    """

    def __init__(self, prog: str, hints: Mapping[str, str] | None = None, **settings: Any):
        super().__init__(prog, allow_abbrev=False, **settings)
        self.hints = hints or {}

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        """As argparse's, in any order: `--size 128 "sheep"`, where argparse would take the sheep for a size.

        After its first value, a flag of several values takes only numbers or its choices.
        """
        words, known = [*(sys.argv[1:] if args is None else args)], self._option_string_actions
        end = words.index("--") if "--" in words else len(words)
        flags, others, free = [], [], 0  # free: values that the last flag may still take
        for word in words[:end]:
            name, equals, _ = word.partition("=")
            if word[:1] == "-" != word and " " not in word and not NUMBER.fullmatch(word):
                if name not in known:
                    hint = self.hints.get(name) or nearest(name, known) or "leave it out"
                    self.error(f"unknown flag {name}: {hint}")
                action = known[name]
                free = 0 if equals else {None: 1, 0: 0}.get(action.nargs, len(words))
                flags.append(word)
            elif free and (flags[-1] in known or NUMBER.fullmatch(word) or word in (action.choices or ())):
                free -= 1
                flags.append(word)
            else:
                free = 0
                others.append(word)
        if end < len(words):
            return super().parse_args([*flags, "--", *others, *words[end + 1 :]], namespace)
        return super().parse_args([*others, *flags], namespace)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [*map(str, action.choices)]
            hint = nearest(str(value), choices) or self.hints.get(action.dest, "choose one")
            raise argparse.ArgumentError(action, f"{value!r} is none of {', '.join(choices)}: {hint}")

    def error(self, message: str) -> NoReturn:
        """End with exit code 2; of torchrun's processes rank 0 prints."""
        arguments = " ".join(x.metavar or x.dest for x in self._get_positional_actions())
        usage = f"usage: {self.prog} {arguments} [flags]".replace("  ", " ")
        lines = f"{usage}; {self.prog} --help lists them\n{self.prog}: {message}\n"
        main = os.environ.get("RANK", "0") == "0"
        time.sleep(0 if main else PATIENCE)
        self.exit(2, lines if main else None)


def nearest(given: str, known: Iterable[str]) -> str:
    """Ask "did you mean --dataset?"; "" if nothing known is near."""
    near = difflib.get_close_matches(given, known, 1)
    return f"did you mean {near[0]}?" if near else ""
