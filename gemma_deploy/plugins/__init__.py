"""TensorRT plugins, one folder each."""
