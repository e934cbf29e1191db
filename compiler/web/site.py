"""A folder that any static server can serve: the page, its packages, and an artifact with the digests of its pieces.

```
site/ index.html  style.css  *.js  site.json  vendor/<packages>  model/<files of the artifact>
```
`site.json` describes the model to the page. Every file of the model has the SHA-256 of moec.json there and, since
browsers digest only what is whole in memory, one for each piece of it, by which the page checks what it gets.
"""

from __future__ import annotations

import importlib.resources
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moec.compiler.common.artifact import MANIFEST, read_manifest, verify
from moec.compiler.common.digest import sha256_of_bytes, sha256_of_file
from moec.compiler.common.errors import ArtifactError
from moec.compiler.common.model_config import (
    chat_template,
    context_length,
    end_tokens,
    read_config,
    text_config,
    token_ids,
)
from moec.compiler.common.progress import Progress
from moec.compiler.common.staging import check_output, staged
from moec.compiler.pipeline.stages import Stages, silent
from moec.compiler.run.chat import special_tokens
from moec.compiler.text.sampling import Sampling, sampling_of
from moec.compiler.text.tokenizer import encode, open_tokenizer
from moec.compiler.web.budget import BUDGET, budget_curve
from moec.compiler.web.packages import copy_packages
from moec.targets import get_target

if TYPE_CHECKING:
    from moec.targets.base import BrowserModel

SCHEMA = 1
SITE, MODEL, VENDOR = "site.json", "model", "vendor"
PIECE_BYTES = 8 << 20
"""Bytes of a file that the page fetches and checks at a time."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
EXPERT_CLASSES = ("experts_down", "experts_gate_up")
"""Classes of tensors that hold experts."""
PROBE = "The list of arguments is as follows:"
"""Text by which the page compares WebAssembly with WebGPU."""
RUNTIMES = {
    "wasm": ("ort.wasm.min.mjs", "ort-wasm-simd-threaded"),
    "webgpu": ("ort.webgpu.min.mjs", "ort-wasm-simd-threaded.asyncify"),
}
"""Backend -> module of onnxruntime-web, and name of its loader and its binary."""
MOST_DECODED, MOST_PACKED = 2_600_000_000, 1_000_000_000
"""Bytes of weights up to which the page decodes codes once, and up to which it packs weights as well."""


@dataclass(frozen=True)
class Site:
    """What `make_site` wrote.

    Attributes:
        directory: The folder.
        model_bytes: Size of the files of the model.
        page_bytes: Size of the page and its packages.
    """

    directory: Path
    model_bytes: int
    page_bytes: int


def make_site(
    artifact: Path, output: Path, *, packages: Path | None = None, title: str = "", progress: Progress = silent
) -> Site:
    """Write the page of an artifact.

    Args:
        artifact: The artifact.
        output: Directory that does not exist or is empty.
        packages: Folder with the npm packages; None: npm fetches them.
        title: Heading of the page; by default the name of the artifact's directory.
        progress: Told of each step.

    Returns:
        What was written.

    Raises:
        ArtifactError: The artifact is damaged, or has no tokenizer.
        UsageError: It does not run in a browser, or `packages` lacks one.
        MissingExtraError: npm cannot fetch the packages.
        OutputError: `output` cannot be written.
    """
    stages = Stages(progress)
    check_output(output.expanduser().resolve())
    with stages("check the artifact"):
        digests = verify(artifact)
        manifest = read_manifest(artifact)
        model = get_target(str(manifest.get("recipe", {}).get("target"))).open_for_browser(artifact)
    with staged(output) as directory:
        with stages("packages"):
            vendor = copy_packages(directory / VENDOR, packages)
        with stages("copy the model"):
            page = [*_copy_page(directory), *(f"{VENDOR}/{name}" for name in vendor if "asyncify" not in name)]
            files = _copy_model(artifact, directory, model, digests)
        with stages("describe the model"):
            content = {**describe(artifact, manifest, model), **_contents(files, page, model.decoded_bytes)}
            content["name"] = title or artifact.expanduser().resolve().name
        (directory / SITE).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    return Site(output, content["bytes"], size - content["bytes"])


RUNTIME_BYTES = 300_000_000
"""Memory of the page apart from the model, roughly."""


def _contents(files: Sequence[Mapping[str, Any]], page: Sequence[str], decoded: int) -> dict[str, Any]:
    """What the page must know of files and memory, and the files that make it work without a network."""
    size = sum(item["bytes"] for item in files)
    decodes = size + decoded <= MOST_DECODED
    return {
        "files": list(files),
        "bytes": size,
        "piece_size": PIECE_BYTES,
        "page": sorted(page),
        # The files are in memory beside the weights that the runtime makes of them.
        "memory": RUNTIME_BYTES + 2 * size + (decoded if decodes else 0),
        "session": _session_options(size + decoded, decodes=decodes),
    }


def _session_options(size: int, *, decodes: bool) -> dict[str, str]:
    """Options of the session: whether it decodes weights once, and whether it packs them, for their size again."""
    options = {"qdq_matmulnbits_accuracy_level": "0"}
    if decodes:
        options["disable_quant_qdq"] = "1"
    if size > MOST_PACKED:
        options["disable_prepacking"] = "1"
    return options


def _copy_page(directory: Path) -> list[str]:
    """Copy the hand-written files of the page, and return their names."""
    names = []
    folder = importlib.resources.files("moec") / "compiler" / "web" / "page"
    for source in sorted(folder.iterdir(), key=lambda item: item.name):
        (directory / source.name).write_bytes(source.read_bytes())
        names.append(source.name)
    return names


def _copy_model(
    artifact: Path, directory: Path, model: BrowserModel, digests: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Copy what the page reads of the artifact, and return name, size and digests of each file.

    Raises:
        ArtifactError: A file is missing.
    """
    names = [MANIFEST, *(name for name in TOKENIZER_FILES if name in digests), *model.data]
    if TOKENIZER_FILES[0] not in names:
        raise ArtifactError(f"{artifact}: it has no {TOKENIZER_FILES[0]}", hint="the page needs it to read text")
    files = []
    for name in names:
        path = directory / MODEL / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(artifact / name, path)
        files.append(_entry(directory, path, digests.get(name) or sha256_of_file(path)))
    graph = directory / MODEL / model.path
    graph.write_bytes(model.graph)
    # The graph has more outputs than that of the artifact, so its digest is not in moec.json.
    return [*files, _entry(directory, graph, sha256_of_bytes(model.graph))]


def _entry(directory: Path, path: Path, digest: str) -> dict[str, Any]:
    size = path.stat().st_size
    starts = range(0, size, PIECE_BYTES)
    pieces = [sha256_of_file(path, start, min(start + PIECE_BYTES, size)) for start in starts]
    return {"path": path.relative_to(directory).as_posix(), "bytes": size, "sha256": digest, "pieces": pieces}


def describe(artifact: Path, manifest: Mapping[str, Any], model: BrowserModel) -> dict[str, Any]:
    """What the page must know of the model, apart from its files.

    Raises:
        ArtifactError: A file of the artifact is damaged.
    """
    config = read_config(artifact / "config.json")
    generation = read_config(artifact / "generation_config.json")
    where = str(artifact / "generation_config.json")
    layers = manifest["model"]["moe_layers"]
    template = chat_template(artifact)
    tokenizer = open_tokenizer(artifact, ArtifactError)
    probe = encode(tokenizer, PROBE, ArtifactError)
    return {
        "schema": SCHEMA,
        "digest": manifest["digest"],
        "facts": _facts(manifest),
        "model": {"graph": f"{MODEL}/{model.path}", "data": [f"{MODEL}/{name}" for name in model.data]},
        "states": manifest["signature"]["states"],
        "routing": [
            {"indices": indices, "weights": weights, "experts": layer["num_experts"]}
            for (indices, weights), layer in zip(model.routing, layers, strict=True)
        ],
        "budget": budget_curve(manifest, model, tokenizer) if BUDGET in model.scalars else None,
        "sampling": _chosen(sampling_of(generation, {}, where=where)),
        "drawn": _chosen(sampling_of(generation, {"temperature": 1.0}, where=where)),
        "start_tokens": list(token_ids("bos_token_id", generation, config, text_config(config))),
        "end_tokens": list(end_tokens(generation, config)),
        "context_length": context_length(config),
        "chat": template and {"template": template, "special_tokens": special_tokens(artifact)},
        "probe": probe,
        "runtimes": {
            name: {key: f"{VENDOR}/onnxruntime-web/{file}" for key, file in _runtime_files(*files).items()}
            for name, files in RUNTIMES.items()
        },
    }


def _facts(manifest: Mapping[str, Any]) -> str:
    """A sentence on the model."""
    model, recipe = manifest["model"], manifest["recipe"]
    total, active = (model["parameters"][key] for key in ("total", "active"))
    layers = model["moe_layers"]
    kind = ", ".join(model.get("architectures") or [str(model.get("model_type", "a model"))])
    classes = manifest.get("quantization", {}).get("classes", {})
    coded = (form for name in EXPERT_CLASSES for form in classes.get(name, {}).get("formats", {}))
    form = str(next(coded, recipe.get("dtype"))).partition(":")[0]
    words = f"{kind}: {_count(total)} parameters, of which {_count(active)} compute each token; {len(layers)} layers"
    if layers:
        words += f" of {layers[0]['num_experts']} experts, of which a token uses {layers[0]['top_k']}"
    return f"{words}, in {form}."


def _count(number: int) -> str:
    return f"{number / 1e9:.1f} billion" if number >= 1e9 else f"{number / 1e6:.1f} million"


def _runtime_files(module: str, binary: str) -> dict[str, str]:
    return {"module": module, "loader": f"{binary}.mjs", "wasm": f"{binary}.wasm"}


def _chosen(sampling: Sampling) -> dict[str, Any]:
    return sampling.model_dump(exclude={"seed"})
