"""Make the saved folder that later versions must read, and what they must say of it. Run by hand:

    python -m tests.saved.make FOLDER

It speaks to a studio over HTTP and sockets alone. The fixture stands for the version that made it: made again by a
later version, it proves nothing. A new one goes beside it, under a new name.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import sys
import tarfile
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx

from tests.saved import observe
from tests.saved.observe import (
    ARCHIVE,
    ENVIRONMENT,
    EXPECTED,
    HALF,
    PASSWORD,
    STEERING,
    UPLOAD,
    chosen,
    finished,
    got,
    settled,
    socket_of,
    told,
    until,
)  # fmt: skip
from tests.server import Server

QUESTIONS = [{"question": f"What is {thing}?"} for thing in ("a tree", "a river", "bread", "a friend", "the moon", "")]
LIKES = [{"prompt": f"Why is it {what}?", "chosen": "Because it is.", "rejected": "No."} for what in ("dark", "late")]

OAK = {
    "lora_rank": 2, "lora_alpha": 4, "target_modules": "v_proj", "group_size": 3, "max_new_tokens": 12,
    "temperature": 1.1, "top_p": 0.95, "learning_rate": 0.004, "kl_beta": 0.05, "inner_steps": 2, "replay": 2,
    "system_prompt": "Be brief.", "prompt_suffix": " Say it simply.", "control_prompt": "Who are you?", "seed": 7,
    "context_length": 256, "max_undos": 3, "checkpoint_interval": 4, "settling": 2, "openings": 2,
}  # fmt: skip
ELM = {
    "lora_rank": 2, "lora_dropout": 0.1, "target_modules": "v_proj", "group_size": 2, "max_new_tokens": 8,
    "learning_method": "dpo", "opening_weight": 0.25, "inner_steps": 2, "seed": 11, "chat_template": True,
    "dataset": {"source": "file", "id": "questions.jsonl", "column": "question", "shuffle": False, "rows": 6},
}  # fmt: skip


def choose(client: httpx.Client, session: str, choice: Any) -> str:
    """The node that a choice led to."""
    return str(chosen(client, session, choice)["head"]["node"])


def assessed(client: httpx.Client, session: str) -> None:
    """Wait until nothing is left to do at the head."""
    until(lambda: got(client.get(f"{STEERING}/{session}"))["figures"]["agreed"] is not None)


def upload(client: httpx.Client, name: str, content: bytes) -> None:
    begun = got(client.post("/api/uploads", json={"kind": "prompts", "name": name,
                                                  "files": [{"path": name, "bytes": len(content)}]}))  # fmt: skip
    got(client.put(f"/api/uploads/{begun['id']}/files/0?offset=0", content=content))


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def grow_oak(client: httpx.Client) -> str:
    oak = str(got(client.post(STEERING, json={"name": "Oak", "config": OAK}))["id"])
    url = f"{STEERING}/{oak}"
    choose(client, oak, 1)
    named = choose(client, oak, [0, 2])
    got(client.patch(f"{url}/nodes/{named}", json={"name": "Gentle"}))
    choose(client, oak, {"ranking": [2, 0, 1]})
    choose(client, oak, "none")
    choose(client, oak, "skip")
    choose(client, oak, {"written": "Short and kind."})
    far = settled(client, oak)["head"]["node"]
    got(client.post(f"{url}/undo"))
    got(client.post(f"{url}/undo"))
    got(client.post(f"{url}/redo"))
    settled(client, oak)
    branch = choose(client, oak, 0)
    got(client.post(f"{url}/prompt", json={"text": "What is snow?"}))
    until(lambda: settled(client, oak)["offer"]["prompt"] == "What is snow?")
    choose(client, oak, 2)
    finished(client, got(client.post(f"{url}/refit", json={"node": far, "epochs": 1})))
    body = {"left": named, "right": branch, "prompts": ["What is a cat?"]}
    finished(client, got(client.post(f"{url}/compare", json=body)))
    body = {"kind": "adapter", "name": "oak-adapter", "node": named}
    finished(client, got(client.post(f"{url}/exports", json=body)))
    got(client.post(f"{url}/goto", json={"node": far}))
    settled(client, oak)
    assessed(client, oak)
    return oak


def grow_elm(client: httpx.Client) -> str:
    upload(client, "questions.jsonl", lines(QUESTIONS))
    upload(client, "likes.jsonl", lines(LIKES))
    got(client.post("/api/uploads", json=UPLOAD))
    begun = got(client.post("/api/uploads", json=UPLOAD))
    got(client.put(f"/api/uploads/{begun['id']}/files/0?offset=0", content=HALF))
    elm = str(got(client.post(STEERING, json={"name": "Elm", "config": ELM}))["id"])
    url = f"{STEERING}/{elm}"
    choose(client, elm, 0)
    choose(client, elm, 1)
    assessed(client, elm)
    finished(client, got(client.post(f"{url}/import", json={"file": "likes.jsonl", "epochs": 2})))
    tree = got(client.get(f"{url}/tree"))
    sides = {"left": tree["nodes"][0]["id"], "right": tree["head"]}
    prompts = [row["question"] for row in QUESTIONS[:4]]
    for rounds, verdicts in ((3, ["first", "second", "tie"]), (4, ["second"])):
        trial = got(client.post(f"{url}/blind", json=sides | {"rounds": rounds, "prompts": prompts}))
        place = f"{url}/blind/{trial['id']}"
        for said in verdicts:
            state = until(lambda at=place: (now := got(client.get(at)))["state"] == "done" or (now["round"] and now))
            if state is True:
                break
            got(client.post(f"{place}/verdict", json={"round": state["round"]["number"], "verdict": said}))
        until(lambda at=place: (now := got(client.get(at)))["state"] == "done" or now["round"])
        if rounds == 3:
            got(client.post(f"{place}/end"))
    return elm


def talk(server: Server, client: httpx.Client, elm: str) -> None:
    form = {"name": "attic", "url": "http://127.0.0.1:9/v1", "key": "sk-old", "models": "owl", "permit": "true"}
    assert client.post("/connections/remotes", data=form).status_code == 303
    got(client.put("/api/rooms/prompts", json={"name": "Pirate", "text": "Talk like a pirate."}))
    body = {"title": "About moss", "models": ["demo", "session:Oak@2"], "system": "Be kind.",
            "sampling": {"temperature": 0.5, "max_new_tokens": 12}}  # fmt: skip
    moss = got(client.post("/api/rooms", json=body))["id"]
    url = f"/api/rooms/{moss}"
    file = got(client.post(f"{url}/files", params={"name": "moss.md"}, content=b"# Moss\n\nGreen and soft.\n"))
    with socket_of(server, client, moss) as socket:
        told(socket, "connected")

        def say(count: int = 1, **command: Any) -> list[dict[str, Any]]:
            socket.send(json.dumps(command))
            return told(socket, "done", count=count)

        said = say(2, type="send", text="What is moss?", attachments=[file["id"]], request="moss-1")
        messages = {event["message"]["role"]: event["message"] for event in said if event["type"] == "message"}
        asked, answer = messages["user"]["id"], messages["assistant"]["id"]
        say(2, type="send", text="Is it **old**?", parent=answer, request="moss-2")
        say(2, type="edit", message=asked, text="What is moss, in a word?", request="moss-3")
        say(1, type="regenerate", message=answer, model="session:Oak", request="moss-4")
        socket.send(json.dumps({"type": "rate", "message": answer, "rating": 1}))
        told(socket, "message")
        socket.send(json.dumps({"type": "choose", "message": answer}))
        told(socket, "message")
        socket.send(json.dumps({"type": "send", "text": "Hoo?", "model": "remote:attic/owl", "request": "moss-5"}))
        until(lambda: any(each["error"] for each in got(client.get(url))["messages"]))
        until(lambda: not got(client.get(url))["growing"])
    teaching = got(client.post("/api/rooms", json={"models": ["demo", "session:Elm"]}))["id"]
    with socket_of(server, client, teaching) as socket:
        told(socket, "connected")
        said = {"text": "Who am I?", "sampling": {"max_new_tokens": 10, "temperature": 0.9}}
        socket.send(json.dumps({"type": "send", **said}))
        message = told(socket, "done", count=2)[-1]["message"]
        socket.send(json.dumps({"type": "rate", "message": message, "rating": -1}))
        told(socket, "message")
    job = got(client.post(f"/api/rooms/{teaching}/teach", json={"message": message, "session": elm}))
    finished(client, job)
    got(client.patch(f"/api/rooms/{teaching}", json={"archived": True}))


def tidy(folder: Path) -> None:
    """Leave out what is bulky or can be had again, and most of the weights."""
    with closing(sqlite3.connect(folder / "trellis.db")) as database:
        heads = "SELECT weights FROM nodes WHERE id IN (SELECT head FROM sessions)"
        kept = {weights for (weights,) in database.execute(heads)}
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        database.execute("PRAGMA journal_mode=DELETE")
        database.execute("VACUUM")
    for weights in (folder / "weights").iterdir():
        if weights.name not in kept:
            shutil.rmtree(weights)
    for name in ("logs", "hub", "models"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for file in folder.iterdir():
        size = sum(each.stat().st_size for each in [file, *file.rglob("*")] if each.is_file())
        sys.stdout.write(f"{file.name}: {size} bytes\n")


def main(folder: Path) -> None:
    server = Server(folder, fake=False, **ENVIRONMENT)
    try:
        with server.client() as client:
            client.timeout = httpx.Timeout(60)
            assert client.post("/login", data={"password": PASSWORD}).status_code == 303
            cookie = client.cookies["trellis"]
            key = got(client.post("/api/keys", json={"name": "an old program"}))["key"]
            grow_oak(client)
            elm = grow_elm(client)
            talk(server, client, elm)
    finally:
        server.stop()
    assert "Traceback" not in server.output, server.output
    tidy(folder)
    with tarfile.open(ARCHIVE, "w:xz", preset=9) as archive:
        for each in sorted(folder.iterdir()):
            archive.add(each, each.name)
    expected: dict[str, Any] = {"cookie": cookie, "key": key}
    for _ in range(2):  # what it says twice is what it says
        with tempfile.TemporaryDirectory() as place:
            again = Path(place) / "saved"
            observe.unpack(again)
            with observe.studio(again, cookie) as (server, client):
                words: dict[str, Any] = {}
                said = observe.words_apart(observe.shown(server, client, key), words)
                described = observe.interface(client)
                went_on = observe.gone_on(server, client, key)
        if "shown" in expected:
            for name, found in (("shown", said), ("gone on", went_on)):
                assert not (changed := observe.differences(expected[name], found)), "\n".join(changed)
        expected |= {"shown": said, "words": words, "interface": described, "gone on": went_on}
    EXPECTED.write_text(json.dumps(expected, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
    for file in (ARCHIVE, EXPECTED):
        sys.stdout.write(f"{file.name}: {file.stat().st_size} bytes\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
