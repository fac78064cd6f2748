"""The house keeps its order: every import goes down, nothing goes round, heavy libraries are where they belong."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[1] / "src"

# Bottom to top. A file may import from lower layers, and from its own. A package stands for all of its modules; a
# module named by itself is not in its package's layer.
LAYERS = [
    ["errors", "types"],
    ["config", "config_file"],
    ["files", "host", "progress", "flops", "memory", "schedule", "kernels", "assets"],
    ["data", "models", "rollout.options"],
    ["objectives", "pairs", "thumbs", "adapters", "optimizers", "policy"],
    ["job"],
    [
        "history",
        "diagnose",
        "diagnose_rewards",
        "checkpoint",
        "engine",
        "guard",
        "plots",
        "results",
        "run_report",
        "trackers",
        "report",
    ],
    ["fallback"],
    ["evaluate.text", "evaluate.loss", "observe"],
    ["generate", "export"],
    ["rewards"],
    ["rollout"],
    ["run_folder"],
    ["critic", "devices", "plan", "teacher"],
    ["read"],
    ["resolve"],
    ["setup"],
    ["evaluate"],
    ["step", "frozen", "reference"],
    ["loop", "replay"],
    ["compat", "plan.command", "probe"],
    ["api", "chat", "inspect"],
    ["cli", "__main__"],
]
# Objectives know the nouns and nothing of models, engines or files.
OBJECTIVES_MAY_IMPORT = (
    "tunery.types", "tunery.errors", "tunery.config", "tunery.kernels", "tunery.objectives", "tunery.pairs",
    "tunery.thumbs",
)  # fmt: skip
# Libraries with one home each: who may import them.
HOMES = {
    "accelerate": {"tunery.engine"},
    "typer": {"tunery.cli"},
}

MODULES = {
    ".".join(path.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(SRC.glob("tunery/**/*.py"))
}


def imports(module: str, *, lazy: bool = True) -> Iterator[tuple[str, int]]:
    """(imported module, line) of a file; `lazy` includes those inside functions. Imports for types alone do not run."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            stack.extend(node.orelse)
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not lazy:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: imports are absolute"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield (full if full in MODULES else str(node.module)), node.lineno
        stack.extend(ast.iter_child_nodes(node))


def layer(module: str) -> int | None:
    """The layer of a module of ours: that of the longest name in LAYERS it begins with. None for the package itself,
    which holds the version and the way to api.py."""
    parts = module.split(".")[1:]
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        for level, names in enumerate(LAYERS):
            if name in names:
                return level
    assert not parts, f"{module} is in no layer: put it into LAYERS in {Path(__file__).name}"
    return None


@pytest.mark.parametrize("module", [module for module in MODULES if module != "tunery"])
def test_imports_go_down(module):
    own = layer(module)
    assert own is not None
    wrong = []
    for target, line in imports(module):
        if target.startswith("tunery."):
            level = layer(target)
            if level is None or level > own:
                wrong.append(f"{module}:{line} imports {target}, which is above it")
    assert not wrong, "\n".join(wrong)


def test_no_import_goes_round():
    """Among the imports that run when a file is loaded."""
    graph = {m: {target for target, _ in imports(m, lazy=False) if target in MODULES and target != m} for m in MODULES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for target in sorted(graph[module] - {"tunery"}):
                visit(target, (*path, module))
            done.add(module)

    for module in sorted(MODULES):
        visit(module, ())


def test_objectives_know_only_the_nouns():
    objectives = [module for module in MODULES if module.startswith("tunery.objectives")]
    assert "tunery.objectives.sft" in objectives
    for module in objectives:
        for target, line in imports(module):
            ours = target.startswith("tunery")
            assert not ours or target.startswith(OBJECTIVES_MAY_IMPORT), f"{module}:{line} imports {target}"


@pytest.mark.parametrize("library", sorted(HOMES))
def test_libraries_at_home(library):
    users = {module for module in MODULES for target, _ in imports(module) if target.split(".")[0] == library}
    assert users == HOMES[library]


def loaded_after(code: str) -> set[str]:
    """The top-level modules in a fresh interpreter after running `code`."""
    script = f"{code}\nimport sys; print(' '.join(sorted({{name.split('.')[0] for name in sys.modules}})))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split("\n")[-2].split())


HELP = """
import sys
sys.argv = ["tunery", "--help"]
from tunery.cli import main
try:
    main()
except SystemExit as stop:
    assert not stop.code
"""


@pytest.mark.parametrize("code", ["import tunery", "import tunery.cli", HELP], ids=["tunery", "cli", "help"])
def test_the_command_line_starts_without_the_heavy_libraries(code):
    heavy = {"torch", "transformers", "peft", "datasets", "accelerate", "numpy", "matplotlib"}
    assert not heavy & loaded_after(code)


def test_the_nouns_and_the_configuration_are_light():
    assert not {"torch", "transformers"} & loaded_after("import tunery.types, tunery.config_file, tunery.schedule")
