"""Test what happens to runs that are killed, stopped, or given damaged files or a full disk. Results: docs/reliability.md.

    python benchmarks/reliability.py kills --count 200          # kill runs of all recipes at random times
    python benchmarks/reliability.py saves --count 40           # kill runs while they write files
    python benchmarks/reliability.py damage --count 60          # damage files of checkpoints, models and unfinished work
    python benchmarks/reliability.py disks --from-mb 1 --to-mb 40    # as root: train on disks with so much free space
    python benchmarks/reliability.py soak --minutes 30               # as root: kill, stop, and fill the disk of two ranks
    python benchmarks/reliability.py messages                        # time from a wrong input to the error message
    python benchmarks/reliability.py speed --against CHECKOUT        # compare the time of a step and of a save

Each command prints a summary and one line for every failure. Its exit status is 1 if there is a failure. Linux only.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, count in (("kills", 200), ("saves", 40), ("damage", 60)):
        command = commands.add_parser(name)
        command.add_argument("--count", type=int, default=count)
        command.add_argument("--seed", type=int, default=1)
        command.add_argument("--jobs", type=int, default=2, help="number of runs at a time")
        if name != "damage":
            command.add_argument("--cases", nargs="+", default=[], help="default: all")
    command = commands.add_parser("disks")
    for flag, value in (("--from-mb", 1), ("--to-mb", 40), ("--step", 2)):
        command.add_argument(flag, type=float, default=value)
    command = commands.add_parser("soak")
    command.add_argument("--minutes", type=float, default=30)
    command.add_argument("--seed", type=int, default=1)
    command = commands.add_parser("messages")
    command.add_argument("--only", nargs="+", default=[], metavar="WHAT")
    command = commands.add_parser("speed")
    command.add_argument("--against", required=True, metavar="CHECKOUT", help="another version of this repository")
    for flag, value in (("--steps", 60), ("--batch", 8), ("--rounds", 3)):
        command.add_argument(flag, type=int, default=value)
    for command in commands.choices.values():
        command.add_argument("--work", help="folder for the runs, which is kept; default: a temporary folder")
    args = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="reliability-", ignore_cleanup_errors=True) as folder:
        well = run(args, Path(args.work or folder).resolve())
    print(f"{args.command} took {time.perf_counter() - started:.0f} s")
    raise SystemExit(not well)


def run(args: argparse.Namespace, folder: Path) -> bool:
    folder.mkdir(parents=True, exist_ok=True)
    import reliability_damage
    import reliability_disks
    import reliability_kills
    import reliability_messages
    import reliability_soak
    import reliability_speed
    from reliability_runs import Runs

    if args.command in ("kills", "saves"):
        work = {"kills": reliability_kills.kills, "saves": reliability_kills.saves}[args.command]
        return work(Runs(folder), args.count, args.seed, args.jobs, args.cases)
    if args.command == "damage":
        return reliability_damage.damage(Runs(folder), args.count, args.seed, args.jobs)
    if args.command == "disks":
        return reliability_disks.disks(Runs(folder), args.from_mb, args.to_mb, args.step)
    if args.command == "soak":
        return reliability_soak.soak(folder, args.minutes, args.seed)
    if args.command == "messages":
        return reliability_messages.messages(folder, args.only)
    if args.command == "speed":
        return reliability_speed.speed(folder, args.against, args.steps, args.batch, args.rounds)
    raise LookupError(args.command)


if __name__ == "__main__":
    main()
