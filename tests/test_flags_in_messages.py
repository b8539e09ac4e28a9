"""No text advises a flag that no program has: every `--flag` of a string in the sources is one."""

import ast
import importlib
import re
from pathlib import Path

import pytest

from ppow_jax.flags import specs

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("ppow_jax/**/*.py"), *ROOT.glob("experiments/*.py")])
FLAG = re.compile(r"(?<![\w-])(?<!var\()--([A-Za-z]\w*(?:-\w+)*)(?!\w|-|:\S)")  # the last: no variables of CSS
GENERAL = {"help", "helpfull", "flagfile", "name"}  # of every program; --name=value stands for any
OTHERS = {  # programs of others, and their flags that texts may name
    "pip install": {"no-deps"},
    "vllm serve": {"speculative-config"},
    "sglang": {
        "model-path",
        "speculative-algorithm",
        "speculative-draft-model-path",
        "speculative-num-steps",
        "speculative-eagle-topk",
        "speculative-num-draft-tokens",
    },
}
SETTINGS = {
    "convert": tuple(
        f"{name}Settings" for name in ("Inspect", "Verify", "Convert", "Card", "Push", "Fetch", "Vocabulary")
    ),
    "plan": ("PlanSettings",),
    "reproduce": ("StudySettings",),
    "train": ("TrainSettings",),
}


def programs() -> dict[str, set[str]]:
    """Program -> its flags."""
    found = {}
    for path in sorted((ROOT / "experiments").glob("*.py")):
        if "__main__" in path.read_text():
            module = importlib.import_module(f"experiments.{path.stem}")
            classes = [getattr(module, name) for name in SETTINGS.get(path.stem, ("Settings",))]
            flags = [spec for cls in classes for spec in specs(cls) if not spec.positional]
            switches = {f"no{spec.name}" for spec in flags if spec.kind is bool and not spec.many}
            found[path.stem] = {spec.name for spec in flags} | switches
    return found


PROGRAMS = programs()
ALL = set().union(*PROGRAMS.values()) | GENERAL


def strings(path: Path) -> list[tuple[int, str]]:
    """(line, text) of every string in a file; a flag that an f-string makes up has no letters here.

    Docstrings count where --help prints them.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    printed = path.parent.name == "experiments"
    docstrings = {
        id(x.body[0].value)
        for x in ast.walk(tree)
        if isinstance(x, ast.Module | ast.ClassDef | ast.FunctionDef) and x.body and isinstance(x.body[0], ast.Expr)
    }
    return [
        (x.lineno, x.value)
        for x in ast.walk(tree)
        if isinstance(x, ast.Constant) and isinstance(x.value, str) and (printed or id(x) not in docstrings)
    ]


def flags(text: str) -> set[str]:
    """The flags that a text names, but those of others' programs that it names too."""
    return set(FLAG.findall(text)).difference(*(known for name, known in OTHERS.items() if name in text))


def test_the_programs_are_found():
    assert set(PROGRAMS) >= {"convert", "evaluate", "generate", "plan", "train"}
    assert "feature_layers" in PROGRAMS["train"] and "feature_layers" not in PROGRAMS["evaluate"]
    assert flags("(--stop=x), --max_new_tokens: a--b --- {--bg:#fff;--fg:var(--ok)}") == {"stop", "max_new_tokens"}
    assert flags("run `pip install --no-deps x`") == set() and flags("--no-deps") == {"no-deps"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_flag_in_a_text_exists(path):
    for line, text in strings(path):
        for flag in flags(text):
            assert flag in ALL, f"{path}:{line}: --{flag} is no flag of any program: {text!r}"


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_speaks_of_its_own_flags(program):
    """Or, in a line that names another program, of that one's."""
    for line, text in strings(ROOT / "experiments" / f"{program}.py"):
        others = [PROGRAMS[name] for name in PROGRAMS if f"experiments.{name}" in text]
        known = PROGRAMS[program].union(GENERAL, *others)
        for flag in flags(text):
            assert flag in known, f"experiments/{program}.py:{line}: --{flag} is no flag of it: {text!r}"
