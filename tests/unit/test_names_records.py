from __future__ import annotations

import json

import pytest

from forwarder.names.records import Change, Put, Remove, Replace, from_json, to_json
from tests.unit.test_names_zone import RECORDS


@pytest.mark.parametrize(
    "change", [Replace(RECORDS), Replace(()), Put(RECORDS[:1]), Remove(tuple(one.key for one in RECORDS))]
)
def test_json_and_back(change: Change) -> None:
    assert from_json(json.loads(json.dumps(to_json(change)))) == change
