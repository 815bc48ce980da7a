"""Choosing what weights are quantized to, and the calibrated methods that do it."""
