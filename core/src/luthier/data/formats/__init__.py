"""Formats: what the loss asks of rows, and the rows of each format in one form. The older files move in here later."""
