"""`pytest tests/hidden --submission NOTEBOOK` runs the hidden tests on a notebook; without it they run on the solutions."""

from pathlib import Path


def pytest_addoption(parser):
    group = parser.getgroup("homework")
    group.addoption("--submission", type=Path, help="The notebook that the hidden tests are run on.")
    group.addoption("--homework", help="Which homework it is, such as hw3; by default its name says so.")
    group.addoption("--trust", action="store_true", help="Run it even where there is no sandbox.")


def pytest_ignore_collect(collection_path, config):
    """With a submission, the proofs that the hidden tests themselves are right are left out."""
    if config.getoption("--submission", None) and collection_path.is_file():
        return collection_path.name != "test_submission.py"
    return None
