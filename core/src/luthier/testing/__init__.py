"""The conformance kit for plugin authors, and the tiny models that it and our own tests run on."""
