"""The table of routing policies: built-in ones, those of third parties, and those that are refused."""

from __future__ import annotations

import sys
from dataclasses import Field, fields
from typing import TYPE_CHECKING, Any

from moec.compiler.common.errors import UsageError
from moec.compiler.common.plugins import load_plugins
from moec.compiler.common.validation import unknown
from moec.passes.routing.policies.activation_norm import ActivationNorm
from moec.passes.routing.policies.base import Policy
from moec.passes.routing.policies.capped import Capped
from moec.passes.routing.policies.entropy import Entropy
from moec.passes.routing.policies.layer_k import LayerK
from moec.passes.routing.policies.margin import Margin
from moec.passes.routing.policies.per_layer import PerLayer
from moec.passes.routing.policies.random_drop import RandomDrop
from moec.passes.routing.policies.ratio import Ratio
from moec.passes.routing.policies.threshold import Threshold
from moec.passes.routing.policies.top_p import TopP
from moec.passes.routing.policies.uniform_k import UniformK

if TYPE_CHECKING:
    from collections.abc import Iterable
    from importlib.metadata import EntryPoint

GROUP = "moec.policies"

BUILT_IN: tuple[type[Policy], ...] = (
    LayerK,
    TopP,
    Threshold,
    Capped,
    Ratio,
    Entropy,
    Margin,
    ActivationNorm,
    UniformK,
    RandomDrop,
    PerLayer,
)

REFUSED = {
    "oea": "lets tokens of a batch share the experts that others activate",
    "sere": "reroutes a token's experts to those that its batch activates",
    "batch-topk": "ranks slots across the batch",
    "sequence-topk": "ranks slots across the sequence, later tokens included",
    "expert-choice": "lets experts choose among the tokens of a batch",
    "capacity": "drops tokens when an expert's share of the batch is full",
}
"""Published policies that depend on the batch or on later tokens -> how they do."""

MOST_RANK = 4096
"""Largest rank of a compensation; a map of the rank of the hidden state costs more than the experts that it saves."""


def policies(extra: Iterable[EntryPoint] | None = None) -> dict[str, type[Policy]]:
    """All policies by name, built-in ones first.

    Args:
        extra: Entry points of third parties; None: those installed in the group `moec.policies`.

    Raises:
        UsageError: Two policies have the same name, or an entry point is not a Policy.
    """
    table = {policy.name: policy for policy in BUILT_IN}
    return {**table, **load_plugins(GROUP, Policy, {*table, *REFUSED}, extra)}  # type: ignore[type-abstract]


def policy_type(name: str) -> type[Policy]:
    """The class of a policy.

    Raises:
        UsageError: No policy has this name, or the policy depends on the batch.
    """
    if name in REFUSED:
        raise UsageError(
            f"policy {name} {REFUSED[name]}: a token's experts must depend on that token alone, or its result would"
            " change with the batch, and prefill followed by decode would differ from a single pass",
            hint="choose a row-independent policy, such as top-p",
        )
    table = policies()
    if name not in table:
        raise unknown(name, table, "unknown routing policy", "the policies")
    return table[name]


def policy(name: str, **parameters: Any) -> Policy:
    """Make a policy from its name and its parameters, as read from JSON or YAML.

    Raises:
        UsageError: A name or parameter is unknown, the policy depends on the batch, or a value is out of range.
    """
    chosen = policy_type(name)
    known = {field.name: field for field in fields(chosen)}
    for key in parameters:
        if key not in known:
            raise unknown(key, known, f"policy {name} has no parameter", "its parameters")
    values = {key: _value(value) for key, value in parameters.items()}
    for key, value in values.items():
        if wanted := _misfit(known[key], value):
            what = f"policy {name}: {key} must be {wanted}, not {parameters[key]!r:.80}"
            raise UsageError(what, hint="see docs/routing.md for its parameters")
    return chosen(**values)


def _misfit(field: Field[Any], value: Any) -> str:
    """What a parameter should be, if the value is not of its kind; empty if it is.

    The default and the annotation of the field tell the kind. Fields of other kinds, which policies of third parties
    may have, are left to the policy.
    """
    if isinstance(field.default, bool):
        return "" if isinstance(value, bool) else "true or false"
    if field.name == "compensation":
        whole = isinstance(value, int) and not isinstance(value, bool)
        return "" if whole and 0 <= value <= MOST_RANK else f"a whole number between 0 and {MOST_RANK}"
    if isinstance(field.default, int | float):
        return "" if _is_number(value) else "a number"
    if isinstance(field.default, tuple):
        if not isinstance(value, tuple):
            return "a list with an entry for each MoE layer"
        if "int" in str(field.type):
            return "" if all(isinstance(item, int) and _is_number(item) for item in value) else "a list of integers"
        if "float" in str(field.type):
            return "" if all(map(_is_number, value)) else "a list of numbers"
    return ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _value(given: Any) -> Any:
    """A parameter from what JSON or YAML holds: lists are tuples, and a mapping that names a policy is that policy."""
    if isinstance(given, list):
        return tuple(map(_value, given))
    if isinstance(given, dict) and isinstance(given.get("policy"), str):
        return policy(given["policy"], **{key: value for key, value in given.items() if key != "policy"})
    return given


def parameters_of(chosen: Policy) -> dict[str, Any]:
    """The parameters of a policy, as keyword arguments of `policy`."""
    return {field.name: _plain(getattr(chosen, field.name)) for field in fields(chosen)}


def _plain(value: Any) -> Any:
    """The inverse of `_value`; of a policy within a policy only what is not at its default."""
    if isinstance(value, tuple):
        return [_plain(item) for item in value] if any(isinstance(item, Policy) for item in value) else value
    if not isinstance(value, Policy):
        return value
    changed = [field for field in fields(value) if getattr(value, field.name) != field.default]
    own = {field.name: _plain(getattr(value, field.name)) for field in changed}
    return {"policy": value.name, **own}
