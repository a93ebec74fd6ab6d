"""Model cards: every number comes from the folder, the example code runs, and invalid metadata is found."""

import copy
import html
import json
import random
import re
import shutil
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import soundfile
import yaml
from datasets import Dataset
from huggingface_hub import ModelCard
from PIL import Image
from small_checkpoints import KINDS, small_checkpoint

from hf_skiprnn.evaluation.paper import ROWS, published_rows
from hf_skiprnn.evaluation.snippets import EXAMPLES
from hf_skiprnn.hub.card import (
    INSTRUCTION_SETS,
    MAIN_METRICS,
    data_fingerprint,
    gates_rivals,
    number,
    percent,
    render_card,
    task_page,
    write_card,
)
from hf_skiprnn.hub.card_checks import card_problems
from hf_skiprnn.hub.private import public
from hf_skiprnn.training.card import license_fields

NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)*(?:e[+-]?\d+)?(?![\w])")
SPEED_COLUMNS = "date,device,instruction_set,torch,python,hf_skiprnn,commit,level,cell,mode,batch,steps,inputs,units,"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("cards")
    made = {kind: small_checkpoint(root / kind, kind, staged=False) for kind in KINDS}
    for picture in ("steps-read-test.png", "operating-points-test.png"):
        (made["image"] / picture).write_bytes(b"\x89PNG")
    (root / "speed").mkdir()
    row = "2025-02-03,Some CPU (AVX512),avx512,2.13,3.11,0.1.0,abc1234,layer,lstm,inference,64,784,1,{},1,False,1,"
    row += "0.25,constant,ours"
    rows = [f"{row.format(6)},1.1,1.25,1.4,7.75,0.5", f"{row.format(99)},1.1,9.87,1.4,6.66,0.5"]
    whole = row.format(6).replace(",layer,", ",model,").replace("0.25,constant", "0.43,{}")
    rows += [f"{whole.format('image')},1.1,3.21,1.4,5.54,0.5", f"{whole.format('another')},1.1,3.33,1.4,4.44,0.5"]
    rows += [f"{whole.format('image')},1.1,4.56,1.4,2.89,0.5".replace("CPU (AVX512),avx512", "CPU (AVX2),avx2")]
    header = (
        f"{SPEED_COLUMNS}layers,sequence,threads,rate,spread,name,p20_ms,p50_ms,p80_ms,native_over_this,share_of_peak"
    )
    (root / "speed" / "cpu.csv").write_text("\n".join([header, *rows]) + "\n")
    write_card(made["image"])
    return made


def leaves(value: Any) -> Iterator[Any]:
    """Yield every value in nested dicts and lists."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else None
    if parts is None:
        yield value
    else:
        for part in parts:
            yield from leaves(part)


def numbers_in(text: str) -> set[str]:
    return set(NUMBER.findall(text))


def template() -> str:
    return files("hf_skiprnn.hub").joinpath("model_card_template.md").read_text("utf-8")


def sources(folder: Path) -> list[Any]:
    """Return all values that a card may show, except the template's, the task's docstring and the paper's rows."""
    found = list(leaves(json.loads((folder / "results.json").read_text())))
    found += leaves(json.loads((folder / "config.json").read_text()))
    if (folder / "preprocessor_config.json").exists():
        found += leaves(json.loads((folder / "preprocessor_config.json").read_text()))
    if (folder.parent / "speed" / "cpu.csv").exists():
        for cell in (folder.parent / "speed" / "cpu.csv").read_text().replace("\n", ",").split(","):
            found += [cell, float(cell)] if re.fullmatch(r"\d+\.\d+", cell) else [cell]
    for pareto in folder.parent.glob("*-pareto/results.json"):
        found += leaves(json.loads(pareto.read_text()))
    results = json.loads((folder / "results.json").read_text())
    return found + list(leaves(gates_rivals(folder.parent / "gates/results.json", results, main_metric(results))))


def main_metric(results: dict[str, Any]) -> str | None:
    return next((name for name in MAIN_METRICS if name in results["metrics"]["test"]), None)


def untraced(folder: Path, card: str) -> set[str]:
    """Return the numbers of a card that are in none of its sources."""
    results = json.loads((folder / "results.json").read_text())
    told = sources(folder)
    for row in published_rows(results["task"], results["model"]["cell_type"], results["task_options"]):
        told += [row.table, row.updates, row.updates_std, row.value, row.value_std, row.model]
    known = numbers_in(template()) | numbers_in(" ".join(task_page(results["task"])))
    known |= numbers_in(" ".join(example.lines for example in EXAMPLES.values()))
    for value in told:
        known |= numbers_in(number(value)) | numbers_in(str(value))
        if isinstance(value, float):
            known |= numbers_in(percent(value))
    # These numbers are in every card: the example's series has 50 steps and a batch of 1, the licence is apache-2.0.
    known |= numbers_in(" ".join(INSTRUCTION_SETS.values()))
    return numbers_in(card) - known - {"1", "50", "2.0"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_comes_from_the_folder(folders: dict[str, Path], kind: str) -> None:
    assert untraced(folders[kind], (folders[kind] / "README.md").read_text()) == set()


def test_numbers_follow_their_sources(folders: dict[str, Path], tmp_path: Path) -> None:
    """Replace every number in results.json by a random one: the card then shows only the new numbers."""
    folder = shutil.copytree(folders["image"], tmp_path / "image")
    results = json.loads((folder / "results.json").read_text())
    old = (folder / "README.md").read_text()
    draw = random.Random(4)

    def changed(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: changed(part) for name, part in value.items()}
        return draw.uniform(2, 9) * 1.0001 if isinstance(value, float) else value

    for group in ("metrics", "multiply_accumulates", "train", "training"):
        results[group] = changed(results[group])
    (folder / "results.json").write_text(json.dumps(results))
    new = render_card(folder)
    assert untraced(folder, new) == set()
    split = results["metrics"]["test"]
    for value in (split["accuracy"], split["updates"], split["updates_std"], results["train"]["seconds"]):
        assert number(value) in new
        assert number(value) not in old
    assert percent(split["update_rate"]) in new
    assert (
        yaml.safe_load(new.split("---")[1])["model-index"][0]["results"][0]["metrics"][0]["value"] == split["accuracy"]
    )


def test_a_number_from_nowhere_is_noticed(folders: dict[str, Path]) -> None:
    card = (folders["image"] / "README.md").read_text()
    assert untraced(folders["image"], card + "\nIt is 12345 times faster and 0.777 better.\n") == {"12345", "0.777"}


def test_the_paper_stands_beside_it(folders: dict[str, Path]) -> None:
    card = (folders["image"] / "README.md").read_text()
    assert "| **this model** | 0.9375 | 12.25 ± 3.5 (over sequences) | 24.5 % |" in card
    assert "| Skip LSTM, λ = 0.0001 (paper, Table 2) | 0.973 ± 0.002 | 379.4 ± 33.09 (over runs) |" in card
    assert "GRU" not in card
    regression = (folders["regression"] / "README.md").read_text()
    assert "| Skip LSTM, λ = 1e-05 (paper, Table 1) | solved | 26.95 ± 1.05 (over runs) |" in regression


def test_pictures_speed_and_data(folders: dict[str, Path]) -> None:
    card = (folders["image"] / "README.md").read_text()
    assert "![which steps it reads](steps-read-test.png)" in card
    assert " ![accuracy at other shares of the steps](operating-points-test.png)\n\n## Data\n" in card
    assert "Inference on one thread of Some CPU with AVX-512: 3.21 ms for 64 rows, 5.54 times as fast" in card
    assert "Inference on one thread of Some CPU with AVX2: 4.56 ms for 64 rows, 2.89 times as fast" in card
    assert "7.75" not in card  # a layer
    assert "4.44" not in card  # another checkpoint
    assert "Test split (10000 rows)" in card
    assert "/home/me" not in card
    other = (folders["text"] / "README.md").read_text()
    assert "one thread" not in other
    assert "![which steps" not in other


def test_metadata_as_the_hub_reads_it(folders: dict[str, Path]) -> None:
    wanted = {
        "image": ("image-classification", ["ylecun/mnist"]),
        "text": ("text-classification", ["stanfordnlp/imdb"]),
        "series": ("other", None),
    }
    for kind, (tag, ids) in wanted.items():
        data = ModelCard.load(folders[kind] / "README.md").data
        assert (data.library_name, data.license, data.pipeline_tag) == ("transformers", "apache-2.0", tag)
        assert data.datasets == ids
        assert "custom_code" in data.tags  # because save_pretrained copied the code into the folder
        by_type = {result.metric_type: result.metric_value for result in data.eval_results}
        assert by_type == {"accuracy": 0.9375, "update_rate": 0.245}
        assert data.model_name == kind


def code_of(card: str) -> str:
    (block,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return block


@pytest.mark.parametrize("kind", KINDS)
def test_the_code_runs(
    folders: dict[str, Path], kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = code_of((folders[kind] / "README.md").read_text())
    assert len(code.splitlines()) <= 8
    monkeypatch.chdir(folders[kind].parent)  # the example names the folder
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: [{"image": Image.new("L", (28, 28))}])
    soundfile.write("seven.wav", np.zeros(4000, np.float32), 8000)
    exec(compile(code, "README.md", "exec"), {})
    said = capsys.readouterr().out
    assert "torch.Size([1, 50, 3])" in said if kind == "frames" else "'updates':" in said


def test_the_card_of_a_real_run(tmp_path: Path) -> None:
    """scripts/train.py writes everything that a card needs."""
    from hf_skiprnn.commands import train

    folder = tmp_path / "digits"
    quiet = ["--use_cpu", "--disable_tqdm=true", "--report_to=none", "--eval_strategy=no", "--save_strategy=no"]
    train.main(["--task=digits", f"--output_dir={folder}", "--max_steps=2", "--load_best_model_at_end=false", *quiet])
    card = write_card(folder, "alice/digits").read_text()
    assert card_problems(card, folder) == []
    assert untraced(folder, card) == set()
    assert 'model="alice/digits"' in card
    assert "load_digits().images[0]" in card
    assert str(tmp_path) not in card
    assert "Test split (360 rows)" in card
    assert "license:" not in card  # no licence was chosen


def test_a_fact_that_every_card_tells_is_missing(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["image"], tmp_path / "image")
    results = json.loads((folder / "results.json").read_text())
    del results["versions"]
    (folder / "results.json").write_text(json.dumps(results))
    with pytest.raises(KeyError, match="versions"):
        render_card(folder)
    (folder / "results.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"results\.json"):
        render_card(folder)


def test_rivals_of_this_repository_stand_beside_it(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["image"], tmp_path / "image")
    (tmp_path / "mnist-pareto").mkdir()
    model = {"cell_type": "lstm", "gate": "strided", "stride": 7}
    run = {"model": model, "metrics": {"test": {"accuracy": 0.8181, "updates": 112.0, "update_rate": 0.1428}}}
    runs = {"strided": run, "ours": run | {"model": model | {"gate": "learned"}}}
    (tmp_path / "mnist-pareto/results.json").write_text(json.dumps(runs))
    card = render_card(folder)
    assert card.count("(measured here)") == 1
    assert "| LSTM, one step in 7 (measured here) | 0.8181 | 112 | 14.3 % |" in card
    assert untraced(folder, card) == set()
    test = json.loads((folder / "results.json").read_text())["metrics"]["test"]
    read = test["update_rate"] * 0.875
    row = {"task": "mnist", "kind": "strided", "share": 0.2, "value": 0.9}
    row |= {"updates": test["updates"] * 0.875, "read": read, "metric": "accuracy", "steps": 99}
    longer = row | {"updates": row["updates"] * 2, "kind": "plain", "share": 1.0}  # of sequences of another length
    rows = [row, row | {"value": 0.7}, longer, row | {"kind": "learned"}, row | {"task": "imdb"}]
    (tmp_path / "gates").mkdir()
    (tmp_path / "gates/results.json").write_text(json.dumps([*rows, row | {"kind": "plain", "share": 1.0}]))
    card = render_card(folder)  # these take the place of the others
    told = f"{number(row['updates'])} | {percent(read)} |"
    assert card.count("(measured here)") == 2
    assert f"| LSTM, one step in 5, mean of 2 runs of 99 steps (measured here) | 0.8 | {told}" in card
    assert f"| plain LSTM, one run of 99 steps (measured here) | 0.9 | {told}" in card
    assert untraced(folder, card) == set()
    for other in ('{"task": "mnist"}', "[1]", "{broken"):  # somebody's own folder of this name
        (tmp_path / "gates/results.json").write_text(other)
        assert "one step in 7 (measured here)" in render_card(folder)


@pytest.mark.parametrize("line", ["license: mit", "license: 'mit'", "license: mit # mine", "license: [mit]"])
def test_the_licence_of_a_card_is_read_as_yaml(tmp_path: Path, line: str) -> None:
    path = tmp_path / "README.md"
    assert license_fields(path) == {}
    path.write_text(f"---\nlibrary_name: x\n{line}\n---\n# A model\nlicense: other\n")
    assert license_fields(path) == {"license": "mit"}
    path.write_text("# A model\nlicense: mit\n")
    assert license_fields(path) == {}


def test_a_licence_is_what_somebody_chose(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["image"], tmp_path / "image")
    assert "license: apache-2.0" in render_card(folder)  # the licence of the existing card
    assert "license: mit" in render_card(folder, license_id="mit")
    own = "license: other\nlicense_name: quiet\nlicense_link: https://example.org/quiet\n"
    (folder / "README.md").write_text(f"---\n{own}---\n# A model\n")
    card = render_card(folder)
    assert own in card  # the Hub asks for all three
    assert "Licence of the weights: quiet" in card
    assert "license_name" not in render_card(folder, license_id="mit")
    (folder / "README.md").unlink()
    assert "icence of the weights" not in render_card(folder)
    assert "license:" not in render_card(folder)


def test_what_a_file_holds_is_shown_as_text(folders: dict[str, Path], tmp_path: Path) -> None:
    """Names of classes, options and the command cannot add HTML, links, pictures, table cells or code to a card."""
    folder = shutil.copytree(folders["image"], tmp_path / "image")
    evil = "<script>x()</script>|[a](b)![c](d)`e`\n\n# F\n</details>"
    results, config = (json.loads((folder / name).read_text()) for name in ("results.json", "config.json"))
    results["task_options"] |= {"split_seed": evil, evil: 1}
    results |= {"device": evil, "command": evil, "start": {"model_name_or_path": evil}}
    config["id2label"] = {0: evil, 1: "b", 2: "c"}
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "config.json").write_text(json.dumps(config))
    card = render_card(folder, 'x", model=print("run"), y="')
    prose = "\n".join(line for line in card.split("---\n", 2)[2].splitlines() if not line.startswith("    "))
    assert "<script" not in prose
    assert "</details>" not in prose
    assert "\n# F" not in prose
    assert "[a](b)" not in prose.replace("\\[", "")
    assert prose.count(html.escape("<script>")) >= 5
    assert 'model="x\\", model=print(\\"run\\"), y=\\""' in code_of(card)


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ("/home/me/My Data/x", "x"),
        ("~/a/b", "b"),
        ("~bob/x/y", "y"),
        ("$HOME/a/b", "b"),
        ("x --o=${HOME}/a/b %USERPROFILE%\\c", "x --o=b c"),
        ("x ../../home/bob/y ./../Users/bob/y", "x y y"),
        ({"/home/bob/x": 1}, {"x": 1}),
        (["/a/b", {"k": ("/c/d",)}], ["b", {"k": ["d"]}]),
        ("python x.py --o '/home/J D/runs/x' --y=/tmp/z --z=[/a/b,/c/d]", "python x.py --o x --y=z '--z=[b,d]'"),
        ("https://me:secret@host.org/a/b", "https://host.org/a/b"),
        ("token@host.org", "token@host.org"),
        ("git clone me:secret@host.org:x", "git clone host.org:x"),
        ("C:\\Users\\me\\x", "x"),
        ("file:///home/me/x", "x"),
        ("PATH:/home/me/b", "PATH:b"),
        ("it's in /home/me/x", "it's in x"),
        *[
            (same, same)
            for same in ("https://hf.co/a/b", "stanfordnlp/imdb", "runs/x", "../shared/x", "1/2 and a / b", 3.5, None)
        ],
    ],
)
def test_what_is_published_names_no_folder_user_or_password(value: Any, wanted: Any) -> None:
    assert public(value) == wanted


def test_fingerprints_are_of_the_content() -> None:
    rows = {"x": [[1.0, 2.0], [3.0, 4.0]], "image": [{"bytes": b"a", "path": "/here/a"}, {"bytes": b"b", "path": None}]}
    first = data_fingerprint(Dataset.from_dict(rows), "test")
    moved = copy.deepcopy(rows)
    moved["image"][0]["path"] = "/there/a"
    assert data_fingerprint(Dataset.from_dict(moved), "test") == first
    assert data_fingerprint(Dataset.from_dict(rows).select([0, 1]), "test") == first
    assert data_fingerprint(Dataset.from_dict(rows).select([1, 0]), "test")["sha256"] != first["sha256"]
    moved["x"][0][0] = 1.5
    assert data_fingerprint(Dataset.from_dict(moved), "test")["sha256"] != first["sha256"]
    assert (first["split"], first["rows"]) == ("test", 2)


def test_the_papers_rows() -> None:
    (row,) = [r for r in published_rows("mnist", "gru", {}) if r.gate == "learned"]
    assert (row.value, row.updates, row.updates_std, row.model) == (0.976, 392.62, 26.48, "Skip GRU, λ = 0.0001")
    assert len(published_rows("imdb", "lstm", {"length": 400})) == 5
    assert published_rows("imdb", "lstm", {"length": 300}) == []
    assert published_rows("digits", "lstm", {}) == []
    assert {row.table for row in ROWS} == {1, 2, 3, 4, 5, 6}


def edited(change: Callable[[dict[str, Any]], Any], card: str) -> str:
    """Return the card with changed metadata."""
    _, block, text = card.split("---\n", 2)
    metadata = yaml.safe_load(block)
    change(metadata)
    return f"---\n{yaml.safe_dump(metadata)}---\n{text}"


def metric_of(metadata: dict[str, Any]) -> dict[str, Any]:
    return metadata["model-index"][0]["results"][0]["metrics"][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(license=["mit"]), "license must be a word; got ['mit']"),
        (lambda m: m.update(pipeline_tag=3), "pipeline_tag must be a word; got 3"),
        (lambda m: m.update(library_name="hf_skiprnn"), "does not know how to load it; got 'hf_skiprnn'"),
        (lambda m: m.update(tags="skip"), "tags must be a list of words; got 'skip'"),
        (lambda m: m.update(tags=["a"]), "tags must hold custom_code"),
        (lambda m: m.update(datasets=["../shared/data/mnist"]), "ids of data sets on the Hub; got '../shared"),
        (lambda m: m.pop("model-index"), "model-index is missing"),
        (lambda m: m.update({"model-index": [{"results": []}]}), "each with a name"),
        (lambda m: m["model-index"][0].update(results=[]), "needs results"),
        (lambda m: m["model-index"][0]["results"][0].pop("task"), "task.type is missing"),
        (lambda m: m["model-index"][0]["results"][0]["dataset"].pop("name"), "dataset.name is missing"),
        (lambda m: m["model-index"][0]["results"][0].pop("metrics"), "metrics are missing"),
        (lambda m: metric_of(m).pop("type"), "a metric needs a type"),
        (lambda m: metric_of(m).pop("value"), "accuracy needs a value; got None"),
        (lambda m: metric_of(m).update(value=float("nan")), "accuracy is nan"),
    ],
)
def test_metadata_that_the_hub_would_refuse(
    folders: dict[str, Path], change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    card = (folders["image"] / "README.md").read_text()
    problems = card_problems(edited(change, card), folders["image"])
    assert any(message in problem for problem in problems), problems


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# no metadata\n", "must begin with metadata"),
        ("---\na: [\n---\n", "no plain YAML"),
        ("---\n- a\n---\n", "must be names with values; got list"),
        ("---\nvalue: !!python/object/apply:numpy.float64 [1]\n---\n", "no plain YAML"),
    ],
)
def test_blocks_that_are_no_metadata(text: str, message: str) -> None:
    (problem,) = card_problems(text)
    assert message in problem


def test_pictures_and_paths(folders: dict[str, Path]) -> None:
    card = (folders["image"] / "README.md").read_text()
    assert card_problems(card, folders["image"]) == []
    assert card_problems(card + "\n![x](none.png)\n", folders["image"]) == [
        "README.md shows none.png, which is not in the folder."
    ]
    assert card_problems(card + "\nIn /home/me/data.\n") == ["README.md names a path of a machine: /home/me/data."]


@pytest.mark.parametrize(
    ("budget", "told"),
    [
        ({"budget_loss": "cost", "budget_weight": 1e-4, "budget_target": None}, "trained with λ = 0.0001 per update."),
        (
            {"budget_loss": "l2", "budget_weight": 1e-6, "budget_target": 0.25},
            "trained with λ = 1e-06 on the l2 distance to 25.0 % of the steps.",
        ),
    ],
)
def test_the_budget_is_told(folders: dict[str, Path], tmp_path: Path, budget: dict[str, Any], told: str) -> None:
    folder = shutil.copytree(folders["image"], tmp_path / "image")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | budget))
    assert told in render_card(folder)
