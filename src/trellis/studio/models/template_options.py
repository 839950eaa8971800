"""The options of a session that concern the chat template, and whether the template supports them.

Only an engine runs templates; here they are at most read as text.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path

from ...errors import Invalid, shorten
from ...messages import Loaded, TemplateKwargs
from ...options import THINKING_SWITCHES, SessionConfig

MAX_FILE_BYTES = 4_000_000
"""The largest file that is read; templates have some tens of thousands of bytes."""


def thinking_kwargs(config: SessionConfig) -> TemplateKwargs:
    """Return the template variables that the options set."""
    return {} if config.enable_thinking == "auto" else {"enable_thinking": config.enable_thinking == "on"}


def template_error(config: SessionConfig, loaded: Loaded) -> Invalid | None:
    """Return which option the template of a loaded model does not support."""
    if not config.chat_template:
        return None
    if problem := broken_template_error(config.model, loaded):
        return problem
    return (
        no_thinking_switch_error(config)
        if config.enable_thinking != "auto" and not loaded.can_switch_thinking
        else None
    )


def broken_template_error(model: str, loaded: Loaded) -> Invalid | None:
    """Return why the template of a loaded model cannot be used; None where it can."""
    if not loaded.template_problem:
        return None
    return Invalid(
        f"The chat template of the model “{shorten(model)}” cannot be used: {loaded.template_problem}",
        code="bad_template",
        field="config.chat_template",
        next_step="Start a new session with the option “Chat template” off, or put a template that works into the "
        "model's folder as chat_template.jinja and load the model again.",
    )


def template_error_from_files(config: SessionConfig, folder: Path) -> Invalid | None:
    """Do the check of `template_error` on the files of a model that is not loaded."""
    is_switch_needed = config.chat_template and config.enable_thinking != "auto"
    return no_thinking_switch_error(config) if is_switch_needed and not may_have_thinking_switch(folder) else None


def no_thinking_switch_error(config: SessionConfig) -> Invalid:
    return Invalid(
        f"Thinking is “{config.enable_thinking}”, and the chat template of the model “{shorten(config.model)}” has no "
        "switch for it.",
        code="no_thinking_switch",
        field="config.enable_thinking",
        next_step="Set “Thinking” to “auto”, or choose a model that can be told whether to think.",
    )


def may_have_thinking_switch(folder: Path) -> bool:
    """Return whether a template may have a thinking switch; True where the files do not tell."""
    templates = read_chat_templates(folder)
    switch_pattern = rf"\b({'|'.join(THINKING_SWITCHES)})\b"
    return not (folder / "config.json").is_file() or any(re.search(switch_pattern, each) for each in templates)


def read_chat_templates(folder: Path) -> list[str]:
    """Return the chat templates in a folder, as text."""
    found = []
    for file in (folder / "chat_template.jinja", *sorted((folder / "additional_chat_templates").glob("*.jinja"))):
        found.append(_read_text(file))
    for name in ("tokenizer_config.json", "chat_template.json"):
        with suppress(ValueError, AttributeError):
            found.append(json.dumps(json.loads(_read_text(folder / name)).get("chat_template")))
    return found


def _read_text(file: Path) -> str:
    with suppress(OSError, UnicodeDecodeError):
        if file.is_file() and file.stat().st_size < MAX_FILE_BYTES:
            return file.read_text(encoding="utf-8")
    return ""
