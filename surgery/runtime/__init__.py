"""The code that travels: every other file here is copied byte for byte into checkpoints that need it."""
