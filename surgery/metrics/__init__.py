"""Numbers that plans, cards and benchmarks share."""
