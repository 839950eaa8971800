"""Find out why a model folder cannot be loaded, and what to do, before any weight is read.

One list of conditions for the check of the form, the catalog and the engine. It imports neither torch nor transformers.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from functools import cache, lru_cache
from pathlib import Path

from .errors import LoadFailed, shorten
from .model_files import (
    CONFIG_LIMIT,
    WEIGHT_INDEX,
    Config,
    FolderSignature,
    ModelFiles,
    Problem,
    Vocabulary,
    damaged_file_problem,
    folder_signature,
    inspect_folder,
    read_json,
)
from .options import Precision
from .safetensors_files import READ_ERRORS

TOKENIZER_FILES = (
    "tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model", "tekken.json", "tiktoken.model",
)  # fmt: skip

SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")

PACKED_TENSOR_SUFFIXES = ("qweight", "qzeros", "weight_packed", "weight_blocks", "_blocks")
"""Last parts of the names of tensors that hold packed weights, in folders whose config.json does not say so."""

BLOCK_FP8 = "fp8"
BITSANDBYTES = "bitsandbytes"

_USE_UNQUANTIZED = "Use the original model in 32-bit or 16-bit. Trellis can load that in 4-bit."

_SIZE_KEYS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "n_embd", "n_layer", "n_head")


def find_problems(files: ModelFiles, precision: Precision = "auto", remote_code: bool = False) -> Iterator[Problem]:
    """Yield the problems that keep a folder from being loaded with these options, most important first."""
    yield from _missing_files(files)
    yield from files.read_problems
    if not files.config:
        return
    yield from _unsupported_architecture(files, remote_code)
    yield from _unsupported_quantization(files)
    yield from _inconsistent_sizes(files)
    yield from _unsupported_tokenizer(files, remote_code)
    if precision in ("8-bit", "4-bit") and not _is_installed("bitsandbytes"):
        yield Problem(
            f"{precision} needs bitsandbytes, which is not installed.",
            "Install it with `pip install 'trellis-studio[quantized]'`, or choose 16-bit.",
            "not_installed", "precision",
        )  # fmt: skip


def find_problems_before_weights(files: ModelFiles, remote_code: bool = False) -> Iterator[Problem]:
    """The same, of a folder whose weights are still to come."""
    if "adapter_config.json" in files.file_names and "config.json" not in files.file_names:
        yield from _missing_files(files)
    yield from files.read_problems
    if files.config:
        yield from _unsupported_architecture(files, remote_code)
        yield from _unsupported_quantization(files)
        yield from _inconsistent_sizes(files)
        yield from _unsupported_tokenizer(files, remote_code)


def first_problem(path: Path, precision: Precision = "auto", remote_code: bool = False) -> Problem | None:
    """The first problem of a folder, or None. Reads files, those that have not changed once: not for the event loop."""
    try:
        found = _cached_first_problem(path, folder_signature(path), precision, remote_code)
        if found and found.code == "not_installed":  # it may have been installed meanwhile
            importlib.invalidate_caches()
            found = next(find_problems(inspect_folder(path), precision, remote_code), None)
    except LoadFailed as error:
        return Problem(error.message, error.next_step, error.code)
    return found


@lru_cache(maxsize=1024)
def _cached_first_problem(
    path: Path, signature: FolderSignature, precision: Precision, remote_code: bool
) -> Problem | None:
    """Kept instead of what was read, which may take megabytes."""
    return next(find_problems(inspect_folder(path), precision, remote_code), None)


def problem_from_file_names(folder: Path) -> Problem | None:
    """What the names of a folder's files say against it; quick enough for a list of all models. A folder that cannot be
    looked into is left to the load."""
    try:
        names = frozenset(file.name for file in folder.iterdir())
    except OSError:
        return None
    weights = tuple(folder / name for name in sorted(names) if name.endswith(".safetensors"))
    return next(_missing_files(ModelFiles(folder, file_names=names, weight_paths=weights)), None)


def require_loadable(path: Path, precision: Precision = "auto", remote_code: bool = False) -> ModelFiles:
    """Return the description of a folder that can be loaded, as far as its files tell. Raise LoadFailed."""
    files = inspect_folder(path)
    for problem in find_problems(files, precision, remote_code):
        raise problem.to_error()
    return files


def answer_length_problem(max_positions: int | None, max_new_tokens: int) -> Problem | None:
    """Return the problem that answers of this length leave no room for a prompt in the model's context, or None."""
    if max_positions is None or max_new_tokens < max_positions:
        return None
    fitting = max(1, max_positions // 2)
    return Problem(
        f"This model has a context of {max_positions} tokens, and answers of up to {max_new_tokens} leave no room for "
        "a prompt.",
        f"Set max new tokens to {fitting} or less.",
        "invalid", "max_new_tokens",
    )  # fmt: skip


def _missing_files(files: ModelFiles) -> Iterator[Problem]:
    names, folder = files.file_names, files.path.name
    own_weights = [file for file in files.weight_paths if not file.name.startswith("adapter_")]
    if "adapter_config.json" in names and not own_weights:
        base = ""
        with suppress(*READ_ERRORS):
            base = str(read_json(files.path / "adapter_config.json", CONFIG_LIMIT).get("base_model_name_or_path", ""))
        of = f" for “{shorten(base)}”" if base else ""
        yield Problem(
            f"The folder “{folder}” contains an adapter{of}, not a model.",
            "Merge it into its base model with PEFT (merge_and_unload, save_pretrained) and use the merged folder.",
            "unsupported_format",
        )
        return
    if not own_weights and not any(name.endswith(".index.json") and name == WEIGHT_INDEX for name in names):
        if any(name.endswith(".gguf") for name in names):
            yield Problem(
                f"The folder “{folder}” contains a GGUF file, which can be run but not trained.",
                "Use the original model with safetensors files.",
                "unsupported_format",
            )
            return
        pickled = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt")))
        if pickled and "config.json" in names:
            yield Problem(
                f"The weights are in “{pickled[0]}”, a pickle file, which can run code when it is loaded.",
                "Use a version with safetensors files, or convert it with transformers' save_pretrained.",
                "unsupported_format",
            )
            return
    missing = [file.name for file in files.weight_paths if file.name not in names]
    if not files.weight_paths and not any(problem.code == "corrupt_file" for problem in files.read_problems):
        missing = ["*.safetensors"]
    if "config.json" not in names:
        missing.append("config.json")
    if missing:
        more = f", and {len(missing) - 1} more of its files are missing" if len(missing) > 2 else ""
        yield Problem(
            f"The folder “{files.path}” has no {shorten(missing[0])}{more}.",
            "Choose a folder with a Hugging Face config and safetensors files, or copy the missing files again.",
            "not_found",
        )


# ── Architecture ───────────────────────────────────────────────────────────────────────────────────────


@cache
def known_model_types(task: str) -> frozenset[str]:
    """The model types that the installed transformers has under a heading of its tables, such as “CAUSAL_LM”; all of
    them under “CONFIG”. They are read from its source, since importing it takes seconds. Empty when it is not there.
    """
    found = importlib.util.find_spec("transformers")
    if found is None or not found.submodule_search_locations:
        return frozenset()
    auto = Path(found.submodule_search_locations[0]) / "models" / "auto"
    files = ["auto_mappings.py", "configuration_auto.py"] if task == "CONFIG" else ["modeling_auto.py"]
    table = "CONFIG_MAPPING_NAMES" if task == "CONFIG" else f"MODEL_FOR_{task}_MAPPING_NAMES"
    types: set[str] = set()
    for name in files:
        with suppress(OSError, UnicodeDecodeError):
            text = (auto / name).read_text()
            for block in re.findall(rf"^{table}(?: = OrderedDict|\.update)\((.*?)^\)", text, re.M | re.S):
                types.update(re.findall(r'["(]([\w.-]+)", "\w+"\)', block) + re.findall(r'"([\w.-]+)": "\w+"', block))
    return frozenset(types)


NON_CAUSAL_HEADS = (
    ("ForSequenceClassification", "classifies text"), ("ForTokenClassification", "labels the words of a text"),
    ("ForQuestionAnswering", "finds answers in a text"), ("ForMultipleChoice", "chooses between given answers"),
    ("RewardModel", "scores answers"), ("ForMaskedLM", "fills in masks"),
)  # fmt: skip
"""Tasks of models by the end of their architecture name, none of which continues a text."""

UNSUPPORTED_ARCHITECTURE = "unsupported_architecture"
CHOOSE_CAUSAL_MODEL = "Choose a causal language model, such as Llama, Qwen, Gemma or Mistral."


def _unsupported_architecture(files: ModelFiles, remote_code: bool) -> Iterator[Problem]:
    kind, architecture, config = files.model_type, files.architecture, files.config
    known = known_model_types("CONFIG")
    if known and kind not in known:
        brings_code = isinstance(config.get("auto_map"), dict)
        if brings_code and not remote_code:
            yield Problem(
                "This model needs its own Python code, which would run here with your permissions.",
                "Review that code. If you trust it, set the revision to the reviewed commit and turn on “Run the "
                "model's own code”. Or choose a model that needs none.",
                "remote_code_refused",
            )
        elif not kind:
            yield Problem(
                "The file “config.json” has no model_type, so the architecture is unknown.",
                "Copy or download it again, or choose another model.",
                "unsupported_architecture",
            )
        elif not brings_code:
            yield Problem(
                f"The installed transformers doesn't know the architecture “{shorten(kind)}”.",
                "Update transformers if the architecture is new, or choose another model.",
                "unsupported_architecture",
            )
        return
    if what := _describe_non_causal(files):
        yield Problem(f"{what}. Trellis steers causal language models.", CHOOSE_CAUSAL_MODEL, UNSUPPORTED_ARCHITECTURE)
    elif {"modules.json", "config_sentence_transformers.json"} & files.file_names:
        yield Problem(
            f"This is an embedding model ({shorten(architecture or kind)}), which turns text into vectors. Trellis "
            "steers causal language models.",
            CHOOSE_CAUSAL_MODEL,
            "unsupported_architecture",
        )
    elif _lacks_output_layer(files):
        yield Problem(
            f"The folder holds {shorten(architecture or kind)} without an output layer, so it can't generate text.",
            CHOOSE_CAUSAL_MODEL,
            "unsupported_architecture",
        )


def _describe_non_causal(files: ModelFiles) -> str:
    """What a model is that does not continue a text, as the beginning of a sentence; else nothing."""
    kind, architecture, config = files.model_type, files.architecture, files.config
    name = shorten(architecture or kind)
    if (
        kind in known_model_types("SPEECH_SEQ_2_SEQ")
        or kind in known_model_types("TEXT_TO_WAVEFORM")
        or kind == "trocr"
    ):
        return f"This model ({name}) works with audio or images"
    if config.get("is_encoder_decoder") is True or kind in known_model_types("SEQ_TO_SEQ_CAUSAL_LM"):
        if config.get("is_encoder_decoder") is not False:
            return f"This is an encoder-decoder ({name}), which rewrites one text as another"
    elif kind in known_model_types("MASKED_LM") and config.get("is_decoder") is not True:
        what = "a BERT encoder" if kind == "bert" else f"an encoder ({name})"
        return f"This is {what}, which fills in masks"
    for ending, does in NON_CAUSAL_HEADS:
        if architecture.endswith(ending):
            return f"This model ({name}) {does}"
    causal = known_model_types("CAUSAL_LM")
    if causal and kind not in causal and kind in known_model_types("CONFIG"):
        if kind in known_model_types("IMAGE_TEXT_TO_TEXT"):
            return f"This model ({name}) reads images together with text, and Trellis can't load its text part alone"
        return f"This model ({name}) is not a causal language model"
    return ""


def _lacks_output_layer(files: ModelFiles) -> bool:
    """Whether the folder of a bare model (LlamaModel) has no output layer, and does not share the embedding for it."""
    tied = files.text_config.get("tie_word_embeddings", files.config.get("tie_word_embeddings"))
    has_head = any("lm_head" in name or "embed_out" in name or name == "output.weight" for name in files.tensors)
    return files.architecture.endswith("Model") and tied is False and bool(files.tensors) and not has_head


# ── Numbers of fewer bits ──────────────────────────────────────────────────────────────────────────────


def quantization_method(files: ModelFiles) -> str:
    """Return the quantization of a folder (“awq”, “fp8”, …); empty if there is none."""
    if (found := files.quantization) is not None:
        method = found.get("quant_method")
        if not method and ("load_in_4bit" in found or "load_in_8bit" in found):
            method = BITSANDBYTES
        return str(method or "unknown").lower()
    if any(name.rsplit(".", 1)[-1].endswith(PACKED_TENSOR_SUFFIXES) for name in files.tensors):
        return "gptq" if "quantize_config.json" in files.file_names else "unknown"
    return ""


def _unsupported_quantization(files: ModelFiles) -> Iterator[Problem]:
    method = quantization_method(files)
    if method == BLOCK_FP8:
        if odd := _unsupported_fp8_tensor(files):
            yield Problem(
                f"The weights are in FP8, and “{shorten(odd)}” has scales that Trellis doesn't support.",
                _USE_UNQUANTIZED, "unsupported_quantization",
            )  # fmt: skip
    elif method == BITSANDBYTES and not _is_installed("bitsandbytes"):
        yield Problem(
            "The weights are quantized with bitsandbytes, which is not installed.",
            f"Install it with `pip install 'trellis-studio[quantized]'`. Or: {_USE_UNQUANTIZED}",
            "not_installed",
        )
    elif method not in ("", BITSANDBYTES):
        name = {"awq": "AWQ", "gptq": "GPTQ", "mxfp4": "MXFP4", "fbgemm_fp8": "FBGEMM FP8"}.get(method, f"“{method}”")
        packed = "in a way that config.json doesn't name" if method == "unknown" else f"with {shorten(name)}"
        yield Problem(
            f"The weights are quantized {packed}, which Trellis can't train on.",
            _USE_UNQUANTIZED,
            "unsupported_quantization",
        )
    elif not method:
        for name, about in files.tensors.items():
            scaled = about.get("dtype", "").startswith("F8") and any(
                f"{name}{ending}" in files.tensors for ending in ("_scale", "_scale_inv", "_scales")
            )
            if name.endswith(".weight") and (about.get("dtype") in ("I8", "U8", "I32") or scaled):
                yield Problem(
                    f"The tensor “{shorten(name)}” contains packed numbers ({about['dtype']}), and config.json doesn't "
                    "say how to read them.",
                    _USE_UNQUANTIZED,
                    "unsupported_quantization",
                )
                return


def _unsupported_fp8_tensor(files: ModelFiles) -> str:
    """The first FP8 tensor that has no scale, or one that does not fit its blocks; empty when all can be read."""
    for name, about in files.tensors.items():
        if about.get("dtype") in ("F8_E4M3", "F8_E5M2"):
            scale = files.tensors.get(f"{name}_scale_inv")
            if scale is None or scale.get("dtype") not in ("F32", "BF16", "F16"):
                return name
            if not scales_match(about["shape"], scale["shape"], scale_block_shape(files.quantization)):
                return name
        elif about.get("dtype") in ("U8", "I8") or str(about.get("dtype")).startswith("F4"):
            return name
    return ""


def scale_block_shape(quantization: Config | None) -> tuple[int, int] | None:
    """The rows and columns of a weight that share a scale; None where a whole tensor does."""
    found = (quantization or {}).get("weight_block_size")
    if (
        isinstance(found, list | tuple)
        and len(found) == 2
        and all(isinstance(side, int) and side > 0 for side in found)
    ):
        return found[0], found[1]
    return None


def scales_match(weight: list[int], scale: list[int], block: tuple[int, int] | None) -> bool:
    """Whether scales of this shape belong to a weight of this shape."""
    if all(side == 1 for side in scale):
        return True
    if block is None or len(weight) != len(scale) or len(weight) < 2:
        return False
    cut = [-(-weight[-2] // block[0]), -(-weight[-1] // block[1])]
    return scale == [*weight[:-2], *cut]


# ── Sizes ──────────────────────────────────────────────────────────────────────────────────────────────


def _inconsistent_sizes(files: ModelFiles) -> Iterator[Problem]:
    config = files.text_config
    for name in _SIZE_KEYS:
        value = config.get(name, 1)
        if not isinstance(value, list) and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            yield Problem(
                f"“config.json” has “{shorten(value)}” for {name}, which must be a whole number above 0.",
                "Copy or download config.json again.",
                "corrupt_file",
            )
            return
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    divides = files.model_type in ("llama", "mistral", "qwen2", "gpt_neox")
    if divides and isinstance(heads, int) and isinstance(hidden, int) and "head_dim" not in config and hidden % heads:
        yield Problem(
            f"“config.json” has {heads} attention heads, which don't divide the hidden size {hidden}.",
            "Copy or download config.json again.",
            "corrupt_file",
        )
        return
    for part in (files.config, config):
        if not isinstance(part.get("quantization_config") or {}, dict):
            yield Problem(
                "The quantization_config in “config.json” is not a JSON object.", "Copy or download config.json again.",
                "corrupt_file",
            )  # fmt: skip
            return
    found = files.embedding
    if found is None or "word_embed_proj_dim" in config or "embedding_size" in config:
        return
    name, (rows, hidden) = found
    for key, actual in (("vocab_size", rows), ("hidden_size", hidden), ("n_embd", hidden)):
        configured = config.get(key)
        if isinstance(configured, int) and configured != actual:
            yield Problem(
                f"“config.json” has {configured} for {key}, but the tensor “{shorten(name)}” has {actual}.",
                "Copy or download config.json and the weights of the same model again.",
                "corrupt_file",
            )
            return


# ── Tokenizer


def token_beyond_embedding(vocabulary: Vocabulary, rows: int, used_text: str) -> tuple[str, int] | None:
    """A token that is sure to be used and that the embedding has no row for. An added token counts where it is in
    `needed`: the template and the names of the ends. A padding token that nothing writes does no harm."""
    added = {text: number for text, number in vocabulary.added_tokens.items() if number >= rows}
    if vocabulary.largest_id >= rows and vocabulary.largest_id not in added.values():
        return "", vocabulary.largest_id
    return next(((text, number) for text, number in added.items() if text in used_text), None)


def _unsupported_tokenizer(files: ModelFiles, remote_code: bool) -> Iterator[Problem]:
    names, about = files.file_names, files.tokenizer_config
    own = about.get("auto_map")
    if isinstance(own, dict) and "AutoTokenizer" in own and remote_code:
        return
    tokenizer_files = [name for name in names if name in TOKENIZER_FILES or name.endswith(".tiktoken")]
    if not tokenizer_files:
        yield Problem(
            f"The folder “{files.path.name}” has no tokenizer, such as tokenizer.json.",
            "Copy or download the model's tokenizer files into it.",
            "not_found",
        )
        return
    if "tokenizer.json" not in names:
        yield from _missing_libraries(tokenizer_files)
        return
    vocabulary, rows = files.vocabulary, files.embedding_rows
    if vocabulary is None:
        yield damaged_file_problem(files.path / "tokenizer.json", ValueError())
        return
    if rows is not None and (beyond := token_beyond_embedding(vocabulary, rows, _template_text(files))):
        yield tokenizer_too_large_problem(beyond, rows)


def tokenizer_too_large_problem(token_and_id: tuple[str, int], rows: int) -> Problem:
    text, number = token_and_id
    token = f"“{shorten(text)}”" if text else "a token"
    return Problem(
        f"The tokenizer has {token} with id {number}, but the model's embedding has only {rows} rows.",
        "Use the tokenizer files of this model, or resize the embedding with transformers (resize_token_embeddings).",
        "unsupported_tokenizer",
    )


def _template_text(files: ModelFiles) -> str:
    """All text in which a token stands that is sure to be used: the templates, and the tokens that begin and end."""
    about = files.tokenizer_config
    parts = [json.dumps(about.get("chat_template") or "", ensure_ascii=False)]
    for name in ("bos_token", "eos_token"):
        token = about.get(name)
        parts.append(str(token.get("content", "")) if isinstance(token, dict) else str(token or ""))
    template = files.path / "chat_template.jinja"
    if template.name in files.file_names:
        with suppress(OSError, UnicodeDecodeError), template.open(encoding="utf-8") as stream:
            parts.append(stream.read(1_000_000))
    return "\n".join(parts)


def _missing_libraries(tokenizer_files: list[str]) -> Iterator[Problem]:
    """Packages needed for tokenizers without a tokenizer.json."""
    needed: tuple[str, ...] = ()
    if any(name in SENTENCEPIECE_FILES for name in tokenizer_files):
        needed = ("sentencepiece", "google.protobuf")
    elif any(name.endswith(".tiktoken") or name == "tiktoken.model" for name in tokenizer_files):
        needed = ("tiktoken",)
    elif tokenizer_files == ["tekken.json"]:
        needed = ("mistral_common",)
    missing = [_PACKAGE_NAMES.get(name, name) for name in needed if not _is_installed(name)]
    if missing:
        yield Problem(
            f"The tokenizer is in “{sorted(tokenizer_files)[0]}”, which needs {' and '.join(missing)}, and "
            f"{'are' if len(missing) > 1 else 'is'} not installed.",
            f"Install {'them' if len(missing) > 1 else 'it'} with `pip install {' '.join(missing)}`, or use a version "
            "of the model with a tokenizer.json.",
            "not_installed",
        )


_PACKAGE_NAMES = {"google.protobuf": "protobuf", "mistral_common": "mistral-common"}


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the package that a module would be in is not there
        return False
