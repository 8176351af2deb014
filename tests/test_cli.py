"""The command line, on the small scripts in tests/scripts."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from syncwright.cli import app
from syncwright.plan import Plan, Rules
from tests.golden_files import check_golden

SCRIPTS = Path(__file__).parent / "scripts"
ONE_SERVER = ("--trainers", "2", "--servers", "1")


@pytest.fixture(autouse=True)
def _in_scripts(monkeypatch):
    monkeypatch.chdir(SCRIPTS)


def call(*arguments: str) -> Result:
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def shown(*arguments: str) -> str:
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("servers", [1, 2])
def test_show_prints_the_plan(servers):
    plan = () if servers == 1 else ("--plan", "parameter_server_partitioned")
    text = shown("show", "mixed.py", "--trainers", "2", "--servers", str(servers), *plan)
    check_golden(f"cli/plan_{servers}", text)
    assert all(line == line.rstrip() for line in text.splitlines())


def test_bytes_of_an_all_reduce_are_those_of_a_ring():
    text = shown("show", "mixed.py", "--trainers", "4", "--plan", "all_reduce")
    row = next(line for line in text.splitlines() if line.startswith("head.weight"))
    assert row.split()[-4:] == ["72", "B", "72", "B"]  # 2 * 3/4 of 48


@pytest.mark.parametrize("role", ["trainer", "idle", "captured", "server:0"])
def test_show_prints_the_program_of_a_role(role):
    text = shown("show", "mixed.py", *ONE_SERVER, "--program", role)
    assert text.startswith("# server 0 holds table.weight" if role == "server:0" else "program\n")
    assert ("syncwright.push" in text) == (role in {"trainer", "idle"})


def test_show_prints_the_program_after_a_pass():
    text = shown("show", "mixed.py", *ONE_SERVER, "--after", "serve_parameters")
    assert 'syncwright.push.rows(%mul_tensor, "table.weight.grad", %getitem_10, "mean", 13, "all") at owners' in text
    assert "all_reduce" not in text


def test_show_prints_what_a_pass_changed():
    text = shown("show", "mixed.py", *ONE_SERVER, "--diff", "serve_parameters")
    check_golden("cli/diff", text)
    assert text == shown("show", "mixed.py", *ONE_SERVER, "--diff", "compact_lookups..serve_parameters")
    assert shown("show", "mixed.py", "--plan", "all_reduce", "--diff", "serve_parameters").startswith("no difference")


def test_a_plan_that_was_written_is_shown_and_brings_its_numbers(tmp_path):
    path = str(tmp_path / "plan.yaml")
    shown(
        "plan", "parameter_server_partitioned", "mixed.py", "--servers", "3", "--option", "min_elements=1", "-o", path
    )
    plan = Plan.from_yaml(Path(path))
    assert plan.sharing("table.weight").sizes == (5, 5, 3)
    title = shown("show", "mixed.py", "--plan", path).splitlines()[0]
    assert title.startswith("The plan for 2 trainers and 3 servers")


def test_rules_can_be_written():
    text = shown("plan", "parallax", "mixed.py", "--rules")
    assert yaml.safe_load(text)["default"] == "all_reduce"
    assert Rules.from_yaml(text).patterns[0][0] == "table.weight"


def test_verify_compares_every_variable_with_one_device():
    result = call("verify", "mixed.py", *ONE_SERVER, "--steps", "2")
    assert result.exit_code == 0, result.output
    assert "equal: 20 variables within tolerance" in result.stdout
    assert "the plan: 2 steps" in result.stderr


def test_verify_finds_what_differs():
    result = call("verify", "mixed.py", "--plan", "all_reduce", "--disable-passes", "average_gradients")
    assert result.exit_code == 1
    assert "NOT equal: 15 of 20 variables beyond tolerance: table.weight" in result.stdout


def test_verify_names_what_joins_the_examples_of_a_batch():
    result = call("verify", "dropout.py", "--trainers", "3", "--steps", "2")
    assert result.exit_code == 0, result.output
    assert "1 (BatchNorm1d), 2 (Dropout)" in result.stdout


def test_a_script_gets_its_own_options():
    result = call("verify", "mixed.py", "--steps", "1", "word", "--epochs=3", "--", "--plan", "x")
    assert "arguments: word --epochs=3 --plan x" in result.stderr


def test_a_slip_in_an_option_does_not_go_to_the_script():
    result = call("show", "mixed.py", "--trainer", "2")
    assert result.exit_code == 2
    assert "Did you mean --trainers?" in result.stderr


ERRORS = {
    "no_file": ("show", "nowhere.py"),
    "no_step": ("show", "no_step.py"),
    "raises": ("show", "raises.py"),
    "exits": ("show", "exits.py"),
    "role": ("show", "mixed.py", *ONE_SERVER, "--program", "server:1"),
    "pass": ("show", "mixed.py", "--after", "buckt"),
    "views": ("show", "mixed.py", "--program", "idle", "--after", "bucket"),
    "disabled": ("verify", "mixed.py", "--disable-passes", "bucket,nothing"),
    "disabled_run": ("run", "--disable-passes", "nothing", "mixed.py"),
    "needed": ("show", "mixed.py", *ONE_SERVER, "--disable-passes", "serve_parameters"),
    "strategy": ("plan", "all_reduced", "mixed.py"),
    "option": ("plan", "all_reduce", "mixed.py", "--option", "bucket_mb"),
    "local": ("verify", "mixed.py", "--plan", "independent"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    result = call(*ERRORS[name])
    assert result.exit_code == 2, result.output
    check_golden(f"cli/error_{name}", result.stderr)


@pytest.mark.processes
def test_run_starts_a_job_and_leaves_passes_out():
    result = call("run", *ONE_SERVER, "--disable-passes", "bucket", "mixed.py", "--trainers", "word")
    assert result.exit_code == 0, result.output
    assert "[trainer 0] arguments: --trainers word" in result.stdout
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("[trainer 0] loss")]
    assert line.endswith(", 6 all-reduces")  # four gradients, the loss and the weights; one bucket otherwise
