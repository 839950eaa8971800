"""The command line, as a user calls it."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.server import Server
from trellis.cli import _bind_socket
from trellis.options import option_rows
from trellis.settings import Settings


def trellis(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("TRELLIS_")}
    return subprocess.run(
        [sys.executable, "-m", "trellis", *words], capture_output=True, text=True, timeout=120,
        env=env | {"COLUMNS": "160", "NO_COLOR": "1", "TERM": "dumb"} | environment,
    )  # fmt: skip


def test_help_explains_itself() -> None:
    text = trellis("--help").stdout
    for word in ("--host", "--port", "--save-dir", "--reload", "--no-open", "serve", "doctor"):
        assert word in text
    assert "--port" in trellis("serve", "--help").stdout


def test_version() -> None:
    assert re.fullmatch(r"trellis \d+\.\d+\.\d+\n", trellis("--version").stdout)


def test_another_address_without_a_password_is_refused(tmp_path: Path) -> None:
    done = trellis("--host", "0.0.0.0", "--save-dir", str(tmp_path), "--no-open")
    assert done.returncode == 2
    assert "no password is set" in done.stderr
    assert "TRELLIS_PASSWORD" in done.stderr


def test_another_address_with_a_password_is_served(tmp_path: Path) -> None:
    server = Server(tmp_path, TRELLIS_PASSWORD="secret", TRELLIS_HOST="0.0.0.0")
    try:
        port = server.url.rsplit(":", 1)[1]
        server.url = f"http://127.0.0.1:{port}"
        with server.client() as client:
            assert client.get("/api/models").status_code == 401
            assert client.get("/healthz", headers={"Host": f"192.168.1.7:{port}"}).status_code == 200
            assert client.get("/healthz", headers={"Host": "evil.example"}).status_code == 400
    finally:
        server.stop()


def test_a_port_that_is_taken_is_said_to_be(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = trellis("--port", str(taken.getsockname()[1]), "--save-dir", str(tmp_path), "--no-open")
    assert done.returncode == 2
    assert "Can't listen on 127.0.0.1" in done.stderr
    assert "--port" in done.stderr


@pytest.mark.parametrize(("words", "said"), [(("--port", "99999"), "port"), (("--port", "x"), "--port")])
def test_bad_values_are_named(tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    done = trellis(*words, "--save-dir", str(tmp_path), "--no-open")
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_save_folder_that_cannot_be_made_is_said_to_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = trellis("--save-dir", str(tmp_path / "file" / "below"), "--no-open", "--port", "0")
    assert done.returncode == 2
    assert "Can't write to" in done.stderr


@pytest.mark.engine
def test_the_doctor_finds_everything_in_order(tmp_path: Path) -> None:
    done = trellis("doctor", "--save-dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    for word in ("Python", "torch", "Devices", "Memory", "Save folder", "Demo model"):
        assert word in done.stderr


def test_the_doctor_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code = (
        "import trellis.doctor as d; from trellis.settings import Settings; from pathlib import Path; "
        "d.REQUIRED_PACKAGES = ('no-such-part',); d.DEVICE_PROBE = 'raise SystemExit(1)'; "
        f"found = d.run_checks(Settings(save_dir=Path({str(tmp_path / 'file')!r}))); "
        "[print(f.name, f.ok, f.next_step) for f in found if not f.ok]"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "no-such-part False Install it" in out
    assert "Devices False" in out
    assert "Save folder False Choose another folder" in out


def test_the_web_process_never_imports_torch_and_starts_light(tmp_path: Path) -> None:
    code = (
        "import sys, trellis.cli, trellis.web.app, trellis.studio.studio, trellis.workers.worker, trellis.store.store; "
        "heavy = {'torch', 'transformers', 'peft', 'safetensors', 'numpy', 'accelerate'} & set(sys.modules); "
        "print(sorted(heavy))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
    server = Server(tmp_path)
    try:
        import psutil

        assert psutil.Process(server.process.pid).memory_info().rss < 150_000_000
    finally:
        server.stop()


def test_every_setting_is_explained_in_the_docs() -> None:
    docs = (Path(__file__).parent.parent / "docs" / "settings.md").read_text()
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert f"`TRELLIS_{name.upper()}`" in docs, name


def test_small_answers_do_not_wait_for_an_acknowledgement() -> None:
    """asyncio turns Nagle's algorithm off only on sockets that name their protocol; without, each answer took 44 ms."""
    listening = _bind_socket(Settings(port=0))
    try:
        assert listening.proto == socket.IPPROTO_TCP
    finally:
        listening.close()


def test_every_option_of_a_session_is_a_flag() -> None:
    done = trellis("steer", "--help")
    assert done.returncode == 0
    text = " ".join(done.stdout.split())
    for name, row in option_rows():
        assert f"--{name.replace('_', '-').replace('.', '-')}" in text, name
        assert str(row.description).split(".")[0][:20] in text, name


def test_flags_have_the_same_validation_as_the_form(tmp_path: Path) -> None:
    done = trellis("steer", "--save-dir", str(tmp_path), "--group-size", "99", "--dataset-source", "file")
    assert done.returncode == 2
    assert "--group-size: must be 8 or less, got “99”" in done.stderr
    assert "--dataset-id: is empty" not in done.stderr  # what does not go together is looked at once each is valid
    done = trellis("steer", "--save-dir", str(tmp_path), "--dataset-source", "file")
    assert "--dataset-id: is empty" in done.stderr
    done = trellis("steer", "--save-dir", str(tmp_path), "--no-open", "--port", "0", "--model", "nope")
    assert done.returncode == 2
    assert "There is no model “nope”" in done.stderr


def test_a_session_begins_with_the_flags(tmp_path: Path) -> None:
    server = Server(tmp_path, command=("steer", "--name", "By flags", "--group-size", "3", "--no-chat-template"))
    try:
        with server.client() as client:
            (made,) = client.get("/api/steering/sessions").json()
            state = client.get(f"/api/steering/sessions/{made['id']}").json()
            assert (state["name"], state["config"]["group_size"], state["config"]["chat_template"]) == (
                "By flags",
                3,
                False,
            )
            assert f"{server.url}/steer/{made['id']}" in server.output
    finally:
        server.stop()


@pytest.mark.parametrize("text", ["pip install 'trellis-studio[gpu]'", "[red]x[/red]", "[/]", "C:\\[bold]", ":smile:"])
def test_doctor_prints_texts_as_they_are(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from trellis import cli, doctor

    findings = [doctor.CheckResult("a part", text, False, f"Do this: {text}", optional=True)]
    monkeypatch.setattr(doctor, "run_checks", lambda settings: findings)
    shown = CliRunner(env={"NO_COLOR": "1"}).invoke(cli.app, ["doctor"])
    assert shown.exit_code == 0, shown.output
    assert f"a part: {text}" in shown.output
    assert f"→ Do this: {text}" in shown.output


def test_the_next_step_of_a_missing_extra_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    from trellis import doctor

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert "'trellis-studio[gpu]'" in doctor._check_optional_package(*doctor.OPTIONAL_PACKAGES[1]).next_step


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (("--port", "[gpu]"), "--port or TRELLIS_PORT: must be a whole number, got “[gpu]”."),
        (("--port", "70000"), "TRELLIS_PORT: must be 65,535 or less, got “70000”."),
        (("--save-dir", "/proc/[bold]x"), "Can't write to “/proc/[bold]x”"),
        (("steer", "--group-size", "[red]x"), "--group-size: must be a whole number, got “[red]x”."),
    ],
)
def test_what_was_typed_is_quoted_as_it_is(words: tuple[str, ...], shown: str) -> None:
    done = trellis(*words, "--no-open")
    assert done.returncode == 2
    assert shown in done.stderr


def test_a_session_with_brackets_in_its_name_is_told_as_it_is(tmp_path: Path) -> None:
    server = Server(tmp_path, command=("steer", "--name", "[gpu] one"))
    try:
        with server.client() as client:
            assert client.get("/api/steering/sessions").json()[0]["name"] == "[gpu] one"
    finally:
        server.stop()
    assert "Session “[gpu] one”: http" in server.output
