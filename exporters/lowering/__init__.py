"""How the model's ops are written as ONNX nodes, one module per target."""
