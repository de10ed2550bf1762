"""Reading and writing checkpoints without loading models: headers, indexes, byte ranges, journals."""
