"""How a session has its work done: to the end once it has begun, and several things at once."""

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
    """A command that has begun is finished, even when whoever asked for it is gone: the store and memory stay one."""

    @wraps(command)
    async def shielded_command(session: S, /, *args: P.args, **kwargs: P.kwargs) -> None:
        await asyncio.shield(asyncio.ensure_future(command(session, *args, **kwargs)))

    return shielded_command


async def run_concurrently(work_items: Iterable[AsyncWork], concurrency: int) -> None:
    """Do one work after another, so many at once. The first failure ends all and is raised."""
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
