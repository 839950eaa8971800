"""The exported log of choices is read, and learned from, by TRL's own trainers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import open_studio
from tests.studio.steering.test_sessions import choose
from trellis.messages import Ranking, Written
from trellis.studio.review.journal import choices
from trellis.workers.worker import Spawn

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # what other libraries have to say of each other
]

ALL = [1, (0, 2), "none", Ranking(ranking=(3, 1)), Written(written="My own words."), 0, 3]


@pytest.fixture
async def exported(tmp_path: Path, fake_spawn: Spawn) -> dict[str, Path]:
    """The log of a session with every kind of choice, as a file in each of TRL's layouts."""
    files = {}
    async with open_studio(tmp_path, fake_spawn) as studio:
        session = await studio.steering.create("Test", {"system_prompt": "Be kind.", "max_new_tokens": 12})
        for choice in ALL:
            await choose(session, choice)
        for layout in ("trl-preference", "trl-unpaired"):
            files[layout] = tmp_path / f"{layout}.jsonl"
            files[layout].write_text("".join(await choices(studio.store, session, layout)), encoding="utf-8")
    return files


def train(kind: str, file: Path, model: Path, into: Path) -> tuple[int, list[float]]:
    """Run some steps of a trainer of TRL. Returns how many rows it took, and the losses."""
    import trl
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows: Any = load_dataset("json", data_files=str(file), split="train", cache_dir=str(into / "cache"))
    options: dict[str, Any] = {
        "output_dir": str(into), "max_steps": 3, "per_device_train_batch_size": 4, "logging_steps": 1,
        "report_to": "none", "use_cpu": True, "save_strategy": "no", "learning_rate": 1e-3, "disable_tqdm": True,
        "bf16": False, "gradient_checkpointing": False,
    }  # fmt: skip
    trainer = getattr(trl, f"{kind}Trainer")(
        model=AutoModelForCausalLM.from_pretrained(model),
        args=getattr(trl, f"{kind}Config")(**options),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    trainer.train()
    return len(rows), [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize(("kind", "layout"), [("DPO", "trl-preference"), ("KTO", "trl-unpaired")])
async def test_a_trainer_of_trl_learns_from_the_log(
    exported: dict[str, Path], tiny_llama: Path, tmp_path: Path, kind: str, layout: str
) -> None:
    file = exported[layout]
    rows, losses = train(kind, file, tiny_llama, tmp_path / "out")
    assert rows == len(file.read_text().splitlines()) >= 16
    assert len(losses) == 3
    assert all(math.isfinite(loss) and loss > 0 for loss in losses)
    first = json.loads(file.read_text().splitlines()[0])
    assert first["prompt"][0] == {"role": "system", "content": "Be kind."}
