"""What is read of a checkpoint: one snapshot of its files, the names of its tensors, and nothing outside of it."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moec import cli
from moec.compiler.common.errors import CheckpointError, out_of_memory
from moec.compiler.frontend.capture import capture
from moec.compiler.frontend.checkpoint import INDEX, Checkpoint

Tiny = Callable[[str], Path]
WEIGHTS = "model.safetensors"
NORM = "model.norm.weight"


@pytest.fixture
def checkpoint(tiny_checkpoint: Tiny, tmp_path: Path) -> Path:
    """A checkpoint to change."""
    return Path(shutil.copytree(tiny_checkpoint("olmoe"), tmp_path / "checkpoint"))


def edit(checkpoint: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    tensors = change(load_file(checkpoint / WEIGHTS))
    save_file({name: value.contiguous() for name, value in tensors.items()}, checkpoint / WEIGHTS)


def other_weights(checkpoint: Path) -> Path:
    """Weights of the same names and shapes and other values, beside the checkpoint."""
    path = checkpoint.parent / "other.safetensors"
    save_file({name: value + 1 for name, value in load_file(checkpoint / WEIGHTS).items()}, path)
    return path


def test_a_file_that_is_renamed_over_changes_nothing(checkpoint: Path) -> None:
    digest = hashlib.sha256((checkpoint / WEIGHTS).read_bytes()).hexdigest()
    before = load_file(checkpoint / WEIGHTS)[NORM].clone()
    opened = Checkpoint.open(checkpoint)
    assert opened.entries
    other_weights(checkpoint).replace(checkpoint / WEIGHTS)
    assert torch.equal(opened.tensors[NORM].read(), before)
    assert opened.digests[WEIGHTS] == digest


def test_a_file_that_is_written_to_is_noticed(checkpoint: Path) -> None:
    opened = Checkpoint.open(checkpoint)
    assert opened.entries
    data = other_weights(checkpoint).read_bytes()
    with (checkpoint / WEIGHTS).open("r+b") as file:
        file.write(data)
    os.utime(checkpoint / WEIGHTS, ns=(1, 1))
    with pytest.raises(CheckpointError, match="changed while moec read it"):
        opened.tensors[NORM].read()
    with pytest.raises(CheckpointError, match="changed while moec read it"):
        _ = opened.digests


def test_a_file_that_is_cut_off_is_noticed(checkpoint: Path) -> None:
    opened = Checkpoint.open(checkpoint)
    last = max(opened.entries.values(), key=lambda entry: entry.offset)
    os.truncate(checkpoint / WEIGHTS, last.offset + 1)
    with pytest.raises(CheckpointError, match=r"truncated|changed"):
        opened.tensors[last.name].read()


def test_shards_of_one_name_in_two_folders_have_a_digest_each(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / WEIGHTS)
    names = sorted(tensors)
    weight_map = {}
    for folder, held in (("a", names[::2]), ("b", names[1::2])):
        (checkpoint / folder).mkdir()
        save_file({name: tensors[name] for name in held}, checkpoint / folder / "part.safetensors")
        weight_map |= dict.fromkeys(held, f"{folder}/part.safetensors")
    (checkpoint / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (checkpoint / WEIGHTS).unlink()
    digests = Checkpoint.open(checkpoint).digests
    assert set(digests) == {"config.json", "a/part.safetensors", "b/part.safetensors"}
    assert len(set(digests.values())) == 3
    assert digests["config.json"] == hashlib.sha256((checkpoint / "config.json").read_bytes()).hexdigest()


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "generation_config.json", "tokenizer.json"])
def test_links_that_leave_the_checkpoint_are_refused(checkpoint: Path, name: str) -> None:
    outside = checkpoint.parent / "outside"
    if (checkpoint / name).exists():
        (checkpoint / name).rename(outside)
    else:
        outside.write_text("{}")
    (checkpoint / name).symlink_to(outside)
    out = checkpoint.parent / "out"
    arguments = ["export", str(checkpoint), "-t", "onnx", "-o", str(out), "--no-gates", "-q"]
    assert cli.dispatch(arguments) == 10
    assert not out.exists()


def test_the_cache_of_the_hub_is_read(checkpoint: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in checkpoint.iterdir():
        blob = blobs / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", blob.name))
    opened = Checkpoint.open(snapshot)
    assert set(opened.digests) == {"config.json", WEIGHTS}
    assert {path.name for path in opened.companions()} >= {"config.json", "generation_config.json"}


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_fsdp_wrapped_module."])
def test_prefixes_of_training_wrappers_go(checkpoint: Path, prefix: str) -> None:
    plain = set(Checkpoint.open(checkpoint).tensors)
    edit(checkpoint, lambda tensors: {prefix + name: value for name, value in tensors.items()})
    opened = Checkpoint.open(checkpoint)
    assert set(opened.tensors) == plain
    assert not opened.stored_plainly


def test_wrappers_of_single_layers_go(checkpoint: Path) -> None:
    plain = set(Checkpoint.open(checkpoint).tensors)
    edit(
        checkpoint,
        lambda tensors: {name.replace(".mlp.", "._checkpoint_wrapped_module.mlp."): v for name, v in tensors.items()},
    )
    assert set(Checkpoint.open(checkpoint).tensors) == plain


def test_a_dtype_that_nothing_needs_is_no_fault(checkpoint: Path) -> None:
    unused = {
        "mtp.proj.weight": torch.zeros(16, 16).to(torch.float8_e4m3fn),
        "freqs": torch.zeros(2, dtype=torch.complex64),
    }
    edit(checkpoint, lambda tensors: {**tensors, **unused})
    opened = Checkpoint.open(checkpoint)
    assert "mtp.proj.weight" not in capture(opened).weights
    assert "mtp.proj.weight" not in opened.weights
    with pytest.raises(CheckpointError, match="freqs has dtype C64"):
        opened.tensors["freqs"].read()


@pytest.mark.parametrize("same", [False, True])
def test_a_stored_head_wins_over_a_tie(checkpoint: Path, tmp_path: Path, same: bool) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    if same:
        edit(checkpoint, lambda tensors: {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    program = capture(Checkpoint.open(checkpoint))
    assert (program.weights.resolve("lm_head.weight") == "model.embed_tokens.weight") is same
    stored = load_file(checkpoint / WEIGHTS)
    assert torch.equal(program.weights.read("lm_head.weight"), stored["lm_head.weight"])
    said = [] if same else ["lm_head.weight = model.embed_tokens.weight"]
    assert [item.where for item in program.rejections] == said
    if not same:
        out = tmp_path / "out"
        assert cli.dispatch(["export", str(checkpoint), "-t", "onnx", "-o", str(out), "-q"]) == 0
        assert "were kept, as in transformers" in (out / "moec.json").read_text()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"num_experts": 10**9}, "num_experts is 1000000000"),
        ({"num_hidden_layers": "2"}, "expected int, got str"),
        ({"num_hidden_layers": None}, "expected int, got NoneType"),
        ({"vocab_size": 1.5}, "expected int, got float"),
        ({"rope_parameters": 7}, "transformers refuses it"),
    ],
)
def test_values_of_the_config_that_make_no_sense(checkpoint: Path, values: dict[str, object], words: str) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    with pytest.raises(CheckpointError, match=words) as refused:
        _ = Checkpoint.open(checkpoint).config
    assert refused.value.hint


def test_little_memory_is_said(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def starve(*_: object, **__: object) -> None:
        torch.empty(1 << 56, dtype=torch.uint8)

    monkeypatch.setattr("moec.compiler.pipeline.export.compile_recipe", starve)
    assert cli.dispatch(["export", str(checkpoint), "-t", "onnx", "-o", str(checkpoint.parent / "out")]) == 10
    assert "not enough memory" in capsys.readouterr().err
    assert out_of_memory(RuntimeError("another")) is None
    assert out_of_memory(MemoryError()) is not None
    assert out_of_memory(SystemError("error return without exception set")) is not None
