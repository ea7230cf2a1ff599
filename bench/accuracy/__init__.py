"""What bench_accuracy.py prunes: one file per kind of model, over the grid of what all are pruned by."""
