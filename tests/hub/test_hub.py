"""Publish and load checkpoints with the real Hub client and a local Hub, also with injected faults."""

import logging
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server.process import ALICE, ALICE_READS, BOB, HubClient
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from small_checkpoints import small_checkpoint, small_model
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    TrainingArguments,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # transformers' may need torchvision

from hf_skiprnn import SkipRNNForSequenceClassification, SkipRNNImageProcessor
from hf_skiprnn.commands import publish as publish_script
from hf_skiprnn.hub.folder import checkpoint_files
from hf_skiprnn.hub.upload import HubError, publish, verify_published
from hf_skiprnn.training.trainer import SkipRNNTrainer

# huggingface_hub passes large files to httpx2 with an argument name that httpx2 has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("small") / "skip-lstm")


@pytest.fixture
def repo_id(request: pytest.FixtureRequest) -> str:
    """The name of a repository that only this test uses."""
    return f"alice/{zlib.crc32(request.node.nodeid.encode()):x}"


def holds_exactly(hub: HubClient, repo_id: str, folder: Path, revision: str = "main") -> bool:
    there = hub.repo(repo_id, revision)["files"]
    there.pop(".gitattributes")
    return there == {file.path: file.sha256 for file in checkpoint_files(folder)}


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.flatten() for parameter in model.state_dict().values()])


def same(model: torch.nn.Module, folder: Path) -> bool:
    return torch.equal(weights(model), weights(SkipRNNForSequenceClassification.from_pretrained(folder)))


def test_published_whole_verified_and_tagged(hub: HubClient, checkpoint: Path, repo_id: str) -> None:
    done = publish(checkpoint, repo_id, version="v1.0")
    assert holds_exactly(hub, repo_id, checkpoint)
    state = hub.repo(repo_id)
    assert state["tags"] == {"v1.0": done.commit} == {"v1.0": state["branches"]["main"]}
    assert state["titles"] == ["Publish v1.0", "initial commit"]
    downloads = [path for origin, method, path, _ in hub.requests() if (origin, method) == ("storage", "GET")]
    assert downloads  # the uploaded files were downloaded to compare them
    again = publish(checkpoint, repo_id, version="v1.0")
    assert again.commit == done.commit
    assert hub.repo(repo_id)["titles"] == state["titles"]  # nothing changed, so no new commit


def test_a_new_checkpoint_is_a_new_version(hub: HubClient, checkpoint: Path, repo_id: str, tmp_path: Path) -> None:
    first = publish(checkpoint, repo_id, version="v1.0").commit
    other = small_checkpoint(tmp_path / "other", seed=1)
    with pytest.raises(HubError, match=r"version v1.0 with other files .* choose a new one"):
        publish(other, repo_id, version="v1.0")
    assert hub.repo(repo_id)["branches"]["main"] == first  # found out before anything was sent
    second = publish(other, repo_id, version="v2.0", branch="next").commit
    state = hub.repo(repo_id)
    assert state["tags"] == {"v1.0": first, "v2.0": second}
    assert state["branches"] == {"main": first, "next": second}
    for revision, folder in (("main", checkpoint), ("v1.0", checkpoint), ("next", other), (second, other)):
        hub.empty_caches()
        assert same(AutoModelForImageClassification.from_pretrained(repo_id, revision=revision), folder)
    with pytest.raises(OSError, match=r"v3\.0"):
        AutoModelForImageClassification.from_pretrained(repo_id, revision="v3.0")


def test_files_of_others_stay_unless_told(hub: HubClient, checkpoint: Path, repo_id: str) -> None:
    publish(checkpoint, repo_id)
    HfApi().upload_file(path_or_fileobj=b"mine", path_in_repo="notes.txt", repo_id=repo_id)
    with pytest.raises(HubError, match=r"not of this checkpoint: notes.txt. Delete them there, .* or use --delete"):
        publish(checkpoint, repo_id)
    publish(checkpoint, repo_id, delete=True)
    assert holds_exactly(hub, repo_id, checkpoint)


def test_the_script(hub: HubClient, tmp_path: Path, repo_id: str, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = small_checkpoint(tmp_path / "skip-lstm", staged=False)
    with pytest.raises(ValueError, match="names folders or users of a machine"):
        publish(checkpoint, repo_id)
    before = len(hub.requests())
    assert publish_script.main([str(checkpoint), repo_id, "--dry-run"]) == 0
    assert len(hub.requests()) == before
    said = capsys.readouterr().out
    size = (checkpoint / "model.safetensors").stat().st_size
    assert f"{size:,}  " in said
    assert "model.safetensors" in said
    assert said.endswith("dry run: nothing was sent\n")
    assert f'model="{repo_id}"' in said  # the card
    assert publish_script.main([str(checkpoint), repo_id, "--version", "v0.1", "--private"]) == 0
    state = hub.repo(repo_id)
    assert list(state["tags"]) == ["v0.1"]
    card = Path(snapshot_download(repo_id), "README.md").read_text()
    assert f'model="{repo_id}"' in card  # the card is this repository's
    assert "/home/me" not in Path(snapshot_download(repo_id), "results.json").read_text()


def test_the_script_refuses(
    hub: HubClient, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert publish_script.main([str(tmp_path / "nothing"), "alice/x"]) == 1
    assert "nothing is not a folder" in capsys.readouterr().err
    small_model("image").save_pretrained(tmp_path / "bare")
    assert publish_script.main([str(tmp_path / "bare"), "alice/x", "--dry-run"]) == 1
    assert "problem: README.md is missing." in capsys.readouterr().out
    hub.use_token(None)
    assert publish_script.main([str(checkpoint), "alice/x"]) == 1
    assert "There is no token. Run `hf auth login`" in capsys.readouterr().err


def test_metadata_that_the_hub_does_not_know_is_refused_before_anything_is_made(
    hub: HubClient, checkpoint: Path, tmp_path: Path, repo_id: str
) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    (folder / "README.md").write_text((folder / "README.md").read_text().replace("apache-2.0", "mine", 1))
    with pytest.raises(HubError, match=r"The Hub refuses README.md: .*license.* must be one of"):
        publish(folder, repo_id)
    with pytest.raises(RepositoryNotFoundError):
        HfApi().repo_info(repo_id)


def is_untouched(hub: HubClient, repo_id: str) -> bool:
    return hub.repo(repo_id)["titles"] == ["initial commit"]


def test_refused_upload_then_again(hub: HubClient, tmp_path: Path, repo_id: str) -> None:
    checkpoint = small_checkpoint(tmp_path / "own", seed=zlib.crc32(repo_id.encode()))  # new weights, or nothing is PUT
    with (
        hub.fault("PUT", "/lfs/", 403),
        pytest.raises(HubError, match="may not write to"),
    ):
        publish(checkpoint, repo_id)
    assert is_untouched(hub, repo_id)
    publish(checkpoint, repo_id)
    assert holds_exactly(hub, repo_id, checkpoint)


@pytest.mark.parametrize(
    ("method", "path", "action"),
    [
        ("PUT", "/lfs/", "drop"),
        ("PUT", "/lfs/", 503),
        ("POST", "/commit/", 503),
        ("POST", "/commit/", "lose answer"),
        ("POST", "/tag/", "lose answer"),
    ],
)
def test_what_passes_is_waited_for(
    hub: HubClient, tmp_path: Path, repo_id: str, method: str, path: str, action: Any
) -> None:
    checkpoint = small_checkpoint(tmp_path / "own", seed=zlib.crc32(repo_id.encode()))
    with hub.fault(method, path, action):
        done = publish(checkpoint, repo_id, version="v1")
    assert holds_exactly(hub, repo_id, checkpoint)
    state = hub.repo(repo_id)
    assert state["titles"] == ["Publish v1", "initial commit"]  # one commit, also where its answer was lost
    assert state["tags"] == {"v1": done.commit}


def test_a_hub_that_stays_broken_and_then_again(hub: HubClient, checkpoint: Path, repo_id: str) -> None:
    with (
        hub.fault("POST", "/commit/", 503, times=99),
        pytest.raises(HubError, match=r"answered 503 .*run the same command again"),
    ):
        publish(checkpoint, repo_id)
    assert is_untouched(hub, repo_id)
    publish(checkpoint, repo_id)
    assert holds_exactly(hub, repo_id, checkpoint)


def test_killed_while_uploading_then_again(hub: HubClient, checkpoint: Path, repo_id: str) -> None:
    code = f"from hf_skiprnn.hub.upload import publish; publish({str(checkpoint)!r}, {repo_id!r})"
    command = [sys.executable, "-c", code]
    with hub.fault("POST", "/commit/", "hang"):
        process = subprocess.Popen(
            command, env=hub.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        while process.poll() is None and not any(f"{repo_id}/commit/" in path for _, _, path, _ in hub.requests()):
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        error = process.communicate()[1]
    assert process.returncode == -signal.SIGKILL, error
    assert is_untouched(hub, repo_id)
    publish(checkpoint, repo_id)
    assert holds_exactly(hub, repo_id, checkpoint)


def test_parallel_pushes_leave_one_of_the_two_whole(hub: HubClient, tmp_path: Path, repo_id: str) -> None:
    folders = [small_checkpoint(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    HfApi().create_repo(repo_id)
    errors: list[BaseException] = []

    def push(folder: Path) -> None:
        try:
            publish(folder, repo_id)
        except HubError as error:
            errors.append(error)

    threads = [threading.Thread(target=push, args=(folder,)) for folder in folders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert [holds_exactly(hub, repo_id, folder) for folder in folders].count(True) == 1
    assert len(hub.repo(repo_id)["titles"]) == 3


def test_a_push_that_loses_against_another_starts_anew(hub: HubClient, checkpoint: Path, repo_id: str) -> None:
    with hub.fault("POST", "/commit/", 412):
        publish(checkpoint, repo_id)
    assert holds_exactly(hub, repo_id, checkpoint)
    with (
        hub.fault("POST", "/commit/", 412, times=99),
        pytest.raises(HubError, match="Others keep pushing"),
    ):
        publish(checkpoint, f"{repo_id}-2")


def test_what_comes_back_different_is_noticed(hub: HubClient, checkpoint: Path, repo_id: str) -> None:
    with (
        hub.fault("GET", "/lfs/", "corrupt"),
        pytest.raises(HubError, match=r"differ from those sent: model.safetensors has SHA-256 \w+..., expected"),
    ):
        publish(checkpoint, repo_id)


def test_a_truncated_download_is_completed(hub: HubClient, checkpoint: Path, repo_id: str) -> None:
    publish(checkpoint, repo_id)
    with hub.fault("GET", "/lfs/", "truncate"):
        assert same(AutoModelForSequenceClassification.from_pretrained(repo_id), checkpoint)


def test_a_warm_cache_needs_no_server(
    hub: HubClient, checkpoint: Path, repo_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(checkpoint, repo_id)
    AutoModelForSequenceClassification.from_pretrained(repo_id)
    hub.lose_server()
    assert same(AutoModelForSequenceClassification.from_pretrained(repo_id), checkpoint)
    with pytest.raises(HubError, match="cannot be reached"):
        publish(checkpoint, repo_id)
    hub.offline()
    assert same(AutoModelForSequenceClassification.from_pretrained(repo_id), checkpoint)
    hub.empty_caches()
    with pytest.raises(OSError, match=r"offline|connect"):
        AutoModelForSequenceClassification.from_pretrained(repo_id)


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (None, "There is no token. Run `hf auth login`, or set HF_TOKEN"),
        ("hf_" + "x" * 34, "does not know this token"),
        (ALICE_READS, r"may not write to alice/.*role 'write'"),
        (BOB, "may not write to alice/"),
    ],
)
def test_tokens_that_cannot_publish(
    hub: HubClient, checkpoint: Path, repo_id: str, token: str | None, message: str
) -> None:
    HfApi().create_repo(repo_id)
    hub.use_token(token)
    with pytest.raises(HubError, match=message) as caught:
        publish(checkpoint, repo_id)
    assert token is None or token not in str(caught.value)
    assert is_untouched(hub, repo_id)


def test_private_repositories(hub: HubClient, checkpoint: Path, repo_id: str) -> None:
    publish(checkpoint, repo_id, private=True)
    assert same(AutoModelForSequenceClassification.from_pretrained(repo_id), checkpoint)
    for token in (None, BOB):
        hub.use_token(token)
        hub.empty_caches()
        with pytest.raises(OSError, match=r"not a valid model identifier|private"):
            AutoModelForSequenceClassification.from_pretrained(repo_id)
        with pytest.raises(HubError, match=r"alice/\w+ does not exist, or it is private"):
            verify_published([], repo_id, "main")


def test_gated_repositories(hub: HubClient, checkpoint: Path, repo_id: str) -> None:
    publish(checkpoint, repo_id)
    HfApi().update_repo_settings(repo_id, gated="manual")
    hub.use_token(BOB)
    with pytest.raises(OSError, match="gated"):
        AutoModelForSequenceClassification.from_pretrained(repo_id)
    with pytest.raises(GatedRepoError):
        snapshot_download(repo_id)
    with pytest.raises(HubError, match=r"is gated. Request access"):
        verify_published([], repo_id, "main")
    hub.use_token(ALICE)
    assert same(AutoModelForSequenceClassification.from_pretrained(repo_id), checkpoint)


def test_push_to_hub_and_subfolders(hub: HubClient, checkpoint: Path, repo_id: str, tmp_path: Path) -> None:
    model = SkipRNNForSequenceClassification.from_pretrained(checkpoint)
    model.push_to_hub(repo_id, private=True)
    assert same(AutoModelForSequenceClassification.from_pretrained(repo_id), checkpoint)
    assert "pipeline_skip_rnn.py" in hub.repo(repo_id)["files"]
    HfApi().upload_folder(repo_id=repo_id, folder_path=checkpoint, path_in_repo="models/small")
    inner = AutoModelForImageClassification.from_pretrained(repo_id, subfolder="models/small")
    assert same(inner, checkpoint)
    assert AutoConfig.from_pretrained(repo_id, subfolder="models/small").hidden_size == 6


def trainer_that_pushes(folder: Path, repo_id: str, **options: Any) -> SkipRNNTrainer:
    args = TrainingArguments(
        output_dir=str(folder),
        push_to_hub=True,
        hub_model_id=repo_id,
        max_steps=2,
        save_steps=1,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
        **options,
    )
    rows = [{"pixel_values": torch.rand(1, 3, 3), "labels": torch.tensor(i % 3)} for i in range(8)]
    return SkipRNNTrainer(
        small_model("image"), args, train_dataset=rows, processing_class=SkipRNNImageProcessor(num_channels=1)
    )


def test_a_trainer_that_pushes(hub: HubClient, repo_id: str, tmp_path: Path) -> None:
    trainer = trainer_that_pushes(tmp_path / "run", repo_id, hub_strategy="all_checkpoints", hub_private_repo=True)
    trainer.train()
    trainer.push_to_hub()
    assert torch.equal(weights(trainer.model), weights(AutoModelForSequenceClassification.from_pretrained(repo_id)))
    assert AutoImageProcessor.from_pretrained(repo_id).num_channels == 1
    there = hub.repo(repo_id)["files"]
    assert {"README.md", "modeling_skip_rnn.py", "checkpoint-1/model.safetensors", "training_args.bin"} <= set(there)
    assert hub.places_of(ALICE) == []


def test_every_pushed_step_holds_its_own_weights(hub: HubClient, repo_id: str, tmp_path: Path) -> None:
    trainer = trainer_that_pushes(tmp_path / "run", repo_id, hub_always_push=True)
    trainer.train()
    commits = HfApi().list_repo_commits(repo_id)
    assert [commit.title for commit in commits][:2] == [f"Training in progress, step {step}" for step in (2, 1)]
    for step, commit in zip((2, 1), commits, strict=False):
        pushed = AutoModelForSequenceClassification.from_pretrained(repo_id, revision=commit.commit_id)
        assert same(pushed, tmp_path / "run" / f"checkpoint-{step}")


def test_a_push_that_failed_in_the_background_surfaces(hub: HubClient, repo_id: str, tmp_path: Path) -> None:
    trainer = trainer_that_pushes(tmp_path / "run", repo_id)
    with (
        hub.fault("POST", "/commit/", 503, times=99),
        pytest.raises(
            RuntimeError, match=r"(?s)Training is done .* pushes to alice/\w+ failed.*503.*push_to_hub\(\) again"
        ),
    ):
        trainer.train()
    assert trainer.state.global_step == 2
    trainer.push_to_hub()
    assert torch.equal(weights(trainer.model), weights(AutoModelForSequenceClassification.from_pretrained(repo_id)))


# Last: everything above went through the same server.


def test_the_token_is_nowhere(
    hub: HubClient, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    checkpoint = small_checkpoint(tmp_path / "own", seed=9)
    publish(checkpoint, "alice/searched", version="v1")
    assert caplog.records
    logged = "".join((caplog.text, *capfd.readouterr()))
    assert hub.places_of("SkipRNNConfig")  # the search finds what is there
    for token in (ALICE, ALICE_READS, BOB):
        assert hub.places_of(token) == []
        holders = [path for path in tmp_path.rglob("*") if path.is_file() and token.encode() in path.read_bytes()]
        assert not holders
        assert token not in logged
    assert any(origin == "hub" and authorized for origin, _, _, authorized in hub.requests())
    assert not any(origin == "storage" and authorized for origin, _, _, authorized in hub.requests())
