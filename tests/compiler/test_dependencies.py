"""Dependencies point one way: a package imports only from the packages below it.

`python tests/compiler/test_dependencies.py` prints which package imports from which.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PACKAGES = (
    "compiler/common",
    "compiler/text",
    "compiler/ir",
    "compiler/frontend",
    "quantize",
    "passes",
    "targets",
    "compiler/measure",
    "compiler/gates",
    "compiler/report",
    "compiler/zoo",
    "compiler/pipeline",
    "compiler/foreign",
    "compiler/families",
    "compiler/build",
    "compiler/search",
    "compiler/run",
    "compiler/web",
    "compiler/api.py",
    "compiler/commands",
    "cli.py",
)
"""From the bottom up. Above them is `moec` itself, whose `__init__.py` names what it exports."""

HEAVY = {"torch", "transformers", "onnx", "onnx_ir", "onnxruntime", "coremltools", "ai_edge_litert", "tensorrt_rtx"}


def package_of(path: str) -> str:
    """The package of a file or a module, given as a path from the root; "" for `moec` itself."""
    return next(
        (package for package in PACKAGES if f"{path}/".startswith((f"{package}/", package.removesuffix(".py") + "/"))),
        "",
    )


def sources() -> Iterator[Path]:
    yield from ROOT.glob("*.py")
    for folder in ("compiler", "passes", "quantize", "targets"):
        yield from (ROOT / folder).rglob("*.py")


def imports(path: Path) -> set[str]:
    """Every module of moec that `path` imports, anywhere in it, as a path from the root."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{name.name}" for name in node.names}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    return {name.removeprefix("moec.").replace(".", "/") for name in found if name.startswith("moec.")}


def edges() -> dict[str, set[str]]:
    """Package -> the packages that it imports from."""
    found: dict[str, set[str]] = {package: set() for package in PACKAGES}
    for path in sources():
        if package := package_of(path.relative_to(ROOT).as_posix()):
            found[package] |= {package_of(name) for name in imports(path)} - {package, ""}
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_from_those_below_it(package: str) -> None:
    above = PACKAGES[PACKAGES.index(package) :]
    wrong = {
        path.relative_to(ROOT).as_posix(): found
        for path in sources()
        if package_of(path.relative_to(ROOT).as_posix()) == package
        if (found := {name for name in imports(path) if package_of(name) in above and package_of(name) != package})
    }
    assert not wrong


def test_every_file_is_in_a_room() -> None:
    outside = {path.relative_to(ROOT).as_posix() for path in sources()}
    outside = {path for path in outside if not package_of(path)}
    assert outside == {"__init__.py", "__main__.py", "compiler/__init__.py"}


def test_the_compiler_names_no_target() -> None:
    folders = [folder.name for folder in (ROOT / "targets").iterdir() if (folder / "__init__.py").exists()]
    assert "onnx" in folders
    for path in sources():
        if path.is_relative_to(ROOT / "compiler") or path.name == "cli.py":
            assert not {name for name in imports(path) for folder in folders if name.startswith(f"targets/{folder}/")}


def module_level_imports(path: Path) -> set[str]:
    """Top-level packages that importing `path` itself brings in."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
    return found


@pytest.mark.parametrize(
    "name",
    [
        "cli",
        "__init__",
        "compiler/api",
        "compiler/run/generate",
        "compiler/run/conversation",
        "compiler/commands/doctor",
        "targets/base",
    ],
)
def test_what_must_start_fast_imports_nothing_heavy(name: str) -> None:
    assert not module_level_imports(ROOT / f"{name}.py") & HEAVY


def test_the_checks_see_imports(tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    path.write_text("from moec.targets.onnx import target\nif TYPE_CHECKING:\n    import moec.cli\n")
    assert {package_of(name) for name in imports(path)} == {"targets", "cli.py"}


if __name__ == "__main__":
    for importer, imported in edges().items():
        print(f"{importer:20} <- {', '.join(sorted(imported, key=PACKAGES.index)) or 'nothing'}")
