"""Folders of tiny models that several files of this folder share."""

import pytest

from tests.helpers.tiny_generic import BUILDERS as GENERIC
from tests.helpers.tiny_models import BUILDERS


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Builder of a family's folder, made once; nobody writes into it."""
    built = {}

    def folder(family):
        if family not in built:
            built[family] = tmp_path_factory.mktemp(family)
            {**BUILDERS, **GENERIC}[family](built[family])
        return built[family]

    return folder
