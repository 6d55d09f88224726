"""Folders of tiny embedders, made once."""

import pytest

from tests.helpers.tiny_embedders import EMBEDDERS


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("embedders")
    for name, build in EMBEDDERS.items():
        (place / name).mkdir()
        build(place / name)
    return place
