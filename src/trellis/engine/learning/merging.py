"""Merge an adapter into its base model: loaded fresh in the precision of its files, written, reloaded, compared.

It is the work of a separate engine that holds nothing else. It does not know sessions.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from ...blobs import fsync
from ...errors import Invalid, LoadFailed, WeightsMissing
from ...messages import Load, Merge, Merged, Progress
from ...model_files import weight_files
from ...safetensors_files import READ_ERRORS, all_finite, read_header
from ..text.cache_support import ModelCache
from ..text.loaded_model import LoadedModel
from ..text.loading import load_model
from ..text.stored_weights import fingerprints
from .auxiliary_files import copy_auxiliary_files, read_usage, require_same_usage, write_config
from .log_probs import Group, answer_logprobs

MERGE_DTYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "U8", "I8"), torch.bfloat16),
}  # fmt: skip
"""The dtype in which a stored tensor is merged; quantized weights are written in 16 bits."""
PROBE_CONTEXT = 4096
PROBE_TOKENS = 32
"""Tokens of each answer on which the merged model is compared with base and adapter."""


def merge(request: Merge, adapter_folder: Path) -> Generator[Progress | None, None, Merged]:
    """Write a merged model into the new folder `request.into`, and verify it.

    Raises LoadFailed, with the codes of a load, or `not_proved` if the written model answers differently;
    WeightsMissing for a damaged adapter.
    """
    started = time.monotonic()
    base, into = Path(request.path), Path(request.into)
    dtype = stored_dtype(base)
    if not all_finite(adapter_folder / "adapter_model.safetensors"):
        raise WeightsMissing(request.weights)
    _require_same_base(request)
    load = Load(path=request.path, precision="32-bit", device="cpu", remote_code=request.remote_code)
    loaded = yield from _rescale_progress(load_model(base, load, dtype), 0.0, 0.4)
    model = loaded.model
    tied, with_code = model.config.tie_word_embeddings, bool(model.is_remote_code())
    yield Progress(stage="merging", fraction=0.4, message="Loading the adapter")
    adapted = PeftModel.from_pretrained(model, adapter_folder).eval()
    _require_whole_adapter(adapted, adapter_folder)
    changed = {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    probes = yield from _generate_probes(adapted, loaded, request)
    expected_outputs = []
    for number, probe in enumerate(probes):
        expected_outputs.append(_probe_logprobs(adapted, probe))
        yield _checking_progress(0.45, 0.55, number, len(probes), "Running base model + adapter")
    yield Progress(stage="merging", fraction=0.55, message="Merging the adapter")
    _untie_head(adapted)
    merged = adapted.merge_and_unload()
    _restore_precision(merged, base, dtype, changed)
    yield Progress(stage="writing", fraction=0.65, message="Writing the merged model")
    into.mkdir()
    # Written by copying the base model's file.
    generation_config, merged.generation_config = merged.generation_config, GenerationConfig()
    merged.save_pretrained(into, max_shard_size="2GB")
    merged.generation_config = generation_config
    config_changes = {} if merged.config.tie_word_embeddings == tied else {"tie_word_embeddings": not tied}
    write_config(base, into, with_code, config_changes)
    copy_auxiliary_files(base, into, with_code)
    del adapted, merged, model, loaded
    yield Progress(stage="checking", fraction=0.8, message="Loading the merged model to verify it")
    reloaded = AutoModelForCausalLM.from_pretrained(
        into, dtype=dtype, local_files_only=True, trust_remote_code=with_code
    ).eval()
    base_usage = read_usage(base, with_code)
    require_same_usage(base_usage, read_usage(into, with_code))
    differences: list[Tensor] = []
    agreement = 0.0
    for number, (probe, expected) in enumerate(zip(probes, expected_outputs, strict=True)):
        found = _probe_logprobs(reloaded, probe)
        differences.append((found[0] - expected[0]).abs().flatten())
        agreement += float((found[1] == expected[1]).float().mean())
        yield _checking_progress(0.8, 0.98, number, len(probes), "Comparing answers")
    difference = torch.cat(differences)
    for file in into.rglob("*"):
        if file.is_file():
            fsync(file)
    result = Merged(
        files={str(file.relative_to(into)): file.stat().st_size for file in sorted(into.rglob("*")) if file.is_file()},
        dtype=str(dtype).removeprefix("torch."),
        tokens=difference.numel(),
        largest_difference=float(difference.max()),
        mean_difference=float(difference.mean()),
        agreement=agreement / len(probes),
        ends=tuple(sorted(base_usage.end_tokens)),
        conversations=sum(text is not None for text in base_usage.rendered),
        seconds=time.monotonic() - started,
    )
    if not result.mean_difference <= max_mean_difference(dtype):
        raise LoadFailed(
            f"Verification failed: the merged model differs from base model + adapter by {result.mean_difference:.4f} "
            f"nats/token on average; rounding to {result.dtype} explains at most {max_mean_difference(dtype)}.",
            code="not_proved",
            next_step="The merged model was discarded. Export the adapter instead.",
        )
    return result


def _require_same_base(request: Merge) -> None:
    """Raise LoadFailed unless the folder holds the base model that the adapter was trained on."""
    for fingerprint in fingerprints(Path(request.path)):
        if request.plant.weights_id(fingerprint) == request.root:
            return
    raise LoadFailed(
        "The base model's files have changed since this session started.",
        code="model_changed",
        next_step="Restore the original files, or export the adapter.",
    )


def _require_whole_adapter(adapted: PeftModel, adapter: Path) -> None:
    """Raise LoadFailed if a tensor of the adapter has no layer in the model: PEFT skips it with a warning."""
    stored = load_file(adapter / "adapter_model.safetensors")
    held = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    lost = [name for name, values in stored.items() if name not in held or not torch.equal(held[name], values)]
    if lost or len(stored) != len(held):
        raise LoadFailed(
            f"{len(lost) or len(held) - len(stored)} of the adapter's {len(stored)} tensors do not fit the base model"
            + (f" (first: “{lost[0]}”)." if lost else "."),
            code="not_proved",
            next_step="The merged model was discarded. Export the adapter instead.",
        )


def _restore_precision(merged: Any, base: Path, dtype: torch.dtype, changed: set[str]) -> None:
    """Restore unadapted tensors that are stored in another precision than most of the base model, such as fp32 norms
    among 16-bit weights: they were rounded on reading."""
    if getattr(merged.config, "quantization_config", None) is not None:
        return
    tensors_by_name = {**dict(merged.named_parameters()), **dict(merged.named_buffers())}
    for file in weight_files(base):
        exceptions = [
            name for name, about in read_header(file).items() if MERGE_DTYPES.get(about["dtype"], dtype) != dtype
        ]
        with safe_open(file, framework="pt") as tensors:
            for name in exceptions:
                if name in tensors_by_name and name.rpartition(".")[0] not in changed:
                    stored = tensors.get_tensor(name)
                    if stored.shape == tensors_by_name[name].shape:
                        tensors_by_name[name].data = stored


def _untie_head(adapted: PeftModel) -> None:
    """If the adapter changes the output layer, give it a weight of its own: merged into one shared with the embedding,
    the change would apply to both."""
    model: Any = adapted.get_base_model()
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if isinstance(head, BaseTunerLayer) and head.get_base_layer().weight is embedding.weight:
        head.get_base_layer().weight = torch.nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False


def max_mean_difference(dtype: torch.dtype) -> float:
    """The mean difference in nats that rounding explains: merged weights are rounded once to their precision."""
    return 1e-3 if dtype == torch.float32 else 5e-2


def stored_dtype(base: Path) -> torch.dtype:
    """Return the precision that most of a model's values are stored in; 16 bits for quantized ones."""
    kinds: dict[str, int] = {}
    try:
        for file in weight_files(base):
            for about in read_header(file).values():
                start, end = about["data_offsets"]
                kinds[about["dtype"]] = kinds.get(about["dtype"], 0) + end - start
    except READ_ERRORS:
        return torch.float32  # loading reports what is wrong
    commonest = max(kinds, key=lambda kind: kinds[kind], default="F32")
    return MERGE_DTYPES.get(commonest, torch.float32)


def _rescale_progress(
    steps: Generator[Progress | None, None, LoadedModel], start: float, end: float
) -> Generator[Progress | None, None, LoadedModel]:
    """Map the progress of a load to a part of longer work."""
    while True:
        try:
            step = next(steps)
        except StopIteration as stop:
            loaded: LoadedModel = stop.value
            return loaded
        yield step and step.model_copy(update={"fraction": start + (end - start) * step.fraction})


def _generate_probes(adapted: Any, loaded: LoadedModel, request: Merge) -> Generator[None, None, list[Group]]:
    """Generate a greedy answer of base and adapter for each probe prompt: the models are compared on these."""
    prompts = []
    for probe in request.probes:
        with suppress(Invalid):  # a prompt that is too long is no loss: the others suffice
            prompts.append(loaded.tokenize_prompt(probe, PROBE_TOKENS, PROBE_CONTEXT))
    probes = []
    for prompt in prompts or [[loaded.end_token or 0]]:
        cache, answer = ModelCache(loaded.slots.cache_support), list[int]()
        with torch.inference_mode():
            next_tokens = torch.tensor([prompt])
            while len(answer) < PROBE_TOKENS and not (answer and answer[-1] in loaded.end_tokens):
                next_tokens = cache.read(adapted.get_base_model(), next_tokens, last_only=True)[:, -1].argmax(
                    dim=-1, keepdim=True
                )
                answer.append(int(next_tokens))
        probes.append(Group(prompt, [answer], "none", 1.0))
        yield None
    return probes


def _probe_logprobs(model: Any, probe: Group) -> tuple[Tensor, Tensor]:
    """Return log-probabilities (1, T) of the answer, and the likeliest tokens (1, T) at its positions."""
    with torch.inference_mode():
        ids = torch.tensor([probe.prompt + probe.answers[0]])
        likeliest = model(input_ids=ids[:, :-1], use_cache=False).logits[:, -len(probe.answers[0]) :].argmax(-1)
        return answer_logprobs(model, probe), likeliest


def _checking_progress(start: float, end: float, done: int, total: int, message: str) -> Progress:
    fraction = start + (end - start) * (done + 1) / total
    return Progress(stage="checking", fraction=fraction, message=f"{message}: {done + 1} of {total}")
