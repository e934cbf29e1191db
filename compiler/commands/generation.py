"""`moec run`: generate text from an artifact, without torch."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from moec.compiler.commands.options import ArtifactDirectory, Generation, OutputConsole, Sampling
from moec.compiler.common.errors import UsageError


def _one_prompt(argument: str | None, option: str | None) -> str:
    """The prompt, from the argument or the option.

    Raises:
        UsageError: Neither or both are given, or the prompt is not UTF-8.
    """
    if (argument is None) == (option is None):
        reason = "no prompt is given" if argument is None else "the prompt is given twice: as argument and by --prompt"
        raise UsageError(reason, hint="moec run DIRECTORY \"PROMPT\"; '-' reads standard input")
    return argument_text(argument, "the prompt") if argument is not None else argument_text(str(option), "--prompt")


def argument_text(given: str, where: str) -> str:
    """A text given on the command line; "-" reads standard input. `where` names it in messages.

    Raises:
        UsageError: The text is not UTF-8.
    """
    try:
        if given == "-":
            where = "standard input"
            return sys.stdin.buffer.read().decode("utf-8")
        # Bytes of the command line that are not UTF-8 arrive as lone surrogates.
        return given.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{where}: not UTF-8 text (byte {error.start})", hint="convert it to UTF-8") from error


def run(
    sampling: Sampling,
    generation: Generation,
    console: OutputConsole,
    directory: ArtifactDirectory,
    text: Annotated[
        str | None, typer.Argument(metavar="[PROMPT]", help="The text to continue; '-' reads standard input.")
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="The text to continue, as an option.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Largest number of new tokens.")] = 128,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap the prompt in the model's chat template.")] = False,
) -> int:
    """Continue a text, from the artifact alone.

    Sampling follows the model's generation_config.json, as in transformers; flags override it.
    """
    given = _one_prompt(text, prompt)
    generator = generation.generator(directory, console)
    chosen = generator.sampling(**vars(sampling))
    stop = generation.stop or ()
    pieces = generator.stream(given, chat=chat, stop=stop, max_new_tokens=max_new_tokens, sampling=chosen)
    written = "".join(pieces) if console.json else console.pieces(pieces)
    counted = generator.statistics
    figures = {
        "prompt_tokens": counted.prompt_tokens,
        "new_tokens": counted.new_tokens,
        "prefill_seconds": counted.prefill_seconds,
        "decode_seconds": counted.decode_seconds,
        "tokens_per_second": counted.decode_rate,
        "finish": counted.finish,
        "disk": None if counted.disk is None else counted.disk.record(counted.steps),
    }
    console.result({"text": written, **figures}, lambda: None)
    if generation.stats:
        for line in counted.lines():
            console.note(line)
    return 0
