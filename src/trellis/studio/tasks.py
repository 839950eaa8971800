"""How a session has its work done: to the end once it has begun, and several things at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

P = ParamSpec("P")
S = TypeVar("S")

Work = Callable[[], Coroutine[Any, Any, None]]
Command = Callable[Concatenate[S, P], Coroutine[Any, Any, None]]


def to_its_end(command: Command[S, P]) -> Command[S, P]:
    """A command that has begun is finished, even when whoever asked for it is gone: the store and memory stay one."""

    @wraps(command)
    async def whole(session: S, /, *args: P.args, **kwargs: P.kwargs) -> None:
        await asyncio.shield(asyncio.ensure_future(command(session, *args, **kwargs)))

    return whole


async def side_by_side(works: Iterable[Work], lanes: int) -> None:
    """Do one work after another, so many at once. The first failure ends all and is raised."""
    waiting = iter(works)

    async def lane() -> None:
        for work in waiting:
            await work()

    running = [asyncio.create_task(lane()) for _ in range(lanes)]
    try:
        await asyncio.gather(*running)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
