"""Loading a folder: what can be wrong with one, each told apart, and prompts through the model's own template."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import make_llama, make_tokenizer
from trellis.engine.loaded import LoadedModel, read_model
from trellis.errors import Invalid, LoadFailed
from trellis.messages import Load, Prompt

pytestmark = pytest.mark.engine


def load(path: Path, **options: Any) -> LoadedModel:
    steps = read_model(path, Load(path=str(path), **options))
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            loaded: LoadedModel = stop.value
            return loaded


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def code_of(path: Path) -> str:
    with pytest.raises(LoadFailed) as raised:
        load(path)
    assert raised.value.next_step
    return raised.value.code


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert code_of(tmp_path / "nothing") == "not_found"
    assert code_of(tmp_path) == "not_found"


def test_a_file_that_was_cut_off(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    assert code_of(folder) == "corrupt_file"


def test_a_header_that_lies_about_its_size(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    assert code_of(folder) == "corrupt_file"


def test_tensors_that_are_missing(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    assert code_of(folder) == "corrupt_file"


def test_an_architecture_that_nobody_knows(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "nonesuch"}))
    assert code_of(folder) == "unsupported_architecture"


def test_an_architecture_that_is_no_language_model(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "vit"}))
    assert code_of(folder) == "unsupported_architecture"


def test_code_in_a_folder_is_not_run(folder: Path) -> None:
    ran = folder / "ran"
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: pass\n")
    config = json.loads((folder / "config.json").read_text())
    changes = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(LoadFailed):
        load(folder)
    assert not ran.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="the rights of files do not hold for root")
def test_a_folder_that_may_not_be_read(folder: Path) -> None:
    folder.chmod(0)
    try:
        assert code_of(folder) == "permission_denied"
    finally:
        folder.chmod(0o755)


def test_two_models_have_two_fingerprints(tiny_llama: Path, tmp_path: Path) -> None:
    other = make_llama(tmp_path / "other", seed=1)
    assert load(tiny_llama).about.fingerprint == load(tiny_llama).about.fingerprint
    assert load(tiny_llama).about.fingerprint != load(other).about.fingerprint


def test_a_prompt_goes_through_the_models_template(tiny_llama: Path) -> None:
    loaded = load(tiny_llama)
    tokens = loaded.prompt_tokens(Prompt(text="Hello", system="Be kind."), 10, 256)
    text = loaded.tokenizer.decode(tokens)
    assert text == "<|system|>Be kind.<|end|><|user|>Hello<|end|><|assistant|>"
    assert loaded.tokenizer.decode(loaded.prompt_tokens(Prompt(text="Hello"), 10, 256)).startswith("<|user|>")


def test_a_base_model_without_a_template_continues_the_prompt(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "base")
    shutil.rmtree(tmp_path / "base", ignore_errors=True)
    folder = make_llama(tmp_path / "base")
    for file in folder.glob("*chat_template*"):
        file.unlink()
    make_tokenizer(folder, template=None)
    loaded = load(folder)
    tokens = loaded.prompt_tokens(Prompt(text="Once", system="A story."), 10, 256)
    assert loaded.tokenizer.decode(tokens) == "A story.\n\nOnce"


def test_a_written_answer_ends(tiny_llama: Path) -> None:
    loaded = load(tiny_llama)
    tokens = loaded.answer_tokens("The sea.")
    assert tokens[-1] in loaded.ends
    assert loaded.tokenizer.decode(tokens[:-1]) == "The sea."


@pytest.mark.parametrize("limit", [20, 100_000])
def test_a_prompt_must_leave_room_for_an_answer(tiny_llama: Path, limit: int) -> None:
    loaded: Any = load(tiny_llama)
    with pytest.raises(Invalid, match="does not fit") as raised:
        loaded.prompt_tokens(Prompt(text="sea " * 600), 10, limit)
    assert raised.value.code == "prompt_too_long"


def test_the_models_own_code_is_refused_by_name(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    changed = config | {"model_type": "homegrown", "auto_map": {"AutoModelForCausalLM": "evil.Model"}}
    (folder / "config.json").write_text(json.dumps(changed))
    (folder / "evil.py").write_text("raise SystemExit('it ran')")
    assert code_of(folder) == "remote_code_refused"


def test_code_beside_a_known_architecture_is_never_run(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "evil.Config"}}))
    (folder / "evil.py").write_text("raise SystemExit('it ran')")
    assert load(folder, remote_code=True).about.architecture == "LlamaForCausalLM"


def test_files_that_the_index_does_not_name_are_not_read(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"other.weight": torch.zeros(3)}, folder / "consolidated.safetensors")
    assert load(folder).about.parameters > 10_000


def test_a_shard_that_is_missing_is_named(folder: Path) -> None:
    index = {"weight_map": {"model.embed_tokens.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(LoadFailed, match="model-00001-of-00002") as raised:
        load(folder)
    assert raised.value.code == "not_found"


@pytest.mark.parametrize("text", ["[]", "{}", "{", '{"weight_map": 3}'])
def test_an_index_that_is_not_one(folder: Path, text: str) -> None:
    (folder / "model.safetensors.index.json").write_text(text)
    assert code_of(folder) == "corrupt_file"


def test_a_device_that_is_not_there(folder: Path) -> None:
    import torch

    if torch.backends.mps.is_available():
        pytest.skip("this computer has that device")
    with pytest.raises(LoadFailed, match="no device “mps”"):
        load(folder, device="mps")


def test_a_system_prompt_is_said_by_the_user_where_the_template_has_no_system_role(tmp_path: Path) -> None:
    from tests.tiny import TEMPLATE, make_model

    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TEMPLATE
    loaded = load(make_model(tmp_path / "m", "gemma", template=strict))
    tokens = loaded.prompt_tokens(Prompt(text="hello", system="be brief"), 8, 256)
    assert "<|user|>be brief\n\nhello<|end|>" in loaded.tokenizer.decode(tokens)


def test_the_template_can_be_turned_off_and_the_answer_begun(folder: Path) -> None:
    loaded = load(folder)
    plain = loaded.prompt_tokens(Prompt(text="hello", template=False), 8, 256)
    assert loaded.tokenizer.decode(plain) == "hello"
    begun = loaded.prompt_tokens(Prompt(text="hello", opening="<think>\n"), 8, 256)
    assert loaded.tokenizer.decode(begun).endswith("<|assistant|><think>\n")


def test_a_list_of_end_tokens_for_generation_is_heeded(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 3]}))
    assert load(folder).ends == {1, 3}
