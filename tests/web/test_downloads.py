"""Names of files that browsers save."""

from __future__ import annotations

import pytest

from trellis.web.downloads import attachment, slug


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("Watching it grow", "watching-it-grow"),
        ('  a/b\\c:d*e?f"g<h>i|j.  ', "a-b-c-d-e-f-g-h-i-j"),
        ("../../etc/passwd", "etc-passwd"),
        ("海について", "海について"),
        ("हिन्दी में", "हिन्दी-में"),
        ("U\u0308ber Bäume", "über-bäume"),
        ("🌱\u202e", "chat"),
        ("NUL", "chat-nul"),
        ("com1", "chat-com1"),
        ("x" * 300, "x" * 120),
        ("海" * 100, "海" * 40),
    ],
)
def test_a_title_becomes_a_file_name_that_every_system_takes(title: str, name: str) -> None:
    assert slug(title, "chat") == name
    assert len(name.encode()) <= 120


def test_a_name_is_sent_whole_and_in_ascii() -> None:
    assert attachment("über-bäume.json") == {
        "content-disposition": "attachment; filename=\"uber-baume.json\"; filename*=UTF-8''%C3%BCber-b%C3%A4ume.json"
    }
    assert attachment("海.md")["content-disposition"] == (
        "attachment; filename=\"download.md\"; filename*=UTF-8''%E6%B5%B7.md"
    )
    assert attachment('a"\r\nb.txt')["content-disposition"].startswith('attachment; filename="ab.txt"; ')
