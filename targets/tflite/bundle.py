"""Writes a `.litertlm` bundle for LiteRT-LM: model, tokenizer and generation settings in one file."""

from __future__ import annotations

import io
import tempfile
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moec.compiler.common.digest import sha256_of_file
from moec.compiler.common.errors import CheckpointError, LoweringError
from moec.compiler.common.model_config import chat_template, end_tokens, read_config
from moec.compiler.text.tokenizer import open_tokenizer
from moec.targets.tflite.library import module

BUNDLE = "model.litertlm"
TOKENIZER = "tokenizer.json"
METADATA, TOKENIZER_PART, MODEL_PART = "LlmMetadataProto", "HF_Tokenizer_Zlib", "TFLiteModel"
_SIZE_BYTES = 8
"""A compressed tokenizer starts with its uncompressed size, a number of this many bytes."""


def write_bundle(directory: Path, model: str, context: int) -> str:
    """Write the bundle from the files in `directory`, read it again, and compare every part with its source.

    Args:
        directory: Holds the model, `tokenizer.json`, and the generation settings if there are any.
        model: File name of the model.
        context: Number of tokens that the KV cache holds.

    Returns:
        File name of the bundle.

    Raises:
        CheckpointError: The checkpoint has no `tokenizer.json`.
        LoweringError: The bundle differs from the files that it was built from.
        MissingExtraError: The package litert-lm-builder is not installed.
    """
    tokenizer = directory / TOKENIZER
    if not tokenizer.is_file():
        raise CheckpointError(
            f"--bundle: the checkpoint has no {TOKENIZER}, which a .litertlm bundle must hold",
            hint="export without --bundle, or save a fast tokenizer, which is tokenizer.json, into the checkpoint",
        )
    builders = module("litert_lm_builder.litertlm_builder")
    metadata = _litert_lm_metadata(directory, context)
    with tempfile.TemporaryDirectory() as folder, _fixed_identity(builders):
        message = Path(folder) / "metadata.pb"
        message.write_bytes(metadata.SerializeToString(deterministic=True))
        builder = builders.LitertLmFileBuilder()
        # LiteRT-LM uses this id as the key of its caches, so it is derived from the model's hash.
        identity = str(uuid.uuid5(uuid.NAMESPACE_OID, sha256_of_file(directory / model)))
        builder.add_system_metadata(builders.Metadata(key="uuid", value=identity, dtype=builders.DType.STRING))
        builder.add_llm_metadata(str(message))
        builder.add_hf_tokenizer(str(tokenizer))
        builder.add_tflite_model(str(directory / model), builders.TfLiteModelType.PREFILL_DECODE)
        with (directory / BUNDLE).open("wb") as stream:
            builder.build(stream)
    _check(directory, model, metadata)
    return BUNDLE


def sections(path: Path) -> dict[str, tuple[int, int]]:
    """LiteRT-LM's name of each section's type -> offsets of its first byte and of the byte after its last."""
    core, peek = module("litert_lm_builder.litertlm_core"), module("litert_lm_builder.litertlm_peek")
    found = peek.read_litertlm_header(str(path), io.StringIO()).SectionMetadata()
    entries = [found.Objects(index) for index in range(found.ObjectsLength())]
    return {
        core.any_section_data_type_to_string(entry.DataType()): (entry.BeginOffset(), entry.EndOffset())
        for entry in entries
    }


def _check(directory: Path, model: str, metadata: Any) -> None:
    path = directory / BUNDLE
    found = sections(path)

    def part(kind: str) -> bytes:
        start, stop = found.get(kind, (0, 0))
        with path.open("rb") as stream:
            stream.seek(start)
            return stream.read(stop - start)

    right = {
        METADATA: part(METADATA) == metadata.SerializeToString(deterministic=True),
        TOKENIZER_PART: zlib.decompress(part(TOKENIZER_PART)[_SIZE_BYTES:]) == (directory / TOKENIZER).read_bytes(),
        MODEL_PART: sha256_of_file(path, *found.get(MODEL_PART, (0, 0))) == sha256_of_file(directory / model),
    }
    if wrong := [name for name, same in right.items() if not same] + sorted(set(found) - set(right)):
        raise LoweringError(
            f"{BUNDLE}: parts differ from the files that they were built from: {', '.join(wrong)}",
            hint="install the version of litert-lm-builder that moec pins: pip install 'moec[tflite]'",
        )


def _litert_lm_metadata(directory: Path, context: int) -> Any:
    """LiteRT-LM's metadata: start and stop tokens, maximum length and chat template."""
    metadata = module("litert_lm_builder.runtime.proto.llm_metadata_pb2").LlmMetadata()
    config, generation = (read_config(directory / name) for name in ("config.json", "generation_config.json"))
    metadata.max_num_tokens = context
    if start := _added_before_text(directory):
        # LiteRT-LM puts it before every prompt, and reads nothing of what tokenizer.json adds. An empty list ends it.
        metadata.start_token.token_ids.ids.extend(start)
    for stop in end_tokens(generation, config):
        metadata.stop_tokens.add().token_ids.ids.append(stop)
    if template := chat_template(directory):
        metadata.jinja_prompt_template = template
    metadata.llm_model_type.generic_model.SetInParent()
    return metadata


def _added_before_text(directory: Path) -> list[int]:
    """Ids that the tokenizer puts before every text, such as that of `<s>`; empty if it adds none."""
    tokenizer = open_tokenizer(directory)
    found, text = (tokenizer.encode("a", add_special_tokens=special).ids for special in (True, False))
    return found[: next((place for place in range(len(found)) if found[place : place + len(text)] == text), 0)]


@contextmanager
def _fixed_identity(builders: Any) -> Iterator[None]:
    """Keep the builder from writing a random id and the time, so that the same recipe gives the same bytes."""
    kept = builders.populate_system_metadata
    builders.populate_system_metadata = list
    try:
        yield
    finally:
        builders.populate_system_metadata = kept
