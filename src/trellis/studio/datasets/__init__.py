"""Where prompts come from."""

from .datasets import PROMPT_FILE_SUFFIXES, SUFFIX_HELP, TABLE_SUFFIXES, Datasets, Prompts

__all__ = [
    "PROMPT_FILE_SUFFIXES", "SUFFIX_HELP", "TABLE_SUFFIXES", "Datasets", "Prompts",
]  # fmt: skip
