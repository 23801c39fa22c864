"""Lightning: its CheckpointIO, and the stubs under the names that it gives."""
