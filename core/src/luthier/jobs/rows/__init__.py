"""Rows: the recipe's data written as a service's files, and checked line by line before anything is sent."""
