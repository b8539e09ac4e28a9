"""The layering of the packages, read from the imports of every module."""

import ast
import graphlib
from pathlib import Path

ROOT = Path(__file__).parent.parent

# From the bottom to the top: a module imports its own package and those above it in this list, no others.
LAYERS = (
    "ppow_jax.errors",
    "ppow_jax.files",
    "ppow_jax.compiling",
    "ppow_jax.progress",
    "ppow_jax.defaults",
    "ppow_jax.flags",
    "ppow_jax.cli",
    "ppow_jax.mesh_shape",
    "ppow_jax.distributed",
    "ppow_jax.sharding",
    "ppow_jax.programs",
    "ppow_jax.cpu",
    "ppow_jax.models",
    "ppow_jax.data",
    "ppow_jax.weights",
    "ppow_jax.objectives",
    "ppow_jax.speculation",
    "ppow_jax.inference",
    "ppow_jax.serving",
    "ppow_jax.corpus",
    "ppow_jax.evaluation",
    "ppow_jax.engines",
    "ppow_jax.training",
    "ppow_jax.online",
    "ppow_jax.planning",
    "ppow_jax.bench",
    "ppow_jax.study",
    "ppow_jax",
    "experiments",
)


def modules(root: Path) -> dict[str, Path]:
    """The project's modules, without its tests: name -> file."""
    files = sorted(file for top in ("ppow_jax", "experiments") for file in (root / top).rglob("*.py"))
    return {".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def imports(text: str, known: frozenset[str]) -> set[str]:
    """Names of all modules that a source imports, anywhere in it: in functions and under TYPE_CHECKING as well."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports are not read here"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else str(node.module) for name in names}
    return found


def layer(module: str) -> str:
    """The layer of a module: `ppow_jax.PACKAGE`, or the first part of its name."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "ppow_jax" else parts[0]


def violations(graph: dict[str, set[str]]) -> list[str]:
    """Imports within the project, or of its tests, that go up in LAYERS."""
    rank = {name: n for n, name in enumerate(LAYERS)}
    own = {layer.partition(".")[0] for layer in LAYERS} | {"tests"}
    return sorted(
        f"{module} imports {name}"
        for module, names in graph.items()
        for name in names
        if name.partition(".")[0] in own and rank.get(layer(name), len(LAYERS)) > rank[layer(module)]
    )


def import_graph() -> dict[str, set[str]]:
    files = modules(ROOT)
    return {name: imports(file.read_text(), frozenset(files)) for name, file in files.items()}


def test_every_package_has_a_layer():
    assert {layer(module) for module in modules(ROOT)} == set(LAYERS)


def test_no_module_imports_a_higher_layer_or_the_tests():
    assert violations(import_graph()) == []


def test_no_modules_import_each_other_in_a_circle():
    graph = import_graph()
    within = {name: (found & set(graph)) - {name} for name, found in graph.items()}
    order = list(graphlib.TopologicalSorter(within).static_order())  # raises CycleError, which names the circle
    assert set(order) == set(graph)


def test_upward_imports_are_found_wherever_they_stand():
    known = frozenset({"ppow_jax.training", "ppow_jax.training.loop", "tests.support"})
    text = """
if TYPE_CHECKING:
    from ppow_jax.training import loop

def late():
    import tests.support
"""
    graph = {"ppow_jax.models.layers": imports(text, known), "experiments.plan": imports("import tests.golden", known)}
    assert graph["ppow_jax.models.layers"] == {"ppow_jax.training.loop", "tests.support"}
    assert violations(graph) == [
        "experiments.plan imports tests.golden",
        "ppow_jax.models.layers imports ppow_jax.training.loop",
        "ppow_jax.models.layers imports tests.support",
    ]
