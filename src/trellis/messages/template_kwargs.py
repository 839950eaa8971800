"""Variables for chat templates, as a request may contain them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, StrictBool, StrictFloat, StrictInt

from ..errors import Invalid, shorten

TemplateKwargs = dict[Annotated[str, Field(max_length=100)], StrictBool | StrictInt | StrictFloat | str]
"""Variables that a chat template reads in addition to the messages: plain values by name."""


MAX_TEMPLATE_KWARGS = 32


RESERVED_TEMPLATE_KWARGS = frozenset({
    "self", "conversation", "conversations", "messages", "tools", "documents", "chat_template", "compiled_template",
    "add_generation_prompt", "continue_final_message", "tokenize", "sanitize_control_tokens", "padding", "truncation",
    "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs", "kwargs",
    "raise_exception", "strftime_now", "namespace", "dict", "range", "loop", "caller", "cycler", "joiner", "lipsum",
    "true", "false", "none", "True", "False", "None",
})  # fmt: skip
"""Names that template variables may not have: arguments of `apply_chat_template`, or part of Jinja. Names of special
tokens, which end in `_token` or `_tokens`, are rejected as well."""


def template_kwargs_from(values: Mapping[str, Any]) -> TemplateKwargs:
    """Return validated variables for a chat template. Raises Invalid for a bad name or value."""
    if len(values) > MAX_TEMPLATE_KWARGS:
        raise _invalid_template_kwargs(f"has {len(values)} variables; {MAX_TEMPLATE_KWARGS} are allowed.")
    for name, value in values.items():
        if name in RESERVED_TEMPLATE_KWARGS or name.endswith(("_token", "_tokens")):
            raise _invalid_template_kwargs(f"“{shorten(name)}” is set by the studio and cannot be set from outside.")
        if not name.isidentifier() or name.startswith("_") or len(name) > 100:
            raise _invalid_template_kwargs(f"“{shorten(name)}” is not the name of a variable.")
        if not isinstance(value, bool | int | float | str):
            raise _invalid_template_kwargs(f"“{name}” must be text, a number, true or false, got “{shorten(value)}”.")
    return dict(values)


def _invalid_template_kwargs(message: str) -> Invalid:
    return Invalid(
        f"chat_template_kwargs: {message}",
        field="chat_template_kwargs",
        next_step="Send only variables that the model's chat template reads, such as enable_thinking.",
    )
