"""Set-up: one list of dependencies, targets that explain themselves, skips that CI notices."""

import re
import subprocess
import tomllib
from pathlib import Path

import check_skips
import pytest
import yaml

ROOT = Path(__file__).parents[1]


def test_the_conda_environment_has_exactly_the_dependencies_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = {*project["dependencies"], *extras["notebook"], *extras["dev"]}
    python = f"python{project['requires-python']}"

    listed = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]

    [pip] = [entry["pip"] for entry in listed if not isinstance(entry, str)]
    conda = {entry for entry in listed if isinstance(entry, str)}
    assert conda | set(pip) == wanted | {python, "pip", "-e ."}
    assert set(pip) == {"perfetto>=0.16", "-e ."}  # what comes from PyPI


def test_make_alone_lists_every_target():
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)

    listed = subprocess.run(
        ["make", "--no-print-directory", "-C", ROOT], capture_output=True, text=True, check=True
    ).stdout

    assert set(re.findall(r"^make ([\w-]+)", listed, re.MULTILINE)) == {*phony[1].split()} - {
        "FORCE"
    }


@pytest.mark.parametrize("script", ["scripts/setup", "scripts/demo", ".ci/run"])
def test_a_script_is_valid_bash(script):
    subprocess.run(["bash", "-n", ROOT / script], check=True)


JUNIT = """<testsuites><testsuite>
<testcase classname="tests.test_probe" name="test_catches_all">
  <skipped type="pytest.skip" message="no bcc"/></testcase>
<testcase classname="" name="tests.test_hugepages">
  <skipped type="pytest.skip" message="no huge pages"/></testcase>
<testcase classname="tests.test_wire" name="test_todo">
  <skipped type="pytest.xfail" message="known"/></testcase>
<testcase classname="tests.test_wire" name="test_frames"/>
</testsuite></testsuites>"""


@pytest.fixture
def junit(tmp_path):
    path = tmp_path / "junit.xml"
    path.write_text(JUNIT)
    return path


def test_ci_names_each_skipped_test_that_is_not_allowed_and_why(junit, tmp_path):
    allowed = tmp_path / "allowed.txt"
    allowed.write_text("# a comment\ntests.test_hugepages\n")

    verdict = check_skips.main(junit, allowed)

    assert "tests.test_probe::test_catches_all  (no bcc)" in verdict
    assert "test_hugepages" not in verdict
    assert "test_wire" not in verdict


def test_ci_accepts_skips_that_are_all_allowed(junit, tmp_path):
    allowed = tmp_path / "allowed.txt"
    allowed.write_text("tests.test_hugepages\ntests.test_probe::test_catches_all\n")

    assert check_skips.main(junit, allowed) is None
