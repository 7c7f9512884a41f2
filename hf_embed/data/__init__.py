"""Training data: how files and datasets become batches."""
