import pytest

from tasks.runtime.settings import Settings
from tests.conftest import Stack


@pytest.fixture(scope="session")
def stack():
    yield Stack(Settings.load("/tmp/h1train"))
