"""Tokens per second of `moec serve` for one request and for four at once, and its memory after many requests.

    python benchmarks/serve.py [DIRECTORY] [--tokens 128] [--rounds 5] [--threads 1] [--soak 1000]
    python benchmarks/serve.py --quantize int4:32 --activations int8-dynamic --batch always

DIRECTORY is an artifact; by default, the golden model is exported to ONNX, with `--quantize` in that format. `--batch`
is that of `moec serve`. The server is a separate process. Requests are greedy completions of at most `--tokens` tokens.
One request at a time and four at once are measured alternately in wall time, and the median and the range over rounds
are printed.

Before that, the runner alone decodes batches of 1, 2 and 4 sequences after `--past` tokens, also alternately: the
median CPU time of a step, and the wall time of putting the states into a new batch (`BatchingRunner.gather`).

`--soak N` sends N requests, four at a time, and cuts off five of them in the middle. It prints the memory of the server
(resident set size) after the first tenth of them and after all, and how many of the others failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).parent))
from machine import describe

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = ("The list of arguments is", "CREATE TABLE", "Return the value of the", "This function")
CUT = 5
BATCHES = (1, 2, 4)
CODE = "import sys; from moec.cli import main; main()"


class Server:
    """A server in a separate process."""

    def __init__(self, process: subprocess.Popen[str], port: int, model: str) -> None:
        self.port, self.model, self.memory = port, model, psutil.Process(process.pid)

    def body(self, prompt: str, tokens: int) -> bytes:
        return json.dumps({"model": self.model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}).encode()

    def ask(self, prompt: str, tokens: int) -> int:
        """Send a request; returns the number of tokens of the answer."""
        url, headers = f"http://127.0.0.1:{self.port}/v1/completions", {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(url, self.body(prompt, tokens), headers)) as answer:
            return int(json.load(answer)["usage"]["completion_tokens"])

    def cut_off(self, prompt: str) -> None:
        """Send a request and disconnect before its answer is complete."""
        body = self.body(prompt, 900)
        fields = f"Host: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        with socket.create_connection(("127.0.0.1", self.port)) as client:
            client.sendall(f"POST /v1/completions HTTP/1.1\r\n{fields}\r\n\r\n".encode() + body)
            time.sleep(0.2)

    def rate(self, at_once: int, tokens: int) -> float:
        """Tokens per second of `at_once` simultaneous requests together."""
        start = time.perf_counter()
        with ThreadPoolExecutor(at_once) as pool:
            count = sum(pool.map(lambda prompt: self.ask(prompt, tokens), PROMPTS[:at_once]))
        return count / (time.perf_counter() - start)


@contextlib.contextmanager
def serving(directory: Path, threads: int, batch: str) -> Iterator[Server]:
    command = [sys.executable, "-c", CODE, "serve", str(directory), "--port", "0", "--threads", str(threads)]
    command += ["--batch", batch]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stderr.readline()
        yield Server(process, int(line.split("127.0.0.1:")[1].split("/")[0]), directory.resolve().name)
    finally:
        process.terminate()
        process.wait()


def time_batches(directory: Path, threads: int, past: int, steps: int = 100) -> None:
    """Print the time of a step, and of a new batch, by the number of sequences."""
    import moec
    from moec.targets.runners import BatchingRunner, Row, fork

    generator = moec.load(directory, threads=threads)
    prompt = np.random.default_rng(0).integers(3, 1000, (1, past))
    sources = [fork(generator.runner) for _ in range(max(BATCHES))]
    for source in sources:
        source.prefill(prompt)
    batches = {size: fork(generator.runner) for size in BATCHES}
    gathering: dict[int, list[float]] = {size: [] for size in BATCHES}
    for size, batch in batches.items():
        for _ in range(5):
            start = time.perf_counter()
            assert isinstance(batch, BatchingRunner)
            batch.gather([Row(source) for source in sources[:size]])
            gathering[size].append(time.perf_counter() - start)
    decoding: dict[int, list[float]] = {size: [] for size in BATCHES}
    for _ in range(steps):
        for size, batch in batches.items():
            start = time.process_time()
            batch.decode(np.full((size, 1), 5))
            decoding[size].append(time.process_time() - start)
    for size in BATCHES:
        step, new = (1e3 * statistics.median(found[size]) for found in (decoding, gathering))
        rate = 1e3 * size / step
        print(f"batch of {size}: {step:.2f} ms of CPU per step, {rate:.0f} tokens/s; {new:.2f} ms for a new batch")


def soak(server: Server, requests: int) -> None:
    failed = 0
    sizes: list[float] = []

    def one(number: int) -> bool:
        if number % (requests // CUT) == requests // CUT // 2:
            server.cut_off(PROMPTS[0])
            return True
        return server.ask(PROMPTS[number % len(PROMPTS)], 16) > 0

    with ThreadPoolExecutor(4) as pool:
        for part in (range(requests // 10), range(requests // 10, requests)):
            for future in [pool.submit(one, number) for number in part]:
                try:
                    failed += not future.result()
                except OSError:
                    failed += 1
            sizes.append(server.memory.memory_info().rss / 1e6)
    print(
        f"{requests} requests, {CUT} cut off: {failed} of the others failed; memory {sizes[0]:.1f} MB after a tenth, "
        f"{sizes[1]:.1f} MB after all ({sizes[1] / sizes[0] - 1:+.1%})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, nargs="?")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--past", type=int, default=128)
    parser.add_argument("--quantize")
    parser.add_argument("--activations", default="auto")
    parser.add_argument("--batch", default="auto")
    parser.add_argument("--soak", type=int, default=0)
    chosen = parser.parse_args()
    print(describe())
    with tempfile.TemporaryDirectory() as work:
        directory = chosen.directory
        if directory is None:
            import moec

            directory = Path(work) / "golden"
            quantize = chosen.quantize and {"format": chosen.quantize, "activations": chosen.activations}
            model = ROOT / "golden_models" / "olmoe-tiny"
            moec.export(model, target="onnx", output=directory, gates=False, quantize=quantize)
        time_batches(directory, chosen.threads, chosen.past)
        with serving(directory, chosen.threads, chosen.batch) as server:
            server.rate(4, chosen.tokens)
            rates: dict[int, list[float]] = {1: [], 4: []}
            for _ in range(chosen.rounds):
                for at_once, found in rates.items():
                    found.append(server.rate(at_once, chosen.tokens))
            for at_once, found in rates.items():
                middle = statistics.median(found)
                print(f"{at_once} at once: {middle:.1f} tokens/s together ({min(found):.1f} to {max(found):.1f})")
            print(f"four at once / one: {statistics.median(rates[4]) / statistics.median(rates[1]):.2f}")
            if chosen.soak:
                soak(server, chosen.soak)


if __name__ == "__main__":
    main()
