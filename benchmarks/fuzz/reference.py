"""The judge's reference: the model of transformers, eager and in float32, with what the recipe asks for done to it.

Weights are rounded by `rounding`, slots are dropped by `slots` where a module of the experts registry is called, and
experts are pruned by making a smaller model. Noise of the size of a runtime's rounding shows which positions are
unstable: there, two routers' scores are nearly equal.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fuzz import rounding, slots

ROUTER = re.compile(r"\.(router|gate|router_gate|classifier|e_score_correction_bias)(\.|$)")
ATTENTION = re.compile(r"\.(self_attn|attn|attention|self_attention|linear_attn|mamba|mixer|conv)(\.|$)")
FEED_FORWARD = re.compile(r"\.(shared_experts?|experts)\.")
DECAY = re.compile(
    r"\.(in_proj_a|in_proj_b|in_proj_ba|b_proj|forget_gate\.f_a_proj|forget_gate\.f_b_proj|f_proj|mamba\.dt_proj)$"
)
"""Linears that only compute the decay or the update rate of a scan."""
MINIMUM_ROWS = 16
LENGTH_DEPENDENT = re.compile(r'"(rope_type|type)": "(dynamic|longrope)"')
_EXPERTS = ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts")
_RENAMED = {"kimi_k2": "deepseek_v3", "hunyuan": "hunyuan_v1_moe"}


@dataclass(frozen=True)
class Noise:
    """Sizes of random changes, each relative to the largest value of its row.

    Attributes:
        everywhere: At the outputs of linears, experts and embeddings.
        products: At the inputs of products with a quantized weight.
    """

    everywhere: float
    products: float = 0.0


class Reference:
    """A model of transformers.

    Args:
        directory: The checkpoint.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.text = (directory / "config.json").read_text()
        self.model = load(directory)
        self.decoder = decoder_of(self.model)
        self.by_steps = bool(LENGTH_DEPENDENT.search(self.text))
        self.quantized: frozenset[str] = frozenset()
        """Names of the modules whose weights are rounded."""
        self._borders: list[tuple[Tensor, Tensor, Tensor]] = []
        """Parameters with weights in the middle between two codes: their data, and both ways to round them."""

    @property
    def layers(self) -> list[tuple[str, nn.Module]]:
        """The experts modules of the registry, in order, by name."""
        return [(name, own) for name, own in self.decoder.named_modules() if hasattr(own, "_is_expert_parallel")]

    def prune(self, removed: Sequence[Sequence[int]]) -> None:
        """Replace the model by one without these experts of each layer."""
        full, counts = self.decoder, {len(layer) for layer in removed}
        (gone,) = counts
        config = type(full.config).from_dict(full.config.to_dict())
        text = config.get_text_config()
        key = next(key for key in _EXPERTS if isinstance(getattr(text, key, None), int))
        before = getattr(text, key)
        setattr(text, key, before - gone)
        small = type(full)._from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
        owners = [name.rpartition(".")[0] for name, _ in self.layers]
        with torch.no_grad():
            wanted = small.state_dict()
            for name, value in full.state_dict().items():
                wanted[name].copy_(_without(name, value, wanted[name].shape, before, owners, removed))
        set_eager_experts(small)
        self.model = self.decoder = small

    def quantize(self, forms: Mapping[str, str], overrides: Sequence[Mapping[str, Any]]) -> None:
        """Round the weights; `forms` are formats by tensor class, and `overrides` those of single layers."""
        done, names = set[int](), set[str]()
        head = self.decoder.get_output_embeddings()
        tied = head is not None and head.weight is self.decoder.get_input_embeddings().weight
        for name, own, parameter, kind in matrices(self.decoder):
            if id(parameter) in done:
                continue
            kind = "lm_head" if tied and kind == "embedding" else kind
            form = _form(forms, overrides, kind, name)
            done.add(id(parameter))
            if form.startswith("int"):
                names.add(name)
            turned = getattr(own, "is_transposed", False) and parameter.ndim == 3
            values = parameter.data.transpose(-1, -2) if turned else parameter.data
            below, new, above = (
                rounding.rounded(values.contiguous(), form, shift) for shift in (-rounding.BORDER, 0.0, rounding.BORDER)
            )
            parameter.data = new.transpose(-1, -2).contiguous() if turned else new
            if not torch.equal(below, above):
                self._borders.append(
                    (parameter.data, *((own.transpose(-1, -2) if turned else own) for own in (below, above)))
                )
        self.quantized = frozenset(names)

    def drop(self, policy: str, parameters: Mapping[str, Any]) -> None:
        """Drop slots whenever experts are called."""
        for index, (_, own) in enumerate(self.layers):

            def change(module: nn.Module, args: Any, given: Any, index: int = index) -> Any:
                bound = inspect.signature(module.forward).bind(*args, **given)
                values = list(bound.arguments.values())
                hidden, indices, weights = values[:3] if len(values) == 3 else _unpacked(values)
                new = slots.dropped(policy, parameters, index, hidden.reshape(-1, hidden.shape[-1]), indices, weights)
                return (hidden, indices, new), {}

            own.register_forward_pre_hook(change, with_kwargs=True)

    @torch.no_grad()
    def logits(self, ids: Tensor, steps: Sequence[int], noise: Noise | None = None, seed: int = 0) -> Tensor:
        """Logits [1, T, V] of one sequence [1, T] without padding, fed at once or, where lengths matter, in steps."""
        with self._disturbed(noise, seed) if noise is not None else contextlib.nullcontext():
            if not self.by_steps:
                return self.decoder(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
            return self._in_steps(ids, steps)

    def _in_steps(self, ids: Tensor, steps: Sequence[int]) -> Tensor:
        # A short sequence resets rotary frequencies that otherwise stay those of the longest sequence so far.
        self.decoder(input_ids=ids[:, :1], use_cache=False)
        takes = inspect.signature(self.decoder.forward).parameters
        name = "cache" if "cache" in takes else "past_key_values"
        past, pieces, start = None, list[Tensor](), 0
        for step in steps:
            stop = start + step
            mask = torch.ones_like(ids[:, :stop])
            out = self.decoder(input_ids=ids[:, start:stop], attention_mask=mask, use_cache=True, **{name: past})
            past, start = out[name], stop
            pieces.append(out.logits)
        return torch.cat(pieces, dim=1)

    @contextlib.contextmanager
    def _disturbed(self, noise: Noise, seed: int) -> Iterator[None]:
        """Add noise inside of the block."""
        source, experts = Disturbance(noise, seed), {own for _, own in self.layers}
        handles, kept = [], [(data, data.clone()) for data, _, _ in self._borders]
        for data, below, above in self._borders:
            data.copy_(torch.where(source.coins(data.shape), below, above))
        for name, own in self.decoder.named_modules():
            rounds = noise.products > 0 and name in self.quantized and not isinstance(own, nn.Embedding)
            if rounds:
                handles.append(own.register_forward_pre_hook(source.before, with_kwargs=True))
            if own in experts and rounds:
                handles.append(own.register_forward_hook(source.after_products))
            elif own in experts or isinstance(own, nn.Linear | nn.Embedding):
                handles.append(own.register_forward_hook(source.after))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for data, before in kept:
                data.copy_(before)


class Disturbance:
    """Hooks that add noise.

    Args:
        noise: The sizes.
        seed: Seed of the noise.
    """

    def __init__(self, noise: Noise, seed: int) -> None:
        self._noise, self._generator = noise, torch.Generator().manual_seed(seed)

    def before(self, module: nn.Module, args: Any, given: Any) -> Any:  # noqa: ARG002
        """Change the input of a product with a quantized weight."""
        return ((self._changed(args[0], self._noise.products), *args[1:]) if args else args), given

    def after(self, module: nn.Module, args: Any, out: Any) -> Any:  # noqa: ARG002
        """Change an output."""
        return self._changed(out, self._noise.everywhere)

    def after_products(self, module: nn.Module, args: Any, out: Any) -> Any:  # noqa: ARG002
        """Change the output of experts, whose second product is inside of the module."""
        return self._changed(out, self._noise.products)

    def coins(self, shape: torch.Size) -> Tensor:
        """True or False by chance."""
        return torch.rand(shape, generator=self._generator) < 0.5

    def _changed(self, value: Any, size: float) -> Any:
        if not (isinstance(value, Tensor) and value.is_floating_point()):
            return value
        random = torch.rand(value.shape, generator=self._generator) * 2 - 1
        return value + random.to(value.dtype) * size * value.abs().amax(-1, keepdim=True)


def _unpacked(values: list[Any]) -> list[Any]:
    """Arguments of a forward that takes *args."""
    return list(values[0]) if isinstance(values[0], tuple) else values


def load(directory: Path) -> Any:
    """The model of a checkpoint by the auto classes of transformers, eager and in float32."""
    import transformers

    raw = json.loads((directory / "config.json").read_text())
    kind = raw.get("model_type")
    if kind in _RENAMED:
        renamed = {"attention_head_dim": "head_dim"}
        plain = {renamed.get(key, key): value for key, value in raw.items() if key != "model_type"}
        config = transformers.AutoConfig.for_model(_RENAMED[kind], **plain)
    else:
        config = transformers.AutoConfig.from_pretrained(directory)
    settings: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager", "local_files_only": True}
    classes = (transformers.AutoModelForCausalLM, transformers.AutoModelForMultimodalLM)
    auto = next(auto for auto in classes if type(config) in auto._model_mapping)
    model = auto.from_pretrained(directory, config=config, **settings).eval()
    _restore_tables(model)
    set_eager_experts(model)
    return model


def _restore_tables(model: Any) -> None:
    """Make tables of the class anew in float32: a file in half precision holds them rounded, and they are loaded."""
    tables = [name for name, buffer in model.named_buffers() if buffer.ndim > 2 and name in model.state_dict()]
    if tables:
        fresh = dict(type(model)._from_config(model.config, dtype=torch.float32).named_buffers())
        for name in tables:
            model.get_buffer(name).copy_(fresh[name])


def set_eager_experts(model: Any) -> None:
    """Let every part of a model compute experts as its modeling file does."""
    import transformers

    for part in model.modules():
        if isinstance(part, transformers.PreTrainedModel) and part._can_set_experts_implementation():
            part.set_experts_implementation("eager")


def decoder_of(model: Any) -> Any:
    """The part of a model that has a head: itself, or a child of a wrapper without a forward of its own."""
    import transformers

    if type(model).forward is nn.Module.forward:
        parts = [own for own in model.children() if isinstance(own, transformers.PreTrainedModel)]
        return next(own for own in parts if own.get_output_embeddings() is not None)
    return model


def matrices(model: Any) -> Iterator[tuple[str, nn.Module, nn.Parameter, str]]:
    """Module name, module, weight and tensor class of every matrix that a plan may quantize."""
    head, words = model.get_output_embeddings(), model.get_input_embeddings()
    for name, own in model.named_modules():
        if hasattr(own, "_is_expert_parallel"):
            for key in ("gate_up_proj", "up_proj", "down_proj"):
                if isinstance(parameter := getattr(own, key, None), nn.Parameter):
                    yield name, own, parameter, "experts_down" if key == "down_proj" else "experts_gate_up"
        elif own is head or own is words:
            yield name, own, own.weight, "lm_head" if own is head else "embedding"
        elif isinstance(own, nn.Linear) and not _is_left_alone(name, own):
            attention = ATTENTION.search(f".{name}.") and not FEED_FORWARD.search(f".{name}.")
            yield name, own, own.weight, "attention" if attention else "shared_expert"


def _is_left_alone(name: str, own: nn.Linear) -> bool:
    return bool(own.weight.shape[0] < MINIMUM_ROWS or ROUTER.search(f".{name}.") or DECAY.search(f".{name}"))


def knows_every_matrix(model: Any) -> bool:
    """Whether `matrices` finds all of a model: it has no matrix outside of linears, embeddings, experts and routers."""
    found = {id(parameter) for _, _, parameter, _ in matrices(model)}
    small = (nn.Linear, nn.Embedding)
    plain = {id(own.weight) for own in model.modules() if isinstance(own, small)}
    experts = {
        id(value) for own in model.modules() if hasattr(own, "_is_expert_parallel") for value in own.parameters()
    }
    words = [own for own in model.modules() if isinstance(own, nn.Embedding)]
    others = [
        name
        for name, value in model.named_parameters()
        if value.ndim >= 2 and id(value) not in found | plain | experts and not ROUTER.search(f".{name}.")
    ]
    convolutions = [name for name in others if "conv" in name or name.endswith(("A_log", "bias"))]
    return len(others) == len(convolutions) and len(words) == 1 and bool(experts)


def _form(forms: Mapping[str, str], overrides: Sequence[Mapping[str, Any]], kind: str, name: str) -> str:
    number = re.search(r"\.(?:layers|blocks|h)\.(\d+)\.", f".{name}.")
    for override in overrides:
        if override["tensor_class"] == kind and number and int(number[1]) == override["layer"]:
            return str(override["format"])
    return forms.get(kind, "none")


def _without(
    name: str, value: Tensor, shape: torch.Size, before: int, owners: list[str], removed: Sequence[Sequence[int]]
) -> Tensor:
    """A tensor of the full model without the entries of the experts that its layer loses."""
    if value.shape == shape:
        return value
    layer = next(index for index, owner in enumerate(owners) if name.startswith(f"{owner}."))
    kept = torch.tensor([expert for expert in range(before) if expert not in removed[layer]])
    axis = next(axis for axis in range(value.ndim) if value.shape[axis] != shape[axis])
    return value.index_select(axis, kept)
