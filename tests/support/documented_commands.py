"""Commands of README.md and docs/*.md: those in shell blocks, and inline code that begins with a known program."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
LOG = ROOT / "docs" / "experiments.md"  # dated: its commands are those of their day
PAGES = [ROOT / "README.md", *(path for path in sorted((ROOT / "docs").glob("*.md")) if path != LOG)]
PYTHON = re.compile(r"(\.venv/bin/)?python3?")
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.M | re.S)
INDENTED = re.compile(r"(?:^(?: {4}|\t).*\n?)+", re.M)
INLINE = re.compile(r"`([^`]+)`")


@dataclass(frozen=True)
class Command:
    """words: as a shell splits them. place: PAGE:LINE of its beginning."""

    words: tuple[str, ...]
    place: str

    @property
    def module(self) -> str | None:
        """X of `python -m X`, and of `ppow-NAME` (an installed script): `experiments.NAME`."""
        if self.words[0].startswith("ppow-"):
            return f"experiments.{self.words[0].removeprefix('ppow-')}"
        return self.words[2] if PYTHON.fullmatch(self.words[0]) and self.words[1:2] == ("-m",) else None

    @property
    def arguments(self) -> list[str]:
        """The arguments after the program's name, without a final `...`, which stands for further flags."""
        rest = self.words[1 if self.words[0].startswith("ppow-") else 3 :]
        return [word for word in rest if word != "..."]

    def __str__(self) -> str:
        return f"{self.place}: {shlex.join(self.words)}"


def commands(path: Path) -> list[Command]:
    """All commands of a page, those in quotes of another one (`ssh --command="..."`) included."""
    text = path.read_text(encoding="utf-8")
    found = []
    for line, source in _sources(text):
        for words in _split(source):
            found.append(Command(tuple(words), f"{path.relative_to(ROOT)}:{line}"))
    return found


def python_blocks(path: Path) -> Iterator[tuple[int, str]]:
    """(line, source) of every Python block of a page."""
    text = path.read_text(encoding="utf-8")
    for block in FENCE.finditer(text):
        if block[2] == "python":
            yield text.count("\n", 0, block.start()) + 2, block[3]


def _sources(text: str) -> Iterator[tuple[int, str]]:
    """(line, shell source) of every shell block, and of inline code that begins with one of our programs."""
    for block in FENCE.finditer(text):
        if block[2] in ("sh", "bash", "shell"):
            yield text.count("\n", 0, block.start()) + 2, block[3]
    rest = FENCE.sub(lambda block: "\n" * block[0].count("\n"), text)
    for block in INDENTED.finditer(rest):
        if re.match(r"\s*(\.venv/bin/python|python|make|pip|ppow-\w+) ", block[0]):
            yield rest.count("\n", 0, block.start()) + 1, block[0]
    for code in INLINE.finditer(INDENTED.sub(lambda block: "\n" * block[0].count("\n"), rest)):
        source = " ".join(code[1].split())
        if re.match(r"(\.venv/bin/python|python) -m \S+ |make \w|pip install |ppow-\w+ ", source):
            yield rest.count("\n", 0, code.start()) + 1, source


def _split(source: str) -> Iterator[list[str]]:
    """The commands of a shell source: one per line, or per several that end in a backslash, or are joined by `&&`.

    A command line in the quotes of another is given after it, without the quotes.
    """
    for words in _lines(source):
        command: list[str] = []
        for word in [*words, "&&"]:
            if word != "&&":
                command.append(word)
                continue
            while command and re.fullmatch(r"[A-Z_]+=\S*|srun", command[0]):
                command = command[1:]  # an environment variable, or Slurm's launcher
            if command:
                yield command
            command = []
        for word in words:
            if " -m experiments." in word:
                yield from _split(word.partition("=")[2])


def _lines(source: str) -> Iterator[list[str]]:
    """The words of every line; a line ends within no quotes."""
    begun = ""
    for line in source.replace("\\\n", " ").split("\n"):
        begun += line
        try:
            yield shlex.split(begun, comments=True)
        except ValueError:  # no closing quotation yet
            begun += "\n"
        else:
            begun = ""
    assert not begun, f"a quotation is not closed: {begun}"
