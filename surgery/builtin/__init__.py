"""Tiny trained models that ship with the package, and the text they were trained on."""
