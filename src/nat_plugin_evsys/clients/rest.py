"""Lists, describes and deletes checkpoints and training runs."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from tinker import types

from nat_plugin_evsys.clients.futures import ResultFuture
from nat_plugin_evsys.clients.loops import CheckpointFilesResponse, files_of
from nat_plugin_evsys.clients.methods import awaits, refuses
from nat_plugin_evsys.engine.checkpoints import read_checkpoint
from nat_plugin_evsys.errors import ConfigError
from nat_plugin_evsys.runtime.arguments import check_int, check_ttl, refuse_options
from nat_plugin_evsys.runtime.checkpoint_store import SCHEME, CheckpointStore, parse_path
from nat_plugin_evsys.runtime.runs import RunRecord

_NO_ACCOUNTS = "there are no accounts here; a checkpoint is a directory that you may share"
_NO_SESSIONS = "sessions are not kept; see list_training_runs"


class RestHost(Protocol):
    """What a RestClient needs from the ServiceClient that made it."""

    store: CheckpointStore

    def get_server_capabilities(self) -> types.GetServerCapabilitiesResponse:
        """The models that can be trained or sampled."""

    def live_runs(self) -> list[RunRecord]:
        """The records of the training clients that are open."""

    def run_in_background(self, call: Callable[[], Any]) -> ResultFuture[Any]:
        """A future of what ``call`` returns, run in one of the host's threads."""


class RestClient:
    """Tinker's RestClient over the store of a ServiceClient (``ServiceClient.create_rest_client``).

    Every call returns a future; invalid arguments are raised through it. An expired checkpoint is
    deleted at its next use.
    """

    def __init__(self, service: RestHost) -> None:
        self._service = service
        self._store = service.store

    def get_server_capabilities(self) -> ResultFuture[types.GetServerCapabilitiesResponse]:
        """See ``ServiceClient.get_server_capabilities``."""
        return self._run(self._service.get_server_capabilities)

    def list_checkpoints(self, training_run_id: types.ModelID) -> ResultFuture[types.CheckpointsListResponse]:
        """The complete checkpoints of a training run, oldest first.

        Raises, through the future:
            CheckpointError: there is no such training run.
        """

        def call() -> types.CheckpointsListResponse:
            self._record(training_run_id)
            return types.CheckpointsListResponse(checkpoints=self._store.checkpoints(training_run_id))

        return self._run(call)

    list_checkpoints_async = awaits(list_checkpoints)

    def list_user_checkpoints(self, limit: int = 100, offset: int = 0) -> ResultFuture[types.CheckpointsListResponse]:
        """The checkpoints of all training runs of the store, newest first."""

        def call() -> types.CheckpointsListResponse:
            _check_page(limit, offset)
            found = [c for run in self._store.runs() for c in self._store.checkpoints(run.model_id)]
            found.sort(key=lambda checkpoint: checkpoint.time, reverse=True)
            cursor = types.Cursor(offset=offset, limit=limit, total_count=len(found))
            return types.CheckpointsListResponse(checkpoints=found[offset : offset + limit], cursor=cursor)

        return self._run(call)

    list_user_checkpoints_async = awaits(list_user_checkpoints)

    def delete_checkpoint(self, training_run_id: types.ModelID, checkpoint_id: str) -> ResultFuture[None]:
        """Delete ``weights/<name>`` or ``sampler_weights/<name>`` of a training run, for good.

        Raises, through the future:
            CheckpointError: it does not exist.
        """
        return self._run(lambda: self._store.delete(f"{SCHEME}{training_run_id}/{checkpoint_id}"))

    delete_checkpoint_async = awaits(delete_checkpoint)

    def delete_checkpoint_from_tinker_path(self, tinker_path: str) -> ResultFuture[None]:
        """``delete_checkpoint`` by path."""
        return self._run(lambda: self._store.delete(tinker_path))

    delete_checkpoint_from_tinker_path_async = awaits(delete_checkpoint_from_tinker_path)

    def set_checkpoint_ttl_from_tinker_path(self, tinker_path: str, ttl_seconds: int | None) -> ResultFuture[None]:
        """Let a checkpoint expire ``ttl_seconds`` from now (one hour to ten years), or never.

        Raises, through the future:
            CheckpointError: it does not exist.
            ConfigError: ttl_seconds is out of range.
        """
        return self._run(lambda: self._store.set_ttl(tinker_path, check_ttl(ttl_seconds)))

    set_checkpoint_ttl_from_tinker_path_async = awaits(set_checkpoint_ttl_from_tinker_path)

    def get_checkpoint_directory(self, tinker_path: str) -> ResultFuture[Path]:
        """The directory of a checkpoint, in PEFT's format. *Extension.*

        Raises, through the future:
            CheckpointError: missing, torn or expired.
        """
        return self._run(lambda: self._store.resolve(tinker_path))

    get_checkpoint_directory_async = awaits(get_checkpoint_directory)

    def get_checkpoint_archive_url(
        self, training_run_id: types.ModelID, checkpoint_id: str
    ) -> ResultFuture[CheckpointFilesResponse]:
        """Where the files of ``weights/<name>`` or ``sampler_weights/<name>`` are: a ``file://`` URL each. *Extension.*

        Raises, through the future:
            CheckpointError: missing, torn or expired.
        """
        return self.get_checkpoint_archive_url_from_tinker_path(f"{SCHEME}{training_run_id}/{checkpoint_id}")

    get_checkpoint_archive_url_async = awaits(get_checkpoint_archive_url)

    def get_checkpoint_archive_url_from_tinker_path(self, tinker_path: str) -> ResultFuture[CheckpointFilesResponse]:
        """``get_checkpoint_archive_url`` by path. *Extension.*"""
        return self._run(lambda: files_of(self._store.resolve(tinker_path)))

    get_checkpoint_archive_url_from_tinker_path_async = awaits(get_checkpoint_archive_url_from_tinker_path)

    def get_external_weights_urls(self, tinker_path: str) -> ResultFuture[types.ExternalWeightsUrlsResponse]:
        """A ``file://`` URL for each file of a checkpoint of ``save_weights_external``; it expires with the checkpoint.

        Raises, through the future:
            ConfigError: it is a checkpoint of another kind.
            CheckpointError: missing, torn or expired.
        """

        def call() -> types.ExternalWeightsUrlsResponse:
            directory = self._store.resolve(tinker_path)
            info = read_checkpoint(directory)
            if info.kind != "external":
                raise ConfigError(f"{tinker_path} was not saved by save_weights_external; see get_checkpoint_directory")
            expires = datetime.max if info.expires_at is None else datetime.fromtimestamp(info.expires_at, UTC)
            urls = {file.relative_file_name: file.url for file in files_of(directory).presigned_urls}
            return types.ExternalWeightsUrlsResponse(urls=urls, expires=expires.replace(tzinfo=UTC))

        return self._run(call)

    get_external_weights_urls_async = awaits(get_external_weights_urls)

    def get_training_run(
        self, training_run_id: types.ModelID, access_scope: str = "owned"
    ) -> ResultFuture[types.TrainingRun]:
        """A training run that is open in this ServiceClient or has saved something in its store.

        Raises, through the future:
            CheckpointError: it does not exist.
            ConfigError: access_scope is neither "owned" nor "accessible" (which are the same here).
        """

        def call() -> types.TrainingRun:
            _check_scope(access_scope)
            return self._describe(self._record(training_run_id))

        return self._run(call)

    get_training_run_async = awaits(get_training_run)

    def get_training_run_by_tinker_path(
        self, tinker_path: str, access_scope: str = "owned"
    ) -> ResultFuture[types.TrainingRun]:
        """The training run that made a checkpoint."""

        def call() -> types.TrainingRun:
            _check_scope(access_scope)
            return self._describe(self._record(parse_path(tinker_path)[0]))

        return self._run(call)

    get_training_run_by_tinker_path_async = awaits(get_training_run_by_tinker_path)

    def list_training_runs(
        self, limit: int = 20, offset: int = 0, access_scope: str = "owned", project_id: None = None
    ) -> ResultFuture[types.TrainingRunsResponse]:
        """The open training runs and those that have saved something, newest first."""

        def call() -> types.TrainingRunsResponse:
            _check_page(limit, offset)
            _check_scope(access_scope)
            refuse_options(project_id=project_id)
            records = {record.model_id: record for record in [*self._store.runs(), *self._service.live_runs()]}
            newest = sorted(records.values(), key=lambda record: record.created_at, reverse=True)
            return types.TrainingRunsResponse(
                training_runs=[self._describe(record) for record in newest[offset : offset + limit]],
                cursor=types.Cursor(offset=offset, limit=limit, total_count=len(newest)),
            )

        return self._run(call)

    list_training_runs_async = awaits(list_training_runs)

    def get_weights_info_by_tinker_path(self, tinker_path: str) -> ResultFuture[types.WeightsInfoResponse]:
        """Base model and LoRA shape of a checkpoint.

        Raises, through the future:
            CheckpointError: missing, torn or expired.
        """

        def call() -> types.WeightsInfoResponse:
            info = read_checkpoint(self._store.resolve(tinker_path))
            record = self._record(parse_path(tinker_path)[0])
            return record.weights_info(info)

        return self._run(call)

    def _run(self, call: Callable[[], Any]) -> ResultFuture[Any]:
        return self._service.run_in_background(call)

    def _record(self, training_run_id: str) -> RunRecord:
        live = {record.model_id: record for record in self._service.live_runs()}
        try:
            return live[training_run_id]
        except (KeyError, TypeError):
            return self._store.run(training_run_id)

    def _describe(self, record: RunRecord) -> types.TrainingRun:
        return record.to_tinker(self._store.checkpoints(record.model_id))


def _refused(name: str, why: str) -> None:
    setattr(RestClient, name, refuses("RestClient", name, why))


for _name, _why in {
    "publish_checkpoint_from_tinker_path": _NO_ACCOUNTS,
    "unpublish_checkpoint_from_tinker_path": _NO_ACCOUNTS,
    "copy_weights": _NO_ACCOUNTS,
    "whoami": _NO_ACCOUNTS,
    "assign_session_project": _NO_ACCOUNTS,
    "get_audit_log": _NO_ACCOUNTS,
    "get_billing_usage": _NO_ACCOUNTS,
    "get_current_checkpoint_storage_usage": _NO_ACCOUNTS,
    "get_session": _NO_SESSIONS,
    "list_sessions": _NO_SESSIONS,
    "search_sessions": _NO_SESSIONS,
    "export_session_trace": _NO_SESSIONS,
    "get_sampler": "sampling clients are objects of this process; see SamplingClient.model_path and get_base_model",
    "get_telemetry": "nothing is reported to anyone",
}.items():
    _refused(_name, _why)
    if _name not in ("whoami", "search_sessions", "get_telemetry"):
        _refused(f"{_name}_async", _why)


def _check_page(limit: int, offset: int) -> None:
    check_int("limit", limit, least=1)
    check_int("offset", offset, least=0)


def _check_scope(access_scope: str) -> None:
    if access_scope not in ("owned", "accessible"):
        raise ConfigError(f"access_scope must be 'owned' or 'accessible' (the same here), got {access_scope!r}")
