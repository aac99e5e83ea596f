"""Verbs about jobs: submit one, follow it, and ask what providers offer."""
