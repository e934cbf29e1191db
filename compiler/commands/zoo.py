"""`moec zoo`: the recipes that come with moec."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moec.compiler.commands.options import OutputConsole

if TYPE_CHECKING:
    from moec.compiler.zoo.entries import Entry, Model


def _models() -> list[str]:
    from moec.compiler.zoo.entries import model_names

    return list(model_names())


def _entries() -> list[str]:
    from moec.compiler.zoo.entries import entry_names

    return list(entry_names())


def list_recipes(
    console: OutputConsole,
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[MODEL]...", help="Models; all by default.", autocompletion=_models)
    ] = None,
) -> int:
    """List recipes, what they were measured on and at what; the word 'list' may be omitted."""
    from moec.compiler.zoo.entries import load_model, model_names

    models = [load_model(name) for name in names or model_names()]
    found = {model.model: model.model_dump(mode="json") for model in models}

    def show() -> None:
        header = ("recipe", "target", "size", "perplexity", "95 %", "expert FLOPs", "quality")
        console.rows([_row(model, name) for model in models for name in model.recipes], header=header)
        console.line("")
        console.line("moec export CHECKPOINT --recipe zoo:MODEL/NAME -o out    # moec zoo show MODEL/NAME says more")

    console.result({"models": found}, show)
    return 0


def _row(model: Model, name: str) -> tuple[str, ...]:
    from moec.compiler.report.describe import size_text

    entry = model.recipes[name]
    start = (f"{model.model}/{name}", str(entry.recipe["target"]))
    if entry.measured is None:
        size = "" if entry.estimated is None else size_text(entry.estimated.weights)
        return (*start, size, "", "", "", entry.quality)
    found = entry.measured
    share = found.values.get("expert-flops")
    size = size_text(int(found.values["size"])) if "size" in found.values else ""
    interval = f"[{found.perplexity.low:+.2%}, {found.perplexity.high:+.2%}]"
    flops = "" if share is None else f"{share:.1%}"
    return (*start, size, f"{found.perplexity.value:+.2%}", interval, flops, entry.quality)


def show_recipe(
    console: OutputConsole,
    name: Annotated[str, typer.Argument(metavar="MODEL/NAME", help="A recipe.", autocompletion=_entries)],
) -> int:
    """Print a recipe as YAML, with its figures and where they are from as comments."""
    import yaml

    from moec.compiler.zoo.entries import load_entry

    model, entry = load_entry(name)

    def show() -> None:
        for label, text in _facts(model, entry):
            console.line(f"# {label}: {text}")
        console.line(yaml.safe_dump(entry.recipe, sort_keys=False, width=120).rstrip())

    plain = model.model_dump(mode="json", exclude={"recipes"})
    console.result({**plain, "entry": entry.model_dump(mode="json")}, show)
    return 0


def _facts(model: Model, entry: Entry) -> list[tuple[str, str]]:
    from moec.compiler.report.describe import size_text

    rows = [("model", f"{model.model}, {model.checkpoint}"), ("quality", entry.quality)]
    if (found := entry.measured) is not None:
        ends = f"[{found.perplexity.low:+.2%}, {found.perplexity.high:+.2%}]"
        rows.append(("perplexity on held-out text", f"{found.perplexity.value:+.2%}, 95 % interval {ends}"))
        rows += [(key, f"{value:.6g}") for key, value in found.values.items() if key != "perplexity"]
        if found.gates:
            rows.append(("gates", ", ".join(f"{gate} {status}" for gate, status in found.gates.items())))
    if (guess := entry.estimated) is not None:
        rows.append(("weights, estimated", size_text(guess.weights)))
        rows.append(("memory with 128 tokens, estimated", size_text(guess.memory)))
        for device, one in guess.devices.items():
            fits = "fits" if one.fits else "does not fit"
            rows.append((f"decode on {device}", f"at least {one.decode_seconds * 1e3:.3g} ms; {fits}"))
    rows.append(("measure it", entry.measure))
    return [*rows, *((f"made: {key}", str(value)) for key, value in model.made.items())]


TITLE = "Recipes that come with moec: what they were measured on and at what."
COMMANDS: Mapping[str, Callable[..., Any]] = {"list": list_recipes, "show": show_recipe}
"""Name -> command; the first needs no name."""
