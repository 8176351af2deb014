"""Names that a person may have meant: the last sentence of an error about an unknown name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def near_names(word: str, known: Iterable[str]) -> list[str]:
    """The known names closest to `word`, best first: near_names("embd", ["embed", "head"]) is ["embed"]."""
    return difflib.get_close_matches(word, list(known), n=3, cutoff=0.6)


def did_you_mean(word: str, known: Iterable[str], otherwise: str) -> str:
    """`Did you mean 'embed'?` where something is near, and the sentence `otherwise` where nothing is."""
    names = near_names(word, known)
    if not names:
        return otherwise
    return "Did you mean " + " or ".join(repr(name) for name in names) + "?"
