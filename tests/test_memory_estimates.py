"""What a model needs, from the shapes in its files: experts are read into one tensor and stay in 16 bits."""

from __future__ import annotations

from trellis.memory_estimates import estimate_memory, model_shape
from trellis.options import SessionConfig

CONFIG = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 100}
ATTENTION = {f"model.layers.0.self_attn.{name}_proj.weight": [64, 64] for name in "qkvo"}
APART = {
    f"model.layers.0.mlp.experts.{number}.{name}.weight": shape
    for number in range(8)
    for name, shape in (("gate_proj", [32, 64]), ("up_proj", [32, 64]), ("down_proj", [64, 32]))
}
TOGETHER = {"model.layers.0.mlp.experts.gate_up_proj": [8, 64, 64], "model.layers.0.mlp.experts.down_proj": [8, 64, 32]}


def test_experts_are_not_quantised_however_they_are_stored() -> None:
    for experts in (APART, TOGETHER):
        shape = model_shape(CONFIG, ATTENTION | experts)
        assert shape.linear == 4 * 64 * 64
        assert shape.parameters - shape.linear == 8 * 3 * 64 * 32
        whole = estimate_memory(shape, SessionConfig(), "16-bit").weights
        assert estimate_memory(shape, SessionConfig(), "4-bit").weights > 0.7 * whole


def test_an_adapter_over_experts_is_counted_where_there_is_one() -> None:
    shape = model_shape(CONFIG, ATTENTION | TOGETHER)
    assert shape.expert_features == 8 * (64 + 64) + 8 * (64 + 32)
    every = estimate_memory(shape, SessionConfig(), "32-bit").adapter
    named = estimate_memory(shape, SessionConfig(target_modules="q_proj, v_proj"), "32-bit").adapter
    dropping = estimate_memory(shape, SessionConfig(lora_dropout=0.1), "32-bit").adapter
    assert named == dropping < every
    assert estimate_memory(shape, SessionConfig(target_modules="experts"), "32-bit").adapter == every


def test_a_convolution_is_no_expert() -> None:
    shape = model_shape(CONFIG, {"layers.0.mixer.conv1d.weight": [64, 1, 4], "layers.0.conv.weight": [64, 2, 3]})
    assert (shape.linear, shape.expert_features) == (0, 0)
