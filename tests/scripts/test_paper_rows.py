"""Every row of the paper's tables has a name and the paper's settings."""

import pytest

from hf_skiprnn.commands import train
from scripts.paper.rows import FILES, rows

# Rows of Tables 1 to 6 in the paper; Tables 4 and 5 give each for two lengths, an option here.
ROWS = {"table1": 10, "table2": 6, "table3": 16, "table4": 8, "table5": 10, "table6": 8}
TASKS = dict(zip(ROWS, ("adding", "mnist", "charades", "frequency", "imdb", "ucf101"), strict=True))
UNITS = {"imdb": 128, "ucf101": 512, "charades": 256}


def test_every_table_is_there():
    names = list(rows("paper"))
    assert {table: sum(name.startswith(table) for name in names) for table in ROWS} == ROWS
    assert len(names) == sum(ROWS.values())


@pytest.mark.parametrize("name", rows("paper"))
def test_a_row_has_the_papers_settings(name, tmp_path):
    (tmp_path / "ucfTrainTestlist").mkdir()
    (tmp_path / "ucfTrainTestlist" / "classInd.txt").write_text("1 A\n2 B\n")
    task = TASKS[name.split("-")[0]]
    where = ["--dataset_name", str(tmp_path)] if task == "ucf101" else []
    settings = train.parse(["--config", f"{FILES['paper']}:{name}", "--use_cpu", *where])
    config, args = settings.config, settings.args
    assert settings.task.name == task
    assert config.cell_type == ("gru" if "gru" in name else "lstm")
    assert config.hidden_size == UNITS.get(task, 110)
    assert config.num_hidden_layers == (2 if task in ("ucf101", "charades") else 1)
    assert args.learning_rate == 1e-4
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 256
    assert args.output_dir == f"runs/paper_rows-{name}"
    rest = name.partition("-")[2]
    if rest.startswith("skip"):
        assert (config.gate, config.budget_weight) == ("learned", float(rest.split("-", 2)[2]))
    elif "random" in rest:
        assert (config.gate, config.skip_probability) == (
            "random",
            float(rest.partition("random-")[2].replace("-", ".")),
        )
    else:
        assert config.gate == "always"
