"""The studio: store, hub and engines handed to the features that need them. No HTTP here."""

from __future__ import annotations

import asyncio

from ..blobs import Blobs
from ..settings import Settings
from ..store.store import Store
from ..workers.reader import Reader
from ..workers.worker import Spawn
from .chat import ApiKeys, Attachments, ChatTargets, LocalServers, Providers, Rooms
from .datasets import Datasets
from .hub import Hub
from .jobs import Jobs
from .models import Catalog, Models, make_foresight_check
from .review import BlindTests, Comparisons, Exports, RetrainingJobs
from .steering import ChoiceLogs, Sessions
from .uploads import Uploads

READER_START_SECONDS = 30.0
"""Seconds that a reader process may take to start on a busy computer."""


class Studio:
    """Everything that outlives a request."""

    def __init__(self, store: Store, spawn: Spawn, settings: Settings) -> None:
        downloads_folder = settings.save_dir / "hub"
        weights = Blobs(settings.weights_dir)
        self.store = store
        self.hub = Hub()
        self.jobs = Jobs(store, self.hub)
        catalog = Catalog(settings.models_folders, downloads_folder)
        self.models = Models(self.jobs, spawn, catalog, settings.engine_memory_bytes, settings.idle_minutes * 60)
        reader = Reader(downloads_folder, READER_START_SECONDS + settings.hub_timeout)
        self.datasets = Datasets(reader, settings.prompts_folders, Blobs(settings.save_dir / "prepared"))
        logs = ChoiceLogs(settings.save_dir / "choices")
        self.steering = Sessions(
            store, self.hub, self.models, self.datasets, weights, logs, make_foresight_check(settings.foresight)
        )
        self.retraining = RetrainingJobs(self.jobs, self.steering, logs, self.datasets)
        self.blind_tests = BlindTests(store, self.steering)
        self.comparisons = Comparisons(self.jobs, self.steering)
        self.exports = Exports(self.jobs, self.steering, catalog, spawn, weights, settings.save_dir / "exports")
        self.api_keys = ApiKeys(store)
        self.providers = Providers(
            store, settings.allowed_private_servers, LocalServers(settings.save_dir / "local-servers.json")
        )
        self.chat_targets = ChatTargets(self.models, self.steering, self.providers)
        self.attachments = Attachments(store, Blobs(settings.save_dir / "files"))
        self.rooms = Rooms(store, self.hub, self.chat_targets, self.attachments)
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
        await self.providers.close()
        await self.blind_tests.close()
        await self.steering.close()
        await self.jobs.close()
        await self.models.close()
        await asyncio.to_thread(self.store.close)
