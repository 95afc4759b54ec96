"""Operations as the SDK sends them, and an Engine over a store of its own to send them to."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinker import types
from tinker.proto.request_conv import forward_backward_request_to_proto
from tinker.proto.response_conv import deserialize_forward_backward_output, deserialize_sample_response
from tinker.types.forward_backward_input import ForwardBackwardInput
from tinker.types.forward_backward_request import ForwardBackwardRequest

from nat_plugin_evsys.runtime.checkpoint_store import CheckpointStore
from nat_plugin_evsys.service.store.operations import PROTOBUF, Operation, Outcome
from nat_plugin_evsys.service.store.store import SamplerRow, SessionRow, Store, StoredOutcome
from nat_plugin_evsys.service.wire.kinds import OperationKind
from nat_plugin_evsys.service.work.engine import Engine
from nat_plugin_evsys.service.work.model import HostedModel

SESSION = "00000000-0000-4000-8000-000000000000"


class ModelOperations:
    """Makes the operations of one model, numbered as a client numbers them.

    Args:
        number: the model's ``model_seq_id``.
        owner: of the model.
    """

    def __init__(self, number: int = 0, owner: str = "local", session: str = SESSION) -> None:
        self.number, self.owner, self.session = number, owner, session
        self.model_id = f"{session}:train:{number}"
        self.next_seq = 1

    def operation(self, kind: OperationKind, payload: dict[str, Any] | bytes, seq: int | None = None) -> Operation:
        """The next operation, or that of number ``seq``."""
        if seq is None:
            seq, self.next_seq = self.next_seq, self.next_seq + 1
        body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        return Operation(f"{self.model_id}/{seq}", self.owner, kind, self.model_id, seq, body, time.time())

    def create(self, base_model: str, *, rank: int = 4, seed: int | None = 0, **lora: Any) -> Operation:
        config = {"rank": rank, "seed": seed, "train_unembed": True, "train_mlp": True, "train_attn": True, **lora}
        body = {
            "session_id": self.session,
            "model_seq_id": self.number,
            "base_model": base_model,
            "type": "create_model",
        }
        body |= {"lora_config": config, "optimizer_config": {"type": "adamw"}, "of_a_newer_sdk": 1}
        return self.operation(OperationKind.CREATE_MODEL, body, 0)

    def create_from(self, path: str, *, optimizer: bool) -> Operation:
        body = {"session_id": self.session, "model_seq_id": self.number, "path": path, "optimizer": optimizer}
        return self.operation(OperationKind.LOAD_WEIGHTS, body, 0)

    def forward_backward(
        self, data: Sequence[types.Datum], loss_fn: str = "cross_entropy", *, forward_only: bool = False
    ) -> Operation:
        seq, self.next_seq = self.next_seq, self.next_seq + 1
        asked = ForwardBackwardInput(data=list(data), loss_fn=loss_fn)  # type: ignore[arg-type]
        request = ForwardBackwardRequest(forward_backward_input=asked, model_id=self.model_id, seq_id=seq)
        message = forward_backward_request_to_proto(request)
        message.forward_only = forward_only
        return self.operation(OperationKind.FORWARD_BACKWARD, message.SerializeToString(), seq)

    def optim_step(self, learning_rate: float = 1e-2, **adam: float) -> Operation:
        return self.operation(OperationKind.OPTIM_STEP, {"adam_params": {"learning_rate": learning_rate, **adam}})

    def save(self, name: str, kind: OperationKind = OperationKind.SAVE_WEIGHTS, **options: Any) -> Operation:
        return self.operation(kind, {"path": name, **options})

    def save_ephemeral(self, number: int, kind: str = "snapshot") -> Operation:
        body = {"sampling_session_seq_id": number, "kind": kind}
        return self.operation(OperationKind.SAVE_WEIGHTS_FOR_SAMPLER, body)

    def load(self, path: str, *, optimizer: bool) -> Operation:
        return self.operation(OperationKind.LOAD_WEIGHTS, {"path": path, "optimizer": optimizer})


def sample_operation(
    sampler_id: str, seq: int, prompt: Sequence[int], owner: str = "local", /, **options: Any
) -> Operation:
    """One ``asample``; ``options`` are fields of the request, those of ``sampling_params`` among them."""
    names = ("max_tokens", "seed", "stop", "temperature", "top_k", "top_p")
    params = {name: options.pop(name) for name in names if name in options}
    body = {"prompt": {"chunks": [{"type": "encoded_text", "tokens": list(prompt)}]}, "sampling_params": params}
    payload = json.dumps({**body, **options}).encode()
    return Operation(f"{sampler_id}/{seq}", owner, OperationKind.SAMPLE, sampler_id, seq, payload, time.time())


class EngineHarness:
    """A store, a session in it, and an Engine; what has ended is counted.

    Args:
        root: of the store; it is opened again if it is there.
        options: of the Engine.
    """

    def __init__(self, root: Path, base_models: Sequence[str | Path], **options: Any) -> None:
        self.finished: list[str] = []
        self._ended = threading.Condition()
        self.store = Store(root)
        self.checkpoints = CheckpointStore(self.store.root / "checkpoints")
        self._on_finished = options.pop("on_finished", lambda _: None)
        self.store.watch_ends(self._tell)
        self.engine = Engine(
            self.store, self.checkpoints, base_models=[str(each) for each in base_models], device="cpu", **options
        )
        if self.store.session(SESSION) is None:
            self.store.add_session(SessionRow(SESSION, "local")).result()
        self.engine.start()

    def __enter__(self) -> EngineHarness:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self, timeout: float = 30.0) -> None:
        """A graceful shutdown."""
        self.engine.close(timeout)
        self.store.close()

    def put(self, *operations: Operation) -> list[str]:
        """Store operations, hand the new ones to the engine, and give their request ids, as the server does."""
        ids = []
        for operation in operations:
            request_id, is_new = self.store.add_operation(operation).result()
            if is_new:
                self.engine.submit(operation)
            ids.append(request_id)
        return ids

    def wait(self, *request_ids: str, timeout: float = 60.0) -> list[Outcome]:
        """The outcomes of requests."""
        with self._ended:
            known = self._ended.wait_for(lambda: all(self._outcome(each) for each in request_ids), timeout)
            assert known, f"not ended: {[each for each in request_ids if self._outcome(each) is None]}"
        return [self._outcome(each) for each in request_ids]  # type: ignore[misc]

    def run(self, *operations: Operation) -> list[Any]:
        """Send operations and give their results, decoded: a failure is its ``{"error", "category"}``."""
        outcomes = self.wait(*self.put(*operations))
        return [decode(operation, outcome) for operation, outcome in zip(operations, outcomes, strict=True)]

    def add_sampler(self, number: int, base_model: str, model_path: str | None = None, owner: str = "local") -> str:
        """A sampling session, as ``create_sampling_session`` makes one."""
        sampler_id = f"{SESSION}:sample:{number}"
        row = SamplerRow(sampler_id, SESSION, owner, number, base_model, model_path)
        return self.store.add_sampler(row).result().sampler_id

    def hosted(self, model_id: str) -> HostedModel:
        """A model as the engine has it."""
        return self.engine._hosting.models()[model_id]

    def weights(self, model_id: str) -> dict[str, bytes]:
        """A model's weights and moments, exactly, whether it is parked or not."""
        hosted = self.hosted(model_id)
        model = hosted.loaded(threading.Event())
        tensors = {**model.parameters, **model.optimizer.state_tensors()}
        return {name: tensor.detach().numpy().tobytes() for name, tensor in tensors.items()}

    def _outcome(self, request_id: str) -> Outcome | None:
        stored = self.store.outcome(request_id)
        return None if stored is None else stored.outcome

    def _tell(self, stored: StoredOutcome) -> None:
        self._on_finished(stored.request_id)
        with self._ended:
            self.finished.append(stored.request_id)
            self._ended.notify_all()


def decode(operation: Operation, outcome: Outcome) -> Any:
    """What a client reads."""
    if outcome.content_type != PROTOBUF:
        return json.loads(outcome.body)
    if operation.kind == OperationKind.SAMPLE:
        return deserialize_sample_response(outcome.body)
    return deserialize_forward_backward_output(outcome.body)
