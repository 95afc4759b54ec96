"""Malformed calls over all clients: each is refused by name, and training goes on as if it had not been made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tinker
import torch

from nat_plugin_evsys import RestClient, SamplingClient, ServiceClient, TrainingClient, types
from nat_plugin_evsys.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    EngineClosedError,
    ModelError,
    NonFiniteGradientError,
    PromptTooLongError,
    UnsupportedError,
)

ADAM = types.AdamParams(learning_rate=1e-2)
GREEDY = types.SamplingParams(max_tokens=2, temperature=0)


@dataclass
class World:
    """What the calls are made on."""

    service: ServiceClient
    closed_service: ServiceClient
    client: TrainingClient
    closed: TrainingClient
    sampling: SamplingClient
    orphan: SamplingClient
    rest: RestClient
    model: str
    other_model: str
    state: str
    weights: str
    torn: str
    empty: Path


def ce(tokens: Any = (1, 2, 3), **inputs: Any) -> list[types.Datum]:
    """One cross_entropy Datum, its inputs replaced by ``inputs``; None leaves one out."""
    given = {"target_tokens": [2, 3, 4], **inputs}
    kept = {key: value for key, value in given.items() if value is not None}
    return [types.Datum(types.ModelInput.from_ints(list(tokens)), kept)]


def rl(**inputs: Any) -> list[types.Datum]:
    return ce(**{"logprobs": [-1.0, -1.0, -1.0], "advantages": [0.0, 1.0, -1.0], **inputs})


def ints(*shape: int) -> types.TensorData:
    return types.TensorData.from_torch(torch.ones(*shape, dtype=torch.int64))


def floats(*values: float) -> types.TensorData:
    return types.TensorData.from_torch(torch.tensor(values))


def image() -> types.ModelInput:
    chunk = tinker.types.ImageChunk(data=b"0", format="png", expected_tokens=4)
    return types.ModelInput(chunks=[chunk])


def boom(data: Any, logprobs: Any) -> Any:
    raise ZeroDivisionError("the user's own bug")


def params(**fields: Any) -> types.SamplingParams:
    return types.SamplingParams(**{"max_tokens": 2, **fields})


Call = Callable[[World], Any]
FB = "forward_backward"


def fb(data: Any, loss_fn: Any = "cross_entropy", config: Any = None) -> Call:
    return lambda w: w.client.forward_backward(data, loss_fn, config)


def custom(loss_fn: Any, data: Any = None) -> Call:
    return lambda w: w.client.forward_backward_custom(ce() if data is None else data, loss_fn)


def new(**options: Any) -> Call:
    return lambda w: w.service.create_lora_training_client(**{"base_model": w.model, "rank": 2, **options})


def sample(prompt: Any = (1, 2), n: Any = 1, sampling_params: Any = GREEDY, **options: Any) -> Call:
    return lambda w: w.sampling.sample(
        types.ModelInput.from_ints(list(prompt)) if isinstance(prompt, tuple) else prompt, n, sampling_params, **options
    )


CONSTRUCTOR: list[tuple[str, Call, type[Exception], str]] = [
    ("api_key", lambda w: ServiceClient(api_key=7), ConfigError, "api_key must be a non-empty string, got 7"),
    ("base_url", lambda w: ServiceClient(base_url="u"), UnsupportedError, "base_url is not offered"),
    ("project_id", lambda w: ServiceClient(project_id="p"), UnsupportedError, "project_id is not offered"),
    ("display_name", lambda w: ServiceClient(display_name="d"), UnsupportedError, "display_name is not offered"),
    ("headers", lambda w: ServiceClient(default_headers_overrides={"a": "b"}), UnsupportedError, "over HTTP"),
    (
        "metadata",
        lambda w: ServiceClient(user_metadata={"a": 1}),
        ConfigError,
        "user_metadata must be a dict from strings",
    ),
    (
        "context 1",
        lambda w: ServiceClient(context_length=1),
        ConfigError,
        "context_length must be .* at least 2, got 1",
    ),
    ("batch 0", lambda w: ServiceClient(max_batch_size=0), ConfigError, "max_batch_size must be .* at least 1, got 0"),
    ("device", lambda w: ServiceClient(device=""), ConfigError, "device must be a non-empty string"),
    ("trust", lambda w: ServiceClient(trust_remote_code="yes"), ConfigError, "trust_remote_code must be True or False"),
    (
        "unknown device",
        lambda w: ServiceClient(device="tpu").create_lora_training_client(w.model),
        ConfigError,
        "device 'tpu' is not a torch device; use auto, cpu",
    ),
    (
        "unknown dtype",
        lambda w: ServiceClient(dtype="int3").create_sampling_client(base_model=w.model),
        ConfigError,
        "dtype 'int3' is unknown; use one of auto",
    ),
]

CREATING: list[tuple[str, Call, type[Exception], str]] = [
    ("no base", new(base_model=""), ConfigError, "base_model must be a non-empty string, got ''"),
    ("base None", new(base_model=None), ConfigError, "base_model must be a non-empty string, got None"),
    ("base missing", new(base_model="./nowhere"), ModelError, "base_model './nowhere': no such directory"),
    ("base builtin", new(base_model="builtin/huge"), ModelError, "no builtin model `builtin/huge`"),
    ("rank 0", new(rank=0), ConfigError, "rank must be an integer of at least 1, got 0"),
    ("rank 2.5", new(rank=2.5), ConfigError, "rank must be an integer of at least 1, got 2.5"),
    ("rank True", new(rank=True), ConfigError, "rank must be an integer of at least 1, got True"),
    ("seed text", new(seed="x"), ConfigError, "seed must be an integer or None"),
    ("flag 1", new(train_mlp=1), ConfigError, "train_mlp must be True or False, got 1"),
    ("nothing", new(train_mlp=False, train_attn=False, train_unembed=False), ConfigError, "nothing to train: set at"),
    ("run metadata", new(user_metadata=["a"]), ConfigError, "user_metadata must be a dict from strings to strings"),
    ("optimizer", new(optimizer=tinker.DimuonOptimizerConfig()), UnsupportedError, "optimizer 'dimuon' is not offered"),
    ("lora key", lambda w: w.service.create_model(w.model, {"rnk": 4}), ConfigError, "lora_config .*rnk: Extra inputs"),
    ("lora value", lambda w: w.service.create_model(w.model, {"rank": "x"}), ConfigError, "lora_config .*rank: "),
    ("lora 32", lambda w: w.service.create_model(w.model, 32), ConfigError, "lora_config must be a dict such as"),
    (
        "state missing",
        lambda w: w.service.create_training_client_from_state("/nowhere/at/all"),
        CheckpointError,
        "checkpoint /nowhere/at/all does not exist; give the path that a save returned",
    ),
    (
        "state token",
        lambda w: w.service.create_training_client_from_state(w.state, weights_access_token="t"),
        UnsupportedError,
        "weights_access_token is not offered: there are no accounts",
    ),
    (
        "state of another base",
        lambda w: w.service.create_training_client_from_state(w.state, base_model=w.other_model),
        CheckpointError,
        "was made for another base model",
    ),
    (
        "state torn",
        lambda w: w.service.create_training_client_from_state(w.torn),
        CheckpointError,
        "is torn: adapter_model.safetensors is not what manifest.json recorded",
    ),
    (
        "no optimizer in it",
        lambda w: w.service.create_training_client_from_state_with_optimizer(w.weights),
        CheckpointError,
        "has no optimizer.safetensors: it was saved for sampling",
    ),
    (
        "sampling of nothing",
        lambda w: w.service.create_sampling_client(),
        ConfigError,
        "needs model_path .* or base_model",
    ),
    (
        "sampling base",
        lambda w: w.service.create_sampling_client(base_model=""),
        ConfigError,
        "base_model must be a non-",
    ),
    (
        "retry_config",
        lambda w: w.service.create_sampling_client(w.weights, retry_config=object()),
        ConfigError,
        "retry_config is a object; give types.RetryConfig",
    ),
    (
        "stability",
        lambda w: w.client.create_sampling_client(w.weights, record_stability_info=True),
        UnsupportedError,
        "record_stability_info is not offered",
    ),
    (
        "custom loss handle",
        lambda w: w.service.create_custom_loss(boom, {}),
        UnsupportedError,
        "create_custom_loss is not",
    ),
]

PATHS: list[tuple[str, Call, type[Exception], str]] = [
    (f"path {path}", lambda w, path=path: w.service.create_sampling_client(path), CheckpointError, message)
    for path, message in [
        ("tinker://", "is malformed; expected tinker://<model_id>/weights/<name>"),
        ("tinker://m/weights", "is malformed; expected"),
        ("tinker://m/weights/a/b", "is malformed; expected"),
        ("tinker://m/other/a", "is malformed; expected"),
        ("tinker://m/other_weights/a", "is malformed; expected"),
        ("tinker://../weights/a", "training run id '..' is malformed"),
        ("tinker:///weights/a", "training run id '' is malformed"),
        ("tinker://m/weights/..", "checkpoint name '..' is refused"),
        ("tinker://m/weights/.a", "checkpoint name '.a' is refused"),
        ("tinker://m/weights/a", "does not exist; give the path that a save returned"),
        ("tinker://link/weights/a", "leads out of the checkpoint store"),
        ("", "a checkpoint path is a tinker:// path or a directory, got ''"),
        (7, "a checkpoint path is a tinker:// path or a directory, got 7"),
    ]
]

DATA: list[tuple[str, Call, type[Exception], str]] = [
    ("data None", fb(None), DataError, "data is a NoneType; give a list of tinker.Datum"),
    ("data a Datum", fb(ce()[0]), DataError, "data is a Datum; give a list of tinker.Datum"),
    ("data text", fb("abc"), DataError, "data is a str; give a list of tinker.Datum"),
    ("data empty", fb([]), DataError, "data is an empty list; give at least one Datum"),
    ("data of ints", fb([42]), DataError, r"data\[0\] is a int; give a tinker.Datum"),
    ("no tokens", fb(ce([])), DataError, r"data\[0\]: model_input is empty"),
    ("token too high", fb(ce([1, 2, 260])), DataError, r"model_input\[2\] is 260; token ids are 0 to 259"),
    ("token negative", fb(ce([1, -2, 3])), DataError, r"model_input\[1\] is -2; token ids are 0 to 259"),
    ("target too high", fb(ce(target_tokens=[2, 999, 4])), DataError, r"target_tokens\[1\] is 999"),
    ("target floats", fb(ce(target_tokens=floats(1.0, 2.0, 3.0))), DataError, "target_tokens are float32; give int64"),
    ("targets missing", fb(ce(target_tokens=None)), DataError, "lacks 'target_tokens'; cross_entropy needs"),
    ("targets short", fb(ce(target_tokens=[2, 3])), DataError, r"shape \(2,\); model_input has 3 tokens"),
    ("targets 3-D", fb(ce(target_tokens=ints(3, 1, 1))), DataError, r"target_tokens have shape \(3, 1, 1\)"),
    ("second Datum", fb([*ce(), *ce([300])]), DataError, r"data\[1\]: model_input\[0\] is 300"),
    ("too long", fb(ce([1] * 257, target_tokens=[1] * 257)), DataError, "257 tokens, but .* context length is 256"),
    ("image", fb([types.Datum(image(), {"target_tokens": [1]})]), DataError, "has a ImageChunk; .* text tokens only"),
    ("weights short", fb(ce(weights=[1.0])), DataError, r"weights has shape \(1,\); .* must be \(3,\)"),
    ("weights NaN", fb(ce(weights=[1.0, float("nan"), 0.0])), DataError, r"weights\[1\] is nan; every value must be"),
    ("weights in RL", fb(rl(weights=[1.0, 1.0, 1.0]), "ppo"), DataError, "has 'weights', which ppo does not take"),
    ("logprobs missing", fb(rl(logprobs=None), "ppo"), DataError, "lacks 'logprobs'; ppo needs"),
    ("advantages missing", fb(rl(advantages=None), "cispo"), DataError, "lacks 'advantages'; cispo needs"),
    ("advantages inf", fb(rl(advantages=[0.0, float("inf"), 0.0]), "dro"), DataError, r"advantages\[1\] is inf"),
    (
        "targets 2-D in RL",
        fb(rl(target_tokens=ints(3, 2)), "ppo"),
        DataError,
        r"ppo takes target_tokens of shape \(3,\)",
    ),
    ("gspo mask", fb(rl(sequence_ratio_mask=[0.0] * 3), "gspo"), DataError, "sequence_ratio_mask is zero everywhere"),
    (
        "data twice",
        lambda w: w.client.forward_backward(ce(), "cross_entropy", datums=ce()),
        DataError,
        "data and datums are two names of the same list",
    ),
    ("loss unknown", fb(ce(), "hinge"), DataError, "loss_fn 'hinge' cannot be used: it is unknown; choose one of"),
    ("loss custom", fb(ce(), "custom"), DataError, "pass the Python function to forward_backward_custom"),
    ("loss secret", fb(ce(), "stable_reinforce"), DataError, "its formula is not public"),
    ("loss None", fb(ce(), None), DataError, "loss_fn is a NoneType; give a name such as"),
    ("loss list", fb(ce(), ["ppo"]), DataError, "loss_fn is a list; give a name such as"),
    (
        "config key",
        fb(rl(), "ppo", {"clip": 1}),
        ConfigError,
        "has the unknown key 'clip'; it takes clip_low_threshold",
    ),
    ("config for CE", fb(ce(), config={"beta": 1}), ConfigError, "unknown key 'beta'; it takes no keys at all"),
    ("config text", fb(rl(), "ppo", "clip"), ConfigError, "loss_fn_config is a str; give a dict or None"),
    ("config NaN", fb(rl(), "dro", {"beta": float("nan")}), ConfigError, "beta is nan; give a finite number >= 0"),
    (
        "thresholds crossed",
        fb(rl(), "ppo", {"clip_low_threshold": 2.0}),
        ConfigError,
        "clip_low_threshold 2.0 is above clip_high_threshold 1.2",
    ),
    ("forward", lambda w: w.client.forward([], "cross_entropy"), DataError, "data is an empty list"),
    (
        "wait raises itself",
        lambda w: w.client.forward_backward([], "cross_entropy", wait=True).done(),
        DataError,
        "data is an empty list",
    ),
]

CUSTOM: list[tuple[str, Call, type[Exception], str]] = [
    ("no function", custom("mean"), DataError, "takes a function"),
    ("own error", custom(boom), ZeroDivisionError, "the user's own bug"),
    (
        "loss only",
        custom(lambda d, lp: lp[0].sum()),
        DataError,
        r"returned a Tensor; return the tuple \(loss, metrics\)",
    ),
    (
        "number",
        custom(lambda d, lp: (lp[0].sum().item(), {})),
        DataError,
        "must return a tensor computed from the logprobs",
    ),
    ("detached", custom(lambda d, lp: (lp[0].sum().detach(), {})), DataError, "not detached"),
    ("infinite", custom(lambda d, lp: (lp[0].sum() * float("inf"), {})), DataError, "custom loss is inf or NaN"),
    ("metrics", custom(lambda d, lp: (lp[0].sum(), 3)), DataError, "metrics of type int; return a dict of numbers"),
    ("metric", custom(lambda d, lp: (lp[0].sum(), {"a": "b"})), DataError, "metric 'a' is not a number: 'b'"),
    (
        "one Datum ignored",
        custom(lambda d, lp: (lp[0].sum(), {}), [*ce(), *ce()]),
        DataError,
        r"data\[1\]: the custom loss does not depend on its logprobs",
    ),
    (
        "infinite gradient",
        custom(lambda d, lp: ((lp[0] - lp[0].detach()).sqrt().sum(), {})),
        DataError,
        "has an inf or NaN gradient",
    ),
    ("no targets", custom(lambda d, lp: (lp[0].sum(), {}), ce(target_tokens=None)), DataError, "lacks 'target_tokens'"),
    (
        "loss_type_input",
        lambda w: w.client.forward_backward_custom(ce(), boom, loss_type_input="logits"),
        UnsupportedError,
        "loss_type_input is not offered: the loss always receives logprobs",
    ),
    (
        "waiting for the next",
        lambda w: w.client.forward_backward_custom(
            ce(), lambda d, lp: (lp[0].sum(), w.client.forward(ce(), "cross_entropy").result().metrics)
        ),
        RuntimeError,
        "cannot wait for one that is queued behind it",
    ),
]

OPTIMIZER: list[tuple[str, Call, type[Exception], str]] = [
    ("adam None", lambda w: w.client.optim_step(None), ConfigError, "takes tinker.AdamParams, got NoneType"),
    (
        "adam dict",
        lambda w: w.client.optim_step({"learning_rate": 1}),
        ConfigError,
        "takes tinker.AdamParams, got dict",
    ),
    ("adam twice", lambda w: w.client.optim_step(ADAM, adam_params=ADAM), ConfigError, "adam_params; not both"),
    (
        "dimuon",
        lambda w: w.client.optim_step(tinker.DimuonParams(learning_rate=1.0)),
        ConfigError,
        "got DimuonParams; AdamW is the only optimizer",
    ),
    *(
        (
            f"{name} {value}",
            lambda w, name=name, value=value: w.client.optim_step(types.AdamParams(**{name: value})),
            ConfigError,
            f"AdamParams.{name} is {value}; expected",
        )
        for name, value in [
            ("learning_rate", -1.0),
            ("learning_rate", float("nan")),
            ("beta1", 1.0),
            ("beta2", -0.5),
            ("eps", float("inf")),
            ("weight_decay", -0.1),
            ("grad_clip_norm", float("nan")),
        ]
    ),
]


def saving(name: Any = "new", **options: Any) -> Call:
    return lambda w: w.client.save_state(name, **options)


SAVING: list[tuple[str, Call, type[Exception], str]] = [
    ("name empty", saving(""), CheckpointError, "checkpoint name '' is refused: use letters"),
    ("name up", saving("../x"), CheckpointError, r"checkpoint name '\.\./x' is refused"),
    ("name slash", saving("a/b"), CheckpointError, "checkpoint name 'a/b' is refused"),
    ("name hidden", saving(".x"), CheckpointError, "checkpoint name '.x' is refused"),
    ("name number", saving(5), CheckpointError, "checkpoint name 5 is refused"),
    (
        "name taken",
        saving("state"),
        CheckpointError,
        "/weights/state exists; choose another name or pass overwrite=True",
    ),
    ("ttl short", saving(ttl_seconds=5), ConfigError, r"from 3600 \(one hour\) to 315360000 \(ten years\), got 5"),
    ("ttl long", saving(ttl_seconds=10**12), ConfigError, "ttl_seconds must be None .* got 1000000000000"),
    ("ttl text", saving(ttl_seconds="1h"), ConfigError, "ttl_seconds must be None .* got '1h'"),
    ("overwrite text", saving(overwrite="yes"), ConfigError, "overwrite must be True or False, got 'yes'"),
    ("metadata numbers", saving(user_metadata={"loss": 0.1}), ConfigError, "user_metadata must be a dict from strings"),
    (
        "sampler name",
        lambda w: w.client.save_weights_for_sampler("a b"),
        CheckpointError,
        "checkpoint name 'a b' is refused",
    ),
    (
        "sampler name taken",
        lambda w: w.client.save_weights_for_sampler("weights"),
        CheckpointError,
        "/sampler_weights/weights exists; choose another name",
    ),
    (
        "snapshot name",
        lambda w: w.client.save_weights_and_get_sampling_client("a/b"),
        CheckpointError,
        "checkpoint name 'a/b' is refused",
    ),
    (
        "kind",
        lambda w: w.client.save_weights_and_get_sampling_client(kind="live"),
        ConfigError,
        "kind must be 'snapshot' or 'inflight', got 'live'",
    ),
    (
        "snapshot retries",
        lambda w: w.client.save_weights_and_get_sampling_client(retry_config=1),
        ConfigError,
        "retry_config is a int; give types.RetryConfig",
    ),
    (
        "encryption",
        lambda w: w.client.save_weights_external("x", age_encryption_recipients=["age1"]),
        UnsupportedError,
        "age_encryption_recipients is not offered: weights are exported as they are",
    ),
    ("load missing", lambda w: w.client.load_state("tinker://m/weights/a"), CheckpointError, "does not exist; give"),
    ("load number", lambda w: w.client.load_state(3), CheckpointError, "is a tinker:// path or a directory, got 3"),
    ("load torn", lambda w: w.client.load_state(w.torn), CheckpointError, "is torn: adapter_model.safetensors"),
    ("load empty", lambda w: w.client.load_state(str(w.empty)), CheckpointError, "is torn: manifest.json is missing"),
    (
        "load token",
        lambda w: w.client.load_state(w.state, weights_access_token="t"),
        UnsupportedError,
        "weights_access_token is not offered",
    ),
    (
        "load without moments",
        lambda w: w.client.load_state_with_optimizer(w.weights),
        CheckpointError,
        "has no optimizer.safetensors",
    ),
    (
        "load another rank",
        lambda w: w.service.create_lora_training_client(w.model, 2).load_state(w.state),
        CheckpointError,
        "has LoRA rank 4, .*; this model has rank 2",
    ),
]

SAMPLING: list[tuple[str, Call, type[Exception], str]] = [
    ("samples 0", sample(n=0), DataError, "num_samples must be an integer of at least 1, got 0"),
    ("samples text", sample(n="2"), DataError, "num_samples must be an integer of at least 1, got '2'"),
    (
        "params None",
        sample(sampling_params=None),
        DataError,
        "sampling_params is a NoneType; give types.SamplingParams",
    ),
    ("params dict", sample(sampling_params={}), DataError, "sampling_params is a dict; give types.SamplingParams"),
    ("prompt empty", sample(()), DataError, "the prompt is empty; give at least one token"),
    ("prompt None", sample(None), DataError, "the prompt is a NoneType; give a tinker.ModelInput"),
    ("prompt text", sample("hello"), DataError, "the prompt is a str; give a tinker.ModelInput"),
    (
        "prompt floats",
        sample([1.5]),
        DataError,
        "the prompt is a list; give a tinker.ModelInput, or a list of token ids",
    ),
    ("prompt image", sample(image()), DataError, "the prompt has a ImageChunk; only text"),
    ("prompt token", sample((1, 260)), DataError, "prompt token 260 at position 1 is outside the vocabulary of 260"),
    ("prompt full", sample((1,) * 256), PromptTooLongError, "256 tokens and 2 more were asked for, .* is 256"),
    ("temperature -1", sample(sampling_params=params(temperature=-1)), DataError, "temperature must be 0 .* got -1"),
    ("temperature NaN", sample(sampling_params=params(temperature=float("nan"))), DataError, "temperature .* got nan"),
    ("top_p 1.5", sample(sampling_params=params(top_p=1.5)), DataError, "top_p must lie between 0 and 1, got 1.5"),
    ("top_k -2", sample(sampling_params=params(top_k=-2)), DataError, "top_k must be -1 or 0 .* got -2"),
    (
        "max_tokens 0",
        sample(sampling_params=params(max_tokens=0)),
        DataError,
        "max_tokens must be positive or None, got 0",
    ),
    ("stop empty", sample(sampling_params=params(stop=[""])), DataError, "stop contains an empty string"),
    ("stop id", sample(sampling_params=params(stop=[999])), DataError, "stop token id 999 is outside the vocabulary"),
    ("penalty 0", sample(sampling_params=params(repetition_penalty=0)), DataError, "repetition_penalty .* got 0.0"),
    ("penalty inf", sample(sampling_params=params(repetition_penalty=float("inf"))), DataError, "penalty .* got inf"),
    ("params field", lambda w: types.SamplingParams(beam_width=4), ValueError, "beam_width\n  Extra inputs are not"),
    ("topk -1", sample(topk_prompt_logprobs=-1), DataError, "topk_prompt_logprobs must be .* at least 0, got -1"),
    ("topk 261", sample(topk_prompt_logprobs=261), DataError, "topk_prompt_logprobs must lie between 0 and .* 260"),
    ("topk sample", sample(topk_sample_logprobs=1.5), DataError, "topk_sample_logprobs must be .* got 1.5"),
    ("last_n alone", sample(prompt_logprobs_last_n=1), DataError, "set include_prompt_logprobs"),
    (
        "last_n 2 of 2",
        sample(include_prompt_logprobs=True, prompt_logprobs_last_n=2),
        DataError,
        "prompt_logprobs_last_n must lie between 1 and 1 here, got 2",
    ),
    (
        "last_n 0",
        lambda w: w.sampling.compute_logprobs([1, 2], 0),
        DataError,
        "prompt_logprobs_last_n must be .* got 0",
    ),
    ("targets", sample(target_prompt_logprobs=[[1]]), DataError, "target_prompt_logprobs is a list; give types.Tensor"),
    ("alternatives", sample(prompt_alt_tokens_k=-2), DataError, "prompt_alt_tokens_k must be .* at least 0, got -2"),
    ("one token", sample((1,), prompt_alt_tokens_k=1), DataError, "need a prompt of two tokens or more"),
    ("logprobs of nothing", lambda w: w.sampling.compute_logprobs([]), DataError, "the prompt is empty"),
    (
        "logprobs too long",
        lambda w: w.sampling.compute_logprobs([1] * 257),
        PromptTooLongError,
        "257 tokens and 0 more .* is 256",
    ),
    ("handle", lambda w: w.sampling.from_sampler_handle("x"), ConfigError, "this is no sampler handle"),
]

REST: list[tuple[str, Call, type[Exception], str]] = [
    ("run unknown", lambda w: w.rest.list_checkpoints("m"), CheckpointError, "there is no training run 'm' in"),
    ("run up", lambda w: w.rest.get_training_run("../m"), CheckpointError, "training run id '../m' is malformed"),
    ("run None", lambda w: w.rest.get_training_run(None), CheckpointError, "training run id None is malformed"),
    ("run of a path", lambda w: w.rest.get_training_run_by_tinker_path("x"), CheckpointError, "path 'x' is malformed"),
    (
        "delete unknown",
        lambda w: w.rest.delete_checkpoint("m", "weights/a"),
        CheckpointError,
        "there is nothing to delete",
    ),
    ("delete up", lambda w: w.rest.delete_checkpoint("m", "weights/../.."), CheckpointError, "is malformed; expected"),
    (
        "delete path",
        lambda w: w.rest.delete_checkpoint_from_tinker_path("/tmp"),
        CheckpointError,
        "'/tmp' is malformed",
    ),
    (
        "ttl 1",
        lambda w: w.rest.set_checkpoint_ttl_from_tinker_path(w.state, 1),
        ConfigError,
        "ttl_seconds must be None .* got 1",
    ),
    (
        "ttl of nothing",
        lambda w: w.rest.set_checkpoint_ttl_from_tinker_path("tinker://m/weights/a", None),
        CheckpointError,
        "does not exist",
    ),
    (
        "limit 0",
        lambda w: w.rest.list_training_runs(limit=0),
        ConfigError,
        "limit must be an integer of at least 1, got 0",
    ),
    ("offset -1", lambda w: w.rest.list_user_checkpoints(offset=-1), ConfigError, "offset must be .* got -1"),
    ("scope", lambda w: w.rest.list_training_runs(access_scope="all"), ConfigError, "access_scope must be 'owned' or"),
    ("project", lambda w: w.rest.list_training_runs(project_id="p"), UnsupportedError, "project_id is not offered"),
    (
        "publishing",
        lambda w: w.rest.publish_checkpoint_from_tinker_path(w.state),
        UnsupportedError,
        "RestClient.publish_checkpoint_from_tinker_path is not offered: there are no accounts",
    ),
    ("info", lambda w: w.rest.get_weights_info_by_tinker_path(w.torn), CheckpointError, "is torn"),
]

CLOSED: list[tuple[str, Call, type[Exception], str]] = [
    (
        "train",
        lambda w: w.closed.forward(ce(), "cross_entropy"),
        EngineClosedError,
        "the training client .* been closed",
    ),
    ("step", lambda w: w.closed.optim_step(ADAM), EngineClosedError, "the training client .* has been closed; create"),
    ("save", lambda w: w.closed.save_state("x"), EngineClosedError, "the training client .* has been closed"),
    ("version", lambda w: w.closed.policy_version, EngineClosedError, "the training client has been closed"),
    (
        "create",
        lambda w: w.closed_service.create_model(w.model),
        EngineClosedError,
        "the ServiceClient has been closed",
    ),
    ("with", lambda w: w.closed_service.__enter__(), EngineClosedError, "the ServiceClient has been closed"),
    ("rest", lambda w: w.closed_service.create_rest_client(), EngineClosedError, "the ServiceClient has been closed"),
    (
        "models",
        lambda w: w.closed_service.get_server_capabilities(),
        EngineClosedError,
        "the ServiceClient has been closed",
    ),
    ("sampling", lambda w: w.orphan.sample([1], 1, GREEDY), EngineClosedError, "the sampler has been closed"),
    ("logprobs", lambda w: w.orphan.compute_logprobs([1, 2]), EngineClosedError, "the sampler has been closed"),
]

TABLE = [*CONSTRUCTOR, *CREATING, *PATHS, *DATA, *CUSTOM, *OPTIMIZER, *SAVING, *SAMPLING, *REST, *CLOSED]


@pytest.fixture(scope="module")
def world(tiny_model: str, other_model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    store = tmp_path_factory.mktemp("store")
    service, closed_service = ServiceClient(store=store, device="cpu"), ServiceClient(store=store, device="cpu")
    orphan = closed_service.create_sampling_client(base_model=tiny_model).result()
    closed_service.close()
    client = service.create_lora_training_client(tiny_model, 4, seed=0).result()
    closed = service.create_lora_training_client(tiny_model, 4, seed=0).result()
    closed.close()
    torn = client.save_weights_for_sampler("torn").result().path
    rest = service.create_rest_client()
    file = rest.get_checkpoint_directory(torn).result() / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    outside = tmp_path_factory.mktemp("outside")
    (store / "link").symlink_to(outside)
    yield World(
        service=service,
        closed_service=closed_service,
        client=client,
        closed=closed,
        sampling=client.save_weights_and_get_sampling_client().result(),
        orphan=orphan,
        rest=rest,
        model=tiny_model,
        other_model=other_model,
        state=client.save_state("state").result().path,
        weights=client.save_weights_for_sampler("weights").result().path,
        torn=torn,
        empty=outside,
    )
    service.close()


def refused(world: World, call: Call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:  # noqa: PT012 - the call, or its future, raises
        returned = call(world)
        returned.result(timeout=60)
    assert type(caught.value) is error or error is ValueError


@pytest.mark.parametrize(("name", "call", "error", "message"), TABLE, ids=[f"{row[3][:30]}-{row[0]}" for row in TABLE])
def test_refused_by_name(world: World, name: str, call: Call, error: type[Exception], message: str) -> None:
    refused(world, call, error, message)


def test_the_table_is_long_enough() -> None:
    assert len(TABLE) >= 60


def test_training_goes_on_as_if_no_bad_call_had_been_made(
    world: World, make_client: Any, datums: Any, probe: Any, tmp_path: Path
) -> None:
    """Bad calls between a gradient and its step; in the end weights and moments are those of a clean run."""
    clean, client = make_client(), world.client
    client.load_state(world.state).result()
    quarter = len(TABLE) // 4 + 1
    for step in range(4):
        for each in (client, clean):
            each.forward_backward(datums(step), "cross_entropy").result()
        for _, call, error, message in TABLE[step * quarter : (step + 1) * quarter]:
            refused(world, call, error, message)
        for each in (client, clean):
            each.optim_step(ADAM).result()
    assert probe(client) == probe(clean)
    tensors = []
    for each in (client, clean):
        path = each.save_state("end").result().path
        directory = each._store.resolve(path)
        tensors.append(
            [(directory / file).read_bytes() for file in ("adapter_model.safetensors", "optimizer.safetensors")]
        )
    assert tensors[0] == tensors[1]


def test_a_step_without_or_with_a_broken_gradient_is_refused(make_client: Any, datums: Any, probe: Any) -> None:
    client, clean = make_client(), make_client()
    for each in (client, clean):
        each.forward_backward(datums(0), "cross_entropy")
        each.optim_step(ADAM).result()
    with pytest.raises(DataError, match="no gradient has accumulated; call forward_backward first"):
        client.optim_step(ADAM).result()
    huge = ce(weights=[3e38, -3e38, 3e38])
    client.forward_backward(huge, "cross_entropy").result()
    with pytest.raises(NonFiniteGradientError, match="the gradient is not finite"):
        client.optim_step(ADAM).result()
    with pytest.raises(DataError, match="no gradient has accumulated"):
        client.optim_step(ADAM).result()
    for each in (client, clean):
        each.forward_backward(datums(1), "cross_entropy")
        each.optim_step(ADAM).result()
    assert probe(client) == probe(clean)
