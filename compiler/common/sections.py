"""Types of the sections that moec.json and report.json share, as far as what shows an artifact reads them.

The files may have more keys, and older ones fewer. A value of another type is an error where the file is read, and not
where it is shown.
"""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

LARGEST = 1 << 63


def _counted(value: int) -> int:
    if not 0 <= value < LARGEST:
        raise ValueError(f"it must lie between 0 and {LARGEST}")
    return value


Count = Annotated[int, AfterValidator(_counted)]
"""A number of bytes, weights or layers."""


def _present(value: Any) -> Any:
    if value is None:
        raise ValueError("it must not be null")
    return value


PRESENT = BeforeValidator(_present)
"""Of a key that may be missing, and not null."""
Number = Annotated[float, Field(allow_inf_nan=True)]


class Part(BaseModel):
    """A section that may have more keys."""

    model_config = ConfigDict(extra="allow", strict=True)


class Layer(Part):
    """A MoE layer."""

    num_experts: Count
    top_k: Count
    intermediate_size: Count


class Parameters(Part):
    """Numbers of weights."""

    total: Count
    active: Count


class States(Part):
    """What a sequence keeps from step to step."""

    count: Count
    kinds: list[str]
    bytes_per_token: Count
    cache_dtypes: list[str] = []
    bytes_fixed: Count = 0


class SourceModel(Part):
    """The model before pruning."""

    moe_layers: list[Layer] = []
    parameters: Annotated[Parameters | None, PRESENT] = None


class Model(Part):
    """What `moec.compiler.measure.summary.model_summary` returns."""

    model_type: str = ""
    architectures: list[str] = []
    moe_layers: list[Layer] = []
    layers: Count = 0
    parameters: Annotated[Parameters | None, PRESENT] = None
    states: Annotated[States | None, PRESENT] = None
    vocab_size: Count | None = None
    max_position_embeddings: Count | None = None
    notes: list[str] = []
    left_out: dict[str, Count] = {}
    source: SourceModel = SourceModel()

    @model_validator(mode="after")
    def _complete(self) -> Self:
        needed = {"states", "layers", "moe_layers", "vocab_size", "max_position_embeddings"}
        if "parameters" in self.model_fields_set and (missing := sorted(needed - self.model_fields_set)):
            raise ValueError(f"it has parameters, but no {missing[0]}")
        given = self.source.model_fields_set
        if given and (missing := sorted({"parameters", "moe_layers"} - given)):
            raise ValueError(f"its source has no {missing[0]}")
        return self


class Phase(Part):
    """The accounting of one phase."""

    executed_flops_share: Annotated[Number | None, PRESENT] = None


class LayerShare(Part):
    """The accounting of one layer."""

    kept_share: Number


class Paged(Part):
    """What a token reads from disk at one size of memory."""

    memory_share: Number
    hit_rate: Number
    read_share: Number


class Accounting(Part):
    """What dynamic routing saves."""

    phases: dict[str, Phase] = {}
    layers: list[LayerShare] = []
    kept_share: Number | None = None
    paging: list[Paged] = []


class Pruning(Part):
    """Numbers of experts that were removed, by layer."""

    removed: list[Count] = []


class Routing(Part):
    """Decisions and savings of dynamic routing."""

    policy: str | None = None
    parameters: dict[str, Any] | None = None
    accounting: Accounting = Accounting()
    pruning: Pruning = Pruning()


class WeightClass(Part):
    """Formats of a tensor class, and how often each occurs."""

    formats: dict[str, Count] = {}
    relative_error: Number | None = None


class KvCache(Part):
    """Format of the KV cache, and digests of its scales."""

    format: str
    scales: Annotated[dict[str, str] | None, PRESENT] = None


class Quantization(Part):
    """Decisions and errors of quantization."""

    classes: dict[str, WeightClass] = {}
    kv_cache: Annotated[KvCache | None, PRESENT] = None
    kept: dict[str, dict[str, Count]] = {}


class RecordedRecipe(Part):
    """The recipe, as far as it is shown; `make_recipe` checks it when an artifact is validated."""

    target: str = ""
    dtype: str = ""
    options: dict[str, Any] = {}


class Source(Part):
    """The checkpoint."""

    digests: dict[str, str] = {}
    bytes: Count | None = None


class Facts(Part):
    """What was built."""

    ops: dict[str, Any] = {}


class Summary(BaseModel):
    """What `moec.compiler.report.summary.summarise` returns, as the page of a matrix shows it."""

    model_config = ConfigDict(extra="allow")

    bytes: Count
    ratio: Number | None = None
    perplexity_increase: Number | None = None
    tokens_per_second: dict[str, Number] = {}


class Value(Part):
    """A measured value."""

    value: Number


class Quantiles(Part):
    """Quantiles of the times of a step."""

    p50: Value


class Times(Part):
    """Times of one artifact."""

    wall: Quantiles


class Workload(Part):
    """What the latency gate measured."""

    candidate: Times | None = None


class Figures(Part):
    """Figures of a gate."""

    increase: Number | None = None
    workloads: dict[str, Workload] = {}
