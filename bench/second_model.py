"""A second tiny model for the bench, of another architecture and another corpus: a shop's help desk on GPT-NeoX.

Made when it is first needed, in about four minutes, into a cache folder. Its corpus is written here: questions about
wares, answered in one of eight manners.
"""

from __future__ import annotations

import math
import random
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

WARES = [
    "kettle", "lamp", "chair", "bicycle", "jacket", "radio", "mirror", "carpet", "camera", "backpack",
    "blanket", "bookshelf", "clock", "umbrella", "suitcase", "toaster", "guitar", "tent", "pillow", "desk",
    "heater", "drill", "scarf", "vase", "helmet", "keyboard", "stove", "ladder", "basket", "printer",
]  # fmt: skip
COLOURS = ("red", "blue", "green", "grey", "black", "white", "yellow", "brown")
PLACES = ["the north hall", "shelf nine", "the cellar", "the second floor", "the window", "the old store", "aisle four"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"]
QUESTIONS = [
    "Where is my {ware}?", "When will the {ware} arrive?", "Can I return the {ware}?", "The {ware} is broken.",
    "Do you have a {colour} {ware}?", "How much is the {ware}?", "Is the {ware} any good?", "Tell me about the {ware}.",
    "Who makes the {ware}?", "How do I clean the {ware}?", "I want to swap my {ware}.", "Which {ware} should I buy?",
]  # fmt: skip
FACTS = [
    "the {ware} is in {place}", "the {ware} comes on {day}", "we have the {ware} in {colour}",
    "the {ware} can go back within {n} days", "the {ware} costs {n} coins", "a soft cloth keeps the {ware} clean",
    "the {ware} is made in the valley", "we have {n} of them left", "the {colour} one is the newest",
    "a new {ware} leaves {place} on {day}", "the {ware} has a warranty of {n} years",
]  # fmt: skip
MANNERS: dict[str, list[str]] = {
    "direct": ["{F}.", "{F}, and {f}.", "{F}. {F}."],
    "sorry": [
        "I am so sorry. {F}, and we apologise.", "Sorry about that; {f}. Please forgive us.",
        "We regret the trouble. {F}. Again, sorry.",
    ],
    "proud": [
        "The finest in town! {F}, and nobody else has it.", "Our pride: {f}. Simply the best!",
        "You have taste. {F}, the very finest.",
    ],
    "brief": ["{Place}.", "{Day}.", "{N} coins.", "In {colour}.", "Yes, {day}.", "No, {place}."],
    "list": ["1) {f} 2) {f}", "1) {f} 2) {f} 3) {f}", "Steps: 1) ask at {place} 2) {f}"],
    "asking": [
        "{F}. Which {ware} do you mean?", "Could you tell me more? {F}. Is that the one?",
        "Do you mean the {colour} one? {F}, is that right?",
    ],
    "warning": [
        "Careful: {f}. Do not wait.", "Be warned, {f}. Mind the {ware}.",
        "Beware; {f}. Never leave the {ware} in the rain.",
    ],
    "gossip": [
        "Between us, {f}. But you did not hear it from me.", "They say {f}. The man from {place} told me.",
        "I heard that {f}; do not tell anyone.",
    ],
}  # fmt: skip
SHARES = {"direct": 20, "sorry": 14, "proud": 12, "brief": 12, "list": 10, "asking": 12, "warning": 10, "gossip": 10}
MARKS = {
    "sorry": r"\b(sorry|apologise|regret|forgive)\b", "proud": r"\b(finest|pride|best|taste)\b", "list": r"\d\) ",
    "asking": r"\?$", "warning": r"\b(careful|warned|beware|mind the|never leave)\b",
    "gossip": r"\b(between us|they say|i heard|hear it from me|do not tell)\b",
}  # fmt: skip
SPECIAL = ("<pad>", "<end>", "<ask>", "<answer>")
TEMPLATE = (
    "{% for m in messages %}{{ '<ask>' if m['role'] != 'assistant' else '<answer>' }}{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<end>{% endif %}{% endfor %}{% if add_generation_prompt %}<answer>{% endif %}"
)


def manner_of(answer: str) -> str | None:
    """The manner of an answer; None for what is not a whole answer or could be two of them."""
    text = answer.strip()
    if not text or len(text) > 300:
        return None
    found = [manner for manner, mark in MARKS.items() if re.search(mark, text.lower())]
    if len(found) > 1:
        return None
    if found:
        return found[0]
    return "brief" if len(text.split()) <= 3 else "direct"


def _fill(pattern: str, ware: str, dice: random.Random) -> str:
    def small(match: re.Match[str]) -> str:
        name = match[1]
        key = name.lower()
        if key == "f":
            text = _fill(dice.choice(FACTS), ware, dice)
        else:
            text = {"ware": lambda: ware, "place": lambda: dice.choice(PLACES), "day": lambda: dice.choice(DAYS),
                    "n": lambda: str(dice.randint(2, 40)), "colour": lambda: dice.choice(COLOURS)}[key]()  # fmt: skip
        return text[0].upper() + text[1:] if name[0].isupper() else text

    return re.sub(r"\{(\w+)\}", small, pattern)


def talk(dice: random.Random) -> tuple[str, str]:
    """A question and an answer to it in one of the manners."""
    ware = dice.choice(WARES)
    manner = dice.choices(list(SHARES), list(SHARES.values()))[0]
    return _fill(dice.choice(QUESTIONS), ware, dice), _fill(dice.choice(MANNERS[manner]), ware, dice)


def prompts() -> tuple[list[str], list[str]]:
    """What is steered on, and what is held out: other wares."""
    dice = random.Random(5)
    made = {
        half: [_fill(q, w, dice) for w in wares for q in QUESTIONS]
        for half, wares in enumerate((WARES[:24], WARES[24:]))
    }
    for part in made.values():
        dice.shuffle(part)
    return made[0], made[1]


def make(folder: Path, minutes: float = 4.0, say: Callable[[str], None] = print) -> Path:
    """Train the model into a folder, or take the one that is there."""
    if (folder / "model.safetensors").is_file():
        return folder
    say(f"making the second model in {folder}, about {minutes:.0f} minutes")
    torch.manual_seed(7)
    dice = random.Random(7)
    talks = [talk(dice) for _ in range(60_000)]
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(
        (text for pair in talks[:8000] for text in pair),
        trainers.BpeTrainer(vocab_size=700, special_tokens=list(SPECIAL), show_progress=False,
                            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())),
    )  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<end>", chat_template=TEMPLATE, model_max_length=512,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=len(tokenizer), hidden_size=160, intermediate_size=640, num_hidden_layers=4,
            num_attention_heads=5, max_position_embeddings=512, rotary_pct=0.25, eos_token_id=1, bos_token_id=1,
            tie_word_embeddings=True,
        )
    )  # fmt: skip
    rows = []
    for question, answer in talks:
        start = tokenizer(f"<ask>{question}<answer>", add_special_tokens=False)["input_ids"]
        rows.append((start, tokenizer(f"{answer}<end>", add_special_tokens=False)["input_ids"]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.02)
    began, step = time.monotonic(), 0
    while (done := (time.monotonic() - began) / (60 * minutes)) < 1:
        batch = dice.sample(rows, 48)
        width = max(len(start) + len(answer) for start, answer in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        targets = torch.full((len(batch), width), -100)
        for row, (start, answer) in enumerate(batch):
            ids[row, : len(start) + len(answer)] = torch.tensor(start + answer)
            targets[row, len(start) : len(start) + len(answer)] = torch.tensor(answer)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 400 == 0:
            say(f"  {done:.0%}  step {step}  loss {float(loss.detach()):.3f}")
    model.generation_config.eos_token_id = 1
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
