"""Verbs that use what was trained."""
