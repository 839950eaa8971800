"""A session: the tree of choices, the offer on the screen, and the work that each choice needs."""
