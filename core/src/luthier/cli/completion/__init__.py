"""Completion in a shell: `word_table` stores the words, `offers` chooses what fits, `commands` passes it to typer."""
