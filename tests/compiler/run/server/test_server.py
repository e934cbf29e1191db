"""The server asked by OpenAI's own client: texts, streams, errors, limits, metrics."""

import json
import shutil
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

import moec

PROMPTS = (
    "The list of arguments is",
    "CREATE TABLE",
    "Return the value of the",
    "This function",
    "Note that the name",
    "If the file does not exist,",
    "SELECT",
    "The user's",
)


def text_of(chunks: Any) -> str:
    return "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)


def test_eight_at_once_give_what_each_gives_alone(served: Any, generator: Any) -> None:
    alone = [generator.generate(prompt, max_new_tokens=24) for prompt in PROMPTS]
    assert len(set(alone)) == 8
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(served.complete, PROMPTS * 2))
    assert [answer.choices[0].text for answer in found] == alone * 2
    first = found[0]
    assert first.choices[0].finish_reason == "length"
    assert first.usage.prompt_tokens == len(generator.encode(PROMPTS[0]))
    assert first.usage.completion_tokens == 24
    assert first.model == "golden"


def test_a_stream_is_the_whole_text(served: Any) -> None:
    for prompt in PROMPTS[:2]:
        whole = served.complete(prompt)
        chunks = list(served.complete(prompt, stream=True, stream_options={"include_usage": True}))
        assert text_of(chunks) == whole.choices[0].text
        assert len(chunks) > 10
        assert [chunk.choices[0].finish_reason for chunk in chunks[-2:-1]] == ["length"]
        assert chunks[-1].usage == whole.usage
        assert len({chunk.id for chunk in chunks}) == 1


def test_a_conversation(served: Any, generator: Any) -> None:
    turns = ("The list of arguments is", "empty", "Return it")
    messages = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(turns)]
    alone = generator.generate(generator.encode_chat(messages), max_new_tokens=24)
    whole = served.chat(*turns)
    assert whole.choices[0].message.content == alone
    assert whole.choices[0].message.role == "assistant"
    chunks = list(served.chat(*turns, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == alone
    assert chunks[-1].choices[0].finish_reason == "length"
    parts: Any = [{"role": "developer", "content": [{"type": "text", "text": "S"}, {"type": "text", "text": "QL"}]}]
    told = [{"role": "system", "content": "SQL"}]
    answer = served.client.chat.completions.create(
        model="golden", messages=parts, max_completion_tokens=8, temperature=0, n=1, presence_penalty=0
    )
    assert answer.choices[0].message.content == generator.generate(generator.encode_chat(told), max_new_tokens=8)


def test_stop_strings(served: Any, generator: Any) -> None:
    whole = generator.generate(PROMPTS[0], max_new_tokens=24)
    stop = whole[9:13]
    answer = served.complete(PROMPTS[0], stop=["never", stop])
    assert answer.choices[0].text == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    assert text_of(served.complete(PROMPTS[0], stop=stop, stream=True)) == whole[: whole.index(stop)]


def test_sampling(served: Any, generator: Any) -> None:
    def drawn(**options: Any) -> str:
        text: str = served.complete(PROMPTS[0], temperature=1.5, **options).choices[0].text
        return text

    assert drawn(seed=7, top_p=0.9) == generator.generate(
        PROMPTS[0], max_new_tokens=24, temperature=1.5, seed=7, top_p=0.9
    )
    assert drawn(seed=7) != drawn(seed=8)
    assert len({drawn() for _ in range(4)}) > 1  # without a seed each request has its own
    own = {"top_k": 3, "min_p": 0.1, "repetition_penalty": 1.2}
    assert drawn(seed=7, extra_body=own) == generator.generate(
        PROMPTS[0], max_new_tokens=24, temperature=1.5, seed=7, **own
    )
    greedy = served.complete(PROMPTS[0], top_p=0.5)
    assert greedy.choices[0].text == generator.generate(PROMPTS[0], max_new_tokens=24)


def test_prompts_of_tokens(served: Any, generator: Any) -> None:
    ids = generator.encode(PROMPTS[0])
    wanted = generator.generate(PROMPTS[0], max_new_tokens=16)
    client = served.client
    assert client.completions.create(model="golden", prompt=ids, temperature=0).choices[0].text == wanted
    assert client.completions.create(model="golden", prompt=[PROMPTS[0]], temperature=0).choices[0].text == wanted
    with pytest.raises(openai.BadRequestError, match="vocabulary has 4096 entries"):
        served.complete([5, 4096])


@pytest.mark.parametrize(
    ("options", "param", "code", "message"),
    [
        ({"extra_body": {"colour": 1}}, "colour", "unknown_parameter", "unknown parameter 'colour'"),
        ({"n": 2}, "n", "unsupported_parameter", "'n' is not supported"),
        ({"logprobs": 5}, "logprobs", "unsupported_parameter", "omit it"),
        ({"extra_body": {"tools": [{}]}}, "tools", "unsupported_parameter", "omit it"),
        ({"temperature": -1}, "temperature", "invalid_value", "greater than or equal to 0"),
        ({"temperature": "hot"}, "temperature", "invalid_value", "valid number"),
        ({"top_p": 0}, "top_p", "invalid_value", "greater than 0"),
        ({"stop": [""]}, "stop[0]", "invalid_value", "at least 1 character"),
        ({"max_tokens": 5000}, "max_tokens", None, "at most 4096"),
        ({"max_tokens": 1020}, "prompt", "context_length_exceeded", "allows 1024 tokens; the prompt has 5, and 1020"),
        ({"prompt": "word " * 1100}, "prompt", "context_length_exceeded", "the prompt has 1101"),
        ({"prompt": ["a", "b"]}, "prompt", "invalid_value", "at most 1 item"),
        ({"extra_body": {"routing_budget": 0.5}}, "routing_budget", "unsupported_parameter", "--routing-input"),
        ({"temperature": openai.omit, "top_p": 0.5}, None, None, "temperature"),
    ],
)
def test_what_is_wrong_is_named(served: Any, options: dict[str, Any], param: Any, code: Any, message: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        served.complete(**{"prompt": PROMPTS[0], **options})
    body: Any = caught.value.body
    assert (body["type"], body["param"], body["code"]) == ("invalid_request_error", param, code)
    assert message in body["message"]


def turn(**fields: Any) -> dict[str, Any]:
    return {"model": "golden", "messages": [{"role": "user", "content": "a", **fields}]}


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({}, 400, "'model' is missing"),
        ({"model": "golden"}, 400, "'messages' is missing"),
        ({"model": "golden", "messages": []}, 400, "at least 1 item"),
        ({"model": "golden", "messages": [{"role": "tool", "content": ""}]}, 400, "'messages[0].role'"),
        ({"model": "golden", "messages": [{"role": "user", "content": "", "x": 1}]}, 400, "'messages[0].x'"),
        (
            {"model": "golden", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            400,
            "content[0].type",
        ),
        (
            {"model": "gpt", "messages": [{"role": "user", "content": "a"}]},
            404,
            "no model 'gpt'; this server has 'golden'",
        ),
        ([], 400, "not a JSON object"),
        (b"{", 400, "not JSON"),
        (b'{"model": NaN}', 400, "not JSON"),
        (b'{"model": "\\ud800"}', 400, "not JSON"),
        (b"[" * 100_000, 400, "not JSON"),
        (b" " * (4 * 2**20 + 1), 413, "more than 4194304 bytes"),
    ],
)
def test_bodies_that_are_no_request(served: Any, body: Any, status: int, message: str) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = served.post("/v1/chat/completions", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == status
    assert message in response.json()["error"]["message"]


def test_other_paths_and_types(served: Any) -> None:
    get = served.client._client.get
    assert get(f"{served.url}/health").json() == {"status": "ok"}
    assert get(f"{served.url}/v1/embeddings").json()["error"]["type"] == "invalid_request_error"
    assert get(f"{served.url}/v1/completions").status_code == 405
    response = served.post("/v1/completions", content=b"{}", headers={"Content-Type": "text/plain"})
    assert "application/json" in response.json()["error"]["message"]
    assert [model.id for model in served.client.models.list()] == ["golden"]
    assert served.client.models.retrieve("golden").owned_by == "moec"
    with pytest.raises(openai.NotFoundError):
        served.client.models.retrieve("other")
    schema = get(f"{served.url}/openapi.json").json()
    body = schema["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert "routing_budget" in body["properties"]


def test_a_key(serve: Callable[..., Any]) -> None:
    served = serve(api_key="s3cret")
    assert served.complete(PROMPTS[0], max_tokens=1).choices
    with pytest.raises(openai.AuthenticationError, match="Authorization: Bearer KEY"):
        served.client.with_options(api_key="other").models.list()
    get = served.client._client.get
    assert get(f"{served.url}/metrics").status_code == 401
    assert get(f"{served.url}/health").status_code == 200
    assert served.metrics()["moec_http_responses_total{other,401}"] == 2


def test_another_name_of_this_machine_is_not_let_in(serve: Callable[..., Any]) -> None:
    served = serve(hosts=frozenset({"localhost", "127.0.0.1", "::1"}))
    get = served.client._client.get
    for host, status in [("[::1]:80", 200), ("LOCALHOST", 200), ("evil.example:80", 403), ("[", 403), ("", 403)]:
        assert get(f"{served.url}/v1/models", headers={"Host": host}).status_code == status, host


def test_a_model_without_a_chat_template(golden_onnx: Path, tmp_path: Path, serve: Callable[..., Any]) -> None:
    out = tmp_path / "out"
    shutil.copytree(golden_onnx, out)
    (out / "chat_template.jinja").unlink()
    served = serve(moec.load(out))
    with pytest.raises(openai.BadRequestError, match=r"no chat template; .* use /v1/completions"):
        served.chat("Hello")


def test_metrics_add_up(serve: Callable[..., Any]) -> None:
    served = serve()
    served.complete(PROMPTS[0])
    text_of(served.complete(PROMPTS[0], stream=True, max_tokens=8))
    with pytest.raises(openai.BadRequestError):
        served.complete(PROMPTS[0], n=2)
    found = served.metrics()
    assert found["moec_http_responses_total{/v1/completions,200}"] == 2
    assert found["moec_http_responses_total{/v1/completions,400}"] == 1
    assert found["moec_generations_total{length}"] == 2
    assert found["moec_generated_tokens_total"] == 32
    assert found["moec_prompt_tokens_total"] == 10
    assert found["moec_first_token_seconds_count"] == found["moec_request_seconds_count"] == 2
    assert 0 < found["moec_first_token_seconds_sum"] < found["moec_request_seconds_sum"] < 20
    assert found["moec_requests_active"] == found["moec_requests_waiting"] == 0


@pytest.mark.parametrize("streams", [True, False])
def test_a_client_that_goes_away_frees_its_place(serve: Callable[..., Any], streams: bool) -> None:
    served = serve(parallel=1)
    body = {"model": "golden", "prompt": PROMPTS[0], "max_tokens": 1000, "temperature": 0, "stream": streams}
    content = json.dumps(body).encode()
    fields = f"Host: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    with socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2]))) as client:
        client.sendall(f"POST /v1/completions HTTP/1.1\r\n{fields}\r\n\r\n".encode() + content)
        served.until("moec_requests_active", 1)
    served.until("moec_requests_active", 0)
    found = served.metrics()
    assert found["moec_generations_total{cancelled}"] == 1
    assert found["moec_generated_tokens_total"] < 1000
    assert served.complete(PROMPTS[0]).usage.completion_tokens == 24


def test_too_many_requests(serve: Callable[..., Any]) -> None:
    served = serve(parallel=1, max_requests=2)
    streams = [served.complete(PROMPTS[0], stream=True, max_tokens=1000)]
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(served.complete, PROMPTS[1])
        served.until("moec_requests_waiting", 1)
        with pytest.raises(openai.RateLimitError, match="2 requests are running or waiting") as caught:
            served.complete(PROMPTS[2])
        assert caught.value.response.headers["retry-after"] == "1"
        streams[0].close()
        assert waits.result(30).usage.completion_tokens == 24


def test_experts_in_the_metrics(golden_model: Path, serve: Callable[..., Any], served: Any, tmp_path: Path) -> None:
    directory = tmp_path / "told"
    moec.export(golden_model, target="onnx", output=directory, gates=False, routing_outputs=True)
    told = serve(moec.load(directory, threads=1))
    answer = told.complete(PROMPTS[0], max_tokens=8)
    samples = told.metrics()
    counts = [value for name, value in samples.items() if name.startswith("moec_expert_tokens_total{")]
    config = json.loads((golden_model / "config.json").read_text())
    assert len(counts) == config["num_hidden_layers"] * config["num_experts"]
    # The last token of an answer is not fed.
    fed = answer.usage.prompt_tokens + answer.usage.completion_tokens - 1
    assert sum(counts) == fed * config["num_experts_per_tok"] * config["num_hidden_layers"]
    assert "moec_expert_tokens_total{0,0}" in samples
    assert not [name for name in served.metrics() if name.startswith("moec_expert_tokens")]
