"""`python -m trellis.engine --fd 3 --weights FOLDER`: an engine on an inherited socket that ends with its parent.

With `--forks` it is a fork server instead, whose engines start in milliseconds.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import logging
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from ..blobs import Blobs
from .fork_server import ignore_interrupts, serve
from .scheduler import Scheduler
from .transport import Transport

if TYPE_CHECKING:
    from .fake import FakeEngine
    from .handlers import TextEngine


M_ARENA_MAX = -8
"""From glibc's malloc.h."""


def main(arguments_list: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="trellis.engine")
    parser.add_argument("--fd", type=int, required=True, help="the inherited socket")
    parser.add_argument("--weights", type=Path, help="the folder of weights")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 takes one per core")
    parser.add_argument("--memory-limit", type=int, default=0, help="bytes that this process may take; 0 is no limit")
    parser.add_argument("--hub-timeout", type=float, default=60.0, help="seconds to wait for a silent hub")
    parser.add_argument("--cache", type=int, help="bytes of weights that are kept in memory")
    parser.add_argument("--fake", action="store_true", help="answer the same messages without a model")
    parser.add_argument("--forks", action="store_true", help="fork engines as they are asked for over the socket")
    arguments = parser.parse_args(arguments_list)
    ignore_interrupts()
    if arguments.forks:
        _fork_engines(socket.socket(fileno=arguments.fd))
        return
    if arguments.weights is None:
        parser.error("--weights is required")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    transport = Transport(socket.socket(fileno=arguments.fd))
    if arguments.memory_limit:
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (arguments.memory_limit, arguments.memory_limit))
    blobs = Blobs(arguments.weights)
    blobs.remove_leftovers()
    if arguments.fake:
        from .fake import FakeEngine

        _serve(transport, FakeEngine(blobs))
        return
    _prepare_torch()
    # Import torch only now, so that a fake engine starts in milliseconds.
    import torch
    import transformers

    from .handlers import TextEngine

    torch.set_num_threads(arguments.threads or os.cpu_count() or 1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    _serve(transport, TextEngine(blobs, arguments.hub_timeout, arguments.cache))


def _serve(transport: Transport, engine: TextEngine | FakeEngine) -> None:
    scheduler = Scheduler(transport.send, engine.handlers(), lambda: engine.lanes, engine.batches())
    # The socket closes when the parent is gone for whatever reason: nobody needs the rest then.
    transport.listen(scheduler.receive, on_close=lambda: os._exit(0))
    scheduler.run()


def _prepare_torch() -> None:
    # Spinning OpenMP threads are ten times slower on a busy computer; a short spin costs nothing on an idle one
    # (docs/log.md). libgomp reads this when torch is first imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # glibc keeps freed memory in an arena per thread: limit it to two arenas.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 2)
    # Nothing here is compiled; bitsandbytes would import the compiler, which takes two seconds.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


def _fork_engines(control: socket.socket) -> None:
    _prepare_torch()
    from . import handlers  # noqa: F401 - imported for the children

    serve(control, main)


if __name__ == "__main__":
    main()
