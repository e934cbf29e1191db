"""Command-line flags from pydantic models (one per field, with its description as help) and from groups."""

from __future__ import annotations

import functools
import inspect
import os
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer

from moec.compiler.common.errors import UsageError

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

_SEQUENCES = (list, tuple, set, frozenset)


class Group:
    """Flags that belong together: a dataclass whose fields are annotated like arguments of a command.

    A command takes the group as one argument; `with_groups` makes flags of its fields.
    """

    def value(self) -> Any:
        """The value that the command gets: the group itself, unless a subclass makes another object of it."""
        return self


def with_groups(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `function` so that its groups are replaced by their fields, after its other arguments.

    An argument is a group if its annotation is a `Group`, or `Annotated[..., Group]` for the value that a group makes.
    """
    signature = inspect.signature(function, eval_str=True)
    groups = {item.name: group for item in signature.parameters.values() if (group := _group_of(item.annotation))}
    own = [item for name, item in signature.parameters.items() if name not in groups]
    fixed = [item for item in own if item.kind is not inspect.Parameter.VAR_KEYWORD]
    of_group = {
        name: [
            inspect.Parameter(field, inspect.Parameter.KEYWORD_ONLY, default=getattr(group, field), annotation=kind)
            for field, kind in get_type_hints(group, include_extras=True).items()
        ]
        for name, group in groups.items()
    }

    @functools.wraps(function)
    def command(**arguments: Any) -> Any:
        made = {
            name: groups[name](**{item.name: arguments.pop(item.name) for item in items}).value()
            for name, items in of_group.items()
        }
        return function(**arguments, **made)

    keywords = [item.replace(kind=inspect.Parameter.KEYWORD_ONLY) for item in fixed]
    spread = [item for items in of_group.values() for item in items]
    return _signed(command, signature, [*keywords, *spread, *(item for item in own if item not in fixed)])


def _group_of(annotation: Any) -> type[Group] | None:
    candidates = (annotation, *getattr(annotation, "__metadata__", ()))
    return next((item for item in candidates if isinstance(item, type) and issubclass(item, Group)), None)


def _signed(
    command: Callable[..., Any], signature: inspect.Signature, parameters: Sequence[inspect.Parameter]
) -> Callable[..., Any]:
    """`command` with other parameters, for typer to read."""
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {item.name: item.annotation for item in parameters}
    return command


def with_flags(function: Callable[..., Any], fields: Mapping[str, FieldInfo], panel: str) -> Callable[..., Any]:
    """Wrap `function` so that it has a keyword argument for each of `fields`, of which typer makes flags.

    A flag that is not given is None. Values are strings, which pydantic later converts and checks; booleans are passed
    as such, and sequences are split at commas.

    Args:
        function: A command that takes `**options`.
        fields: The `model_fields` of a pydantic model.
        panel: Title of these flags in the help.

    Raises:
        UsageError: A field has the name of an argument of `function`.
    """
    signature = inspect.signature(function, eval_str=True)
    fixed = [item for item in signature.parameters.values() if item.kind is not inspect.Parameter.VAR_KEYWORD]
    if clash := sorted({item.name for item in fixed} & fields.keys()):
        raise UsageError(f"{panel}: {', '.join(clash)} would hide an argument of moec itself")
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_annotation(name, info, panel))
        for name, info in fields.items()
    ]
    sequences = {name for name, info in fields.items() if _is_sequence(info.annotation)}

    @functools.wraps(function)
    def command(**arguments: Any) -> Any:
        split = {
            name: [item.strip() for item in value.split(",") if item.strip()]
            for name, value in arguments.items()
            if name in sequences and value is not None
        }
        return function(**{**arguments, **split})

    return _signed(command, signature, [item.replace(kind=inspect.Parameter.KEYWORD_ONLY) for item in fixed] + added)


def without_flags(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `function` so that it lacks its `**options`, which typer cannot handle."""
    return with_flags(function, {}, "")


def _annotation(name: str, info: FieldInfo, panel: str) -> Any:
    from moec.compiler.common.validation import choices_of

    text = f"{info.description or ''} {_default(info)}".strip()
    flag = "--" + name.replace("_", "-")
    if bool in _parts(info.annotation):
        option = typer.Option(f"{flag}/--no-{flag[2:]}", help=text, rich_help_panel=panel)
        return Annotated[bool | None, option]
    metavar = "|".join(choices_of(info.annotation)) or _kind(info.annotation)
    return Annotated[str | None, typer.Option(flag, help=text, metavar=metavar, rich_help_panel=panel)]


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "(required)"
    value = info.get_default(call_default_factory=True, validated_data={})
    if value is None or value in ((), [], ""):
        return ""
    shown = {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value
    return f"(default: {', '.join(map(str, shown)) if isinstance(shown, _SEQUENCES) else shown})"


def _kind(annotation: Any) -> str:
    names = [part.__name__.lower() for part in _parts(annotation) if isinstance(part, type) and part is not type(None)]
    return {"str": "text", "int": "integer", "float": "number"}.get(names[0], names[0]) if names else "text"


def _parts(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, the items of a sequence, or the annotation itself."""
    if get_origin(annotation) in (Union, UnionType, *_SEQUENCES):
        return tuple(part for item in get_args(annotation) for part in _parts(item))
    return (annotation,)


def _is_sequence(annotation: Any) -> bool:
    if get_origin(annotation) in (Union, UnionType):
        return any(_is_sequence(item) for item in get_args(annotation))
    return get_origin(annotation) in _SEQUENCES


def find_flag(arguments: list[str], *names: str) -> str | None:
    """The value of the last `--name value` or `--name=value` on an unparsed command line, or None."""
    found = None
    for position, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if argument == "--":
            break
        if name in names:
            found = value if equals else next(iter(arguments[position + 1 : position + 2]), found)
    return found


def completed_words() -> list[str]:
    """The words after "moec" of the command line that a shell asks to complete; none if it asks for nothing."""
    # The variables that typer's scripts for shells set: the second is that of bash.
    line = os.environ.get("_TYPER_COMPLETE_ARGS") or os.environ.get("COMP_WORDS", "")
    if "_MOEC_COMPLETE" not in os.environ:
        return []
    try:
        return shlex.split(line)[1:]
    except ValueError:  # a quote that is still open
        return line.split()[1:]


def named_target(arguments: list[str]) -> str | None:
    """The target that an unparsed command line or its recipe names, or None."""
    name, recipe = find_flag(arguments, "--target", "-t"), find_flag(arguments, "--recipe")
    if name is None and recipe is not None:
        from moec.compiler.pipeline.recipe import read_recipe

        in_recipe = read_recipe(Path(recipe)).get("target")
        name = in_recipe if isinstance(in_recipe, str) else None
    return name


def numbers(assignments: Iterable[str], flag: str) -> dict[str, float]:
    """Parse the values `NAME=NUMBER` of a repeated flag: name -> number.

    Raises:
        UsageError: A value does not have this form.
    """
    found: dict[str, float] = {}
    for assignment in assignments:
        name, _, value = assignment.partition("=")
        try:
            found[name] = float(value)
        except ValueError as error:
            raise UsageError(
                f"{flag} {assignment}: not NAME=NUMBER", hint=f"give {flag} routing_budget=0.7, say"
            ) from error
    return found


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options whose value is not None."""
    return {name: value for name, value in options.items() if value is not None}


def sections_of_flags(
    flags: Mapping[str, Mapping[str, Any]], calibration: Sequence[Path] = ()
) -> dict[str, dict[str, Any]]:
    """The sections of a recipe from flags: section -> key -> value.

    One flag may set keys in several sections. `--calibration` is a file of `moec calibrate` if its suffix is .json, and
    else a text, which is for quantization if weights are quantized and otherwise for routing. `--max-quality-loss`
    bounds the search of routing only if neither a budget nor a calibration file is given.

    Args:
        flags: Section -> key -> value; None means not given.
        calibration: The values of `--calibration`.
    """
    sections = {name: {k: _plain(v) for k, v in given(part).items()} for name, part in flags.items()}
    routed, quantized = sections.get("routing", {}), sections.get("quantize", {})
    for path in calibration:
        if path.suffix == ".json" or not quantized:
            routed["calibration"] = str(path)
        else:
            quantized["calibration"] = str(path)
    if routed.get("policy", "off") == "off" or {"budget", "calibration"} & routed.keys():
        routed.pop("max_quality_loss", None)
    return {name: section for name, section in sections.items() if section}


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
