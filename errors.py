"""The errors that a user can cure, and the wrapper that turns them into one sentence and exit code 2.

Every command ends with `sys.exit(main())`, and its `main` runs its work under `run_command`. Imports nothing
of this project, so that every file may raise and catch these.
"""

import os
import sys
from collections.abc import Callable


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


def run_command(
    name: str,
    work: Callable[[], int],
    interrupted: str = "interrupted",
    on_all_ranks: type[Exception] | tuple[type[Exception], ...] = TadaError,
) -> int:
    """Run `work` and return its exit code; 2 after one sentence on stderr for an error that a user can cure,
    130 after Ctrl-C.

    Errors of `on_all_ranks` are raised by every process of torchrun alike, so only rank 0 prints them; any
    other error is printed by the rank that has it.
    """
    main = os.environ.get("RANK", "0") == "0"
    try:
        return work()
    except KeyboardInterrupt:
        if main:
            print(interrupted, file=sys.stderr)
        return 130
    except (TadaError, OSError) as error:
        if main or not isinstance(error, on_all_ranks):
            print(f"{name}: {error}", file=sys.stderr)
        return 2
