"""Whatever is sent, by the OpenAPI schema or against it, is answered with a status that the schema knows; never 500."""

import http.client
import json
import urllib.parse

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("hypothesis")

from experiments.tiny_study import MODEL
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scaling.api_server import balances, listening

METHODS = ("get", "post", "put")
TEXT = st.text(st.characters(), max_size=8)  # lone surrogates too
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.sampled_from([10**30, 10**400, 1e308, 2**63]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
CONFIG = {"model": MODEL, "budget": "64tok", "batch_size": 2, "optimizer": {"lr": 0.01}, "seed": 0}


def of_schema(schema, root):
    """Values that a JSON schema allows, as far as this API's go."""
    if "$ref" in schema:
        return of_schema(root["components"]["schemas"][schema["$ref"].rpartition("/")[2]], root)
    if "anyOf" in schema:
        return st.one_of([of_schema(one, root) for one in schema["anyOf"]])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    match schema.get("type"):
        case "object" if "properties" in schema:
            members = {name: of_schema(one, root) for name, one in schema["properties"].items()}
            needed = {name: members.pop(name) for name in schema.get("required", ())}
            return st.fixed_dictionaries(needed, optional=members)
        case "object":
            keys = st.sampled_from([*CONFIG, "init_from", "schedule", "objective", "micro_batch_size", "guard"])
            return st.dictionaries(keys, JSON, max_size=2).map(lambda changes: CONFIG | changes)
        case "number":
            return st.floats(schema.get("minimum", schema.get("exclusiveMinimum")), schema.get("maximum"))
        case "integer":
            return st.integers(schema.get("minimum"), schema.get("maximum", schema.get("exclusiveMaximum")))
        case "boolean":
            return st.booleans()
        case "string":
            return TEXT
        case "null":
            return st.none()
    raise AssertionError(f"the schema has something new: {schema}")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(store, its port, headers with a key, the schema)."""
    with listening(tmp_path_factory.mktemp("api"), max_waiting=10**6) as (store, url):
        port = urllib.parse.urlsplit(url).port
        store.add_user("eve", "seconds", 1e6)
        key = {"Authorization": f"Bearer {store.add_user('ada', 'flops', 1e18)}", "Content-Type": "application/json"}
        yield store, port, key, json.loads(send(port, "GET", "/openapi.json", None, {})[1])


def send(port, method, path, body, headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def operations(schema):
    return [(m, path, facts[m]) for path, facts in schema["paths"].items() for m in METHODS if m in facts]


def test_the_schema_is_whole(served):
    _, _, _, schema = served
    found = operations(schema)
    assert {f"{method} {path}" for method, path, _ in found} == {
        "get /", "get /health", "get /account", "post /runs", "get /runs", "get /runs/{id}", "post /runs/{id}/cancel",
        "put /submission", "get /submission", "get /leaderboard",
    }  # fmt: skip
    for _, path, facts in found:
        assert ("401" in facts["responses"]) == ("security" in facts) == (path not in ("/", "/health"))
    responses = schema["paths"]["/runs"]["post"]["responses"]
    for status in ("400", "401", "409", "413", "422", "429"):
        assert responses[status]["content"]["application/json"]["schema"]["$ref"].endswith("/Problem")


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
@given(data=st.data())
def test_nothing_is_answered_with_500(served, data):
    store, port, key, schema = served
    method, path, facts = data.draw(st.sampled_from(operations(schema)))
    query = []
    for parameter in facts.get("parameters", ()):
        value = data.draw(of_schema(parameter["schema"], schema) | TEXT)
        text = urllib.parse.quote(str(value).encode("utf-8", "surrogatepass"), safe="") or "x"
        if parameter["in"] == "path":
            path = path.replace("{" + parameter["name"] + "}", text)
        elif data.draw(st.booleans()):
            query.append(f"{parameter['name']}={text}")
    body = None
    if "requestBody" in facts:
        wanted = of_schema(facts["requestBody"]["content"]["application/json"]["schema"], schema)
        body = data.draw(wanted.map(json.dumps) | JSON.map(json.dumps) | st.binary(max_size=20))
    status, answer = send(port, method.upper(), path + ("?" + "&".join(query) if query else ""), body, key)
    assert str(status) in facts["responses"] or (status == 404 and "%2F" in path), answer
    if status >= 400:
        assert json.loads(answer)["error"]["message"]
    balances(store)
