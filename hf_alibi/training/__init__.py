"""Text to blocks, blocks to a trained model."""
