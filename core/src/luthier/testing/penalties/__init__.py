"""Checks of penalties of the tokens, which are those of losses."""
