"""Checkpoint folders: which files are published, which problems are found before the upload, what stays private."""

import contextlib
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server.process import ALICE
from paths import CARDS
from small_checkpoints import small_checkpoint

from hf_skiprnn.commands import publish as publish_script
from hf_skiprnn.hub.folder import MODEL_CODE, checkpoint_files, checkpoint_problems, read_checkpoint
from hf_skiprnn.hub.private import KEYS, LONGEST_KEY, keys_in
from hf_skiprnn.hub.upload import publish


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("small") / "skip-lstm")


def broken(checkpoint: Path, folder: Path, name: str, change: Callable[[bytes], bytes | None]) -> list[str]:
    """Return the problems of a copy in which `change` was applied to a file; if it returns None the file is deleted."""
    for file in checkpoint_files(checkpoint):
        (folder / file.path).parent.mkdir(parents=True, exist_ok=True)
        (folder / file.path).write_bytes((checkpoint / file.path).read_bytes())
    path = folder / name
    content = change(path.read_bytes() if path.exists() else b"")
    path.unlink(missing_ok=True) if content is None else path.write_bytes(content)
    return checkpoint_problems(folder)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("model.safetensors", lambda b: None, "There are no weights"),
        ("model.safetensors", lambda b: b[:-9], "it is truncated"),
        ("model.safetensors", lambda b: b[:-4] + b"\0\0\xc0\x7f", "holds NaN"),
        ("config.json", lambda b: None, "config.json is missing"),
        ("config.json", lambda b: b[:-9], "config.json is not valid JSON"),
        ("config.json", lambda b: b.replace(b'"modeling', b'"bob/other--modeling'), "code in another repository"),
        ("config.json", lambda b: b'{"model_type": "skip_rnn"}', "names no code"),
        ("cells_skip_rnn.py", lambda b: None, "imports cells_skip_rnn.py, which is not in the folder"),
        ("pipeline_skip_rnn.py", lambda b: None, 'pipeline("image-classification") names pipeline_skip_rnn.Skip'),
        ("model.safetensors.index.json", lambda b: b'{"weight_map": {"a": "model-2.safetensors"}}', "names model-2"),
        ("results.json", lambda b: b'{"command": "train --dataset_name /home/al/x"}', "names folders or"),
        ("README.md", lambda b: b + ALICE.encode(), "README.md holds what looks like a Hugging Face token"),
        ("README.md", lambda b: b.replace(b"custom_code", b"code", 1), "tags must hold custom_code"),
    ],
)  # fmt: skip
def test_problems_are_found_before_anything_is_sent(
    checkpoint: Path, tmp_path: Path, name: str, change: Callable[[bytes], bytes | None], message: str
) -> None:
    assert checkpoint_problems(checkpoint) == []
    problems = broken(checkpoint, tmp_path / "copy", name, change)
    assert any(message in problem for problem in problems), problems
    with pytest.raises(ValueError, match="not ready for the Hub"):
        publish(tmp_path / "copy", "alice/never")


def test_what_training_leaves_behind_is_left_out(checkpoint: Path, tmp_path: Path) -> None:
    leftovers = ["checkpoint-7/model.safetensors", "training_args.bin", "runs/events.1", "run.json", "complete", ".x"]
    leftovers += ["token", ".netrc", "wandb/settings", "notes.txt", "mine.py", "secrets.json", "id_rsa", "train.csv"]
    broken(checkpoint, tmp_path, "optimizer.pt", lambda b: b"x")
    for name in leftovers:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found = read_checkpoint(tmp_path)
    assert found.files == checkpoint_files(checkpoint)
    assert found.left_out == sorted({name.split("/")[0] for name in (*leftovers, "optimizer.pt")})


@pytest.mark.parametrize("name", ["model.safetensors", "README.md", "steps-read-x.png", "cells_skip_rnn.py"])
def test_a_link_out_of_the_folder_is_not_followed(
    checkpoint: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever its name is: nothing in the linked file is read, listed or sent."""
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    (tmp_path / "private").write_text(f"private {ALICE}")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "private")
    (folder / "config-2.json").symlink_to(tmp_path / "private")  # not on the allow-list, so it is left out
    with opened(tmp_path) as paths:
        problems = checkpoint_problems(folder)
        assert publish_script.main([str(folder), "alice/never"]) == 1
    assert str(tmp_path / "private") not in paths
    said = "".join((*problems, *capsys.readouterr()))
    assert "is a link that leaves the folder" in said or "imports cells_skip_rnn.py, which is not in" in said
    assert "holds what looks like" not in said
    with pytest.raises(ValueError, match="not ready for the Hub"):
        publish(folder, "alice/never")


def test_a_link_within_the_folder_is_a_file(checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    (folder / "model.safetensors").rename(folder / "weights")
    (folder / "model.safetensors").symlink_to("weights")
    assert checkpoint_problems(folder) == []
    assert checkpoint_files(folder) == checkpoint_files(checkpoint)


EXAMPLES = [
    f"x={ALICE}",
    "-----BEGIN OPENSSH PRIVATE KEY-----",
    "aws AKIA" + "Q7" * 8,
    "ghp_" + "aB3" * 12,
    "glpat-" + "x1" * 10,
    "sk-ant-" + "aB3-" * 8,
    "AIza" + "a" * 35,
    "xoxb-1234567890-abc",
    'WANDB_API_KEY = "' + "0af3" * 10 + '"',
    "AccountName=a;AccountKey=" + "aB3+" * 21 + "==",
    "pypi-AgEIcHlwaS5vcmc" + "aB3_" * 20,
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4",
    "machine api.wandb.ai login user password " + "0af3" * 10,
    "postgres://me:secret@db.example/x",
    "https://a.example/x?sv=1&sig=" + "aB3%" * 10,
]
OTHER_FORMS = [
    "hf_oauth_" + "aB3" * 12,
    "-----BEGIN PGP PRIVATE KEY BLOCK-----",
    "PuTTY-User-Key-File-3: ssh-ed25519",
    "aws_secret_access_key = " + "aB3/" * 10,
    "ya29." + "aB3-" * 10,
    "npm_" + "aB3" * 12,
    "dckr_pat_" + "aB3_" * 6,
]


@pytest.mark.parametrize(("kind", "text"), list(zip(KEYS, EXAMPLES, strict=True)), ids=lambda text: text[:24])
def test_known_formats_of_keys_are_found_in_every_file(
    checkpoint: Path, tmp_path: Path, kind: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kind in keys_in(text.encode())
    assert keys_in(text.encode()[: len(text) // 2]) == []
    monkeypatch.setattr("hf_skiprnn.hub.folder.CHUNK", LONGEST_KEY)  # the key crosses the border of two chunks
    for name in ("README.md", "steps-read-x.png"):
        folder = shutil.copytree(checkpoint, tmp_path / name)
        with (folder / name).open("ab") as file:
            size = file.tell()
            file.write(b" " * ((-size) % LONGEST_KEY + LONGEST_KEY - len(text) // 2) + text.encode())
        assert any(
            problem.startswith(f"{name} holds what looks like {kind}") for problem in checkpoint_problems(folder)
        )


@pytest.mark.parametrize("text", OTHER_FORMS, ids=lambda text: text[:16])
def test_other_forms_of_the_same_keys(text: str) -> None:
    assert len(keys_in(f"x {text}\n".encode())) == 1
    assert keys_in(text[:8].encode()) == []


def test_no_key_is_seen_in_weights_code_or_cards(checkpoint: Path, tmp_path: Path) -> None:
    assert keys_in(random.Random(0).randbytes(2**22)) == []
    for path in (*MODEL_CODE.glob("*.py"), *CARDS.glob("*/*")):
        assert keys_in(path.read_bytes()) == [], path


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[list[str]]:
    """Collect the paths below `folder` that Python opens for reading."""
    paths: list[str] = []
    active = [True]

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if active and event == "open" and str(arguments[0]).startswith(str(folder)) and "r" in str(arguments[1]):
            paths.append(str(arguments[0]))

    sys.addaudithook(note)  # audit hooks cannot be removed
    yield paths
    active.clear()


def test_every_file_is_read_once(checkpoint: Path) -> None:
    """One reading serves checksums, the search for keys and all other checks."""
    with opened(checkpoint) as paths:
        found = read_checkpoint(checkpoint)
    settings = ("config.json", "preprocessor_config.json")  # read once more: they name the code of the checkpoint
    once = [name for name in paths if not name.endswith((*settings, ".py"))]
    assert len(once) == len(set(once)) == len([f for f in found.files if not f.path.endswith((*settings, ".py"))])
    assert max(map(paths.count, paths)) == 2
