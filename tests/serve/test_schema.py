"""Schemathesis: no 5xx, no undocumented status or reply, no bad request taken, by our own OpenAPI document."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

OPERATIONS = {
    "/v1/completions": "POST",
    "/v1/chat/completions": "POST",
    "/v1/embeddings": "POST",
    "/tokenize": "POST",
    "/detokenize": "POST",
    "/v1/models": "GET",
    "/v1/models/{name}": "GET",
    "/health": "GET",
    "/metrics": "GET",
}


@pytest.fixture(scope="module")
def schema(torch_server):
    return schemathesis.openapi.from_url(f"{torch_server.url}/openapi.json")


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize("path", OPERATIONS)
def test_every_operation(schema, path, mode):
    if mode is GenerationMode.NEGATIVE and path in ("/v1/models", "/v1/models/{name}", "/health", "/metrics"):
        return  # nothing of theirs can be wrong
    checked = []

    @given(case=schema[path][OPERATIONS[path]].as_strategy(generation_mode=mode))
    @settings(
        max_examples=6,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        derandomize=True,
        database=None,
    )
    def check(case):
        # a token beyond the vocabulary or a model that is not there fits the document, and is refused
        checked.append(case.call_and_validate(excluded_checks=[positive_data_acceptance], timeout=30).status_code)

    check()
    assert checked


def test_the_document_lists_what_may_come(schema):
    paths = schema.raw_schema["paths"]
    assert set(paths) == set(OPERATIONS)
    assert set(paths["/v1/completions"]["post"]["responses"]) == {
        "200", "400", "401", "403", "404", "408", "413", "415", "429", "500", "503", "504",
    }  # fmt: skip
