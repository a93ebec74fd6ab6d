"""The console command `hf-skiprnn`: run a command, but report wrong input before PyTorch is imported.

Importing hf_skiprnn loads PyTorch and transformers, which takes seconds. So this module stands beside the package, uses
only the standard library, and reads the names of tasks, recipes and options from source files without importing them.
The commands in hf_skiprnn/commands then check their input in full.
"""

import ast
import csv
import difflib
import importlib
import re
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

COMMANDS = {
    "train": "train a model on a task or on your own data",
    "evaluate": "measure a checkpoint, and draw which steps it reads",
    "export": "write a checkpoint as an ONNX graph",
    "publish": "put a checkpoint on the Hugging Face Hub",
    "recipes": "list the recipes; with a name, print that one",
}
TASKS_EXTRA = {"datasets": "train", "accelerate": "train", "yaml": "train", "jinja2": "train", "sklearn": "train"}
EXTRAS = {  # command -> {module that it imports: extra of this package that installs it}
    "train": TASKS_EXTRA,
    "evaluate": TASKS_EXTRA | {"matplotlib": "figures"},
    "export": {"onnx": "export", "onnxscript": "export", "onnxruntime": "export"} | TASKS_EXTRA,
    "publish": TASKS_EXTRA,
}
# Dataclasses whose fields are options of every training.
TRAIN_CLASSES = ("SkipRNNConfig", "StartArguments", "BudgetArguments", "StoppingArguments", "TrainingArguments")
DATA_FILES = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".txt", ".arrow")
USAGE = "usage: hf-skiprnn COMMAND ...\n\n{commands}\n\n`hf-skiprnn COMMAND --help` tells more."
TRAIN_PAGE = """usage: hf-skiprnn train (--task TASK | --config RECIPE) [options]
       hf-skiprnn train --dataset_name DATA [options]                   your own data

Train a model that decides which steps to read.

  hf-skiprnn train --task digits                                       # 1 minute on a CPU, no download
  hf-skiprnn train --dataset_name my_folder --label_column activity    # your own data: a folder or Hub id
  hf-skiprnn train --config mnist-skip-gru --seed 1 --output_dir runs/mnist-1

tasks:   {tasks}
recipes: {recipes}
         Those named -paper have the paper's settings. `hf-skiprnn recipes NAME` prints one.

often used: --output_dir, --seed, --max_steps, --learning_rate, --hidden_size, --cell_type,
            --target_update_rate 0.3 (share of the steps to read), --dial 0.05 0.9 (one model for all shares),
            --model_name_or_path (fine-tune)
every option: hf-skiprnn train --task TASK --help (own data: --task own_data --help)"""


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit status; exit with a message if the input is wrong."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE.format(commands="\n".join(f"  {name:10}{text}" for name, text in COMMANDS.items())))
        return 0
    name, *options = argv
    if name not in COMMANDS:
        refuse(f"there is no command {name!r}.{did_you_mean(name, COMMANDS)} Commands: {', '.join(COMMANDS)}.")
    if name == "recipes":
        return show_recipes(options)
    if name == "train" and {"-h", "--help"} & set(options) and not (value_of(options, "task", "config")):
        print(TRAIN_PAGE.format(tasks=wrapped(tasks()), recipes=wrapped(recipes())))
        return 0
    check(name, options)
    status = importlib.import_module(f"hf_skiprnn.commands.{name}").main(options)
    if (torch := sys.modules.get("torch")) and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return status if isinstance(status, int) else 0


def refuse(message: str) -> None:
    """Print a message and exit with status 2."""
    print(f"hf-skiprnn: {message}", file=sys.stderr)
    raise SystemExit(2)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean ...?" with the closest of the known names; "" if none is close."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def show_recipes(names: list[str]) -> int:
    """Print the named recipes; without names, list all recipes."""
    if {"-h", "--help"} & set(names):
        print("usage: hf-skiprnn recipes [NAME ...]")
        return 0
    for name in names:
        if name not in recipes():
            refuse(f"there is no recipe {name!r}.{did_you_mean(name, recipes())} There are: {', '.join(recipes())}.")
        print(recipes()[name].read_text(encoding="utf-8"), end="")
    if not names:
        print("\n".join(recipes()))
    return 0


def check(command: str, options: list[str]) -> None:
    """Refuse unknown tasks, recipes, options, folders and columns, and extras that are not installed."""
    if command == "train":
        check_start(options)
        check_data(options)
    check_options(command, options)
    if command != "train" and options and not options[0].startswith("-"):
        check_folder(options[0], "checkpoint")
    missing = [module for module in EXTRAS[command] if find_spec(module) is None]
    if missing:
        extras = sorted({EXTRAS[command][module] for module in missing})
        refuse(f'{", ".join(missing)} not installed. Run: pip install "hf_skiprnn[{",".join(extras)}]"')


def check_start(options: list[str]) -> None:
    """Refuse a task or recipe that does not exist."""
    task, config, data = (value_of(options, name) for name in ("task", "config", "dataset_name"))
    if (task and config) or not (task or config or data):
        refuse(
            f"give either --task ({', '.join(tasks())}) or --config RECIPE (`hf-skiprnn recipes` lists them); "
            "for your own data, --dataset_name DATA."
        )
    if task and task not in tasks():
        hint = f" That is a recipe: --config {task}." if task in recipes() else did_you_mean(task, tasks())
        refuse(f"there is no task {task!r}.{hint} Tasks: {', '.join(tasks())}.")
    if config and config not in recipes() and not any(Path(n).is_file() for n in (config, config.rpartition(":")[0])):
        near = did_you_mean(Path(config).stem, recipes())
        refuse(f"there is no recipe {config}.{near} There are: {', '.join(recipes())}.")


def check_data(options: list[str]) -> None:
    """Refuse data in a single file, a folder that does not exist, and columns that its CSV files do not have."""
    data = value_of(options, "dataset_name")
    if not data:
        return
    path = Path(data)
    if path.is_file():
        refuse(
            f"{data} is a file; --dataset_name takes a folder or a Hub id. Put the file into a folder of its own:\n"
            f"  mkdir {path.stem} && cp {data} {path.stem}/train{path.suffix}\n"
            f"and give --dataset_name {path.stem}. Files named validation{path.suffix} and test{path.suffix} beside it "
            "are used as such; without them rows of train are held out."
        )
    check_folder(data, "data")
    columns = columns_of(path)
    for option in ("input_column", "label_column"):
        name = value_of(options, option)
        if name and columns and name not in columns:
            near = did_you_mean(name, columns)
            refuse(f"{data} has no column {name!r} (--{option}).{near} There are: {', '.join(columns)}.")


def check_folder(name: str, what: str) -> None:
    """Refuse a name that can only be a path and does not exist. OWNER/NAME may be a repository on the Hub."""
    path = Path(name).expanduser()
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or path.suffix in DATA_FILES
    if path.exists() or not (is_path or (path.parent != Path() and path.parent.is_dir())):
        return
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = did_you_mean(path.name, siblings)
    refuse(f"there is no {what} folder {name}.{near} Give a folder, or a Hub id as OWNER/NAME.")


def columns_of(folder: Path) -> list[str]:
    """Return the columns of a folder's CSV file of training rows; [] if there is no such file."""
    files = sorted(folder.glob("*.csv"), key=lambda file: ("train" not in file.name, file.name))
    if not files or any((folder / name).exists() for name in ("dataset_dict.json", "state.json")):
        return []
    with files[0].open(encoding="utf-8", newline="", errors="replace") as file:
        return next(csv.reader(file), [])


def check_options(command: str, options: list[str]) -> None:
    """Refuse options that neither the command nor its task has."""
    known = known_options(command, task_of(options) if command == "train" else value_of(options, "task"))
    for option in options:
        name = option.partition("=")[0].removeprefix("--").replace("-", "_")
        if option.startswith("--") and name not in known:
            near = did_you_mean(name, known)
            more = f" `hf-skiprnn {command} {'--task TASK ' * (command == 'train')}--help` lists every option."
            refuse(f"there is no option --{name}.{near}{more}")


def known_options(command: str, task: str | None) -> set[str]:
    """Return the names of a command's options. `task`: None or unknown gives the options of all tasks."""
    names = {"help"} | added_options(package() / "commands" / f"{command}.py")
    if command in ("train", "evaluate"):
        names |= tasks().get(task or "", set().union(*tasks().values()))
    if command == "train":
        names |= added_options(package() / "commands" / "train_options.py")
        files = [package() / "model" / "configuration_skip_rnn.py", package() / "commands" / "train_options.py"]
        files += (package() / "training").glob("*.py")
        transformers = find_spec("transformers")
        if transformers and transformers.origin:
            files.append(Path(transformers.origin).with_name("training_args.py"))
        for file in files:
            names |= {field for name, _, fields, _ in classes_in(file) if name in TRAIN_CLASSES for field in fields}
    return names | {f"no_{name}" for name in names}


def added_options(file: Path) -> set[str]:
    """Return the names of the options that a source file adds to a parser."""
    found = re.findall(r'add_argument\(\s*"--([\w-]+)"', file.read_text(encoding="utf-8"))
    return {name.replace("-", "_") for name in found}


@cache
def tasks() -> dict[str, set[str]]:
    """Return task name -> names of its options, including those of its base classes."""
    found = {}
    for file in sorted((package() / "tasks").rglob("*.py")):
        found.update({name: (bases, fields, task) for name, bases, fields, task in classes_in(file)})

    def fields_of(name: str) -> set[str]:
        bases, fields, _ = found.get(name, ((), (), None))
        return set(fields).union(*map(fields_of, bases))

    def is_task(name: str) -> bool:
        return name == "Task" or any(map(is_task, found.get(name, ((), (), None))[0]))

    named = {task: fields_of(name) for name, (_, _, task) in found.items() if task and is_task(name)}
    return dict(sorted(named.items()))


def classes_in(file: Path) -> Iterator[tuple[str, list[str], list[str], str | None]]:
    """Yield (class name, base classes, fields, value of its attribute `name`) for the classes in a source file."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
            fields = [
                part.target.id
                for part in node.body
                if isinstance(part, ast.AnnAssign)
                and isinstance(part.target, ast.Name)
                and "ClassVar" not in ast.unparse(part.annotation)
            ]
            named = [
                part.value.value
                for part in node.body
                if isinstance(part, ast.Assign)
                and isinstance(part.targets[0], ast.Name)
                and part.targets[0].id == "name"
                and isinstance(part.value, ast.Constant)
            ]
            yield node.name, bases, fields, str(named[0]) if named else None


def task_of(options: list[str]) -> str | None:
    """Return the task of a training; None if its recipe does not name one."""
    if task := value_of(options, "task"):
        return task
    if not (config := value_of(options, "config")):
        return "own_data"
    path = recipes().get(config, Path(config))
    found = re.search(r"^task:\s*(\w+)", path.read_text(encoding="utf-8"), re.MULTILINE) if path.is_file() else None
    return found[1] if found else None


def value_of(options: list[str], *names: str) -> str | None:
    """Return the value of the first of these options that is set; None if none is."""
    for place, option in enumerate(options):
        name, sign, value = option.partition("=")
        if name.startswith("--") and name[2:].replace("-", "_") in names:
            return value if sign else next(iter(options[place + 1 :]), None)
    return None


@cache
def recipes() -> dict[str, Path]:
    """Return the recipes of the package by name."""
    return {file.stem: file for file in sorted((package() / "commands" / "recipes").glob("*.yaml"))}


@cache
def package() -> Path:
    """Return the folder of hf_skiprnn, which is not imported."""
    found = find_spec("hf_skiprnn")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent


def wrapped(names: Iterable[str]) -> str:
    """Return names as lines of at most 110 characters, indented by nine to align behind a title."""
    lines = [""]
    for name in names:
        if len(lines[-1]) + len(name) > 100:
            lines.append("")
        lines[-1] += f"{name} "
    return "\n         ".join(line.strip() for line in lines)
