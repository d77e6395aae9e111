"""Schemathesis against the API's own OpenAPI description.

One of its checks is left out: that what fits the schema is accepted. A schema can't say all that makes a request wrong, such as
the sizes of a model that is not loaded yet, or a compression for PNG; those requests get 400, as described.
"""

from __future__ import annotations

from typing import Any

import pytest

schemathesis = pytest.importorskip("schemathesis")
from hypothesis import settings  # noqa: E402
from schemathesis.checks import positive_data_acceptance  # noqa: E402

from hart_infer.server.app import create_app  # noqa: E402
from hart_infer.server.keys import Keys, digest  # noqa: E402
from hart_infer.server.service import Service  # noqa: E402
from hart_infer.server.settings import make_settings  # noqa: E402
from tests.server.fake import FakeEngine  # noqa: E402

NOT_SAID = [positive_data_acceptance]
engine = FakeEngine()
open_to_all = make_settings(host="0.0.0.0", insecure=True)
KEY = "hart-key"
SECRET = {"Authorization": f"Bearer {KEY}"}
schema = schemathesis.openapi.from_asgi("/openapi.json", create_app(Service(open_to_all, {engine.name: engine})))
keyed = schemathesis.openapi.from_asgi(
    "/openapi.json", create_app(Service(open_to_all, {engine.name: engine}, keys=Keys({digest(KEY): "alice"})))
)
few = settings(max_examples=60, deadline=None, derandomize=True)
fewer = settings(few, max_examples=15)  # only the key is new


@schema.parametrize()
@few
def test_answers_are_as_described(case: Any) -> None:
    case.call_and_validate(excluded_checks=NOT_SAID)


@keyed.parametrize()
@fewer
def test_answers_to_callers_with_a_key_are_as_described(case: Any) -> None:
    case.call_and_validate(headers=SECRET, excluded_checks=NOT_SAID)
