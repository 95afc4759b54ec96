"""The official tinker SDK, unmodified, against a server: every call of a training loop. Needs tinker, torch and numpy.

    python sdk_script.py URL MODEL [KEY]

Prints one JSON object: ``facts`` (what the calls gave) and ``problems`` (where that is not what it should be). Parts
that the installed SDK does not have are named in ``skipped``. The exit code is 1 if there are problems.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import sys
import time
import urllib.request
import warnings
from typing import Any

os.environ.setdefault("TINKER_TELEMETRY", "0")
warnings.filterwarnings("ignore")

import numpy as np  # noqa: E402 - after the settings above
import tinker  # noqa: E402 - after the settings above
import torch  # noqa: E402 - after the settings above
from tinker import types  # noqa: E402 - after the settings above

PROMPT = [72, 101, 108, 108, 111, 32]
TARGET = [119, 111, 114, 108, 100, 33]
RL_LOSSES = ("importance_sampling", "ppo", "cispo")


class Script:
    """Runs the parts in order; each adds facts and problems."""

    def __init__(self, url: str, model: str, key: str) -> None:
        self.url, self.model, self.key = url, model, key
        self.facts: dict[str, Any] = {"tinker": tinker.__version__}
        self.problems: list[str] = []
        self.skipped: list[str] = []
        self.service = tinker.ServiceClient(base_url=url, api_key=key, user_metadata={"script": "sdk"})
        self.rest = self.service.create_rest_client()

    def check(self, good: Any, what: str) -> None:
        if not bool(good):
            self.problems.append(what)

    def has(self, thing: Any, name: str) -> bool:
        if hasattr(thing, name):
            return True
        self.skipped.append(f"{type(thing).__name__}.{name}")
        return False

    def run(self) -> dict[str, Any]:
        for part in (
            self.capabilities,
            self.create,
            self.cross_entropy,
            self.chunks_and_shapes,
            self.policy_losses,
            self.custom_loss,
            self.steps,
            self.failures,
            self.state,
            self.sampling,
            self.sampling_options,
            self.inflight,
            self.checkpoints,
            self.download,
            self.finish,
        ):
            started = time.monotonic()
            try:
                part()
            except Exception as error:  # noqa: BLE001 - a part that fails is a problem of its own, the others still run
                self.problems.append(f"{part.__name__}: {type(error).__name__}: {str(error)[:500]}")
            self.facts.setdefault("seconds", {})[part.__name__] = round(time.monotonic() - started, 2)
        return {"facts": self.facts, "problems": self.problems, "skipped": self.skipped}

    # -- parts

    def capabilities(self) -> None:
        models = self.service.get_server_capabilities().supported_models
        self.facts["models"] = [model.model_name for model in models]
        self.check(self.model in self.facts["models"], "get_server_capabilities names the model")

    def create(self) -> None:
        self.trainer = self.service.create_lora_training_client(self.model, rank=4, seed=7)
        info = self.trainer.get_info()
        self.facts["model_id"] = str(info.model_id)
        self.check(":train:" in info.model_id, "the model id is session:train:n")
        self.check(info.lora_rank == 4 and info.is_lora, "get_info has the LoRA rank")
        self.facts["tokenizer"] = len(self.trainer.get_tokenizer())

    def cross_entropy(self) -> None:
        data = [datum(PROMPT, TARGET)]
        only = self.trainer.forward(data, "cross_entropy").result()
        both = self.trainer.forward_backward(data, "cross_entropy").result()
        logprobs = array(both.loss_fn_outputs[0]["logprobs"])
        weights = array(data[0].loss_fn_inputs["weights"])
        self.facts["loss"] = both.metrics["loss:sum"]
        self.check(
            math.isclose(both.metrics["loss:sum"], -float(logprobs @ weights), rel_tol=1e-5), "loss is -sum(w lp)"
        )
        self.check(only.metrics["loss:sum"] == both.metrics["loss:sum"], "forward and forward_backward agree")
        self.check(all(key.count(":") == 1 for key in both.metrics), "metric names are name:reduction")
        self.trainer.optim_step(types.AdamParams(learning_rate=0.0)).result()

    def chunks_and_shapes(self) -> None:
        """Many Datums in one call, and targets of shape (N, K)."""
        many = self.trainer.forward([datum(PROMPT, TARGET)] * 50, "cross_entropy").result()
        self.check(len(many.loss_fn_outputs) == 50, "50 Datums give 50 outputs")
        ids = PROMPT + TARGET
        n = len(ids) - 1
        targets = np.stack([np.array(ids[1:]), np.full(n, 97)], axis=1)
        weights = np.stack([np.full(n, 0.75), np.full(n, 0.25)], axis=1)
        soft = types.Datum(
            model_input=types.ModelInput.from_ints(ids[:-1]),
            loss_fn_inputs={
                "target_tokens": tensor(targets.reshape(-1), "int64", [n, 2]),
                "weights": tensor(weights.reshape(-1), "float32", [n, 2]),
            },
        )
        output = self.trainer.forward([soft], "cross_entropy").result()
        logprobs = array(output.loss_fn_outputs[0]["logprobs"])
        self.check(logprobs.shape == (n, 2), f"2-D targets give 2-D logprobs, got {logprobs.shape}")

    def policy_losses(self) -> None:
        losses = {}
        for loss_fn in RL_LOSSES:
            output = self.trainer.forward_backward([rl_datum(PROMPT, TARGET)], loss_fn).result()
            losses[loss_fn] = output.metrics["loss:sum"]
            lp, q, a = (np.array(x) for x in (array(output.loss_fn_outputs[0]["logprobs"]), RL_LOGPROBS, RL_ADVANTAGES))
            if loss_fn == "importance_sampling":
                expected = -float(np.sum(np.exp(lp - q) * a))
                self.check(math.isclose(losses[loss_fn], expected, rel_tol=1e-4), f"{loss_fn} is {expected}")
        config = {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}
        output = self.trainer.forward_backward([rl_datum(PROMPT, TARGET)], "ppo", loss_fn_config=config).result()
        losses["ppo_clipped"] = output.metrics["loss:sum"]
        self.check(losses["ppo_clipped"] != losses["ppo"], "loss_fn_config takes effect")
        self.facts["policy_losses"] = losses
        metrics = self.trainer.optim_step(types.AdamParams(learning_rate=1e-4, grad_clip_norm=1.0)).result().metrics
        self.facts["optim_metrics"] = sorted(metrics or {})

    def custom_loss(self) -> None:
        def loss(data: list[Any], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
            total = sum((each.exp() ** 2).sum() for each in logprobs)
            return total, {"squared": float(total)}

        output = self.trainer.forward_backward_custom([datum(PROMPT, TARGET)], loss).result()
        self.facts["custom"] = {key: output.metrics[key] for key in output.metrics if "squared" in key or "loss" in key}
        self.check(any("squared" in key for key in output.metrics), "custom metrics come back")
        self.trainer.optim_step(types.AdamParams(learning_rate=1e-3)).result()

    def steps(self) -> None:
        """Pipelined: everything is submitted before anything is awaited."""
        pending = []
        for _ in range(6):
            pending.append(self.trainer.forward_backward([datum(PROMPT, TARGET)], "cross_entropy"))
            self.trainer.optim_step(types.AdamParams(learning_rate=5e-3, eps=1e-8))
        losses = [future.result().metrics["loss:sum"] for future in pending]
        self.facts["losses"] = losses
        self.check(losses[-1] < 0.8 * losses[0], f"training lowers the loss: {losses}")

    def failures(self) -> None:
        bad = types.Datum(
            model_input=types.ModelInput.from_ints([1, 2, 3]),
            loss_fn_inputs={"target_tokens": tensor(np.array([1, 2]), "int64", [2])},
        )
        started = time.monotonic()
        message = category = None
        try:
            self.trainer.forward_backward([bad], "cross_entropy").result()
        except tinker.RequestFailedError as error:
            message, category = str(error), str(error.category)
        self.facts["failure"] = {"category": category, "message": (message or "")[:300]}
        self.check(message is not None and "ser" in str(category), "a malformed Datum fails with a category")
        self.check(time.monotonic() - started < 10, "a failure is not retried for minutes")
        good = self.trainer.forward_backward([datum(PROMPT, TARGET)], "cross_entropy").result()
        self.check(good.metrics["loss:sum"] > 0, "the model goes on after a failure")
        self.trainer.optim_step(types.AdamParams(learning_rate=1e-3)).result()

    def state(self) -> None:
        data = [datum(PROMPT, TARGET)]
        path = self.trainer.save_state("state-1").result().path
        self.facts["state_path"] = path
        before = self.trainer.forward(data, "cross_entropy").result().metrics["loss:sum"]
        adam = types.AdamParams(learning_rate=5e-3)

        def next_loss(client: Any) -> float:
            client.forward_backward(data, "cross_entropy").result()
            client.optim_step(adam).result()
            return client.forward(data, "cross_entropy").result().metrics["loss:sum"]

        plain = self.service.create_training_client_from_state(path)
        self.check(plain.forward(data, "cross_entropy").result().metrics["loss:sum"] == before, "weights are loaded")
        full = self.service.create_training_client_from_state_with_optimizer(path)
        here, there, fresh = next_loss(self.trainer), next_loss(full), next_loss(plain)
        self.facts["after_resume"] = {"same": here, "with_optimizer": there, "without": fresh}
        self.check(here == there, "with the optimizer, the next step is the same")
        self.check(here != fresh, "without the optimizer, it starts afresh")

    def sampling(self) -> None:
        params = types.SamplingParams(max_tokens=8, temperature=1.0, seed=11)
        prompt = types.ModelInput.from_ints(PROMPT)
        sampler = self.trainer.save_weights_and_get_sampling_client()
        # The server keeps what it read of a prompt, and a kept prompt rounds differently in the last bit.
        sampler.sample(prompt, 1, types.SamplingParams(max_tokens=1)).result()
        first = sampler.sample(prompt, 3, params).result()
        again = sampler.sample(prompt, 3, params).result()
        self.facts["samples"] = [list(sequence.tokens) for sequence in first.sequences]
        self.check(len(first.sequences) == 3, "num_samples sequences")
        self.check(
            [s.tokens for s in first.sequences] == [s.tokens for s in again.sequences],
            "the same seed, the same samples",
        )
        self.check(all(len(s.logprobs or []) == len(s.tokens) for s in first.sequences), "a logprob for each token")
        sequence = first.sequences[0]
        ids = PROMPT + list(sequence.tokens)
        scored = sampler.compute_logprobs(types.ModelInput.from_ints(ids)).result()
        self.check(scored[0] is None, "the first token has no logprob")
        gap = max(abs(a - b) for a, b in zip(scored[len(PROMPT) :], sequence.logprobs, strict=True))
        self.facts["sample_against_score"] = gap
        self.check(gap < 1e-4, f"compute_logprobs agrees with what was sampled: {gap}")
        trained = self.trainer.forward([datum(PROMPT, list(sequence.tokens))], "cross_entropy").result()
        lp = array(trained.loss_fn_outputs[0]["logprobs"])[len(PROMPT) - 1 :]
        gap = float(np.max(np.abs(lp - np.array(sequence.logprobs))))
        self.facts["sample_against_trainer"] = gap
        self.check(gap < 1e-4, f"the trainer agrees with the sampler: {gap}")
        greedy = types.SamplingParams(max_tokens=6, temperature=0.0)
        self.facts["greedy"] = list(sampler.sample(prompt, 1, greedy).result().sequences[0].tokens)
        base = self.service.create_sampling_client(base_model=self.model)
        self.check(base.sample(prompt, 1, greedy).result().sequences[0].tokens, "the base model samples")

    def sampling_options(self) -> None:
        prompt = types.ModelInput.from_ints(PROMPT)
        path = self.trainer.save_weights_for_sampler("sampler-1").result().path
        self.facts["sampler_path"] = path
        sampler = self.service.create_sampling_client(model_path=path)
        params = types.SamplingParams(max_tokens=4, temperature=0.7, top_k=20, top_p=0.9, stop=[256])
        result = sampler.sample(prompt, 1, params, include_prompt_logprobs=True, topk_prompt_logprobs=3).result()
        self.check(len(result.prompt_logprobs or []) == len(PROMPT), "prompt logprobs for each prompt token")
        top = result.topk_prompt_logprobs
        self.check(top is not None and len(top) == len(PROMPT) and len(top[-1]) == 3, "top-3 of each prompt token")
        stop = chr(result.sequences[0].tokens[0])
        texts = sampler.sample(prompt, 1, types.SamplingParams(max_tokens=4, temperature=0.0, stop="zzzz")).result()
        self.check(texts.sequences[0].stop_reason in ("stop", "length"), "stop strings are taken")
        self.facts["first_token"] = stop
        too_long = types.ModelInput.from_ints([65] * 5000)
        try:
            sampler.sample(too_long, 1, types.SamplingParams(max_tokens=4)).result()
            self.problems.append("a prompt beyond the context is refused")
        except tinker.RequestFailedError as error:
            self.facts["too_long"] = str(error)[:200]
        many = [sampler.sample(prompt, 2, types.SamplingParams(max_tokens=5, seed=n)) for n in range(40)]
        self.check(all(len(each.result().sequences) == 2 for each in many), "40 requests at once are all answered")

    def inflight(self) -> None:
        """Samplers that follow what the model publishes, beside one that does not."""
        save = self.trainer.save_weights_and_get_sampling_client
        if "kind" not in inspect.signature(tinker.TrainingClient.save_weights_and_get_sampling_client).parameters:
            self.skipped.append("save_weights_and_get_sampling_client(kind=)")
            return
        data, prompt = [datum(PROMPT, TARGET)], types.ModelInput.from_ints(PROMPT + TARGET)
        snapshot, first = save().result(), save(kind="inflight").result()
        self.trainer.forward_backward(data, "cross_entropy").result()
        self.trainer.optim_step(types.AdamParams(learning_rate=5e-2)).result()
        second = save(kind="inflight").result()  # published: save() itself returns a future
        old, new, also_new = (sum(each.compute_logprobs(prompt).result()[1:]) for each in (snapshot, first, second))
        self.check(math.isclose(new, also_new, abs_tol=1e-4), f"inflight samplers share weights: {new}, {also_new}")
        self.check(abs(new - old) > 1e-2, f"a snapshot stays as it was: {old}, {new}")

    def checkpoints(self) -> None:
        run_id = self.facts["model_id"]
        run = self.rest.get_training_run(run_id).result()
        self.check(run.base_model == self.model and run.lora_rank == 4, "get_training_run")
        runs = self.rest.list_training_runs().result()
        self.check(run_id in [each.training_run_id for each in runs.training_runs], "list_training_runs")
        listed = self.rest.list_checkpoints(run_id).result().checkpoints
        kinds = {each.tinker_path: each.checkpoint_type for each in listed}
        self.facts["checkpoints"] = kinds
        state, sampler = self.facts["state_path"], self.facts["sampler_path"]
        self.check(kinds.get(state) == "training" and kinds.get(sampler) == "sampler", "list_checkpoints")
        self.check(len(self.rest.list_user_checkpoints().result().checkpoints) >= 2, "list_user_checkpoints")
        info = self.rest.get_weights_info_by_tinker_path(state).result()
        self.check(info.base_model == self.model and info.lora_rank == 4, "weights_info")
        self.rest.publish_checkpoint_from_tinker_path(state).result()
        self.check(self._listed(run_id, state).public, "publish")
        self.rest.unpublish_checkpoint_from_tinker_path(state).result()
        self.check(not self._listed(run_id, state).public, "unpublish")
        if self.has(self.rest, "set_checkpoint_ttl_from_tinker_path"):
            self.rest.set_checkpoint_ttl_from_tinker_path(state, 7200).result()
            self.check(self._listed(run_id, state).expires_at is not None, "set ttl")
            self.rest.set_checkpoint_ttl_from_tinker_path(state, None).result()
            self.check(self._listed(run_id, state).expires_at is None, "remove ttl")
        sessions = self.rest.list_sessions().result().sessions
        session_id = run_id.split(":")[0]
        self.check(session_id in sessions, "list_sessions")
        session = self.rest.get_session(session_id).result()
        self.check(run_id in session.training_run_ids, "get_session")
        extra = self.trainer.save_state("short-lived").result().path
        self.rest.delete_checkpoint_from_tinker_path(extra).result()
        self.check(
            extra not in [c.tinker_path for c in self.rest.list_checkpoints(run_id).result().checkpoints], "delete"
        )

    def _listed(self, run_id: str, path: str) -> Any:
        return next(c for c in self.rest.list_checkpoints(run_id).result().checkpoints if c.tinker_path == path)

    def download(self) -> None:
        if not (self.has(self.trainer, "save_weights_external") and self.has(self.rest, "get_external_weights_urls")):
            return
        path = self.trainer.save_weights_external("export", ttl_seconds=3600).result().path
        if "tinker_path" in inspect.signature(self.rest.get_external_weights_urls).parameters:
            answer = self.rest.get_external_weights_urls(path).result()
        else:  # before 0.30
            run_id, _, checkpoint_id = path.removeprefix("tinker://").partition("/")
            answer = self.rest.get_external_weights_urls(run_id, checkpoint_id).result()
        sizes = {}
        for name, url in answer.urls.items():
            with urllib.request.urlopen(url, timeout=30) as response:  # no key
                sizes[name] = len(response.read())
        self.facts["download"] = sizes
        self.check(sizes.get("adapter_model.safetensors", 0) > 1000 and "adapter_config.json" in sizes, "download")

    def finish(self) -> None:
        if not self.has(self.service, "close"):
            return
        if self.has(self.service, "__enter__"):
            with tinker.ServiceClient(base_url=self.url, api_key=self.key) as inner:
                inner.create_sampling_client(base_model=self.model)
        closed = self.service.close("success")
        if closed is not None:
            closed.result()
        self.facts["closed"] = True


RL_LOGPROBS = [0.0] * (len(PROMPT) - 1) + [-4.0, -5.0, -6.0, -5.0, -4.0, -5.0]
RL_ADVANTAGES = [0.0] * (len(PROMPT) - 1) + [1.0, -0.5, 1.0, -0.5, 1.0, 0.5]


def tensor(values: Any, dtype: Any, shape: list[int]) -> types.TensorData:
    return types.TensorData(data=np.asarray(values).tolist(), dtype=dtype, shape=shape)


def array(value: Any) -> np.ndarray:
    if not hasattr(value, "data"):
        return np.asarray(value)
    flat = np.asarray(value.tolist() if hasattr(value, "tolist") else value.data, dtype=np.float64)
    return flat.reshape(value.shape) if getattr(value, "shape", None) else flat


def datum(prompt: list[int], target: list[int]) -> types.Datum:
    ids = prompt + target
    n = len(ids) - 1
    weights = [0.0] * (len(prompt) - 1) + [1.0] * len(target)
    return types.Datum(
        model_input=types.ModelInput.from_ints(ids[:-1]),
        loss_fn_inputs={
            "target_tokens": tensor(ids[1:], "int64", [n]),
            "weights": tensor(weights, "float32", [n]),
        },
    )


def rl_datum(prompt: list[int], target: list[int]) -> types.Datum:
    ids = prompt + target
    n = len(ids) - 1
    return types.Datum(
        model_input=types.ModelInput.from_ints(ids[:-1]),
        loss_fn_inputs={
            "target_tokens": tensor(ids[1:], "int64", [n]),
            "logprobs": tensor(RL_LOGPROBS, "float32", [n]),
            "advantages": tensor(RL_ADVANTAGES, "float32", [n]),
        },
    )


def main() -> int:
    url, model, *rest = sys.argv[1:]
    report = Script(url, model, rest[0] if rest else "tml-local").run()
    print(json.dumps(report))
    return 1 if report["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
