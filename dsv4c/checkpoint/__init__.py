"""The original checkpoint format: names, number formats, a reader, a writer, and dummy weights."""
