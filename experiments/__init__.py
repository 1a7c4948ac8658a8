"""What a user runs (train, layer, comm, compare) and what those four share."""
