"""Continual training: tasks one after the other in one adapter, and what of each is forgotten.

`start` reads a recipe, `tasks` holds what is to be trained, `slices` cuts one data set into runs, `earlier_rows` adds
rows of the tasks before, `sequence` trains and evaluates, `sequence_plan` tells beforehand what that would be,
`transfer` has the measures, `forgetting_report` writes them as a table, JSON and a picture.
"""
