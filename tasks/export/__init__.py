"""A registered model for other programs: its directory, GGUF, and a card that tells what it is."""
