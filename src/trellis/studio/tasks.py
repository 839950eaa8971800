"""Run coroutines to completion, or several at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

P = ParamSpec("P")
S = TypeVar("S")

AsyncWork = Callable[[], Coroutine[Any, Any, None]]
Command = Callable[Concatenate[S, P], Coroutine[Any, Any, None]]


def run_to_completion(command: Command[S, P]) -> Command[S, P]:
    """Finish a started command even if its caller is gone, so that store and memory agree."""

    @wraps(command)
    async def shielded_command(session: S, /, *args: P.args, **kwargs: P.kwargs) -> None:
        await asyncio.shield(asyncio.ensure_future(command(session, *args, **kwargs)))

    return shielded_command


async def run_concurrently(work_items: Iterable[AsyncWork], concurrency: int) -> None:
    """Run pieces of work, a number of them at once. The first failure cancels the others and is raised."""
    remaining = iter(work_items)

    async def run_next_items() -> None:
        for work in remaining:
            await work()

    tasks = [asyncio.create_task(run_next_items()) for _ in range(concurrency)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
