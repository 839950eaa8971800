"""Every option of a session, declared once. The form, the flags, the JSON schema and the validation follow from it."""

from .datasets import Dataset
from .flags import config_from_flags, flag_rows, option_rows
from .model import Adapter, Device, EngineName, ModelOptions, Precision
from .sampling import OPENING_TOKEN_BUDGET, Sampling
from .schema import Options, StorableText, TypedNumbers
from .steering import THINKING_SWITCHES, Learning, MethodName, SessionConfig, default_learning_rate
from .validation import invalid_from, invalid_from_details, invalid_from_entries

__all__ = [
    "OPENING_TOKEN_BUDGET", "THINKING_SWITCHES", "Adapter", "Dataset", "Device", "EngineName", "Learning",
    "MethodName", "ModelOptions", "Options", "Precision", "Sampling", "SessionConfig", "StorableText", "TypedNumbers",
    "config_from_flags", "default_learning_rate", "flag_rows", "invalid_from", "invalid_from_details",
    "invalid_from_entries", "option_rows",
]  # fmt: skip
