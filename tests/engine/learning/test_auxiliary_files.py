"""A merged model ends, writes and reads as its base does: what stands beside the weights goes along and is proved."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from tests.engine.text.test_architectures import grown, learn, merge_of, offer, run
from tests.tiny import make_llama, make_model
from trellis.engine.handlers import TextEngine
from trellis.engine.learning import merging
from trellis.engine.learning.auxiliary_files import BASE_README, copy_auxiliary_files, read_usage, require_same_usage
from trellis.errors import LoadFailed
from trellis.messages import Merge, Merged, Prompt

pytestmark = pytest.mark.engine

GENERATION = {
    "eos_token_id": [1, 7],
    "temperature": 0.6,
    "top_p": 0.8,
    "top_k": 20,
    "do_sample": True,
    "pad_token_id": 0,
}
WANTED = {
    "additional_chat_templates/tool_use.jinja", "chat_template.jinja", "tekken.json", "spiece.model", "vocab.bpe",
    "tokenizer.model.v3", "preprocessor_config.json", "processor_config.json", "LICENSE.md", "NOTICE", "USE_POLICY.md",
}  # fmt: skip
UNWANTED = {
    "pytorch_model.bin", "model-Q4.gguf", "pytorch_model.bin.index.json", "tf_model.h5", "trellis.json",
    "params.json", "onnx/model.onnx", "original/tokenizer.model", ".gitattributes", "code.py", "picture.png",
    "consolidated.safetensors",
}  # fmt: skip


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = make_model(tmp_path / "base", "llama")
    for name in WANTED - {"chat_template.jinja", "additional_chat_templates/tool_use.jinja"} | UNWANTED:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f'{{"this is": "{name}"}}')
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ messages }} and {{ tools }}"}
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\nThe base.")
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    assert {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()} >= WANTED | UNWANTED
    return folder


def prepared(folder: Path, tmp_path: Path, **more: Any) -> tuple[TextEngine, Merge]:
    engine, root, _ = grown(folder, tmp_path / "weights", **more)
    _, learned = learn(engine, root, offer(engine, root))
    return engine, merge_of(folder, root, learned.weights, str(tmp_path / "merged"))


def test_a_merged_model_ends_and_is_sampled_as_its_base(base: Path, tmp_path: Path) -> None:
    engine, request = prepared(base, tmp_path)
    merged: Merged = run(engine.merge(request))
    into = tmp_path / "merged"
    found = GenerationConfig.from_pretrained(into)
    assert {key: getattr(found, key) for key in GENERATION} == GENERATION
    assert (into / "generation_config.json").read_bytes() == (base / "generation_config.json").read_bytes()
    assert merged.ends == (1, 7)
    assert merged.conversations == 3
    assert read_usage(into, remote_code=False) == read_usage(base, remote_code=False)
    assert set(AutoTokenizer.from_pretrained(into).chat_template) == {"default", "tool_use"}


def test_what_a_loader_may_want_goes_along_and_other_weights_do_not(base: Path, tmp_path: Path) -> None:
    engine, request = prepared(base, tmp_path)
    merged: Merged = run(engine.merge(request))
    into = tmp_path / "merged"
    there = {str(file.relative_to(into)) for file in into.rglob("*") if file.is_file()}
    assert there >= WANTED | {"model.safetensors", "config.json", "tokenizer.json", BASE_README}
    assert not there & (UNWANTED | {"README.md"})
    assert set(merged.files) == there
    for name in WANTED:
        assert (into / name).read_bytes() == (base / name).read_bytes()


def test_code_goes_along_only_where_it_was_agreed_to(base: Path, tmp_path: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "code.Config"}}))
    engine, request = prepared(base, tmp_path)
    run(engine.merge(request))
    assert "auto_map" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    (tmp_path / "with code").mkdir()
    copy_auxiliary_files(base, tmp_path / "with code", with_code=True)
    assert (tmp_path / "with code" / "code.py").is_file()


def test_code_beside_a_known_architecture_is_neither_run_nor_copied(base: Path, tmp_path: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    auto_map = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (base / "config.json").write_text(json.dumps(config | {"auto_map": auto_map}))
    (base / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    engine, request = prepared(base, tmp_path)
    run(engine.merge(request.model_copy(update={"remote_code": True})))
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "merged" / "code.py").exists()


def test_a_model_with_code_of_its_own_takes_it_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path, str(tmp_path / "modules")])
    base = make_llama(tmp_path / "base")
    (base / "own_code.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own_llama'\n\n\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    own = json.loads((base / "config.json").read_text()) | {
        "model_type": "own_llama", "architectures": ["OwnModel"],
        "auto_map": {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnModel"},
    }  # fmt: skip
    (base / "config.json").write_text(json.dumps(own))
    engine, request = prepared(base, tmp_path, remote_code=True)
    merged: Merged = run(engine.merge(request.model_copy(update={"remote_code": True})))
    assert merged.mean_difference < 1e-4
    assert (tmp_path / "merged" / "own_code.py").read_bytes() == (base / "own_code.py").read_bytes()
    assert json.loads((tmp_path / "merged" / "config.json").read_text()) == own


def test_probes_that_are_all_too_long_still_leave_something_to_compare(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base", positions=40)
    engine, root, _ = grown(base, tmp_path / "weights")
    request = merge_of(base, root, root, str(tmp_path / "merged"))
    merged: Merged = run(engine.merge(request.model_copy(update={"probes": (Prompt(text="Why? " * 40),)})))
    assert merged.tokens > 0


def test_the_configuration_keeps_the_words_that_other_programs_read(base: Path, tmp_path: Path) -> None:
    """transformers 5 writes `rope_parameters` and `dtype`; older programs look for `rope_theta` and `torch_dtype`."""
    config = json.loads((base / "config.json").read_text())
    config.pop("rope_parameters", None)
    config.pop("dtype", None)
    own = config | {"rope_theta": 500000.0, "torch_dtype": "float32", "something_of_theirs": [1]}
    (base / "config.json").write_text(json.dumps(own))
    engine, request = prepared(base, tmp_path)
    merged: Merged = run(engine.merge(request))
    assert merged.mean_difference < 1e-4
    assert json.loads((tmp_path / "merged" / "config.json").read_text()) == own
    assert AutoConfig.from_pretrained(tmp_path / "merged").rope_parameters["rope_theta"] == 500000.0


def test_settings_that_transformers_calls_invalid_go_along_too(base: Path, tmp_path: Path) -> None:
    """Many published models have a temperature beside `do_sample: false`."""
    (base / "generation_config.json").write_text(json.dumps(GENERATION | {"do_sample": False}))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"temperature": 0.3, "do_sample": False}))
    engine, request = prepared(base, tmp_path)
    assert run(engine.merge(request)).ends == (1, 7)
    assert json.loads((tmp_path / "merged" / "generation_config.json").read_text())["temperature"] == 0.6


def test_a_base_without_generation_settings_has_none_merged(base: Path, tmp_path: Path) -> None:
    (base / "generation_config.json").unlink()
    engine, request = prepared(base, tmp_path)
    assert run(engine.merge(request)).ends == (1,)
    assert not (tmp_path / "merged" / "generation_config.json").exists()


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("generation_config.json", json.dumps(GENERATION | {"eos_token_id": 1}), r"tokens \[1\] instead of \[1, 7\]"),
        ("generation_config.json", json.dumps(GENERATION | {"top_k": 50}), "generation settings"),
        ("chat_template.jinja", "{{ messages[0].content }}", "chat templates"),
        ("additional_chat_templates/tool_use.jinja", "{{ tools }}", "chat templates"),
    ],
)
def test_a_merge_that_would_be_used_otherwise_is_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, text: str, said: str
) -> None:
    def spoiled(base: Path, into: Path, with_code: bool) -> None:
        copy_auxiliary_files(base, into, with_code)
        (into / file).write_text(text)

    monkeypatch.setattr(merging, "copy_auxiliary_files", spoiled)
    engine, request = prepared(base, tmp_path)
    with pytest.raises(LoadFailed, match=said) as raised:
        run(engine.merge(request))
    assert raised.value.code == "not_proved"


def test_another_tokenizer_is_noticed(base: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", "llama")
    raw = json.loads((other / "tokenizer.json").read_text())
    raw["model"]["merges"] = raw["model"]["merges"][:10]
    (other / "tokenizer.json").write_text(json.dumps(raw))
    plain = make_model(tmp_path / "plain", "llama")
    with pytest.raises(LoadFailed, match="encodes a text differently"):
        require_same_usage(read_usage(plain, remote_code=False), read_usage(other, remote_code=False))
