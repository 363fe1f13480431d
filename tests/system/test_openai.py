"""The `openai` client against a real cluster: what HTTP answers is what gRPC answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tandem.client import Client
from tests.system.harness import Answer, RunningCluster, free_port

PROMPT = "The three primary colours are"
MESSAGES: list[Any] = [{"role": "user", "content": "Name three colours."}]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunningCluster, openai.OpenAI]]:
    """The default cluster, with a port for HTTP."""
    port = free_port()
    running = RunningCluster(tmp_path_factory.mktemp("openai"), {"router": {"http_port": port}})
    url = f"http://127.0.0.1:{port}/v1"
    try:
        running.start()
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120.0) as client:
            yield running, client
    finally:
        codes = running.stop()
    assert set(codes.values()) == {0}, f"{codes}\n{running.logs()}"


def answer_of(client: Client, prompt: Any, **sampling: Any) -> Answer:
    return Answer(client, prompt, sampling)


@pytest.mark.timeout(400)
def test_http_and_grpc_give_the_same_tokens_for_the_same_seed(served: tuple[RunningCluster, openai.OpenAI]) -> None:
    cluster, client = served
    model = client.models.list().data[0].id
    sampling = {"max_tokens": 24, "temperature": 0.8, "top_p": 0.95, "seed": 11, "n": 2}
    completion = client.completions.create(model=model, prompt=PROMPT, **sampling)
    by_grpc = answer_of(cluster.client, PROMPT, **sampling)
    assert {choice.index: choice.text for choice in completion.choices} == by_grpc.text
    assert by_grpc.text[0] != by_grpc.text[1]
    other = client.completions.create(model=model, prompt=PROMPT, **{**sampling, "seed": 12})
    assert {choice.index: choice.text for choice in other.choices} != by_grpc.text

    chat = answer_of(cluster.client, [("user", MESSAGES[0]["content"])], **sampling)
    texts: dict[int, str] = {}
    stream = client.chat.completions.create(model=model, messages=MESSAGES, stream=True, **sampling)
    for piece in stream:
        for choice in piece.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
    assert texts == chat.text


@pytest.mark.timeout(400)
def test_a_prompt_asked_again_is_cached_and_its_log_probabilities_are_true(
    served: tuple[RunningCluster, openai.OpenAI],
) -> None:
    cluster, client = served
    model = client.models.list().data[0].id
    prompt = "Once upon a time there was a router. " * 12
    asked: dict[str, Any] = {"model": model, "prompt": prompt, "max_tokens": 6, "temperature": 0, "logprobs": 3}
    first, second = (client.completions.create(**asked) for _ in range(2))
    assert first.choices[0].text == second.choices[0].text
    assert first.usage is not None
    assert second.usage is not None
    assert second.usage.prompt_tokens == first.usage.prompt_tokens
    assert second.usage.prompt_tokens_details is not None
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert cached is not None
    assert second.usage.prompt_tokens - 32 < cached <= second.usage.prompt_tokens
    logprobs = second.choices[0].logprobs
    assert logprobs is not None
    assert "".join(logprobs.tokens or []) == second.choices[0].text
    by_grpc = answer_of(cluster.client, prompt, max_tokens=6, num_logprobs=3)
    assert [item.logprob for item in by_grpc.logprobs] == pytest.approx(logprobs.token_logprobs, abs=1e-6)


@pytest.mark.timeout(400)
def test_tools_are_refused_where_the_models_template_shows_none(
    served: tuple[RunningCluster, openai.OpenAI],
) -> None:
    _, client = served
    tools: list[Any] = [{"type": "function", "function": {"name": "add"}}]
    with pytest.raises(openai.BadRequestError, match="tools") as caught:
        client.chat.completions.create(model="smollm2-135m", messages=MESSAGES, tools=tools)
    assert caught.value.param == "tools"
