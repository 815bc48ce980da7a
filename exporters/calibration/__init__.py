"""Running a checkpoint on text in float32, one layer in memory at a time."""
