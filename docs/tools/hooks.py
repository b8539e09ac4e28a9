"""Hooks of MkDocs: tables of flags, pages of the Python reference, links to files of the repository."""

import itertools
import posixpath
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from mkdocs.exceptions import PluginError  # noqa: E402
from mkdocs.structure.files import File  # noqa: E402

from docs.tools.entry_points import EntryPoint, entry_points  # noqa: E402
from ppow_jax import flags  # noqa: E402

FLAGS = "<!-- the flags of all programs -->"
PACKAGES = (
    "inference",
    "speculation",
    "objectives",
    "models",
    "weights",
    "data",
    "corpus",
    "training",
    "online",
    "evaluation",
    "study",
    "planning",
)
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files, config):
    """Adds one page per package, which mkdocstrings fills from the docstrings."""
    for package in PACKAGES:
        options = "    options:\n      show_submodules: true\n      heading_level: 1\n"
        page = File.generated(config, f"python/{package}.md", content=f"::: ppow_jax.{package}\n{options}")
        files.append(page)
    return files


def on_page_markdown(markdown, page, config, files):
    """Fills in the tables of flags; links to files outside docs/ become their paths."""
    if FLAGS in markdown:
        markdown = markdown.replace(FLAGS, "\n\n".join(map(flag_tables, entry_points().values())))
    return outside_links(pipes_in_code(markdown), page.file.src_uri)


def flag_tables(entry: EntryPoint) -> str:
    """One program's help and flags as Markdown: a table per group."""
    lines = [f"## {entry.name}", "", f"`python -m experiments.{entry.name}`", ""]
    lines += ["```text", entry.help, "```"]
    for group, members in itertools.groupby(flags.specs(entry.settings), lambda spec: spec.group):
        lines += ["", f"**{group}**", "", "| flag | default | |", "|---|---|---|"]
        for spec in members:
            default = entry.defaults.get(spec.name, spec.default)
            shown = "" if default in (None, "", ()) else f"`{spec.format(default)}`"
            lines.append(f"| `{syntax(spec)}` | {shown} | {cell(spec.help + bounds(spec))} |")
    return "\n".join(lines)


def syntax(spec: flags.Spec) -> str:
    """The flag's name and form."""
    if spec.positional:
        return spec.name.upper()
    if spec.kind is bool and not spec.many:
        return f"--[no]{spec.name}"
    return f"--{spec.name}"


def bounds(spec: flags.Spec) -> str:
    """The values that the flag accepts, as a sentence; nothing if its type says it all."""
    if spec.choices is not None:
        return f" One of {', '.join(f'`{choice}`' for choice in spec.choices)}."
    limits = {"at least": spec.low, "at most": spec.high}
    told = " and ".join(f"{word} {limit}" for word, limit in limits.items() if limit is not None)
    return f" Must be {told}." if told else ""


def cell(text: str) -> str:
    """A text as the cell of a table."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def pipes_in_code(markdown: str) -> str:
    r"""`\|` inside code in a table is written `|` for this renderer, which does not split cells there."""
    rows = [
        re.sub(r"`[^`]*`", lambda code: code[0].replace("\\|", "|"), line) if line.startswith("|") else line
        for line in markdown.split("\n")
    ]
    return "\n".join(rows)


def outside_links(markdown: str, source: str) -> str:
    """Replaces links to files outside docs/ by text and path. Raises PluginError if there is no such file."""

    def replaced(link: re.Match) -> str:
        text, place = link[1], link[2]
        if re.match(r"[a-z]+:", place):
            return link[0]
        path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(source), place))
        if path.startswith("docs/"):
            return link[0]
        if not (ROOT / path).exists():
            raise PluginError(f"docs/{source}: links to {place}, which does not exist")
        return f"{text} (`{path}`)" if path not in text else text

    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.M | re.S)
    return "".join(part if part.startswith("```") else LINK.sub(replaced, part) for part in parts)
