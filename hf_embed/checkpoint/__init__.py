"""Save an encoder to a folder, load it again, and upload it to the Hub.

A saved folder is an ordinary checkpoint, with the files that sentence-transformers reads and a model card. The modules:

    model_files, layout, settings    the files of a model, and the modules of sentence-transformers in them
    save, verify, load, onnx         a finished model
    whole, training_state            what a checkpoint of a running training has in addition
    tables, card, hub                results.json, the model card, the upload
"""
