"""Measuring models on text: where the text comes from, how the model is run, how results are kept for reuse."""
