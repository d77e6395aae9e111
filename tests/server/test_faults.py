"""What may befall a server in a process of its own: kills, clients that vanish or dawdle, floods, signals, full disks."""

from __future__ import annotations

import asyncio
import base64
import errno
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing, suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
from PIL import Image

from hart_infer.errors import InputError
from hart_infer.server.jobs import BusyError, TooLargeError, UnavailableError
from tests.server import stand_in as model
from tests.server.conftest import ROOT, Running, stand_in
from tests.server.fake import FakeEngine, client
from tests.server.test_app import events, told

pytestmark = pytest.mark.anyio
GENERATIONS = "/v1/images/generations"
SECONDS = 180  # for anything at all, on a busy machine


def http(address: str) -> httpx2.AsyncClient:
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx2.AsyncClient(base_url=address, timeout=SECONDS, limits=limits)


async def ask(made: httpx2.AsyncClient, prompt: str, seed: int = 0, **fields: Any) -> httpx2.Response:
    return await made.post(GENERATIONS, json={"prompt": prompt, "seed": seed, "size": "16x16", **fields})


def right(response: httpx2.Response, prompt: str, seed: int = 0) -> bool:
    """Whether an answer has the picture of its prompt and seed."""
    (data,) = response.json()["data"]
    found = Image.open(io.BytesIO(base64.b64decode(data["b64_json"]))).convert("RGB")
    return data["seed"] == seed and found.tobytes() == model.picture(prompt, seed).tobytes()


async def metric(made: httpx2.AsyncClient, name: str) -> float:
    page = (await made.get("/metrics")).text
    return float(re.findall(rf"^{re.escape(name)} (\S+)$", page, re.MULTILINE)[0])


async def until(condition: Any, seconds: float = SECONDS) -> None:
    """Wait until an async condition holds."""
    end = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < end, "it took too long"
        await asyncio.sleep(0.05)


async def until_metric(made: httpx2.AsyncClient, name: str, value: float) -> None:
    """Wait until a number of the stand-in's has a value."""

    async def has_value() -> bool:
        return await metric(made, f'{name}{{model="stand-in"}}') == value

    await until(has_value)


async def ready(made: httpx2.AsyncClient) -> None:
    async def is_ready() -> bool:
        return (await made.get("/readyz")).status_code == 200

    await until(is_ready)


def worker_of(running: Running) -> int:
    """The number of the worker's process, from the log; reads to its last line so far."""
    while True:
        line = json.loads(running.line("stderr"))
        if line["message"] == "ready":
            return int(line["pid"])


# The worker.


async def test_a_worker_killed_in_mid_batch() -> None:
    """Its requests get 503, what waits is drawn by the next one, and nothing is lost."""
    with stand_in(max_batch=4, max_wait_ms=10_000) as (address, running):
        async with http(address) as made:
            await ready(made)
            pid = worker_of(running)
            drawing = [asyncio.create_task(ask(made, "slow", seed)) for seed in range(4)]
            await until_metric(made, "hart_infer_batch_rows_sum", 4)  # which takes 3.6 s
            waiting = [asyncio.create_task(ask(made, "plain", seed)) for seed in range(4)]
            await until_metric(made, "hart_infer_queued_rows", 4)
            os.kill(pid, signal.SIGKILL)
            for response in await asyncio.gather(*drawing):
                assert "died" in told(response, 503)
                assert response.headers["retry-after"]
            for seed, response in enumerate(await asyncio.gather(*waiting)):
                assert response.status_code == 200 and right(response, "plain", seed)
            assert await metric(made, 'hart_infer_worker_restarts_total{model="stand-in"}') == 1


async def test_a_prompt_that_kills_workers_harms_no_later_one() -> None:
    with stand_in() as (address, _):
        async with http(address) as made:
            await ready(made)
            told(await ask(made, "die"), 503)
            streamed = await ask(made, "die", stream=True, partial_images=3)  # its first preview comes before it dies
            assert "died" in events(streamed.text)[-1]["error"]["message"]
            assert right(await ask(made, "plain"), "plain")


async def test_a_worker_that_hangs_is_given_up_and_replaced() -> None:
    with stand_in(timeout=1) as (address, _):
        async with http(address) as made:
            await ready(made)
            assert "1 seconds" in told(await ask(made, "hang"), 504)

            async def is_drawn() -> bool:
                response = await ask(made, "plain")
                return response.status_code == 200 and right(response, "plain")

            await until(is_drawn)
            assert await metric(made, 'hart_infer_worker_restarts_total{model="stand-in"}') == 1


async def test_a_server_killed_takes_its_worker_along() -> None:
    with stand_in() as (address, running):
        async with http(address) as made:
            await ready(made)
            pid = worker_of(running)
            drawing = asyncio.create_task(ask(made, "slow"))
            await asyncio.sleep(0.3)
            running.process.kill()
            with pytest.raises(httpx2.TransportError):
                await drawing

        async def is_gone() -> bool:
            return not Path(f"/proc/{pid}").exists()

        await until(is_gone)


def test_a_model_that_cannot_be_loaded_ends_the_server() -> None:
    command = [sys.executable, "-m", "hart_infer", "serve", "--port", "0", "-m", "./nowhere"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)
    assert ended.returncode == 1
    assert "nowhere" in ended.stderr.strip().split("\n")[-1]
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("fails", [True, False])
async def test_who_waits_for_the_model_is_told_when_the_server_ends(fails: bool) -> None:
    """Because the model can't be loaded, or by a signal while it still is."""
    with stand_in(loads=3 if fails else 60, **({"fails": 1} if fails else {})) as (address, running):
        async with http(address) as made:
            waiting = asyncio.create_task(ask(made, "plain"))
            await asyncio.sleep(0.5)
            start = time.monotonic()
            if not fails:
                running.process.send_signal(signal.SIGTERM)
            assert ("could not be loaded" if fails else "ending") in told(await waiting, 503)
        status, log = await asyncio.to_thread(running.end, 0)
    assert status == int(fails)
    assert time.monotonic() - start < 30
    assert "CancelledError" not in log


# Clients.


async def test_a_client_that_vanishes_frees_its_work() -> None:
    with stand_in(seconds=0.2, max_batch=1) as (address, _):
        async with http(address) as made:
            await ready(made)
            for fields in ({}, {"stream": True}, {"stream": True, "partial_images": 3}):
                before = await metric(made, 'hart_infer_rows_total{model="stand-in",outcome="dropped"}')
                async with http(address) as other:
                    leaving = [asyncio.create_task(ask(other, "plain", n=10, **fields)) for _ in range(5)]
                    await asyncio.sleep(0.5)
                    for task in leaving:
                        task.cancel()
                start = time.monotonic()
                assert right(await ask(made, "after"), "after")
                assert time.monotonic() - start < 10  # the 50 pictures would take 60 s
                dropped = await metric(made, 'hart_infer_rows_total{model="stand-in",outcome="dropped"}') - before
                assert 45 <= dropped <= 50


async def test_a_slow_reader_holds_up_nobody() -> None:
    with stand_in() as (address, _):
        async with http(address) as made:
            await ready(made)
            dawdlers = []
            body = json.dumps({"prompt": "plain", "n": 10, "stream": True, "partial_images": 3, "size": "32x32"}).encode()
            for _ in range(20):
                dawdler = socket.create_connection(urlsplit(address).netloc.split(":"), timeout=SECONDS)
                dawdler.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
                head = f"POST {GENERATIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                dawdler.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
                dawdlers.append(dawdler)
            await asyncio.sleep(0.5)
            assert all(right(response, "a", 1) for response in await asyncio.gather(*(ask(made, "a", 1) for _ in range(20))))
            received = b""
            while not received.endswith(b"0\r\n\r\n"):  # and in the end it has everything
                received += dawdlers[0].recv(100)
            assert received.count(b"event: image_generation.completed") == 10
            for dawdler in dawdlers:
                dawdler.close()


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01",  # TLS
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /v1/pictures/../../../etc/passwd HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        b"GET //etc/passwd HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    ],
)
def test_what_is_no_decent_request(sent: bytes, shared: str) -> None:
    answer = b""
    connection = socket.create_connection(urlsplit(shared).netloc.split(":"), timeout=SECONDS)
    with connection, suppress(ConnectionError):  # it need not read to the end what it refuses
        connection.sendall(sent)
        with suppress(OSError):  # it may have hung up
            connection.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer == b"" or answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 403", b"HTTP/1.1 404"))
    assert b"root:" not in answer
    assert httpx2.get(f"{shared}/healthz").status_code == 200


@pytest.fixture(scope="module")
def shared() -> Any:
    with stand_in() as (address, _):
        yield address


async def test_a_prompt_of_ten_megabytes_and_strange_ones(shared: str) -> None:
    async with http(shared) as made:
        assert "10,000,000 characters" in told(await ask(made, "a" * 10_000_000), 400)
        for prompt in ("a\0b", "🐈‍⬛" * 500, "\u202e\ufeff\U0010ffff"):
            assert right(await ask(made, prompt, 5), prompt, 5)


async def test_broken_requests_among_good_ones() -> None:
    """Drawn together, each gets its own."""
    prompts = ["plain", "break", "unknown", "other", "too much"] * 6
    with stand_in(max_wait_ms=300, max_batch=30) as (address, _):
        async with http(address) as made:
            await ready(made)
            responses = await asyncio.gather(*(ask(made, prompt, seed) for seed, prompt in enumerate(prompts)))
    for seed, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        expected = {"break": 500, "unknown": 400, "too much": 503}.get(prompt, 200)
        assert response.status_code == expected
        assert expected != 200 or right(response, prompt, seed)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (BusyError("It is full.", 1), 429),
        (UnavailableError("It ends."), 503),
        (TooLargeError("It is large."), 413),
        (InputError("It is too many."), 400),
    ],
)
async def test_what_is_refused_costs_nothing_of_the_rate(error: Any, status: int) -> None:
    engine = FakeEngine()
    async with client(engine, rate=3) as made:
        engine.error = error
        for _ in range(5):
            assert told(await ask(made, "a", n=3), status) == str(error)
        engine.error = None
        assert (await ask(made, "a", n=3)).status_code == 200
        assert "3 pictures a minute" in told(await ask(made, "a", n=3), 429)


@pytest.mark.parametrize(("count", "room"), [(1000, 1000), (200, 20)])
async def test_more_at_once_than_can_be_drawn(count: int, room: int) -> None:
    """What is taken is drawn and is its seed's; what isn't is told when to come back."""
    with stand_in(max_queue=room, max_batch=64) as (address, _):
        async with http(address) as made:
            await ready(made)
            responses = await asyncio.gather(*(ask(made, f"number {seed}", seed) for seed in range(count)))
            statuses = Counter(response.status_code for response in responses)
            assert set(statuses) <= {200, 429}
            assert statuses[200] >= room
            assert room < count or statuses[429] == 0
            for seed, response in enumerate(responses):
                if response.status_code == 200:
                    assert right(response, f"number {seed}", seed)
                else:
                    assert "pictures wait already" in told(response, 429)
                    assert 1 <= int(response.headers["retry-after"]) <= 60
            assert await metric(made, 'hart_infer_queued_rows{model="stand-in"}') == 0


def test_an_idle_connection_stays_open_longer_than_clients_keep_theirs() -> None:
    """Else a request that a client sends over it just then would be lost."""
    with stand_in() as (address, _), closing(HTTPConnection(urlsplit(address).netloc, timeout=SECONDS)) as made:
        for pause in (6, 0):
            made.request("GET", "/metrics")
            assert made.getresponse().read()
            time.sleep(pause)


# The end.


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_an_ending_server_finishes_what_is_open(number: int) -> None:
    with stand_in(seconds=0.05, max_batch=2) as (address, running):
        async with http(address) as made:
            await ready(made)
            fields: list[dict[str, Any]] = [{}, {"stream": True, "partial_images": 2}] * 5
            tasks = [asyncio.create_task(ask(made, "plain", seed, **each)) for seed, each in enumerate(fields)]
            await asyncio.sleep(0.5)
            running.process.send_signal(number)
            await asyncio.sleep(0.5)
            async with http(address) as other:
                with pytest.raises(httpx2.ConnectError):
                    await ask(other, "late")
            for seed, (response, each) in enumerate(zip(await asyncio.gather(*tasks), fields, strict=True)):
                assert response.status_code == 200
                if each:
                    assert [event["type"][17:] for event in events(response.text)][-1] == "completed"
                else:
                    assert right(response, "plain", seed)
        status, log = await asyncio.to_thread(running.end, 0)
        assert status == 0
        assert "Traceback" not in log


async def test_an_ending_server_does_not_wait_for_ever() -> None:
    with stand_in(drain=0.5) as (address, running):
        async with http(address) as made:
            await ready(made)
            tasks = [asyncio.create_task(ask(made, "hang", stream=stream)) for stream in (False, True)]
            await asyncio.sleep(0.5)
            start = time.monotonic()
            running.process.send_signal(signal.SIGTERM)
            for response in await asyncio.gather(*tasks):
                assert "ending" in told(response, 503)
            status, log = await asyncio.to_thread(running.end, 0)
        assert status == 0
        assert time.monotonic() - start < 15
        assert "Traceback" not in log


async def test_a_second_signal_ends_at_once() -> None:
    with stand_in(drain=60) as (address, running):
        async with http(address) as made:
            await ready(made)
            asked = asyncio.create_task(ask(made, "hang"))
            await asyncio.sleep(0.5)
            start = time.monotonic()
            running.process.send_signal(signal.SIGINT)
            await asyncio.sleep(0.5)
            running.process.send_signal(signal.SIGINT)
            status, log = await asyncio.to_thread(running.end, 0)
            await asyncio.gather(asked, return_exceptions=True)
        assert status == 0
        assert time.monotonic() - start < 15
        assert "Traceback" not in log


async def test_a_second_server_on_a_port_says_so(shared: str) -> None:
    port = urlsplit(shared).port
    command = [sys.executable, "-m", "hart_infer", "serve", "--port", str(port)]
    ended = await asyncio.to_thread(subprocess.run, command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)
    assert ended.returncode == 1
    expected = f"Port {port} of 127.0.0.1 is taken by another program; stop it, or take another --port."
    assert ended.stderr.strip() == f"hart-infer serve: {expected}"
    assert httpx2.get(f"{shared}/healthz").status_code == 200


# The disk.


async def test_a_full_disk_costs_the_address_and_not_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async with client(keep=tmp_path) as made:
        monkeypatch.setattr(os, "fsync", full)
        response = await ask(made, "a", response_format="url")
        assert told(response, 507) == "The picture could not be kept, so it has no address; ask for b64_json."
        assert right(await ask(made, "a", 3), "a", 3)
        streamed = await ask(made, "a", stream=True)
        assert [event["type"] for event in events(streamed.text)] == ["image_generation.completed"]
    assert list(tmp_path.iterdir()) == []


async def test_uploads_never_touch_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **named: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    noise = Image.effect_noise((1600, 1600), 100).convert("RGBA")
    noise.putalpha(0)
    buffer = io.BytesIO()
    noise.save(buffer, "PNG")
    assert buffer.tell() > 2**20
    monkeypatch.setattr("tempfile.TemporaryFile", full)
    async with client() as made:
        response = await made.post("/v1/images/edits", data={"prompt": "a"}, files={"image": ("a.png", buffer.getvalue())})
    assert response.status_code == 200
