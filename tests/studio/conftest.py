from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.conftest import open_studio
from trellis.studio.studio import Studio
from trellis.workers.worker import Spawn


@pytest.fixture
async def studio(tmp_path: Path, fake_spawn: Spawn) -> AsyncIterator[Studio]:
    async with open_studio(tmp_path, fake_spawn) as studio:
        yield studio
