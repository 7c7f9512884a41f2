"""Evaluation of an encoder. Each evaluation set is a task: an object with `score(embed)`.

The modules:

    tasks                         what a task is, and what all tasks share
    sts, retrieval, triplets,     the kinds of tasks
    pair_classification,
    reranking, zero_shot,
    held_out, mteb
    rows, judged                  how their files are read
    geometry, ranking, metrics    numbers from vectors and from scores; `metrics` is for the library `evaluate`
"""
