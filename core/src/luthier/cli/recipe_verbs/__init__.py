"""Verbs that help to write recipes: a schema for editors, and a first recipe."""
