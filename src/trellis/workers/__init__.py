"""Engines as the web process sees them: start one, ask it, stream its events, cancel, stop."""
