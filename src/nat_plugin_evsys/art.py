"""OpenPipe ART on the embedded engine: ``LocalBackend`` is an ``art.Backend``; no server, no other process.

ART gathers, the policy's endpoint samples, the trainer adapter trains. A reply goes through ART with the ids of its
tokens, so that what is trained on is what was sampled.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from nat.data_models.finetuning import (
    EpisodeItem,
    EpisodeItemRole,
    TrainingStatusEnum,
    Trajectory,
    TrajectoryCollection,
)

from nat_plugin_evsys.config import EvsysPolicyConfig, EvsysTrainerAdapterConfig
from nat_plugin_evsys.errors import ConfigError, EvsysError, UnsupportedError
from nat_plugin_evsys.finetuning.trainer_adapter import EvsysTrainerAdapter
from nat_plugin_evsys.policy.policy import Policy
from nat_plugin_evsys.rollouts.episodes import MESSAGE_FIELDS, text_of
from nat_plugin_evsys.rollouts.plain_episodes import with_calls
from nat_plugin_evsys.rollouts.trajectories import CALLS_KEY

if TYPE_CHECKING:
    import art

_PLANNED = {"lr_warmup": 0, "lr_schedule": "constant", "lr_scaling": "none"}
"""Settings that would change the rate which ``train`` is given, as they have to be."""

_CHECKPOINT = "evsys_checkpoint"
"""Key of ART's model state: where the weights and the optimizer of the newest saved step are."""


class LocalBackend:
    """Trains ``art.TrainableModel``s in this process.

    Args:
        path: ART's directory; checkpoints go below each model's.
        policy: settings of ``EvsysPolicyConfig`` beside ``base_model``, such as ``lora_rank`` and ``device``.
        trainer: settings of ``EvsysTrainerAdapterConfig``, such as ``loss_fn`` and ``normalization``.

    Raises:
        UnsupportedError: ``lr_warmup``, ``lr_schedule`` or ``lr_scaling``; ``train`` takes the rate of each step.
    """

    def __init__(
        self, *, path: str = ".art", policy: Mapping[str, Any] | None = None, trainer: Mapping[str, Any] | None = None
    ) -> None:
        _restore_transformers()
        self._path = path
        self._policy_settings = dict(policy or {})
        if planned := _PLANNED.keys() & set(trainer or ()):
            raise UnsupportedError(f"{min(planned)} has no effect here: give train() the learning_rate of each step")
        self._trainer = EvsysTrainerAdapterConfig.model_validate({"policy": "art", **_PLANNED, **(trainer or {})})
        self._policies: dict[str, Policy] = {}

    async def register(self, model: art.Model) -> None:
        """Load the model, with the weights that its newest saved step had.

        Raises:
            ModelError: the base model cannot be loaded.
        """
        from art.utils.output_dirs import get_model_dir

        model.base_path = self._path
        if not model.trainable:
            return
        directory = get_model_dir(model=model, art_path=self._path)
        settings = {"checkpoint": "none", "eval_temperature": 1.0, "output_dir": directory, **self._policy_settings}
        policy = self._policies[model.name] = Policy.of(EvsysPolicyConfig(base_model=model.base_model, **settings))
        await policy.ensure_loaded()
        policy.set_checkpoint_dir(Path(directory, "checkpoints"))
        saved = (model.read_state() or {}).get(_CHECKPOINT)
        if saved is not None:
            await policy.backend.load_state(saved, with_optimizer=True)
            await policy.publish()

    async def _prepare_backend_for_training(self, model: art.TrainableModel, config: Any = None) -> tuple[str, str]:
        from openai import AsyncOpenAI

        endpoint = self._policy(model).endpoint
        # openai 2, which ART needs, takes httpx's client; openai 3 has another.
        http_client: Any = httpx.AsyncClient(transport=_TokensWanted(), timeout=httpx.Timeout(1200.0, connect=5.0))
        model._openai_client = AsyncOpenAI(
            base_url=endpoint.base_url, api_key=endpoint.api_key, http_client=http_client
        )
        return endpoint.base_url, endpoint.api_key

    async def train(
        self,
        model: art.TrainableModel,
        trajectory_groups: Iterable[art.TrajectoryGroup],
        *,
        learning_rate: float | None = None,
        save_checkpoint: bool = True,
        **options: Any,
    ) -> Any:
        """One training job on the groups; the next call samples from the new weights.

        Args:
            learning_rate: default is the trainer's, or that for the model's width.
            save_checkpoint: keep the weights and the optimizer's state; ``register`` goes on from the newest.

        Returns:
            ``art.types.TrainResult``: the number of optimizer steps, and the job's metrics.

        Raises:
            UnsupportedError: another option of ART's backends.
            DataError: a trajectory that cannot be trained on.
            EvsysError: the job failed; the text has the cause.
        """
        from art.types import TrainResult

        if options:
            raise UnsupportedError(f"{min(options)} is not offered by train(); see LocalBackend(trainer={{…}})")
        policy = self._policy(model)
        changes = {} if learning_rate is None else {"learning_rate": learning_rate}
        adapter = EvsysTrainerAdapter(self._trainer.model_copy(update=changes), policy)
        adapter.choose_rate()
        rows = [
            [self._trajectory(policy, each, f"trajectory {at} of group {row}") for at, each in enumerate(group)]
            for row, group in enumerate(trajectory_groups)
        ]
        job = await adapter.submit(TrajectoryCollection(trajectories=rows, run_id=model.name))
        status = await adapter.wait_until_complete(job)
        if status.status is not TrainingStatusEnum.COMPLETED:
            raise EvsysError(f"ART's training job {status.status.value}: {status.message}")
        if save_checkpoint:
            path = await policy.backend.save_full_state(f"step-{policy.version}-{uuid.uuid4().hex[:8]}")
            model.merge_state({_CHECKPOINT: path})
        found = (status.metadata or {})["metrics"]
        metrics = {name: float(value) for name, value in found.items() if _is_number(value)}
        return TrainResult(step=policy.version, metrics=metrics)

    async def close(self) -> None:
        """Free the models."""
        for policy in self._policies.values():
            await policy.close()
        self._policies.clear()

    async def _get_step(self, model: art.TrainableModel) -> int:
        return self._policy(model).version

    def _model_inference_name(self, model: art.Model, step: int | None = None) -> str:
        policy = self._policy(model)
        if step is not None and step != policy.version:
            raise UnsupportedError(f"step {step} is not served: the policy is at {policy.version}; load a checkpoint")
        return policy.config.base_model

    async def _delete_checkpoint_files(self, model: art.TrainableModel, steps_to_keep: list[int]) -> None:
        raise UnsupportedError("checkpoints are not deleted here; they are directories below the model's own")

    async def _train_sft(self, *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedError("train_sft is not offered; ServiceClient's cross_entropy trains on demonstrations")
        yield

    def _policy(self, model: art.Model) -> Policy:
        try:
            return self._policies[model.name]
        except KeyError:
            raise ConfigError(f"model `{model.name}` is not registered; await model.register(backend) first") from None

    @staticmethod
    def _trajectory(policy: Policy, trajectory: art.Trajectory, name: str) -> Trajectory:
        """NAT's trajectory of ART's, with a call for every choice of all its histories."""
        histories = [(trajectory.messages_and_choices, trajectory.tools)]
        histories += [(each.messages_and_choices, each.tools) for each in trajectory.additional_histories]
        recorded = [
            with_calls(
                Trajectory(episode=[_item(entry) for entry in entries], reward=trajectory.reward),
                name,
                policy.renderer,
                tools=[dict(tool) for tool in tools or ()],
            )
            for entries, tools in histories
        ]
        calls = [call for each in recorded for call in (each.metadata or {})[CALLS_KEY]]
        numbered = [{**call, "sequence": number} for number, call in enumerate(calls)]
        return recorded[0].model_copy(update={"metadata": {CALLS_KEY: numbered}})


class _TokensWanted(httpx.AsyncBaseTransport):
    """Asks the endpoint for every reply's token ids, and notes with each choice what temperature it was sampled at."""

    def __init__(self) -> None:
        self._inner = httpx.AsyncHTTPTransport()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """See httpx."""
        if not request.url.path.endswith("/chat/completions"):
            return await self._inner.handle_async_request(request)
        body = {**json.loads(await request.aread()), "logprobs": True, "return_token_ids": True}
        headers = {name: value for name, value in request.headers.items() if name.lower() != "content-length"}
        asked = httpx.Request(request.method, request.url, headers=headers, json=body, extensions=request.extensions)
        response = await self._inner.handle_async_request(asked)
        if body.get("stream") or response.status_code != 200:
            return response
        answer = json.loads(await response.aread())
        temperature = body.get("temperature")
        for choice in answer["choices"]:
            choice["temperature"] = 1.0 if temperature is None else temperature
        return httpx.Response(200, json=answer, request=request)

    async def aclose(self) -> None:
        """See httpx."""
        await self._inner.aclose()


def _item(entry: Any) -> EpisodeItem:
    """An episode's item of one of ART's messages, or of a choice that was sampled."""
    if isinstance(entry, Mapping):
        role = {"developer": "system"}.get(str(entry["role"]), str(entry["role"]))
        metadata = {name: entry[name] for name in MESSAGE_FIELDS if entry.get(name)}
        return EpisodeItem(
            role=EpisodeItemRole(role),
            content=text_of(entry.get("content")),
            logprobs=[] if role == "assistant" else None,
            metadata=metadata,
        )
    logprobs = entry.logprobs
    token_ids = getattr(entry, "token_ids", None)
    if token_ids and logprobs is not None:
        content = zip(token_ids, logprobs.content or (), strict=True)
        logprobs = [{"token": f"token_id:{token}", "logprob": given.logprob} for token, given in content]
    metadata = {"temperature": getattr(entry, "temperature", 1.0)}
    if entry.message.tool_calls:
        metadata["tool_calls"] = [call.model_dump() for call in entry.message.tool_calls]
    return EpisodeItem(
        role=EpisodeItemRole.ASSISTANT, content=entry.message.content or "", logprobs=logprobs or [], metadata=metadata
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _restore_transformers() -> None:
    """Undo ART's patch of transformers, which has the signature of an older release: each forward pass would fail."""
    from transformers import masking_utils

    current: Any = masking_utils._preprocess_mask_arguments
    if current.__module__ == "art.transformers.patches":
        import art.transformers.patches as patches

        masking_utils._preprocess_mask_arguments = patches._preprocess_mask_arguments
