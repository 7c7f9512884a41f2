"""Training data: how files and datasets become batches.

The modules, in the order in which the data flows:

    text_files, yaml_files, sources, python_rows    files, datasets on the Hub and Python objects become rows of text
    known_columns, columns, labeled, scores         which column holds what
    tokenization, cache                             rows become token ids, only once
    mixture, stream, source_files                   one source of rows or many, as tables or streams
    sampling, collator, loader                      the batches of a rank
    teacher_vectors                                 what a teacher model adds to a batch
"""
