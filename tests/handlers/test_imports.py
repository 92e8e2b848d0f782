"""Which modules import which: one way between packages, in no circle, and little where processes are to be small."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("mpm_ops", "handlers", "model_store", "k8s", "loadtest")
MAY_IMPORT = {
    "mpm_ops": {"mpm_ops"},
    "handlers": {"mpm_ops", "handlers"},
    "model_store": {"mpm_ops", "handlers", "model_store"},
    "k8s": {"mpm_ops", "handlers", "model_store", "k8s"},
    "loadtest": set(PACKAGES) - {"k8s"},
}
HEAVY = ("PIL", "cv2", "mpm_ops", "numba", "numpy", "openvino", "torch")


def imports_of(path: Path) -> Iterator[str]:
    """Our modules that a file imports when it is imported: not for type checkers, and not inside functions."""
    package = ".".join(path.relative_to(ROOT).with_suffix("").parts[:-1])

    def walk(nodes: list[ast.stmt]) -> Iterator[str]:
        for node in nodes:
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                parent = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
                base = ".".join(filter(None, (parent if node.level else "", node.module)))
                yield from (found for alias in node.names for found in (base, f"{base}.{alias.name}"))
            elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.dump(node.test):
                yield from walk([*node.body, *node.orelse])
            elif isinstance(node, ast.Try):
                yield from walk([*node.body, *node.orelse, *node.finalbody])

    return walk(ast.parse(path.read_text()).body)


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    """Our modules, and which of them each imports."""
    files = {}
    for path in (file for package in PACKAGES for file in (ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return {name: {found for found in imports_of(path) if found in files} - {name} for name, path in files.items()}


def test_packages_import_one_way(graph: dict[str, set[str]]) -> None:
    upward = [
        f"{name} imports {found}"
        for name, imported in graph.items()
        for found in imported
        if found.split(".")[0] not in MAY_IMPORT[name.split(".")[0]] and not name.startswith("handlers.bench")
    ]
    assert upward == []


def test_no_circles_in_handlers(graph: dict[str, set[str]]) -> None:
    left = {name: set(imported) for name, imported in graph.items() if name.startswith("handlers")}
    while leaves := [name for name, imported in left.items() if not imported & left.keys()]:
        for name in leaves:
            del left[name]
    assert left == {}


@pytest.mark.parametrize(
    "modules",
    [
        "handlers.config",
        "handlers.cli, handlers.launch.torchserve",
        "handlers.cli, handlers.launch.triton",
        "handlers.cli, handlers.launch.health",
        "k8s.cli, loadtest.cli, model_store.cli",
    ],
)
def test_small_processes(modules: str) -> None:
    code = (
        f"import sys, psutil, {modules}; print(psutil.Process().memory_info().rss, *({set(HEAVY)} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    memory, *heavy = done.stdout.split()
    assert heavy == []
    assert int(memory) < 60 * 2**20
