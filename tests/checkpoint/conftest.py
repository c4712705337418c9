"""Saved tiny models, made once."""

from __future__ import annotations

import pytest
from models import Folders


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.mktemp("models"))
