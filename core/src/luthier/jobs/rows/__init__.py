"""Rows: the recipe's data as a service's files, checked line by line before anything is sent."""
