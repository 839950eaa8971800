from __future__ import annotations

import time

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trellis.web.numbers import LOCALES, compact, duration, factor, locale_from, number, percent, set_reader, size


def test_numbers_are_written_in_english_by_default() -> None:
    set_reader("")
    assert (percent(None), percent(0.256), percent(0.01234, 2)) == ("–", "26%", "1.23%")
    assert (number(1024), number(0.0003), number(1234.5, 2), number(-0.2, 0)) == ("1,024", "0.0003", "1,234.50", "0")
    assert (compact(391), compact(2_260_000), compact(999_600)) == ("391", "2.26M", "1.00M")
    assert (factor(1.6), factor(12.4), factor(None)) == ("1.6×", "12×", "–")
    assert (size(None), size(999), size(1_500_000), size(450_000_000)) == ("–", "999 bytes", "1.5 MB", "450 MB")
    assert [duration(ms) for ms in (312, 1200, 45_000, 125_000, 12_000_000)] == [
        "312 ms", "1.2 s", "45 s", "2 min 5 s", "3 h 20 min",
    ]  # fmt: skip
    assert (number(float("nan")), percent(float("inf")), number(10**30)) == ("–", "–", "1e+30")


def test_numbers_follow_the_readers_locale() -> None:
    set_reader("de-DE,de;q=0.9,en;q=0.8")
    assert (number(1024), percent(0.256), size(1_500_000), factor(1.6)) == ("1.024", "26\xa0%", "1,5 MB", "1,6×")
    set_reader("de-CH")
    assert (number(1_234_567.5), percent(-0.5)) == ("1'234'567.5", "-50%")
    set_reader("sv")
    assert number(-1024) == "−1\xa0024"


@pytest.mark.parametrize(
    ("header", "locale"),
    [
        ("", "en"), ("*", "en"), ("tlh", "en"), ("de", "de"), ("DE-ch", "de-CH"), ("de-LI", "de"),
        ("fr;q=0.2, sv;q=0.8", "sv"), ("tlh, pl;q=0.1", "pl"), ("de;q=0, fr", "fr"), ("zh-Hant-TW", "zh"),
        ("../../etc/passwd", "en"), ("de\n", "de"), ("de;q=9", "en"), ("de;q=0.5;x", "en"), ("\x00", "en"),
    ],
)  # fmt: skip
def test_the_locale_is_the_best_known_one_of_the_header(header: str, locale: str) -> None:
    assert locale_from(header) == locale


@given(st.text(max_size=400))
def test_any_header_gives_a_known_locale(header: str) -> None:
    assert locale_from(header) in LOCALES


def test_a_long_header_costs_no_time() -> None:
    started = time.perf_counter()
    for index in range(200):
        set_reader(f"de;q=0.{index}," * 100_000 if index % 50 == 0 else f"{index}" + "-a" * 10_000)
    assert time.perf_counter() - started < 1


def test_pages_name_the_locale_they_are_written_in(client: httpx.Client) -> None:
    for header, locale in (("de-AT,de;q=0.5", "de"), ("tlh", "en")):
        page = client.get("/", headers={"Accept-Language": header, "Accept": "text/html"}).text
        assert f'<html lang="en" data-locale="{locale}">' in page
    missing = client.get("/nothing", headers={"Accept-Language": "fr", "Accept": "text/html"}).text
    assert 'data-locale="fr"' in missing
