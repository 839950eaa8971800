"""How many clicks does it take? Simulated people with hidden rules, every method, side by side in one run.

    python bench/learning.py                                  # the table: rules that nothing was tuned on
    python bench/learning.py --methods choice,sft --rules poet,formal --seeds 3 --clicks 20
    python bench/learning.py --set '{"learning_rate": 0.002}' --rules tuning --methods choice

A method is a name of `learning_method`, with `:rate` where it should not run at the default rate of the model's
size (`trellis-classic` runs at its own, 2e-5). Every figure goes to a file of JSON lines, with settings and seeds;
`--plot` draws what such files hold.
"""

from __future__ import annotations

import argparse
import atexit
import itertools
import json
import multiprocessing
import platform
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import second_model
from simulated import DEMO, RULES, Rule, Subject, live

CACHE = Path(tempfile.gettempdir()) / "trellis-bench" / "second-model"
AT = (2, 4, 6, 8, 10, 12, 15, 20, 30, 40, 60, 100, 150, 200)
RATES = {"trellis-classic": 2e-5}
GOAL = 0.8

_subjects: dict[str, Subject] = {}


def run(task: dict[str, Any]) -> dict[str, Any]:
    """One person's session, in a process of its own with one thread."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    rule = next(rule for rule in RULES if rule.name == task["rule"])
    if rule.model not in _subjects:
        weights = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
        atexit.register(shutil.rmtree, weights, ignore_errors=True)
        _subjects[rule.model] = Subject.load(rule.model, DEMO if rule.model == "demo" else CACHE, weights)
    subject = _subjects[rule.model]
    at = [click for click in (0, *AT) if click <= task["clicks"]]
    done = live(subject, rule, task["seed"], task["clicks"], at, task["settings"], task["behave"])
    for made in subject.weights.iterdir():
        shutil.rmtree(made, ignore_errors=True)
    return task | done


def clicks_to(measured: dict[str, dict[str, float]], goal: float = GOAL) -> float:
    """After how many clicks the share was first at the goal; infinite when it never was."""
    for click, figures in sorted((int(click), figures) for click, figures in measured.items()):
        if figures["share"] >= goal:
            return click
    return float("inf")


def area(measured: dict[str, dict[str, float]]) -> float:
    """The mean share over the clicks: the area under the curve, over its width."""
    points = sorted((int(click), figures["share"]) for click, figures in measured.items())
    return sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(points)) / max(points[-1][0], 1)


def middle(values: Iterable[float]) -> float:
    kept = [value for value in values if value == value]
    return statistics.median(kept) if kept else float("nan")


def table(rows: list[dict[str, Any]]) -> str:
    """Medians over seeds, a line for each rule and method."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["rule"], row["method"]].append(row)
    lines = [f"{'rule':24}{'method':22}{'seeds':>6}{'at 0':>6}{'to 80 %':>9}{'at 10':>7}{'at 20':>7}{'at 40':>7}"
             f"{'area':>6}{'fluency':>9}{'variety':>9}{'drift':>7}{'s/click':>9}"]  # fmt: skip
    for (rule, method), found in groups.items():
        curves = [{int(click): figures for click, figures in row["measured"].items()} for row in found]

        def shared(click: int, curves: list[dict[int, dict[str, float]]] = curves) -> str:
            there = [curve[click]["share"] for curve in curves if click in curve]
            return f"{middle(there):.0%}" if there else "-"

        last = [curve[max(curve)] for curve in curves]
        needed = middle(clicks_to(row["measured"]) for row in found)
        lines.append(
            f"{rule:24}{method:22}{len(found):>6}{shared(0):>6}"
            f"{(f'{needed:.0f}' if needed < float('inf') else 'never'):>9}{shared(10):>7}{shared(20):>7}{shared(40):>7}"
            f"{middle(area(row['measured']) for row in found):>6.2f}{middle(f['fluency'] for f in last):>9.2f}"
            f"{middle(f['variety'] for f in last):>9.2f}{middle(f['drift'] for f in last):>7.1%}"
            f"{middle(row['learn_seconds'] for row in found):>9.2f}"
        )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """The median share over the clicks, a panel for each rule, a line for each method, as SVG."""
    colours = ["#d1495b", "#00798c", "#edae49", "#30638e", "#6a994e", "#8d5a97", "#555555", "#c08552"]
    rules = list(dict.fromkeys(row["rule"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    wide, high, columns = 260, 190, 4
    height = -(-len(rules) // columns) * high + 40
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{columns * wide}" height="{height}" '
             f'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="white"/>']  # fmt: skip
    for place, rule in enumerate(rules):
        left, top = place % columns * wide + 42, place // columns * high + 24
        across, down = wide - 50, high - 56
        parts.append(f'<text x="{left}" y="{top - 8}" font-weight="bold">{rule}</text>')
        for level in (0, 0.5, 0.8, 1):
            y = top + down * (1 - level)
            parts.append(f'<line x1="{left}" x2="{left + across}" y1="{y}" y2="{y}" stroke="#ddd"/>'
                         f'<text x="{left - 4}" y="{y + 4}" text-anchor="end">{level:.0%}</text>')  # fmt: skip
        most = max(int(click) for row in rows if row["rule"] == rule for click in row["measured"])
        parts.append(f'<text x="{left + across}" y="{top + down + 14}" text-anchor="end">{most} clicks</text>')
        for number, method in enumerate(methods):
            found = [row["measured"] for row in rows if row["rule"] == rule and row["method"] == method]
            clicks = sorted({int(click) for measured in found for click in measured})
            points = [
                (click, middle(m[key]["share"] for m in found for key in m if int(key) == click)) for click in clicks
            ]
            line = " ".join(f"{left + across * x / most:.1f},{top + down * (1 - y):.1f}" for x, y in points)
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colours[number % 8]}" stroke-width="1.6"/>')
    for number, method in enumerate(methods):
        x = 42 + number * 130
        parts.append(f'<rect x="{x}" y="{height - 22}" width="12" height="4" fill="{colours[number % 8]}"/>'
                     f'<text x="{x + 17}" y="{height - 16}">{method}</text>')  # fmt: skip
    file.write_text("\n".join([*parts, "</svg>\n"]))


def known(file: Path, tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The people among these that a file holds already: a run that was cut off goes on."""
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    return [row for row in rows if any(task.items() <= row.items() for task in tasks)]


def rules_named(names: str) -> list[Rule]:
    if names in ("reported", "tuning"):
        return [rule for rule in RULES if rule.tuning == (names == "tuning")]
    return [rule for rule in RULES if rule.name in names.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules", default="reported", help="names with commas, or “reported” or “tuning”")
    parser.add_argument("--methods", default="choice,sft,dpo-norm,trellis-classic", help="method or method:rate")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--clicks", type=int, default=40)
    parser.add_argument("--behave", default="steady", choices=["steady", "contrary", "random"])
    parser.add_argument("--set", type=json.loads, default={}, help="options of the session, as JSON")
    parser.add_argument("--jobs", type=int, default=2, help="people at once, one thread each")
    parser.add_argument("--out", type=Path, default=Path("learning.jsonl"), help="every figure, as JSON lines, added")
    parser.add_argument("--plot", type=Path, help="draw what --out holds into this SVG, and run nothing")
    arguments = parser.parse_args()
    if arguments.plot:
        rows = [json.loads(line) for line in arguments.out.read_text().splitlines()]
        plot(rows, arguments.plot)
        print(table(rows))
        return
    tasks = []
    for rule in rules_named(arguments.rules):
        for word in arguments.methods.split(","):
            method, _, rate = word.partition(":")
            settings = {"learning_method": method} | arguments.set
            if rate or method in RATES:
                settings["learning_rate"] = float(rate) if rate else RATES[method]
            tasks += [
                {"rule": rule.name, "method": word, "seed": seed, "clicks": arguments.clicks, "settings": settings,
                 "behave": arguments.behave}
                for seed in range(arguments.seeds)
            ]  # fmt: skip
    if any(rule.model == "second" for rule in rules_named(arguments.rules)):
        second_model.make(CACHE)
    rows = known(arguments.out, tasks)
    tasks = [task for task in tasks if not any(task.items() <= row.items() for row in rows)]
    started = time.monotonic()
    print(f"{platform.machine()}, {len(tasks)} people, {arguments.jobs} at once")
    with multiprocessing.get_context("spawn").Pool(arguments.jobs) as pool, arguments.out.open("a") as out:
        for row in pool.imap_unordered(run, tasks):
            rows.append(row)
            out.write(json.dumps(row) + "\n")
            out.flush()
            shares = " ".join(f"{click}:{figures['share']:.0%}" for click, figures in row["measured"].items())
            print(f"{time.monotonic() - started:6.0f} s  {row['rule']}, {row['method']}, seed {row['seed']}: {shares}",
                  flush=True)  # fmt: skip
    print(table(rows))


if __name__ == "__main__":
    main()
