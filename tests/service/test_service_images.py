"""Images over HTTP: the unmodified SDK gets what the engine in process gives; the chat endpoint reads data: URLs."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import tinker
import torch
import transformers
from PIL import Image
from serve_process import ServerProcess, start_server
from tinker import types
from tiny_vision import (
    END_ID,
    PLACE_ID,
    START,
    START_ID,
    chunk_of,
    file_of,
    gemma_tokenizer,
    image_processor,
    picture,
    save_vision_model,
    text,
    vision_model,
)

from nat_plugin_evsys import ServiceClient

PARTS = ([5, START_ID], [END_ID, 7, 8, 9])
IMAGE_TOKENS = 4
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<|vision_start|>{% else %}"
    "{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def prompt(seed: int) -> types.ModelInput:
    return types.ModelInput(chunks=[text(*PARTS[0]), chunk_of(picture(seed), "jpeg"), text(*PARTS[1])])


def datum(seed: int) -> types.Datum:
    count = sum(map(len, PARTS)) + IMAGE_TOKENS
    inputs: dict[str, Any] = {"target_tokens": torch.arange(count), "weights": torch.ones(count)}
    return types.Datum(prompt(seed), {name: types.TensorData.from_torch(value) for name, value in inputs.items()})


def trained_and_sampled(service: Any, model: str) -> tuple[list[torch.Tensor], list[Any]]:
    """Logprobs of two passes with a step between them, and what is then sampled for two images."""
    training = service.create_lora_training_client(base_model=model, rank=4, seed=3).result()
    data = [datum(1), datum(2)]
    outputs = training.forward_backward(data, "cross_entropy").result().loss_fn_outputs
    training.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    outputs += training.forward(data, "cross_entropy").result().loss_fn_outputs
    client = training.save_weights_and_get_sampling_client().result()
    params = types.SamplingParams(max_tokens=4, temperature=0.0, stop=[])
    futures = [client.sample(prompt(seed), 1, params, include_prompt_logprobs=True) for seed in (1, 2)]
    return [output["logprobs"].to_torch() for output in outputs], [future.result() for future in futures]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = save_vision_model("gemma3", tmp_path_factory.mktemp("images") / "gemma3")
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[ServerProcess]:
    started = start_server(model, model.parent / "store", "--poll-seconds", "3")
    yield started
    started.stop()


def test_server_and_engine_agree(model: Path, server: ServerProcess, tmp_path: Path) -> None:
    with tinker.ServiceClient(base_url=server.url, api_key="tml-local") as remote:
        theirs, their_samples = trained_and_sampled(remote, str(model))
        bare = remote.create_sampling_client(base_model=str(model)).result()
        no_image = types.ImageChunk(data=b"no image", format="png", expected_tokens=4)
        with pytest.raises(tinker.TinkerError, match="the prompt has an image that cannot be read as png"):
            bare.sample(types.ModelInput(chunks=[no_image, text(1)]), 1, types.SamplingParams(max_tokens=1)).result()
    with ServiceClient(store=tmp_path, device="cpu") as here:
        ours, our_samples = trained_and_sampled(here, str(model))
    for one, other in zip(theirs, ours, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    assert (theirs[0] - theirs[2]).abs().max() > 1e-3
    for theirs_of, ours_of in zip(their_samples, our_samples, strict=True):
        assert theirs_of.sequences[0].tokens == ours_of.sequences[0].tokens
        torch.testing.assert_close(
            torch.tensor(theirs_of.prompt_logprobs[1:]), torch.tensor(ours_of.prompt_logprobs[1:]), atol=1e-5, rtol=0
        )
    assert their_samples[0].prompt_logprobs != their_samples[1].prompt_logprobs


def message(*parts: str | Image.Image) -> dict[str, Any]:
    """Text, and images as data: URLs."""
    content: list[dict[str, Any]] = []
    for part in parts:
        if isinstance(part, str):
            content.append({"type": "text", "text": part})
        else:
            url = f"data:image/png;base64,{base64.b64encode(file_of(part)).decode()}"
            content.append({"type": "image_url", "image_url": {"url": url}})
    return {"role": "user", "content": content}


def test_chat_reads_images_as_transformers_processor_does(model: Path, server: ServerProcess) -> None:
    one, other = picture(1), picture(2, 40, 30)
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    asked = {"model": str(model), "max_tokens": 5, "temperature": 0.0, "extra_body": {"return_token_ids": True}}

    def answer(*parts: str | Image.Image) -> Any:
        return client.chat.completions.create(messages=[message(*parts)], **asked)  # type: ignore[call-overload]

    found = answer("see ", one, " and ", other, f" not {START}")
    # A control token in the user's text stays text; the processor is given the template's marks alone.
    processor = transformers.Gemma3Processor(image_processor("gemma3"), gemma_tokenizer(), image_seq_length=4)
    written = f"user: see {START} and {START}"
    inputs = processor(text=[written], images=[[one, other]], return_tensors="pt")
    expected = inputs["input_ids"][0].tolist()
    cut = len(expected) - expected[::-1].index(END_ID)
    prompt_ids = found.prompt_token_ids
    assert found.usage.prompt_tokens == len(prompt_ids)
    assert prompt_ids[:cut] == expected[:cut]
    assert prompt_ids[cut:].count(START_ID) == 0
    assert prompt_ids.count(PLACE_ID) == expected.count(PLACE_ID) == 2 * IMAGE_TOKENS

    ids = torch.tensor([prompt_ids])
    given = {"pixel_values": inputs["pixel_values"], "token_type_ids": (ids == PLACE_ID).long()}
    options = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": [PLACE_ID, 261, 262, 263], "pad_token_id": 0}
    made = vision_model("gemma3").generate(input_ids=ids, **given, **options)[0, len(prompt_ids) :].tolist()  # type: ignore[operator]
    assert found.choices[0].token_ids == made
    assert answer("see ", one).choices[0].token_ids is not None
    streamed = client.chat.completions.create(messages=[message("see ", one)], stream=True, **asked)  # type: ignore[call-overload]
    assert sum(len(chunk.choices) for chunk in streamed)


@pytest.mark.parametrize(
    ("part", "says"),
    [
        (
            {"image_url": {"url": "https://x/y.png"}},
            r"content\[0\].image_url.url` must be data:.*nothing is fetched",
        ),
        ({"image_url": {"url": "data:image/gif;base64,AAAA"}}, "must be data:image/png"),
        ({"image_url": {"url": "data:image/png;base64,?"}}, "is not base64"),
        (
            {"image_url": {"url": "data:image/png;base64,AAAA"}},
            r"content\[0\]` has an image that cannot be read",
        ),
        ({"image_url": {"url": "data:image/png;base64,AAAA", "detail": "high"}}, "detail` is not offered"),
        ({"image_url": None}, "must be data:image/png"),
    ],
)
def test_other_images_are_refused(model: Path, server: ServerProcess, part: dict[str, Any], says: str) -> None:
    body = {"model": str(model), "messages": [{"role": "user", "content": [{"type": "image_url", **part}]}]}
    answered = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
    assert answered.status_code == 400
    assert re.search(says, answered.json()["error"]["message"]), answered.text
