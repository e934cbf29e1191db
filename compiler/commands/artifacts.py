"""`moec verify` and `moec run`: what needs the artifact alone."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from moec.compiler.commands.console import Console
from moec.compiler.commands.options import ArtifactDirectory, Debug, Json
from moec.compiler.common.errors import UsageError


def verify(
    directory: ArtifactDirectory,
    public_key: Annotated[
        str | None,
        typer.Option(metavar="FILE|KEY", envvar="MOEC_PUBLIC_KEY", help="Demand a signature (minisign) by this key."),
    ] = None,
    ignore_signature: Annotated[bool, typer.Option("--ignore-signature", help="Check the digests alone.")] = False,
    json_output: Json = False,
    debug: Debug = False,
) -> int:
    """Check by digests, and by its signature if there is one, that the artifact is the one that was built."""
    from moec.compiler.build import signature
    from moec.compiler.common import artifact

    console = Console(json_output, debug=debug)
    digests = artifact.verify(directory)
    signed = None
    if not ignore_signature and (public_key or signature.is_signed(directory)):
        signed = signature.check(directory, public_key)

    def show() -> None:
        console.line(f"{directory}: {len(digests)} files are as they were built")
        if signed is not None:
            console.line(f"the signature is right: {signed}")

    console.result({"files": digests, "signature": signed}, show)
    return 0


def _sampling(text: str) -> Any:
    """A flag that goes over the model's own generation_config.json."""
    return typer.Option(help=f"{text} (default: the model's own)", rich_help_panel="Sampling")


def _prompt(given: str) -> str:
    """The text of `--prompt`; "-" reads standard input.

    Raises:
        UsageError: It is not UTF-8.
    """
    try:
        if given == "-":
            return sys.stdin.buffer.read().decode("utf-8")
        # Bytes of the command line that are not UTF-8 arrive as lone surrogates.
        return given.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeDecodeError as error:
        where = "standard input" if given == "-" else "--prompt"
        raise UsageError(f"{where}: not UTF-8 text (byte {error.start})", hint="convert it to UTF-8") from error


def run(
    directory: ArtifactDirectory,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The text to continue; '-' reads standard input.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="At most so many new tokens.")] = 128,
    temperature: Annotated[float | None, _sampling("Divides the logits; 0 takes the most likely token.")] = None,
    top_k: Annotated[int | None, _sampling("Draw among the k most likely tokens; 0 means all.")] = None,
    top_p: Annotated[float | None, _sampling("Draw among the likeliest tokens that together reach p.")] = None,
    min_p: Annotated[float | None, _sampling("Leave out tokens below p times the likeliest one.")] = None,
    repetition_penalty: Annotated[float | None, _sampling("Above 1, tokens that occurred become less likely.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap the prompt in the model's chat template.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Print counts and tokens per second on stderr.")] = False,
    threads: Annotated[int, typer.Option(help="Threads of the runtime; 0 leaves it to the runtime.")] = 0,
    inputs: Annotated[
        list[str] | None,
        typer.Option("--input", metavar="NAME=VALUE", help="Set an input that has a default, such as routing_budget."),
    ] = None,
    json_output: Json = False,
    debug: Debug = False,
) -> int:
    """Continue a text, from the artifact alone.

    How tokens are chosen follows the model's generation_config.json, as in transformers, where no flag says otherwise.
    """
    from moec.compiler.commands.flags import numbers
    from moec.compiler.run.generate import Generator

    console = Console(json_output, debug=debug)
    text = _prompt(prompt)
    generator = Generator(directory, threads=threads, inputs=numbers(inputs or (), "--input"))
    sampling = generator.sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    pieces = generator.stream(text, chat=chat, max_new_tokens=max_new_tokens, sampling=sampling)
    written = "".join(pieces) if json_output else console.pieces(pieces)
    counted = generator.statistics
    figures = {
        "prompt_tokens": counted.prompt_tokens,
        "new_tokens": counted.new_tokens,
        "prefill_seconds": counted.prefill_seconds,
        "decode_seconds": counted.decode_seconds,
        "tokens_per_second": counted.decode_rate,
    }
    console.result({"text": written, **figures}, lambda: None)
    if stats:
        console.note(
            f"prompt: {counted.prompt_tokens} tokens in {counted.prefill_seconds:.3f} s; "
            f"new: {counted.new_tokens} tokens, {counted.decode_rate:.1f} tokens/s"
        )
    return 0
