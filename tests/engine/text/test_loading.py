"""Loading a folder: what can be wrong with one, each told apart, and prompts through the model's own template."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import make_llama, make_tokenizer
from trellis.engine.text.loaded_model import LoadedModel
from trellis.engine.text.loading import load_model
from trellis.errors import Invalid, LoadFailed
from trellis.messages import Load, Prompt

pytestmark = pytest.mark.engine


def load(path: Path, **options: Any) -> LoadedModel:
    steps = load_model(path, Load(path=str(path), **options))
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
    assert load(tiny_llama).info.fingerprint == load(tiny_llama).info.fingerprint
    assert load(tiny_llama).info.fingerprint != load(other).info.fingerprint


def test_a_prompt_goes_through_the_models_template(tiny_llama: Path) -> None:
    loaded = load(tiny_llama)
    tokens = loaded.tokenize_prompt(Prompt(text="Hello", system="Be kind."), 10, 256)
    text = loaded.tokenizer.decode(tokens)
    assert text == "<|system|>Be kind.<|end|><|user|>Hello<|end|><|assistant|>"
    assert loaded.tokenizer.decode(loaded.tokenize_prompt(Prompt(text="Hello"), 10, 256)).startswith("<|user|>")


def test_a_base_model_without_a_template_continues_the_prompt(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "base")
    shutil.rmtree(tmp_path / "base", ignore_errors=True)
    folder = make_llama(tmp_path / "base")
    for file in folder.glob("*chat_template*"):
        file.unlink()
    make_tokenizer(folder, template=None)
    loaded = load(folder)
    tokens = loaded.tokenize_prompt(Prompt(text="Once", system="A story."), 10, 256)
    assert loaded.tokenizer.decode(tokens) == "A story.\n\nOnce"


def test_a_written_answer_ends(tiny_llama: Path) -> None:
    loaded = load(tiny_llama)
    tokens = loaded.tokenize_answer("The sea.")
    assert tokens[-1] in loaded.end_tokens
    assert loaded.tokenizer.decode(tokens[:-1]) == "The sea."


@pytest.mark.parametrize("limit", [20, 100_000])
def test_a_prompt_must_leave_room_for_an_answer(tiny_llama: Path, limit: int) -> None:
    loaded: Any = load(tiny_llama)
    with pytest.raises(Invalid, match="does not fit") as raised:
        loaded.tokenize_prompt(Prompt(text="sea " * 600), 10, limit)
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
    assert load(folder, remote_code=True).info.architecture == "LlamaForCausalLM"


def test_files_that_the_index_does_not_name_are_not_read(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"other.weight": torch.zeros(3)}, folder / "consolidated.safetensors")
    assert load(folder).info.parameters > 10_000


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
    tokens = loaded.tokenize_prompt(Prompt(text="hello", system="be brief"), 8, 256)
    assert "<|user|>be brief\n\nhello<|end|>" in loaded.tokenizer.decode(tokens)


def test_the_template_can_be_turned_off_and_the_answer_begun(folder: Path) -> None:
    loaded = load(folder)
    plain = loaded.tokenize_prompt(Prompt(text="hello", template=False), 8, 256)
    assert loaded.tokenizer.decode(plain) == "hello"
    begun = loaded.tokenize_prompt(Prompt(text="hello", opening="<think>\n"), 8, 256)
    assert loaded.tokenizer.decode(begun).endswith("<|assistant|><think>\n")


def test_a_list_of_end_tokens_for_generation_is_heeded(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 3]}))
    assert load(folder).end_tokens == {1, 3}


def with_value(folder: Path, ending: str, value: float, kind: str = "float32") -> str:
    """Put one value into the middle of a tensor. Returns the tensor's name."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = {
        name: tensor.to(getattr(torch, kind)) for name, tensor in load_file(folder / "model.safetensors").items()
    }
    name = next(name for name in tensors if name.endswith(ending))
    tensors[name].view(-1)[tensors[name].numel() // 2 + 1] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return name


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("kind", "precision"), [("float32", "auto"), ("bfloat16", "16-bit"), ("float16", "auto")])
def test_weights_that_are_no_numbers_are_told_by_name(folder: Path, value: float, kind: str, precision: str) -> None:
    name = with_value(folder, "layers.1.mlp.up_proj.weight", value, kind)
    with pytest.raises(LoadFailed, match=name) as raised:
        load(folder, precision=precision)
    assert raised.value.code == "corrupt_file"
    assert "1 values" in raised.value.message


def test_the_largest_number_is_a_number(folder: Path) -> None:
    with_value(folder, "layers.1.mlp.up_proj.weight", 3e38)
    load(folder)


def test_a_mask_may_hold_infinite_values(folder: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    masked = {"model.layers.0.self_attn.masked_bias": torch.tensor(float("-inf"))}
    save_file(tensors | masked, folder / "model.safetensors", metadata={"format": "pt"})
    load(folder)


def test_a_token_without_a_row_is_refused_where_it_is_written(folder: Path) -> None:
    about = json.loads((folder / "tokenizer.json").read_text())
    token = {"id": 373, "content": "<pad>", "special": True, "normalized": False}
    about["added_tokens"].append(token | {"single_word": False, "lstrip": False, "rstrip": False})
    (folder / "tokenizer.json").write_text(json.dumps(about))
    loaded = load(folder)
    loaded.tokenize_prompt(Prompt(text="Hello"), 10, 256)
    with pytest.raises(Invalid, match="“<pad>”") as raised:
        loaded.tokenize_prompt(Prompt(text="What is <pad>?", template=False), 10, 256)
    assert raised.value.code == "unknown_token"
    templated = loaded.tokenize_prompt(Prompt(text="What is <pad>?"), 10, 256)  # where it is what was said, not a token
    assert 373 not in templated
    assert "What is <pad>?" in loaded.tokenizer.decode(templated)


@pytest.mark.parametrize(
    ("words", "room", "context", "way"),
    [
        (20, 500, 1024, "Shorten the prompt, or allow answers of at most 4"),  # the model has 512 positions
        (20, 90, 100, "use a longer context (at most 512)."),
        (2000, 90, 1024, "Shorten the prompt."),
    ],
)
def test_a_prompt_that_does_not_fit_names_what_can_work(
    tiny_llama: Path, words: int, room: int, context: int, way: str
) -> None:
    loaded = load(tiny_llama)
    with pytest.raises(Invalid) as raised:
        loaded.tokenize_prompt(Prompt(text="sea " * words), room, context)
    assert way in raised.value.next_step
    assert ("longer context" in raised.value.next_step) == (context < 512)


def test_a_fingerprint_is_of_what_matters_and_the_former_one_is_known(folder: Path) -> None:
    first = load(folder).info
    config = json.loads((folder / "config.json").read_text())
    changed = dict(reversed(list((config | {"transformers_version": "99.1", "_name_or_path": "x"}).items())))
    (folder / "config.json").write_text(json.dumps(changed))
    second = load(folder).info
    assert second.fingerprint == first.fingerprint
    assert second.former_fingerprint != first.former_fingerprint
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert load(folder).info.fingerprint != first.fingerprint


def test_a_session_from_before_goes_on_and_merges_under_its_former_name(folder: Path, tmp_path: Path) -> None:
    """Before, a fingerprint was over the bytes of config.json. These are the names that such a session has."""
    import hashlib

    from safetensors import safe_open

    from trellis.blobs import Blobs
    from trellis.engine.handlers import TextEngine
    from trellis.engine.text.stored_weights import _sample_values, fingerprints
    from trellis.messages import CreateAdapter, recipe_id, recipe_of
    from trellis.options import Adapter

    digest = hashlib.sha256((folder / "config.json").read_bytes())
    with safe_open(folder / "model.safetensors", framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118
            digest.update(name.encode() + _sample_values(tensors.get_tensor(name)))
    former = digest.hexdigest()[:32]
    plant = CreateAdapter(adapter=Adapter(lora_rank=4), seed=1)
    recipe = recipe_of(plant)
    assert "root" not in recipe
    root = recipe_id("w", {"model": former, **recipe})

    def planted(**options: Any) -> str:
        engine = TextEngine(Blobs(tmp_path / "weights"))
        run(engine.load(Load(path=str(folder))))
        weights: str = run(engine.create_adapter(plant.model_copy(update=options))).weights
        return weights

    assert planted(root=root) == root
    new = planted()
    assert new != root
    assert planted(root=new) == new
    assert planted(root="w" + "0" * 32) == new  # another model's: the studio compares, and refuses
    assert former in fingerprints(folder)
    assert load(folder).info.fingerprint in fingerprints(folder)


def run(steps: Any) -> Any:
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("tokenizer.json", {"version": "9.0"}),
        ("tokenizer.json", {"normalizer": {"type": "OfTheFuture"}}),
        ("tokenizer.json", {"truncation": "x"}),
        ("tokenizer_config.json", {"model_max_length": "x"}),
        ("tokenizer_config.json", {"tokenizer_class": 5}),
        ("config.json", {"dtype": "nonsense"}),
        ("config.json", {"num_hidden_layers": [2]}),
        ("config.json", {"rope_scaling": {"rope_type": "nonsense"}}),
        ("config.json", {"hidden_act": "nonsense"}),
    ],
)
def test_what_the_libraries_cannot_read_is_told_in_words(folder: Path, file: str, changes: dict[str, Any]) -> None:
    about = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(about | changes))
    with pytest.raises(LoadFailed) as raised:
        load(folder)
    assert raised.value.code in ("corrupt_file", "unsupported_architecture")
    assert raised.value.message.endswith(".")


def test_a_model_that_cannot_be_run_is_refused_at_load(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaForCausalLM

    def broken(*arguments: Any, **options: Any) -> None:
        raise AttributeError("'tuple' has no attribute 'dtype'")

    monkeypatch.setattr(LlamaForCausalLM, "forward", broken)
    with pytest.raises(LoadFailed, match="could not be run") as raised:
        load(folder)
    assert raised.value.code == "unsupported_architecture"
