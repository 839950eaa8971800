"""A loaded model with its tokenizer: prompts, answers and conversations as tokens.

It does not know sessions, learning, or how chat templates work.
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
"""The context length of a model whose configuration does not give one."""

PLAIN_TURN_PREFIXES = {"system": "", "user": "\n\nUser: ", "assistant": "\n\nAssistant: "}
"""How turns are written for a model without a chat template."""


@dataclass(frozen=True)
class RenderedPrompt:
    """A prompt as the model reads it: text, tokens, and whether the chat template was applied."""

    text: str
    tokens: list[int]
    is_templated: bool


@dataclass
class LoadedModel:
    """A model in memory with everything needed to prompt it."""

    model: Any
    tokenizer: Any
    slots: AdapterSlots
    fast_forward: FastForward | None
    end_tokens: frozenset[int]
    info: Loaded
    template: ChatTemplate | None = None
    """The chat template, if there is one that works; `info` says why one does not."""

    def render_prompt(self, prompt: Prompt) -> RenderedPrompt:
        """Render a prompt in the chat template, or as plain text if there is none or it is off. Raises Invalid."""
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
        """Return the tokens of a prompt. Raises Invalid if `new_tokens` more do not fit the context."""
        rendered = self.render_prompt(prompt)
        self.require_fits_context(rendered, new_tokens, context_length)
        return rendered.tokens

    def require_fits_context(self, rendered: RenderedPrompt, new_tokens: int, context_length: int) -> None:
        """Raise Invalid if a prompt with `new_tokens` more tokens does not fit the context."""
        positions = max_positions(self.model.config)
        if len(rendered.tokens) + new_tokens > min(context_length, positions or context_length):
            raise prompt_too_long_error(len(rendered.tokens), new_tokens, context_length, positions)

    def tokenize_answer(self, text: str, is_complete: bool = True, prompt: RenderedPrompt | None = None) -> list[int]:
        """Return an answer as tokens, as it follows `prompt`. A complete answer gets the token that ends an assistant's
        turn, so that the model learns to stop.

        A token may depend on what precedes it, like SentencePiece's space: prompt and answer are tokenized together,
        and separately only if that would change the prompt's own tokens.
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
        """Remove end tokens written out at the end of an answer, as files have them."""
        end_texts = [each for end in self.end_tokens if len(each := str(self.tokenizer.decode([end])).strip()) > 1]
        while cut := next((each for each in end_texts if text.rstrip().endswith(each)), ""):
            text = text.rstrip().removesuffix(cut)
        return text

    def require_known_tokens(self, tokens: Sequence[int], field: str) -> None:
        """Raise Invalid for tokens that the model has no embedding for, such as padding."""
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
        """Tokenize a conversation, dropping its oldest turns if it may be trimmed and does not fit. Raises Invalid.

        A quarter of the context, or the longest answer if that is less, is reserved for the answer.
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
        """Return the longest end of a conversation that fits, after the system turns, and the number of turns
        dropped."""
        system_turns = [turn for turn in request.turns if turn.role == "system"]
        other_turns = [turn for turn in request.turns if turn.role != "system"]
        last = max((place for place, turn in enumerate(other_turns) if turn.role == "user"), default=0)
        starts = [place for place, turn in enumerate(other_turns[: last + 1]) if turn.role == "user" and place] or [0]
        low, high, reach = 0, len(starts) - 1, 1
        best: tuple[list[int], int] | None = None
        while low <= high:
            middle = max(
                (low + high) // 2, high - reach
            )  # search from the end, so that little more is tokenized than fits
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
        """Tokenize turns. Also returns whether the answer begins in a thinking block opened by the template."""
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
        """Return the model's chat template, None if it has none. Raises Invalid if it does not work."""
        if self.info.template_problem:
            raise Invalid(
                f"The model's chat template cannot be used: {self.info.template_problem}",
                code="bad_template",
                field="chat_template",
                next_step=NEXT_STEP,
            )
        return self.template

    def _tokenize(self, text: str, is_templated: bool) -> list[int]:
        """Tokenize text. Templates write their special tokens themselves; plain text gives at least one token."""
        if is_templated and self.template:
            return self.template.encode(text)
        tokens = list(self.tokenizer(text)["input_ids"])
        if len(tokens) > 1 and tokens[-1] in self.end_tokens:  # some tokenizers append an end token to every text
            tokens = tokens[:-1]
        return tokens or [self.tokenizer.bos_token_id or self.end_token or 0]

    @property
    def end_token(self) -> int | None:
        """The token that ends plain text."""
        own = self.tokenizer.eos_token_id
        return own if own is not None else min(self.end_tokens, default=None)

    @cached_property
    def end_of_turn_token(self) -> int | None:
        """The token that ends an assistant's turn: the one the chat template writes there, else the tokenizer's own."""
        written = self.template.find_end_token(self.end_tokens) if self.template else None
        return self.end_token if written is None else written


def prompt_too_long_error(tokens: int, new_tokens: int, context_length: int, positions: int | None) -> Invalid:
    """Return the error for a prompt that does not fit, with remedies that can work: no option extends the model's own
    limit."""
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
    """Return the model's context length, if its configuration gives one."""
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None
