"""Every name of Loops' page on types, which has no code of its own: what the calls give is of these types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

LOOPS = """
from nat_plugin_evsys.types import (
    Datum, ModelInput, ModelInputChunk, EncodedTextChunk, ImageChunk, TensorData,
    SamplingParams, AdamParams, WandbConfig,
    SampleResult, SampledSequence, Checkpoint, CheckpointFilesResponse, CheckpointFile,
    ServerCapabilities, SupportedModel,
    OperationFuture, ForwardBackwardFuture, ForwardBackwardOutput, OptimStepResponse, SaveWeightsResponse,
    SaveWeightsForSamplerResponse, LoadWeightsResponse, InitTrainerServerResponse, SampleResponse,
)
from nat_plugin_evsys import ServiceClient, TrainingClient, SamplingClient
"""


def test_loops_types_are_what_the_calls_give(tmp_path: Path, tiny_model: str) -> None:
    loops: dict[str, Any] = {}
    exec(LOOPS, loops)
    is_a = {name: kind for name, kind in loops.items() if not name.startswith("_")}
    datum = is_a["Datum"](
        is_a["ModelInput"](chunks=[is_a["EncodedTextChunk"](tokens=[1, 2, 3])]),
        {"target_tokens": is_a["TensorData"].from_torch(torch.tensor([2, 3, 4]))},
    )
    assert datum.loss_fn_inputs["target_tokens"].to_torch().tolist() == [2, 3, 4]
    with is_a["ServiceClient"](store=tmp_path) as service:
        found = service.get_server_capabilities()
        assert isinstance(found, is_a["ServerCapabilities"])
        assert all(isinstance(model, is_a["SupportedModel"]) for model in found.supported_models)
        client = service.create_lora_training_client(tiny_model, rank=2).result(timeout=60)
        assert isinstance(client, is_a["TrainingClient"])
        assert isinstance(client.get_info(), is_a["InitTrainerServerResponse"])
        future = client.forward_backward([datum], "cross_entropy")
        assert isinstance(future, is_a["ForwardBackwardFuture"])
        assert isinstance(future, is_a["OperationFuture"])
        assert isinstance(future.result(timeout=60), is_a["ForwardBackwardOutput"])
        adam = is_a["AdamParams"](
            learning_rate=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.01, grad_clip_norm=1.0
        )
        assert isinstance(client.optim_step(adam).result(), is_a["OptimStepResponse"])
        saved = client.save_state("state").result()
        assert isinstance(saved, is_a["SaveWeightsResponse"])
        assert isinstance(client.save_weights_for_sampler("s").result(), is_a["SaveWeightsForSamplerResponse"])
        assert isinstance(client.load_state(saved.path).result(), is_a["LoadWeightsResponse"])
        checkpoints = service.list_checkpoints()
        assert all(isinstance(checkpoint, is_a["Checkpoint"]) for checkpoint in checkpoints)
        files = service.get_checkpoint_archive_url(checkpoints[0])
        assert isinstance(files, is_a["CheckpointFilesResponse"])
        assert all(isinstance(file, is_a["CheckpointFile"]) for file in files.presigned_urls)
        sampling = client.save_weights_and_get_sampling_client()
        assert isinstance(sampling.result(timeout=60), is_a["SamplingClient"])
        params = is_a["SamplingParams"](temperature=0.0, top_p=1.0, top_k=0, max_tokens=3, seed=1, stop=[])
        prompt = is_a["ModelInput"].from_ints([1, 2, 3])
        result = sampling.sample(prompt, 1, params, include_prompt_logprobs=True, topk_prompt_logprobs=2).result()
        assert isinstance(result, is_a["SampleResult"])
        assert isinstance(result, is_a["SampleResponse"])
        assert isinstance(result.sequences[0], is_a["SampledSequence"])
        assert (result.policy_version, len(result.prompt_logprobs), len(result.topk_prompt_logprobs[2])) == (1, 3, 2)
