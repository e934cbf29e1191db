"""An artifact of `--flavor genai` in onnxruntime-genai, with its shared buffer and its own search."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moec.targets.onnx.target import Provider

pytestmark = pytest.mark.interop


def test_greedy_tokens(
    genai: Any, export_golden: Callable[[str], Path], golden_prompts: list[tuple[list[int], list[int]]]
) -> None:
    directory = export_golden("genai")
    model = genai.Model(str(directory))
    for prompt, greedy in golden_prompts:
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=len(prompt) + len(greedy))
        generator = genai.Generator(model, parameters)
        generator.append_tokens(np.asarray(prompt, dtype=np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        assert list(generator.get_sequence(0)) == prompt + greedy


def test_text_and_padded_batch(genai: Any, export_golden: Callable[[str], Path]) -> None:
    """Its tokenizer reads ours, and a batch that it pads on the left answers as its sequences alone."""
    from tokenizers import Tokenizer

    directory = export_golden("genai")
    model = genai.Model(str(directory))
    tokenizer, own = genai.Tokenizer(model), Tokenizer.from_file(str(directory / "tokenizer.json"))
    texts = ["The function returns", "It is a truth universally acknowledged, that a single man"]
    ids = [list(tokenizer.encode(text)) for text in texts]
    assert ids == [own.encode(text).ids for text in texts]

    def answer(prompts: list[str]) -> list[list[int]]:
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=40, batch_size=len(prompts))
        generator = genai.Generator(model, parameters)
        generator.append_tokens(tokenizer.encode_batch(prompts))
        for _ in range(16):
            generator.generate_next_token()
        return [list(generator.get_sequence(index))[-16:] for index in range(len(prompts))]

    assert answer(texts) == [answer([text])[0] for text in texts]


@pytest.mark.parametrize("beams", [1, 3])
def test_cache_in_int8(genai: Any, golden_model: Path, tmp_path: Path, beams: int) -> None:
    """Its buffers are int8: greedily and with beams, it finds what a search over moec's own runner finds."""
    import moec
    from moec.targets import get_target

    wanted = {"kv_cache": "int8", "windows": 4, "window": 64}
    moec.export(golden_model, target="onnx", output=tmp_path / "out", flavor="genai", gates=False, quantize=wanted)
    model, own = genai.Model(str(tmp_path / "out")), get_target("onnx").open(tmp_path / "out", threads=1)
    prompt, new = np.arange(40, 60, dtype=np.int32), 16
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + new, num_beams=beams)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    found = list(generator.get_sequence(0))
    if beams == 1:
        generator.rewind_to(len(prompt) + 4)
        while not generator.is_done():
            generator.generate_next_token()
        assert list(generator.get_sequence(0)) == found
    held = [(0.0, prompt.tolist())]
    for _ in range(new):
        logits = [own.prefill(np.asarray([ids]))[0, -1].astype(np.float64) for _, ids in held]
        scores = [each - each.max() - np.log(np.exp(each - each.max()).sum()) for each in logits]
        grown = [
            (total + score[token], [*ids, int(token)])
            for (total, ids), score in zip(held, scores, strict=True)
            for token in np.argsort(-score)[:beams]
        ]
        held = sorted(grown, key=lambda item: -item[0])[:beams]
    assert found == held[0][1]


def test_names_of_execution_providers(genai: Any, export_golden: Callable[[str], Path]) -> None:
    """It knows every name that `--provider` takes, whether or not this build has the provider."""
    directory = export_golden("genai")
    described = json.loads((directory / "genai_config.json").read_text())
    refused = {}
    for provider in (*Provider, "nonsense"):
        options = [] if provider is Provider.CPU else [{str(provider): {}}]
        described["model"]["decoder"]["session_options"]["provider_options"] = options
        (directory / "genai_config.json").write_text(json.dumps(described))
        try:
            genai.Model(str(directory))
        except RuntimeError as error:
            refused[str(provider)] = "Unknown provider name" in str(error)
    assert [name for name, unknown in refused.items() if unknown] == ["nonsense"]
    assert "cpu" not in refused


def test_packed_weights(genai: Any, golden_model: Path, tmp_path: Path) -> None:
    """A packed copy gives the logits of the artifact bit for bit."""
    import moec
    from moec.compiler.run.packing import pack_into

    quantize = {"format": "int4", "rounding": "rtn"}
    moec.export(golden_model, target="onnx", output=tmp_path / "out", flavor="genai", gates=False, quantize=quantize)
    pack_into(tmp_path / "out", tmp_path / "packed", lambda *_: None)
    found = []
    for directory in (tmp_path / "out", tmp_path / "packed"):
        model = genai.Model(str(directory))
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=64, do_sample=False)
        generator = genai.Generator(model, parameters)
        generator.append_tokens(np.array([5, 20, 300, 7], np.int32))
        logits = []
        for _ in range(40):
            generator.generate_next_token()
            logits.append(np.array(generator.get_logits()).ravel())
        found.append((list(generator.get_sequence(0)), np.concatenate(logits)))
    assert found[0][0] == found[1][0]
    assert len(found[0][0]) == 44
    np.testing.assert_array_equal(found[0][1], found[1][1])


@pytest.mark.parametrize("family", ["qwen3_next", "nemotron_h", "jamba", "deepseek_v3", "kimi_linear"])
def test_states(genai: Any, family: str, tmp_path: Path) -> None:
    """Those of recurrent layers are found by their names, and those of latent attention have one width for all."""
    import moec
    from moec.compiler.families.tiny_models import write_tiny_checkpoint
    from moec.targets import get_target

    checkpoint, directory = tmp_path / "checkpoint", tmp_path / "out"
    write_tiny_checkpoint(family, checkpoint, tokenizer=True)
    moec.export(str(checkpoint), target="onnx", output=directory, flavor="genai", gates=False)
    prompt = np.random.default_rng(0).integers(3, 128, 21).astype(np.int32)
    runner, want = get_target("onnx").open(directory), prompt.tolist()
    logits = runner.prefill(prompt[None])
    for _ in range(16):
        want.append(int(logits[0, -1].argmax()))
        logits = runner.decode(np.array([want[-1:]]))
    model = genai.Model(str(directory))
    for cuts in ((21,), (8, 21)):
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=len(want), do_sample=False)
        generator, start = genai.Generator(model, parameters), 0
        for cut in cuts:
            generator.append_tokens(prompt[start:cut])
            start = cut
        while not generator.is_done():
            generator.generate_next_token()
        got = list(generator.get_sequence(0))
        assert got == want[: len(got)]
        assert len(got) > len(prompt)
