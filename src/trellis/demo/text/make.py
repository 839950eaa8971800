"""Makes the demo model from nothing: tokenizer, chat template, a small Llama trained on the corpus, model card.

`python -m trellis.demo.text.make` writes the folder `model` beside this file. It knows nothing of the product.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trellis.demo.text.corpus import Conversation, conversations, write_prompts
from trellis.demo.text.voices import VOICES

MODEL = Path(__file__).with_name("model")
SPECIAL = ("<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
NAMED = {"pad_token": "<|pad|>", "bos_token": "<|bos|>", "eos_token": "<|end|>"}
TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CONTEXT = 1024
# The token ids of a conversation, and which of them are learnt: those of the answers and their ends.
Example = tuple[list[int], list[bool]]


def make_tokenizer(talks: list[Conversation], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with the chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator((message["content"] for talk in talks for message in talk.messages), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **NAMED,
        chat_template=TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=6,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def encode(tokenizer: PreTrainedTokenizerFast, talk: Conversation) -> Example:
    """The ids that the chat template gives, and which of them the loss counts."""
    ids = [tokenizer.convert_tokens_to_ids("<|bos|>")]
    learnt = [False]
    for message in talk.messages:
        content = tokenizer.encode(message["content"], add_special_tokens=False)
        ids += [tokenizer.convert_tokens_to_ids(f"<|{message['role']}|>"), *content, tokenizer.eos_token_id]
        learnt += [False] + [message["role"] == "assistant"] * (len(content) + 1)
    return ids[:CONTEXT], learnt[:CONTEXT]


def batches(examples: list[Example], tokens: int, pad: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of about `tokens` tokens, of examples of like length.

    Yields ids (B, T) and targets (B, T), which are -100 where nothing is learnt.
    """
    rng = random.Random(seed)
    order = sorted(range(len(examples)), key=lambda index: (len(examples[index][0]), rng.random()))
    groups: list[list[int]] = [[]]
    for index in order:
        if groups[-1] and (len(groups[-1]) + 1) * len(examples[index][0]) > tokens:
            groups.append([])
        groups[-1].append(index)
    rng.shuffle(groups)
    for group in groups:
        width = max(len(examples[index][0]) for index in group)
        ids = torch.full((len(group), width), pad)
        targets = torch.full((len(group), width), -100)
        for row, index in enumerate(group):
            tokens_, learnt = examples[index]
            ids[row, : len(tokens_)] = torch.tensor(tokens_)
            targets[row, : len(tokens_)] = torch.tensor(
                [t if keep else -100 for t, keep in zip(tokens_, learnt, strict=True)]
            )
        yield ids, targets


def train(
    model: LlamaForCausalLM, examples: list[Example], *, minutes: float, tokens: int, rate: float, seed: int
) -> None:
    """One pass over the examples with AdamW; the cosine ends with the pass or with the time, whichever is first."""
    pad = model.config.pad_token_id
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        lr=rate,
        betas=(0.9, 0.98),
    )
    total = sum(1 for _ in batches(examples, tokens, pad, seed))
    start = time.monotonic()
    model.train()
    smooth, seen = 0.0, 0
    for step, (ids, targets) in enumerate(batches(examples, tokens, pad, seed)):
        done = max(step / total, (time.monotonic() - start) / (60 * minutes))
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]  # (B, T - 1, D)
        kept = targets[:, 1:] != -100
        loss = functional.cross_entropy(model.lm_head(hidden[kept]), targets[:, 1:][kept])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seen += ids.numel()
        smooth = loss.item() if step == 0 else 0.98 * smooth + 0.02 * loss.item()
        if step % 200 == 0:
            spent = time.monotonic() - start
            print(
                f"{spent:5.0f} s  {100 * done:3.0f} %  step {step:5d}  loss {smooth:.3f}"
                f"  {seen / max(spent, 1):.0f} tokens/s",
                flush=True,
            )
    model.eval()


def sharpen(model: LlamaForCausalLM, factor: float) -> None:
    """Multiplies all logits by `factor`, through the last norm's weight, as a temperature of 1 / factor would.

    So small a model leaves too much to unlikely tokens; people and samplers expect sense at temperature 1.
    """
    with torch.no_grad():
        model.model.norm.weight.mul_(factor)


CARD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# The demo model

A chat model of {parameters:.1f} million parameters that answers everyday questions (on bread, bees, rain and
sixty other topics) in one of {count} voices, drawn at random: {voices}. It exists so that steering can be tried at
once, on any computer, without a download. It knows next to nothing else; do not take its advice on anything that
matters.

## How it was made

`python -m trellis.demo.text.make` trains it from nothing on two processor cores in about {minutes:.0f} minutes: a
byte-level BPE tokenizer of {vocabulary} tokens and a Llama network ({layers} layers, width {width}, tied
embeddings, context {context}), on {examples} short conversations. These are written by `trellis.demo.text.corpus` from
the project's own sentences; no other text went into it. The voice of an answer is independent of the prompt, and
stays the same within a conversation. The logits are sharpened at the end, so that temperature 1 makes sense.

## Use

The chat template knows the roles system, user and assistant. Sample at temperature 1 to hear all the voices.

Licence: Apache-2.0, for the weights and for the text they were made from.
"""


def save(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path, minutes: float, examples: int
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        max_new_tokens=160,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = model.config
    (folder / "README.md").write_text(
        CARD.format(
            parameters=model.num_parameters() / 1e6,
            count=len(VOICES),
            voices=", ".join(VOICES),
            minutes=minutes,
            vocabulary=config.vocab_size,
            layers=config.num_hidden_layers,
            width=config.hidden_size,
            context=CONTEXT,
            examples=f"{examples:,}",
        ),
        encoding="utf-8",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo model from nothing and write it to a folder.")
    parser.add_argument("--minutes", type=float, default=10.5, help="time limit of the training (default 10.5)")
    parser.add_argument("--count", type=int, default=120_000, help="conversations to learn from (default 120000)")
    parser.add_argument("--vocab", type=int, default=2560, help="tokens in the vocabulary (default 2560)")
    parser.add_argument("--batch", type=int, default=1024, help="tokens in a batch (default 1024)")
    parser.add_argument("--rate", type=float, default=1.5e-3, help="peak learning rate (default 0.0015)")
    parser.add_argument("--resume", type=Path, help="folder of a model to go on with, instead of a new one")
    parser.add_argument("--sharpen", type=float, default=1.4, help="factor on the logits (default 1.4)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the corpus and the weights (default 1)")
    parser.add_argument("--out", type=Path, default=MODEL, help="folder to write (default: model beside this module)")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    start = time.monotonic()
    talks = list(conversations(args.count, args.seed))
    if args.resume:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.resume)
        model = LlamaForCausalLM.from_pretrained(args.resume, dtype=torch.float32)
        sharpen(model, 1 / args.sharpen)
    else:
        tokenizer = make_tokenizer(talks[:20_000], args.vocab)
        model = make_model(tokenizer)
    examples = [encode(tokenizer, talk) for talk in talks]
    total = sum(len(ids) for ids, _ in examples)
    print(
        f"{len(examples)} conversations of {total} tokens, written in {time.monotonic() - start:.0f} s;"
        f" {model.num_parameters()} parameters"
    )
    train(model, examples, minutes=args.minutes, tokens=args.batch, rate=args.rate, seed=args.seed)
    sharpen(model, args.sharpen)
    save(model, tokenizer, args.out, (time.monotonic() - start) / 60, len(examples))
    if args.out == MODEL:
        write_prompts()
    print(f"Wrote {args.out} after {time.monotonic() - start:.0f} s.")


if __name__ == "__main__":
    main()
