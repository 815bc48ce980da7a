"""Torch ops of exported graphs; importing a module registers its op."""
