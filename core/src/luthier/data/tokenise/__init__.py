"""Tokenising: forms of rows become token examples, each one unit."""
