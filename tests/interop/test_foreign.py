"""Model files that other exporters make here, each in its own environment: right ones, and ones with a fault put in.

With `--foreign-table FILE` the verdicts, times and memory are written as a table (docs/foreign.md).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from moec.compiler.families.tiny_models import write_tiny_checkpoint
from tests.support.environments import environment, lines, packages_of
from tests.support.onnx_faults import attribute, exchange_tensors, with_fault

pytestmark = pytest.mark.interop
HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
GATES = ("parity: artifact", "coverage", "integrity", "routing", "operators", "repeatability", "divergence")
ROWS: list[str] = []


@dataclass(frozen=True)
class Judged:
    """What `moec validate --json` answered, and what it cost."""

    answer: dict[str, Any]
    exit_code: int

    def status(self, gate: str) -> str:
        return next((v["status"] for v in self.answer["verdicts"] if v["gate"] == gate), "")

    def summary(self, gate: str) -> str:
        return next(v["summary"] for v in self.answer["verdicts"] if v["gate"] == gate)

    @property
    def failed(self) -> list[str]:
        return [v["gate"] for v in self.answer["verdicts"] if v["status"] == "fail"]

    @property
    def unused(self) -> str:
        return str(self.answer["foreign"]["unused_expert"])


@pytest.fixture(scope="module")
def tools() -> Callable[[str], Path]:
    """Name of a tool -> the python of its environment."""
    os.environ["CMAKE_ARGS"] = (
        "-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DLLAVA_BUILD=OFF -DMTMD_BUILD=OFF"
    )

    def python(name: str) -> Path:
        guest = name == "genai"  # it runs on the libraries that moec is tested with
        return environment(name, lines(HERE / f"{name}-requirements.txt"), beside=guest, alone=guest)

    return python


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which this checkout is the package `moec`."""
    folder = tmp_path_factory.mktemp("package")
    (folder / "moec").symlink_to(ROOT)
    return folder


@pytest.fixture(scope="module", autouse=True)
def table(pytestconfig: pytest.Config) -> Iterator[None]:
    yield
    path = pytestconfig.getoption("--foreign-table", None)
    if path is not None:
        header = "| file | fault | " + " | ".join(GATES) + " | exit code | an unused expert costs | s | peak memory |"
        path.write_text("\n".join([header, "|" + "---|" * (len(GATES) + 6), *ROWS]) + "\n")


def run(command: list[object], **environment: str) -> None:
    done = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture
def judge(package: Path, tmp_path: Path) -> Callable[..., Judged]:
    """File, checkpoint, the name of the row, its fault, and an environment with a runtime -> the verdicts."""

    def judged(path: Path, checkpoint: Path, name: str, fault: str = "", runtime: Path | None = None) -> Judged:
        figures, paths = tmp_path / "figures.json", [str(package)]
        if runtime is not None:
            paths.append(str(packages_of(runtime)))  # after moec's own packages, which come first
        script = f"import sys; sys.path += {paths!r}; sys.argv = sys.argv[1:]; import runpy; "
        script += f"runpy.run_path({str(HERE / 'measure_validate.py')!r}, run_name='__main__')"
        command = [
            sys.executable,
            "-c",
            script,
            "measure",
            figures,
            path,
            "--against",
            checkpoint,
            "-o",
            tmp_path / "r",
        ]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
        assert figures.is_file(), done.stderr[-3000:]
        cost = json.loads(figures.read_text())
        found = Judged(json.loads(done.stdout), cost["exit_code"])
        marks = {"pass": "pass", "fail": "**fail**", "not run": "not run", "": ""}
        cells = [name, fault, *(marks[found.status(gate)] for gate in GATES), str(found.exit_code)]
        cells += [found.unused.partition(":")[0], f"{cost['seconds']:.0f}", f"{cost['peak'] / 1e6:.0f} MB"]
        ROWS.append(f"| {' | '.join(cells)} |")
        return found

    return judged


def checkpoint(tmp_path: Path, family: str, **overrides: Any) -> Path:
    return write_tiny_checkpoint(family, tmp_path / "checkpoint", tokenizer=True, **overrides)


def genai(tools: Callable[[str], Path], tmp_path: Path) -> tuple[Path, Path]:
    source, out = checkpoint(tmp_path, "lfm2_moe"), tmp_path / "out"
    builder = [tools("genai"), "-m", "onnxruntime_genai.models.builder"]
    run([*builder, "-i", source, "-o", out, "-p", "int4", "-e", "cpu", "-c", tmp_path / "cache"])
    return source, out


def test_genai_builder(tools: Callable[[str], Path], judge: Callable[..., Judged], tmp_path: Path) -> None:
    source, out = genai(tools, tmp_path)
    found = judge(out, source, "onnxruntime-genai 0.18.0, LFM2-MoE, int4")
    assert found.exit_code == 0
    assert found.status("integrity") == found.status("routing") == "pass"
    assert found.unused.startswith("nothing")
    assert "int4, block 32" in {row["precision"] for row in found.answer["foreign"]["tensors"]}


def test_genai_builder_with_codes_of_floats(
    tools: Callable[[str], Path], judge: Callable[..., Judged], tmp_path: Path
) -> None:
    source, out = genai(tools, tmp_path)
    fault = with_fault(out, tmp_path / "fault", attribute("QMoE", "quant_type", "fp4"))
    found = judge(fault, source, "onnxruntime-genai 0.18.0, LFM2-MoE, int4", "`quant_type` fp4")
    assert (found.exit_code, found.failed) == (5, ["operators"])
    assert "quant_type is fp4, but the codes are read as integers" in found.summary("operators")


def test_transformers_onnx_exporter(judge: Callable[..., Judged], tmp_path: Path) -> None:
    source, out = checkpoint(tmp_path, "olmoe"), tmp_path / "out"
    run([sys.executable, ROOT / "benchmarks" / "export_with_transformers.py", source, out])
    found = judge(out, source, "transformers 5.24.0 OnnxExporter, OLMoE, fp32")
    assert found.exit_code == 0
    assert found.status("routing") == "pass"
    assert found.unused.startswith("nothing")


def optimum(tools: Callable[[str], Path], tmp_path: Path) -> tuple[Path, Path]:
    source, out = checkpoint(tmp_path, "qwen3_moe"), tmp_path / "out"
    # transformers 4.57 knows these keys by their old names.
    config = json.loads((source / "config.json").read_text())
    config |= {"num_experts": config["num_local_experts"], "rope_theta": config["rope_parameters"]["rope_theta"]}
    (source / "config.json").write_text(json.dumps(config))
    command = [tools("optimum").parent / "optimum-cli", "export", "onnx", "--model", source]
    run([*command, "--task", "text-generation-with-past", out])
    return source, out


def test_optimum_with_exchanged_experts(
    tools: Callable[[str], Path], judge: Callable[..., Judged], tmp_path: Path
) -> None:
    source, out = optimum(tools, tmp_path)
    fault = with_fault(out, tmp_path / "fault", exchange_down_projections)
    found = judge(fault, source, "optimum-onnx 0.1.0, Qwen3-MoE, fp32", "two experts exchanged")
    assert found.exit_code == 5
    assert {"parity: artifact", "coverage", "integrity"} <= set(found.failed)
    assert "model.layers.1.mlp.experts 2, 5" in found.summary("coverage")


def exchange_down_projections(model: Any) -> None:
    """Exchange experts 2 and 5 of the first MoE layer, whose anonymous weights are found by shape and order."""
    names = [tensor.name for tensor in model.graph.initializer if list(tensor.dims) == [48, 64]]
    order = {name: place for place, node in enumerate(model.graph.node) for name in node.input}
    names.sort(key=lambda name: order[name])
    exchange_tensors(names[2], names[5])(model)


def test_mobius(tools: Callable[[str], Path], judge: Callable[..., Judged], tmp_path: Path) -> None:
    source, out = checkpoint(tmp_path, "qwen3_moe", mlp_only_layers=[]), tmp_path / "out"
    run([tools("mobius").parent / "mobius", "build", "--config", source, out])
    found = judge(out, source, "mobius-onnx 0.1.0, Qwen3-MoE, fp32")
    assert found.exit_code == 0
    assert found.unused.startswith("as much as one that is used: one token computes 8 of 8")


LLAMA_CPP = {"intermediate_size": 96, "num_key_value_heads": 4}
"""llama.cpp's OLMoE has no grouped queries, and its blocks of 32 must divide the width of an expert."""


def test_gguf(tools: Callable[[str], Path], judge: Callable[..., Judged], tmp_path: Path) -> None:
    source, out, python = checkpoint(tmp_path, "olmoe", **LLAMA_CPP), tmp_path / "model.gguf", tools("gguf")
    run([python, HERE / "write_gguf.py", source, out, 2, 2])
    found = judge(out, source, "GGUF of llama.cpp, OLMoE, Q4_0", runtime=python)
    assert found.exit_code == 0
    assert found.status("routing") == found.status("integrity") == "pass"
    assert "Q4_0" in {row["precision"] for row in found.answer["foreign"]["tensors"]}


def test_gguf_with_fewer_experts(tools: Callable[[str], Path], judge: Callable[..., Judged], tmp_path: Path) -> None:
    source, out, python = checkpoint(tmp_path, "olmoe", **LLAMA_CPP), tmp_path / "model.gguf", tools("gguf")
    run([python, HERE / "write_gguf.py", source, out, 1])
    found = judge(out, source, "GGUF of llama.cpp, OLMoE, fp32", "top-1 in place of top-2", runtime=python)
    assert found.exit_code == 5
    assert {"parity: artifact", "coverage", "routing"} <= set(found.failed)
    assert found.status("integrity") == "pass"


def test_openvino(tools: Callable[[str], Path], judge: Callable[..., Judged], tmp_path: Path) -> None:
    source, out, python = checkpoint(tmp_path, "qwen3_moe"), tmp_path / "out", tools("openvino")
    script = f"import sys; sys.path.append({str(packages_of(python))!r}); sys.argv = sys.argv[1:]; import runpy; "
    script += f"runpy.run_path({str(HERE / 'export_openvino.py')!r}, run_name='__main__')"
    run([sys.executable, "-c", script, "export", source, out])
    found = judge(out, source, "transformers 5.24.0 OpenVINOExporter, Qwen3-MoE, fp32", runtime=python)
    assert found.exit_code == 0
    assert found.status("routing") == "pass"
    assert "GatherMatmul" in found.unused


def test_codes_of_openvino(tools: Callable[[str], Path], package: Path, tmp_path: Path) -> None:
    script = (
        f"import sys; sys.path += {[str(package), str(packages_of(tools('openvino')))]!r}; sys.argv = sys.argv[1:]; "
    )
    script += f"import runpy; runpy.run_path({str(HERE / 'check_openvino_codes.py')!r}, run_name='__main__')"
    command = [sys.executable, "-c", script, "check", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (four, error_of_four), (eight, error_of_eight) = json.loads(done.stdout.splitlines()[-1])
    assert (four, eight) == ("int4, block 32", "int8")
    assert 0.05 < error_of_four < 0.1
    assert 0.001 < error_of_eight < 0.01


def litert(tools: Callable[[str], Path], tmp_path: Path, source: Path, *more: str) -> Path:
    out = tmp_path / "model.tflite"
    run([tools("litert"), HERE / "export_tflite.py", source, out, *more])
    return out


def test_litert_torch(tools: Callable[[str], Path], judge: Callable[..., Judged], tmp_path: Path) -> None:
    source = checkpoint(tmp_path, "olmoe")
    found = judge(litert(tools, tmp_path, source, "int8"), source, "litert-torch 0.10.0, OLMoE, int8")
    assert found.exit_code == 0
    assert found.unused.startswith("nothing")
    rejected = {row["where"]: row["reason"] for row in found.answer["rejections"]}
    assert "they are not quantized, though others are" in rejected["experts"]
    assert "it is quantized" in rejected["router"]


def test_litert_torch_without_renormalisation(
    tools: Callable[[str], Path], judge: Callable[..., Judged], tmp_path: Path
) -> None:
    source, wrong = checkpoint(tmp_path, "olmoe", norm_topk_prob=True), tmp_path / "wrong"
    shutil.copytree(source, wrong)
    config = json.loads((wrong / "config.json").read_text()) | {"norm_topk_prob": False}
    (wrong / "config.json").write_text(json.dumps(config))
    found = judge(litert(tools, tmp_path, wrong), source, "litert-torch 0.10.0, OLMoE, fp32", "no renormalisation")
    assert found.exit_code == 5
    assert {"parity: artifact", "coverage"} <= set(found.failed)
    assert found.status("integrity") == "pass"


def coreml(tmp_path: Path, source: Path, *more: str) -> Path:
    out = tmp_path / "model.mlpackage"
    run([sys.executable, HERE / "export_coreml.py", source, out, *more])
    return out


def test_coremltools(judge: Callable[..., Judged], tmp_path: Path) -> None:
    source = checkpoint(tmp_path, "olmoe")
    found = judge(coreml(tmp_path, source, "palette"), source, "coremltools 9.0, OLMoE, palettes of 4 bits")
    assert found.exit_code == 0
    assert found.status("integrity") == found.status("routing") == "pass"
    assert found.unused.startswith("nothing")
    assert "palette of 16" in {row["precision"] for row in found.answer["foreign"]["tensors"]}


def test_coremltools_with_exchanged_experts(judge: Callable[..., Judged], tmp_path: Path) -> None:
    source, wrong = checkpoint(tmp_path, "olmoe"), tmp_path / "wrong"
    shutil.copytree(source, wrong)
    exchange_in_checkpoint(wrong / "model.safetensors", "model.layers.1.mlp.experts.{}.down_proj.weight", 2, 5)
    found = judge(coreml(tmp_path, wrong), source, "coremltools 9.0, OLMoE, fp32", "two experts exchanged")
    assert found.exit_code == 5
    assert {"parity: artifact", "coverage", "integrity"} <= set(found.failed)
    assert "model.layers.1.mlp.experts 2, 5" in found.summary("coverage")


def exchange_in_checkpoint(file: Path, name: str, *experts: int) -> None:
    """Exchange a matrix of two experts."""
    tensors = load_file(file)
    first, second = (name.format(expert) for expert in experts)
    tensors[first], tensors[second] = tensors[second], tensors[first]
    save_file(tensors, file, metadata={"format": "pt"})
