"""Where prompts come from: a source by name, a total, and the prompt at a position in a seeded order."""

from __future__ import annotations

from ..demo.prompts import load_prompts
from ..params import Dataset
from .tree import prompt_order


class Prompts:
    """The prompts of one dataset in the order that a seed gives them."""

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self._prompts = load_prompts("steer")
        self._seed = seed
        self.source = dataset.source

    @property
    def total(self) -> int:
        return len(self._prompts)

    def at(self, position: int) -> str:
        """The prompt at a position; after the last one a new round begins in another order."""
        return self._prompts[prompt_order(self._seed, self.total, position)]
