"""Which models there are, which are loaded, and what memory they may use."""

from .catalog import DEMO, FOLDER_NAME_PATTERN, UNREADABLE_CONFIG, Catalog, ModelEntry
from .devices import free_memory, make_foresight_check
from .models import Models
from .template_options import template_error, template_error_from_files, thinking_kwargs

__all__ = [
    "DEMO", "FOLDER_NAME_PATTERN", "UNREADABLE_CONFIG", "Catalog", "ModelEntry", "Models", "free_memory",
    "make_foresight_check", "template_error", "template_error_from_files", "thinking_kwargs",
]  # fmt: skip
