"""Any service that speaks the Tinker protocol as a ``Backend``."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nat_plugin_evsys.backends.base import LossCallable
from nat_plugin_evsys.backends.remote.sampling import TinkerSamplingClient
from nat_plugin_evsys.backends.remote.service import TinkerService
from nat_plugin_evsys.backends.remote.session import ServiceOperation, TinkerSession, checked_uri, sampler_uri
from nat_plugin_evsys.backends.remote.steps import StepCount
from nat_plugin_evsys.backends.remote.tokenizer import find_tokenizer
from nat_plugin_evsys.backends.remote.waiting import in_thread, sdk_future
from nat_plugin_evsys.errors import ModelError, ServiceError
from nat_plugin_evsys.runtime import defaults

if TYPE_CHECKING:
    import tinker
    import torch
    from tinker import types

    from nat_plugin_evsys.backends.base import ReadsImages


class TinkerBackend:
    """A LoRA adapter on a Tinker service, over the SDK's ``ServiceClient``.

    Operations run in submission order. Cancelling only stops the waiting; submitted operations still run.

    Attributes:
        base_model: the service's name for it.
        checkpoint_dir: for the protocol alone; ``save_*`` save on the service and return a tinker:// path.
        policy_version: of the latest snapshot, -1 before the first.
        context_length: most tokens of one sequence, or None if unknown.
    """

    def __init__(self, session: TinkerSession, *, checkpoint_dir: Path, context_length: int | None = None) -> None:
        self.base_model = session.base_model
        self.checkpoint_dir = Path(checkpoint_dir)
        self.policy_version = -1
        self.context_length = context_length
        self._session = session
        self._steps = StepCount()
        self._tokenizer: Any = None

    @classmethod
    async def create(
        cls,
        base_model: str,
        *,
        service: TinkerService,
        rank: int = defaults.RANK,
        seed: int | None = 0,
        train_attn: bool = defaults.TRAIN_ATTN,
        train_mlp: bool = defaults.TRAIN_MLP,
        train_unembed: bool = defaults.TRAIN_UNEMBED,
        checkpoint_dir: Path,
        context_length: int | None = None,
        tokenizer: str | None = None,
        train: bool = True,
    ) -> TinkerBackend:
        """Open a session on the service.

        Args:
            context_length: enforced here; default is what the service says.
            tokenizer: local directory or hub id of the tokenizer, if ``base_model`` does not lead to one.
            train: create a fresh adapter at once. Otherwise the first operation that needs one creates it, so that a
                process that only samples creates none.

        Raises:
            ServiceUnavailableError: the service cannot be reached.
            ConfigError: it refuses the key, does not serve ``base_model``, or there is no tokenizer here.
            ModelError: ``context_length`` is more than the service has.
            ServiceError: it refuses the adapter.
        """
        longest = await asyncio.to_thread(service.check, base_model)
        if context_length is not None and longest is not None and context_length > longest:
            raise ModelError(f"context_length {context_length} does not fit `{base_model}`; the service has {longest}")
        lora = {"rank": rank, "seed": seed, "train_attn": train_attn, "train_mlp": train_mlp}
        session = await TinkerSession.open(service, base_model, {**lora, "train_unembed": train_unembed})
        backend = cls(session, checkpoint_dir=checkpoint_dir, context_length=context_length or longest)
        try:
            if train:
                await session.train("creating the adapter", "start", lambda _: None)
            backend._tokenizer = await find_tokenizer(session, tokenizer)
        except BaseException:
            await session.close()
            raise
        return backend

    # -- training ---------------------------------------------------------------------------------------------------

    @property
    def progress(self) -> None:
        """See ``Backend``. A service does not say how far an operation is."""
        return None

    def forward_backward_async(
        self, data: list[tinker.Datum], *, loss_fn: types.LossFnType, loss_fn_config: dict[str, Any] | None = None
    ) -> ServiceOperation[types.ForwardBackwardOutput]:
        """See ``Backend``."""
        return self._session.train(
            "forward_backward", "data", lambda client: client.forward_backward(data, loss_fn, loss_fn_config)
        )

    def forward_async(
        self, data: list[tinker.Datum], *, loss_fn: types.LossFnType, loss_fn_config: dict[str, Any] | None = None
    ) -> ServiceOperation[types.ForwardBackwardOutput]:
        """See ``Backend``."""
        return self._session.train("forward", "data", lambda client: client.forward(data, loss_fn, loss_fn_config))

    async def base_logprobs_async(self, data: list[tinker.Datum]) -> list[types.TensorData]:
        """See ``Backend``. A fresh adapter gives them, which adds nothing to the base model."""
        from nat_plugin_evsys.engine.gradient.custom_loss import bare_datum

        bare = [bare_datum(datum) for datum in data]
        output = await self._session.untrained(
            "the base model's logprobs", "data", lambda client: client.forward(bare, "cross_entropy")
        )
        return [result["logprobs"] for result in output.loss_fn_outputs]

    def forward_backward_custom_async(
        self, data: list[tinker.Datum], loss_fn: LossCallable
    ) -> ServiceOperation[types.ForwardBackwardOutput]:
        """See ``Backend``. ``loss_fn`` runs here, between a forward and a backward on the service.

        If it fails, the SDK accepts nothing more for this adapter; ``load_state`` creates another.
        """

        from nat_plugin_evsys.engine.gradient.custom_loss import checked_loss

        checked = checked_loss(loss_fn, bare=True)

        def with_its_sum(data: list[Any], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
            loss, metrics = checked(data, logprobs)
            # older releases of the SDK report the surrogate's
            return loss, {**metrics, "loss:sum": float(loss.detach().sum())}

        return self._session.train(
            "forward_backward_custom", "data", lambda client: client.forward_backward_custom(data, with_its_sum)
        )

    def optim_step_async(self, adam: types.AdamParams) -> ServiceOperation[types.OptimStepResponse]:
        """See ``Backend``."""
        step = self._submit_step(adam)
        self._steps.submitted(step)
        return step

    def discard_gradient_async(self) -> Awaitable[None]:
        """See ``Backend``. The protocol has no call for this, so a step that moves no weights clears the gradient.

        Clipping keeps a finite gradient out of the optimizer's moments, and betas near 1 leave these as they are.
        """
        from tinker import types

        nothing = types.AdamParams(learning_rate=0.0, weight_decay=0.0, beta1=0.9999, beta2=0.9999, grad_clip_norm=1e-9)
        step = self._submit_step(nothing)

        async def cleared() -> None:
            try:
                await step
            except ServiceError as refusal:
                # One that is not finite is refused and cleared; without one there is nothing to step on.
                if refusal.category != "user":
                    raise

        return cleared()

    # -- checkpoints ------------------------------------------------------------------------------------------------

    async def save_for_sampler(self, name: str) -> str:
        """Save the weights for sampling; returns ``tinker://…/sampler_weights/<name>``."""
        saving = self._session.train(
            f"saving {name} for sampling", "save", lambda client: client.save_weights_for_sampler(name)
        )
        return await self._saved(saving, sampler_uri)

    async def save_full_state(self, name: str) -> str:
        """Save weights and optimizer state; returns ``tinker://…/weights/<name>``."""
        return await self._saved(self._session.train(f"saving {name}", "save", lambda client: client.save_state(name)))

    async def load_state(self, path: str, *, with_optimizer: bool = False) -> None:
        """Continue from a checkpoint of the service, in a new training run.

        Raises:
            CheckpointError: not a service's checkpoint, gone, or of another base model or rank.
        """
        await self._session.load(checked_uri(path), with_optimizer=with_optimizer)
        self._steps.restart_from(path)

    async def delete_checkpoint(self, path: str) -> None:
        """See ``Backend``."""
        watch, uri = self._session.watch, checked_uri(path)

        def delete() -> None:
            sdk_future(watch.service.rest_client().delete_checkpoint_from_tinker_path(uri)).result()

        await watch.wait(in_thread(delete, "evsys-delete"), f"deleting {path}", "checkpoint")

    # -- sampling ---------------------------------------------------------------------------------------------------

    async def snapshot_sampling_client(self, name: str | None = None) -> TinkerSamplingClient:
        """See ``Backend``. Before there is an adapter, the base model is sampled: a fresh adapter adds nothing."""
        client = await self._snapshot(name)
        self.policy_version = client.policy_version
        return client

    async def sampling_client(self, path: str) -> TinkerSamplingClient:
        """See ``Backend``. Opening a ``sampler_weights`` checkpoint makes no adapter on the service."""
        client = await self._session.open_sampler(checked_uri(path))
        return self._client_of(client, self._steps.of(path))

    def take_rollout_figures(self) -> dict[str, float]:
        """None: the service samples."""
        return {}

    def get_tokenizer(self) -> Any:
        """The Hugging Face tokenizer of the base model."""
        return self._tokenizer

    def get_architecture(self) -> None:
        """See ``Backend``."""

    def get_image_reader(self) -> ReadsImages | str:
        """See ``Backend``."""
        return "a Tinker service does not say how many tokens an image takes; leave the policy's base_url out"

    async def is_healthy(self) -> bool:
        """True when the session is open and the service answers what it can do."""
        return not self._session.closed and await asyncio.to_thread(self._session.watch.service.is_healthy)

    async def close(self) -> None:
        """Finish the session on the service, which frees the adapter there. Checkpoints stay."""
        await self._session.close()

    # -- helpers ----------------------------------------------------------------------------------------------------

    def _submit_step(self, adam: types.AdamParams) -> ServiceOperation[types.OptimStepResponse]:
        return self._session.train("optim_step", "step", lambda client: client.optim_step(adam))

    async def _saved(self, saving: ServiceOperation[Any], uri: Callable[[str], str] = str) -> str:
        """The checkpoint's path, by ``uri``. ``saving`` has just been submitted."""
        steps = self._steps.now
        path = uri(str((await saving).path))
        await self._steps.saved(path, steps)
        return path

    async def _snapshot(self, name: str | None) -> TinkerSamplingClient:
        if name is not None:
            return await self.sampling_client(await self.save_for_sampler(name))
        if self._session.training_client is None:
            return self._client_of(await self._session.open_sampler(None), 0)
        publishing = self._session.train(
            "publishing the weights", "save", lambda client: client.save_weights_and_get_sampling_client()
        )
        steps = self._steps.now
        return self._client_of(await publishing, await steps.taken())

    def _client_of(self, client: Any, version: int) -> TinkerSamplingClient:
        return TinkerSamplingClient(client, version, self._session.watch, self.context_length)
