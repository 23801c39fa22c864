"""What every framework shares: the C library as objects, a run's saves, how errors are told."""
