"""The studio: store, hub and engines handed to the features that need them. No HTTP here."""

from __future__ import annotations

import asyncio

from ..blobs import Blobs
from ..settings import Settings
from ..store.store import Store
from ..workers.reader import Reader
from ..workers.worker import Spawn
from .chat.api_keys import Keys
from .chat.attachments import Attachments
from .chat.local_servers import LocalServers
from .chat.providers import Remotes
from .chat.rooms import Rooms
from .chat.targets import Speakers
from .datasets.datasets import Datasets
from .hub import Hub
from .jobs import Jobs
from .models.catalog import Catalog
from .models.devices import may_foresee
from .models.models import Models
from .review.blind_test import Blind
from .review.comparison import Comparisons
from .review.exports import Exports
from .review.retraining import Fits
from .steering.choice_logs import Logs
from .steering.sessions import Steering
from .uploads import Uploads

START_SECONDS = 30.0
"""What a reader of prompts may take to start on a busy computer, before it asks anyone."""


class Studio:
    """Everything that outlives a request."""

    def __init__(self, store: Store, spawn: Spawn, settings: Settings) -> None:
        hub_files = settings.save_dir / "hub"
        weights = Blobs(settings.weights_dir)
        self.store = store
        self.hub = Hub()
        self.jobs = Jobs(store, self.hub)
        catalog = Catalog(settings.models_folders, hub_files)
        self.models = Models(self.jobs, spawn, catalog, settings.engine_memory, settings.idle_minutes * 60)
        reader = Reader(hub_files, START_SECONDS + settings.hub_timeout)
        self.datasets = Datasets(reader, settings.prompts_folders, Blobs(settings.save_dir / "prepared"))
        logs = Logs(settings.save_dir / "choices")
        self.steering = Steering(
            store, self.hub, self.models, self.datasets, weights, logs, may_foresee(settings.foresight)
        )
        self.fits = Fits(self.jobs, self.steering, logs, self.datasets)
        self.blind = Blind(store, self.steering)
        self.comparisons = Comparisons(self.jobs, self.steering)
        self.exports = Exports(self.jobs, self.steering, catalog, spawn, weights, settings.save_dir / "exports")
        self.keys = Keys(store)
        self.remotes = Remotes(store, settings.own_servers, LocalServers(settings.save_dir / "local-servers.json"))
        self.speakers = Speakers(self.models, self.steering, self.remotes)
        self.attachments = Attachments(store, Blobs(settings.save_dir / "files"))
        self.rooms = Rooms(store, self.hub, self.speakers, self.attachments)
        self.uploads = Uploads(
            settings.save_dir / "uploads", settings.prompts_folders[0], settings.models_folders[0],
            int(settings.upload_gb * 1e9),
        )  # fmt: skip

    async def open(self) -> None:
        await self.jobs.open()
        await self.models.open()
        await asyncio.to_thread(self.exports.sweep)
        await self.steering.open()
        await self.rooms.open()

    async def close(self) -> None:
        """Let readers go, then stop work, engines and store, in this order."""
        self.hub.close()
        await self.rooms.close()
        await self.remotes.close()
        await self.blind.close()
        await self.steering.close()
        await self.jobs.close()
        await self.models.close()
        await asyncio.to_thread(self.store.close)
