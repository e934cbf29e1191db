"""How much of what dropped experts cost a compensation can restore at best: `python benchmarks/compensation_bound.py`.

Routing is `threshold`, fitted to a share of the slots in each MoE layer. What stands in for the dropped experts is
fitted to text (see docs/routing.md): with ranks that a search may choose, and with full rank, where its linear part is
the best map of the hidden state that there is. The expert FLOPs are those of the kept slots alone, so the work of a
compensation, which would exceed that of an expert at full rank, counts as nothing.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from arguments import add_flags
from machine import describe

from moec.compiler.common import markdown
from moec.compiler.search.session import Opened, open_search
from moec.compiler.search.settings import make_settings
from moec.compiler.search.space import RULES, Rule
from moec.compiler.search.variant import Variant
from moec.compiler.text.corpus import held_out_text
from moec.compiler.text.perplexity import increase_interval

MODEL = Path(__file__).resolve().parents[1] / "golden_models" / "qwen3-next-tiny"
LEVELS = (80, 70, 60)
"""Slots that are kept, in percent."""


def silent(*_: object) -> None:
    """Shows nothing."""


def variants(found: Opened, level: int) -> Iterator[tuple[str, Variant]]:
    """Without a compensation, with renormalized weights, and with compensations of growing rank."""
    space, rows = found.space, found.evaluator.program.layers
    unchanged = Variant.unchanged(found.evaluator.program, found.evaluator.parts)
    none, quarter, full = (
        [0] * len(rows),
        [row.intermediate_size // 4 for row in rows],
        [row.hidden_size for row in rows],
    )
    for name, renormalize, ranks in (
        ("none", False, none),
        ("none, renormalized", True, none),
        ("rank 1/4", False, quarter),
        ("full rank", False, full),
    ):
        fitted = [space.policy(index, RULES.index(Rule("threshold", renormalize)), level) for index in range(len(rows))]
        chosen = [replace(own, compensation=rank) for own, rank in zip(fitted, ranks, strict=True) if own is not None]
        yield name, replace(unchanged, policies=tuple(chosen))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, checkpoint=str(MODEL), held_out_windows=128)
    arguments = parser.parse_args()
    about = describe()
    settings = make_settings(
        {"checkpoint": arguments.checkpoint, "target": "onnx", "objectives": "perplexity,expert-flops"}
    )
    with tempfile.TemporaryDirectory() as folder:
        found = open_search(settings, Path(folder), silent)
        held = found.evaluator.on(held_out_text(None), arguments.held_out_windows)
        every = len(held.windows)
        reference = np.array(held.evaluate({}, 0, every).losses)
        table = []
        for level in LEVELS:
            for name, variant in variants(found, level):
                measured = held.evaluate(variant.sections(found.evaluator.parts), 0, every)
                lost = np.array(measured.losses) - reference
                low, high = increase_interval(lost)
                kept = f"{np.mean(measured.kept):.1%}"
                table.append([kept, name, f"{np.expm1(lost.mean()):+.2%}", f"[{low:+.2%}, {high:+.2%}]"])
    print(markdown.table(["slots kept", "compensation", "perplexity", "95 %"], table) + f"\n\n{about}")


if __name__ == "__main__":
    main()
