"""ResumableLoader: a DataLoader whose position is part of the checkpoint."""
