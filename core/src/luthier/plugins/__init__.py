"""The plugin mechanism: hooks, records, the registry, and which parts go together. Imports no torch."""
