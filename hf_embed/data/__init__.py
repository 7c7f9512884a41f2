"""Read files and datasets, and turn them into training batches."""
