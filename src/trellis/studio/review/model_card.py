"""The README.md of an exported folder: a model card as on the Hugging Face Hub (pure)."""

from __future__ import annotations

from typing import Any, Literal

from ... import __version__
from ...options import Adapter
from ..steering import Node, Session, drift_of

Kind = Literal["adapter", "merged"]


def model_card(session: Session, node: Node, kind: Kind, name: str, checks: dict[str, Any]) -> str:
    """Return the model card: what a person who finds the folder must know."""
    config, path = session.config, session.tree.path(node.id)
    learned = [each for each in path if each.has_learned]
    adapter = config.extract(Adapter)
    base = config.model if "/" in config.model else f"the model “{config.model}”"
    library = "peft" if kind == "adapter" else "transformers"
    on_hub = [f"base_model: {config.model}"] if "/" in config.model else []
    front_matter = ["---", f"library_name: {library}", *on_hub, "tags: [trellis, steering]", "---"]
    system = [f"> {line}" for line in config.system_prompt.splitlines()]
    system_prompt_lines = ["System message for every prompt:", "", *system, ""] if system else []
    if kind == "adapter":
        load = [
            "from peft import PeftModel", "from transformers import AutoModelForCausalLM", "",
            'base = AutoModelForCausalLM.from_pretrained("path or name of the base model")',
            f'model = PeftModel.from_pretrained(base, "{name}")',
        ]  # fmt: skip
        checks_text = f"{checks.get('tensors', 0)} tensors, byte for byte those of the session."
    else:
        load = [
            "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
            f'model = AutoModelForCausalLM.from_pretrained("{name}")',
            f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        ]  # fmt: skip
        checks_text = (
            f"Saved in {checks.get('dtype')}, loaded again and compared with base model + adapter on "
            f"{checks.get('tokens')} answer tokens for {checks.get('prompts')} prompts. Log-probabilities differ by "
            f"{checks.get('mean_difference', 0):.2g} nats/token on average and "
            f"{checks.get('largest_difference', 0):.2g} at most; the top-1 token matches for "
            f"{checks.get('agreement', 0):.1%} of tokens. Generation settings, end-of-answer tokens "
            f"({', '.join(map(str, checks.get('ends', ()))) or 'none'}), chat templates and tokenizer are those of the "
            f"base model; {checks.get('conversations', 0)} test conversations render the same."
        )
    lines = [
        *front_matter, "", f"# {name}", "",
        f"Steered from {base} with Trellis {__version__}: {len(learned)} choices between answers, each learned "
        f"immediately. Session “{' '.join(session.name.split())}”, step {node.step}, drift "
        f"{drift_of(node, session.tree):.2%}.", "",
        "## Use", "", "```python", *load, "```", "",
        *system_prompt_lines,
        "## Training", "",
        f"- Base: `{config.model}`" + (f", revision `{config.revision}`" if config.revision else ""),
        *(
            [f"- Trained on the base model in {config.precision}; in full precision its answers differ slightly"]
            if config.precision in ("8-bit", "4-bit") else []
        ),
        f"- Adapter: LoRA, rank {adapter.lora_rank}, alpha {adapter.lora_alpha}, dropout {adapter.lora_dropout}, on "
        f"{adapter.target_modules}",
        f"- Learning: {config.learning_method}, rate {config.learning_rate}, KL penalty {config.kl_beta}",
        f"- Sampling: temperature {config.temperature}, top-p {config.top_p}, min-p {config.min_p}", "",
        "## Verification", "", checks_text, "",
        "The license of the base model applies.", "",
    ]  # fmt: skip
    return "\n".join(lines)
