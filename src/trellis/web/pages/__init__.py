"""HTML pages, one folder a feature."""
