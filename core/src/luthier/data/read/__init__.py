"""Reading: files, tables and hub sets as rows. Needs no torch."""
