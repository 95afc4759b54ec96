"""What addresses an operation: the part of its body that the server reads before it stores it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

MAX_SEQ_ID = 2**63 - 1  # what a column of the store holds
_MAX_ID = 200
_MAX_SAMPLES = 4096


class _Address(BaseModel):
    model_config = ConfigDict(extra="ignore", protected_namespaces=(), strict=True)


class NewModel(_Address):
    """Of the first operation of a model."""

    session_id: str = Field(max_length=_MAX_ID)
    model_seq_id: int = Field(ge=0, le=MAX_SEQ_ID)

    @property
    def model_id(self) -> str:
        """The model's id."""
        return f"{self.session_id}:train:{self.model_seq_id}"


class ModelStep(_Address):
    """Of every later operation of a model; 0 is the number of the first one."""

    model_id: str = Field(max_length=_MAX_ID)
    seq_id: int = Field(ge=1, le=MAX_SEQ_ID)


class SamplerStep(_Address):
    """Of ``asample``."""

    sampling_session_id: str = Field(max_length=_MAX_ID)
    seq_id: int = Field(ge=0, le=MAX_SEQ_ID)
    num_samples: int = Field(default=1, ge=1, le=_MAX_SAMPLES)
