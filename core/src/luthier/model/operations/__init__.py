"""The named operations of the engine: signatures, references, the choice among implementations, and where they go."""
