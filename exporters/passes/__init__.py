"""Rewrites of TensorRT graphs between export and engine, one per file."""
