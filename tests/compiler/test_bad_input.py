"""Every bad input ends with a message, a hint and its exit code; nothing half-written stays and nothing is lost."""

import functools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moec import cli
from moec.compiler.frontend.checkpoint import INDEX

Tiny = Callable[[str], Path]
PROGRAM = [sys.executable, "-c", "from moec.cli import main; main()"]
WEIGHTS = "model.safetensors"
pytestmark = pytest.mark.usefixtures("fake_target")


@pytest.fixture
def checkpoint(tiny_checkpoint: Tiny, tmp_path: Path) -> Path:
    """A checkpoint to break."""
    return Path(shutil.copytree(tiny_checkpoint("olmoe"), tmp_path / "checkpoint"))


def export(checkpoint: Path | str, *flags: str, target: str = "fake") -> int:
    out = Path(checkpoint).parent / "out"
    return cli.dispatch(["export", str(checkpoint), "-t", target, "-o", str(out), "--no-gates", "-q", *flags])


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def change_config(checkpoint: Path, **values: Any) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_weights(checkpoint: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(checkpoint / WEIGHTS)
    change(tensors)
    save_file(tensors, checkpoint / WEIGHTS, metadata={"format": "pt"})


def no_config(checkpoint: Path) -> None:
    (checkpoint / "config.json").unlink()


def no_weights(checkpoint: Path) -> None:
    (checkpoint / WEIGHTS).unlink()


def pickled_weights(checkpoint: Path) -> None:
    (checkpoint / WEIGHTS).rename(checkpoint / "pytorch_model.bin")


def missing_shard(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / WEIGHTS)
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, held in shards.items():
        save_file({name: tensors[name] for name in held}, checkpoint / shard, metadata={"format": "pt"})
    weight_map = {name: shard for shard, held in shards.items() for name in held}
    (checkpoint / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (checkpoint / WEIGHTS).unlink()
    (checkpoint / "model-00002-of-00002.safetensors").unlink()


def truncated(checkpoint: Path) -> None:
    os.truncate(checkpoint / WEIGHTS, (checkpoint / WEIGHTS).stat().st_size - 4096)


def truncated_in_its_header(checkpoint: Path) -> None:
    os.truncate(checkpoint / WEIGHTS, 100)


def nan(checkpoint: Path) -> None:
    edit_weights(
        checkpoint, lambda tensors: tensors["model.layers.1.mlp.experts.3.up_proj.weight"][5, 7].fill_(torch.nan)
    )


def infinity(checkpoint: Path) -> None:
    edit_weights(checkpoint, lambda tensors: tensors["model.norm.weight"][3].fill_(-torch.inf))


def codes_without_scales(checkpoint: Path) -> None:
    edit_weights(
        checkpoint,
        lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"].to(torch.float8_e4m3fn)}),
    )


def unknown_dtype(checkpoint: Path) -> None:
    edit_header(checkpoint, "model.norm.weight", dtype="F6_E2M3")


def edit_header(checkpoint: Path, tensor: str, **values: Any) -> None:
    data = (checkpoint / WEIGHTS).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header[tensor].update(values)
    text = json.dumps(header).encode()
    (checkpoint / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def negative_shape(checkpoint: Path) -> None:
    edit_header(checkpoint, "model.norm.weight", shape=[-64])


def shape_of_words(checkpoint: Path) -> None:
    edit_header(checkpoint, "model.norm.weight", shape="64")


def shape_that_is_larger(checkpoint: Path) -> None:
    edit_header(checkpoint, "model.norm.weight", shape=[128])


def header_of_three_gigabytes(checkpoint: Path) -> None:
    with (checkpoint / WEIGHTS).open("wb") as file:
        file.write((3 << 30).to_bytes(8, "little"))
        file.truncate((3 << 30) + 8)


def nested_header(checkpoint: Path) -> None:
    text = b"[" * 100_000
    (checkpoint / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text)


def nested_config(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text('{"a":' * 100_000)


def header_that_is_a_list(checkpoint: Path) -> None:
    (checkpoint / WEIGHTS).write_bytes((2).to_bytes(8, "little") + b"[]")


def index_of_wrong_types(checkpoint: Path) -> None:
    (checkpoint / INDEX).write_text(json.dumps({"weight_map": {"a": 1}}))


def shard_outside(checkpoint: Path) -> None:
    shutil.copy(checkpoint / WEIGHTS, checkpoint.parent.parent / "outside.safetensors")
    (checkpoint / INDEX).write_text(json.dumps({"weight_map": {"a": "../../outside.safetensors"}}))


def adapter_in_the_files(checkpoint: Path) -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    edit_weights(checkpoint, lambda tensors: tensors.update({name: torch.zeros(4, 64)}))


def flattened_by_fsdp(checkpoint: Path) -> None:
    edit_weights(checkpoint, lambda tensors: tensors.update({"model.layers.0._flat_param": torch.zeros(4)}))


def two_of_one_name(checkpoint: Path) -> None:
    edit_weights(
        checkpoint,
        lambda tensors: tensors.update({"_orig_mod.model.norm.weight": tensors["model.norm.weight"].clone()}),
    )


def other_width(checkpoint: Path) -> None:
    change_config(checkpoint, intermediate_size=40)


def more_layers(checkpoint: Path) -> None:
    change_config(checkpoint, num_hidden_layers=3)


def huge_width(checkpoint: Path) -> None:
    change_config(checkpoint, hidden_size=10**9)


def fewer_experts(checkpoint: Path) -> None:
    change_config(checkpoint, num_experts=6)


def missing_tensor(checkpoint: Path) -> None:
    edit_weights(checkpoint, lambda tensors: tensors.pop("lm_head.weight"))


def damaged_config(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text('{"model_type": "olmoe"')


def unknown_model(checkpoint: Path) -> None:
    change_config(checkpoint, model_type="no_such_model")


def remote_code(checkpoint: Path) -> None:
    change_config(checkpoint, model_type="no_such_model", auto_map={"AutoModelForCausalLM": "modeling.Mine"})


def quantized(checkpoint: Path) -> None:
    change_config(checkpoint, quantization_config={"quant_method": "hqq"})


@pytest.mark.parametrize(
    ("damage", "code", "words"),
    [
        (no_config, 10, ["not a checkpoint", "config.json"]),
        (no_weights, 10, ["no model.safetensors"]),
        (pickled_weights, 10, ["only pytorch_model.bin", "safe_serialization"]),
        (missing_shard, 10, ["missing shard model-00002-of-00002.safetensors", "1 of 2"]),
        (truncated, 10, ["model.safetensors: truncated", "download"]),
        (truncated_in_its_header, 10, ["truncated in its header"]),
        (nan, 10, ["model.layers.1.mlp.experts.3.up_proj.weight holds NaN", "stage: lower"]),
        (infinity, 10, ["model.norm.weight holds NaN or infinity (1 of"]),
        (unknown_dtype, 10, ["model.norm.weight has dtype F6_E2M3", "bfloat16"]),
        (codes_without_scales, 10, ["model.norm.weight has dtype F8_E4M3", "bfloat16"]),
        (negative_shape, 10, ["entry of tensor model.norm.weight is damaged", "[-64]"]),
        (shape_of_words, 10, ["entry of tensor model.norm.weight is damaged"]),
        (shape_that_is_larger, 10, ["model.norm.weight: shape [128] in F32 does not take 256 bytes"]),
        (header_of_three_gigabytes, 10, ["its header claims 3221225472 bytes"]),
        (nested_header, 10, ["truncated in its header"]),
        (nested_config, 10, ["config.json: cannot be read as JSON"]),
        (header_that_is_a_list, 10, ["its header is not a JSON object"]),
        (index_of_wrong_types, 10, ["no weight_map"]),
        (shard_outside, 10, ["leads out of the checkpoint"]),
        (adapter_in_the_files, 10, ["an adapter that is not merged", "lora_A", "merge_and_unload"]),
        (flattened_by_fsdp, 10, ["flattened parameters of FSDP"]),
        (two_of_one_name, 10, ["_orig_mod.model.norm.weight", "training wrapper"]),
        (other_width, 10, ["mlp.experts", "[8, 96, 64]", "[8, 80, 64]", "disagree"]),
        (more_layers, 10, ["tensors that config.json asks for", "model.layers.2"]),
        (fewer_experts, 10, ["mlp", "disagree"]),
        (huge_width, 10, ["hidden_size is 1000000000", "axes of at most 128"]),
        (missing_tensor, 10, ["lm_head.weight"]),
        (damaged_config, 10, ["cannot be read as JSON"]),
        (unknown_model, 3, ["no_such_model"]),
        (remote_code, 3, ["auto_map", "--trust-remote-code"]),
        (quantized, 3, ["the weights are quantized (hqq)", "moec reads awq, bitsandbytes", "dequantized"]),
    ],
)
def test_bad_checkpoints(
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    code: int,
    words: list[str],
) -> None:
    damage(checkpoint)
    assert export(checkpoint) == code
    text = capsys.readouterr().err
    assert "Traceback" not in text
    assert text.startswith("error: ")
    assert "\nhint: " in text
    for word in words:
        assert word in text, text
    assert names(checkpoint.parent) == ["checkpoint"]


def test_a_dense_model_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24}
    config = LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    assert export(tmp_path / "dense") == 3
    assert "LlamaForCausalLM is a dense model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("location", "words"), [("./nowhere", "does not exist"), (__file__, "is a file"), ("nowhere", "does not exist")]
)
def test_no_checkpoint_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], location: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.dispatch(["export", location, "-t", "fake", "-o", "out"]) == 10
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_hub_that_cannot_be_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub

    def refuse(*_args: object, **_kwargs: object) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    assert cli.dispatch(["export", "someone/some-model", "-t", "fake", "-o", str(tmp_path / "out")]) == 10
    assert "the hub does not deliver it: no connection" in capsys.readouterr().err


def test_outputs_are_checked_before_any_work(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = checkpoint.parent / "out"
    remote_code(checkpoint)  # would be found next
    out.write_text("mine")
    assert export(checkpoint) == 11
    assert "is a file" in capsys.readouterr().err
    assert out.read_text() == "mine"
    out.unlink()
    out.mkdir()
    (out / "thesis.tex").write_text("mine")
    assert export(checkpoint, "--overwrite") == 11
    assert "holds files that are not an artifact" in capsys.readouterr().err
    assert names(out) == ["thesis.tex"]


@pytest.fixture
def small_files(checkpoint: Path) -> Iterator[None]:  # noqa: ARG001 - the checkpoint is written before
    """No file may grow beyond 50 kB: writing then fails as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize("target", ["fake", "onnx"])
def test_a_disk_that_is_full_in_the_middle(checkpoint: Path, capsys: pytest.CaptureFixture[str], target: str) -> None:
    assert export(checkpoint, target=target) == 11
    assert "no space left" in capsys.readouterr().err
    assert "out" not in names(checkpoint.parent)
    assert not list(checkpoint.parent.glob(".out*"))


def interrupt(checkpoint: Path, environment: dict[str, str], number: signal.Signals) -> int:
    """Start an export, send it a signal in the middle of writing, and return its exit status."""
    out = checkpoint.parent / "out"
    command = [
        "export",
        str(checkpoint),
        "-t",
        "fake",
        "-o",
        str(out),
        "--no-gates",
        "-q",
        "--delay",
        "60",
        "--overwrite",
    ]
    marker = checkpoint.parent / "in-the-middle"
    # A shell starts what runs in the background with SIGINT ignored, and children inherit that.
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(
        [*PROGRAM, *command],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heard,
    ) as process:
        for _ in range(1200):
            if marker.exists() or process.poll() is not None:
                break
            time.sleep(0.1)
        marker.unlink()
        assert list(checkpoint.parent.glob(".out.partial-*/model.bin"))
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
    assert "Traceback" not in errors
    return process.returncode


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_in_the_middle(
    checkpoint: Path, fake_target: dict[str, str], number: signal.Signals, code: int
) -> None:
    assert interrupt(checkpoint, fake_target, number) == code
    assert names(checkpoint.parent) == ["checkpoint"]


def test_killed_in_the_middle_loses_nothing_and_is_cleaned_by_the_next_export(
    checkpoint: Path, fake_target: dict[str, str]
) -> None:
    assert export(checkpoint) == 0
    before = (checkpoint.parent / "out" / "moec.json").read_bytes()
    assert interrupt(checkpoint, fake_target, signal.SIGKILL) == -signal.SIGKILL
    assert (checkpoint.parent / "out" / "moec.json").read_bytes() == before
    assert cli.dispatch(["verify", str(checkpoint.parent / "out")]) == 0
    assert list(checkpoint.parent.glob(".out.partial-*"))
    assert export(checkpoint, "--overwrite") == 0
    assert not list(checkpoint.parent.glob(".out*"))
