"""The command line and composition root: it reads the settings, builds every part and starts the server."""

from __future__ import annotations

import logging
import socket
import sys
import threading
import time
import webbrowser
from collections.abc import Callable
from inspect import Parameter, Signature
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from . import __version__
from .errors import Invalid, TrellisError
from .network_addresses import local_url, network_urls, qr_code
from .settings import Settings

if TYPE_CHECKING:
    from .studio.studio import Studio

app = typer.Typer(
    help="Trellis: steer language models by choosing between their answers. Without a command, starts the server.",
    no_args_is_help=False,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console(stderr=True, highlight=False, markup=False, emoji=False)
"""Prints text verbatim: names, paths and messages may contain brackets."""

Host = Annotated[str | None, typer.Option(help=f"{Settings.model_fields['host'].description}")]
Port = Annotated[str | None, typer.Option(metavar="INTEGER", help=f"{Settings.model_fields['port'].description}")]
SaveDir = Annotated[Path | None, typer.Option(help=f"{Settings.model_fields['save_dir'].description}")]
Reload = Annotated[bool, typer.Option("--reload", help="Restart when a source file changes (development).")]
Qr = Annotated[bool, typer.Option("--qr", help="Print a QR code of the network address, for a phone.")]
Open = Annotated[bool, typer.Option("--open/--no-open", help="Open Trellis in a browser.")]


def _version(show: bool) -> None:
    if show:
        typer.echo(f"trellis {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def default(
    context: typer.Context,
    host: Host = None,
    port: Port = None,
    save_dir: SaveDir = None,
    reload: Reload = False,
    open: Open = True,
    qr: Qr = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Start the server, or run a command."""
    if context.invoked_subcommand is None:
        serve(host, port, save_dir, reload, open, qr)


@app.command()
def serve(
    host: Host = None, port: Port = None, save_dir: SaveDir = None, reload: Reload = False, open: Open = True,
    qr: Qr = False,
) -> None:  # fmt: skip
    """Start the server and print its address."""
    settings = _load_settings(host=host, port=port, save_dir=save_dir)
    try:
        settings.require_password_beyond_loopback()
        if reload:
            _serve_and_reload(sys.argv[1:])
            return
        _run_studio(settings, open, qr=qr)
    except TrellisError as error:
        _print_error(error)
        raise typer.Exit(2) from None


@app.command()
def doctor(save_dir: SaveDir = None) -> None:
    """Check the installation, devices, memory and folders."""
    from .doctor import run_checks

    findings = run_checks(_load_settings(save_dir=save_dir))
    for finding in findings:
        missing = ("–  ", "yellow") if finding.optional else ("no ", "red")
        mark = ("ok ", "green") if finding.ok else missing
        console.print(Text.assemble(mark, f" {finding.name}: {finding.result}"), soft_wrap=True)
        if not finding.ok:
            console.print(f"    → {finding.next_step}", soft_wrap=True)
    raise typer.Exit(0 if all(finding.ok or finding.optional for finding in findings) else 1)


def main() -> None:
    """Run the command line: the commands above and `steer`, whose flags are the session options."""
    app.command("steer", help="Start the server with a new session. Every option of a session is a flag.")(
        _with_flags(_steer)
    )
    app()


def _with_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Return a function with one keyword per session option, as Typer reads them."""
    from .options import flag_rows

    def steer(**given: Any) -> None:
        command(**given)

    flags: dict[str, Any] = {"host": Host, "port": Port, "save_dir": SaveDir}
    flags["name"] = Annotated[str | None, typer.Option(help="Session name.")]
    for name, row in flag_rows():
        about = typer.Option(*row.declarations, help=row.help, show_default=row.default_text or False)
        flags[name.replace(".", "_")] = Annotated[row.type | None, about]
    rows = [Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=kind) for name, kind in flags.items()]
    rows.append(Parameter("open", Parameter.KEYWORD_ONLY, default=True, annotation=Open))
    rows.append(Parameter("qr", Parameter.KEYWORD_ONLY, default=False, annotation=Qr))
    steer.__signature__ = Signature(rows)  # type: ignore[attr-defined]
    steer.__annotations__ = {row.name: row.annotation for row in rows}
    return steer


def _steer(
    host: str | None, port: str | None, save_dir: Path | None, name: str | None, open: bool, qr: bool, **given: Any
) -> None:
    from .options import SessionConfig, config_from_flags

    settings = _load_settings(host=host, port=port, save_dir=save_dir)
    try:
        settings.require_password_beyond_loopback()
        config = config_from_flags(given)
        SessionConfig.parse(config)
        _run_studio(settings, open, (name, config), qr=qr)
    except Invalid as error:
        for field in error.fields:
            flag = "--" + field["field"].removeprefix("config.").replace(".", "-").replace("_", "-")
            console.print(Text.assemble((flag, "red"), f": {field['message']}"), soft_wrap=True)
        raise typer.Exit(2) from None
    except TrellisError as error:
        _print_error(error)
        raise typer.Exit(2) from None


def _load_settings(**given: Any) -> Settings:
    from pydantic import ValidationError

    from .options import invalid_from

    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        for entry in invalid_from(error).fields:
            variable = f"TRELLIS_{entry['field'].upper()}"
            flag = f"--{entry['field'].replace('_', '-')} or " if entry["field"] in given else ""
            console.print(Text.assemble((flag + variable, "red"), f": {entry['message']}"), soft_wrap=True)
        raise typer.Exit(2) from None


def _print_error(error: TrellisError) -> None:
    console.print(Text.assemble((error.message, "red"), f"\n{error.next_step}"), soft_wrap=True)


def _run_studio(
    settings: Settings,
    open_page: bool,
    first_session: tuple[str | None, dict[str, Any]] | None = None,
    *,
    qr: bool = False,
) -> None:
    """Run the server until it is stopped; `first_session` is the name and configuration of one to create."""
    import uvicorn

    from .store.store import Store, migrate
    from .studio.studio import Studio
    from .web.access import MAX_BODY
    from .web.app import create_app
    from .web.broadcast import DirectWriteProtocol
    from .workers.processes import ProcessSpawner

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    for noisy in ("alembic", "httpx"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    server_socket = _bind_socket(settings)
    lock = _lock_save_dir(settings)
    migrate(settings.database)
    spawner = ProcessSpawner(
        settings.weights_dir, settings.logs_dir, settings.engine_threads, settings.fake_engine,
        settings.engine_memory_bytes, settings.hub_timeout, settings.engine_cache_bytes,
    )  # fmt: skip
    studio = Studio(Store(settings.database), spawner, settings)
    config = uvicorn.Config(
        create_app(studio, settings),
        log_level="warning",
        ws=DirectWriteProtocol,
        ws_per_message_deflate=False,
        ws_max_size=MAX_BODY,
        timeout_graceful_shutdown=5,
        server_header=False,
        proxy_headers=settings.behind_proxy,
    )

    startup_errors: list[TrellisError] = []

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if first_session:
                try:
                    session = await studio.steering.create(*first_session)
                    link = (f"{address}/steer/{session.id}", "bold")
                    console.print(Text.assemble(f"Session “{session.name}”: ", link), soft_wrap=True)
                except TrellisError as error:
                    startup_errors.append(error)
                    self.should_exit = True

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            _close_event_streams(studio)
            spawner.close()  # a load that waits for its engine would hold the server
            super().handle_exit(sig, frame)

    port = server_socket.getsockname()[1]
    address = local_url(settings.host, port)
    _print_addresses(address, network_urls(settings.host, port), qr)
    if open_page and sys.stdout.isatty():
        threading.Thread(target=_open_browser_later, args=(address,), daemon=True).start()
    spawner.preload()
    try:
        Server(config).run(sockets=[server_socket])
    except KeyboardInterrupt:
        pass  # the server has ended in order; Ctrl-C is how it is meant to end
    finally:
        spawner.close()
        lock.close()
    if startup_errors:
        raise startup_errors[0]


def _print_addresses(local: str, network: list[str], qr: bool) -> None:
    """Print the local address, the network addresses and, if asked, a QR code."""
    console.print(Text.assemble(f"Trellis {__version__}: ", (local, "bold"), "  (Ctrl-C to stop)"), soft_wrap=True)
    others = [url for url in network if url != local]
    for number, url in enumerate(others):
        label = "Other devices on your network:" if number == 0 else " " * 30
        console.print(Text.assemble(f"{label} ", (url, "bold")), soft_wrap=True)
    if qr and network:
        console.print(Text(qr_code(network[0]), style="bright_white on black"), soft_wrap=True)
    elif qr:
        console.print(
            "No QR code: this address works on this computer only. Set TRELLIS_PASSWORD and add --host 0.0.0.0.",
            soft_wrap=True,
        )


def _close_event_streams(studio: Studio) -> None:
    """Close open event streams, which would keep the server from stopping, inside its own loop."""
    import asyncio

    try:
        asyncio.get_running_loop().call_soon_threadsafe(studio.hub.close)
    except RuntimeError:
        studio.hub.close()


def _bind_socket(settings: Settings) -> socket.socket:
    """Return the socket to serve on. Raise TrellisError when the address is not available."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # With the protocol named, asyncio turns Nagle's algorithm off: without, every answer waits 40 ms for an ACK.
    server_socket = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    server_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        server_socket.bind((settings.host, settings.port))
        server_socket.listen(2048)  # from now on a browser waits instead of being refused
    except (OSError, OverflowError) as error:
        raise TrellisError(
            f"Can't listen on {settings.host}:{settings.port}: {error}.",
            code="address_in_use",
            next_step="Stop the program that uses this port, or choose another with --port (0 picks a free one).",
        ) from None
    return server_socket


def _lock_save_dir(settings: Settings) -> Any:
    """Lock the save folder: a server expects to be the only writer of its database."""
    import fcntl

    try:
        settings.save_dir.mkdir(parents=True, exist_ok=True)
        lock = (settings.save_dir / "studio.lock").open("w")
    except OSError as error:
        raise TrellisError(
            f"Can't write to “{settings.save_dir}”: {error.strerror}.",
            code="permission_denied",
            next_step="Choose another folder with --save-dir.",
        ) from None
    for attempt in range(20):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError:
            if attempt < 19:
                time.sleep(0.1)
    raise TrellisError(
        f"Another Trellis server is using “{settings.save_dir}”.",
        code="already_running",
        next_step="Stop it, or choose another folder with --save-dir.",
    )


def _open_browser_later(address: str) -> None:
    time.sleep(0.7)
    webbrowser.open(address)


def _serve_and_reload(arguments: list[str]) -> None:
    """Run the server as a child process and restart it when a source file changes."""
    import subprocess

    from watchfiles import PythonFilter, watch

    source = Path(__file__).parent
    command = [sys.executable, "-m", "trellis", *(word for word in arguments if word != "--reload"), "--no-open"]
    changes = watch(source, watch_filter=PythonFilter(extra_extensions=(".html", ".css", ".js")))
    while True:
        child = subprocess.Popen(command)  # noqa: S603 - our own interpreter and module
        try:
            changed = next(changes, None)
        finally:
            child.terminate()
            child.wait()
        if changed is None:
            return
        console.print(f"Restarting: changed {', '.join(sorted({Path(path).name for _, path in changed}))}")
