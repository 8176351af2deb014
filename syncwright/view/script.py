"""A script's training step: the script is run up to its first step, alone, and ended there."""

from __future__ import annotations

import contextlib
import os
import runpy
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

from syncwright.errors import RequestError, SyncwrightError
from syncwright.runtime.intercept import FirstStep, intercepting

_PLACES = ("SYNCWRIGHT_ROLE", "RANK", "WORLD_SIZE")


def first_step(script: str, arguments: Sequence[str]) -> FirstStep:
    """Runs `python script arguments...` in this process until its first `.step` and takes that.

    What the script prints goes to standard error. Raises `RequestError` where it never comes to a step, from the
    script's own error where it raised one.
    """
    if not Path(script).is_file():
        raise RequestError(f"script: found no file {script!r}, expected a Python script. Check the path.")
    taken: list[FirstStep] = []
    try:
        with intercepting(taken.append), _as_main(script, arguments), contextlib.redirect_stdout(sys.stderr):
            runpy.run_path(script, run_name="__main__")
    except KeyboardInterrupt:
        raise
    except SyncwrightError:
        raise
    except BaseException as error:
        if not taken:
            raise _ended_early(script, error) from error
    if not taken:
        raise RequestError(
            f"{script} ended without a step; expected it to call syncwright.distribute(...) and then .step(*batch). "
            "Give the script that trains, and the arguments with which it does."
        )
    return taken[0]


def _ended_early(script: str, error: BaseException) -> RequestError:
    if isinstance(error, SystemExit):
        return RequestError(
            f"{script} ended with status {error.code} before its first step. See what it printed; "
            "options of the script's that are also options here go behind `--`."
        )
    found = RequestError(
        f"{script} raised {type(error).__name__} before its first step: {error}. Expected it to run as "
        f"`python {script}` does. Correct the script, or give the arguments that it needs."
    )
    found.add_note("".join(traceback.format_list(_frames_of(script, error))).rstrip())
    return found


def _frames_of(script: str, error: BaseException) -> list[traceback.FrameSummary]:
    """The error's frames from the script's own on."""
    frames = traceback.extract_tb(error.__traceback__)
    own = (at for at, frame in enumerate(frames) if frame.filename == script)
    return list(frames[next(own, 0) :])


@contextlib.contextmanager
def _as_main(script: str, arguments: Sequence[str]) -> Iterator[None]:
    """While open, `sys.argv` and `sys.path` are those of `python script`, and no launcher's variables are set."""
    argv, path, environment = sys.argv, sys.path, dict(os.environ)
    sys.argv = [script, *arguments]
    sys.path = [str(Path(script).resolve().parent), *path]
    for name in _PLACES:
        os.environ.pop(name, None)
    try:
        yield
    finally:
        sys.argv, sys.path = argv, path
        os.environ.update(environment)
