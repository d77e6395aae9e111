"""Many clients at one `hart-infer serve` with hart-mini, as JSON: latency, pictures a second, lost or swapped answers.

    python benchmarks/serve_load.py --clients 200 --seconds 60 --out benchmarks/results/serve_load.json

Each client asks for a picture, waits for it, and asks for the next (a closed loop), over loopback; after --seconds all wait
for their last answers, which belong to the figures. The server runs twice, with batches and with `--max-batch 1`; before,
between and after, the bare pipeline draws batches of the same pictures in a process of its own, as a worker does. Every
answer is compared with the bare pipeline's picture of its prompt and seed. Server, worker and clients share this machine's
cores.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import hashlib
import io
import itertools
import json
import multiprocessing
import random
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import measure
from PIL import Image

PROMPTS = ["a cat, noto style", "a pizza", "a robot, fluent style", "a rocket", "a snowman", "a dog", "a car", "a tree"]
SEEDS = range(8)
MODEL = "hart-mini"
Picture = tuple[str, int]  # prompt and seed
POOL: list[Picture] = list(itertools.product(PROMPTS, SEEDS))


@dataclass
class Load:
    """What the clients of one run saw."""

    seconds: float = 0.0  # from the first request to the last answer
    latencies: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    lost: int = 0  # requests without an answer
    swapped: int = 0  # answers with another picture than their prompt's and seed's
    busy: float = 0.0  # share of the time in which the worker drew
    rows: float = 0.0  # pictures of a batch

    def report(self) -> dict[str, Any]:
        """Return its figures."""
        cuts = statistics.quantiles(self.latencies, n=100) if len(self.latencies) > 1 else [0.0] * 99
        return {
            "pictures_per_second": len(self.latencies) / self.seconds,
            "p50_seconds": cuts[49],
            "p95_seconds": cuts[94],
            "p99_seconds": cuts[98],
            "answers_by_status": {str(status): count for status, count in sorted(self.statuses.items())},
            "lost": self.lost,
            "swapped": self.swapped,
            "worker_busy_share": self.busy,
            "pictures_per_batch": self.rows,
        }


def main() -> None:
    """Run it all and print the figures."""
    options = _parse()
    measure.check_out(options.out)
    bare = [_bare(options.batch, options.bare_seconds)]
    expected = bare[0].pop("pictures")
    assert len(set(expected.values())) == len(POOL), "two pictures of the pool are equal, so a swap could be missed"
    runs = {}
    for name, batch in (("batched", options.batch), ("unbatched", 1)):
        with _server(batch, options.clients) as address:
            load = asyncio.run(_load(address, options.clients, options.seconds, expected))
        runs[name] = load.report()
        bare.append(_bare(options.batch, options.bare_seconds))
        bare[-1].pop("pictures")
        print(json.dumps({name: runs[name]}, indent=2), flush=True)
    rates = [each["pictures_per_second"] for each in bare]
    beside = {"batched": sum(rates[:2]) / 2, "unbatched": sum(rates[1:]) / 2}
    record = {
        "machine": measure.machine(),
        "settings": {name: value for name, value in vars(options).items() if name != "out"} | {"model": MODEL},
        "runs": runs,
        "bare_pictures_per_second": rates,
        "overhead_of_http": {name: 1 - runs[name]["pictures_per_second"] / beside[name] for name in runs},
        "batched_over_unbatched": runs["batched"]["pictures_per_second"] / runs["unbatched"]["pictures_per_second"],
    }
    print(json.dumps({name: record[name] for name in list(record)[3:]}, indent=2))
    if options.out:
        measure.write_json(options.out, record)


async def _load(address: str, clients: int, seconds: float, expected: dict[Picture, str]) -> Load:
    """Have clients ask for `seconds`, then wait for their last answers."""
    load = Load()
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx2.AsyncClient(base_url=address, timeout=600, limits=limits) as http:
        while (await http.get("/readyz")).status_code != 200:
            await asyncio.sleep(0.2)
        before = await _worker(http)
        start = time.perf_counter()
        end = start + seconds
        asking = [asyncio.create_task(_client(http, end, random.Random(number), load, expected)) for number in range(clients)]
        await asyncio.gather(*asking)
        load.seconds = time.perf_counter() - start
        after = await _worker(http)
        load.busy = (after["seconds"] - before["seconds"]) / load.seconds
        load.rows = (after["rows"] - before["rows"]) / (after["batches"] - before["batches"])
    return load


async def _client(
    http: httpx2.AsyncClient, end: float, chance: random.Random, load: Load, expected: dict[Picture, str]
) -> None:
    while time.perf_counter() < end:
        prompt, seed = chance.choice(POOL)
        start = time.perf_counter()
        try:
            response = await http.post("/v1/images/generations", json={"prompt": prompt, "seed": seed})
        except httpx2.HTTPError:
            load.lost += 1
            continue
        latency = time.perf_counter() - start
        load.statuses[response.status_code] += 1
        if response.status_code != 200:
            await asyncio.sleep(float(response.headers.get("retry-after", 1)))
            continue
        (data,) = response.json()["data"]
        pixels = Image.open(io.BytesIO(base64.b64decode(data["b64_json"]))).convert("RGB").tobytes()
        load.swapped += _digest(pixels) != expected[prompt, seed] or data["seed"] != seed
        load.latencies.append(latency)


async def _worker(http: httpx2.AsyncClient) -> dict[str, float]:
    """Return what the worker has done so far, by the server's metrics."""
    page = (await http.get("/metrics")).text
    names = {"seconds": "batch_seconds_sum", "batches": "batch_seconds_count", "rows": "batch_rows_sum"}
    lines = {each: rf'^hart_infer_{name}{{model="{MODEL}"}} (\S+)$' for each, name in names.items()}
    found = {each: re.findall(line, page, re.MULTILINE) for each, line in lines.items()}
    return {each: float(values[0]) for each, values in found.items()}


@contextmanager
def _server(batch: int, clients: int) -> Iterator[str]:
    command = [sys.executable, "-m", "hart_infer", "serve", "--port", "0", "--max-batch", str(batch)]
    command += ["--max-queue", str(2 * clients), "--timeout", "600"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        address = re.findall(r"http://\S+(?=/v1)", process.stderr.readline())[0]
        threading.Thread(target=process.stderr.read, daemon=True).start()  # a full pipe would stop the server
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def _bare(batch: int, seconds: float) -> dict[str, Any]:
    """Draw the pool in batches without a server, in a fresh process, for `seconds` or once, whichever is longer."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_draw_bare, args=(theirs, batch, seconds))
    process.start()
    result: dict[str, Any] = ours.recv()
    process.join()
    return result


def _draw_bare(connection: Any, batch: int, seconds: float) -> None:
    from hart_infer import HartPipeline

    pipe = HartPipeline.from_pretrained(MODEL)
    pipe.set_progress_bar_config(disable=True)
    pipe(PROMPTS[0], seed=0)
    pictures: dict[Picture, str] = {}
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds or len(pictures) < len(POOL):
        rows = [POOL[(count + place) % len(POOL)] for place in range(batch)]
        images = pipe([prompt for prompt, _ in rows], seed=[seed for _, seed in rows], reproducible=True).images
        pictures |= {row: _digest(image.tobytes()) for row, image in zip(rows, images, strict=True)}
        count += batch
    connection.send({"pictures_per_second": count / (time.perf_counter() - start), "pictures": pictures})


def _digest(pixels: bytes) -> str:
    return hashlib.sha256(pixels).hexdigest()


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--batch", type=int, default=8, help="pictures of a batch")
    parser.add_argument("--bare-seconds", type=float, default=20, help="for each measurement of the bare pipeline")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
