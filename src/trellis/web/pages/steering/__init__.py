"""The pages of a session: start page, form of options, workbench."""
