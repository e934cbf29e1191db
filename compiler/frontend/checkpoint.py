"""A Hugging Face checkpoint on disk: its config and the index of its safetensors files. Reads no weight."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moec.compiler.errors import CheckpointError, UnsupportedModelError, first_line
from moec.compiler.frontend.architecture import is_native, notes, read_config
from moec.compiler.frontend.source import resolve

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Safetensors dtype names that moec reads. Quantized storage (F8_*, F4, ...) is not among them."""

INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)


@dataclass(frozen=True, slots=True)
class StoredEntry:
    """Where a tensor lies: file, name, shape and dtype."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory, opened. Use `Checkpoint.open`."""

    directory: Path
    raw_config: Mapping[str, Any]
    trust_remote_code: bool = False

    @classmethod
    def open(cls, location: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> Checkpoint:
        """Open a directory or a hub id.

        Args:
            location: Directory or hub id.
            revision: Branch, tag or commit on the hub.
            trust_remote_code: Run modelling code of the checkpoint where transformers has none for it.

        Raises:
            CheckpointError: Not a checkpoint, or damaged.
            UnsupportedModelError: It is stored quantized.
        """
        directory = resolve(str(location), revision)
        raw = _read_json(directory / "config.json")
        if quantized := raw.get("quantization_config"):
            method = quantized.get("quant_method", "unknown") if isinstance(quantized, dict) else "unknown"
            raise UnsupportedModelError(
                f"{directory}: the weights are stored quantized ({method}); moec quantizes from float weights",
                hint="save it dequantized first: from_pretrained(..., dtype='bfloat16').save_pretrained(...)",
            )
        return cls(directory, raw, trust_remote_code)

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The typed config of transformers.

        Raises:
            UnsupportedModelError: transformers does not know it, and no code of the checkpoint may be run.
            CheckpointError: transformers refuses its values.
        """
        return read_config(self.directory, self.raw_config, trust_remote_code=self.trust_remote_code)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know about how the checkpoint is read."""
        return notes(self.raw_config)

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """The safetensors files in the order of their names.

        Raises:
            CheckpointError: There are none, or one that the index names is missing.
        """
        single, index = self.directory / "model.safetensors", self.directory / INDEX
        if index.is_file():
            weight_map = _read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise CheckpointError(f"{index}: no weight_map in it", hint="download the file again")
            files = tuple(self.directory / name for name in sorted(set(weight_map.values())))
            if missing := [file.name for file in files if not file.is_file()]:
                raise CheckpointError(
                    f"{self.directory}: missing shard {', '.join(missing)} ({len(missing)} of {len(files)})",
                    hint="download the missing files; the index names them all",
                )
            return files
        if single.is_file():
            return (single,)
        others = sorted(path.name for path in self.directory.glob("*.bin"))
        raise CheckpointError(
            f"{self.directory}: no model.safetensors and no {INDEX}"
            + (f", only {', '.join(others[:3])}" if others else ""),
            hint="save it with save_pretrained(..., safe_serialization=True)"
            if others
            else "is this the right directory?",
        )

    @cached_property
    def entries(self) -> Mapping[str, StoredEntry]:
        """Tensor name -> entry, from the headers alone.

        Raises:
            CheckpointError: A file is truncated, no safetensors file, or holds a dtype that moec does not read.
        """
        entries: dict[str, StoredEntry] = {}
        for file in self.files:
            for entry in _read_header(file):
                entries[entry.name] = entry
        return entries

    @cached_property
    def digests(self) -> Mapping[str, str]:
        """File name -> sha256 of config.json, every weight file, and of code that runs."""
        code = () if is_native(self.raw_config) else sorted(self.directory.glob("*.py"))
        files = (self.directory / "config.json", *self.files, *code)
        return {file.name: sha256(file) for file in files}

    def companions(self) -> tuple[Path, ...]:
        """Files that travel with every artifact: configs and the tokenizer."""
        names = ("config.json", "generation_config.json", *TOKENIZER_FILES)
        return tuple(path for name in names if (path := self.directory / name).is_file())


def sha256(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: cannot be read as JSON: {first_line(error)}", hint="download the file again"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a JSON object", hint="download the file again")
    return value


def _read_header(file: Path) -> list[StoredEntry]:
    """Read a safetensors header: 8 bytes of length, JSON, then the data."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = int.from_bytes(prefix, "little")
        header = stream.read(length) if len(prefix) == 8 and length <= size - 8 else b""
    try:
        table = json.loads(header)
    except ValueError as error:
        raise CheckpointError(
            f"{file}: no safetensors file, or truncated in its header", hint="download the file again"
        ) from error
    table.pop("__metadata__", None)
    expected = 8 + length + max((entry["data_offsets"][1] for entry in table.values()), default=0)
    if size != expected:
        raise CheckpointError(
            f"{file}: truncated: it has {size} bytes and its header describes {expected}",
            hint="download the file again",
        )
    if unknown := sorted(name for name, entry in table.items() if entry["dtype"] not in DTYPES):
        dtype = table[unknown[0]]["dtype"]
        raise CheckpointError(
            f"{file}: tensor {unknown[0]} has dtype {dtype}, which moec does not read ({len(unknown)} such tensors)",
            hint="save the checkpoint as float32, float16 or bfloat16",
        )
    return [StoredEntry(file, name, tuple(entry["shape"]), DTYPES[entry["dtype"]]) for name, entry in table.items()]
