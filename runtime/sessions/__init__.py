"""One way to run a model per module, behind one protocol."""
