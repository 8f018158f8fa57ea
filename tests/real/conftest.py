"""What is true of all tests with programs of others: `make test-real` runs them, and says which are there."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.acceptance.running_stack import RunningStack
from tests.real.commands import PROGRAMS, version
from tests.real.stores import STORES

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.real)


def pytest_report_header(config: pytest.Config) -> list[str]:
    if "real" not in config.option.markexpr or "not real" in config.option.markexpr:
        return []
    programs = [f"{program}: {version(program)}" for program in PROGRAMS]
    return [*programs, *(f"{store.program}: {store.found() or 'not on the PATH'}" for store in STORES)]


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    stack = RunningStack(tmp_path_factory.mktemp("real") / "data", HEARTMULA_ENGINE="trivial")
    try:
        stack.until_ready()
        yield stack
    finally:
        stack.process.terminate()
        stack.process.wait(60)
