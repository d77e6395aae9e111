"""The queue: what is drawn together and when, and what becomes of jobs that fail, leave, wait too long, or are too many."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from hart_infer.errors import InputError
from hart_infer.server.jobs import (
    MAX_UNSENT,
    AskJob,
    BusyError,
    DeadlineError,
    DrawJob,
    Event,
    RowFailedError,
    Ticket,
    TooLargeError,
    UnavailableError,
)
from hart_infer.server.metrics import EngineMetrics, Metrics
from hart_infer.server.protocol import (
    Answered,
    Ask,
    Draw,
    Drawn,
    Drop,
    Facts,
    Failed,
    Finished,
    FromWorker,
    Picture,
    Piece,
    Preview,
    RowId,
    Settings,
    ToWorker,
)
from hart_infer.server.scheduler import Limits, Scheduler
from hart_infer.server.supervisor import Supervisor, WorkerDiedError
from tests.server import stand_in

pytestmark = pytest.mark.anyio
PICTURE = Picture(1, 1, b"abc")
PLAIN, OTHER = Settings(16), Settings(16, (("guidance_scale", 2.0),))


class FakeProcess:
    """A worker whose messages the test reads and writes."""

    pid = 1

    def __init__(self) -> None:
        self.died = asyncio.Event()
        self.sent: asyncio.Queue[ToWorker] = asyncio.Queue()
        self._said: asyncio.Queue[FromWorker | None] = asyncio.Queue()

    def send(self, message: ToWorker) -> None:
        self.sent.put_nowait(message)

    async def receive(self) -> FromWorker:
        message = await self._said.get()
        if message is None:
            raise WorkerDiedError
        return message

    def say(self, *messages: FromWorker) -> None:
        for message in messages:
            self._said.put_nowait(message)

    def kill(self) -> None:
        self.died.set()
        self._said.put_nowait(None)

    async def batch(self) -> Draw:
        """The next batch; what is dropped before it doesn't matter."""
        while not isinstance(message := await asyncio.wait_for(self.sent.get(), 2), Draw):
            pass
        return message

    def finish(self, batch: Draw) -> None:
        self.say(*(Drawn(row.id, PICTURE) for row in batch.rows), Finished(0.5))


class FakeSupervisor(Supervisor):
    def __init__(self) -> None:
        super().__init__(stand_in.load, EngineMetrics(Metrics(), "fake"))
        self.facts = Facts("fake", "HART", (16,), frozenset(), True, True, (), (), 1.0, 6, "cpu", "float32")
        self.process = FakeProcess()

    @property
    def is_ready(self) -> bool:
        return True

    async def ready(self) -> Any:
        while self.process.died.is_set():
            await asyncio.sleep(0.001)
        return self.process


@asynccontextmanager
async def scheduling(**limits: Any) -> AsyncIterator[tuple[Scheduler, FakeSupervisor]]:
    supervisor = FakeSupervisor()
    metrics = EngineMetrics(Metrics(), "fake")
    scheduler = Scheduler("fake", supervisor, Limits(**{"max_wait": 0.0, **limits}), metrics)
    task = asyncio.create_task(scheduler.run())
    await asyncio.sleep(0)
    try:
        yield scheduler, supervisor
        assert not task.done(), task.result()
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def job(prompt: str = "a", *seeds: int, settings: Settings = PLAIN, **options: Any) -> DrawJob:
    return DrawJob(prompt, seeds or (0,), settings, **options)


async def events(ticket: Ticket) -> list[Event]:
    async def collect() -> list[Event]:
        return [event async for event in ticket]

    return await asyncio.wait_for(collect(), 2)


def prompts(batch: Draw) -> list[str]:
    return [row.prompt for row in batch.rows]


async def test_a_job_s_rows_come_back_by_their_place() -> None:
    async with scheduling() as (scheduler, supervisor):
        ticket = scheduler.submit(job("a", 7, 8, previews=1))
        batch = await supervisor.process.batch()
        assert [(row.seed, row.previews) for row in batch.rows] == [(7, 1), (8, 1)]
        first, second = (row.id for row in batch.rows)
        supervisor.process.say(Preview(second, 0, PICTURE), Drawn(second, PICTURE), Drawn(first, PICTURE), Finished(1))
        found = await events(ticket)
        assert [(type(event), event.row.place) for event in found] == [(Preview, 1), (Drawn, 1), (Drawn, 0)]
        assert scheduler.is_idle


async def test_what_waits_while_a_batch_is_drawn_is_drawn_together_by_settings() -> None:
    async with scheduling(max_batch=3) as (scheduler, supervisor):
        scheduler.submit(job("first"))
        batch = await supervisor.process.batch()
        for number, settings in enumerate((PLAIN, OTHER, PLAIN, PLAIN, PLAIN)):
            scheduler.submit(job(str(number), settings=settings))
        drawn = [prompts(batch)]
        for _ in range(3):
            supervisor.process.finish(batch)
            batch = await supervisor.process.batch()
            drawn.append(prompts(batch))
        assert drawn == [["first"], ["0", "2", "3"], ["1"], ["4"]]


async def test_a_row_waits_for_others_up_to_its_limit_and_no_longer() -> None:
    async with scheduling(max_wait=0.2) as (scheduler, supervisor):
        scheduler.submit(job("a"))
        await asyncio.sleep(0.05)
        scheduler.submit(job("b"))
        await asyncio.sleep(0.05)
        assert supervisor.process.sent.empty()
        assert prompts(await supervisor.process.batch()) == ["a", "b"]


async def test_a_full_batch_does_not_wait() -> None:
    async with scheduling(max_wait=60, max_batch=2) as (scheduler, supervisor):
        scheduler.submit(job("a"))
        scheduler.submit(job("b"))
        assert prompts(await supervisor.process.batch()) == ["a", "b"]


async def test_a_full_queue_says_when_to_come_back() -> None:
    async with scheduling(max_queue=4) as (scheduler, supervisor):
        running = scheduler.submit(job("a"))
        batch = await supervisor.process.batch()
        for _ in range(2):
            scheduler.submit(job("b", 1, 2))
        with pytest.raises(BusyError, match="4 pictures wait already") as raised:
            scheduler.submit(job("c"))
        assert raised.value.retry_after >= 1
        supervisor.process.finish(batch)
        await events(running)
        await supervisor.process.batch()
        scheduler.submit(job("c"))


async def test_given_pictures_are_bounded_in_bytes() -> None:
    from hart_infer.server.protocol import Given

    given = Given(Picture(1, 1, bytes(60)), Picture(1, 1, bytes(20)), "digest")
    async with scheduling(max_queue_bytes=150) as (scheduler, _):
        ticket = scheduler.submit(job("a", given=given))
        with pytest.raises(BusyError, match="given pictures"):
            scheduler.submit(job("b", given=given))
        scheduler.submit(job("c"))
        ticket.cancel()
        scheduler.submit(job("b", given=given))


async def test_a_job_that_never_fits_is_not_told_to_come_back() -> None:
    from hart_infer.server.protocol import Given

    given = Given(Picture(1, 1, bytes(60)), Picture(1, 1, bytes(20)), "digest")
    async with scheduling(max_queue=2, max_queue_bytes=79) as (scheduler, _):
        with pytest.raises(InputError, match="At most 2 pictures may wait here, so 3 at once are too many"):
            scheduler.submit(job("a", 1, 2, 3))
        with pytest.raises(TooLargeError, match="80 bytes of pixels, more than the 79 bytes"):
            scheduler.submit(job("a", given=given))
        assert scheduler.is_idle
        scheduler.submit(job("a", 1, 2))


async def test_previews_that_nobody_reads_are_bounded_and_pictures_are_all_kept() -> None:
    ticket = Ticket(2, lambda ticket: None)
    large = Picture(1024, 1024, bytes(3 * 2**20))
    for number in range(32):
        for row in ticket.rows:
            ticket.put(Preview(row, number, large))
    for row in ticket.rows:
        ticket.put(Drawn(row, large))
    found = await events(ticket)
    previews = [event for event in found if isinstance(event, Preview)]
    assert sum(len(event.picture.pixels) for event in previews) <= MAX_UNSENT
    assert [(event.row.place, event.number) for event in previews][-2:] == [(0, 31), (1, 31)]
    assert [type(event) for event in found[-2:]] == [Drawn, Drawn]


async def test_each_row_keeps_a_preview_however_large() -> None:
    ticket = Ticket(3, lambda ticket: None)
    huge = Picture(1, 1, bytes(MAX_UNSENT))
    for number in range(3):
        for row in ticket.rows:
            ticket.put(Preview(row, number, huge))
    ticket.cancel()
    assert [event.number for event in await events(ticket) if isinstance(event, Preview)] == [2, 2, 2]


async def test_a_failed_row_ends_its_job_alone() -> None:
    async with scheduling() as (scheduler, supervisor):
        scheduler.submit(job("busy"))
        first = await supervisor.process.batch()
        broken, whole = scheduler.submit(job("a", 1, 2)), scheduler.submit(job("b"))
        supervisor.process.finish(first)
        batch = await supervisor.process.batch()
        ids = [row.id for row in batch.rows]
        supervisor.process.say(Failed(ids[0], "input", "It is wrong."), Drawn(ids[1], PICTURE), Drawn(ids[2], PICTURE))
        supervisor.process.say(Finished(1))
        with pytest.raises(RowFailedError, match="It is wrong"):
            await events(broken)
        assert len(await events(whole)) == 1
        assert await asyncio.wait_for(supervisor.process.sent.get(), 1) == Drop((ids[1],))


async def test_who_leaves_frees_the_queue_and_the_worker_is_told() -> None:
    async with scheduling() as (scheduler, supervisor):
        running, queued = scheduler.submit(job("a", 1, 2)), None
        batch = await supervisor.process.batch()
        queued = scheduler.submit(job("b"))
        queued.cancel()
        running.cancel()
        running.cancel()
        assert await supervisor.process.sent.get() == Drop(tuple(row.id for row in batch.rows))
        supervisor.process.say(Finished(0.1))
        scheduler.submit(job("c"))
        assert prompts(await supervisor.process.batch()) == ["c"]


async def test_a_job_that_takes_too_long_is_given_up() -> None:
    async with scheduling(deadline=0.1) as (scheduler, supervisor):
        running, queued = scheduler.submit(job("a")), scheduler.submit(job("b", settings=OTHER))
        await supervisor.process.batch()
        for ticket in (running, queued):
            with pytest.raises(DeadlineError, match=r"0\.1 seconds"):
                await events(ticket)


async def test_a_worker_that_draws_on_for_nobody_is_killed() -> None:
    async with scheduling(patience=0.05) as (scheduler, supervisor):
        ticket = scheduler.submit(job("a"))
        await supervisor.process.batch()
        ticket.cancel()
        await asyncio.wait_for(supervisor.process.died.wait(), 2)


async def test_a_worker_that_finishes_in_time_is_not() -> None:
    async with scheduling(patience=0.05) as (scheduler, supervisor):
        ticket = scheduler.submit(job("a"))
        await supervisor.process.batch()
        ticket.cancel()
        supervisor.process.say(Finished(0.1))
        scheduler.submit(job("b"))
        await supervisor.process.batch()
        await asyncio.sleep(0.1)
        assert not supervisor.process.died.is_set()


async def test_a_dead_worker_s_jobs_fail_and_those_that_wait_go_to_the_next() -> None:
    async with scheduling(max_batch=1) as (scheduler, supervisor):
        running, queued = scheduler.submit(job("a")), scheduler.submit(job("b"))
        await supervisor.process.batch()
        supervisor.process.kill()
        with pytest.raises(UnavailableError, match="died"):
            await events(running)
        supervisor.process = FakeProcess()
        batch = await supervisor.process.batch()
        assert prompts(batch) == ["b"]
        supervisor.process.finish(batch)
        assert len(await events(queued)) == 1


async def test_a_question_is_answered_alone() -> None:
    async with scheduling() as (scheduler, supervisor):
        scheduler.submit(job("busy"))
        first = await supervisor.process.batch()
        one, two = scheduler.submit(AskJob(("why?",))), scheduler.submit(AskJob(("how?",)))
        supervisor.process.finish(first)
        for ticket, text in ((one, "why?"), (two, "how?")):
            asked = await asyncio.wait_for(supervisor.process.sent.get(), 1)
            assert isinstance(asked, Ask) and asked.question == (text,)
            supervisor.process.say(Piece(asked.id, "so"), Piece(asked.id, " it is"), Answered(asked.id), Finished(1))
            assert [event.text for event in await events(ticket) if isinstance(event, Piece)] == ["so", " it is"]


async def test_an_ending_server_takes_nothing_and_finishes_what_it_has() -> None:
    async with scheduling(max_batch=1) as (scheduler, supervisor):
        running, queued = scheduler.submit(job("a")), scheduler.submit(job("b"))
        batch = await supervisor.process.batch()
        scheduler.close("It ends.")
        assert not scheduler.is_ready
        with pytest.raises(UnavailableError, match=r"It ends\."):
            scheduler.submit(job("c"))
        supervisor.process.finish(batch)
        assert len(await events(running)) == 1
        await supervisor.process.batch()
        scheduler.abandon("It has ended.")
        with pytest.raises(UnavailableError, match=r"It has ended\."):
            await events(queued)
        assert scheduler.is_idle


async def test_messages_of_rows_that_nobody_knows_are_ignored() -> None:
    async with scheduling() as (scheduler, supervisor):
        ticket = scheduler.submit(job("a"))
        batch = await supervisor.process.batch()
        supervisor.process.say(Drawn(RowId(10**9, 0), PICTURE), Failed(RowId(10**9, 1), "failed", "x"))
        supervisor.process.finish(batch)
        assert len(await events(ticket)) == 1
