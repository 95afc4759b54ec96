"""Datums with images: logprobs and gradients against transformers' own classes on the processor's inputs, and PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tinker import types
from tiny import perturb
from tiny_vision import (
    END_ID,
    PLACE_ID,
    START_ID,
    VISION_FAMILIES,
    chunk_of,
    picture,
    processed,
    text,
    vision_model,
)

from nat_plugin_evsys.engine.gradient.trainable import TrainableModel
from nat_plugin_evsys.engine.model.loading import load_base_model
from nat_plugin_evsys.engine.model.lora import LoraAdapter
from nat_plugin_evsys.engine.model.peft_check import load_in_peft, write_adapter
from nat_plugin_evsys.errors import DataError
from nat_plugin_evsys.runtime.export import export_merged

PARTS = [[5, START_ID], [END_ID, 7, 8, START_ID], [END_ID, 9, 10, 11, 12]]
WEIGHED = 4
COUNTS = {"qwen2_5_vl": 6, "gemma3": 4}


def datum(images: list[Any], parts: list[list[int]], targets: torch.Tensor) -> types.Datum:
    chunks: list[Any] = [text(*parts[0])]
    for image, part in zip(images, parts[1:], strict=True):
        chunks += [chunk_of(image), text(*part)]
    weights = torch.zeros(len(targets))
    weights[-WEIGHED:] = torch.arange(1.0, WEIGHED + 1)
    inputs: dict[str, Any] = {"target_tokens": targets, "weights": weights}
    inputs = {name: types.TensorData.from_torch(value) for name, value in inputs.items()}
    return types.Datum(types.ModelInput(chunks=chunks), inputs)


def targets_of(inputs: dict[str, Any]) -> torch.Tensor:
    ids: torch.Tensor = inputs["input_ids"][0]
    return torch.cat([ids[1:], torch.tensor([3])])


def trainable(base: Any) -> TrainableModel:
    adapter = LoraAdapter.create(base.model, rank=3, alpha=6.0, train_unembed=False)
    return TrainableModel(base, perturb(adapter, 1))


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_logprobs_and_gradients_are_transformers_and_pefts(vision_base_of: Any, family: str, tmp_path: Path) -> None:
    base = vision_base_of(family)
    model = trainable(base)
    assert all(name.startswith("model.language_model.") for name in model.adapter.weights)
    # Two images of unequal size in one Datum, one of them again in another, and one Datum of text beside them.
    images = [[picture(1), picture(2, 17, 24)], [picture(2, 17, 24)], []]
    parts = [PARTS, [[4, 4, START_ID], [END_ID, 6, 7, 8, 9]], [[1, 2, 3, 4, 5, 6]]]
    inputs = [
        processed(family, i, p) if i else {"input_ids": torch.tensor(p)} for i, p in zip(images, parts, strict=True)
    ]
    data = [datum(i, p, targets_of(x)) for i, p, x in zip(images, parts, inputs, strict=True)]
    found = model.forward_backward(data, "cross_entropy")

    write_adapter(tmp_path, base, model.adapter)
    peft = load_in_peft(vision_model(family), tmp_path, trainable=True)
    loss = torch.zeros(())
    for output, given, x in zip(found.loss_fn_outputs, data, inputs, strict=True):
        logprobs = peft(**x).logits.log_softmax(-1)[0].gather(1, targets_of(x)[:, None])[:, 0]
        torch.testing.assert_close(output["logprobs"].to_torch(), logprobs.detach(), atol=1e-5, rtol=0)
        loss = loss - (logprobs * given.loss_fn_inputs["weights"].to_torch()).sum()
    loss.backward()  # type: ignore[no-untyped-call]  # torch
    expected = {
        name.removeprefix("base_model.model.").replace(".default", ""): parameter.grad
        for name, parameter in peft.named_parameters()
        if parameter.grad is not None
    }
    assert model.gradient is not None
    assert set(model.gradient) == set(expected)
    for name, gradient in model.gradient.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_another_image_gives_other_logprobs(vision_base_of: Any, family: str) -> None:
    model = trainable(vision_base_of(family))
    parts = [[5, START_ID], [END_ID, 9, 10, 11, 12]]
    targets = targets_of(processed(family, [picture(1)], parts))

    def logprobs(seed: int) -> torch.Tensor:
        output = model.forward([datum([picture(seed)], parts, targets)], "cross_entropy").loss_fn_outputs[0]
        return output["logprobs"].to_torch()[-WEIGHED:]

    assert (logprobs(1) - logprobs(2)).abs().max() > 1e-3
    assert torch.equal(logprobs(1), logprobs(1))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_a_merged_model_reads_images_as_the_trained_one_does(vision_base_of: Any, family: str, tmp_path: Path) -> None:
    base = vision_base_of(family)
    model = trainable(base)
    data = [datum([picture(1)], [[5, START_ID], [END_ID, 9, 10, 11, 12]], torch.arange(COUNTS[family] + 7))]
    expected = model.forward(data, "cross_entropy").loss_fn_outputs[0]["logprobs"].to_torch()
    export_merged(base, model.adapter, tmp_path / "merged")
    merged = load_base_model(str(tmp_path / "merged"), device="cpu")
    bare = TrainableModel(merged, LoraAdapter.create(merged.model, rank=1, alpha=1.0, train_unembed=False))
    found = bare.forward(data, "cross_entropy").loss_fn_outputs[0]["logprobs"].to_torch()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_a_placeholder_without_an_image_is_refused(vision_base_of: Any) -> None:
    model = trainable(vision_base_of("qwen3_vl"))
    alone = datum([], [[4, PLACE_ID, 5, 6]], torch.arange(4))
    with pytest.raises(
        DataError, match=rf"data\[0\]: model_input has token {PLACE_ID} at 1, which stands for an image"
    ):
        model.forward([alone], "cross_entropy")
