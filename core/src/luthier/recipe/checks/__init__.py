"""Checks of a whole recipe: settings and parts that contradict each other."""
