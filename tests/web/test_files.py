"""Files that go with messages: what is taken, what is refused and how, and that they are downloads and nothing else."""

from __future__ import annotations

import time

import httpx
import pytest

from trellis.studio.chat.attachments import detect_kind, safe_file_name


def a_pdf(text: str = "", pages: int = 1) -> bytes:
    """A small PDF written by hand (ISO 32000-1, 7.5)."""
    objects = [b"<< /Type /Catalog /Pages 2 0 R >>"]
    kids = " ".join(f"{4 + 2 * page} 0 R" for page in range(pages))
    objects.append(f"<< /Type /Pages /Kids [{kids}] /Count {pages} >>".encode())
    objects.append(b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>")
    for page in range(pages):
        stream = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET".encode()
        about = f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {5 + 2 * page} 0 R"
        objects.append(f"{about} /Resources << /Font << /F1 3 0 R >> >> >>".encode())
        objects.append(b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream))
    body, places = b"%PDF-1.4\n", []
    for number, each in enumerate(objects, start=1):
        places.append(len(body))
        body += b"%d 0 obj\n%s\nendobj\n" % (number, each)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    head = b"xref\n0 %d\n0000000000 65535 f \n%s" % (len(objects) + 1, table)
    tail = b"trailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % (len(objects) + 1, len(body))
    return body + head + tail


@pytest.fixture
def room(client: httpx.Client) -> str:
    return str(client.post("/api/rooms", json={}).json()["id"])


def add(client: httpx.Client, room: str, name: str, data: bytes) -> httpx.Response:
    return client.post(f"/api/rooms/{room}/files", params={"name": name}, content=data)


def test_text_is_read_with_the_message(client: httpx.Client, room: str) -> None:
    file = add(client, room, "notes.md", b"one two three").json()
    assert file["kind"] == "text"
    body = {"text": "What is it?", "attachments": [file["id"]]}
    assert client.post(f"/api/rooms/{room}/messages", json=body).status_code == 202
    deadline = time.monotonic() + 20
    while (state := client.get(f"/api/rooms/{room}").json())["growing"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    asked, answer = state["messages"]
    assert asked["text"] == "What is it?"
    assert [each["name"] for each in asked["files"]] == ["notes.md"]
    read = ["notes.md:", "```", "one", "two", "three", "```", "What", "is", "it?"]
    assert answer["usage"]["prompt_tokens"] == len(read)
    page = client.get(f"/chat/{room}").text
    assert "notes.md" in page


def test_the_text_of_a_pdf_is_read(client: httpx.Client, room: str) -> None:
    file = add(client, room, "paper.pdf", a_pdf("Trellis grows", pages=3))
    assert file.status_code == 201, file.text
    assert file.json()["kind"] == "pdf"
    assert file.json()["characters"] == len("\n\n".join(["Trellis grows"] * 3))


NOT_TEXT = "isn't UTF-8 text, a PDF or an image"


@pytest.mark.parametrize(("name", "data", "says"), [
    ("empty.txt", b"", "is empty"), ("white.txt", b" \n ", "no text"), ("a.bin", b"\x00\x01\x02", NOT_TEXT),
    ("latin.txt", b"\xe4\xf6", NOT_TEXT), ("broken.pdf", b"%PDF-1.4\nnothing", "PDF"),
    ("scanned.pdf", a_pdf(""), "no text"), ("long.txt", b"x" * 1_000_001, "MB"),
    ("words.txt", b"a b " * 125_000, "characters"), ("nul.txt", b"a\x00b", NOT_TEXT),
])  # fmt: skip
def test_what_cannot_be_read_is_refused_in_words(
    client: httpx.Client, room: str, name: str, data: bytes, says: str
) -> None:
    refused = add(client, room, name, data)
    assert refused.status_code == 422, refused.text
    error = refused.json()["error"]
    assert error["code"] == "bad_file"
    assert says in error["message"]
    assert name in error["message"]


def test_more_than_is_taken_is_refused_unread(client: httpx.Client, room: str) -> None:
    assert add(client, room, "huge.txt", b"x" * 12_000_001).status_code == 413

    def drip() -> object:
        for _ in range(13):
            yield b"x" * 1_000_000

    assert client.post(f"/api/rooms/{room}/files?name=a", content=drip()).status_code == 413  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "a\x00b", "<script>.html", "x" * 290, "C:\\a\\b.html", "\u202etxt.exe"]
)
def test_a_file_is_a_download_whatever_it_is_called(client: httpx.Client, room: str, name: str) -> None:
    page = b"<script>alert(1)</script>"
    file = add(client, room, name, page).json()
    response = client.get(f"/api/rooms/{room}/files/{file['id']}")
    assert response.content == page
    assert response.headers["content-type"] == "application/octet-stream"
    assert response.headers["content-disposition"].startswith("attachment")
    assert response.headers["x-content-type-options"] == "nosniff"
    assert "/" not in file["name"]
    assert "\\" not in file["name"]


def test_a_file_belongs_to_its_room(client: httpx.Client, room: str) -> None:
    other = client.post("/api/rooms", json={}).json()["id"]
    file = add(client, room, "mine.txt", b"mine").json()["id"]
    for path in (
        f"/api/rooms/{other}/files/{file}",
        f"/api/rooms/{room}/files/nothing",
        f"/api/rooms/{room}/files/..%2f..",
    ):
        assert client.get(path).status_code == 404
    body = {"text": "x", "attachments": [file]}
    assert client.post(f"/api/rooms/{other}/messages", json=body).status_code == 404


def test_files_go_with_their_room(client: httpx.Client, room: str) -> None:
    file = add(client, room, "mine.txt", b"mine").json()["id"]
    client.delete(f"/api/rooms/{room}")
    assert client.get(f"/api/rooms/{room}/files/{file}").status_code == 404


def test_files_are_told_by_what_is_in_them() -> None:
    assert detect_kind(b"RIFF\x00\x00\x00\x00WEBP") == "picture"
    assert detect_kind(b"\xff\xd8\xff\xe0") == "picture"
    assert detect_kind(b"\n%PDF-1.7") == "pdf"
    assert detect_kind(b"GIF89 is a format") == "text"
    assert safe_file_name("/") == "file"
    assert safe_file_name("a/../b.txt") == "b.txt"
