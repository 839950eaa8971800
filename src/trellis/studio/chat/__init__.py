"""Rooms and messages, who can answer them, and external providers."""
