"""The pages of chat and connections."""
