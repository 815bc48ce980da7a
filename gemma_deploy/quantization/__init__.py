"""What a quantized weight is: its format in the weights file, and its codes."""
