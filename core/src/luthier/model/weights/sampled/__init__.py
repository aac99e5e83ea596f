"""Samples of a model's weights, written in place of all where only the way of saving is tried."""
