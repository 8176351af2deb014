"""Lines of the user's own files, for errors."""

from __future__ import annotations

import inspect
import linecache
import sys
import traceback
from collections.abc import Callable
from types import TracebackType

import torch


def definition(step: Callable) -> str:
    """Where the step itself is written: for a call that did not come into it."""
    code = inspect.unwrap(step).__code__ if inspect.isfunction(inspect.unwrap(step)) else None
    return "the step" if code is None else _quoted(code.co_filename, code.co_firstlineno)


def user_line(tb: TracebackType | None) -> str:
    frames = [f for f in traceback.extract_tb(tb) if not _ours(f.filename)]
    return _quoted(frames[-1].filename, frames[-1].lineno or 0) if frames else ""


def current_line() -> str:
    frame = sys._getframe(1)
    while frame is not None and _ours(frame.f_code.co_filename):
        frame = frame.f_back
    return "the step" if frame is None else _quoted(frame.f_code.co_filename, frame.f_lineno)


def _quoted(file: str, number: int) -> str:
    """`train.py:12 "loss.backward()"`."""
    return f'{file.rsplit("/", 1)[-1]}:{number} "{linecache.getline(file, number).strip()}"'


_TORCH = torch.__file__.rsplit("/", 1)[0] + "/"
_SYNCWRIGHT = __file__.rsplit("/", 2)[0] + "/"


def _ours(filename: str) -> bool:
    library = filename.startswith((_TORCH, _SYNCWRIGHT, "<")) or "/contextlib.py" in filename
    return library or "/site-packages/" in filename or "/logging/__init__.py" in filename
