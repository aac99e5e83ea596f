"""Batches: units as losses arrange them, and how their documents are laid out."""
