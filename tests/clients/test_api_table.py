"""docs/api.md has a row for every name of the five documents, and what a row points to exists."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from seed_page import page_blocks

import nat_plugin_evsys
from nat_plugin_evsys import types
from nat_plugin_evsys.errors import UnsupportedError

API = Path(__file__).parents[2] / "docs" / "api.md"

TINKER = """
    TrainingClient TelemetryProvider QueueStateObserver holder model_id create_lora_training_client forward
    forward_async forward_backward forward_backward_async forward_backward_custom forward_backward_custom_async
    optim_step optim_step_async save_state save_state_async load_state load_state_async load_state_with_optimizer
    load_state_with_optimizer_async save_weights_for_sampler save_weights_for_sampler_async get_info get_info_async
    get_tokenizer create_sampling_client create_sampling_client_async save_weights_and_get_sampling_client
    save_weights_and_get_sampling_client_async retry_config RetryConfig APIFuture result.loss result.metrics
    result.path model_data.model_id model_data.model_name model_data.lora_rank Datum LossFnType CustomLossFnV1
    ForwardBackwardOutput OptimStepResponse SaveWeightsResponse LoadWeightsResponse SaveWeightsForSamplerResponse
    GetInfoResponse PreTrainedTokenizer SamplingClient sample AdamParams SamplingParams ModelInput
    ModelInput.from_ints base_model data loss_fn loss_fn_config adam_params name path model_path Datum.model_input
    Datum.loss_fn_inputs AdamParams.learning_rate AdamParams.weight_decay SamplingParams.max_tokens
"""
LOOPS = """
    ServiceClient TrainingClient SamplingClient Datum ModelInput ModelInput.from_ints ModelInputChunk EncodedTextChunk
    ImageChunk TensorData TensorData.to_torch TensorData.from_torch SamplingParams SamplingParams.temperature
    SamplingParams.top_p SamplingParams.top_k SamplingParams.max_tokens SamplingParams.seed SamplingParams.stop
    AdamParams AdamParams.learning_rate AdamParams.beta1 AdamParams.beta2 AdamParams.eps AdamParams.weight_decay
    AdamParams.grad_clip_norm WandbConfig create_lora_training_client sample SampleResult SampleResult.sequences
    SampleResult.policy_version SampleResult.prompt_logprobs SampleResult.topk_prompt_logprobs SampledSequence
    Checkpoint list_checkpoints CheckpointFilesResponse CheckpointFile presigned_urls get_checkpoint_archive_url
    ServerCapabilities SupportedModel get_server_capabilities OperationFuture OperationFuture.result
    ForwardBackwardFuture forward forward_backward save_weights_and_get_sampling_client ForwardBackwardOutput
    OptimStepResponse SaveWeightsResponse SaveWeightsForSamplerResponse LoadWeightsResponse InitTrainerServerResponse
    SampleResponse CheckpointFile.relative_file_name CheckpointFile.node_rank CheckpointFile.size_bytes
    CheckpointFile.last_modified OperationFuture.result(timeout=)
"""
WEAVER = """
    ServiceClient ServiceClient(api_key=) create_model create_model(base_model=) create_model(lora_config=)
    get_tokenizer Datum Datum.model_input Datum.loss_fn_inputs ModelInput.from_ints forward_backward
    forward_backward(datums=) forward_backward(loss_fn=) forward_backward(loss_fn_config=) forward_backward(wait=)
    result result.loss_fn_outputs result.metrics.loss optim_step optim_step(adam_params=) optim_step(wait=) AdamParams
    AdamParams.learning_rate AdamParams.beta1 AdamParams.beta2 AdamParams.eps save_weights_and_get_sampling_client
    save_weights_and_get_sampling_client(name=) create_sampling_client create_sampling_client(model_path=)
    create_sampling_client(base_model=) sample sample(prompt=) sample(sampling_params=) sample(num_samples=)
    sample(include_prompt_logprobs=) sequences tokens text logprobs stop_reason SamplingParams
    SamplingParams.max_tokens SamplingParams.temperature SamplingParams.top_p SamplingParams.top_k SamplingParams.stop
    SamplingParams.repetition_penalty compute_logprobs compute_logprobs(prompt=) TrainingClient result.get
    SamplingClient
"""
EVSYS = """
    Backend forward_backward_async forward_backward_custom_async optim_step_async save_for_sampler save_full_state
    snapshot_sampling_client get_tokenizer LossCallable LossFnType SamplingClient ForwardBackwardResult
    OptimStepResult forward_backward_async(data=) forward_backward_async(loss_fn=)
    forward_backward_async(loss_fn_config=) forward_backward_custom_async(data=)
    forward_backward_custom_async(loss_fn=) optim_step_async(adam=) save_for_sampler(name=) save_full_state(name=)
    snapshot_sampling_client(name=)
"""
NAT_ART = """
    ARTTrainerAdapter adapter_config remote_backend model _model_internal_config _training_jobs training_jobs
    initialize is_healthy _validate_episode_order _construct_trajectory_groups submit status wait_until_complete
    initialize(run_config=) _validate_episode_order(traj=) _construct_trajectory_groups(trajectory_lists=)
    submit(trajectories=) status(ref=) wait_until_complete(poll_interval=)
"""
SEEDS = {"Tinker": TINKER, "Loops": LOOPS, "Weaver": WEAVER, "evsys": EVSYS, "NAT-ART": NAT_ART}
NAMES = [(seed, name) for seed, names in SEEDS.items() for name in names.split()]


def rows(seed: str) -> dict[str, tuple[str, str, str]]:
    """Name -> (here, how, note) of the seed's table."""
    section = re.split(r"^### ", API.read_text(), flags=re.M)
    (text,) = [part for part in section if part.startswith(f"{seed} (")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:2] == "| "]
    return {name.strip("`"): (here, how, note) for name, here, how, note in cells[1:]}


def resolve(dotted: str) -> Any:
    """The object that a name of this package means; a field of a class gives the class."""
    name, _, parameter = dotted.rstrip("=)").partition("(")
    found: Any = nat_plugin_evsys
    for part in name.split("."):
        if not hasattr(found, part) and inspect.ismodule(found) and hasattr(found, "__path__"):
            importlib.import_module(f"{found.__name__}.{part}")
        if hasattr(found, part):
            found = getattr(found, part)
        else:
            fields = getattr(found, "model_fields", None) or {f.name for f in dataclasses.fields(found)}
            assert part in fields, f"{found} has no {part}"
    if parameter:
        assert parameter in inspect.signature(found).parameters, f"{name} has no parameter {parameter}"
    return found


@pytest.mark.parametrize(("seed", "name"), NAMES)
def test_every_name_has_a_row_that_resolves(seed: str, name: str) -> None:
    here, how, note = rows(seed)[name]
    assert how in ("same", "renamed", "extension", "refused")
    if how == "refused":
        assert note
    if here == "—":
        assert how == "refused"
    else:
        resolve(here.strip("`"))


@pytest.mark.parametrize("seed", SEEDS)
def test_no_row_is_about_something_else(seed: str) -> None:
    assert set(rows(seed)) == {name for other, name in NAMES if other == seed}


@pytest.mark.parametrize("page", ["Tinker", "Weaver"])
def test_every_code_block_has_a_row(page: str) -> None:
    found = re.findall(
        rf"^\| {page} \| (\d+) \| `(.*)` \| `test_{page.lower()}_page.py` \|$", API.read_text(), flags=re.M
    )
    blocks = page_blocks(page.lower())
    assert found == [(str(line), title) for title, (line, _) in blocks.items()]


@pytest.mark.parametrize("seed", SEEDS)
def test_what_the_table_calls_refused_refuses(seed: str) -> None:
    checked = 0
    for here, how, _ in rows(seed).values():
        if how == "refused" and re.fullmatch(r"`(Training|Sampling)Client\.(get_tele|on_queue).*`", here):
            with pytest.raises(UnsupportedError, match="is not offered"):
                resolve(here.strip("`"))(None)
            checked += 1
    assert checked == {"Tinker": 2}.get(seed, 0)


def test_the_package_exports_its_clients_lazily() -> None:
    assert set(nat_plugin_evsys.__all__) >= {"ServiceClient", "TrainingClient", "SamplingClient", "RestClient", "types"}
    assert types.Datum.__module__ == "nat_plugin_evsys.runtime.extensions"
    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        nat_plugin_evsys.Trainer  # noqa: B018 - the access is the test


def test_the_example_at_the_top_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("EVSYS_HOME", str(tmp_path))
    example = API.read_text().split("```python\n")[1].split("```")[0]
    exec(compile(example, "docs/api.md", "exec"), {})
    losses = [float(line.split()[0]) for line in capsys.readouterr().out.splitlines()[:10]]
    assert losses[-1] < losses[0]
