"""Chat templates: render a conversation for a model, and find the token that ends an assistant's turn.

A template is foreign code. It runs in the sandbox of transformers, is probed once when its model is loaded, and its
failures are explained in sentences. This module does not know weights, sessions or context lengths.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Literal

from jinja2 import TemplateError, TemplateSyntaxError
from transformers.utils.chat_template_utils import encode_marked_chat, mark_control_tokens

from ...errors import Invalid, shorten
from ...messages import TemplateKwargs, Turn, template_kwargs_from
from .watchdog import WATCHDOG, RenderTimeout

Role = Literal["system", "user", "assistant"]

RENDER_SECONDS = 5.0
"""A template that takes longer is stopped."""


MAX_ADDED_CHARACTERS = 1_000_000
"""The most characters that a template may add to a conversation."""

FIXED_DAY = datetime(2024, 7, 26)
"""The date in a session's prompts; templates of Llama 3 use it if they are given none."""

MARK_START, MARK_END = mark_control_tokens("|", re.compile(r"\|")).split("|")
"""The marks that transformers puts around special tokens that are to be read as text."""

THINK_START, THINK_END = "<think>", "</think>"


ANSWER_TURN = Turn(role="assistant", text="Lantern 4: it keeps <i>a week & a day</i>, Zoë.")

NEXT_STEP = (
    "Start a session with the option “Chat template” off, put a template that works into the model's folder as "
    "chat_template.jinja, or use another model."
)


class TemplateFailed(Exception):
    """A template could not render a conversation. The message is a whole sentence."""


@dataclass(frozen=True)
class ControlTokens:
    """Special tokens, and added tokens that occur in a template; some tokenizers have thousands."""

    tokens: frozenset[str]
    lengths: tuple[int, ...]
    first_characters: re.Pattern[str]
    """Matches their first characters."""

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, source: str) -> ControlTokens:
        added = [(token.content, token.special) for token in tokenizer.added_tokens_decoder.values()]
        tokens = {text for text, special in added if text and not text.isspace() and (special or text in source)}
        first = "".join(sorted({re.escape(text[0]) for text in tokens}))
        return cls(
            frozenset(tokens), tuple(sorted(set(map(len, tokens)))), re.compile(f"[{first}]" if first else "(?!)")
        )


@dataclass(frozen=True)
class ChatTemplate:
    """A probed chat template with its peculiarities."""

    tokenizer: Any
    source: str
    control_tokens: ControlTokens
    extra_arguments: Mapping[str, list[Any]]
    """Arguments that it needs besides the messages."""
    roles_with_parts: frozenset[Role] = frozenset()
    """Roles whose content it expects as a list of parts instead of a string."""
    merges_system: bool = False
    """Whether it does not support a system prompt, which is then prepended to the user's first message."""
    merges_later_system: bool = False
    """Whether it does not support a second system turn, or one within the conversation."""
    merges_same_role: bool = False
    """Whether consecutive turns of one role must be merged."""
    single_turn_reason: str = ""
    """Why it cannot render more than one turn; empty if it can."""
    cuts_prompt_from_conversation: bool = False
    """Whether it ignores `add_generation_prompt`: the prompt is then cut from a whole conversation."""
    prompt_end: str = ""
    """What it writes between a user's last word and the answer."""
    answer_prefix: str = ""
    """What it writes between that and an answer: a space, an empty thinking block, the header of an answer, or
    nothing."""
    turn_endings: tuple[str, ...] = ()
    """What it writes after an answer: at the end of a conversation, and before another turn."""
    thinking_switch: str | None = None
    """The variable that turns thinking on and off."""
    opens_thinking: bool = False
    """Whether its generation prompt ends with an opened thinking block."""

    def render_prompt(
        self, turns: Sequence[Turn], template_kwargs: TemplateKwargs, field: str, fixed_day: bool = False
    ) -> str:
        """Render a conversation with the generation prompt, for `encode`. Raises Invalid, naming `field`.

        With `fixed_day` the same conversation gives the same text on every day, since ids of weights depend on it.
        """
        variables = self._variables(template_kwargs)
        template = replace(self, source=fix_date(self.source)) if fixed_day else self
        marked = [turn if turn.role == "assistant" else self._mark_control_tokens(turn) for turn in turns]
        try:
            return template._render_prompt_or_rearrange(marked, variables)
        except TemplateFailed as failure:
            raise Invalid(
                f"The model's chat template could not write this: {failure}",
                code="bad_template",
                field=field,
                next_step=NEXT_STEP
                if field == "prompt"
                else "Send the messages in another order, or use another model.",
            ) from None

    def _render_prompt_or_rearrange(self, turns: Sequence[Turn], variables: Mapping[str, Any]) -> str:
        """Render the prompt; if the template rejects an order of roles that was not probed, make user and assistant
        alternate."""
        arranged = arrange_turns(turns, self.merges_system, self.merges_later_system, self.merges_same_role)
        if self.single_turn_reason and sum(turn.role != "system" for turn in arranged) > 1:
            raise TemplateFailed(f"it takes a single message, not a conversation. {self.single_turn_reason}")
        try:
            return self._render_prompt(arranged, variables)
        except TemplateFailed:
            alternating = arrange_turns(turns, True, True, True)
            if alternating == arranged:
                raise
            return self._render_prompt(alternating, variables)

    def _render_prompt(self, turns: Sequence[Turn], variables: Mapping[str, Any]) -> str:
        if not self.cuts_prompt_from_conversation:
            return self.render(turns, variables)
        whole = self.render([*turns, ANSWER_TURN], variables, add_generation_prompt=False)
        place = whole.rfind(ANSWER_TURN.text)
        if place < 0:
            raise TemplateFailed("the beginning of an answer cannot be told from what it writes.")
        return whole[:place].rstrip(" ")

    def render(
        self, turns: Sequence[Turn], variables: Mapping[str, Any] | None = None, add_generation_prompt: bool = True
    ) -> str:
        """Render a conversation exactly as the template writes it. Raises TemplateFailed."""
        messages = [
            {
                "role": turn.role,
                "content": [{"type": "text", "text": turn.text}] if turn.role in self.roles_with_parts else turn.text,
            }
            for turn in turns
        ]
        try:
            with WATCHDOG.limit(RENDER_SECONDS):
                written = self.tokenizer.apply_chat_template(
                    messages, chat_template=self.source, tokenize=False, add_generation_prompt=add_generation_prompt,
                    **self.extra_arguments, **(variables or {}),
                )  # fmt: skip
        except Exception as error:  # noqa: BLE001 - whatever foreign code raises is its failure
            raise TemplateFailed(_explain(error)) from None
        if not isinstance(written, str):
            raise TemplateFailed("it does not write text.")
        if len(written) > MAX_ADDED_CHARACTERS + 4 * sum(len(turn.text) for turn in turns):
            raise TemplateFailed(f"it writes {len(written):,} characters.")
        return written

    def encode(self, text: str) -> list[int]:
        """Tokenize a rendered text. Special tokens within user and system turns are read as plain text."""
        plain = unmark_control_tokens(text)
        if plain != text:
            with suppress(ValueError):  # a token that the tokenizer also produces from plain text
                return list(encode_marked_chat(self.tokenizer, text))
        return list(self.tokenizer(plain, add_special_tokens=False)["input_ids"])

    def _mark_control_tokens(self, turn: Turn) -> Turn:
        """Mark control tokens in a turn as plain text."""
        control_tokens, text = set(), turn.text
        for place in (match.start() for match in self.control_tokens.first_characters.finditer(text)):
            control_tokens |= {
                each
                for length in self.control_tokens.lengths
                if (each := text[place : place + length]) in self.control_tokens.tokens
            }
        if not control_tokens:
            return turn
        pattern = re.compile("|".join(re.escape(each) for each in sorted(control_tokens, key=len, reverse=True)))
        return turn.model_copy(update={"text": mark_control_tokens(text, pattern)})

    def continue_answer(self, prompt: str, opening: str) -> str:
        """Return a prompt with the beginning of the answer, which the model continues."""
        return prompt + self._separator(prompt, opening) + opening_after(prompt, opening)

    def format_answer(self, prompt: str, answer: str, ended: bool) -> str:
        """Format an answer that the model did not sample itself as the template writes it after a prompt.

        A thinking model so learns to answer without thinking, not that the answer is its thinking.
        """
        header = self.answer_prefix.strip() and prompt.endswith(self.prompt_end)
        if (
            header
            and THINK_START not in answer
            and THINK_END not in answer
            and (ended or THINK_END not in self.answer_prefix)
        ):
            return self.answer_prefix + answer
        return self._separator(prompt, answer) + (close_thinking(prompt, answer) if ended else answer)

    def _separator(self, prompt: str, answer: str) -> str:
        spaced = self.answer_prefix == " " and prompt.endswith(self.prompt_end)
        return " " if spaced and answer and not answer[0].isspace() else ""

    def find_end_token(self, end_tokens: Collection[int]) -> int | None:
        """Return the first token after an assistant's turn that ends an answer, if the template writes one."""
        for text in self.turn_endings:
            for token in self.tokenizer(text, add_special_tokens=False)["input_ids"]:
                if token in end_tokens:
                    return int(token)
        return None

    def _variables(self, template_kwargs: TemplateKwargs) -> dict[str, Any]:
        """Return the template's variables, with `enable_thinking` under the template's own name for it."""
        variables = dict(template_kwargs_from(template_kwargs))
        if self.thinking_switch not in (None, "enable_thinking") and "enable_thinking" in variables:
            variables.setdefault(str(self.thinking_switch), variables.pop("enable_thinking"))
        return variables


def fix_date(source: str) -> str:
    """Give a template a fixed date: a macro `strftime_now` that knows the formats it uses."""
    formats = {match[2] for match in re.finditer(r"""strftime_now\s*\(\s*(['"])(.*?)\1""", source)}
    if "strftime_now" not in source:
        return source
    days = [
        f"{{% if format == {json.dumps(each)} %}}{FIXED_DAY.strftime(each)}{{% endif %}}" for each in sorted(formats)
    ]
    return f"{{% macro strftime_now(format) %}}{''.join(days)}{{% endmacro %}}\n{source}"


def unmark_control_tokens(text: str) -> str:
    """Remove the marks around special tokens that are plain text."""
    return text.replace(MARK_START, "").replace(MARK_END, "")


def opening_after(prompt: str, opening: str) -> str:
    """Return what follows a prompt so that the answer begins with `opening`; a thinking block is not opened twice."""
    if not is_in_thinking(prompt) or not opening.lstrip().startswith(THINK_START):
        return opening
    rest = opening.lstrip().removeprefix(THINK_START)
    return rest if prompt.endswith(THINK_START) else rest.lstrip()


def is_in_thinking(prompt: str) -> bool:
    """Whether an answer to this prompt begins inside a thinking block."""
    return prompt.rstrip().endswith(THINK_START)


def close_thinking(prompt: str, answer: str) -> str:
    """Return a complete answer as it follows a prompt. A thinking block that the prompt opened and the answer does not
    close is closed first, so that a written answer is not learned as thinking."""
    if not is_in_thinking(prompt) or THINK_END in answer:
        return answer
    return ("\n" if prompt.endswith("\n") else "") + f"{THINK_END}\n\n" + answer


def arrange_turns(
    turns: Sequence[Turn], merge_system: bool, merge_later_system: bool, merge_same_role: bool
) -> list[Turn]:
    """Rearrange a conversation so that a template can take it: later system turns are merged into the next user turn or
    the first system turn, and consecutive turns of one role are merged."""
    arranged: list[Turn] = []
    pending_system: list[str] = []
    has_begun = False
    for turn in turns:
        if turn.role != "system":
            has_begun = True
        elif merge_system or (merge_later_system and has_begun):
            pending_system.append(turn.text)
            continue
        elif merge_later_system and arranged:
            arranged[-1] = _append_text(arranged[-1], turn.text)
            continue
        if turn.role == "user" and pending_system:
            turn = turn.model_copy(update={"text": "\n\n".join([*pending_system, turn.text])})
            pending_system = []
        elif turn.role == "assistant" and pending_system:
            arranged.append(Turn(role="user", text="\n\n".join(pending_system)))
            pending_system = []
        if merge_same_role and arranged and arranged[-1].role == turn.role:
            arranged[-1] = _append_text(arranged[-1], turn.text)
        else:
            arranged.append(turn)
    if pending_system:
        last = "\n\n".join(pending_system)
        if arranged and arranged[-1].role == "user":
            arranged[-1] = _append_text(arranged[-1], last)
        else:
            arranged.append(Turn(role="user", text=last))
    return arranged


def _append_text(turn: Turn, text: str) -> Turn:
    return turn.model_copy(update={"text": f"{turn.text}\n\n{text}"})


TIMEOUT_MESSAGE = f"it does not come to an end within {RENDER_SECONDS:.0f} seconds."


def _explain(error: Exception) -> str:
    """Explain what a template raised in a sentence."""
    text = shorten(str(error).strip(), 300).rstrip(".")
    match error:
        case RenderTimeout():
            return TIMEOUT_MESSAGE
        case TemplateSyntaxError():
            return f"line {error.lineno} cannot be read: {shorten(error.message or '', 300).rstrip('.')}."
        case TemplateError() if type(error) is TemplateError:
            return f"it says “{text}”." if text else "it refuses it without a reason."
        case RecursionError():
            return "it calls itself without an end."
        case MemoryError():
            return "it needs more memory than there is."
        case _:
            return (
                f"it fails with “{text}” ({type(error).__name__})." if text else f"it fails ({type(error).__name__})."
            )
