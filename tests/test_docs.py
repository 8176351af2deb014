"""What the documents show is true: blocks are run, YAML is read, links lead somewhere.

The words behind a fence's language say what is done with the block:

    ```python run       is executed; the blocks of one document share their names, in order
    ```text printed     is, to the letter, what the block before it printed; UPDATE_GOLDEN=1 rewrites it
    ```yaml rules       is read by Rules.from_yaml         (also: plan, cluster)

A fence without such a word is only shown.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import syncwright
from syncwright.cluster import Cluster

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), ROOT / "examples" / "README.md"]
FENCE = re.compile(r"^```(\w+)[ ]+(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)(?:#[^)]*)?\)")
READERS = {
    "rules": syncwright.Rules.from_yaml,
    "plan": syncwright.Plan.from_yaml,
    "cluster": Cluster.from_yaml,
}


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: its language, the word behind it, its text, and where the text begins."""

    language: str
    word: str
    text: str
    offset: int
    line: int


def blocks(document: Path) -> list[Block]:
    text = document.read_text(encoding="utf-8")
    return [
        Block(match[1], match[2], match[3], match.start(3), text.count("\n", 0, match.start(3)) + 1)
        for match in FENCE.finditer(text)
    ]


def having(word: str) -> list[Path]:
    return [document for document in DOCUMENTS if any(block.word == word for block in blocks(document))]


def name(document: Path) -> str:
    return str(document.relative_to(ROOT))


def run(block: Block, document: Path, names: dict[str, object]) -> str:
    """Runs one block with what the blocks before it defined; what it printed."""
    code = compile("\n" * (block.line - 1) + block.text, str(document), "exec")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, names)
    return printed.getvalue()


def run_all(document: Path) -> list[tuple[Block, str]]:
    """Every block that says what was printed, and what the block before it printed now."""
    names: dict[str, object] = {"__name__": "document"}
    printed, found = "", []
    for block in blocks(document):
        if block.word == "run":
            printed = run(block, document, names).strip("\n") + "\n"
        elif block.word == "printed":
            found.append((block, printed))
    return found


def rewrite(document: Path, found: list[tuple[Block, str]]) -> None:
    text = document.read_text(encoding="utf-8")
    for block, printed in reversed(found):
        text = text[: block.offset] + printed + text[block.offset + len(block.text) :]
    document.write_text(text, encoding="utf-8")


@pytest.mark.parametrize("document", having("run"), ids=name)
def test_blocks_run_and_print_what_they_say(document, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    found = run_all(document)
    if os.environ.get("UPDATE_GOLDEN"):
        rewrite(document, found)
        return
    for block, printed in found:
        assert printed == block.text, f"{name(document)}:{block.line}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_words_behind_fences_are_known(document):
    allowed = {("python", "run"), ("text", "printed"), *(("yaml", word) for word in READERS)}
    for block in blocks(document):
        assert (block.language, block.word) in allowed, f"{name(document)}:{block.line}"


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if any(b.word in READERS for b in blocks(d))], ids=name)
def test_yaml_can_be_read(document):
    for block in blocks(document):
        if block.word in READERS:
            READERS[block.word](block.text)


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_links_lead_somewhere(document):
    for target in LINK.findall(document.read_text(encoding="utf-8")):
        assert (document.parent / target).exists(), f"{name(document)}: {target}"
