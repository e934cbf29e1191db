"""Dependencies point one way: each layer of the package imports from itself and the layers below it alone."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MEMBERS = ("compiler", "passes", "quantize", "targets")

TOP = {
    "moec.cli",
    "moec.compiler.api",
    "moec.compiler.pipeline",
    "moec.compiler.proof",
    "moec.compiler.quantization",
    "moec.compiler.recorded_codes",
    "moec.compiler.batch",
    "moec.compiler.commands",
    "moec.compiler.estimate",
    "moec.compiler.executors",
    "moec.compiler.worker",
    "moec.compiler.families",
    "moec.compiler.released_page",
    "moec.compiler.doctor",
    "moec.compiler.run.generate",
    "moec.compiler.input_checks",
    "moec.compiler.inspect",
    "moec.compiler.routing",
    "moec.compiler.accounting",
    "moec.compiler.token_view",
}
"""What composes the parts. Nothing below may import it."""

GATES = {"moec.compiler.gates", "moec.compiler.report"}
PARTS = {"moec.passes", "moec.quantize", "moec.targets"}

# An import that joins two parts on purpose: the importer's prefix, then what it may import besides its own layer.
ALLOWED = {
    "moec.passes": {"moec.quantize"},
    "moec.targets": {"moec.quantize", "moec.passes.base"},
}

HEAVY = {"torch", "transformers", "onnx", "onnx_ir", "onnxruntime", "coremltools", "ai_edge_litert", "tensorrt_rtx"}


def modules() -> Iterator[tuple[str, Path]]:
    for path in [*ROOT.glob("*.py"), *(file for member in MEMBERS for file in (ROOT / member).rglob("*.py"))]:
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(("moec", *(part for part in parts if part != "__init__"))), path


def imports(path: Path, *, runtime: bool) -> set[str]:
    """Every moec module that `path` imports, as far as names tell; `runtime` leaves out TYPE_CHECKING blocks."""
    tree = ast.parse(path.read_text())
    hidden: set[int] = set()
    if runtime:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                hidden |= {id(inner) for statement in node.body for inner in ast.walk(statement)}
    found = set()
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{name.name}" for name in node.names}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    return found


def within(name: str, prefixes: set[str]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


@pytest.mark.parametrize(("name", "path"), list(modules()), ids=lambda item: str(item) if isinstance(item, str) else "")
def test_imports_point_downwards(name: str, path: Path) -> None:
    if within(name, TOP) or name == "moec":
        return
    forbidden = set(TOP)
    if not within(name, GATES):
        forbidden |= GATES - {"moec.compiler.gates"} | {"moec.compiler.gates.run"}
    own = {part for part in PARTS if within(name, {part})}
    if own:
        forbidden |= PARTS - own
    else:
        forbidden |= {"moec.passes", "moec.quantize"}
        forbidden |= {"moec.targets." + folder.name for folder in (ROOT / "targets").iterdir() if folder.is_dir()}
    allowed = set().union(*(extra for prefix, extra in ALLOWED.items() if within(name, {prefix})))
    wrong = {item for item in imports(path, runtime=True) if within(item, forbidden) and not within(item, allowed)}
    assert not wrong, f"{name} imports {sorted(wrong)}"


def test_the_compiler_names_no_target() -> None:
    folders = {folder.name for folder in (ROOT / "targets").iterdir() if (folder / "__init__.py").exists()}
    for name, path in modules():
        if name.startswith("moec.compiler") or name == "moec.cli":
            imported = imports(path, runtime=False)
            assert not {item for item in imported for folder in folders if within(item, {f"moec.targets.{folder}"})}


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
    "name", ["cli", "__init__", "compiler/api", "compiler/run/generate", "compiler/doctor", "targets/base"]
)
def test_what_must_start_fast_imports_nothing_heavy(name: str) -> None:
    assert not module_level_imports(ROOT / f"{name}.py") & HEAVY


def test_the_checks_see_imports(tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    path.write_text("from moec.targets.onnx import target\nif TYPE_CHECKING:\n    import moec.cli\n")
    assert imports(path, runtime=True) == {"moec.targets.onnx.target"}
    assert "moec.cli" in imports(path, runtime=False)
