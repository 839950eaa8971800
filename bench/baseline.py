"""What a click cost in the first Trellis, written out: one optimiser step on the whole group by its own rule, the
adapter written to disk, then transformers' `generate` with a streamer. The bench sets ours beside it.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from trellis.engine.learning.log_probs import Group, answer_logprobs
from trellis.engine.learning.losses import METHODS
from trellis.options import Learning

GROUP, TOKENS = 4, 96


class FirstToken:
    """A streamer that notes when the first new token is there."""

    def __init__(self) -> None:
        self.prompt_told = False
        self.first = 0.0

    def put(self, tokens: torch.Tensor) -> None:
        if self.prompt_told and not self.first:
            self.first = time.perf_counter()
        self.prompt_told = True

    def end(self) -> None:
        pass


def clicks(folder: Path, count: int, prompts: list[str], device: str = "cpu") -> list[tuple[float, float]]:
    """Seconds from each click to the first new token and to all new answers."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-5)
    method, options = METHODS["trellis-classic"], Learning(learning_method="trellis-classic")
    ends = tokenizer.eos_token_id

    def asked(number: int) -> list[int]:
        turns = [{"role": "user", "content": prompts[number % len(prompts)]}]
        return list(tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"])

    def offered(prompt: list[int], streamer: FirstToken) -> list[list[int]]:
        model.eval()
        ids = torch.tensor([prompt] * GROUP, device=device)
        with torch.inference_mode():
            found = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=True,
                min_p=0.05, top_k=0, pad_token_id=0, streamer=streamer,
            )  # fmt: skip
        answers = [row[len(prompt) :] for row in found.tolist()]
        return [row[: row.index(ends) + 1] if ends in row else row for row in answers]

    seen = []
    torch.manual_seed(1)
    prompt = asked(0)
    answers = offered(prompt, FirstToken())
    with tempfile.TemporaryDirectory() as place:
        for number in range(1, count + 1):
            started = time.perf_counter()
            model.train()
            group = Group(prompt, answers, number % GROUP, 1.0)
            with torch.no_grad(), model.disable_adapter():
                reference = answer_logprobs(model, group)
            logprobs = answer_logprobs(model, group)
            verdict = method.loss(logprobs, reference, group.mask(logprobs.device), group.choice, options)
            optimizer.zero_grad()
            verdict.loss.backward()
            optimizer.step()
            model.save_pretrained(Path(place) / f"step-{number}")
            torch.save(optimizer.state_dict(), Path(place) / f"step-{number}" / "optimizer.pt")
            prompt = asked(number)
            streamer = FirstToken()
            answers = offered(prompt, streamer)
            if number > 1:  # the first one warms up
                seen.append((streamer.first - started, time.perf_counter() - started))
    return seen
