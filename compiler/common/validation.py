"""Checks user input against a pydantic model; an error names the key, and the nearest name that exists."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from moec.compiler.common.errors import UsageError

Model = TypeVar("Model", bound=BaseModel)


def validate(model: type[Model], fields: Mapping[str, Any], *, where: str) -> Model:
    """Make a `model` of `fields`; `where` names their origin in messages.

    Raises:
        UsageError: A key is unknown, or a value does not fit the type of its field.
    """
    try:
        return model.model_validate(dict(fields))
    except ValidationError as error:
        raise _usage_error(model, error, where) from error


def unknown(name: str, known: Iterable[str], what: str, listing: str) -> UsageError:
    """An error for a name that does not exist, with the nearest one that does.

    Args:
        name: The name that the user gave.
        known: The valid names.
        what: Start of the message, such as "unknown target".
        listing: What `known` is, for the hint, such as "the targets".
    """
    names = sorted(known)
    near = nearest(name, names)
    every = f"{listing}: {', '.join(names) or 'none'}"
    return UsageError(f"{what} '{name}'", hint=every if near is None else f"did you mean '{near}'? {every}")


def checked_names(names: Sequence[str], known: Sequence[str], what: str, listing: str) -> tuple[str, ...]:
    """`names`, or all of `known` if `names` is empty; `what` and `listing` as for `unknown`.

    Raises:
        UsageError: One of `names` is unknown.
    """
    for name in names:
        if name not in known:
            raise unknown(name, known, what, listing)
    return tuple(names) or tuple(known)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The most similar name in `known`, ignoring case and the difference of `-` and `_`; None if none is similar."""
    plain = {_plain(item): item for item in known}
    found = difflib.get_close_matches(_plain(name), plain, n=1, cutoff=0.5)
    return plain[found[0]] if found else None


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")


def _usage_error(model: type[BaseModel], error: ValidationError, where: str) -> UsageError:
    first = error.errors(include_url=False)[0]
    location = [str(part) for part in first["loc"]]
    path = ".".join((where, *location[:-1]))
    if first["type"] == "extra_forbidden" and location:
        known = _fields(model, location[:-1])
        return unknown(location[-1], known, f"{path}: unknown key", f"the keys of {path}")
    given = first.get("input")
    at = ".".join((where, *location))
    if first["type"] in {"literal_error", "enum"} and isinstance(given, str):
        choices = _choices(model, location) or (str(first.get("ctx", {}).get("expected", "")),)
        return unknown(given, choices, f"{at}: unknown value", "the values")
    if first["type"] == "value_error":  # raised by a model of ours, whose message says all
        return UsageError(f"{at}: {first['ctx']['error']}", hint="see --help for what each option takes")
    return UsageError(f"{at}: {first['msg']}, got {given!r}", hint="see --help for what each option takes")


def _fields(model: type[BaseModel], location: Sequence[str]) -> Iterable[str]:
    """Names of the fields of the model nested at `location`."""
    for name in location:
        annotation = model.model_fields[name].annotation
        nested = [item for item in (annotation, *get_args(annotation)) if _is_model(item)]
        model = nested[0]
    return model.model_fields


def _is_model(item: Any) -> bool:
    return isinstance(item, type) and issubclass(item, BaseModel)


def _choices(model: type[BaseModel], location: Sequence[str]) -> tuple[str, ...]:
    owner = model
    for name in location[:-1]:
        annotation = owner.model_fields[name].annotation
        owner = next((item for item in (annotation, *get_args(annotation)) if _is_model(item)), owner)
    field = owner.model_fields.get(location[-1]) if location else None
    return choices_of(field.annotation) if field else ()


def choices_of(annotation: Any) -> tuple[str, ...]:
    """The strings that an annotation allows if it is a Literal or a StrEnum, also inside a union; else none."""
    if isinstance(annotation, type) and hasattr(annotation, "__members__"):
        return tuple(str(member) for member in annotation)  # type: ignore[attr-defined]
    found: list[str] = []
    for item in get_args(annotation):
        found.extend([item] if isinstance(item, str) else choices_of(item))
    return tuple(found)
