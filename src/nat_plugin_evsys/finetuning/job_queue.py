"""The training jobs of one adapter: run one after another, looked up by NAT's refs, recorded in the ledger."""

from __future__ import annotations

import asyncio
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nat.data_models.finetuning import TrainingJobRef, TrainingJobStatus

from nat_plugin_evsys.errors import ConfigError
from nat_plugin_evsys.training.job import TrainingJob
from nat_plugin_evsys.training.job_ledger import JobLedger

if TYPE_CHECKING:
    from nat_plugin_evsys.training.work import TrainingWork

BACKEND = "evsys"
"""``TrainingJobRef.backend`` of every job of this adapter."""

KEPT_ENDED = 64


class JobQueue:
    """Jobs run in the order of submission, one at a time.

    Args:
        keep_ended: of the jobs that have ended, how many of the newest can still be looked up. The ledger has all.
    """

    def __init__(self, keep_ended: int = KEPT_ENDED) -> None:
        self._jobs: dict[str, TrainingJob] = {}
        self._keep_ended = keep_ended
        self._turn = asyncio.Lock()

    @property
    def tasks(self) -> dict[str, asyncio.Task[None]]:
        """The task of every job that can be looked up, by job id, in the order of submission."""
        return {job_id: job.task for job_id, job in self._jobs.items()}

    def start(
        self,
        run_id: str,
        work: TrainingWork,
        sizes: dict[str, int],
        epoch: int | None,
        *,
        run_dir: Path | None,
        save_datums: bool,
    ) -> TrainingJob:
        """Record a job in the ledger of ``run_dir`` and start it.

        Raises:
            ConfigError: ``save_datums`` without a run directory.
            OSError: the ledger cannot be written; nothing was started.
        """
        if save_datums and run_dir is None:
            raise ConfigError("save_datums is set, but the adapter has no run_dir to write to; set adapter.run_dir")
        ledger = JobLedger(run_dir) if run_dir is not None else None
        job_id = uuid.uuid4().hex
        if save_datums and run_dir is not None:
            work.datum_log = run_dir / f"datums-{job_id}.jsonl"
        if ledger is not None:
            ledger.submitted(job_id, run_id, epoch=epoch, **sizes)
        self._jobs[job_id] = job = TrainingJob(
            run_id, work, self._turn, job_id=job_id, epoch=epoch, on_end=lambda job: _record_end(ledger, job)
        )
        self._forget()
        return job

    def _forget(self) -> None:
        ended = [job_id for job_id, job in self._jobs.items() if job.ended]
        for job_id in ended[: max(0, len(ended) - self._keep_ended)]:
            del self._jobs[job_id]

    def find(self, ref: TrainingJobRef) -> TrainingJob:
        """The job of a ref, or the newest of its run if the ref names none.

        Raises:
            ValueError: unknown job, or one that ended long ago; the text lists what is known.
        """
        job_id = (ref.metadata or {}).get("job_id")
        of_run = [job for job in self._jobs.values() if job.run_id == ref.run_id]
        fitting = of_run if job_id is None else [job for job in of_run if job.job_id == job_id]
        if ref.backend == BACKEND and fitting:
            return fitting[-1]
        known = ", ".join(f"{job.job_id} (run {job.run_id})" for job in self._jobs.values()) or "none"
        raise ValueError(
            f"no training job for run_id `{ref.run_id}`, backend `{ref.backend}`, job_id `{job_id}`; "
            f"known jobs of backend `{BACKEND}`: {known}"
        )

    async def cancel_all(self) -> None:
        """Cancel unfinished jobs and wait until nothing runs any more."""
        open_jobs = [job for job in self._jobs.values() if not job.ended]
        # Last first, so that no pending job gets its turn meanwhile.
        for job in reversed(open_jobs):
            job.cancel()
        for job in open_jobs:
            await job.wait()


def progress_of(status: TrainingJobStatus) -> dict[str, Any]:
    """A status as the metrics of ``log_progress``."""
    return {"status": status.status.value, "progress": status.progress, **_details(status)}


def _record_end(ledger: JobLedger | None, job: TrainingJob) -> None:
    if ledger is not None:
        status = job.status(BACKEND)
        fields = {"status": status.status.value, "progress": status.progress, "message": status.message}
        ledger.finished(job.job_id, job.run_id, **fields, **_details(status))


def _details(status: TrainingJobStatus) -> dict[str, Any]:
    return {key: value for key, value in (status.metadata or {}).items() if key != "job_id"}
