"""The JSON API, one file a feature."""
