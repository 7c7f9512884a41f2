"""Short runs of the recipes on tiny data. Each run is a fork of this process, which has imported everything.

To start Python and PyTorch for each of hundreds of runs would take hours. A fork is safe only if this process computes nothing
and starts no threads. The forked process calls the recipe's `main` as the command line would.
"""

import ctypes
import hashlib
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ |= {
    "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
    "JE_ARROW_MALLOC_CONF": "background_thread:false", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg", "PYTHONWARNINGS": "ignore",
}  # fmt: skip

ROOT = Path(__file__).resolve().parents[1]
LONGEST = 300  # seconds; a run that takes longer counts as hung
TRAIN = (
    "--output_dir out --model_name_or_path DATA/model --eval_sts_file dev=DATA/dev.tsv --max_steps 20 "
    "--per_device_train_batch_size 8 --learning_rate 1e-3 --logging_steps 4 --max_length 24 "
    "--use_cpu --report_to none --disable_tqdm true"
)
RESUME = "--resume_from_checkpoint"
SAVE = "--save_strategy steps --save_steps 4 --save_total_limit 2"
BEST = "--eval_strategy steps --eval_steps 4 --save_strategy steps --save_steps 4 --save_total_limit 1 --load_best_model_at_end"
SUP = f"--train_file DATA/triplets.csv {TRAIN}"
UNSUP = f"--train_file DATA/sentences.txt {TRAIN}"
EARLIER = "--train_file DATA/triplets.csv " + TRAIN.replace("DATA/model", "DATA/small").replace("steps 20", "steps 8")
MODEL = ("model.safetensors", "config.json", "tokenizer.json", "modules.json", "1_Pooling/config.json")


@dataclass(frozen=True)
class Case:
    """A command line of a recipe, and the files that must be the same however often the run was interrupted."""

    name: str
    recipe: str
    words: str  # flags; DATA stands for the folder of the data; each run has its own current folder
    same: tuple[str, ...] = MODEL  # files in the output folder, or "" if the output is a file
    output: str = "out"
    checkpoints: bool = True  # whether the recipe has --resume_from_checkpoint
    earlier: bool = False  # whether the output folder holds a finished run of another model at the start
    replace: str = "--overwrite_output_dir"  # the flag that replaces an earlier output, if there is one


CASES = [
    Case("sup_simcse", "sup_simcse", f"{SUP} {SAVE} --pooling cls_mlp"),
    Case("best model", "sup_simcse", f"{SUP} {BEST} --pooling mean --normalize true"),
    Case("lora", "sup_simcse", f"{SUP} {SAVE} --pooling mean --lora_r 4 --save_adapter"),
    Case("unsup_simcse", "unsup_simcse", f"{UNSUP} {SAVE} --pooling cls_mlp_train"),
    Case("mlm", "unsup_simcse", f"{UNSUP} {SAVE} --pooling cls --mlm_weight 0.1"),
    Case("gte_pretrain", "gte_pretrain", f"--sources DATA/sources.yaml {TRAIN} {SAVE} --learn_temperature --pooling mean"),
    Case(
        "gte_finetune",
        "gte_finetune",
        f"--train_file DATA/pairs.jsonl {TRAIN} {SAVE} --gradient_caching --chunk_tokens 256 --pooling mean",
    ),
    Case(
        "seeds",
        "sup_simcse",
        f"{SUP} --max_steps 12 --save_strategy steps --save_steps 4 --save_total_limit 2 --pooling mean --seeds 1,2",
        same=(*MODEL, "seed-1/model.safetensors", "seed-2/model.safetensors"),
    ),
    Case("overwrite", "sup_simcse", f"{SUP} {SAVE} --pooling cls_mlp --overwrite_output_dir", earlier=True),
    Case(
        "seeds over a run",
        "sup_simcse",
        f"{SUP} --max_steps 8 --save_strategy steps --save_steps 4 --pooling cls --seeds 1,2 --overwrite_output_dir",
        same=(*MODEL, "seed-1/model.safetensors", "seed-2/model.safetensors"),
        earlier=True,
    ),
    Case(
        "ablation",
        "simcse_ablation",
        f"{UNSUP} --variants dropout 'delete one word' --seeds 1,2 --max_steps 8 --eval_steps 4 --pooling mean",
        same=("results.json",),
        checkpoints=False,
    ),
    Case("encode", "encode", "DATA/model DATA/many.txt out.npy", ("",), "out.npy", checkpoints=False, replace=""),
    Case(
        "mine_negatives",
        "mine_hard_negatives",
        "DATA/model --train_file DATA/more.jsonl --output_file out.jsonl --num_negatives 3",
        same=("",),
        output="out.jsonl",
        checkpoints=False,
        replace="",
    ),
    Case(
        "calibrate_tempscale",
        "tempscale",
        "DATA/model --pairs DATA/pairs.jsonl --grid 0.9 1.1 --output_dir out",
        checkpoints=False,
    ),
    Case(
        "tempscale over a model",
        "tempscale",
        "DATA/model --temperature 0.9 --output_dir out --overwrite_output_dir",
        checkpoints=False,
        earlier=True,
    ),
    Case(
        "length_collapse",
        "length_collapse",
        "DATA/model --texts DATA/long.txt --lengths 8 16 32 --output_dir out",
        same=("collapse.json",),
        checkpoints=False,
        replace="",
    ),
    Case(
        "pretrain_encoder",
        "pretrain_encoder",
        "--teacher DATA/model --train_file DATA/sentences.txt --output_dir out --teacher_layer 2 --vocab_size 300 "
        "--hidden_size 16 --num_layers 1 --num_heads 2 --max_length 64 --sentence_tokens 4000 --long_tokens 1000 "
        "--batch_tokens 512",
        same=("model.safetensors", "tokenizer.json"),
        checkpoints=False,
        replace="",
    ),
    Case(
        "pretrain_encoder of masked tokens",
        "pretrain_encoder",
        "--objective mlm --train_file DATA/sentences.txt --output_dir out --vocab_size 300 --hidden_size 16 --num_layers 1 "
        "--num_heads 2 --max_length 64 --sentence_tokens 4000 --long_tokens 1000 --batch_tokens 512",
        same=("model.safetensors", "tokenizer.json"),
        checkpoints=False,
        replace="",
    ),
    Case(
        "evaluate",
        "evaluate",
        "out --eval_sts_file dev=DATA/dev.tsv --output_dir out",
        same=(*MODEL, "results.json"),
        checkpoints=False,
        earlier=True,
        replace="",
    ),
]


# ---- data ----


def write_data(folder: Path) -> None:
    """Write small data files and two models of different width, made from the built-in texts and tokenizer."""
    import csv

    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    quickstart = ROOT / "hf_embed" / "quickstart"
    folder.mkdir(parents=True)
    with open(quickstart / "triplets.csv", newline="", encoding="utf-8") as file:
        header, *rows = list(csv.reader(file))
    with open(folder / "triplets.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows[:120]])
    sentences = (quickstart / "sentences.txt").read_text(encoding="utf-8").splitlines()
    long = [" ".join(sentences[i : i + 5]) for i in range(0, 300, 5)]
    for name, lines in (("sentences", sentences[:120]), ("many", sentences[:3000]), ("long", long)):
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    scored = (quickstart / "sts.tsv").read_text(encoding="utf-8").splitlines()[:25]
    (folder / "dev.tsv").write_text("\n".join(scored) + "\n", encoding="utf-8")
    for name, count in (("pairs", 120), ("more", 1200)):
        pairs = [json.dumps({"query": row[0], "positive": row[1], "negatives": [row[2]]}) for row in rows[:count]]
        lines = pairs if name == "pairs" else [json.dumps({"anchor": row[0], "positive": row[1]}) for row in rows[:count]]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "sources.yaml").write_text("- {name: first, file: pairs.jsonl}\n- {name: second, file: triplets.csv}\n")
    tokenizer = AutoTokenizer.from_pretrained(quickstart / "encoder")
    for name, width in (("model", 32), ("small", 16)):
        torch.manual_seed(width)
        model = BertModel(
            BertConfig(
                vocab_size=12000, hidden_size=width, num_hidden_layers=2, num_attention_heads=4, intermediate_size=2 * width,
                max_position_embeddings=66, pad_token_id=0, initializer_range=0.2,
            )
        )  # fmt: skip
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


# ---- processes ----


def load_recipe(name: str) -> ModuleType:
    sys.path.insert(0, str(ROOT))
    return importlib.import_module(f"recipes.{name}")


@dataclass
class Ended:
    """How a process ended."""

    code: int  # the exit status, or minus the number of the signal that killed the process
    seconds: float
    log: str

    @property
    def killed(self) -> bool:
        return self.code == -signal.SIGKILL

    @property
    def hung(self) -> bool:
        return self.killed and self.seconds >= LONGEST

    @property
    def refused(self) -> bool:
        """Return True if the process ended with a one-line error."""
        return self.code == 2 and "Traceback" not in self.log and bool(self.message)

    @property
    def message(self) -> str:
        """Return the line of the error, or "" if there is not exactly one."""
        errors = [line for line in self.log.splitlines() if line.startswith("error: ")]
        return errors[0] if len(errors) == 1 else ""

    @property
    def last(self) -> str:
        lines = [line for line in self.log.splitlines() if line.strip()]
        return lines[-1][:300] if lines else f"exit {self.code}, nothing printed"


def fork(work: Callable[[], Any], folder: Path, log: Path) -> int:
    """Call `work` in a forked process, in `folder`, with its output in the file `log`. Return the process id."""
    sys.stdout.flush()
    if (pid := os.fork()) != 0:
        return pid
    code = 1
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end with the parent process
        os.setpgid(0, 0)
        os.chdir(folder)
        printed = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(printed, 1)
        os.dup2(printed, 2)
        work()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def wait(pid: int, log: Path, kill_after: float = LONGEST) -> Ended:
    """Wait for the end of a forked process. Kill it and its process group after `kill_after` seconds."""
    started = time.perf_counter()
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        seconds = time.perf_counter() - started
        if done:
            text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
            return Ended(os.waitstatus_to_exitcode(status), seconds, text)
        if seconds >= kill_after:
            try:
                os.killpg(pid, signal.SIGKILL)
            except ProcessLookupError:  # it has not set its process group yet
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)


def call(work: Callable[[], Any], folder: Path, kill_after: float = LONGEST) -> Ended:
    """Call `work` in a forked process, and wait for its end."""
    log = folder / "log"
    return wait(fork(work, folder, log), log, kill_after)


def each(items: list, work: Callable[[Any, Path], dict], folder: Path, jobs: int) -> list[dict]:
    """Call `work(item, folder)` for each item in `jobs` processes, print a line for each, and return all results."""
    folder.mkdir(parents=True, exist_ok=True)

    def share(job: int) -> None:
        with open(folder / f"results-{job}.jsonl", "w", encoding="utf-8") as results:
            for number in range(job, len(items), jobs):
                own = folder / f"{job}"
                shutil.rmtree(own, ignore_errors=True)
                own.mkdir()
                found = work(items[number], own)
                print(f"[{number + 1}/{len(items)}] {found['line']}", flush=True)
                results.write(json.dumps(found) + "\n")
                results.flush()

    pids = []
    for job in range(jobs):
        sys.stdout.flush()
        if (pid := os.fork()) == 0:
            code = 1
            try:
                ctypes.CDLL(None).prctl(1, signal.SIGKILL)
                share(job)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        pids.append(pid)
    failed = [job for job, pid in enumerate(pids) if os.waitpid(pid, 0)[1]]
    lines = [line for job in range(jobs) for line in (folder / f"results-{job}.jsonl").read_text().splitlines()]
    found = [json.loads(line) for line in lines]
    if failed or len(found) != len(items):
        raise SystemExit(f"the harness itself failed: {len(found)} of {len(items)} runs have a result")
    return found


# ---- runs ----


class Runs:
    """The data, and for each case its calm run: the run without any interruption."""

    def __init__(self, folder: Path):
        self.folder, self.data, self.cases = folder, folder / "data", {}
        os.environ |= {"HF_HOME": str(folder / "hf_home")}
        import_everything()
        done = call(lambda: write_data(self.data), folder)
        if done.code:
            raise SystemExit(done.log)
        earlier = Case("earlier run", "sup_simcse", f"{EARLIER} {SAVE} --pooling mean --normalize true")
        self.calm(earlier)
        self.modules()

    def modules(self) -> None:
        """Import the modules that the last calm run imported, so that later runs do not have to import them."""
        for name in (self.folder / "modules").read_text().split():
            if name not in sys.modules and not name.startswith(("_", "recipes")):
                try:
                    importlib.import_module(name)
                except Exception:
                    continue
        if (threads := len(os.listdir("/proc/self/task"))) > 1:
            print(f"the process that is forked has {threads} threads, so a run may hang only because of that", file=sys.stderr)

    def calm(self, case: Case) -> Ended:
        """Run a case to its end, if it has not run yet. Its files are in `folder/calm/NAME`."""
        if case.name not in self.cases:
            folder = self.folder / "calm" / case.name
            self.prepare(case, folder)
            ended = call(lambda: (self.main(case, folder), self.note_modules()), folder)
            if ended.code:
                raise SystemExit(f"{case.name} fails even without an interruption:\n{ended.log[-3000:]}")
            self.cases[case.name] = ended
            print(f"{case.name}: {ended.seconds:.1f} s", flush=True)
        return self.cases[case.name]

    def note_modules(self) -> None:
        (self.folder / "modules").write_text("\n".join(sys.modules))

    def prepare(self, case: Case, folder: Path) -> None:
        """Make the folder of a run, with the earlier run in it if the case has one."""
        folder.mkdir(parents=True, exist_ok=True)
        if case.earlier:
            shutil.copytree(self.earlier, folder / "out")

    @property
    def earlier(self) -> Path:
        return self.folder / "calm" / "earlier run" / "out"

    def finished(self, case: Case) -> Path:
        """Return the output of the calm run."""
        return self.folder / "calm" / case.name / case.output

    def argv(self, case: Case, more: str = "") -> list[str]:
        return [word.replace("DATA", str(self.data)) for word in shlex.split(f"{case.words} {more}")]

    def main(self, case: Case, folder: Path, more: str = "") -> None:
        """Run a case in this process, as its command line would, with the cache of `datasets` in `folder`."""
        import datasets

        from hf_embed.kit.cli import run

        datasets.config.HF_DATASETS_CACHE = folder / "cache"
        sys.argv = [f"recipes/{case.recipe}.py", *self.argv(case, more)]
        run(load_recipe(case.recipe).main)

    def start(self, case: Case, folder: Path, more: str = "", kill_after: float = LONGEST) -> Ended:
        """Run a case in a forked process."""
        return call(lambda: self.main(case, folder, more), folder, kill_after)

    def saved(self, case: Case, folder: Path) -> list[str]:
        """Return the checkpoints of the run itself. A run that replaces an earlier run trains in a folder beside it."""
        place = f".{case.output}.new" if case.earlier else case.output
        return sorted(path.name for path in folder.glob(f"{place}/**/checkpoint-[0-9]*") if path.is_dir())

    def go_on(self, case: Case, folder: Path) -> tuple[Ended, str]:
        """Bring an interrupted case to its end, as a user would. Return how the process ended, and what the user had to do."""
        saved = self.saved(case, folder)
        ways = [("the same command", "")]
        if case.checkpoints and (saved or not case.earlier):  # without own checkpoints, the earlier run would be resumed
            ways = [("resumed", RESUME), ("started anew", "")]
        if case.replace and case.replace not in case.words:
            ways.append(("started anew", case.replace))
        for how, more in ways:
            ended = self.start(case, folder, more)
            if not ended.refused:
                return ended, how
            if how == "resumed" and saved:
                return ended, f"not resumed although {', '.join(saved)} is there"
            if how == "the same command" and "already exists" in ended.message:
                return Ended(0, ended.seconds, ended.log), "was finished"
        return ended, how

    def check(self, case: Case, folder: Path) -> list[str]:
        """Return what is wrong with a run that was resumed and has finished."""
        found = []
        for name in case.same:
            old, new = (place / name for place in (self.finished(case), folder / case.output))
            if not new.is_file():
                found.append(f"{name or case.output} is missing")
            elif not same_content(old, new):
                found.append(f"{name or case.output} differs")
        return found + [f"left behind: {path}" for path in leftovers(folder)]

    def standing(self, case: Case, folder: Path) -> list[str]:
        """Return what is wrong with the output folder now, if it holds neither the old model, nor the new one, nor nothing."""
        output, new, old = folder / case.output, self.finished(case), self.earlier if case.earlier else None
        if "model.safetensors" not in case.same:  # the output is not a model
            there = [name for name in case.same if (output / name).exists()]
            return [f"{name or case.output} is half written" for name in there if not same_content(new / name, output / name)]
        if old is None and not ((output / "model.safetensors").is_file() and (output / "config.json").is_file()):
            return []  # there is nothing to load yet
        sides: dict[str, set[str]] = {}
        for name in PIECES:
            piece = piece_of(output / name)
            if piece is None:
                continue
            of_new, of_old = piece_of(new / name), old and piece_of(old / name)
            same = {side for side, other in (("new", of_new), ("old", of_old)) if other == piece}
            if not same:
                sides.setdefault("neither", set()).add(name)
            elif len(same) == 1:
                sides.setdefault(same.pop(), set()).add(name)
        if old is not None and not (output / "model.safetensors").is_file():
            return ["the earlier model is gone and no new one is there"]
        if len(sides) > 1 or "neither" in sides:
            return ["a mixture: " + "; ".join(f"{side}: {', '.join(sorted(names))}" for side, names in sorted(sides.items()))]
        return []


PIECES = (*MODEL, "tokenizer_config.json", "sentence_bert_config.json", "config_sentence_transformers.json",
          "results.json", "README.md", "2_Normalize", "2_Dense/model.safetensors")  # fmt: skip
VOLATILE = re.compile(r"seconds|versions|hardware|settings|loss|\w*_runtime|\w*_per_second|evaluated|seeds?")


def piece_of(path: Path) -> str | None:
    """Return what identifies the run that wrote a file of a model folder, or None if the file does not exist."""
    if path.is_dir():
        return "there"
    if not path.is_file():
        return None
    content = path.read_bytes()
    if path.name == "README.md":
        steps = re.findall(rb"Training steps \| [\d,]+, with", content)
        return str(steps[0]) if steps else None if content else "torn"
    if path.name == "results.json":
        try:
            return json.dumps(without_times(json.loads(content)), sort_keys=True)
        except ValueError:
            return "torn"
    return hashlib.sha256(content).hexdigest()


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(entry) for key, entry in value.items() if not VOLATILE.fullmatch(key)}
    return [without_times(entry) for entry in value] if isinstance(value, list) else value


def same_content(old: Path, new: Path) -> bool:
    if old.suffix == ".json":
        try:
            return without_times(json.loads(old.read_bytes())) == without_times(json.loads(new.read_bytes()))
        except ValueError:
            return False
    return old.read_bytes() == new.read_bytes()


LEFT_BEHIND = re.compile(r"\.(saving|removing)-.*|\..*\.(new|old)|unfinished-.*|.*\.work|.*\.(tmp|partial)|tmp-checkpoint-.*")


def leftovers(folder: Path) -> list[str]:
    """Return the temporary files that killed processes left in a run's folder, except in the cache of `datasets`."""
    paths = [path.relative_to(folder) for path in folder.rglob("*") if "cache" not in path.relative_to(folder).parts]
    return [str(path) for path in paths if LEFT_BEHIND.fullmatch(path.name)]


def import_everything() -> None:
    """Import everything that runs use, with one thread."""
    import torch

    torch.set_num_threads(1)
    for name in ("sup_simcse", "unsup_simcse", "gte_pretrain", "gte_finetune", "simcse_ablation", "encode", "tempscale",
                 "mine_hard_negatives", "length_collapse", "pretrain_encoder", "evaluate"):  # fmt: skip
        load_recipe(name)
    for name in ("sentence_transformers", "matplotlib.pyplot", "peft", "pandas"):
        importlib.import_module(name)
