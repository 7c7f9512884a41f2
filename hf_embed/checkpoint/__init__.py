"""A model to a folder and back, and to the Hub: an ordinary checkpoint, with what sentence-transformers reads and a card."""
