"""Every family that moec has a tiny model of, as a site of `moec web` in onnxruntime-web (WebAssembly) under Node.js.

    python benchmarks/web_families.py [FAMILY ...] [--resume rows.json] [-o docs/families-web.md]

Each model is exported with `--flavor web`, in float32 and in int4, and made a site. The page's own model.js feeds a
prompt and single tokens; its logits are compared with those of `moec run` (onnxruntime), relative to the largest.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from pages import put

import moec
from moec.compiler.common.errors import MoecError
from moec.compiler.common.progress_bars import no_progress_bars
from moec.compiler.families.tiny_models import family_names, tiny_model
from moec.compiler.web.packages import command, pinned_packages
from moec.compiler.web.site import make_site

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "golden_models" / "olmoe-tiny"
SCRIPT = Path(__file__).with_name("web_logits.mjs")
STEPS = [list(range(40, 60)), [7], [301], [12], [4000]]
"""A prompt and four tokens."""
LIMIT = 1e-4
"""Largest difference relative to the largest logit: both runtimes compute in float32, also with the codes of int4."""
FORMATS = (None, "int4")


def prepare(folder: Path) -> None:
    """Put onnxruntime-web, the script and the page's packages into `folder`."""
    (runtime,) = (package for package in pinned_packages() if package.name == "onnxruntime-web")
    named = f"{runtime.name}@{runtime.version}"
    install = ["npm", "install", "--silent", "--ignore-scripts", "--prefix", str(folder), named]
    subprocess.run(install, check=True)
    subprocess.run(command(pinned_packages(), str(folder)), shell=True, check=True, stdout=subprocess.DEVNULL)
    shutil.copy(SCRIPT, folder)


def checkpoint(family: str, folder: Path) -> Path:
    """A tiny model with the tokenizer of the golden model, which a page needs."""
    with no_progress_bars():
        tiny_model(family, vocab_size=4096).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(GOLDEN / name, folder)
    return folder


def in_node(packages: Path, site: Path) -> tuple[np.ndarray, str]:
    """Logits [step, V] of the last token of each step, and the version of the runtime.

    Raises:
        RuntimeError: The runtime cannot open or run the model.
    """
    words = ["node", str(packages / SCRIPT.name), str(site), json.dumps(STEPS)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "rror" in line]
        raise RuntimeError(lines[0] if lines else done.stderr[-300:])
    said = json.loads(done.stdout.splitlines()[-1])
    return np.asarray(said["logits"], np.float32), said["version"]


def judged(family: str, quantize: str | None, packages: Path, folder: Path) -> dict[str, Any]:
    """The row of a family in one format."""
    artifact, site = folder / "artifact", folder / "site"
    section = None if quantize is None else {"format": quantize, "rounding": "rtn"}
    options = {"flavor": "web"}
    try:
        source = checkpoint(family, folder / "checkpoint")
        moec.export(source, target="onnx", output=artifact, options=options, quantize=section, gates=False)
        make_site(artifact, site, packages=packages)
    except MoecError as error:
        return {"refused": error.message}
    runner = moec.load(artifact).runner
    first, *others = (np.asarray([tokens]) for tokens in STEPS)
    want = [runner.prefill(first)[0, -1], *(runner.decode(tokens)[0, -1] for tokens in others)]
    try:
        found, version = in_node(packages, site)
    except RuntimeError as error:
        return {"failed": str(error)}
    difference = float(np.abs(found - want).max() / np.abs(want).max())
    same = bool((found.argmax(axis=1) == np.asarray(want).argmax(axis=1)).all())
    return {"difference": difference, "same": same, "version": version}


def cell(row: Mapping[str, Any]) -> str:
    """What the page says of a row; an empty one was not run."""
    if not row:
        return "not run"
    if "difference" not in row:
        return "refused" if "refused" in row else "**fails**"
    says = f"{row['difference']:.1e}"
    return says if row["difference"] <= LIMIT else f"**{says}**"


def page(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The table, with a line above that counts."""
    lines = ["| family | float32 | int4 | |", "|---|---|---|---|"]
    works = dict.fromkeys(FORMATS, 0)
    for family, formats in sorted(rows.items()):
        cells, notes = [], []
        for name in FORMATS:
            row = formats.get(str(name), {})
            works[name] += row.get("difference", np.inf) <= LIMIT
            cells.append(cell(row))
            notes += [row[key] for key in ("refused", "failed") if key in row and row[key] not in notes]
        lines.append(f"| {family} | {' | '.join(cells)} | {'; '.join(notes).replace('|', ' ')} |")
    versions = {row["version"] for formats in rows.values() for row in formats.values() if "version" in row}
    counted = ", ".join(f"{count} in {name or 'float32'}" for name, count in works.items())
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    total = f"{len(rows)} families, of which these work: {counted}."
    made = f"onnxruntime-web {', '.join(sorted(versions))}, commit {done.stdout.strip()}."
    return "\n".join([f"{total} {made}", "", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="names; by default all")
    parser.add_argument("--resume", type=Path, help="file in which rows are kept, to continue where a run was stopped")
    parser.add_argument("-o", "--output", type=Path, help="page in which the table is put")
    arguments = parser.parse_args()
    kept = arguments.resume
    rows: dict[str, dict[str, Any]] = json.loads(kept.read_text()) if kept and kept.is_file() else {}
    with tempfile.TemporaryDirectory() as name:
        packages = Path(name)
        prepare(packages)
        for quantize, family in itertools.product(FORMATS, arguments.families or family_names()):
            if str(quantize) in rows.get(family, {}):
                continue
            with tempfile.TemporaryDirectory() as folder:
                row = judged(family, quantize, packages, Path(folder))
            rows.setdefault(family, {})[str(quantize)] = row
            print(family, quantize, row, flush=True)
            if kept:
                kept.write_text(json.dumps(rows, indent=1))
    if arguments.output:
        put(page(rows), arguments.output)


if __name__ == "__main__":
    main()
