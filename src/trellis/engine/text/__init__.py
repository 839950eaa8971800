"""A language model in memory: loading, chat template, forward passes, adapters, decoding, chat batches."""
