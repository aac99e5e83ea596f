"""The contracts between the core and parts: protocols, values, and the names that both use."""
