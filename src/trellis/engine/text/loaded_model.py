"""Which model is loaded: read from a folder with true progress, and what is said to it as tokens.

It reads safetensors only, and runs no code from the folder unless that was agreed to. It does not know sessions
or learning, nor how chat templates work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ...errors import Invalid
from ...messages import Chat, Loaded, Prompt, Turn
from .adapters import AdapterSlots
from .chat_slots import PreparedChat, conversation_too_long
from .chat_templates import NEXT_STEP, ChatTemplate, close_thinking, is_in_thinking, opening_after
from .fast_forward import FastForward
from .vocabulary import vocabulary_of

DEFAULT_CONTEXT_LENGTH = 8192
"""What a conversation may take of a model that does not say how far it looks back."""

PLAIN_TURN_PREFIXES = {"system": "", "user": "\n\nUser: ", "assistant": "\n\nAssistant: "}
"""How a conversation is put to a model without a chat template."""


@dataclass(frozen=True)
class RenderedPrompt:
    """A prompt as the model reads it: its text, in the chat template where `templated`, and its tokens."""

    text: str
    tokens: list[int]
    is_templated: bool


@dataclass
class LoadedModel:
    """A model in memory with what it needs to be spoken to."""

    model: Any
    tokenizer: Any
    slots: AdapterSlots
    fast_forward: FastForward | None
    end_tokens: frozenset[int]
    info: Loaded
    template: ChatTemplate | None = None
    """Its chat template, where it has one that works; `about` says what is wrong with one that does not."""

    def render_prompt(self, prompt: Prompt) -> RenderedPrompt:
        """A prompt in the model's chat template, or as plain text where it has none or it is off. Raises Invalid."""
        template = self._usable_template() if prompt.template else None
        if template is None:
            text = f"{prompt.system}\n\n{prompt.text}" if prompt.system else prompt.text
            text += prompt.opening
        else:
            turns = [Turn(role="user", text=prompt.text)]
            if prompt.system:
                turns = [Turn(role="system", text=prompt.system), *turns]
            text = template.render_prompt(turns, prompt.template_kwargs, "prompt", fixed_day=True)
            text += opening_after(text, prompt.opening)
        tokens = self._tokenize(text, template is not None)
        self.require_known_tokens(tokens, "prompt")
        return RenderedPrompt(text, tokens, template is not None)

    def tokenize_prompt(self, prompt: Prompt, new_tokens: int, context_length: int) -> list[int]:
        """The tokens of a prompt. Raises Invalid when it leaves no room for `room` more tokens in the context."""
        rendered = self.render_prompt(prompt)
        self.require_fits_context(rendered, new_tokens, context_length)
        return rendered.tokens

    def require_fits_context(self, rendered: RenderedPrompt, new_tokens: int, context_length: int) -> None:
        """Raises Invalid when a prompt leaves no room for `room` more tokens in the context."""
        positions = max_positions(self.model.config)
        if len(rendered.tokens) + new_tokens > min(context_length, positions or context_length):
            raise prompt_too_long_error(len(rendered.tokens), new_tokens, context_length, positions)

    def tokenize_answer(self, text: str, is_complete: bool = True, prompt: RenderedPrompt | None = None) -> list[int]:
        """An answer as tokens, as it is written `after` a prompt; with the token that ends an assistant's turn where
        the answer ended by itself, so that the model learns to stop.

        A token may depend on what stands before it, as the space of SentencePiece does: prompt and answer are read
        together, and apart only where the prompt's own tokens would not be the same.
        """
        tokens: list[int] | None = None
        text = self._strip_end_tokens(text) if is_complete else text
        if prompt is not None and text:
            text = opening_after(prompt.text, text)
            if self.template and prompt.is_templated:
                text = self.template.format_answer(prompt.text, text, is_complete)
            elif is_complete:
                text = close_thinking(prompt.text, text)
            joint = self._tokenize(prompt.text + text, prompt.is_templated)
            if joint[: len(prompt.tokens)] == prompt.tokens:
                tokens = joint[len(prompt.tokens) :]
        if tokens is None:
            tokens = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        end = self.end_of_turn_token if prompt is None or prompt.is_templated else self.end_token
        return [*tokens, end] if is_complete and end is not None else tokens

    def _strip_end_tokens(self, text: str) -> str:
        """An answer without an end token at its end, as files have it; it is put there as a token."""
        end_texts = [each for end in self.end_tokens if len(each := str(self.tokenizer.decode([end])).strip()) > 1]
        while cut := next((each for each in end_texts if text.rstrip().endswith(each)), ""):
            text = text.rstrip().removesuffix(cut)
        return text

    def require_known_tokens(self, tokens: Sequence[int], field: str) -> None:
        """Raises Invalid for a text with a token that the model has no row for, such as one for padding."""
        embedding = getattr(self.model.get_input_embeddings(), "weight", None)
        if embedding is not None and tokens and max(tokens) >= embedding.shape[0]:
            unknown = self.tokenizer.convert_ids_to_tokens(max(tokens))
            raise Invalid(
                f"The text has the token “{unknown}”, which this model has no row for.",
                code="unknown_token",
                field=field,
                next_step="Write it otherwise.",
            )

    def prepare_chat(self, request: Chat) -> PreparedChat:
        """A conversation as tokens, without its oldest turns where it may be trimmed and does not fit. Raises Invalid.

        A quarter of the context, or the longest answer where that is less, is kept free for the answer.
        """
        context_length = max_positions(self.model.config) or DEFAULT_CONTEXT_LENGTH
        max_new_tokens = request.sampling.max_new_tokens
        reserved = min(max_new_tokens, context_length // 4) if request.trims else 1
        stop, in_thinking = request.stop, False
        last = request.turns[-1].text.strip() if request.turns and request.turns[-1].role == "user" else ""
        fewest = vocabulary_of(self.tokenizer).fewest_tokens(last if request.turns else request.text)
        if fewest + reserved > context_length:  # known without tokenizing it
            raise conversation_too_long(fewest, context_length, at_least=True)
        if not request.turns:
            tokens = self._tokenize(request.text, False)
        else:
            tokens, in_thinking = self._tokenize_turns(request.turns, request)
            if not (self.template and request.template):
                stop = (*stop, PLAIN_TURN_PREFIXES["user"])
        self.require_known_tokens(tokens, "messages")
        left_out = 0
        if len(tokens) + reserved > context_length:
            if not request.trims or not request.turns:
                raise conversation_too_long(len(tokens), context_length)
            tokens, left_out = self._trim_chat(request, context_length - reserved, len(tokens))
        return PreparedChat(tokens, left_out, context_length, max_new_tokens, stop, in_thinking)

    def _trim_chat(self, request: Chat, max_tokens: int, full_length: int) -> tuple[list[int], int]:
        """The longest end of a conversation that fits, after what the system said, and how many turns it leaves out."""
        system_turns = [turn for turn in request.turns if turn.role == "system"]
        other_turns = [turn for turn in request.turns if turn.role != "system"]
        last = max((place for place, turn in enumerate(other_turns) if turn.role == "user"), default=0)
        starts = [place for place, turn in enumerate(other_turns[: last + 1]) if turn.role == "user" and place] or [0]
        low, high, reach = 0, len(starts) - 1, 1
        best: tuple[list[int], int] | None = None
        while low <= high:
            middle = max((low + high) // 2, high - reach)  # from the end, so that little more is tokenized than fits
            reach *= 2
            tokens, _ = self._tokenize_turns([*system_turns, *other_turns[starts[middle] :]], request)
            if len(tokens) <= max_tokens:
                best, high = (tokens, starts[middle]), middle - 1
            else:
                low, full_length = middle + 1, len(tokens)
        if best is None:
            raise conversation_too_long(full_length, max_tokens)
        return best

    def _tokenize_turns(self, turns: Sequence[Turn], request: Chat) -> tuple[list[int], bool]:
        """Turns as tokens, and whether the answer begins in a thought that the template has opened."""
        opening = ""
        if turns[-1].role == "assistant":
            opening, turns = turns[-1].text, turns[:-1]
        if not turns:
            raise Invalid(
                "Nothing was said before the answer that is to be continued.", field="messages",
                next_step="Begin with a message of the user.",
            )  # fmt: skip
        template = self._usable_template() if request.template else None
        if template is not None:
            text = template.render_prompt(turns, request.template_kwargs, "messages")
            return self._tokenize(template.continue_answer(text, opening), True), is_in_thinking(text) and not opening
        lines = "".join(f"{PLAIN_TURN_PREFIXES[turn.role]}{turn.text}" for turn in turns).lstrip()
        prefix = (
            PLAIN_TURN_PREFIXES["assistant"]
            if opening and not opening[0].isspace()
            else PLAIN_TURN_PREFIXES["assistant"].rstrip(" ")
        )
        return self._tokenize(lines + prefix + opening, False), False

    def _usable_template(self) -> ChatTemplate | None:
        """The model's chat template, None where it has none. Raises Invalid where it has one that does not work."""
        if self.info.template_problem:
            raise Invalid(
                f"The model's chat template cannot be used: {self.info.template_problem}",
                code="bad_template",
                field="chat_template",
                next_step=NEXT_STEP,
            )
        return self.template

    def _tokenize(self, text: str, is_templated: bool) -> list[int]:
        """Text as tokens: a template writes its special tokens itself; of plain text there is at least one token."""
        if is_templated and self.template:
            return self.template.encode(text)
        tokens = list(self.tokenizer(text)["input_ids"])
        if len(tokens) > 1 and tokens[-1] in self.end_tokens:  # some tokenizers close every text
            tokens = tokens[:-1]
        return tokens or [self.tokenizer.bos_token_id or self.end_token or 0]

    @property
    def end_token(self) -> int | None:
        """What ends a plain text."""
        own = self.tokenizer.eos_token_id
        return own if own is not None else min(self.end_tokens, default=None)

    @cached_property
    def end_of_turn_token(self) -> int | None:
        """What ends an assistant's turn: the end that the chat template writes there, else the tokenizer's own."""
        written = self.template.find_end_token(self.end_tokens) if self.template else None
        return self.end_token if written is None else written


def prompt_too_long_error(tokens: int, new_tokens: int, context_length: int, positions: int | None) -> Invalid:
    """Why a prompt does not fit, with the ways out that can work: no option makes a model look back further."""
    limit = min(context_length, positions or context_length)
    left = limit - tokens
    remedies = [f"allow answers of at most {left} tokens"] if left > 0 else []
    if context_length < (positions or context_length + 1):
        most = f" (at most {positions})" if positions else ""
        remedies.append(f"use a longer context{most}")
    whose = "the model, which can look back on no more" if limit == positions else "the session"
    return Invalid(
        f"The prompt has {tokens} tokens; with answers of up to {new_tokens} it does not fit into the context of "
        f"{limit} of {whose}.",
        code="prompt_too_long",
        field="prompt",
        next_step="Shorten the prompt" + "".join(f", or {way}" for way in remedies) + ".",
    )


def max_positions(config: Any) -> int | None:
    """How many tokens a model can look back on, where its configuration says so."""
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None
