"""Check the documents: the printed tree, the Python blocks, and the options of commands."""

import fnmatch
import re
from pathlib import Path, PurePosixPath

import pytest
from checkout import run_python, tracked_files
from paths import ROOT

import hf_skiprnn_cli

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# Every file in these folders stands in the tree.
OPEN_FOLDERS = ("hf_skiprnn", "scripts")


def read_tree(text: str) -> dict[PurePosixPath, list[str]]:
    """Return what each folder lists in the fenced block below "## The tree"; the root is "."."""
    block = re.search(r"^## The tree\n.*?^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert block, 'there must be a fenced block below the heading "## The tree"'
    listed: dict[PurePosixPath, list[str]] = {}
    parents = [(-1, PurePosixPath())]  # (indentation, folder) from the root down to the folder that is being listed
    for line in block[1].splitlines():
        if not line.strip() or line.strip().startswith("# "):  # a line that is only a comment
            continue
        indent = len(line) - len(line.lstrip(" │├└─"))
        names = re.split(r"\s{2,}|\s#", line[indent:].rstrip())[0].split(", ")
        while parents[-1][0] >= indent:
            parents.pop()
        folder = parents[-1][1]
        listed.setdefault(folder, []).extend(names)
        if names[-1].endswith("/"):
            parents.append((indent, folder / names[-1]))
    return listed


def contents(folder: PurePosixPath, files: list[PurePosixPath]) -> set[str]:
    """Return the names of the tracked files directly in `folder` and, with a slash, of its folders."""
    inside = [path.relative_to(folder) for path in files if path.is_relative_to(folder)]
    return {path.parts[0] + ("/" if len(path.parts) > 1 else "") for path in inside}


def disagreements(listed: dict[PurePosixPath, list[str]], files: list[PurePosixPath]) -> list[str]:
    """Return the errors of a tree. A folder that lists anything must list everything; *.yaml stands for its files."""
    found = []
    for folder, names in listed.items():
        on_disk = contents(folder, files)
        patterns = [name for name in names if "*" in name and not name.endswith(".py")]
        covered = {name for name in on_disk if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)}
        found += [f"missing in the tree: {folder / name}" for name in sorted(on_disk - covered - set(names))]
        found += [f"not on disk: {folder / name}" for name in names if name not in on_disk and name not in patterns]
        found += [f"matches nothing: {folder / name}" for name in patterns if not fnmatch.filter(on_disk, name)]
    return found


def test_the_printed_tree_is_the_tree_on_disk() -> None:
    (text,) = [text for path in DOCUMENTS if "\n## The tree\n" in (text := path.read_text(encoding="utf-8"))]
    listed = read_tree(text)
    opened = {path.parent for path in tracked_files() if path.parts[0] in OPEN_FOLDERS}
    found = disagreements(listed, tracked_files())
    found += [f"lists nothing: {folder}/" for folder in sorted(opened - set(listed))]
    assert not found, "\n".join(found)


def test_a_wrong_tree_is_noticed() -> None:
    block = "b/   what\n    # a, comment\n├── c.py, d.py  # what\n└── e/\n    └── *.yaml\na.md\n"
    text = f"# x\n## The tree\n\n```\n{block}```\n"
    files = [PurePosixPath(name) for name in ("a.md", "b/c.py", "b/d.py", "b/e/1.yaml", "b/e/2.yaml")]
    assert disagreements(read_tree(text), files) == []
    assert disagreements(read_tree(text), files[1:]) == ["not on disk: a.md"]
    assert disagreements(read_tree(text), files[:3]) == ["not on disk: b/e", "matches nothing: b/e/*.yaml"]
    new = PurePosixPath("b/new.py")
    assert disagreements(read_tree(text), [*files, new]) == ["missing in the tree: b/new.py"]


# Blocks network access in this process. Child processes do not inherit it; environment variables keep them offline.
OFFLINE = """\
import sys

def refuse(event, arguments):
    if event == "socket.getaddrinfo" or event == "socket.connect" and isinstance(arguments[1], tuple):
        raise PermissionError(f"no network here: {event} {arguments}")

sys.addaudithook(refuse)
"""


RUN_BLOCKS = """
import os, pathlib, runpy

for path in sorted(pathlib.Path.cwd().glob("*.py")):
    folder = path.with_suffix("")
    folder.mkdir()
    (folder / "model_cards").symlink_to(os.environ["MODEL_CARDS"])
    os.chdir(folder)
    runpy.run_path(str(path), run_name="__main__")
"""


def python_blocks(text: str) -> dict[int, str]:
    """Return the code of every ```python block of a document, by the line of its fence."""
    found = re.finditer(r"^```python\b.*?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return {text[: block.start()].count("\n") + 1: block[1] for block in found}


def program(blocks: dict[int, str]) -> str:
    """Join blocks to one program in which every line keeps its number."""
    text = ""
    for line, code in blocks.items():
        text += "\n" * (line - text.count("\n")) + code
    return text


ONE_PROGRAM = ("from_lstm",)  # pages whose blocks build on each other
WITH_CODE = [path for path in DOCUMENTS if python_blocks(path.read_text(encoding="utf-8"))]


def test_the_readme_and_most_pages_show_code() -> None:
    assert {"README", "index", "own_data", "from_lstm", "training", "model", "inference"} <= {
        path.stem for path in WITH_CODE
    }


def test_code_in_the_documents_runs(tmp_path: Path) -> None:
    """Each block runs in a folder that only has model_cards. One process runs all, because an import takes seconds."""
    for document in WITH_CODE:
        blocks = python_blocks(document.read_text(encoding="utf-8"))
        for part in [blocks] if document.stem in ONE_PROGRAM else [{line: code} for line, code in blocks.items()]:
            name = tmp_path / f"{document.stem}-{min(part):04}.py"  # an error names the document and its line
            name.write_text(program(part), encoding="utf-8")
    run_python(OFFLINE + RUN_BLOCKS, tmp_path, MODEL_CARDS=str(ROOT / "model_cards"))


def test_network_is_refused_to_the_documents(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="no network here"):
        run_python(f"{OFFLINE}\nimport socket\nsocket.create_connection(('127.0.0.1', 9))", tmp_path)


OWN_COMMANDS = ("train", "evaluate", "export", "publish")
BENCHMARKS = sorted((ROOT / "scripts" / "benchmarks").glob("*.py"))
COMMAND = re.compile(
    r"(?:accelerate launch .*?|python )?"
    r"(?:scripts/(?P<script>\w+)\.py|-m (?P<module>scripts[\w.]+)|hf-skiprnn (?P<name>\w+))(?P<rest>.*)"
)


def options_of(*scripts: Path) -> set[str]:
    """Return the names of the options of scripts of this repository, from their source."""
    names: set[str] = set()
    for script in scripts:
        source = script.read_text(encoding="utf-8")
        names |= set(re.findall(r'"--([\w-]+)"', source))
        names |= {name for _, _, fields, _ in hf_skiprnn_cli.classes_in(script) for name in fields}
        if "train.py" in source or "HfArgumentParser" in source:  # unknown options are passed to training or a task
            names |= hf_skiprnn_cli.known_options("train", None)
    return names


def unknown_options(line: str) -> list[str]:
    """Return the options of a command line that its command does not have; [] if the command is not ours."""
    if (found := COMMAND.match(line)) is None:
        return []
    command = found["name"] or found["script"]
    if found["module"]:
        known = options_of(ROOT / f"{found['module'].replace('.', '/')}.py")
    elif command == "recipes":
        known = {"help"}
    elif command in hf_skiprnn_cli.COMMANDS:
        known = hf_skiprnn_cli.known_options(command, None)
    else:
        known = options_of(ROOT / "scripts" / f"{command}.py", *(BENCHMARKS if command == "benchmark" else ()))
    known = {name.replace("-", "_") for name in known}
    asked = re.findall(r"(?<!\S)--([\w-]+)", found["rest"].partition(" #")[0])
    return [name for name in asked if name.replace("-", "_") not in known]


def commands_in(text: str) -> list[str]:
    """Return the commands in a document: lines indented by four spaces, and code in sentences."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"^ {4}(\S.*)", prose, re.MULTILINE) + re.findall(r"`([^`\n]+)`", prose)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_in_the_documents_have_their_options_recipes_and_files(document: Path) -> None:
    commands = commands_in(document.read_text(encoding="utf-8"))
    options = set().union(*(hf_skiprnn_cli.known_options(name, None) for name in OWN_COMMANDS))
    recipes = hf_skiprnn_cli.recipes()
    for line in commands:
        assert not unknown_options(line)
        assert all(name in options for name in re.findall(r"^--(\w+)", line)), line
        assert all(name in recipes for name in re.findall(r"--config ([a-z][\w-]+-skip-\w+)", line)), line
        for name in re.findall(r"(?<!/)\bscripts[\w/.]*\w", line):
            path = f"{name.replace('.', '/')}.py" if line.startswith("python -m") else name
            assert (ROOT / path).exists(), line


def test_a_wrong_option_is_noticed() -> None:
    assert unknown_options("hf-skiprnn train --task digits --seeed 1  # --x") == ["seeed"]
    assert unknown_options("python scripts/publish.py runs/mine you/mine --dry-run") == []
    assert unknown_options("python -m scripts.paper.reproduce --table 1 --sheet 2") == ["sheet"]
    assert unknown_options("accelerate launch --config_file x.yaml scripts/train.py --tusk digits") == ["tusk"]
    assert unknown_options("pip install --no-such-option .") == []


def test_messages_in_troubleshooting_are_those_of_the_package() -> None:
    sources = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "hf_skiprnn").rglob("*.py"))]
    written = re.sub(r'"\n\s*f?"', "", "\n".join(sources))  # literals over several lines
    quoted = re.findall(r'^\| "(.*?)" \|', (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)
    parts = [part for text in quoted for part in re.split(r"\s*\.\.\.\s*| 0 (?=columns)", text)]
    assert len(parts) > 5
    assert not [part for part in parts if part not in written]


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
