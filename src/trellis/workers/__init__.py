"""Engines seen from the web side: start one, ask it, follow a stream of its events, cancel, stop."""
