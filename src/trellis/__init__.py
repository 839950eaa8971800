"""Trellis: a self-hosted studio in which people grow models by hand."""

__version__ = "0.1.0"
