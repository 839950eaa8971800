"""From choices to new weights: losses, the optimizer step, retraining, merging."""
