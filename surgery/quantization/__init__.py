"""Rounding weights to few bits, and the file formats that hold them."""
