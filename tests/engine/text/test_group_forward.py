"""Answers are drawn from what the model learns from, whether a cache holds it or all of it is read again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from tests.tiny import DENSE_MODEL_TYPES
from trellis.engine.learning.log_probs import GenericScorer, Group, answer_logprobs
from trellis.engine.text.adapters import AdapterSlot, AdapterSlots
from trellis.engine.text.group_forward import GenericGroupForward
from trellis.engine.text.kv_cache import GenericSequenceCache
from trellis.options import Adapter

pytestmark = pytest.mark.engine

FORGETFUL = ("openai-gpt", "rwkv")
"""They take a cache and do not look at it: all is read again with each token."""

MIXED = ("lfm2", "recurrent_gemma")
"""Their layers keep sums and not places."""

SIZES: dict[str, Any] = {
    "vocab_size": 120, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "head_dim": 8, "n_embd": 32, "n_layer": 2, "n_head": 4,
    "n_positions": 128, "sliding_window": 16, "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": 2,
    "lru_width": 32, "attention_hidden_size": 32,
}  # fmt: skip
GROUP = Group(list(range(5, 35)), [[20, 21, 22, 1], [30, 31, 1], [40, 41, 42, 43, 44, 45]], 0, 1.0)
OTHER = Group([7, 8, 9], [[50, 51], [52, 1]], 0, 1.0)


def slot_of(kind: str) -> tuple[AdapterSlot, Tensor]:
    config = type(AutoConfig.for_model(kind))
    known = config()
    torch.manual_seed(0)
    sizes = {name: size for name, size in SIZES.items() if hasattr(known, name)}
    if kind == "lfm2":
        sizes["layer_types"] = ["conv", "full_attention"]
    made = config(**sizes)
    model: Any = AutoModelForCausalLM.from_config(made).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    slot = AdapterSlots(model.requires_grad_(False)).get(Adapter(lora_rank=4, lora_alpha=8))
    return slot, torch.randn(slot.flat.shape, generator=torch.Generator().manual_seed(1)) * 0.05


def told(logits: list[Tensor], answers: list[list[int]]) -> Tensor:
    logprobs = torch.log_softmax(torch.stack(logits, dim=1).float(), dim=-1)
    return logprobs.gather(-1, torch.tensor(answers)[:, :, None])[..., 0]


@pytest.mark.parametrize("kind", [*DENSE_MODEL_TYPES, *FORGETFUL, *MIXED])
def test_what_is_drawn_is_what_is_learned_from(kind: str) -> None:
    slot, flat = slot_of(kind)
    forward = GenericGroupForward(slot, flat)
    answers = torch.randint(5, 120, (3, 20), generator=torch.Generator().manual_seed(3)).tolist()
    rows = forward.rows(GROUP.prompt, 3, 60)
    logits = [rows.logits]
    for place in range(19):
        rows.feed(torch.tensor([[answer[place]] for answer in answers]))
        logits.append(rows.logits)
    (read,) = GenericScorer(slot).logprobs([Group(GROUP.prompt, answers, 0, 1.0)], flat)
    assert torch.allclose(told(logits, answers), read, atol=1e-4)
    more = rows.restart(3)
    first, several = more.logits, more.feed(torch.tensor(answers)[:, :5])
    assert torch.allclose(
        told([first, *several[:, :4].unbind(1)], [each[:5] for each in answers]), read[:, :5], atol=1e-4
    )
    assert (slot.cache_support.chunks == "none") == (kind not in (*DENSE_MODEL_TYPES, "lfm2"))


class Values:
    def __init__(self, flat: Tensor) -> None:
        self.flat = flat


@pytest.mark.parametrize("kind", ["llama", "openai-gpt", "lfm2"])
def test_a_conversation_goes_on_from_what_was_read(kind: str) -> None:
    slot, flat = slot_of(kind)
    lines = GenericSequenceCache(slot._slots, lambda weights: (slot, Values(flat)))
    text = list(range(5, 25))
    line = lines.start("w", text)
    lines.prefill(line, text[:12])
    lines.prefill(line, text[12:])
    for token in (40, 41, 42):
        found = lines.decode([line], [token])[0]
    slot.install(flat)
    with torch.no_grad():
        expected = slot.model(input_ids=torch.tensor([[*text, 40, 41, 42]]), use_cache=False).logits[0, -1]
    assert torch.allclose(found, expected, atol=1e-4)
    lines.release(line)
    again = lines.start("w", [*text, 40, 60])
    known = len(again.tokens)
    found = lines.prefill(again, [*text, 40, 60][known:])
    with torch.no_grad():
        expected = slot.model(input_ids=torch.tensor([[*text, 40, 60]]), use_cache=False).logits[0, -1]
    assert torch.allclose(found, expected, atol=1e-4)
    assert known == (0 if kind in MIXED else 21), "what was read before the place where they differ is warm"


@pytest.mark.parametrize("kind", [*DENSE_MODEL_TYPES, *FORGETFUL, *MIXED])
def test_the_gradient_is_that_of_plain_transformers_one_answer_at_a_time(kind: str) -> None:
    """No padding, no shared passes, an attention mask: what everybody else would compute."""
    slot, flat = slot_of(kind)
    found, _ = GenericScorer(slot).gradient(
        [GROUP, OTHER], flat, (), lambda each: each[0].sum(-1)[0] - each[0].sum(-1)[1] + each[1].sum()
    )
    slot.install(flat)

    def plain(group: Group, number: int) -> Tensor:
        ids = torch.tensor([group.prompt + group.answers[number]])
        logits = slot.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        logprobs = torch.log_softmax(logits[0, len(group.prompt) - 1 : -1].float(), dim=-1)
        return logprobs.gather(-1, torch.tensor(group.answers[number])[:, None]).sum()

    expected = slot.gradient(plain(GROUP, 0) - plain(GROUP, 1) + plain(OTHER, 0) + plain(OTHER, 1))
    assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))
    assert float(torch.cosine_similarity(found, expected, dim=0)) > 1 - 1e-5


class Wordy(torch.nn.Module):
    """A model that takes any argument and gives all logits, as many with code of their own do."""

    device = torch.device("cpu")

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = table

    def forward(self, input_ids: Tensor, **others: Any) -> Any:
        assert "logits_to_keep" not in others

        class Output:
            logits = self.table[input_ids]

        return Output


def test_a_model_that_cannot_be_asked_for_its_last_logits_alone() -> None:
    table = torch.randn(5, 5, generator=torch.Generator().manual_seed(3))
    logprobs = answer_logprobs(Wordy(table), Group([1, 2, 3, 1, 2], [[3, 4, 0], [4]], 0, 2.0))
    expected = torch.log_softmax(table / 2.0, dim=-1)
    assert torch.allclose(logprobs[0], torch.stack([expected[2, 3], expected[3, 4], expected[4, 0]]))
    assert logprobs[1].tolist() == pytest.approx([expected[2, 4].item(), 0.0, 0.0])
