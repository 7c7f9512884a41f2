"""Save an encoder to a folder, load it again, and upload it to the Hub.

A saved folder is an ordinary checkpoint, with the files that sentence-transformers reads and a model card.
"""
