"""Formats: what the loss demands of rows, and the rows of each format in one form."""
