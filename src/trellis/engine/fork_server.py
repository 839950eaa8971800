"""A process that has imported the libraries engines need, and forks an engine on request.

Importing torch takes seconds; a fork takes milliseconds and shares the memory. The process loads no model, starts no
threads, and ends with its parent. It speaks JSON over a SOCK_SEQPACKET socket: requests carry an engine's arguments and
its socket; replies are `{"started": pid}` and later `{"ended": pid, "code": code}`.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import socket
import traceback
from collections.abc import Callable

MAX_MESSAGE_BYTES = 65536


def serve(control: socket.socket, run_engine: Callable[[list[str]], None]) -> None:
    """Fork an engine per request until the parent closes its end. `run_engine` runs in the child with its arguments."""
    gc.collect()
    gc.freeze()  # keep what is loaded now shared with the children, whose garbage collection would copy it
    children: dict[int, int] = {}  # by pidfd
    with select.epoll() as poll:
        poll.register(control, select.EPOLLIN)
        while True:
            for descriptor, _ in poll.poll():
                if descriptor in children:
                    poll.unregister(descriptor)
                    os.close(descriptor)
                    pid, status = os.waitpid(children.pop(descriptor), 0)
                    _send(control, {"ended": pid, "code": os.waitstatus_to_exitcode(status)})
                    continue
                message, sockets, _, _ = socket.recv_fds(control, MAX_MESSAGE_BYTES, 1)
                if not message:
                    return
                request = json.loads(message)
                pid = os.fork()
                if pid == 0:
                    poll.close()
                    control.close()
                    for other in children:
                        os.close(other)
                    _run_child(run_engine, [*request["arguments"], "--fd", str(sockets[0])], request["log"])
                os.close(sockets[0])
                end_descriptor = os.pidfd_open(pid)
                children[end_descriptor] = pid
                poll.register(end_descriptor, select.EPOLLIN)
                _send(control, {"started": pid})


def _run_child(run_engine: Callable[[list[str]], None], arguments: list[str], log: str) -> None:
    """Run an engine in this forked child; never returns."""
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        run_engine(arguments)
        code = 0
    except BaseException:  # noqa: BLE001 - the child must never continue as its parent
        traceback.print_exc()
    finally:
        os._exit(code)


def _send(control: socket.socket, message: dict[str, int]) -> None:
    try:
        control.send(json.dumps(message).encode())
    except (BrokenPipeError, ConnectionResetError):
        os._exit(0)


def ignore_interrupts() -> None:
    """Ignore Ctrl-C: the studio handles it and closes the socket."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
