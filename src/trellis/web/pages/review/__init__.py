"""The pages that look back on a session."""
