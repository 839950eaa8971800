"""The studio: store, hub and engines handed to the features that need them. No HTTP here."""

from __future__ import annotations

import asyncio
from pathlib import Path

from ..blobs import Blobs
from ..store.store import Store
from ..workers.worker import Spawn
from .hub import Hub
from .jobs import Jobs
from .models import Models
from .steering import Steering


class Studio:
    """Everything that outlives a request."""

    def __init__(self, store: Store, spawn: Spawn, models_folder: Path, weights: Blobs) -> None:
        self.store = store
        self.hub = Hub()
        self.jobs = Jobs(store, self.hub)
        self.models = Models(self.jobs, spawn, models_folder)
        self.steering = Steering(store, self.hub, self.models, weights)

    async def open(self) -> None:
        await self.jobs.open()
        await self.steering.open()

    async def close(self) -> None:
        """Let readers go, then stop work, engines and store, in this order."""
        self.hub.close()
        await self.steering.close()
        await self.jobs.close()
        await self.models.close()
        await asyncio.to_thread(self.store.close)
