#!/usr/bin/env bash
# DecodeStream of tokenizers raises on tokens that `decode` accepts, if the decoder has ByteFallback.
#
# ByteFallback decodes a run of byte tokens as a whole: one byte that is not valid UTF-8 turns every byte of the run into
# U+FFFD, even those that are characters by themselves. DecodeStream has already emitted such a character ("A" for
# <0x41>) when the invalid byte follows; at the next token, the decoded text no longer starts with the emitted text, and
# DecodeStream raises. Incomplete bytes at the end are never emitted. Models with such a tokenizer (Llama 2, Mixtral,
# Gemma, Phi-3.5) may sample any byte token, so a streaming server meets this sooner or later.
#
# Exits with 1 if the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'tokenizers==0.23.3'
"$folder/venv/bin/python" - <<'PY'
import sys

import tokenizers
from tokenizers import Tokenizer, decoders, models
from tokenizers.decoders import DecodeStream

print("tokenizers", tokenizers.__version__)
vocabulary = {"<unk>": 0, "<s>": 1}
for byte in range(256):
    vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
vocabulary["\u2581cat"] = len(vocabulary)
vocabulary["a"] = len(vocabulary)
tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
tokenizer.decoder = decoders.Sequence(steps)


def streamed(ids):
    stream, pieces = DecodeStream(ids=[1], skip_special_tokens=True), []
    try:
        for token in ids:
            pieces.append(stream.step(tokenizer, token))
    except Exception as error:
        return pieces, str(error)
    return pieces, ""


def byte(value):
    return vocabulary[f"<0x{value:02X}>"]


stray = [vocabulary["\u2581cat"], byte(0x41), byte(0x80), vocabulary["a"]]
pieces, error = streamed(stray)
print("decode:", ascii(tokenizer.decode(stray)), "| DecodeStream:", ascii(pieces), "then", ascii(error) or "no error")
unfinished = [vocabulary["a"], byte(0xE2), byte(0x82)]
rest, _ = streamed(unfinished)
print("decode:", ascii(tokenizer.decode(unfinished)), "| DecodeStream:", ascii(rest))
same = (
    tokenizer.decode(stray) == "cat\ufffd\ufffda"
    and pieces[:2] == [" cat", "A"]
    and "Invalid prefix" in error
    and rest == ["a", None, None]
)
sys.exit(0 if same else 1)
PY
