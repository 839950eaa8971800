"""Several things at once: as many as there are lanes, and nothing goes on behind a failure."""

from __future__ import annotations

import asyncio

import pytest

from trellis.studio.tasks import run_concurrently

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("lanes", [1, 2, 3])
async def test_so_many_are_done_at_once_and_each_one_once(lanes: int) -> None:
    at_work, most, done = 0, 0, []

    def work(number: int) -> object:
        async def run() -> None:
            nonlocal at_work, most
            at_work += 1
            most = max(most, at_work)
            await asyncio.sleep(0.001 * (number % 3))
            at_work -= 1
            done.append(number)

        return run

    await run_concurrently([work(number) for number in range(9)], lanes)  # type: ignore[misc]
    assert sorted(done) == list(range(9))
    assert most == lanes


@pytest.mark.parametrize("ending", ["failure", "cancelled"])
async def test_when_one_fails_or_all_are_given_up_nothing_goes_on(ending: str) -> None:
    begun, ended = [], []

    async def long() -> None:
        begun.append("long")
        try:
            await asyncio.sleep(30)
        finally:
            ended.append("long")

    async def failing() -> None:
        await asyncio.sleep(0.01)
        if ending == "failure":
            raise ValueError("no")

    async def never() -> None:
        begun.append("never")

    works = [long, failing, never] if ending == "failure" else [long, long, never]
    task = asyncio.create_task(run_concurrently(works, 2))
    await asyncio.sleep(0.005)
    if ending == "cancelled":
        task.cancel()
    with pytest.raises(ValueError if ending == "failure" else asyncio.CancelledError):
        await task
    assert begun == ended
