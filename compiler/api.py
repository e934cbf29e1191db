"""The Python API: `moec.export` and `moec.load`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moec.compiler.pipeline.recipe import SECTIONS, Recipe, make_recipe, read_recipe

if TYPE_CHECKING:
    from moec.compiler.common.progress import Progress
    from moec.compiler.pipeline.export import Result
    from moec.compiler.run.generate import Generator


def export(
    checkpoint: str | Path | None = None,
    *,
    output: str | Path,
    target: str | None = None,
    recipe: str | Path | None = None,
    overwrite: bool = False,
    gates: bool = True,
    progress: Progress | None = None,
    **options: Any,
) -> Result:
    """Compile a checkpoint into an artifact and prove it.

    Args:
        checkpoint: Directory or hub id.
        output: Directory to make.
        target: Name of the target, such as "onnx"; `moec.targets.target_names()` lists them.
        recipe: A recipe file; every other argument overrides its keys.
        overwrite: Replace an artifact at `output`.
        gates: Run the gates.
        progress: Called with the name of a stage, the number of finished steps and the number of all steps.
        options: Further recipe keys (`dtype`, `trust_remote_code`); any other key is an option of the target.

    Returns:
        The artifact directory, its moec.json and the verdicts of the gates.

    Raises:
        GateError: A gate failed. The artifact is at `output` nevertheless; `error.result` has the verdicts.
        MoecError: Anything else that stops an export; its subclasses are in `moec.compiler.common.errors`.
    """
    from moec.compiler.pipeline.export import GateError, compile_recipe
    from moec.compiler.pipeline.stages import silent

    common = {"checkpoint": None if checkpoint is None else str(checkpoint), "target": target}
    wanted = merge(None if recipe is None else Path(recipe), {**common, **options})
    result = compile_recipe(
        wanted, Path(output), overwrite=overwrite, gates=gates, progress=silent if progress is None else progress
    )
    if result.exit_code:
        failed = "; ".join(f"{verdict.gate}: {verdict.summary}" for verdict in result.failed)
        raise GateError(f"{result.directory}: {failed}", hint="report.json has the figures", result=result)
    return result


def merge(recipe: Path | None, given: Mapping[str, Any]) -> Recipe:
    """Merge a recipe file with given keys, which override the file; a value of None counts as not given.

    Args:
        recipe: The file, or None.
        given: Recipe keys; any other key is an option of the target.

    Raises:
        UsageError: The file cannot be read, or a key or value is not valid.
    """
    fields = read_recipe(recipe) if recipe else {}
    extra: dict[str, Any] = {}
    for name, value in given.items():
        if value is not None:
            (fields if name in Recipe.model_fields else extra)[name] = value
    for name in SECTIONS:
        if isinstance(section := given.get(name), Mapping):
            # Keys of the section that are not given keep their value from the file.
            in_section = read_recipe(recipe).get(name) if recipe else None
            fields[name] = {**in_section, **section} if isinstance(in_section, Mapping) else dict(section)
    if extra:
        in_file = fields.get("options") or {}
        fields["options"] = {**in_file, **extra} if isinstance(in_file, Mapping) else in_file
    return make_recipe(fields, where=str(recipe or "recipe"))


def load(
    directory: str | Path,
    *,
    threads: int = 0,
    inputs: Mapping[str, float] | None = None,
    pack: bool = True,
    memory_limit: str | int | None = None,
) -> Generator:
    """Open an artifact: `moec.load(directory).generate("...", max_new_tokens=40)`.

    Args:
        directory: The artifact, or REGISTRY/NAME@ALIAS.
        threads: Threads of the runtime; 0 leaves it to the runtime.
        inputs: Values of scalar inputs that have a default, such as {"routing_budget": 0.7}.
        pack: Open weights in the layout of this machine's kernels, which the first call makes and keeps in the user's
            cache if the artifact is large; `note` of the result says what could not be done.
        memory_limit: Bytes of memory for weights, or a text such as "2GB": dense weights stay in memory, and experts
            are read from the disk when tokens are routed to them. None: what the container allows.

    Raises:
        ArtifactError: The directory is not an artifact, or the artifact is damaged.
        UsageError: The artifact has no input of one of these names, the registry no such version, or the limit cannot
            be kept.
    """
    from moec.compiler.build.registry import resolve
    from moec.compiler.run.generate import Generator

    return Generator(resolve(Path(directory)), threads=threads, inputs=inputs, pack=pack, memory_limit=memory_limit)
