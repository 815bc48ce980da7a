"""Measuring models: a bundle, an engine and eager baselines, round by round."""
