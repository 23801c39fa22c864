"""TensorFlow's own loops: Checkpoint and CheckpointManager."""
