"""A session: the tree of choices, the offer on the screen, and the work that each choice needs."""

from .choice_logs import ChoiceLogs, move_refusals_last, without_tokens
from .choices import with_equal_options
from .last_pick import last_pick_report
from .offer import answer_preview, parse_options
from .presets import all_presets, get_preset
from .session import Session
from .sessions import Sessions
from .tree import Node, Retraining, RetrainingKind, Tree, drift_of, node_row, step_name

__all__ = [
    "ChoiceLogs", "Node", "Retraining", "RetrainingKind", "Session", "Sessions", "Tree", "all_presets",
    "answer_preview", "drift_of", "get_preset", "last_pick_report", "move_refusals_last", "node_row", "parse_options",
    "step_name", "with_equal_options", "without_tokens",
]  # fmt: skip
