"""Look back on a session and take its result away: journal, comparison, blind test, exports, retraining."""

from .blind_test import DEFAULT_ROUNDS, MAX_ROUNDS, BlindTests
from .comparison import Comparisons
from .exports import Exports
from .journal import CHOICE_FORMATS, describe_choice, export_choices, journal_markdown
from .narrative import write_narrative
from .retraining import MAX_EPOCHS, RetrainingJobs
from .win_rate import distinct_names, win_rate_sentence
from .zip_stream import stream_zip

__all__ = [
    "CHOICE_FORMATS", "DEFAULT_ROUNDS", "MAX_EPOCHS", "MAX_ROUNDS", "BlindTests", "Comparisons", "Exports",
    "RetrainingJobs", "describe_choice", "distinct_names", "export_choices", "journal_markdown", "stream_zip",
    "win_rate_sentence", "write_narrative",
]  # fmt: skip
