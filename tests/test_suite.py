"""The suite itself: every test asserts, every module is tested by default, files agree on commands and version."""

import ast
import functools
import re
from pathlib import Path

import pytest

import ppow_jax

TESTS = Path(__file__).parent
ROOT = TESTS.parent
FILES = sorted(TESTS.glob("test_*.py"))
SUPPORT = sorted((TESTS / "support").glob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in [*FILES, *SUPPORT]}
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef

# Modules that no test file of the default suite imports -> the file that tests them through others.
THROUGH_OTHERS = {
    "experiments.common": "test_entry_points.py",
    "experiments.drafter_parity": "test_flags_in_messages.py",  # needs torch: its flags alone
    "experiments.parity": "test_flags_in_messages.py",  # likewise
    "ppow_jax.evaluation.torch_parity": "test_flags_in_messages.py",  # likewise
    "experiments.reproduce": "test_flags_in_messages.py",
    "ppow_jax.bench.timing": "test_bench.py",
    "ppow_jax.corpus.token_counts": "test_draft_vocabulary.py",
    "ppow_jax.cpu.norm": "test_cpu_attention.py",
    "ppow_jax.data.code": "test_conversations.py",
    "ppow_jax.data.json_files": "test_readers.py",
    "ppow_jax.data.messages": "test_records.py",
    "ppow_jax.data.service": "test_conversations.py",
    "ppow_jax.data.tasks": "test_conversations.py",
    "ppow_jax.inference.learner": "test_online.py",
    "ppow_jax.evaluation.replay_lookup": "test_replay.py",
    "ppow_jax.training.fields": "test_train_refusals.py",
    "ppow_jax.inference.trace_page": "test_trace.py",
    "ppow_jax.models.reading": "test_model_config.py",
    "ppow_jax.models.window_attention": "test_drafter.py",
    "ppow_jax.planning.tables": "test_planning.py",
    "ppow_jax.online.saving": "test_online.py",
    "ppow_jax.serving.calls": "test_serving_http.py",
    "ppow_jax.serving.replies": "test_serving_http.py",
    "ppow_jax.speculation.token_scores": "test_ppow.py",
    "ppow_jax.study.plots": "test_study.py",
    "ppow_jax.study.results": "test_study.py",
    "ppow_jax.training.acceptance": "test_acceptance.py",
    "ppow_jax.training.context": "test_pipeline.py",
    "ppow_jax.training.optimizers": "test_pipeline.py",
    "ppow_jax.training.recorded": "test_recorded_settings.py",
    "ppow_jax.training.replays": "test_study.py",
    "ppow_jax.training.steps.ppow_exact": "test_study.py",
    "ppow_jax.weights.conversion": "test_convert.py",
    "ppow_jax.weights.drafter_fields": "test_third_party_drafters.py",
    "ppow_jax.weights.flat": "test_eagle3_format.py",
    "ppow_jax.weights.gguf_sentencepiece": "test_gguf_tokenizer.py",
    "ppow_jax.weights.hub": "test_convert.py",
    "ppow_jax.weights.padded_vocabulary": "test_padded_vocabulary.py",
    "ppow_jax.weights.speculators": "test_speculators_format.py",
    "ppow_jax.weights.summary": "test_convert.py",
    "ppow_jax.weights.vocabulary_map": "test_eagle3_format.py",
}
# Programs that run beside other engines or torch, in environments of their own; tests have stand-ins for these.
ELSEWHERE = ("ppow_jax.engines.", "experiments.serve_check", "experiments.eagle3_torch")


def functions(tree: ast.Module) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in ast.walk(tree) if isinstance(node, FUNCTIONS)}


@functools.cache
def helpers() -> dict[str, set[str]]:
    """Names of functions that assert, by file; a file knows its own and those of tests/support."""
    found = {path: {name for name, f in functions(tree).items() if asserts(f)} for path, tree in TREES.items()}
    shared = set().union(*(found[path] for path in SUPPORT))
    for path, tree in TREES.items():
        found[path] |= shared
        while more := {n for n, f in functions(tree).items() if calls(f) & found[path]} - found[path]:
            found[path] |= more
    return {path.name: names for path, names in found.items()}


def calls(node: ast.AST) -> set[str]:
    """Names of what is called or, as a parameter, requested."""
    named = {call.func for call in ast.walk(node) if isinstance(call, ast.Call)}
    names = {f.attr if isinstance(f, ast.Attribute) else getattr(f, "id", "") for f in named}
    return names | ({arg.arg for arg in node.args.args} if isinstance(node, FUNCTIONS) else set())


def asserts(function: ast.FunctionDef) -> bool:
    """True for an assert statement, `pytest.raises`, or a comparison of numpy.testing."""
    statements = any(isinstance(node, ast.Assert) for node in ast.walk(function))
    return statements or any(
        isinstance(node, ast.Attribute) and (node.attr == "raises" or node.attr.startswith("assert_"))
        for node in ast.walk(function)
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_test_asserts(path):
    tests = {name: f for name, f in functions(TREES[path]).items() if name.startswith("test_")}
    idle = [name for name, f in tests.items() if not asserts(f) and not calls(f) & helpers()[path.name]]
    assert tests and not idle


def test_a_test_without_an_assertion_is_found():
    tree = ast.parse("def test_a():\n    run()\n\ndef test_b():\n    assert run()\n")
    assert [asserts(f) for f in functions(tree).values()] == [False, True]


def in_default(path: Path) -> bool:
    """True if a file has tests that are not marked for the full suite."""
    if re.search(r"^pytestmark = .*\b(full|slow)\b", path.read_text(), re.M):
        return False
    marks = [
        {ast.unparse(d).rpartition(".")[2] for d in f.decorator_list}
        for name, f in functions(TREES[path]).items()
        if name.startswith("test_")
    ]
    return any(not names & {"full", "slow"} for names in marks)


def imported(tree: ast.Module) -> set[str]:
    """Modules of the project that a file imports or starts by name."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= set(re.findall(r"\bexperiments\.[a-z_]+", node.value))
    return found


def modules() -> set[str]:
    paths = [path for package in ("ppow_jax", "experiments") for path in (ROOT / package).rglob("*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths if path.name != "__init__.py"}


def test_every_module_is_tested_by_default():
    """A module is tested where a file of the default suite imports it, itself or through tests/support."""
    default = [path for path in FILES if in_default(path) and path != Path(__file__)]  # this file names them all
    support = {path.stem: imported(TREES[path]) for path in SUPPORT}
    found: set[str] = set()
    for path in default:
        names = imported(TREES[path])
        found |= names | set().union(*(support[name] for name in names & set(support)))
    assert {file for file in THROUGH_OTHERS.values()} <= {path.name for path in default}
    untested = {name for name in modules() - found - set(THROUGH_OTHERS) if not name.startswith(ELSEWHERE)}
    assert not untested, "import these in a default test, or say in THROUGH_OTHERS what tests them"
    assert set(THROUGH_OTHERS) <= modules()


def test_test_files_share_code_through_support_alone():
    names = {path.stem for path in FILES}
    names |= {f"tests.{name}" for name in names}
    shared = {path.name: imported(tree) & names for path, tree in TREES.items()}
    assert not {name: modules for name, modules in shared.items() if modules}
    assert all(ast.get_docstring(TREES[path]) for path in SUPPORT)


def test_the_version_stands_in_one_place_and_the_changelog_has_it():
    released = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert released[:1] in ([], [ppow_jax.__version__])  # none before the first release
    project = (ROOT / "pyproject.toml").read_text()
    assert 'version = { attr = "ppow_jax.__version__" }' in project and not re.search(r'^version = "', project, re.M)
    assert f'version: "{ppow_jax.__version__}"' in (ROOT / "CITATION.cff").read_text()


@pytest.mark.parametrize("path", [".ci/run", ".github/workflows/ci.yml", ".github/workflows/release.yml"])
def test_what_ci_calls_is_in_the_makefile(path):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    called = set(re.findall(r"\bmake ([a-z-]+)", (ROOT / path).read_text()))
    assert called and called <= targets


def test_the_help_of_make_names_every_target():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^\.PHONY: (.*)$", makefile, re.M)[0].split()) - {"help"}
    assert targets == set(re.findall(r"^# make ([a-z-]+)", makefile, re.M))
