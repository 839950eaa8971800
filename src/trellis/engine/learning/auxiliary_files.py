"""The files beside a model's weights: copied with a merged model, and compared as a loader would read them.

They determine how a model is prompted and how its answers end. This module does not know weights or adapters.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from ...errors import LoadFailed

SUFFIXES = (".json", ".jinja", ".model", ".txt", ".tiktoken", ".vocab", ".bpe", ".spm")
NAME_PREFIXES = (
    "tokenizer", "vocab", "merges", "chat_template", "licen", "notice", "copying", "copyright", "use_policy",
)  # fmt: skip
"""Lower-case name prefixes: tokenizers may have any suffix (`tokenizer.model.v3`), and so may licences."""

WEIGHT_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".npz", ".ot",
    ".tflite", ".index.json",
)  # fmt: skip
EXCLUDED_NAMES = {
    "config.json", "trellis.json", "params.json", "adapter_config.json", "quantize_config.json", "quant_config.json",
    "hf_quant_config.json",
}  # fmt: skip
"""Files that describe weights other than the merged ones; the configuration is written separately."""

FOLDERS = ("additional_chat_templates",)
README, BASE_README = "README.md", "README.base.md"
MAX_FILE_BYTES = 200_000_000
"""No tokenizer is larger; a larger file is other data."""

CONVERSATIONS: tuple[tuple[tuple[str, str], ...], ...] = (
    (("user", "Why is the sky blue?"),),
    (("system", "Be brief."), ("user", "  Two  spaces, a\nline, naïve 東京 🌱 <b>"),),
    (("user", "Hello."), ("assistant", "Hello! How can I help?"), ("user", "1 + 1?")),
)  # fmt: skip


@dataclass(frozen=True)
class ModelUsage:
    """How a model is used, as a loader reads it from a folder."""

    end_tokens: frozenset[int]
    generation: Mapping[str, Any]
    templates: Any
    rendered: tuple[str | None, ...]
    """CONVERSATIONS rendered with the chat template; None if the template refuses one."""
    tokens: tuple[tuple[int, ...], ...]


def copy_auxiliary_files(base: Path, into: Path, with_code: bool) -> None:
    """Copy the files a loader may want beside the weights; the base model's Python files only `with_code`.

    Existing files stay, except for the generation settings, which are the base model's.
    """
    (into / "generation_config.json").unlink(missing_ok=True)
    for file in _auxiliary_files(base, with_code):
        target = into / (BASE_README if str(file) == README else file)
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(base / file, target)


def _auxiliary_files(base: Path, with_code: bool) -> Iterator[Path]:
    """Yield names relative to the folder."""
    for file in sorted(base.iterdir()):
        name = file.name.lower()
        if file.is_dir() and file.name in FOLDERS:
            yield from (each.relative_to(base) for each in sorted(file.glob("*.jinja")) if each.is_file())
        if not file.is_file() or name.startswith(".") or file.stat().st_size > MAX_FILE_BYTES:
            continue
        if name.endswith(WEIGHT_SUFFIXES) or name in EXCLUDED_NAMES:
            continue
        if (
            name.endswith(SUFFIXES)
            or name.startswith(NAME_PREFIXES)
            or file.name == README
            or (with_code and name.endswith(".py"))
        ):
            yield Path(file.name)


def write_config(base: Path, into: Path, with_code: bool, changed: Mapping[str, Any]) -> None:
    """Write the base model's own configuration to a merged folder, with the entries of `changed`.

    The one that transformers writes uses names of its newest version, which other programs would ignore.
    """
    config = json.loads((base / "config.json").read_text())
    merged_config = json.loads((into / "config.json").read_text())
    if "quantization_config" not in merged_config:
        config.pop("quantization_config", None)
    if not with_code:
        config.pop("auto_map", None)
    config |= {"architectures": merged_config["architectures"]} | dict(changed)
    (into / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_usage(folder: Path, remote_code: bool) -> ModelUsage:
    """Read how the model in a folder is used."""
    options = {"local_files_only": True, "trust_remote_code": remote_code}
    config = AutoConfig.from_pretrained(folder, **options)
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    generation = GenerationConfig.from_model_config(config)
    if (folder / "generation_config.json").is_file():
        with suppress(OSError, ValueError):  # transformers then uses the configuration
            generation = GenerationConfig.from_pretrained(folder, local_files_only=True)
    settings = {key: value for key, value in generation.to_dict().items() if key not in ("transformers_version",)}
    listed = [config.get_text_config().eos_token_id, tokenizer.eos_token_id, generation.eos_token_id]
    ends = [token for each in listed for token in (each if isinstance(each, list) else [each])]
    rendered = tuple(_render(tokenizer, conversation) for conversation in CONVERSATIONS)
    texts = [text for text in rendered if text is not None]
    plain = [text for conversation in CONVERSATIONS for _, text in conversation]
    tokens = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    tokens += [tokenizer(text)["input_ids"] for text in plain]
    return ModelUsage(
        frozenset(token for token in ends if isinstance(token, int)),
        settings,
        tokenizer.chat_template,
        rendered,
        tuple(tuple(each) for each in tokens),
    )


def _render(tokenizer: Any, conversation: tuple[tuple[str, str], ...]) -> str | None:
    if not tokenizer.chat_template:
        return None
    turns = [{"role": role, "content": text} for role, text in conversation]
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    except (TemplateError, TypeError, ValueError):  # the merged model's template refuses it as well
        return None


def require_same_usage(base: ModelUsage, merged: ModelUsage) -> None:
    """Raise LoadFailed if a merged model would be used differently from its base."""
    compared = {
        f"end-of-answer tokens {sorted(merged.end_tokens)} instead of {sorted(base.end_tokens)}": (
            base.end_tokens == merged.end_tokens
        ),
        "the generation settings differ": base.generation == merged.generation,
        "the chat templates differ": base.templates == merged.templates,
        "the chat template renders a conversation differently": base.rendered == merged.rendered,
        "the tokenizer encodes a text differently": base.tokens == merged.tokens,
    }
    if wrong := [what for what, same in compared.items() if not same]:
        raise LoadFailed(
            f"Verification failed: the merged model behaves differently from its base model: {wrong[0]}.",
            code="not_proved",
            next_step="The merged model was discarded. Export the adapter instead.",
        )
