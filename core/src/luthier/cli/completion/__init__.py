"""Completion in a shell: `word_table` keeps the words, `offers` chooses what fits, `commands` hands it to typer."""
