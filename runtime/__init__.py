"""From a bundle or a checkpoint to text."""
