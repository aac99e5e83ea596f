"""Evaluation: the loss and the metrics over held-out rows."""
