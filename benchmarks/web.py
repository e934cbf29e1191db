"""Tokens per second of a page of `moec web` beside `moec run`, with the same number of threads.

    python benchmarks/web.py ARTIFACT [--tokens 64] [--rounds 3] [--threads 1] [--budget 50] [--beside ARTIFACT]

The page runs in Chromium without a window (WebAssembly), driven by playwright-core, which npm fetches into a temporary
folder. Page and `moec run` are measured alternately on the same prompt, and the best of the rounds is printed, in
tokens per second of wall time after the first token. The load of the page is printed too: reading and checking the
stored files, opening the session, and beside them the time of reading the files in Python. With `--budget`, the page
generates at that percentage of the experts as well.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(1, str(Path(__file__).parents[1]))
from machine import describe

import moec
from moec.compiler.web.packages import command, pinned_packages
from moec.compiler.web.site import make_site
from tests.support.static_server import serving

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "The list of arguments is"
DRIVER = ROOT / "tests" / "interop" / "drive_page.mjs"
PLAYWRIGHT = "playwright-core@1.65.1"


def prepare(folder: Path) -> None:
    """Put the driver and the packages into `folder`."""
    install = ["npm", "install", "--silent", "--ignore-scripts", "--prefix", str(folder), PLAYWRIGHT]
    subprocess.run(install, check=True)
    subprocess.run(command(pinned_packages(), str(folder)), shell=True, check=True, stdout=subprocess.DEVNULL)
    shutil.copy(DRIVER, folder)


def in_page(folder: Path, url: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Generate in the page; the profile of the browser, and so the stored model, is kept between calls."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    asked = {
        "url": f"{url}?load&threads={arguments.threads}",
        "browser": browser,
        "profile": str(folder / "profile"),
        "prompts": [PROMPT],
        "count": arguments.tokens,
        "budget": arguments.budget,
        "timeout": 600_000,
    }
    words = ["node", str(folder / DRIVER.name), json.dumps(asked)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    seen: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert seen["state"] == "ready", seen
    return seen


def in_python(generator: Any, tokens: int) -> float:
    """Tokens per second of `moec run`."""
    generator.generate(PROMPT, max_new_tokens=tokens)
    return float(generator.statistics.decode_rate)


def reading(site: Path) -> float:
    """Seconds to read the files of the model, which are in the cache of the system."""
    start = time.perf_counter()
    for path in (site / "model").rglob("*"):
        if path.is_file():
            path.read_bytes()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--beside", type=Path, help="another artifact of the model for `moec run`")
    parser.add_argument("--budget", type=int, default=None)
    arguments = parser.parse_args()
    print(describe())
    rates: dict[str, list[float]] = {"moec run": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        make_site(arguments.artifact, folder / "site", packages=folder)
        directories = {"moec run": arguments.artifact, "moec run, other artifact": arguments.beside}
        generators = {
            label: moec.load(path, threads=arguments.threads) for label, path in directories.items() if path is not None
        }
        for generator in generators.values():
            generator.eos_token_ids = ()
        with serving(folder / "site") as server:
            for _ in range(arguments.rounds):
                seen = in_page(folder, server.url, arguments)
                for answer in seen["answers"][0]:
                    rate = float(answer["figures"]["rate"].split(" ")[0])
                    rates.setdefault(f"page: {answer['title']}", []).append(rate)
                for label, generator in generators.items():
                    rates.setdefault(label, []).append(in_python(generator, arguments.tokens))
                print(json.dumps(seen["device"]))
        print(f"reading the files in Python: {reading(folder / 'site'):.2f} s")
    best = max(rates["moec run"])
    for label, found in rates.items():
        print(f"{label:60} {max(found):8.2f} tokens/s  {max(found) / best:5.2f} x moec run")


if __name__ == "__main__":
    main()
