"""The demo language model, its prompts, and the scripts that make them."""
