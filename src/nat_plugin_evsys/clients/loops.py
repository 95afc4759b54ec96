"""Types of Loops that Tinker does not have."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict


class WandbConfig(BaseModel):
    """Where ``create_lora_training_client(wandb_config=…)`` streams a client's metrics: Weights & Biases.

    Attributes:
        project: of the run.
        name: of the run; None lets wandb choose one.
    """

    model_config = ConfigDict(extra="forbid")

    project: str
    name: str | None = None


class CheckpointFile(BaseModel):
    """One file of a checkpoint.

    Attributes:
        url: ``file://…``: the file is on this machine, so the URL is unsigned and never expires.
        relative_file_name: its path below the checkpoint.
        node_rank: of the node that wrote it; there is one, 0.
        size_bytes: its size.
        last_modified: ISO 8601, UTC.
    """

    url: str
    relative_file_name: str
    node_rank: int = 0
    size_bytes: int
    last_modified: str


class CheckpointFilesResponse(BaseModel):
    """The files of a checkpoint, all of them on one page.

    Attributes:
        presigned_urls: one entry per file, by name.
        total_count: of files.
        next_page_token: always None.
    """

    presigned_urls: list[CheckpointFile]
    total_count: int
    next_page_token: int | None = None


def files_of(directory: Path) -> CheckpointFilesResponse:
    """Every file of a checkpoint's directory."""
    files = [
        CheckpointFile(
            url=path.absolute().as_uri(),
            relative_file_name=path.name,
            size_bytes=path.stat().st_size,
            last_modified=datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(),
        )
        for path in sorted(directory.iterdir())
    ]
    return CheckpointFilesResponse(presigned_urls=files, total_count=len(files))
