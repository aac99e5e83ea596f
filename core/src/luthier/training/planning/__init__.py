"""Looks at a run before it begins: its plan, and whether one batch can be learnt."""
