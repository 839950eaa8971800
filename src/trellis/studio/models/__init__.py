"""Which models there are, which are loaded, and what memory they may use."""
