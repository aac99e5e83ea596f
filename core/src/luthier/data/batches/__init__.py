"""Batches: units as losses arrange them, and how their documents are laid out. The older files move in here later."""
