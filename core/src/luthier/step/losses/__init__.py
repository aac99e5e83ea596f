"""What a step does around its loss: layout of units, checks of outputs, coupled losses."""
