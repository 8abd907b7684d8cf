"""What Prometheus reads, with its own parser as the judge."""

import dataclasses
import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from aprium.base.errors import EngineError
from aprium.engine.config import EngineStats
from aprium.serve import app
from tests.serve.conftest import FakeEngine
from tests.serve.test_app import USER, chat, events, failure

NAMES = """
vllm:num_requests_running vllm:num_requests_waiting vllm:kv_cache_usage_perc
vllm:prefix_cache_queries_total vllm:prefix_cache_hits_total vllm:prompt_tokens_total
vllm:generation_tokens_total vllm:request_success_total vllm:time_to_first_token_seconds_count
vllm:inter_token_latency_seconds_count vllm:e2e_request_latency_seconds_count
vllm:request_queue_time_seconds_count vllm:request_prefill_time_seconds_count
vllm:request_decode_time_seconds_count vllm:num_preemptions_total
vllm:spec_decode_num_accepted_tokens_per_pos_total aprium:snapshots aprium:prefix_reuse_total
""".split()


def read(client: TestClient) -> dict[tuple[str, str], float]:
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            assert sample.labels["model_name"] == "toy"
            rest = sorted(v for k, v in sample.labels.items() if k != "model_name")
            found[sample.name, ",".join(rest)] = sample.value
    return found


def test_names_and_counts(client: TestClient, engine: FakeEngine) -> None:
    engine.script = "one two three"
    size = len(chat(client, n=2)["choices"])
    events(client, "/v1/completions", prompt="x")
    chat(client, max_tokens=1)
    values = read(client)
    assert {name for name, _ in values} >= set(NAMES)
    assert values["vllm:request_success_total", "stop"] == size + 1
    assert values["vllm:request_success_total", "length"] == 1
    assert values["vllm:e2e_request_latency_seconds_sum", ""] == pytest.approx(3.0 * (size + 2))
    assert values["vllm:request_prefill_time_seconds_sum", ""] == pytest.approx(0.5 * (size + 2))
    length = len(engine.tokenizer.encode(engine.script)) + 1
    assert values["vllm:inter_token_latency_seconds_count", ""] == (length - 1) * 3
    assert values["vllm:kv_cache_usage_perc", ""] == 0.25
    assert values["vllm:spec_decode_num_accepted_tokens_per_pos_total", "1"] == 2
    assert values["vllm:spec_decode_num_drafts_total", ""] == 9
    assert values["aprium:prefix_reuse_total", "new"] == 3


def test_load_is_json(client: TestClient) -> None:
    assert client.post("/v1/chat/completions", json={"messages": USER}).status_code == 200
    load = client.get("/load").json()
    assert load["server_load"] == 0
    assert load["engine"]["pages_total"] == 8
    assert load["queued_requests"] == 0 and not load["closing"]


def test_load_has_all_that_the_engine_counts(client: TestClient, engine: FakeEngine) -> None:
    before = client.get("/load").json()
    assert set(before["engine"]) == {field.name for field in dataclasses.fields(EngineStats)}
    assert (before["failed"], before["max_model_len"]) == (None, 500)
    assert before["engine"]["prefix_misses"] == {"new": 3}
    assert before["engine"]["drafts_accepted"] == [6, 2]
    engine.failed = EngineError("the engine has failed: on purpose")
    after = client.get("/load").json()
    assert after["failed"] == "the engine has failed: on purpose"
    assert after["time_s"] > before["time_s"]


def test_there_is_one_route_of_figures(client: TestClient) -> None:
    failure(client.get("/v1/stats"), 404)
    live = Path(app.__file__).parent.joinpath("web", "live.js").read_text(encoding="utf-8")
    own = {"time_s", "failed", "max_model_len"}
    known = own | {field.name for field in dataclasses.fields(EngineStats)}
    assert own <= set(client.get("/load").json())
    assert set(re.findall(r"\bstats\.(\w+)", live)) <= known
