"""The speed of the loop, side by side in one run.

    python bench/speed.py

Group generation: our decoder against transformers' `generate` with the same PEFT adapter, the same prompt, the
same number of tokens. The loop: a click through the real server, from the press to the first new token and to
all new options, with and without foresight and time to read. The size and start of both processes.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the server that tests start is the one that is measured
DEMO = ROOT / "src" / "trellis" / "demo" / "model"
PROMPT = "Tell me about the sea."


def group_speed(tokens: int, times: int) -> None:
    """Tokens a second of a group of four, no end token, so that both do the same work."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trellis.blobs import Blobs
    from trellis.engine.adapters import Shelf, Slots
    from trellis.engine.decode import decode_group
    from trellis.params import Adapter, Sampling

    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": PROMPT}], add_generation_prompt=True)["input_ids"]
    with tempfile.TemporaryDirectory() as folder:
        shelf = Shelf(Blobs(Path(folder)))
        base = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval().requires_grad_(False)
        slot = Slots(base).get(Adapter())
        slot.install(shelf.plant(slot, "w1", 1).flat)
        fresh = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
        theirs = PeftModel.from_pretrained(fresh, Path(folder) / "w1").eval()

    def ours() -> float:
        started = time.perf_counter()
        for _ in decode_group(slot.model, tokenizer, ids, frozenset(), Sampling(max_new_tokens=tokens), 4, 1):
            pass
        return 4 * tokens / (time.perf_counter() - started)

    def generate() -> float:
        started = time.perf_counter()
        with torch.inference_mode():
            theirs.generate(
                input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=tokens, do_sample=True, min_p=0.05, top_k=0, num_return_sequences=4,
                eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
        return 4 * tokens / (time.perf_counter() - started)

    # One after the other in turn, so that a busy moment of the machine meets both.
    pairs = [(ours(), generate()) for _ in range(times + 1)][1:]
    mine, their = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"group of 4, {tokens} tokens each, {torch.get_num_threads()} threads")
    print(f"  transformers generate with PEFT  {their:8.0f} tokens/s   1.00")
    print(f"  trellis decode_group             {mine:8.0f} tokens/s   {mine / their:.2f}")


def loop_speed(clicks: int, reading: float, foresight: str) -> None:
    """Clicks through the real server: a program that follows the events as a page does, and takes so many seconds to
    read the options."""
    import psutil
    from tests.server import Server, read_events

    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder), fake=False, TRELLIS_FORESIGHT=foresight)
        dice = random.Random(1)
        first_token, all_options, learning = [], [], []
        health: list[float] = []
        ended = threading.Event()
        threading.Thread(target=poll_health, args=(server.url, health, ended), daemon=True).start()
        with server.client() as client:
            started = time.perf_counter()
            made = client.post("/api/steering/sessions", json={"config": {"control_prompt": ""}}).json()
            url = f"/api/steering/sessions/{made['id']}"
            with client.stream("GET", f"{url}/events") as stream:
                pressed: float | None = None
                fresh = True
                for _, name, data in read_events(stream):
                    now = time.perf_counter()
                    if name == "option_delta" and fresh and pressed:
                        first_token.append(now - pressed)
                        fresh = False
                    elif name == "node_added":
                        learning.append(data["metrics"]["seconds"])
                    elif name == "offer_ready":
                        if pressed is None:
                            begun = now - started
                        else:
                            all_options.append(now - pressed)
                        if len(all_options) == clicks:
                            break
                        time.sleep(reading)
                        pressed, fresh = time.perf_counter(), True
                        press(server.url, url, data["offer"], dice.randrange(4))
            ended.set()
            web = psutil.Process(server.process.pid).memory_info().rss
            engine = psutil.Process(server.engines()[0]).memory_info().rss
        print(f"\n{clicks} clicks, {reading:g} s of reading, foresight {foresight}: medians (95th percentiles)")
        for what, values in (("learning", learning), ("click to first new token", first_token),
                             ("click to all new options", all_options), ("/healthz meanwhile", health)):  # fmt: skip
            values.sort()
            late = values[int(0.95 * (len(values) - 1))]
            print(f"  {what:26} {statistics.median(values) * 1000:6.1f} ms  ({late * 1000:.1f} ms)")
        print(
            f"  server up after {server.seconds_to_start:.2f} s, first options {begun:.1f} s after the click on Start; "
            f"web process {web / 1e6:.0f} MB, engine {engine / 1e6:.0f} MB"
        )
        server.stop()


def poll_health(base: str, seconds: list[float], ended: threading.Event) -> None:
    """How long the event loop takes to answer while a model works beside it."""
    with httpx.Client(base_url=base) as client:
        while not ended.wait(0.02):
            started = time.perf_counter()
            client.get("/healthz")
            seconds.append(time.perf_counter() - started)


def press(base: str, url: str, offer: str, choice: int) -> None:
    answer: Any = httpx.post(f"{base}{url}/choose", json={"offer": offer, "choice": choice})
    answer.raise_for_status()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--times", type=int, default=9)
    parser.add_argument("--clicks", type=int, default=20)
    arguments = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    group_speed(arguments.tokens, arguments.times)
    for reading in (0.0, 1.0, 3.0):
        for foresight in ("off", "on"):
            loop_speed(arguments.clicks, reading, foresight)


if __name__ == "__main__":
    main()
