"""GGUF files in llama.cpp, through llama-cpp-python and the reader of the package gguf.

A GGUF file holds weights and settings, and llama.cpp builds the graph of the architecture that it names. The cache is
kept in float32, so that only the file is judged and not the cache that llama.cpp rounds to half precision by default.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import gguf
import llama_cpp
import numpy as np
from gguf.quants import dequantize

from moec.compiler.common.errors import ArtifactError, CheckpointError, first_line
from moec.compiler.common.model_config import context_length
from moec.compiler.common.threads import threads_for
from moec.compiler.foreign.binding import Bindings
from moec.compiler.foreign.cost import per_layer
from moec.compiler.foreign.model import Choices, Cost, ForeignModel, Unseen
from moec.compiler.ir.program import Program
from moec.targets.model_files import Operator, StoredTensor
from moec.targets.runners import Runner, RunnerLimits

CONTEXT = 4096
"""Most tokens of a sequence, since llama.cpp allocates its cache at once."""

_FLOATS: Mapping[str, tuple[str, float]] = {
    "F32": ("fp32", 32),
    "F16": ("fp16", 16),
    "BF16": ("bf16", 16),
    "F64": ("fp64", 64),
}
_TOP_K = "ffn_moe_topk-"
"""Start of the name that llama.cpp gives to the chosen experts of a layer."""


class GgufModel(ForeignModel):
    """A GGUF file.

    Args:
        path: The file.

    Raises:
        ArtifactError: It is damaged.
    """

    format: ClassVar[str] = "GGUF"

    def __init__(self, path: Path) -> None:
        self.path, self.files = path, (path,)
        try:
            self._reader = gguf.GGUFReader(path)
        except Exception as error:  # the reader raises what numpy raises on a file that is too short
            raise ArtifactError(f"{path}: not a readable GGUF file: {first_line(error)}") from error
        self.producer = f"a writer of GGUF, for the architecture {self._field('general.architecture')}"
        self.runtime = f"llama.cpp of llama-cpp-python {llama_cpp.__version__}, CPU"

    def _field(self, name: str) -> Any:
        field = self._reader.get_field(name)
        return None if field is None else field.contents()

    def tensors(self) -> Sequence[StoredTensor]:
        """Every tensor, decoded by the package gguf."""
        return tuple(_stored(tensor) for tensor in self._reader.tensors)

    def operators(self) -> Sequence[Operator]:
        """None: llama.cpp builds the graph."""
        return ()

    def open(self, program: Program, bindings: Bindings, *, threads: int = 0) -> Runner:  # noqa: ARG002
        """See `ForeignModel.open`; there are no names to bind."""
        return LlamaRunner(self.path, program, self.runtime, threads)

    def choices(self, program: Program, bindings: Bindings) -> Choices | Unseen:  # noqa: ARG002
        """What llama.cpp's nodes `ffn_moe_topk` hold, seen while it computes."""
        watch = _Watch()
        runner = LlamaRunner(self.path, program, self.runtime, 1, watch)

        def chosen(ids: np.ndarray) -> Mapping[int, np.ndarray]:
            watch.found.clear()
            runner.prefill(ids)
            return {number: experts for number, (_, experts) in enumerate(sorted(watch.found.items()))}

        if len(chosen(np.zeros((1, 1), np.int64))) != len(program.layers):
            return Unseen("this release of llama.cpp names the chosen experts otherwise")
        return chosen

    def cost(self, program: Program, bindings: Bindings) -> Cost | Unseen:  # noqa: ARG002
        """llama.cpp multiplies with the chosen experts alone."""
        return Cost(per_layer(program)[0], "llama.cpp's product by index multiplies with the chosen experts alone")


def _stored(tensor: Any) -> StoredTensor:
    """A tensor of the reader, whose shape has the fastest axis first."""
    shape, kind = tuple(int(size) for size in reversed(tensor.shape)), tensor.tensor_type.name
    read: Callable[[], np.ndarray] = partial(_decoded, tensor, shape)
    if kind in _FLOATS:
        return StoredTensor(tensor.name, shape, *_FLOATS[kind], int(tensor.n_bytes), read=read)
    block, size = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
    # Blocks hold scales too: Q4_0 takes 4.5 bits for a value.
    bits = float(8 * size // block)
    return StoredTensor(tensor.name, shape, kind, bits, int(tensor.n_bytes), min(block, 32), read)


def _decoded(tensor: Any, shape: tuple[int, ...]) -> np.ndarray:
    values: np.ndarray = dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(shape)
    return values


class _Tensor(ctypes.Structure):
    """The first fields of `ggml_tensor`."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
    )


class _Watch:
    """Keeps the experts that llama.cpp chooses: layer of the model -> [T, k]."""

    def __init__(self) -> None:
        self.found: dict[int, np.ndarray] = {}
        folder = Path(llama_cpp.__file__).parent / "lib"
        library = next(path for path in sorted(folder.iterdir()) if "ggml-base" in path.name)
        self._ggml = ctypes.CDLL(str(library))
        self._ggml.ggml_get_name.restype, self._ggml.ggml_get_name.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
        self._ggml.ggml_nbytes.restype, self._ggml.ggml_nbytes.argtypes = ctypes.c_size_t, [ctypes.c_void_p]
        self._ggml.ggml_backend_tensor_get.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_size_t] * 2
        self.callback = llama_cpp.llama_cpp.ggml_backend_sched_eval_callback(self._see)

    def _see(self, tensor: int, ask: bool, _: object) -> bool:
        """Called before a node is computed (`ask`: whether its value is wanted) and after."""
        name = self._ggml.ggml_get_name(tensor).decode()
        if name.startswith(_TOP_K) and name.removeprefix(_TOP_K).isdigit():
            if not ask:
                self.found[int(name.removeprefix(_TOP_K))] = self._read(tensor)
            return True
        return not ask

    def _read(self, tensor: int) -> np.ndarray:
        """The indices [T, k], a view of all experts in their order."""
        own = ctypes.cast(tensor, ctypes.POINTER(_Tensor)).contents
        raw = np.zeros(self._ggml.ggml_nbytes(tensor), np.uint8)
        self._ggml.ggml_backend_tensor_get(tensor, raw.ctypes.data, 0, raw.size)
        shape, strides = (own.ne[1], own.ne[0]), (own.nb[1], own.nb[0])
        return np.lib.stride_tricks.as_strided(raw.view(np.int32), shape, strides).copy()


class LlamaRunner(Runner):
    """The Runner of a GGUF file.

    Args:
        path: The file.
        program: The checkpoint's Program, for the vocabulary and the context.
        runtime: Name of the runtime, for the report.
        threads: Threads; 0 is llama.cpp's default.
        watch: Sees the chosen experts, or None.

    Raises:
        ArtifactError: llama.cpp cannot load the file.
        CheckpointError: It has another vocabulary.
    """

    def __init__(self, path: Path, program: Program, runtime: str, threads: int, watch: _Watch | None = None) -> None:
        _SAID.clear()
        llama_cpp.llama_log_set(_note, ctypes.c_void_p(0))
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            said = "".join(_SAID).partition("error loading model: ")[2].strip() or "it does not say why"
            raise ArtifactError(
                f"{path}: {runtime} cannot load it: {said.splitlines()[0]}",
                hint="is its architecture one of this release?",
            )
        size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        if size != program.vocab_size:
            raise CheckpointError(
                f"{path}: it has {size} tokens, and the checkpoint's vocabulary {program.vocab_size}",
                hint="give the checkpoint that the file was made from",
            )
        length = min(CONTEXT, context_length(program.config) or CONTEXT)
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = length
        settings.type_k = settings.type_v = 0  # GGML_TYPE_F32
        settings.flash_attn_type = 0
        settings.no_perf = True
        if wanted := threads_for(threads):
            settings.n_threads = settings.n_threads_batch = wanted
        if watch is not None:
            settings.cb_eval = watch.callback
        self._watch = watch  # llama.cpp calls it as long as the context lives
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        if not self._context:
            raise ArtifactError(f"{path}: {runtime} cannot make a context of {length} tokens")
        self._size, self._facts = size, {"format": "GGUF", "runtime": runtime, "threads": threads, "cache": "float32"}
        self.limits = RunnerLimits(max_batch=1, padding=False, max_sequence=length)
        self._length = 0

    def reset(self) -> None:
        """Drop the sequence."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        self._length = 0

    def decode(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:
        """Continue the sequence; see `moec.targets.runners.Runner`."""
        self.limits.check("GGUF", input_ids, attention_mask, self._length)
        tokens = [int(token) for token in input_ids[0]]
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for index, token in enumerate(tokens):
                batch.token[index], batch.pos[index] = token, self._length + index
                batch.n_seq_id[index], batch.seq_id[index][0], batch.logits[index] = 1, 0, 1
            if code := llama_cpp.llama_decode(self._context, batch):
                raise ArtifactError(f"llama.cpp cannot compute a step of {len(tokens)} tokens (code {code})")
            self._length += len(tokens)
            return np.stack([self._logits(index) for index in range(len(tokens))])[None]
        finally:
            llama_cpp.llama_batch_free(batch)

    def _logits(self, index: int) -> np.ndarray:
        pointer = llama_cpp.llama_get_logits_ith(self._context, index)
        return np.ctypeslib.as_array(pointer, (self._size,)).copy()

    def facts(self) -> Mapping[str, Any]:
        """Runtime, its version, threads and the precision of the cache."""
        return self._facts

    def __del__(self) -> None:
        """Free the context and the weights, which Python does not know of."""
        if getattr(self, "_context", None):
            llama_cpp.llama_free(self._context)
        if getattr(self, "_model", None):
            llama_cpp.llama_model_free(self._model)


_SAID: deque[str] = deque(maxlen=100)
"""What llama.cpp printed last, for the message of an error."""


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _note(_level: int, text: bytes, _data: object) -> None:
    _SAID.append(text.decode(errors="replace"))
