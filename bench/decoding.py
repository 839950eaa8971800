"""How fast a group of answers is drawn: ours against transformers' `generate` with the same PEFT adapter, the same
prompt and the same number of tokens, in one run; and against how fast the memory can be read.

    python bench/decoding.py                  # the demo model, and a random one that suits the device
    python bench/decoding.py --only demo
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from random_model import SIZES, random_model
from trellis.blobs import Blobs
from trellis.engine.text.adapters import AdapterSlots
from trellis.engine.text.decoding import decode_group
from trellis.engine.text.fast_forward import FastForward
from trellis.engine.text.group_forward import group_forward_for
from trellis.engine.text.weights_store import WeightsStore
from trellis.options import Adapter, Sampling

DEMO = Path(__file__).resolve().parent.parent / "src" / "trellis" / "demo" / "text" / "model"
PROMPT = list(range(5, 35))
GROUP = 4


def waited(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def copy_bandwidth(device: str) -> float:
    """Bytes a second that a large sum reads: what a pass over the weights could reach."""
    numbers = torch.ones(256_000_000 if device == "cuda" else 64_000_000, device=device)
    best = float("inf")
    for _ in range(6):
        started = waited(device)
        numbers.sum()
        best = min(best, waited(device) - started)
    return numbers.nbytes / best


def ours(slot: Any, flat: Tensor, tokenizer: Any, tokens: int) -> tuple[float, float]:
    """Seconds to the first token, and to all."""
    device = slot.flat.device.type
    forward = group_forward_for(slot, flat, len(PROMPT) + tokens)
    started = waited(device)
    drawing = decode_group(forward, tokenizer, PROMPT, frozenset(), Sampling(max_new_tokens=tokens), GROUP, 1)
    next(drawing)
    first = waited(device) - started
    *_, group = drawing
    seconds = waited(device) - started
    assert all(len(option.tokens) == tokens for option in group)
    return first, seconds


def theirs(model: Any, tokens: int) -> float:
    device = model.device.type
    started = waited(device)
    ids = torch.tensor([PROMPT], device=device)
    with torch.inference_mode():
        found = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=True, min_p=0.05,
            top_k=0, num_return_sequences=GROUP, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    assert found.shape == (GROUP, len(PROMPT) + tokens)
    return waited(device) - started


@dataclass(frozen=True)
class Speed:
    """Medians of drawing one group.

    `ours` and `theirs` are tokens a second; `first` and `step` are seconds; `read` are the bytes of weights that a step
    reads, and `limit` is how often in a second the memory could read them.
    """

    dtype: str
    device: str
    ours: float
    theirs: float
    first: float
    step: float
    read: int
    limit: float

    @property
    def of_memory(self) -> float:
        return 1 / (self.step * self.limit)


def group_speed(make: Callable[[], Any], tokenizer_path: Path, tokens: int, times: int) -> Speed:
    """Draw groups with ours and with theirs in turn. The model must have a lean pass."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    with tempfile.TemporaryDirectory() as folder:
        shelf = WeightsStore(Blobs(Path(folder)))
        base = make()
        read = sum(module.weight.nbytes for module in base.modules() if isinstance(module, torch.nn.Linear))
        slot = AdapterSlots(base, FastForward.from_model(base)).get(Adapter())
        flat = shelf.create_initial(slot, "w1", 1).flat
        fresh = make()
        model = PeftModel.from_pretrained(fresh, Path(folder) / "w1").eval()
    device = slot.flat.device.type
    # One after the other in turn, so that a busy moment of the machine meets both. The first round warms up.
    rounds = [(*ours(slot, flat, tokenizer, tokens), theirs(model, tokens)) for _ in range(times + 1)][1:]
    first, mine, their = (statistics.median(column) for column in zip(*rounds, strict=True))
    kind = str(base.dtype).removeprefix("torch.")
    return Speed(
        kind, device, GROUP * tokens / mine, GROUP * tokens / their, first, mine / tokens, read,
        copy_bandwidth(device) / read,
    )  # fmt: skip


def show(name: str, make: Callable[[], Any], tokens: int, times: int) -> None:
    found = group_speed(make, DEMO, tokens, times)
    print(f"\n{name}, {found.dtype} on {found.device}: {GROUP} answers of {tokens} tokens, medians of {times}")
    print(f"  transformers generate with PEFT  {found.theirs:9.0f} tokens/s   1.00")
    print(f"  trellis decode_group             {found.ours:9.0f} tokens/s  {found.ours / found.theirs:5.2f}")
    print(f"  first token after {found.first * 1000:.1f} ms; a step {found.step * 1000:.2f} ms")
    print(
        f"  {found.read / 1e6:.0f} MB of weights are read a step; the memory allows {found.limit:.0f} steps/s: "
        f"{found.of_memory:.0%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--times", type=int, default=7)
    parser.add_argument("--only", choices=["demo", *SIZES])
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    where = torch.cuda.get_device_name() if on_gpu else f"{platform.machine()}, {os.cpu_count()} cores"
    print(f"{where}; {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}")
    if arguments.only in (None, "demo"):

        def demo() -> Any:
            model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).to(device)
            return model.eval().requires_grad_(False)

        show("demo", demo, arguments.tokens, arguments.times)
    size = arguments.only or ("1.2 billion" if on_gpu else "140 million")
    if size != "demo":
        dtype = torch.bfloat16 if on_gpu else torch.float32
        times = arguments.times if on_gpu else 3
        show(size, lambda: random_model(size, device, dtype), arguments.tokens, times)


if __name__ == "__main__":
    main()
