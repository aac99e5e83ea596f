"""Checks of engines, and the questions that they are asked."""
