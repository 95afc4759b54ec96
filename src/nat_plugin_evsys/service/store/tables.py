"""The store's tables. A column has the name of its row's field (``service.store.rows``).

Payloads and results have tables of their own, so that ending an operation does not rewrite a large row.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
)

from nat_plugin_evsys.service.wire.kinds import OperationKind

SCHEMA_VERSION = 1

TRAIN = "train"
SAMPLE = "sample"

metadata = MetaData()

sessions = Table(
    "sessions",
    metadata,
    Column("session_id", Text, primary_key=True),
    Column("owner", Text, nullable=False, index=True),
    Column("created_at", Float, nullable=False),
    Column("last_seen", Float, nullable=False, index=True),
    Column("tags", JSON, nullable=False),
    Column("user_metadata", JSON, nullable=False),
    Column("sdk_version", Text, nullable=False),
    Column("finished", Text),
    Column("display_name", Text),
    Column("project_id", Text),
)


def _session() -> Column[str]:
    return Column("session_id", Text, ForeignKey("sessions.session_id", ondelete="CASCADE"), nullable=False, index=True)


models = Table(
    "models",
    metadata,
    Column("model_id", Text, primary_key=True),
    _session(),
    Column("owner", Text, nullable=False, index=True),
    Column("model_seq_id", Integer, nullable=False),
    Column("base_model", Text, nullable=False),
    Column("lora_rank", Integer, nullable=False),
    Column("lora_seed", Integer),
    Column("train_attn", Boolean, nullable=False),
    Column("train_mlp", Boolean, nullable=False),
    Column("train_unembed", Boolean, nullable=False),
    Column("user_metadata", JSON, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("next_seq", Integer, nullable=False),
    Column("snapshot", Text, key="saved_state"),  # on disk it has the name that it began with
    Column("snapshot_seq", Integer, nullable=False, key="saved_state_seq"),
)

samplers = Table(
    "samplers",
    metadata,
    Column("sampler_id", Text, primary_key=True),
    _session(),
    Column("owner", Text, nullable=False, index=True),
    Column("seq_id", Integer, nullable=False),
    Column("base_model", Text, nullable=False),
    Column("model_path", Text),
    Column("directory", Text),
    Column("model_id", Text, index=True),
    Column("step", Integer, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("dropped", Boolean, nullable=False),
)

# Whose a model's checkpoints are: they outlive the session, so this is not part of ``models``.
runs = Table(
    "runs",
    metadata,
    Column("model_id", Text, primary_key=True),
    Column("owner", Text, nullable=False, index=True),
)

published = Table(
    "published",
    metadata,
    Column("path", Text, primary_key=True),
    Column("owner", Text, nullable=False),
)

operations = Table(
    "operations",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("request_id", Text, nullable=False, unique=True),
    Column("owner", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("family", Text, nullable=False),
    Column("scope", Text, nullable=False),
    Column("seq_id", Integer, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("finished_at", Float),
    Column("delivered_at", Float),
    Column("failed", Boolean),
    Column("effect", Text),
    Column("content_type", Text),
    UniqueConstraint("family", "scope", "seq_id"),
)
Index("operations_by_scope", operations.c.scope)
Index("operations_unfinished", operations.c.scope, sqlite_where=operations.c.finished_at.is_(None))
Index("operations_by_end", operations.c.finished_at)


def _operation() -> Column[int]:
    return Column("operation", Integer, ForeignKey("operations.id", ondelete="CASCADE"), primary_key=True)


payloads = Table("payloads", metadata, _operation(), Column("body", LargeBinary, nullable=False))

results = Table("results", metadata, _operation(), Column("body", LargeBinary, nullable=False))


def family(kind: OperationKind) -> str:
    """Operations of one family and scope share their numbering: a model's training, or a sampling session's samples."""
    return SAMPLE if kind == OperationKind.SAMPLE else TRAIN
