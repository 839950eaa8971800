from __future__ import annotations

import pytest

from tests.journeys.conftest import Open
from tests.server import Server
from trellis.web import numbers

pytestmark = pytest.mark.browser

AMOUNTS = (None, 0, 1, 0.0003, 0.125, 0.745, 1.05, 9.96, 12.4, 391, 999.5, 1024, 2_260_000, 1_234_567_890, -1234.5)
WRITTEN = {
    "number": (numbers.number, ()),
    "rounded": (numbers.number, (2,)),
    "percent": (numbers.percent, ()),
    "percent1": (numbers.percent, (1,)),
    "compact": (numbers.compact, ()),
    "factor": (numbers.factor, ()),
    "size": (numbers.size, ()),
    "duration": (numbers.duration, ()),
}
SCRIPT = """async ([locales, amounts, names]) => {
  const from = document.querySelector("script[type=module]").src.replace("main.js", "numbers.js");
  const written = {};
  for (const locale of locales) {
    document.documentElement.dataset.locale = locale;
    const module = await import(`${from}?locale=${locale}`);
    const all = { ...module, rounded: (each) => module.number(each, 2), percent1: (each) => module.percent(each, 1) };
    written[locale] = Object.fromEntries(names.map((name) => [name, amounts.map((each) => all[name](each))]));
  }
  return written;
}"""


def test_scripts_and_the_server_write_the_same_numbers_in_every_locale(server: Server, open_page: Open) -> None:
    page = open_page()
    page.goto(server.url)
    in_browser = page.evaluate(SCRIPT, [list(numbers.LOCALES), list(AMOUNTS), list(WRITTEN)])
    for locale in numbers.LOCALES:
        numbers.set_reader(locale)
        for name, (write, digits) in WRITTEN.items():
            assert in_browser[locale][name] == [write(each, *digits) for each in AMOUNTS], (locale, name)
