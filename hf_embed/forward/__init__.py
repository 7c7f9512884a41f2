"""The forward pass: how the texts of a batch go through a model.

The modules:

    chunking, packing, packed_attention    length-sorted chunks, each as one row without padding
    activations                            chunks whose activations are recomputed in the backward pass
    word_table, dropout                    one gradient of the word table in a step; faster masks
    check, exact                           whether a model gives the same vectors however its texts are laid out
"""
