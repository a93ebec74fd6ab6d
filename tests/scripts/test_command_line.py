"""The command line: quick answers to wrong input, the help of every task, settings from recipes and options."""

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from paths import CARDS, ROOT, SCRIPTS
from safetensors.torch import load_file
from torch import equal

import hf_skiprnn_cli
from hf_skiprnn import SkipRNNConfig, SkipRNNForSequenceClassification
from hf_skiprnn.commands import evaluate, option_parser, train
from hf_skiprnn.commands.recipe_files import RECIPES, read_recipe
from hf_skiprnn.evaluation.paper import ROWS
from hf_skiprnn.tasks import TASKS
from hf_skiprnn.tasks.readers.words import train_tokenizer

ALL_RECIPES = sorted(RECIPES.glob("*.yaml"))
CPU = ["--use_cpu", "true"]
HEAVY = ("torch", "transformers", "datasets", "hf_skiprnn")


def refusal(capsys, call, *arguments):
    """Return the exit status and error message of a command that refuses its arguments."""
    with pytest.raises(SystemExit) as stopped:
        call(list(arguments))
    assert stopped.value.code != 0
    return f"{stopped.value.code} {capsys.readouterr().err}"


def command(*arguments, **kwargs):
    """Run `hf-skiprnn` in a new process; it prints to stderr which heavy modules it imported."""
    code = (
        "import atexit, sys; from hf_skiprnn_cli import main; "
        f"atexit.register(lambda: print('imported:', {set(HEAVY)} & set(sys.modules), file=sys.stderr)); "
        f"sys.exit(main({list(arguments)!r}))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment, **kwargs
    )


def test_wrong_input_is_answered_at_once_and_without_a_traceback(capsys, tmp_path, monkeypatch):
    (tmp_path / "reviews.csv").write_text("text,sentiment\ngood,1\n")
    (tmp_path / "reviews").mkdir()
    (tmp_path / "reviews/train.csv").write_text("text,sentiment\ngood,1\n")
    monkeypatch.chdir(tmp_path)
    cases = {
        ("trian",): "no command 'trian'. Did you mean 'train'?",
        ("recipes", "digit-skip-lstm"): "no recipe 'digit-skip-lstm'. Did you mean 'digits-skip-lstm'?",
        ("train",): "give either --task (adding, charades,",
        ("train", "--task=digits", "--config=x.yaml"): "give either --task",
        ("train", "--task", "digit"): "no task 'digit'. Did you mean 'digits'?",
        ("train", "--task", "digits-skip-gru"): "That is a recipe: --config digits-skip-gru.",
        ("train", "--config", "mnist-skip-lst"): "no recipe mnist-skip-lst. Did you mean 'mnist-skip-lstm'?",
        ("train", "--task", "digits", "--hiden_size=3"): "no option --hiden_size. Did you mean 'hidden_size'?",
        ("train", "--task", "digits", "--lengths", "3"): "no option --lengths",
        ("train", "--dataset_name", "reviews.csv"): "cp reviews.csv reviews/train.csv",
        ("train", "--dataset_name", "./revews"): "no data folder ./revews. Did you mean 'reviews'?",
        ("train", "--dataset_name", "reviews", "--label_column", "sentimet"): "Did you mean 'sentiment'?",
        ("evaluate", "./none"): "no checkpoint folder ./none",
        ("export", "./none", "x.onnx"): "no checkpoint folder ./none",
        ("publish", "runs/some/where", "a/b"): "no checkpoint folder runs/some/where",
        ("publish", "reviews", "a/b", "--dryrun"): "no option --dryrun. Did you mean 'dry_run'?",
    }
    for arguments, message in cases.items():
        begin = time.monotonic()
        said = refusal(capsys, hf_skiprnn_cli.main, *arguments)
        assert message in said, arguments
        assert time.monotonic() - begin < 1
    done = command("train", "--task", "digits", "--hiden_size", "3", cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "imported: set()" in done.stderr


def test_a_missing_extra_says_what_to_install(capsys, monkeypatch):
    found = hf_skiprnn_cli.find_spec
    monkeypatch.setattr(hf_skiprnn_cli, "find_spec", lambda name: None if name in ("datasets", "onnx") else found(name))
    said = refusal(capsys, hf_skiprnn_cli.main, "train", "--task", "digits")
    assert 'datasets not installed. Run: pip install "hf_skiprnn[train]"' in said
    assert 'pip install "hf_skiprnn[export,train]"' in refusal(capsys, hf_skiprnn_cli.main, "export", "x", "y.onnx")


def test_the_pages_that_need_no_model(capsys):
    assert hf_skiprnn_cli.main(["--help"]) == hf_skiprnn_cli.main(["train", "--help"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in (*hf_skiprnn_cli.COMMANDS, *TASKS, *(path.stem for path in ALL_RECIPES)))
    assert len(said.splitlines()) < 45
    assert hf_skiprnn_cli.main(["recipes"]) == 0
    assert capsys.readouterr().out.split() == [path.stem for path in ALL_RECIPES]
    hf_skiprnn_cli.main(["recipes", "digits-skip-lstm"])
    assert capsys.readouterr().out == (RECIPES / "digits-skip-lstm.yaml").read_text()


@pytest.mark.parametrize("task", sorted(TASKS))
def test_every_tasks_help_lists_the_options_that_the_front_knows(task, capsys):
    """The option names read from source files equal those of the real parsers, and percent signs are printed."""
    for name, parse, arguments in (("train", train.parse, []), ("evaluate", evaluate.parse, ["x"])):
        with pytest.raises(SystemExit) as stopped:
            parse([*arguments, "--task", task, "--help"])
        assert stopped.value.code == 0
        said = capsys.readouterr().out
        groups = [f"\ntask {task}:", "\nmodel:", "\nbudget:", "\ntraining ("][: 4 if name == "train" else 1]
        assert groups == sorted(groups, key=said.index)
        offered = {line.split()[0][2:] for line in said.splitlines() if line.startswith("  --")}
        known = hf_skiprnn_cli.known_options(name, task)
        assert offered <= known
        assert {option for option in known if not option.startswith("no_")} - offered <= {"help"}


def test_a_percent_sign_in_a_help_text(capsys):
    @dataclasses.dataclass
    class Options:
        share: int = dataclasses.field(default=3, metadata={"help": "1 % of all, 5% and 100%% too"})

    option_parser.OptionParser({"some": Options}).print_help()
    assert "1 % of all, 5% and 100% too (default: 3)" in capsys.readouterr().out


def test_scripts_do_not_hide_other_packages_named_evaluate(tmp_path):
    """`python scripts/x.py` puts scripts/, which holds evaluate.py, first on the path."""
    (tmp_path / "evaluate").mkdir()
    (tmp_path / "evaluate/__init__.py").write_text("print('the other one')")
    (tmp_path / "hf_skiprnn_cli.py").write_text("import evaluate\ndef main(argv): print(argv)")
    for name in ("train", "evaluate", "export", "publish"):
        done = subprocess.run(
            [sys.executable, SCRIPTS / f"{name}.py", "--x"],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"PYTHONPATH": str(tmp_path)},
        )
        assert done.stdout == f"the other one\n{[name, '--x']}\n"


@pytest.mark.parametrize("path", [path for path in ALL_RECIPES if "own_data" not in path.stem], ids=lambda p: p.stem)
def test_recipes_make_a_model_and_paper_recipes_have_the_papers_settings(path, tmp_path):
    settings = train.parse(["--config", path.stem, "--output_dir", str(tmp_path), *CPU])
    task, config, args = settings.task, settings.config, settings.args
    assert path.stem.startswith(f"{task.name}-skip-{config.cell_type}")
    assert settings.chosen["learning_rate"] == args.learning_rate
    assert args.max_grad_norm == 1.0
    assert config.gate == "learned"
    if task.name in ("adding", "digits", "frequency", "mnist"):
        model = SkipRNNForSequenceClassification(config)
        assert model.classifier.out_features == task.model_defaults()["num_labels"]
    if path.stem.endswith("-paper") and task.name in ("adding", "frequency", "mnist"):
        optimizer = (args.learning_rate, args.adam_beta1, args.adam_beta2, args.adam_epsilon, args.weight_decay)
        assert optimizer == (1e-4, 0.9, 0.999, 1e-8, 0.0)
        assert args.lr_scheduler_type == "constant"
        assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 256
        assert (config.hidden_size, config.num_hidden_layers) == (110, 1)
        assert config.budget_weight in (1e-5, 1e-4)
        assert config.budget_loss == "cost"


def test_every_task_has_a_recipe_and_those_of_the_paper_four():
    names = {path.stem for path in ALL_RECIPES}
    assert {f"{task}-skip-lstm" for task in TASKS} <= names  # the recipe of --task NAME
    for task in {row.task for row in ROWS} & set(TASKS):
        for cell in ("lstm", "gru"):
            assert {f"{task}-skip-{cell}", f"{task}-skip-{cell}-paper"} <= names


def recipe(tmp_path, **settings):
    path = tmp_path / "recipe.yaml"
    path.write_text("task: adding\n" + "".join(f"{name}: {value}\n" for name, value in settings.items()))
    return str(path)


def test_the_command_line_wins_over_the_recipe_and_the_recipe_over_defaults(tmp_path):
    path = recipe(tmp_path, learning_rate="1e-3", budget_weight="2e-5", hidden_size=32, length=20, bf16="false")
    settings = train.parse(["--config", path, "--hidden_size", "48", "--learning-rate=0.5", "--use_cpu"])
    config, args = settings.config, settings.args
    assert args.learning_rate == 0.5
    assert config.budget_weight == 2e-5  # a string in YAML 1.1
    assert config.hidden_size == 48
    assert config.input_size == 2  # the task's
    assert settings.task.length == 20
    assert not args.bf16
    assert args.output_dir == str(Path("runs/recipe"))
    assert settings.chosen == {"learning_rate": 0.5, "bf16": False, "use_cpu": True}


def test_lists_dicts_and_nothing_in_a_recipe(tmp_path):
    schedule = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": "{min_lr: 1.0e-5}"}
    path = recipe(tmp_path, label_names="[labels]", budget_target="null", update_bias=-1, **schedule)
    settings = train.parse(["--config", path, *CPU])
    assert settings.args.label_names == ["labels"]
    assert settings.args.lr_scheduler_kwargs == {"min_lr": 1e-5}
    assert settings.config.budget_target is None
    assert settings.config.update_bias == -1.0


@pytest.mark.parametrize(("option", "logs"), [("target_update_rate", 200), ("steered_update_rate", 25)])
def test_a_steered_lambda_takes_the_place_of_a_recipes_target(option, logs):
    row = f"{ROOT}/scripts/paper/tuned_rows.yaml:table2-skip-lstm-1e-4"
    settings = train.parse(["--config", row, "--logging_steps", "200", f"--{option}", "0.5", *CPU])
    assert read_recipe(Path(row))["budget_loss"] == "l2"
    assert (settings.config.budget_loss, settings.config.budget_target) == ("cost", None)
    assert settings.args.load_best_model_at_end is False
    assert settings.args.logging_steps == logs


@pytest.mark.parametrize(
    ("options", "target"),
    [
        ("", 0.5),
        ("--gate learned", 0.5),
        ("--gate=learned", 0.5),
        ("--gate strided --stride 2", None),
        ("--gate=always", None),
        ("--budget_weight 1e-4", None),
        ("--gate learned --budget_loss l2 --budget_target 0.4", None),
        ("--steered_update_rate 0.3", None),
        ("--target_update_rate 0.3", 0.3),
        ("--dial 0.1 0.9", 0.5),
        ("--dial 0.05 0.2", None),  # the target is then the middle of the range
        ("--dial 0.05 0.2 --target_update_rate 0.1", 0.1),
    ],
)
def test_a_budget_or_gate_of_the_command_line_takes_the_place_of_a_recipes_share(options, target):
    settings = train.parse(["--config", "adding-skip-lstm", *options.split(), *CPU])
    assert settings.budget.target_update_rate == target


@pytest.mark.parametrize(
    ("options", "epochs", "steps"),
    [
        ("--config adding-skip-lstm", 3.0, 4000),
        ("--config adding-skip-lstm --dial 0.1 0.9", 6.0, 8000),
        ("--config adding-skip-lstm --num_train_epochs 2", 2, -1),
        ("--config adding-skip-lstm --dial 0.1 0.9 --num-train-epochs=2", 2, -1),
        ("--config MINE --dial 0.1 0.9", 3.0, 500),
        ("--config adding-skip-lstm --dial 0.1 0.9 --max_steps=50", 3.0, 50),
        ("--config find_digit-skip-lstm --dial 0.1 0.9", 14, -1),
        ("--task find_digit --dial 0.1 0.9 --num_train_epochs 7", 7, -1),
    ],
)
def test_a_dial_trains_for_twice_as_long_as_our_recipe(options, epochs, steps, tmp_path):
    (tmp_path / "mine.yaml").write_text("task: adding\nmax_steps: '500'\n")
    args = train.parse([*options.replace("MINE", str(tmp_path / "mine.yaml")).split(), *CPU]).args
    assert (args.num_train_epochs, args.max_steps) == (epochs, steps)


def test_every_field_of_the_configuration_is_an_option(tmp_path):
    own = {field.name for field in dataclasses.fields(SkipRNNConfig)} & set(SkipRNNConfig.__annotations__)
    offered = dataclasses.fields(option_parser.model_arguments())
    assert {field.name for field in offered} == own
    assert all("SkipRNNConfig" not in field.metadata["help"] for field in offered)  # said in words
    chosen = ["--cell_type", "gru", "--gru_reset", "after", "--learn_initial_state", "false"]
    chosen += ["--budget_loss", "l1", "--budget_target", "0.5"]
    config = train.parse(["--config", recipe(tmp_path), *CPU, *chosen]).config
    assert (config.cell, config.learn_initial_state, config.budget_target) == ("gru_reset_after", False, 0.5)


def test_settings_that_are_refused(tmp_path, capsys):
    def said(*arguments, **settings):
        return refusal(capsys, train.parse, "--config", recipe(tmp_path, **settings), *CPU, *arguments)

    assert "unknown setting 'learning_rat'. Did you mean 'learning_rate'?" in said(learning_rat=1)
    assert "unknown: --hiden_size 3. Did you mean 'hidden_size'?" in said("--hiden_size", "3")
    assert "invalid float value: 'fast'" in said(learning_rate="fast")
    assert "invalid choice: 'rnn'" in said("--cell_type", "rnn")
    assert "length must be at least 10" in said(length=3)
    (tmp_path / "other.yaml").write_text("task: tetris\n")
    assert f"one of {', '.join(sorted(TASKS))}" in refusal(
        capsys, train.parse, "--config", str(tmp_path / "other.yaml")
    )
    assert "There is no recipe" in refusal(capsys, train.parse, "--config", str(tmp_path / "none.yaml"))
    assert "give either --task" in refusal(capsys, train.parse, "--seed", "1")
    assert "invalid choice: 'tetris'" in refusal(capsys, train.parse, "--task", "tetris")
    assert "got budget_target=2.0. Use" in refusal(capsys, train.main, "--task", "adding", "--budget_target", "2", *CPU)


CHECKPOINT = CARDS / "skip-lstm-digits"


def fine_tuned(*options):
    settings = train.parse([*options, *CPU])
    return train.model_of(settings.start, settings.task, settings.config)


def test_a_checkpoint_of_other_labels_gets_a_new_classifier_and_one_of_another_shape_is_refused(capsys):
    model = fine_tuned("--task", "frequency", "--model_name_or_path", str(CHECKPOINT))
    assert "A new classifier is trained: " in capsys.readouterr().out
    before, after = load_file(CHECKPOINT / "model.safetensors"), model.state_dict()
    changed = [name for name in after if after[name].shape != before[name].shape]
    assert changed == [name for name in after if not equal(after[name], before.get(name, after[name][:0]))]
    assert model.config.num_labels == 2
    assert {name.split(".")[0] for name in changed} == {"classifier"}
    for options in (["--task", "adding"], ["--task", "digits", "--hidden_size", "3"]):
        said = refusal(capsys, train.parse, *options, "--model_name_or_path", str(CHECKPOINT), *CPU)
        assert "does not fit this task or these options: it has" in said


@pytest.mark.parametrize("names", ["9876543210", "abcdefghij"])
def test_classes_of_a_checkpoint_are_known_by_name(names, tmp_path, capsys):
    """Outputs are reordered to match names. With other names, training starts a new head and evaluation refuses."""
    model = SkipRNNForSequenceClassification.from_pretrained(CHECKPOINT)
    order = [names.find(digit) for digit in "0123456789"]
    if -1 not in order:
        model.classifier.weight.data = model.classifier.weight.data[[int(name) for name in names]]
        model.classifier.bias.data = model.classifier.bias.data[[int(name) for name in names]]
    model.config.id2label = dict(enumerate(names))
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_bytes((CHECKPOINT / "preprocessor_config.json").read_bytes())
    tuned = fine_tuned("--task", "digits", "--model_name_or_path", str(tmp_path))
    held = load_file(CHECKPOINT / "model.safetensors")["classifier.weight"]
    options = [str(tmp_path), "--task", "digits", "--figure_rows", "0", "--output_dir", str(tmp_path / "out")]
    said = capsys.readouterr().out
    if -1 in order:
        assert "A new classifier is trained" in said
        assert not equal(tuned.classifier.weight, held)
        assert "trained on other classes than the data have: 'a', 'b'" in refusal(capsys, evaluate.main, *options)
    else:
        assert "its outputs are reordered by class name" in said
        assert equal(tuned.classifier.weight, held)
        assert evaluate.main(options)["metrics"]["accuracy"] > 0.9


def test_fine_tuning_does_not_take_over_an_operating_point(tmp_path):
    point = {"gate_shift": -0.7, "gate_noise": 1.0, "gate_calibration": [[0.1, -1.0], [0.5, 1.0]]}
    budget = {"budget_loss": "rate", "budget_target": 0.2}
    SkipRNNForSequenceClassification(SkipRNNConfig(num_labels=10, **point, **budget)).save_pretrained(tmp_path)
    shape = ["--task", "digits", "--model_name_or_path", str(tmp_path), *CPU]
    config = train.parse([*shape, "--budget_weight", "1e-4"]).config
    assert (config.gate_shift, config.gate_noise, config.gate_calibration) == (0.0, 0.0, None)
    assert train.parse([*shape, "--gate", "always"]).config.gate == "always"


def test_fine_tuning_keeps_the_size_of_embeddings(tmp_path):
    train_tokenizer(["a film"], 30, 10).save_pretrained(tmp_path)
    small = SkipRNNConfig(vocab_size=30, input_size=7, hidden_size=8)
    SkipRNNForSequenceClassification(small).save_pretrained(tmp_path)
    config = train.parse(["--task", "imdb", "--vocabulary", "30", "--model_name_or_path", str(tmp_path), *CPU]).config
    assert (config.input_size, config.hidden_size) == (7, 8)


def test_the_tasks_that_are_read_from_source_are_the_tasks():
    assert list(hf_skiprnn_cli.tasks()) == sorted(TASKS)


@pytest.mark.parametrize(
    ("rows", "options", "epochs"),
    [
        (20, [], 500),  # the most
        (243, ["--dial", "0.1", "0.9"], 250),
        (60, [], 500),  # 2 steps an epoch: 1000 steps
        (243, [], 125),
        (40_000, [], 10),  # as the recipe says
        (60, ["--num_train_epochs", "3"], 10),
        (60, ["--max_steps=5"], 10),
        (60, ["--config", "mine.yaml"], 10),
    ],
)
def test_small_data_are_read_until_a_gate_can_have_learned(rows, options, epochs):
    args = SimpleNamespace(train_batch_size=32, gradient_accumulation_steps=1, world_size=1, num_train_epochs=10)
    budget = SimpleNamespace(dial=[0.1, 0.9] if "--dial" in options else None)
    settings = SimpleNamespace(args=args, chosen={}, budget=budget)
    train.train_long_enough(settings, SimpleNamespace(train=range(rows)), options)
    assert args.num_train_epochs == epochs
