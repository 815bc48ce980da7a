"""Checkpoint to bundle: the exported graphs, and the weights they point into."""
