"""The wire between the web process and an engine. Every request names all it needs: an engine only caches."""

from .chat import Answered, Chat, Drawn, Heard, Spoke, Turn
from .frames import (
    HEADER,
    MAX_FRAME,
    Cancel,
    Cancelled,
    Down,
    Event,
    Failed,
    Progress,
    Queued,
    Request,
    Stage,
    Up,
    Urge,
    frame,
    frame_length,
)
from .message import Message, derived_seed, later, recipe_id, recipe_of
from .models import Load, Loaded, Merge, Merged, Status, StatusReport
from .steering import (
    CHOICE,
    LOG_FILE,
    Assess,
    Assessed,
    Choice,
    Delta,
    Fit,
    Learn,
    Learned,
    Lesson,
    Metrics,
    Offer,
    Offered,
    Option,
    Plant,
    Planted,
    Prompt,
    Ranking,
    Written,
)
from .template_kwargs import MOST_TEMPLATE_KWARGS, RESERVED_TEMPLATE_KWARGS, TemplateKwargs, template_kwargs_from

__all__ = [
    "CHOICE", "HEADER", "LOG_FILE", "MAX_FRAME", "MOST_TEMPLATE_KWARGS", "RESERVED_TEMPLATE_KWARGS", "Answered",
    "Assess", "Assessed", "Cancel", "Cancelled", "Chat", "Choice", "Delta", "Down", "Drawn", "Event", "Failed", "Fit",
    "Heard", "Learn", "Learned", "Lesson", "Load", "Loaded", "Merge", "Merged", "Message", "Metrics", "Offer",
    "Offered", "Option", "Plant", "Planted", "Progress", "Prompt", "Queued", "Ranking", "Request", "Spoke", "Stage",
    "Status", "StatusReport", "TemplateKwargs", "Turn", "Up", "Urge", "Written", "derived_seed", "frame",
    "frame_length", "later", "recipe_id", "recipe_of", "template_kwargs_from",
]  # fmt: skip
