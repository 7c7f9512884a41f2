"""The parts of a training, which `hf_embed.trainer` puts together.

The modules, in the order in which a run needs them:

    hub_trainer, checkpoint_trainer, guarded_trainer    the base classes of ContrastiveTrainer, each from the one before
    settings, inputs, rows, output                      checks of the settings, the other inputs, the rows, the output folder
    unused, mlm, teacher                                frozen parameters, the head for masked tokens, vectors of a teacher
    preview, watch, log_lines                           what a run tells its user
    stop, record, resume                                signals, what a checkpoint says of its run, whether a run may resume
"""
