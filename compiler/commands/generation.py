"""`moec run`: text from the artifact alone, without torch."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from moec.compiler.commands.console import Console
from moec.compiler.commands.options import (
    ArtifactDirectory,
    Debug,
    Inputs,
    Json,
    MaxNewTokens,
    MinP,
    RepetitionPenalty,
    Seed,
    Stats,
    Stop,
    Temperature,
    Threads,
    TopK,
    TopP,
)
from moec.compiler.common.errors import UsageError


def _one_prompt(argument: str | None, option: str | None) -> str:
    """The prompt, however it was given.

    Raises:
        UsageError: It was not, or twice, or it is not UTF-8.
    """
    if (argument is None) == (option is None):
        reason = "no prompt is given" if argument is None else "the prompt is given twice: by itself and with --prompt"
        raise UsageError(reason, hint="moec run DIRECTORY \"PROMPT\"; '-' reads standard input")
    return argument_text(argument, "the prompt") if argument is not None else argument_text(str(option), "--prompt")


def argument_text(given: str, where: str) -> str:
    """A text of the command line; "-" reads standard input.

    Raises:
        UsageError: It is not UTF-8.
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
    directory: ArtifactDirectory,
    text: Annotated[
        str | None, typer.Argument(metavar="[PROMPT]", help="The text to continue; '-' reads standard input.")
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="The same, as an option.")] = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    seed: Seed = 0,
    stop: Stop = None,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap the prompt in the model's chat template.")] = False,
    stats: Stats = False,
    threads: Threads = 0,
    inputs: Inputs = None,
    json_output: Json = False,
    debug: Debug = False,
) -> int:
    """Continue a text, from the artifact alone.

    How tokens are chosen follows the model's generation_config.json, as in transformers, where no flag says otherwise.
    """
    from moec.compiler.commands.flags import numbers
    from moec.compiler.run.generate import Generator

    console = Console(json_output, debug=debug)
    given = _one_prompt(text, prompt)
    generator = Generator(directory, threads=threads, inputs=numbers(inputs or (), "--input"))
    sampling = generator.sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    pieces = generator.stream(given, chat=chat, stop=stop or (), max_new_tokens=max_new_tokens, sampling=sampling)
    written = "".join(pieces) if json_output else console.pieces(pieces)
    counted = generator.statistics
    figures = {
        "prompt_tokens": counted.prompt_tokens,
        "new_tokens": counted.new_tokens,
        "prefill_seconds": counted.prefill_seconds,
        "decode_seconds": counted.decode_seconds,
        "tokens_per_second": counted.decode_rate,
        "finish": counted.finish,
    }
    console.result({"text": written, **figures}, lambda: None)
    if stats:
        console.note(counted.line())
    return 0
