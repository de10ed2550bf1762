"""Training what surgery changed: the data, the losses, the two stages, and their records."""
