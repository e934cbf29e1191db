"""Train a golden model from Debian's packages of free text: one command, no other source.

    python golden_models/train.py --output olmoe-tiny-again
    python golden_models/train.py --architecture qwen3_next --threads 2 --output qwen3-next-tiny-again

Needs a Debian system (apt-get and dpkg-deb, no root), torch and transformers. The corpus is built from
the packages in `PACKAGES`, without any passage of the calibration and held-out texts. The schedule is counted in
steps, so two runs with the same seed on the same machine give the same weights, and on another machine the same
up to floating-point noise.
"""

from __future__ import annotations

import argparse
import html.parser
import math
import re
import struct
import subprocess
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MODEL = Path(__file__).resolve().parent / "olmoe-tiny"
PACKAGES = ("python3.11-doc", "postgresql-doc-15", "wordnet-base", "r-cran-janeaustenr")
END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 4096
WINDOW = 256
BATCH = 16
PEAK_LEARNING_RATE = 2e-3
FINAL_LEARNING_RATE = 0.03  # as a fraction of the peak
WARMUP_STEPS = 100
WORDNET_CHARACTERS = 4_400_000
AUSTEN_CHARACTERS = 3_300_000  # the held-out text is the end of the last novel
SHORT_LINE = 24
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 1024,
    "router_aux_loss_coef": 0.01,
    "output_router_logits": True,
    "use_cache": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
"""Fields of the configuration that all golden models share."""


def unpack_packages(work: Path) -> Path:
    """Download and unpack `PACKAGES` below `work` without installing them; what is there is kept.

    Raises:
        subprocess.CalledProcessError: apt-get or dpkg-deb failed.
    """
    root = work / "root"
    work.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        if (root / "usr/share/doc" / package).exists():
            continue
        subprocess.run(["apt-get", "download", package], cwd=work, check=True)
        (archive,) = work.glob(f"{package}_*.deb")
        subprocess.run(["dpkg-deb", "-x", archive, root], check=True)
    return root


class _PageText(html.parser.HTMLParser):
    """Text of an HTML page, without scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        del attrs
        self._hidden += tag in {"script", "style"}
        if tag in {"p", "pre", "li", "tr", "h1", "h2", "h3", "dt"}:
            self.parts.append("\n\n")

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in {"script", "style"}

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(data)


def python_documentation(root: Path) -> str:
    """Sources of the Python documentation: reStructuredText, licence of the PSF."""
    sources = root / "usr/share/doc/python3.11/html/_sources"
    return "\n\n".join(page.read_text(errors="replace") for page in sorted(sources.rglob("*.rst.txt")))


def postgresql_manual(root: Path) -> str:
    """Text of the PostgreSQL manual, PostgreSQL licence."""
    pages = []
    for page in sorted((root / "usr/share/doc/postgresql-doc-15/html").glob("*.html")):
        parser = _PageText()
        parser.feed(page.read_text(errors="replace"))
        pages.append(re.sub(r"\n{3,}", "\n\n", "".join(parser.parts)))
    return "\n\n".join(pages)


def wordnet_glosses(root: Path) -> str:
    """One definition per line (the gloss up to its first example), WordNet licence."""
    database = root / "usr/share/wordnet"
    parts = [(database / f"data.{part}").read_text(errors="replace") for part in ("noun", "verb", "adj", "adv")]
    # The licence at the head of each file is indented by two spaces.
    entries = [line for line in "".join(parts).splitlines() if " | " in line and not line.startswith("  ")]
    glosses = [entry.split(" | ", 1)[1].split('; "')[0].strip() for entry in entries]
    return "\n".join(glosses)[:WORDNET_CHARACTERS]


def austen_novels(root: Path) -> str:
    """Jane Austen's novels, public domain, from an R lazy-load database.

    The database is a row of `big-endian length, zlib stream`; each stream is an R character vector in XDR
    form, one string per line of the book.
    """
    database = root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
    data, books, position = database.read_bytes(), [], 0
    while position < len(data):
        stream = zlib.decompressobj()
        content = stream.decompress(data[position + 4 :])
        position = len(data) - len(stream.unused_data)
        books.append("\n".join(_r_strings(content)))
    return "\n\n".join(books)[:AUSTEN_CHARACTERS]


def _r_strings(content: bytes) -> Iterator[str]:
    """Strings of the first character vector (type 16) in R's XDR serialization; type 9 is one string."""
    header = content.index(b"\x00\x00\x00\x10")
    (count,) = struct.unpack_from(">i", content, header + 4)
    position = header + 8
    for _ in range(count):
        flags, length = struct.unpack_from(">Ii", content, position)
        if flags & 0xFF != 9:
            raise ValueError(f"R character vector: expected a string at byte {position}, found type {flags & 0xFF}")
        position += 8
        yield content[position : position + max(length, 0)].decode("utf-8", errors="replace")
        position += max(length, 0)


def without_reserved(text: str, reserved: set[str]) -> str:
    """`text` without the lines that the reserved texts contain, white space aside.

    Lines of fewer than `SHORT_LINE` characters ("}", ".. note::") say nothing about a passage and stay.
    """
    return "\n".join(line for line in text.splitlines() if " ".join(line.split()) not in reserved)


def reserved_lines() -> set[str]:
    """Lines of the calibration and held-out texts, with white space normalised."""
    texts = (path.read_text() for path in sorted((MODEL / "texts").glob("*.txt")))
    lines = (" ".join(line.split()) for text in texts for line in text.splitlines())
    return {line for line in lines if len(line) >= SHORT_LINE}


def training_texts(work: Path) -> list[str]:
    """The corpus, about 26 million characters, one string per source."""
    root, reserved = unpack_packages(work), reserved_lines()
    sources = (python_documentation, postgresql_manual, wordnet_glosses, austen_novels)
    return [without_reserved(source(root), reserved) for source in sources]


def chunks(texts: list[str], size: int) -> list[str]:
    """Cut the texts in pieces of `size` characters: the tokenizer's time grows faster than their length."""
    return [text[start : start + size] for text in texts for start in range(0, len(text), size)]


def new_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE with `VOCABULARY` entries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    # A tenth of the corpus, spread over all of it, is enough for 4096 entries.
    tokenizer.train_from_iterator(chunks(texts, 10_000)[::10], trainer)
    return tokenizer


def new_olmoe() -> OlmoeForCausalLM:
    """OLMoE with 9.46 M parameters: 4 layers, 16 experts, top-4; drawn from torch's global random state."""
    config = OlmoeConfig(
        hidden_size=256,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=16,
        num_experts_per_tok=4,
        **COMMON,
    )
    return OlmoeForCausalLM(config)


def new_qwen3_next() -> Qwen3NextForCausalLM:
    """Qwen3-Next with 6.15 M parameters: three layers of gated delta rule and one of attention; 16 experts, top-4."""
    config = Qwen3NextConfig(
        hidden_size=192,
        num_hidden_layers=4,
        layer_types=["linear_attention", "linear_attention", "linear_attention", "full_attention"],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        linear_num_key_heads=4,
        linear_num_value_heads=8,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        moe_intermediate_size=96,
        shared_expert_intermediate_size=96,
        num_experts=16,
        num_experts_per_tok=4,
        tie_word_embeddings=False,
        **COMMON,
    )
    model = Qwen3NextForCausalLM(config)
    model.set_experts_implementation("eager")  # the fastest of the three for backward on a CPU
    return model


ARCHITECTURES: dict[str, tuple[Callable[[], PreTrainedModel], int]] = {
    "olmoe": (new_olmoe, 2588),
    "qwen3_next": (new_qwen3_next, 1500),
}
"""Name -> what makes the model, and the steps of its schedule."""


def learning_rate(step: int, progress: float) -> float:
    """Linear warm-up, then a cosine from the peak to 3 % of it; `progress` runs from 0 to 1."""
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    decay = FINAL_LEARNING_RATE + (1 - FINAL_LEARNING_RATE) * cosine
    return PEAK_LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS) * decay


def train(model: PreTrainedModel, tokens: torch.Tensor, *, steps: int, minutes: float, seed: int) -> int:
    """Train in place and return the number of steps made.

    Args:
        model: Updated in place.
        tokens: int64 [N], the corpus.
        steps: Length of the schedule.
        minutes: Time limit; where it ends the run first, the schedule follows the clock and the weights
            depend on the speed of the machine.
        seed: Seed of the windows' positions.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.05)
    model.train()
    start, step, progress = time.monotonic(), 0, 0.0
    while progress < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, progress)
        offsets = torch.randint(0, len(tokens) - WINDOW, (BATCH,), generator=generator).tolist()
        batch = torch.stack([tokens[offset : offset + WINDOW] for offset in offsets])
        loss: Any = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        elapsed = time.monotonic() - start
        progress = max(step / steps, elapsed / 60 / minutes)
        if step % 20 == 0 or progress >= 1:
            print(f"step {step} loss {loss.item():.3f} {step * BATCH * WINDOW / elapsed:.0f} tokens/s", flush=True)
    return step


def save(model: PreTrainedModel, tokenizer: Tokenizer, output: Path) -> None:
    """Write an fp16 checkpoint with its tokenizer."""
    model.config.output_router_logits = False
    model.config.use_cache = True
    torch.nn.Module.half(model)
    model.save_pretrained(output)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )
    wrapped.save_pretrained(output)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="directory of the checkpoint")
    parser.add_argument("--work", type=Path, default=Path("golden-corpus"), help="where packages are unpacked")
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="olmoe", help="(default: olmoe)")
    parser.add_argument("--steps", type=int, help="steps of 16 x 256 tokens (default: 2588, qwen3_next: 1500)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="time limit (default: none)")
    parser.add_argument("--seed", type=int, default=1, help="seed of weights and windows (default: 1)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    parser.add_argument("--new-tokenizer", action="store_true", help="train the tokenizer too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    texts = training_texts(options.work)
    tokenizer = new_tokenizer(texts) if options.new_tokenizer else Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    encodings = tokenizer.encode_batch(chunks(texts, 20_000))
    tokens = torch.tensor([token for encoding in encodings for token in encoding.ids])
    print(f"{sum(map(len, texts))} characters, {len(tokens)} tokens", flush=True)
    make, planned = ARCHITECTURES[options.architecture]
    model = make()
    steps = train(model, tokens, steps=options.steps or planned, minutes=options.minutes, seed=options.seed)
    save(model, tokenizer, options.output)
    print(f"{steps} steps, {steps * BATCH * WINDOW} tokens: {options.output}")


if __name__ == "__main__":
    main()
