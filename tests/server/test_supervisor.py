"""Workers in processes of their own: they load, draw, die, and are started again."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

import pytest

from hart_infer.server.jobs import UnavailableError
from hart_infer.server.metrics import EngineMetrics, Metrics
from hart_infer.server.protocol import Draw, Drawn, Drop, Finished, Row, RowId, Settings
from hart_infer.server.supervisor import LoadError, Process, Supervisor, WorkerDiedError
from tests.server import stand_in

pytestmark = pytest.mark.anyio
SECONDS = 30  # for a process to start on a busy machine


def draw(*prompts: str) -> Draw:
    return Draw(tuple(Row(RowId(1, i), prompt, i) for i, prompt in enumerate(prompts)), Settings(stand_in.SIDE))


@asynccontextmanager
async def supervised(load: Any = stand_in.load) -> AsyncIterator[Supervisor]:
    supervisor = Supervisor(load, EngineMetrics(Metrics(), "x"))
    task = asyncio.create_task(supervisor.run())
    try:
        yield supervisor
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await supervisor.stop(5)


async def received(process: Process) -> list[Any]:
    messages: list[Any] = []
    while not messages or not isinstance(messages[-1], Finished):
        messages.append(await asyncio.wait_for(process.receive(), SECONDS))
    return messages


async def test_a_worker_loads_draws_and_ends() -> None:
    async with supervised() as supervisor:
        assert (await asyncio.wait_for(supervisor.loaded(), SECONDS)).name == stand_in.NAME
        process = await supervisor.ready()
        process.send(draw("a", "b"))
        messages = await received(process)
        assert [type(each) for each in messages] == [Drawn, Drawn, Finished]
        assert messages[1].picture.pixels == stand_in.picture("b", 1).tobytes()
        await supervisor.stop(SECONDS)
        with pytest.raises(WorkerDiedError):
            await process.receive()


async def test_a_drop_reaches_a_worker_that_draws() -> None:
    async with supervised(partial(stand_in.load, seconds=0.2)) as supervisor:
        await asyncio.wait_for(supervisor.loaded(), SECONDS)
        process = await supervisor.ready()
        process.send(draw("a"))
        await asyncio.sleep(0.1)
        process.send(Drop((RowId(1, 0),)))
        assert [type(each) for each in await received(process)] == [Finished]
        process.send(draw("a"))  # the same number again: it is no longer dropped
        assert [type(each) for each in await received(process)] == [Drawn, Finished]


@pytest.mark.parametrize("by_prompt", [True, False])
async def test_a_killed_worker_is_replaced(by_prompt: bool) -> None:
    async with supervised() as supervisor:
        await asyncio.wait_for(supervisor.loaded(), SECONDS)
        process = await supervisor.ready()
        if by_prompt:
            process.send(draw("die"))
        else:
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(WorkerDiedError):
            await asyncio.wait_for(process.receive(), SECONDS)
        other = await asyncio.wait_for(supervisor.ready(), SECONDS)
        assert other.pid != process.pid
        other.send(draw("a"))
        assert [type(each) for each in await received(other)] == [Drawn, Finished]


async def test_signals_of_a_terminal_are_left_to_the_server() -> None:
    async with supervised() as supervisor:
        await asyncio.wait_for(supervisor.loaded(), SECONDS)
        process = await supervisor.ready()
        assert process.pid is not None
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(process.pid, number)
        process.send(draw("a"))
        assert [type(each) for each in await received(process)] == [Drawn, Finished]


async def test_a_model_that_cannot_be_loaded_says_so() -> None:
    supervisor = Supervisor(stand_in.fail_to_load, EngineMetrics(Metrics(), "x"))
    with pytest.raises(LoadError, match="There is no such checkpoint"):
        await asyncio.wait_for(supervisor.run(), SECONDS)
    assert not supervisor.is_ready


async def test_who_waits_for_a_model_that_cannot_be_loaded_is_told() -> None:
    supervisor = Supervisor(stand_in.fail_to_load, EngineMetrics(Metrics(), "x"))
    waiting = asyncio.create_task(supervisor.loaded())
    with pytest.raises(LoadError):
        await asyncio.wait_for(supervisor.run(), SECONDS)
    for each in (waiting, supervisor.loaded()):
        with pytest.raises(UnavailableError, match="could not be loaded"):
            await asyncio.wait_for(each, 1)


async def test_a_worker_that_does_not_end_is_killed() -> None:
    async with supervised() as supervisor:
        await asyncio.wait_for(supervisor.loaded(), SECONDS)
        process = await supervisor.ready()
        process.send(draw("hang"))
        await supervisor.stop(0.2)
        assert process.died.is_set()
