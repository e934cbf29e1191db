"""A Hugging Face checkpoint on disk: its config and the index of its safetensors files. No weight is read here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moec.compiler.common.digest import sha256_of_bytes
from moec.compiler.common.errors import CheckpointError, first_line
from moec.compiler.common.files import parse_json
from moec.compiler.common.model_config import LAYER_KEYS
from moec.compiler.frontend.architecture import is_native, notes, read_config
from moec.compiler.frontend.names import plain_names
from moec.compiler.frontend.source import resolve
from moec.compiler.frontend.stored import float_tensors, stored_format
from moec.compiler.ir.safetensors_file import DTYPES, StoredEntry, WeightFile
from moec.compiler.ir.weights import LazyTensor, Stored

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

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


_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Keys of config.json that hold the number of experts."""
_WIDTHS = ("hidden_size", "intermediate_size", "moe_intermediate_size", "head_dim", "num_attention_heads", "vocab_size")
"""Keys of config.json that hold the length of an axis of some tensor, or a factor of it."""
_PACKED = 64
"""Most values of a row that a stored format packs into one entry."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory; made by `Checkpoint.open`."""

    directory: Path
    raw_config: Mapping[str, Any]
    trust_remote_code: bool = False
    config_digest: str = ""

    @classmethod
    def open(cls, location: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> Checkpoint:
        """Open a directory or a hub id.

        Args:
            location: Directory or hub id.
            revision: Branch, tag or commit on the hub.
            trust_remote_code: Run modelling code of the checkpoint where transformers has none for it.

        Raises:
            CheckpointError: It is not a checkpoint, or it is damaged.
            UnsupportedModelError: Its weights are stored in a format that moec does not read.
        """
        directory = resolve(str(location), revision)
        data = _read(directory, directory / "config.json")
        raw = _parse(directory / "config.json", data)
        checkpoint = cls(directory, raw, trust_remote_code, sha256_of_bytes(data))
        if checkpoint.quantization:
            stored_format(checkpoint.quantization, directory)
        return checkpoint

    @property
    def quantization(self) -> Mapping[str, Any]:
        """The quantization_config of config.json; empty where the weights are plain floats.

        A multimodal release may have it in its text_config.
        """
        text = self.raw_config.get("text_config")
        inner = text.get("quantization_config") if isinstance(text, dict) else None
        found = self.raw_config.get("quantization_config") or self.raw_config.get("compression_config") or inner
        return found if isinstance(found, dict) else {}

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The typed config of transformers.

        Raises:
            UnsupportedModelError: transformers does not know it, and no code of the checkpoint may be run.
            CheckpointError: transformers refuses its values.
        """
        self._check_counts()
        config = read_config(self.directory, self.raw_config, trust_remote_code=self.trust_remote_code)
        for part in (config, config.get_text_config()):
            # moec decodes the weights itself, so transformers must build a model with float weights.
            part.__dict__.pop("quantization_config", None)
        return config

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences for the user about how the checkpoint is read."""
        return notes(self.raw_config)

    def _check_counts(self) -> None:
        """Refuse impossible counts and widths in config.json before transformers makes objects and tables of them.

        Raises:
            CheckpointError: It has more layers than there are tensors, more experts than tensors and than entries in
                the longest axis, or an axis that is longer than any tensor's.
        """
        try:
            entries = self.entries
        except CheckpointError:
            return  # without files there is nothing to compare with
        longest = max((size for entry in entries.values() for size in entry.shape), default=0)
        limits = {
            **dict.fromkeys(LAYER_KEYS, len(entries)),
            **dict.fromkeys(_EXPERTS, max(longest, len(entries))),
            **dict.fromkeys(_WIDTHS, _PACKED * longest),
        }
        parts = (self.raw_config, *(value for value in self.raw_config.values() if isinstance(value, dict)))
        for part in parts:
            for key, limit in limits.items():
                count = part.get(key)
                if isinstance(count, int) and count > limit:
                    raise CheckpointError(
                        f"{self.directory / 'config.json'}: {key} is {count}, but the files hold {len(entries)} "
                        f"tensors with axes of at most {longest}",
                        hint="config and weights disagree: does this config.json belong to these weights?",
                    )

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """The safetensors files, sorted by name.

        Raises:
            CheckpointError: There are none, or a file that the index names is missing.
        """
        single, index = self.directory / "model.safetensors", self.directory / INDEX
        if index.is_file():
            weight_map = _parse(index, _read(self.directory, index)).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
                weight_map = None
            if not weight_map:
                raise CheckpointError(f"{index}: it has no weight_map", hint="download the file again")
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
    def opened(self) -> tuple[WeightFile, ...]:
        """`files`, opened. Later reads, digests included, see the files as they were at this moment.

        Raises:
            CheckpointError: There are none, or one cannot be opened or is a link that leads out of the checkpoint.
        """
        return tuple(WeightFile(inside(self.directory, file)) for file in self.files)

    @cached_property
    def entries(self) -> Mapping[str, StoredEntry]:
        """Tensor name in the files -> entry, from the headers alone.

        Raises:
            CheckpointError: A file is truncated or is not a safetensors file.
        """
        return {entry.name: entry for file in self.opened for entry in file.entries()}

    @cached_property
    def tensors(self) -> Mapping[str, LazyTensor]:
        """Name -> float tensor. Names are without the prefixes of training wrappers; codes are decoded on demand.

        Raises:
            CheckpointError: The names are those of an adapter, or a part of a quantized tensor is missing.
            UnsupportedModelError: The weights are stored in a format that moec does not read.
        """
        return float_tensors(plain_names(self.entries, self.directory), self.quantization, self.directory)

    @cached_property
    def weights(self) -> Mapping[str, LazyTensor]:
        """The readable ones of `tensors`; a tensor that nothing needs may have a dtype that moec cannot read."""
        return {name: tensor for name, tensor in self.tensors.items() if readable(tensor)}

    @property
    def stored_plainly(self) -> bool:
        """Whether the files hold the weights as floats under the same names as `tensors`."""
        return not self.quantization and self.tensors.keys() == self.entries.keys()

    @cached_property
    def digests(self) -> Mapping[str, str]:
        """Path below the directory -> sha256, for config.json, every weight file and the code that runs.

        Raises:
            CheckpointError: A weight file was written to after it was opened.
        """
        names = [file.relative_to(self.directory).as_posix() for file in self.files]
        weights = {name: file.sha256() for name, file in zip(names, self.opened, strict=True)}
        code = () if is_native(self.raw_config) else sorted(self.directory.glob("*.py"))
        run = {path.name: sha256_of_bytes(_read(self.directory, path)) for path in code}
        return {"config.json": self.config_digest, **weights, **run}

    def companions(self) -> tuple[Path, ...]:
        """Files that are copied into every artifact: configs and the tokenizer.

        Raises:
            CheckpointError: One is a link that leads out of the checkpoint.
        """
        names = ("config.json", "generation_config.json", *TOKENIZER_FILES)
        paths = (self.directory / name for name in names)
        return tuple(inside(self.directory, path) for path in paths if path.is_file())


def readable(tensor: LazyTensor) -> bool:
    """Whether `tensor` can be used as a weight: it has a known dtype and is not fp8, which would lack its scales."""
    return not isinstance(tensor, Stored) or (tensor.entry.kind in DTYPES and not tensor.entry.kind.startswith("F8"))


def inside(directory: Path, path: Path) -> Path:
    """Return `path` after checking that it resolves to a file of the checkpoint in `directory`.

    In the cache of the hub, files in `snapshots/REVISION/` are links to `blobs/` of the same repository.

    Raises:
        CheckpointError: It resolves to another place.
    """
    home = directory.resolve()
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    target = path.resolve()
    if not any(target.is_relative_to(allowed) for allowed in homes):
        raise CheckpointError(
            f"{path}: leads out of the checkpoint, to {target}",
            hint="put the file itself there, or give the directory that holds it",
        )
    return path


def _read(directory: Path, path: Path) -> bytes:
    try:
        return inside(directory, path).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {first_line(error)}", hint="download the file again") from error


def _parse(path: Path, data: bytes) -> dict[str, Any]:
    return parse_json(path, data, CheckpointError, hint="download the file again")
