"""PyTorch: what a Checkpointer saves and restores, and whole models."""
