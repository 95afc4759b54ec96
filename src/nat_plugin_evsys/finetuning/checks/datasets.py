"""The files of rows: which one a run reads, how it is parsed, whether its rows can be used, and what is in it."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nat_plugin_evsys.cells import is_blank, without_arrays
from nat_plugin_evsys.config import EvsysExactMatchConfig, EvsysFunctionCallConfig, EvsysTrainerAdapterConfig
from nat_plugin_evsys.errors import ConfigError, DataError
from nat_plugin_evsys.files import no_file
from nat_plugin_evsys.rollouts.traces.record import question_key

if TYPE_CHECKING:
    import pandas as pd
    from nat.data_models.config import Config
    from nat.data_models.dataset_handler import EvalDatasetBaseConfig

logger = logging.getLogger(__name__)

_TYPES = {".json": "json", ".jsonl": "jsonl", ".csv": "csv", ".parquet": "parquet", ".xls": "xls", ".xlsx": "xls"}
"""NAT's ``_type`` of a file, by its suffix."""

_SHARED = ("id_key", "structure", "filter")
"""Settings that another dataset takes from ``eval.general.dataset`` where it does not set them itself."""


def dataset_of(
    config: Config, override: Path | str | Mapping[str, Any] | None, what: str = "dataset"
) -> EvalDatasetBaseConfig:
    """The dataset that a run reads: ``eval.general.dataset``, or another one that is read by the same keys.

    Args:
        override: another file, parsed by its suffix, or settings of a dataset as under ``eval.general.dataset``; a
            ``custom`` dataset's function reads another file itself.
        what: what to call it in an error.

    Raises:
        ConfigError: there is none, or its settings are wrong.
    """
    configured = config.eval.general.dataset
    if override is None:
        if configured is None:
            raise ConfigError("eval.general.dataset is not set; give it a `file_path` or use --dataset")
        return configured
    if not isinstance(override, Mapping):
        if configured is not None and configured.type == "custom":
            return configured.model_copy(update={"file_path": Path(override)})
        override = {"file_path": str(override)}
    shared = {} if configured is None else configured.model_dump(include=set(_SHARED))
    suffix = Path(str(override.get("file_path", ""))).suffix.lower()
    default = "json" if configured is None else configured.type
    kind, types = override.get("_type", _TYPES.get(suffix, default)), _dataset_types()
    if kind not in types:
        raise ConfigError(f"{what}: _type is `{kind}`; NAT has {sorted(types)}")
    try:
        return types[kind].model_validate({**shared, **override})
    except ValueError as error:
        raise ConfigError(f"{what}: {error}") from error


def check_dataset(config: Config, dataset: EvalDatasetBaseConfig | None = None, what: str = "dataset") -> None:
    """Every row must have a unique id, a question and an answer (NAT silently skips or zeroes other rows).

    No row needs an answer where none has one: formats and games can be rewarded without. Our own evaluators need one.

    Args:
        dataset: default ``eval.general.dataset``.

    Raises:
        ConfigError: no dataset, no such file, or nothing that can read it.
        DataError: names the first bad row.
    """
    source = dataset_of(config, None) if dataset is None else dataset
    if source.remote_file_path or source.type == "custom":
        return  # read by NAT's own loader only
    _check_rows(_rows(source, what), source, f"{what} {Path(source.file_path).absolute()}", _reads_answers(config))


def rows_by_question(dataset: EvalDatasetBaseConfig) -> dict[str, dict[str, Any]]:
    """The rows of a dataset that is a file, by ``question_key``; their answers are at ``answer`` in any case."""
    structure = dataset.structure
    if structure.disable or dataset.remote_file_path or dataset.type == "custom":
        return {}
    rows = [without_arrays(row) for row in _rows(dataset, "dataset").to_dict("records")]
    return {
        question_key(row[structure.question_key]): {**row, "answer": row.get(structure.answer_key, "")} for row in rows
    }


def _reads_answers(config: Config) -> str | None:
    """The ``_type`` of a reward's evaluator if it scores no row without an answer."""
    adapters = [each for each in config.trainer_adapters.values() if isinstance(each, EvsysTrainerAdapterConfig)]
    rewards = [config.finetuning.reward_function, *(adapter.reward for adapter in adapters)]
    for reward in rewards:
        evaluator = None if reward is None else config.eval.evaluators.get(reward.name)
        if isinstance(evaluator, EvsysExactMatchConfig | EvsysFunctionCallConfig):
            return str(evaluator.type)
    return None


def _dataset_types() -> dict[str, type[EvalDatasetBaseConfig]]:
    """NAT's classes of datasets, and those of its plugins, by ``_type``."""
    from nat.data_models.dataset_handler import EvalDatasetBaseConfig

    found: dict[str, type[EvalDatasetBaseConfig]] = {}
    waiting = [EvalDatasetBaseConfig]
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        if (name := kind.static_type()) is not None:  # type: ignore[no-untyped-call]
            found[name] = kind
    return found


def content_of(dataset: EvalDatasetBaseConfig) -> dict[str, Any]:
    """What is in a dataset's file, to notice a change: its hash, and the number of its rows; empty for a remote one."""
    path = Path(dataset.file_path)
    if dataset.remote_file_path or not path.is_file():
        return {}
    content: dict[str, Any] = {"sha256": sha256_of(path)}
    return content if dataset.type == "custom" else {**content, "rows": len(_rows(dataset, "dataset"))}


def sha256_of(path: Path) -> str:
    """The hash of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _rows(source: Any, what: str) -> pd.DataFrame:
    if not Path(source.file_path).is_file():
        raise ConfigError(no_file(what, source.file_path))
    parser, kwargs = source.parser()
    try:
        return parser(source.file_path, **kwargs)
    except ImportError as error:
        install = " Type: pip install 'nat_plugin_evsys[parquet]'" if source.type == "parquet" else ""
        raise ConfigError(f"{what} {source.file_path}: {str(error).splitlines()[0]}{install}") from error
    except ValueError as error:
        raise DataError(f"{what} {source.file_path}: cannot be parsed as {source.type}: {error}") from error


def _check_rows(frame: pd.DataFrame, dataset_config: EvalDatasetBaseConfig, name: str, needed_by: str | None) -> None:
    from nat.plugins.eval.dataset_handler.dataset_filter import DatasetFilter

    if frame.empty:
        raise DataError(f"{name}: has no rows")
    rows = len(frame)
    if dataset_config.filter is not None:
        frame = DatasetFilter(dataset_config.filter).apply_filters(frame)
    if frame.empty:
        raise DataError(
            f"{name}: eval.general.dataset.filter leaves none of its {rows} rows; change its allowlist or denylist"
        )
    structure = dataset_config.structure
    keys = [dataset_config.id_key]
    if not structure.disable:
        keys.append(structure.question_key)
        if needed_by is not None:
            _check_answers(frame, structure.answer_key, name, needed_by)
        elif structure.answer_key in frame.columns:
            keys.append(structure.answer_key)
        else:
            logger.warning("%s: no row has `%s`; evaluators are given an empty answer", name, structure.answer_key)
    for key in keys:
        missing = frame[key].isnull() if key in frame.columns else None
        if missing is None or missing.any():
            row = 0 if missing is None else int(missing.to_numpy().argmax())
            raise DataError(
                f"{name}: row {row + 1} has no `{key}`; add it, or name the right key under eval.general.dataset "
                "(id_key, structure.question_key, structure.answer_key)"
            )
    if not structure.disable and not frame[structure.question_key].map(lambda value: isinstance(value, str)).all():
        raise DataError(f"{name}: `{structure.question_key}` is not text in every row, and NAT reads text only")
    twice = frame[dataset_config.id_key].duplicated()
    if twice.any():
        row = int(twice.to_numpy().argmax())
        raise DataError(
            f"{name}: row {row + 1} has the id `{frame[dataset_config.id_key].iloc[row]}` of an earlier row, which NAT "
            "would drop; make the ids unique"
        )


def _check_answers(frame: pd.DataFrame, key: str, name: str, needed_by: str) -> None:
    answers = list(frame[key]) if key in frame.columns else [""] * len(frame)
    without = [row for row, answer in enumerate(answers, start=1) if is_blank(answer)]
    if without:
        raise DataError(
            f"{name}: row {without[0]} has no `{key}` ({len(without)} of {len(answers)} rows have none), which the "
            f"reward ({needed_by}) compares the output with; add it, or name the right key: "
            "eval.general.dataset.structure.answer_key"
        )
