"""Everything in a checkpoint that is not weights: config, code, side files, card, lock."""
