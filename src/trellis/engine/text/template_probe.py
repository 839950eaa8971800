"""Choose the chat template of a tokenizer at load time, and find out by trial renderings what is peculiar to it.

It does not know weights or sessions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from jinja2 import Environment, TemplateSyntaxError

from ...errors import shorten
from ...messages import Turn
from ...options import THINKING_SWITCHES
from .chat_templates import (
    ANSWER_TURN,
    TIMEOUT_MESSAGE,
    ChatTemplate,
    ControlTokens,
    Role,
    TemplateFailed,
    arrange_turns,
    is_in_thinking,
)

SYSTEM_ROLE, USER_ROLE, ASSISTANT_ROLE = (
    frozenset[Role](["system"]),
    frozenset[Role](["user"]),
    frozenset[Role](["assistant"]),
)


DEFAULT_NAMES = ("chat", "chat_template", "chatml", "instruct")
"""Names of templates used if none is called “default”, in this order."""


SPECIAL_NAME_PREFIXES = ("tool", "rag", "function", "json", "grounded", "fim")
"""Name prefixes of templates that are not for plain conversations."""


EXTRA_ARGUMENTS: tuple[dict[str, list[Any]], ...] = (
    {},
    {"tools": []},
    {"documents": []},
    {"tools": [], "documents": []},
)
"""Arguments for templates that iterate over tools or documents without checking whether there are any."""


SERIALIZED_MESSAGE = re.compile(r"""\{\s*('role'|'type'|'content'|"type":\s*"text")""")
"""Matches the output of a template that serialized a message or its parts instead of their text."""


QUESTION_TURN = Turn(role="user", text="Kestrel 7: does <b>tea & bread</b> keep, Zoë?")


SECOND_QUESTION_TURN = Turn(role="user", text="Harbor 9: and <u>jam & honey</u>, Zoë?")


SYSTEM_TURN = Turn(role="system", text="Orchard 2: answer <em>briefly & kindly</em>, Zoë.")


LATER_SYSTEM_TURN = Turn(role="system", text="Meadow 5: answer <q>slowly & gladly</q>, Zoë.")
"""Turns for probing. Escaped or shortened text is not found in the output."""


def choose_template(template: Any) -> str | None:
    """Return a tokenizer's template for plain conversations, None if it has none.

    Raises TemplateFailed if there are several and none is the obvious one.
    """
    if not template:
        return None
    if isinstance(template, str):
        return template
    if not isinstance(template, Mapping) or not all(isinstance(each, str) for each in template.values()):
        raise TemplateFailed("it is neither text nor a list of templates with names.")
    for name in ("default", *DEFAULT_NAMES):
        if template.get(name):
            return str(template[name])
    plain = [name for name in template if not str(name).lower().startswith(SPECIAL_NAME_PREFIXES)]
    if len(plain) == 1:
        return str(template[plain[0]])
    names = ", ".join(f"“{shorten(name)}”" for name in template)
    raise TemplateFailed(f"there are several, named {names}, and none of them is called “default”.")


def probe_template(tokenizer: Any, source: str) -> ChatTemplate:
    """Try a template with one and several turns, with and without a system prompt, and detect how to use it.

    Raises TemplateFailed if a user's message is not in the output.
    """
    _reject_power_operator(source)
    template = _probe_one_turn(tokenizer, source)
    template = _probe_several_turns(template)
    template = _probe_system(template)
    template = _probe_role_orders(template)
    template = _probe_answers(template)
    return replace(
        template,
        thinking_switch=_find_thinking_switch(template),
        opens_thinking=is_in_thinking(template.render([QUESTION_TURN])),
    )


def _reject_power_operator(source: str) -> None:
    """Raise TemplateFailed for a template that uses the power operator: a single step may take hours and cannot be
    stopped, and a conversation needs none."""
    with suppress(TemplateSyntaxError):  # rendering reports it better
        tokens = Environment(autoescape=True).lex(source)  # nothing is rendered
        if any(kind == "operator" and value == "**" for _, kind, value in tokens):
            raise TemplateFailed("it raises numbers to powers, which may never end.")


def _probe_one_turn(tokenizer: Any, source: str) -> ChatTemplate:
    failure, control = None, ControlTokens.from_tokenizer(tokenizer, source)
    for extras in EXTRA_ARGUMENTS:
        for parts in (frozenset[Role](), USER_ROLE):
            template = ChatTemplate(tokenizer, source, control, extras, parts)
            try:
                if _contains_all(template.render([QUESTION_TURN]), [QUESTION_TURN]):
                    return template
                failure = failure or TemplateFailed("what the user says is not in what it writes, or is changed.")
            except TemplateFailed as error:
                failure = failure or error
                if str(error) == TIMEOUT_MESSAGE:
                    raise
    assert failure is not None
    raise failure


def _probe_several_turns(template: ChatTemplate) -> ChatTemplate:
    turns = [QUESTION_TURN, ANSWER_TURN, SECOND_QUESTION_TURN]
    failure = ""
    for parts in (template.roles_with_parts, template.roles_with_parts | ASSISTANT_ROLE):
        trial = replace(template, roles_with_parts=parts)
        try:
            if _contains_all(trial.render(turns), turns):
                return trial
            failure = failure or "Earlier messages are not in what it writes."
        except TemplateFailed as error:
            failure = failure or f"With several, {error}"
    return replace(template, single_turn_reason=failure)


def _probe_system(template: ChatTemplate) -> ChatTemplate:
    several = [] if template.single_turn_reason else [[SYSTEM_TURN, QUESTION_TURN, ANSWER_TURN, SECOND_QUESTION_TURN]]
    for parts in (template.roles_with_parts, template.roles_with_parts | SYSTEM_ROLE):
        trial = replace(template, roles_with_parts=parts)
        if all(_renders_all(trial, turns) for turns in ([SYSTEM_TURN, QUESTION_TURN], *several)):
            return trial
    return replace(template, merges_system=True)


def _probe_role_orders(template: ChatTemplate) -> ChatTemplate:
    if template.merges_system:
        later = True
    else:
        later = not _renders_all(template, [SYSTEM_TURN, LATER_SYSTEM_TURN, QUESTION_TURN])
        if not template.single_turn_reason:
            later = later or not _renders_all(
                template, [SYSTEM_TURN, QUESTION_TURN, ANSWER_TURN, LATER_SYSTEM_TURN, SECOND_QUESTION_TURN]
            )
    return replace(
        template, merges_later_system=later, merges_same_role=not _renders_all(template, [QUESTION_TURN,
        SECOND_QUESTION_TURN])
    )  # fmt: skip


def _probe_answers(template: ChatTemplate) -> ChatTemplate:
    """Detect how an assistant's turn begins and ends."""
    try:
        asked = template.render([QUESTION_TURN])
        ignores_generation_prompt = template.render([QUESTION_TURN], add_generation_prompt=False) == asked
        whole = template.render([QUESTION_TURN, ANSWER_TURN], add_generation_prompt=False)
    except TemplateFailed:
        return template
    before, found, after = whole.rpartition(ANSWER_TURN.text)
    if not found:
        return template
    ending = [after]
    with suppress(TemplateFailed):
        middle = template.render([QUESTION_TURN, ANSWER_TURN, SECOND_QUESTION_TURN]).partition(ANSWER_TURN.text)[2]
        ending.append(middle.partition(SECOND_QUESTION_TURN.text)[0])
    if not before.startswith(asked):
        return replace(template, turn_endings=tuple(ending))
    between = before.removeprefix(asked)
    cuts_prompt = ignores_generation_prompt and bool(between.strip()) and _ends_at_turn_boundary(template, asked)
    prompt = before.rstrip(" ") if cuts_prompt else asked
    between = before.removeprefix(prompt)
    return replace(
        template, turn_endings=tuple(ending), cuts_prompt_from_conversation=cuts_prompt,
        prompt_end=prompt.rpartition(QUESTION_TURN.text)[2],
        answer_prefix=between if between.strip() or between == " " else "",
    )  # fmt: skip


def _ends_at_turn_boundary(template: ChatTemplate, asked: str) -> bool:
    """Whether a prompt ends where any turn could begin, so that nothing in it starts an answer."""
    try:
        two = template.render([QUESTION_TURN, SECOND_QUESTION_TURN], add_generation_prompt=False)
    except TemplateFailed:
        return False
    return bool(two.partition(QUESTION_TURN.text)[2].startswith(asked.rpartition(QUESTION_TURN.text)[2]))


def _find_thinking_switch(template: ChatTemplate) -> str | None:
    """Return the variable that turns thinking on and off, detected by its effect."""
    for name in THINKING_SWITCHES:
        if not re.search(rf"\b{name}\b", template.source):
            continue
        for turns in ([QUESTION_TURN], [SYSTEM_TURN, QUESTION_TURN]):
            with suppress(TemplateFailed):
                arranged = arrange_turns(turns, template.merges_system, template.merges_later_system, False)
                on, off = (template.render(arranged, {name: value}) for value in (True, False))
                if on != off:
                    return name
    return None


def _renders_all(template: ChatTemplate, turns: Sequence[Turn]) -> bool:
    try:
        return _contains_all(template.render(turns), turns)
    except TemplateFailed:
        return False


def _contains_all(rendered: str, turns: Sequence[Turn]) -> bool:
    """Whether all turns occur in a text, ignoring white space and case, and not serialized as Python or JSON
    messages."""
    plain = _normalize(rendered)
    return SERIALIZED_MESSAGE.search(rendered) is None and all(_normalize(turn.text) in plain for turn in turns)


def _normalize(text: str) -> str:
    return " ".join(text.casefold().split())
