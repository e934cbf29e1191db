"""Make `import moec` mean this checkout, installed or not, whatever its folder is called; shared fixtures."""

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before torch is imported: workers that each use all cores only get in each other's way.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[1]

_spec = importlib.util.spec_from_file_location("moec", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
assert _spec is not None
assert _spec.loader is not None
moec = importlib.util.module_from_spec(_spec)
sys.modules["moec"] = moec
_spec.loader.exec_module(moec)


@pytest.fixture(scope="session")
def golden_model() -> Path:
    """The trained checkpoint that is kept in the repository."""
    return ROOT / "golden_models" / "olmoe-tiny"


@pytest.fixture(scope="session")
def golden_onnx(golden_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden model as an ONNX artifact, with a chat template beside it. Tests that change it copy it first."""
    directory = tmp_path_factory.mktemp("golden") / "onnx"
    moec.export(golden_model, target="onnx", output=directory, gates=False)
    turn = "<|endoftext|>{{ m.role }}{{ '\\n' }}{{ m.content }}"
    template = f"{{% for m in messages %}}{turn}{{% endfor %}}<|endoftext|>assistant{{{{ '\\n' }}}}"
    (directory / "chat_template.jinja").write_text(template)
    return directory


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Directory of a tiny random checkpoint of a family or of a released model, written once per session."""
    from moec.compiler.families.released_models import write_released_checkpoint
    from moec.compiler.families.tiny_models import family_names, write_tiny_checkpoint

    written: dict[str, Path] = {}

    def checkpoint(family: str) -> Path:
        if family not in written:
            write = write_tiny_checkpoint if family in family_names() else write_released_checkpoint
            written[family] = write(family, tmp_path_factory.mktemp(family))
        return written[family]

    return checkpoint


@pytest.fixture(scope="session")
def capture_of(golden_model: Path, tiny_checkpoint: Callable[[str], Path]) -> Iterator[Callable[..., Any]]:
    """The Program of a checkpoint as captured in a dtype (float32): a directory, "golden", or for `tiny_checkpoint`.

    It is traced once per session. Whatever tests do with it, it must be as it was at their end: no pass, target or gate
    changes a Program.
    """
    import torch

    from moec.compiler.frontend.capture import capture
    from moec.compiler.frontend.checkpoint import Checkpoint
    from moec.compiler.ir.printing import format_graph

    held: dict[tuple[Path, torch.dtype], tuple[Any, str]] = {}

    def captured(checkpoint: str | Path, dtype: torch.dtype = torch.float32) -> Any:
        if isinstance(checkpoint, Path):
            directory = checkpoint
        else:
            directory = golden_model if checkpoint == "golden" else tiny_checkpoint(checkpoint)
        if (directory, dtype) not in held:
            program = capture(Checkpoint.open(directory), dtype=dtype)
            held[directory, dtype] = program, format_graph(program)
        return held[directory, dtype][0]

    yield captured
    for key, (program, text) in held.items():
        assert format_graph(program) == text, f"a test changed the Program of {key}"


@pytest.fixture(scope="session")
def program_of(capture_of: Callable[..., Any]) -> Callable[..., Any]:
    """The Program of a checkpoint, given as to `capture_of`, after the passes that every target starts from.

    `later`: Passes to run after them.
    """
    from moec import passes

    common = passes.default_passes()
    held: dict[int, Any] = {}

    def prepared(*checkpoint: Any, later: Sequence[Any] = (), **dtype: Any) -> Any:
        captured = capture_of(*checkpoint, **dtype)
        if id(captured) not in held:
            held[id(captured)] = passes.run_passes(captured, common)[0]
        program = held[id(captured)]
        return passes.run_passes(program, later, completed=[item.name for item in common])[0] if later else program

    return prepared


@pytest.fixture
def fake_target(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Install the target of `tests/plugin` through its entry point, here and, by the environment, in subprocesses."""
    from moec import targets

    site = tmp_path_factory.mktemp("site")
    shutil.copy(ROOT / "tests" / "plugin" / "moec_fake.py", site)
    metadata = site / "moec_fake-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: moec-fake\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[moec.targets]\nfake = moec_fake:FakeTarget\n")
    monkeypatch.syspath_prepend(site)
    targets._table.cache_clear()
    yield {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])}
    targets._table.cache_clear()
    sys.modules.pop("moec_fake", None)
