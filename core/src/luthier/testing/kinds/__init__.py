"""Checks of each kind of part that runs in this process."""
