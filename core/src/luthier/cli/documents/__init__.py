"""The JSON documents of `--json`: their fields in `fields.txt`, and the JSON schemas that are made of them."""
