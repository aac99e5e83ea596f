"""The work of a step around its loss: layout of units, checks of outputs, coupled losses."""
