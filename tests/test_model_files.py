"""What the files of a model folder say of it: the check of the form and a load tell the same condition in the same
words, before any weight is read."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import open_studio, thread_spawner
from tests.engine.text.test_loading import load
from tests.quantized import change_config
from trellis.blobs import Blobs
from trellis.engine.fake import FakeEngine
from trellis.errors import LoadFailed
from trellis.model_checks import answer_length_problem, first_problem, known_model_types
from trellis.model_files import canonical_config, read_vocabulary
from trellis.studio.models.catalog import Catalog

pytestmark = pytest.mark.engine

Change = Callable[[Path], object]


def write(name: str, value: Any) -> Change:
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return lambda folder: (folder / name).write_bytes(text)


def remove(*patterns: str) -> Change:
    return lambda folder: [file.unlink() for pattern in patterns for file in folder.glob(pattern)]


def config(**changes: Any) -> Change:
    return lambda folder: change_config(folder, **changes)


def several(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


def in_tokenizer(change: Callable[[dict[str, Any]], object]) -> Change:
    def apply(folder: Path) -> None:
        about = json.loads((folder / "tokenizer.json").read_text())
        change(about)
        (folder / "tokenizer.json").write_text(json.dumps(about, indent=2))

    return apply


def add_token(text: str, number: int) -> Change:
    token = {"id": number, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True}  # fmt: skip
    return in_tokenizer(lambda about: about["added_tokens"].append(token))


def cast(ending: str, kind: str, **more: Any) -> Change:
    """Store a tensor in another type, and others beside it."""

    def apply(folder: Path) -> None:
        import torch
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "model.safetensors")
        name = next(name for name in tensors if name.endswith(ending))
        tensors[name] = tensors[name].to(getattr(torch, kind))
        extra = {name + suffix: torch.ones(1) for suffix in more.get("beside", ())}
        save_file(tensors | extra, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


ROWS = 373
NO_WEIGHTS = remove("*.safetensors")
SAVED_AS_BERT = {"model_type": "bert", "architectures": ["BertForMaskedLM"]}
QUANTIZED = "unsupported_quantization"
UNSUPPORTED = "unsupported_architecture"

CASES: list[tuple[str, Change, str, str]] = [
    # a name, what is done to a folder that loads, the code, words of the message or the next step
    ("tokenizer too large", in_tokenizer(lambda about: about["model"]["vocab"].update({"beyond": 5000})),
     "unsupported_tokenizer", "id 5000"),
    ("token of the template without a row", several(
        add_token("<|im_start|>", ROWS), write("chat_template.jinja", b"<|im_start|>{{ messages[0].content }}")),
     "unsupported_tokenizer", "“<|im_start|>” with id 373"),
    ("tokenizer that is no JSON", write("tokenizer.json", b"{"), "corrupt_file", "tokenizer.json"),
    ("tokenizer_config that is a list", write("tokenizer_config.json", []), "corrupt_file", "tokenizer_config.json"),
    ("no tokenizer", remove("tokenizer*"), "not_found", "has no tokenizer"),
    ("sentencepiece alone", several(remove("tokenizer*"), write("tokenizer.model", b"\x0a\x05hello")),
     "not_installed", "pip install sentencepiece"),
    ("tekken alone", several(remove("tokenizer*"), write("tekken.json", {})), "not_installed", "mistral-common"),
    ("tiktoken alone", several(remove("tokenizer*"), write("qwen.tiktoken", b"")), "not_installed", "tiktoken"),
    ("adapter alone", several(remove("*"), write("adapter_config.json", {"base_model_name_or_path": "org/base"}),
                              write("adapter_model.safetensors", b"")), "unsupported_format", "“org/base”"),
    ("adapter with a config", several(NO_WEIGHTS, write("adapter_config.json", {}),
                                      write("adapter_model.safetensors", b"")), "unsupported_format", "PEFT"),
    ("GGUF alone", several(remove("*"), write("model-q4.gguf", b"GGUF")), "unsupported_format", "GGUF"),
    ("pickle alone", several(NO_WEIGHTS, write("pytorch_model.bin", b"PK")), "unsupported_format", "save_pretrained"),
    ("no weights", NO_WEIGHTS, "not_found", "no *.safetensors"),
    ("no config", remove("config.json"), "not_found", "no config.json"),
    ("missing shards", write("model.safetensors.index.json", {"weight_map": {"a": "model-1.safetensors",
     "b": "model-2.safetensors", "c": "model-3.safetensors"}}), "not_found", "model-1.safetensors, and 2 more"),
    ("index that names other tensors", write("model.safetensors.index.json", {"weight_map": {
        "model.layers.9.weight": "model.safetensors"}}), "corrupt_file", "model.layers.9.weight"),
    ("index that is none", write("model.safetensors.index.json", {}), "corrupt_file", "index.json"),
    ("file that was cut off", cut, "corrupt_file", "ends before its last tensor"),
    ("git lfs pointer", write("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"), "corrupt_file",
     "git lfs pull"),
    ("config that is no JSON", write("config.json", b"{"), "corrupt_file", "config.json"),
    ("config that is deep", write("config.json", b"[" * 100_000), "corrupt_file", "config.json"),
    ("config that is not UTF-8", write("config.json", b"\xff\xfe\x00"), "corrupt_file", "config.json"),
    ("vocabulary of another size", config(vocab_size=100), "corrupt_file", "100 for vocab_size"),
    ("hidden size of another model", config(hidden_size=64), "corrupt_file", "64 for hidden_size"),
    ("size that is text", config(hidden_size="large"), "corrupt_file", "“large” for hidden_size"),
    ("no heads", config(num_attention_heads=0), "corrupt_file", "“0” for num_attention_heads"),
    ("heads that do not divide", config(num_attention_heads=5, head_dim=None), "corrupt_file", "5 attention heads"),
    ("quantization that is a list", config(quantization_config=[4]), "corrupt_file", "quantization_config"),
    ("BERT", config(**SAVED_AS_BERT), UNSUPPORTED, "This is a BERT encoder, which fills in masks. Trellis steers"),
    ("BERT as a decoder's class", config(model_type="bert", architectures=["BertLMHeadModel"]), UNSUPPORTED, "encoder"),
    ("RoBERTa", config(model_type="roberta", architectures=["RobertaForMaskedLM"]), UNSUPPORTED, "encoder (Roberta"),
    ("DistilBERT", config(model_type="distilbert", architectures=["DistilBertForMaskedLM"]), UNSUPPORTED, "fills in"),
    ("T5", config(model_type="t5", architectures=["T5ForConditionalGeneration"], is_encoder_decoder=True), UNSUPPORTED,
     "encoder-decoder"),
    ("BART", config(model_type="bart", architectures=["BartForConditionalGeneration"]), UNSUPPORTED, "encoder-decoder"),
    ("Whisper", config(model_type="whisper", architectures=["WhisperForConditionalGeneration"]), UNSUPPORTED, "audio"),
    ("ViT", config(model_type="vit", architectures=["ViTForImageClassification"]), UNSUPPORTED, "causal"),
    ("vision and text", config(model_type="qwen2_5_vl", architectures=["Qwen2_5_VLForConditionalGeneration"]),
     UNSUPPORTED, "reads images"),
    ("classifier", config(architectures=["LlamaForSequenceClassification"]), UNSUPPORTED, "classifies text"),
    ("reward model", config(architectures=["LlamaRewardModel"]), UNSUPPORTED, "scores answers"),
    ("embedding model", write("modules.json", []), UNSUPPORTED, "embedding model"),
    ("no output layer", config(architectures=["LlamaModel"], tie_word_embeddings=False), UNSUPPORTED, "output layer"),
    ("unknown architecture", config(model_type="nonesuch"), UNSUPPORTED, "“nonesuch”"),
    ("no model type", config(model_type=None), UNSUPPORTED, "model_type"),
    ("its own Python code", config(model_type="homegrown", auto_map={"AutoConfig": "evil.C"}), "remote_code_refused",
     "set the revision"),
    *((f"quantised: {name}", config(quantization_config={"quant_method": name}), QUANTIZED, shown) for name, shown in (
        ("awq", "AWQ"), ("gptq", "GPTQ"), ("compressed-tensors", "compressed-tensors"), ("mxfp4", "MXFP4"),
        ("hqq", "hqq"), ("aqlm", "aqlm"), ("torchao", "torchao"), ("quanto", "quanto"), ("nonsense", "nonsense"))),
    ("quantised, older file", several(write("quantize_config.json", {"bits": 4}),
                                      cast("q_proj.weight", "float32", beside=(".qweight",))), QUANTIZED, "GPTQ"),
    ("packed bytes", cast("q_proj.weight", "uint8"), QUANTIZED, "packed numbers (U8)"),
    ("FP8 with scales that nothing explains", cast("q_proj.weight", "float8_e4m3fn", beside=("_scale",)), QUANTIZED,
     "F8_E4M3"),
    ("FP8 without its scales", several(cast("q_proj.weight", "float8_e4m3fn"),
                                       config(quantization_config={"quant_method": "fp8"})), QUANTIZED, "scales"),
]  # fmt: skip


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "models" / "model"))


@pytest.mark.parametrize(("change", "code", "words"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_what_a_folder_says_is_told_before_it_is_loaded_and_at_load(
    change: Change, code: str, words: str, folder: Path
) -> None:
    assert first_problem(folder) is None
    change(folder)
    problem = first_problem(folder)
    assert problem is not None
    assert (problem.code, words in problem.full_text()) == (code, True), problem
    assert problem.message.endswith(".")
    assert problem.next_step.endswith(".")
    assert f"`{code}`" in (Path(__file__).parents[1] / "docs" / "api.md").read_text()
    with pytest.raises(LoadFailed) as raised:
        load(folder)
    assert (raised.value.code, raised.value.message) == (problem.code, problem.message)


LOADABLE: dict[str, Change] = {
    "padding beyond the embedding": add_token("<pad>", ROWS),
    "an inert key": config(transformers_version="99.0", _name_or_path="elsewhere"),
    "architectures that do not say": config(architectures=None),
    "a bare model that shares its embedding": config(architectures=["LlamaModel"]),
    "FP8 that was only rounded": cast("q_proj.weight", "float8_e4m3fn"),
    "files of other formats beside": several(write("model.gguf", b"GGUF"), write("pytorch_model.bin", b"PK")),
}


@pytest.mark.parametrize("name", LOADABLE)
def test_what_loads_is_not_refused(name: str, folder: Path) -> None:
    LOADABLE[name](folder)
    assert first_problem(folder) is None
    load(folder)


@pytest.mark.anyio
async def test_the_check_of_the_form_tells_what_a_folder_says(folder: Path) -> None:
    save = folder.parent.parent
    async with open_studio(save, thread_spawner(lambda: FakeEngine(Blobs(save / "weights")))) as studio:
        check = await studio.steering.check_config({"model": "model"})
        assert check["errors"] == []
        change_config(folder, **SAVED_AS_BERT)
        (error,) = (await studio.steering.check_config({"model": "model"}))["errors"]
        assert error["field"] == "config.model"
        assert "BERT encoder" in error["message"]
        change_config(folder, model_type="llama", architectures=None, max_position_embeddings=64)
        (error,) = (await studio.steering.check_config({"model": "model"}))["errors"]
        assert error["field"] == "config.max_new_tokens"
        assert "Set max new tokens to 32 or less" in error["message"]
        assert "longer context" not in error["message"]


def test_answers_that_leave_no_room_name_a_length_that_works() -> None:
    problem = answer_length_problem(64, 96)
    assert problem is not None
    assert problem.next_step == "Set max new tokens to 32 or less."
    assert answer_length_problem(64, 32) is None
    assert answer_length_problem(None, 8192) is None


def test_the_types_that_transformers_knows_are_read_from_its_tables() -> None:
    from transformers import CONFIG_MAPPING
    from transformers.models.auto import modeling_auto

    assert known_model_types("CONFIG") >= set(CONFIG_MAPPING.keys())
    for kind in ("CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "SPEECH_SEQ_2_SEQ",
                 "TEXT_TO_WAVEFORM"):  # fmt: skip
        assert known_model_types(kind) == set(getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES")), kind


def test_a_vocabulary_is_read_as_the_tokenizer_reads_it(tmp_path: Path) -> None:
    text = {
        "added_tokens": [{"id": 9, "content": '"vocab": {"x": 70}', "special": True}],
        "model": {"type": "BPE", "vocab": {'a": 99,': 0, "b\\": 4, "}": 7, "ü": 2}, "merges": ["a 500"]},
    }
    for indent in (None, 2):
        (tmp_path / "t.json").write_text(json.dumps(text, indent=indent))
        found = read_vocabulary(tmp_path / "t.json")
        assert (found.largest_id, dict(found.added_tokens)) == (7, {'"vocab": {"x": 70}': 9})
    pieces = {"model": {"type": "Unigram", "vocab": [["<s>", 0.0], ["]", -1.5], ["a", -2]], "byte_fallback": True}}
    (tmp_path / "u.json").write_text(json.dumps(pieces))
    assert read_vocabulary(tmp_path / "u.json").largest_id == 2


def test_a_configuration_is_the_same_whatever_does_not_matter() -> None:
    one = b'{"model_type": "llama", "hidden_size": 32, "transformers_version": "4.1", "text_config": {"dtype": "x"}}'
    two = b'{\n "hidden_size": 32,\n "text_config": {}, "_name_or_path": "a", "model_type": "llama"}\n'
    assert canonical_config(one) == canonical_config(two)
    assert canonical_config(one) != canonical_config(two.replace(b"32", b"64"))
    assert canonical_config(b"{") == b"{"


def test_a_library_that_was_installed_meanwhile_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trellis import model_checks

    missing = {"bitsandbytes"}
    monkeypatch.setattr(model_checks, "_is_installed", lambda name: name not in missing)
    problem = first_problem(folder, "4-bit")
    assert problem is not None
    assert (problem.code, problem.field) == ("not_installed", "precision")
    assert "trellis-studio[quantized]" in problem.next_step
    missing.clear()
    assert first_problem(folder, "4-bit") is None
    change_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert first_problem(folder) is None
    missing.add("bitsandbytes")
    first_problem(change_config(folder, transformers_version="5"))
    problem = first_problem(folder)
    assert problem is not None
    assert problem.code == "not_installed"


def test_what_was_looked_at_once_is_looked_at_again_when_it_changes(folder: Path) -> None:
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for _ in range(2):
        weights.write_bytes(whole[:-1])
        assert first_problem(folder) is not None
        weights.write_bytes(whole)
        assert first_problem(folder) is None


def header(text: bytes) -> Change:
    return write("model.safetensors", struct.pack("<Q", len(text)) + text + bytes(64))


def pipe(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return change


def sparse(folder: Path) -> None:
    (folder / "tokenizer.json").write_bytes(b'{"model": {}')
    os.truncate(folder / "tokenizer.json", 1_000_000_000)


HOSTILE: dict[str, Change] = {
    "an offset without end": header(b'{"a": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 1e999]}}'),
    "a type that is a number": header(b'{"a": {"dtype": 5, "shape": [4, 4], "data_offsets": [0, 64]}}'),
    "a shape that is text": header(b'{"a": {"dtype": "F32", "shape": "", "data_offsets": [0, 64]}}'),
    "a token without end": write("tokenizer.json", b'{"added_tokens": [{"id": 1e999, "content": "a"}], "vocab": {}}'),
    "a tokenizer of a gigabyte": sparse,
    "a link to itself": lambda folder: (folder / "x").symlink_to("x"),
    "a link into a file": lambda folder: (folder / "x").symlink_to("config.json/x"),
    "a name that is no text": write("model.safetensors.index.json", {"weight_map": {"a": "\ud800"}}),
    **{
        f"{name} is a pipe": pipe(name)
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
                     "model.safetensors", "model.safetensors.index.json")
    },
    "the only file is a pipe": lambda folder: (remove("*.*")(folder), pipe("adapter_config.json")(folder)),
}  # fmt: skip


@pytest.mark.anyio
@pytest.mark.parametrize("what", HOSTILE)
async def test_hostile_files_neither_break_nor_hold_up_the_studio(what: str, tmp_path: Path, folder: Path) -> None:
    HOSTILE[what](folder)
    catalog = Catalog([folder.parent], tmp_path / "hub")
    async with asyncio.timeout(5):
        for _ in range(8):  # more than there are threads for files
            (entry,) = [each for each in await catalog.list_models() if each.id == "model"]
            found = await catalog.find_problem(entry)
            (found.full_text() if found else "").encode()


@pytest.mark.anyio
async def test_a_folder_whose_name_is_no_text_is_not_listed(tmp_path: Path, tiny_llama: Path) -> None:
    for name in (b"odd \xff", b"plain"):
        shutil.copytree(tiny_llama, tmp_path / os.fsdecode(name))
    assert await Catalog([tmp_path], tmp_path / "hub").list_names() == ["demo", "plain"]
