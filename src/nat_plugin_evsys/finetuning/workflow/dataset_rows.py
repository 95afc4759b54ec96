"""The rows that an evaluation run is about, chosen before NAT makes items of them, one for each attempt."""

from __future__ import annotations

import asyncio
import copy
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

import pandas as pd
from nat.data_models.dataset_handler import EvalDatasetBaseConfig
from nat.data_models.evaluator import EvalInput
from nat.plugins.eval.dataset_handler.dataset_handler import DatasetHandler
from pydantic import PrivateAttr

if TYPE_CHECKING:
    from nat_plugin_evsys.rollouts.row_batches import RowChoice


class ChosenRows(EvalDatasetBaseConfig):
    """A dataset, as NAT reads one, of rows that have been read and filtered already."""

    _frame: pd.DataFrame = PrivateAttr()

    @classmethod
    def of(cls, dataset: EvalDatasetBaseConfig, frame: pd.DataFrame) -> Self:
        """Some rows of ``dataset``, which have its keys."""
        chosen = cls(id_key=dataset.id_key, structure=dataset.structure, file_path=dataset.file_path)
        chosen._frame = frame
        return chosen

    def parser(self) -> tuple[Callable[[Any], pd.DataFrame], dict[str, Any]]:
        """What NAT calls to read a dataset's file, and its options."""
        return lambda path: self._frame, {}


class DatasetRows:
    """Chooses rows of the datasets of one run. Those of a file stay in memory until it changes."""

    def __init__(self) -> None:
        self._file: tuple[EvalDatasetBaseConfig, tuple[int, ...]] | None = None
        self._frame = pd.DataFrame()

    async def choose(self, dataset: EvalDatasetBaseConfig, choice: RowChoice) -> ChosenRows | None:
        """The rows of ``dataset`` that ``choice`` takes, in their order and under their ids; None if it has none.

        Raises:
            OSError, ValueError: the dataset cannot be read.
        """
        frame = await self._read(dataset)
        if dataset.id_key not in frame.columns:
            return None
        ids = frame[dataset.id_key].astype(str)
        chosen = frame[ids.isin(set(choice(list(dict.fromkeys(ids)))))]
        return ChosenRows.of(dataset, _with_own_cells(chosen))

    async def _read(self, dataset: EvalDatasetBaseConfig) -> pd.DataFrame:
        if dataset.type == "custom":
            return _rows(dataset)  # the user's function need not be made for threads, and may have new rows each time
        if dataset.remote_file_path:
            return await asyncio.to_thread(_rows, dataset)
        stat = os.stat(dataset.file_path)
        file = dataset, (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if file != self._file:
            self._frame = await asyncio.to_thread(_rows, dataset)
            self._file = file
        return self._frame


class _RowHandler(DatasetHandler):
    """NAT's reader of datasets up to where it makes items."""

    def __init__(self, dataset: EvalDatasetBaseConfig) -> None:
        super().__init__(dataset, reps=1, concurrency=1)
        self.frame = pd.DataFrame()

    def get_eval_input_from_df(self, input_df: pd.DataFrame) -> EvalInput:
        """Keep the rows that NAT makes items of."""
        if self.is_structured_input() and not input_df.empty:
            questions = input_df[self.question_key]
            input_df = input_df[questions.notnull() & questions.str.strip().ne("")]
        self.frame = input_df
        return EvalInput(eval_input_items=[])


def _rows(dataset: EvalDatasetBaseConfig) -> pd.DataFrame:
    handler = _RowHandler(dataset)
    handler.get_eval_input_from_dataset("")
    return handler.frame


def _with_own_cells(rows: pd.DataFrame) -> pd.DataFrame:
    """A copy that shares no list or dict with ``rows``: evaluators may change what is in an item."""
    copied = rows.copy()
    for name in copied.select_dtypes(object).columns:
        copied[name] = pd.Series(copy.deepcopy(list(copied[name])), copied.index, dtype=object)
    return copied
