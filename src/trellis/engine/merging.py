"""Merge an adapter into its base model: loaded fresh, in the precision of its files, written, read again, compared.

It is the work of an engine of its own, which holds nothing else. It does not know sessions.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from ..blobs import fsync
from ..errors import Invalid, LoadFailed
from ..messages import Load, Merge, Merged, Progress
from ..model_files import weight_files
from ..tensors import UNREADABLE, header_of
from .loaded import LoadedModel, fingerprints, read_model
from .reading import Group, answer_logprobs

PROBE_CONTEXT = 4096
PROBE_TOKENS = 32
"""Tokens of each answer on which the merged model is compared with base and adapter."""

COPIED = ("tokenizer", "special_tokens_map", "added_tokens", "vocab", "merges", "chat_template", "LICENSE")


def merge(request: Merge, adapter: Path) -> Generator[Progress | None, None, Merged]:
    """Write a merged model into the folder `request.into`, which must not be there yet, and prove it.

    Raises LoadFailed, with the codes of a load, or `not_proved` when the written model answers otherwise.
    """
    started = time.monotonic()
    base, into = Path(request.path), Path(request.into)
    dtype = stored_dtype(base)
    _require_same_base(request)
    plain = Load(path=request.path, precision="32-bit", device="cpu", remote_code=request.remote_code)
    loaded = yield from _scaled(read_model(base, plain, dtype), 0.0, 0.4)
    model = loaded.model
    yield Progress(stage="merging", fraction=0.4, message="Putting the adapter beside the base")
    both = PeftModel.from_pretrained(model, adapter).eval()
    probes = yield from _answers(both, loaded, request)
    before = []
    for number, probe in enumerate(probes):
        before.append(_logprobs(both, probe))
        yield _checking(0.45, 0.55, number, len(probes), "Asking base and adapter")
    yield Progress(stage="merging", fraction=0.55, message="Merging the adapter into the weights")
    merged = both.merge_and_unload()
    yield Progress(stage="writing", fraction=0.65, message="Writing the merged model")
    into.mkdir()
    merged.save_pretrained(into, max_shard_size="2GB")
    _copy_the_rest(base, into)
    del both, merged, model, loaded
    yield Progress(stage="checking", fraction=0.8, message="Reading the merged model again")
    again = AutoModelForCausalLM.from_pretrained(
        into, dtype=dtype, local_files_only=True, trust_remote_code=request.remote_code
    ).eval()
    gaps: list[Tensor] = []
    agreed = 0.0
    for number, (probe, expected) in enumerate(zip(probes, before, strict=True)):
        found = _logprobs(again, probe)
        gaps.append((found[0] - expected[0]).abs().flatten())
        agreed += float((found[1] == expected[1]).float().mean())
        yield _checking(0.8, 0.98, number, len(probes), "Comparing answers")
    gap = torch.cat(gaps)
    for file in into.rglob("*"):
        if file.is_file():
            fsync(file)
    result = Merged(
        files={str(file.relative_to(into)): file.stat().st_size for file in sorted(into.rglob("*")) if file.is_file()},
        dtype=str(dtype).removeprefix("torch."),
        tokens=gap.numel(),
        largest_difference=float(gap.max()),
        mean_difference=float(gap.mean()),
        agreement=agreed / len(probes),
        seconds=time.monotonic() - started,
    )
    if not result.mean_difference <= tolerance(dtype):
        raise LoadFailed(
            f"The merged model answers otherwise than base and adapter: {result.mean_difference:.4f} nats a token on "
            f"average, where {tolerance(dtype)} is the most that rounding to {result.dtype} explains.",
            code="not_proved",
            next_step="Nothing was kept. Export the adapter instead.",
        )
    return result


def _require_same_base(request: Merge) -> None:
    """Raises LoadFailed when the folder does not hold the base that the adapter was grown on."""
    for fingerprint in fingerprints(Path(request.path)):
        if request.plant.makes(fingerprint) == request.root:
            return
    raise LoadFailed(
        "The files of the base model are not the ones this session was grown on.",
        code="model_changed",
        next_step="Put the original model back, or export the adapter.",
    )


def tolerance(dtype: torch.dtype) -> float:
    """The mean difference in nats that rounding explains: the merged weights are rounded once to their precision."""
    return 1e-3 if dtype == torch.float32 else 5e-2


def stored_dtype(base: Path) -> torch.dtype:
    """The precision that most of a model's values are stored in; 16 bits for those that are unpacked from fewer."""
    kinds: dict[str, int] = {}
    try:
        for file in weight_files(base):
            for about in header_of(file).values():
                start, end = about["data_offsets"]
                kinds[about["dtype"]] = kinds.get(about["dtype"], 0) + end - start
    except UNREADABLE:
        return torch.float32  # loading it says what is wrong with it
    most = max(kinds, key=lambda kind: kinds[kind], default="F32")
    unpacked = dict.fromkeys(("F8_E4M3", "F8_E5M2", "U8", "I8"), torch.bfloat16)
    plain = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    return (plain | unpacked).get(most, torch.float32)


def _scaled(
    steps: Generator[Progress | None, None, LoadedModel], start: float, end: float
) -> Generator[Progress | None, None, LoadedModel]:
    """A load as the first part of longer work."""
    while True:
        try:
            step = next(steps)
        except StopIteration as stop:
            loaded: LoadedModel = stop.value
            return loaded
        yield step and step.model_copy(update={"fraction": start + (end - start) * step.fraction})


def _answers(both: Any, loaded: LoadedModel, request: Merge) -> Generator[None, None, list[Group]]:
    """For each probe the likeliest answer of base and adapter: what the two models are compared on."""
    probes = []
    for probe in request.probes:
        try:
            prompt = loaded.prompt_tokens(probe, PROBE_TOKENS, PROBE_CONTEXT)
        except Invalid:
            continue  # one that is too long proves no more than the others
        with torch.inference_mode():
            written = both.generate(
                input_ids=torch.tensor([prompt]), attention_mask=torch.ones((1, len(prompt)), dtype=torch.long),
                max_new_tokens=PROBE_TOKENS, do_sample=False, pad_token_id=loaded.end_token or 0,
            )  # fmt: skip
        probes.append(Group(prompt, [written[0, len(prompt) :].tolist()], "none", 1.0))
        yield None
    return probes


def _logprobs(model: Any, probe: Group) -> tuple[Tensor, Tensor]:
    """Log-probabilities (1, T) of the answer, and the likeliest tokens (1, T) in its places."""
    with torch.inference_mode():
        ids = torch.tensor([probe.prompt + probe.answers[0]])
        likeliest = model(input_ids=ids[:, :-1], use_cache=False).logits[:, -len(probe.answers[0]) :].argmax(-1)
        return answer_logprobs(model, probe), likeliest


def _checking(start: float, end: float, done: int, total: int, message: str) -> Progress:
    fraction = start + (end - start) * (done + 1) / total
    return Progress(stage="checking", fraction=fraction, message=f"{message}: {done + 1} of {total}")


def _copy_the_rest(base: Path, into: Path) -> None:
    """The tokenizer's files and the licence, as they are. What the model wrote itself stays."""
    for file in base.iterdir():
        if file.is_file() and file.name.startswith(COPIED) and not (into / file.name).exists():
            shutil.copyfile(file, into / file.name)
