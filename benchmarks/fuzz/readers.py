"""The readers of files that others write, each with valid documents to start from."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fuzz.documents import Bytes, damaged, edited, places, text_of
from moec.compiler.build.matrix import read_matrix
from moec.compiler.build.model_card import CardMetadata, model_card
from moec.compiler.common.artifact import read_manifest
from moec.compiler.common.digest import sha256_of_text
from moec.compiler.common.errors import ArtifactError
from moec.compiler.ir.safetensors_file import WeightFile
from moec.compiler.pipeline.calibration_file import read_calibration_file
from moec.compiler.pipeline.recipe import Recipe, make_recipe, read_recipe, target_of
from moec.compiler.pipeline.routing import check_routing
from moec.compiler.report import matrix_page
from moec.compiler.report.describe import describe_built
from moec.compiler.report.diff import _facts
from moec.compiler.report.matrix_page import Build
from moec.compiler.report.schema import Machine, Report, read_report
from moec.compiler.report.summary import readme
from moec.compiler.text.tokenizer import encode, open_tokenizer
from moec.quantize.plan import requested

Write = Callable[[Any, Bytes], bytes]


@dataclass(frozen=True)
class Reader:
    """A reader.

    Attributes:
        name: For the table.
        file: Name of the file.
        documents: Valid documents.
        read: Reads the file in a directory.
        write: An edited document -> the bytes of the file.
    """

    name: str
    file: str
    documents: tuple[Any, ...]
    read: Callable[[Path], Any]
    write: Write

    def words(self) -> Sequence[str]:
        """Keys and short texts of the documents, and the keys of recipes."""
        found = dict.fromkeys(Recipe.model_fields)
        for document in self.documents:
            for path in places(document):
                found |= {str(key): None for key in path}
                value = document
                for key in path:
                    value = value[key]
                if isinstance(value, str) and len(value) < 40:
                    found[value] = None
        return tuple(found)

    def content(self, data: bytes, words: Sequence[str]) -> bytes:
        """The file that the bytes of a fuzzer stand for."""
        source = Bytes(data)
        document = self.documents[source.below(len(self.documents))]
        return self.write(edited(document, source, words), source)


def signed(document: Any) -> Any:
    """moec.json with a digest that is right, as somebody who changes it on purpose would write it."""
    if not isinstance(document, dict):
        return document
    rest = {key: value for key, value in document.items() if key != "digest"}
    try:
        text = json.dumps(rest, sort_keys=True, ensure_ascii=False, allow_nan=False)
        return {**rest, "digest": sha256_of_text(text)}
    except ValueError:
        return document


def _json(document: Any, source: Bytes) -> bytes:
    return damaged(text_of(document), source)


def _manifest(document: Any, source: Bytes) -> bytes:
    return damaged(text_of(signed(document)), source)


def _yaml(document: Any, source: Bytes) -> bytes:
    """JSON is YAML; now and then as people write it, in blocks."""
    if source.below(4):
        return _json(document, source)
    return damaged(yaml.safe_dump(document, allow_unicode=True).encode(errors="surrogatepass"), source)


def _safetensors(document: Any, source: Bytes) -> bytes:
    header = damaged(text_of(document), source)
    size = len(header) if source.below(8) else (0, 1, 2**31, 2**63, 2**64 - 1, len(header) - 1)[source.below(6)]
    return struct.pack("<Q", max(0, size)) + header + bytes(_end(document) if source.below(8) else 64)


def _end(document: Any) -> int:
    """Number of bytes that the tensors of a header take, if that is not many."""
    entries = document.values() if isinstance(document, dict) else ()
    offsets = [entry.get("data_offsets") for entry in entries if isinstance(entry, dict)]
    ends = [pair[-1] for pair in offsets if isinstance(pair, list) and pair and isinstance(pair[-1], int)]
    return max(0, min(max(ends, default=0), 4096))


def _read_recipe(directory: Path) -> None:
    fields = read_recipe(directory / "recipe.yaml")
    recipe = make_recipe({"checkpoint": "model", "target": "onnx", **fields}, where="recipe")
    target_of(recipe)
    if recipe.routing is not None:
        check_routing(recipe.routing)
    if recipe.quantize is not None and recipe.quantize.format not in ("auto", "keep"):
        requested(recipe.quantize.format)


def _read_matrix(directory: Path) -> None:
    for cell in read_matrix(directory / "matrix.yaml")[:3]:
        make_recipe(cell.fields, where=cell.name)


def _read_tokenizer(directory: Path) -> None:
    tokenizer = open_tokenizer(directory, ArtifactError)
    tokenizer.decode(encode(tokenizer, "Hello, world", ArtifactError)[:20])


def _read_report(directory: Path) -> None:
    """Show it as a cached cell of a matrix, on the card of a model, and as `moec inspect` does."""
    report = read_report(directory)
    matrix_page.to_html([Build(name, "cached", "", 1.0, report) for name in ("first", "second")])
    model_card({"digest": "", "files": {}}, report, "owner/name", CardMetadata())


def _read_manifest(directory: Path) -> None:
    """Show it as `moec inspect` does, in README.md, and compared with another artifact."""
    manifest = read_manifest(directory)
    describe_built(manifest)
    readme(manifest, {"model.onnx": 7})
    dict(_facts(manifest, EMPTY_REPORT))


EMPTY_REPORT = Report(
    schema_version=1,
    created="",
    exit_code=0,
    verdicts=[],
    timings={},
    machine=Machine(cpu="", cores=1, logical_cores=1, memory_bytes=1, os="", python=""),
    versions={},
    model={},
    recipe={},
    rejections=[],
    files={},
    tensor_bytes={},
)
HEADER = {
    "__metadata__": {"format": "pt"},
    "a.weight": {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]},
    "b": {"dtype": "BF16", "shape": [], "data_offsets": [32, 34]},
    "c": {"dtype": "F8_E4M3", "shape": [3, 0], "data_offsets": [34, 34]},
    "d": {"dtype": "I64", "shape": [1], "data_offsets": [34, 42]},
}
CALIBRATION = {
    "policy": "top-p",
    "checkpoint": {"config.json": "0" * 64},
    "entries": [{"budget": 0.5, "parameters": {"mass": 0.6}, "kept_share": 0.5, "kept_per_layer": [0.5, 0.5]}],
}
RECIPES = (
    {
        "checkpoint": "./model",
        "target": "onnx",
        "dtype": "fp16",
        "options": {"flavor": "web", "experts": "grouped"},
        "quantize": {"format": "int4:32:asym", "rounding": "rtn", "activations": "float"},
        "routing": {"policy": "top-p", "parameters": {"mass": 0.9, "slack": [1.0, 2.0]}, "runtime_input": True},
        "quality": {"max_loss": "1%", "windows": 4, "window": 32},
        "latency": {"budget": {"decode.p50": "12ms"}, "contexts": [128]},
    },
    {
        "target": "tflite",
        "options": {"prefill": [16, 128], "context": 256},
        "quantize": {
            "format": {
                "formats": {"experts_gate_up": "int8:channel:fp32", "attention": "fp16"},
                "overrides": [{"tensor_class": "attention", "layer": 0, "format": "none"}],
            }
        },
        "routing": {"policy": "per-layer", "parameters": {"layers": [None, {"policy": "uniform-k", "k": 2}]}},
        "coverage": {"min": "25%"},
    },
    {"target": "tensorrt", "quantize": "int8", "routing": {"policy": "off", "prune": 0.25, "removed": [[1], [2]]}},
)
MATRICES = (
    {
        "models": {"tiny": "./model", "large": "owner/name"},
        "targets": ["onnx", {"target": "tflite", "options": {"prefill": [16]}}],
        "quantize": [False, "int8", {"format": "int4", "rounding": "rtn"}],
        "routing": ["off", {"policy": "top-p", "budget": 0.6}],
        "common": {"dtype": "fp32", "quality": {"max_loss": "1%"}},
    },
)


def readers(valid: Path) -> tuple[Reader, ...]:
    """All readers.

    Args:
        valid: An artifact, whose moec.json, report.json and tokenizer.json are documents to start from.
    """
    manifest, report, tokenizer = (
        json.loads((valid / name).read_text()) for name in ("moec.json", "report.json", "tokenizer.json")
    )
    return (
        Reader("moec.json", "moec.json", (manifest,), _read_manifest, _manifest),
        Reader("report.json", "report.json", (report,), _read_report, _json),
        Reader("calibration file", "calibration.json", (CALIBRATION,), _read_calibration, _json),
        Reader("recipe", "recipe.yaml", RECIPES, _read_recipe, _yaml),
        Reader("matrix", "matrix.yaml", MATRICES, _read_matrix, _yaml),
        Reader("safetensors header", "model.safetensors", (HEADER,), _read_weights, _safetensors),
        Reader("tokenizer.json", "tokenizer.json", (tokenizer, *TOKENIZERS), _read_tokenizer, _json),
    )


def _read_calibration(directory: Path) -> None:
    read_calibration_file(directory / "calibration.json")


def _read_weights(directory: Path) -> None:
    """Read the header, and the bytes of small tensors."""
    for entry in WeightFile(directory / "model.safetensors").entries():
        if entry.dtype.itemsize and entry.count < 4096:
            entry.source.read(entry.offset, entry.count)


TOKENIZERS = (
    {
        "version": "1.0",
        "added_tokens": [
            {
                "id": 3,
                "content": "<s>",
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        ],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Lowercase"}]},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": "\\w+|[^\\w\\s]+"},
            "behavior": "Isolated",
            "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [3], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 1},
        "padding": {
            "strategy": {"Fixed": 8},
            "direction": "Left",
            "pad_to_multiple_of": 8,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "a",
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "a",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {"a": 0, "b": 1, "ab": 2, "<s>": 3},
            "merges": [["a", "b"]],
        },
    },
    {
        "version": "1.0",
        "pre_tokenizer": {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "split": True},
        "decoder": {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "split": True},
        "model": {"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0], ["b", -1.5]], "byte_fallback": False},
    },
    {
        "version": "1.0",
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {"[UNK]": 0, "a": 1},
        },
    },
)
