"""The folder in which a run trains, and the checkpoint from which it resumes: what `--output_dir` and its relatives mean."""

from pathlib import Path

from hf_embed.checkpoint.whole import check_whole, newest_whole
from hf_embed.errors import InputError
from hf_embed.files.disk import SAVING, check_folder
from hf_embed.files.safe_files import restore_folder
from hf_embed.kit import cli
from hf_embed.kit.overwrite import check_replaceable, is_unfinished, is_working, working_folder

LATEST = ("latest", "true", "True")  # values of --resume_from_checkpoint that mean the newest complete checkpoint


def settle_output_dir(flags: cli.Flags, name: str, made_anew: bool = False) -> cli.Flags:
    """Choose the folder in which the run trains, refuse a folder with another run, and find the checkpoint to resume from.

    The default folder is outputs/NAME. With `made_anew`, a run in the default folder is replaced without a flag. A run that
    replaces another one trains in a folder beside it (`hf_embed.kit.overwrite`). An unfinished run there also counts as another
    run.
    """
    given, resume = flags.values["output_dir"], flags.values["resume_from_checkpoint"] or None
    default = given in (None, "trainer_output")
    folder = Path(f"outputs/{name}" if default else given)
    overwrite = flags.values["overwrite_output_dir"] or (default and made_anew)
    check_folder(folder, "--output_dir")
    if is_working(folder):
        raise InputError(f"--output_dir {folder}: this form of name is reserved for unfinished runs; give another folder")
    restore_folder(folder)
    unfinished = working_folder(folder) if is_unfinished(folder) else None
    if resume and not flags.values["seeds"]:  # with --seeds, each seed has its own checkpoint
        resume = find_checkpoint(resume, unfinished or folder)
    filled = folder if holds_run(folder) else unfinished
    if filled and not (overwrite or resume):
        raise InputError(
            f"--output_dir {filled} holds another run; resume it with --resume_from_checkpoint, replace it with "
            "--overwrite_output_dir, or give another folder"
        )
    working = folder
    if resume and unfinished and (flags.values["seeds"] or Path(resume).resolve().parent == unfinished.resolve()):
        working = unfinished
    elif filled and not resume:
        check_replaceable(folder)
        working = working_folder(folder)
    repository = flags.values["hub_model_id"]
    if working != folder and flags.values["push_to_hub"]:  # its default is the name of the folder in which the run trains
        repository = repository or folder.absolute().name
    return flags.override(
        output_dir=str(working), resume_from_checkpoint=resume, overwrite_output_dir=overwrite, hub_model_id=repository
    )


def holds_run(folder: Path) -> bool:
    """Return True if a folder holds more than the logs of a run that ended before it saved anything."""
    return any(path.name != "runs" and not path.name.startswith(SAVING) for path in folder.glob("*"))


def find_checkpoint(given: str, folder: Path) -> str:
    """Return the checkpoint that `--resume_from_checkpoint` names. Without a name, return the newest complete checkpoint.

    Raises:
        InputError: if there is no checkpoint, or if the named one is damaged.
    """
    if given in LATEST:
        last = newest_whole(folder)
        if last is None:
            raise InputError(f"--resume_from_checkpoint: {folder} has no checkpoint-N folder; remove the flag to start a run")
        return str(last)
    if not Path(given, "trainer_state.json").is_file():
        raise InputError(f"--resume_from_checkpoint {given}: trainer_state.json does not exist; give a checkpoint-N folder")
    check_whole(Path(given))
    return given
