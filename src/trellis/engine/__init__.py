"""The engine: one process per loaded model. It owns no truth: all it holds can be read or computed again."""
