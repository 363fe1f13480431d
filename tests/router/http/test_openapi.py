"""The OpenAPI description and the router say the same: schemathesis asks for what it allows and for what it forbids."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from tests.router.http.conftest import HttpRouter

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
MAX_EXAMPLES = 20
ANSWERED = {
    "POST /v1/completions": {"model": "fake", "prompt": "a"},
    "POST /v1/chat/completions": {"model": "fake", "messages": [{"role": "user", "content": "a"}]},
}
"""What is answered for certain: whether anything drawn from the description is, is chance."""


@pytest.fixture(scope="module")
def served() -> Iterator[HttpRouter]:
    router = HttpRouter(limits={"max_tokens": 64, "default_max_tokens": 4})
    router.add("decode-0", "decode")
    yield router
    router.close()


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_each_path_answers_as_described(served: HttpRouter, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    statuses: dict[str, set[int]] = {}
    for found in schema.get_all_operations():
        operation = found.ok()
        if mode.is_positive and operation.label in ANSWERED:
            case = operation.Case(body=ANSWERED[operation.label], media_type="application/json")
            assert case.call_and_validate(checks=CHECKS).status_code == 200
        # In those that take no body there is nothing that could be wrong.
        if mode.is_positive or operation.method == "post":
            statuses[operation.label] = statuses_of(operation, mode)
    posts = ANSWERED.keys()
    if mode.is_positive:
        others = {"GET /v1/models", "GET /v1/models/{model}", "GET /health"}  # schemathesis leaves out its source
        assert statuses.keys() == posts | others
    else:
        assert statuses.keys() == posts
        assert all(found <= {400, 404, 408, 413, 415} for found in statuses.values()), statuses


def statuses_of(operation: schemathesis.APIOperation, mode: GenerationMode) -> set[int]:
    """Asks for what the description allows, or forbids, and checks each answer. With what statuses they came."""
    statuses: set[int] = set()

    @settings(max_examples=MAX_EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: schemathesis.Case) -> None:
        statuses.add(case.call_and_validate(checks=CHECKS).status_code)

    ask()
    return statuses
