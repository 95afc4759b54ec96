"""What a run reads: the configuration with its policy, the held-out rows and the demonstrations."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from nat_plugin_evsys.config import (
    EvsysPolicyConfig,
    EvsysTraceBuilderConfig,
    EvsysTrainerConfig,
    EvsysTrajectoryBuilderConfig,
)
from nat_plugin_evsys.errors import ConfigError
from nat_plugin_evsys.finetuning.checks.datasets import check_dataset, content_of, dataset_of, sha256_of
from nat_plugin_evsys.finetuning.checks.trained_policies import TrainedPolicy, builder_of, trained_policies
from nat_plugin_evsys.finetuning.preflight import resolve_config
from nat_plugin_evsys.finetuning.warm_start import load_demonstrations

if TYPE_CHECKING:
    from nat.data_models.config import Config, GeneralConfig
    from nat.data_models.dataset_handler import EvalDatasetBaseConfig
    from nat.data_models.finetuning import FinetuneConfig, FinetuneRunConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunInputs:
    """The inputs of one run, checked.

    Attributes:
        policies: what is trained, with what, on which reward; the first is that of ``finetuning.trainer_adapter``.
        workflow: the workflow's type.
        validation_dataset: held-out rows; `--validation_dataset` overrides the trainer's setting.
        validation_config: of `--validation_config_file`, or None for the run's own.
        scores_training_rows: whether the training rows are scored before the first epoch and after the last.
        validation_interval: epochs between two validations; `--validation_interval` overrides the trainer's setting.
        general: NAT's ``general`` section.
        demonstrations: those of the warm start; empty without one.
        dump: the configuration in JSON's types, with what the command line adds and what is in the files of rows.
    """

    policies: list[TrainedPolicy]
    workflow: str
    validation_dataset: EvalDatasetBaseConfig | None
    validation_config: Config | None
    scores_training_rows: bool
    validation_interval: int
    general: GeneralConfig
    demonstrations: list[dict[str, Any]]
    dump: dict[str, Any]

    @classmethod
    def check(cls, finetuning: FinetuneConfig, trainer: EvsysTrainerConfig) -> RunInputs:
        """Read and check everything, before a model is loaded.

        Raises:
            ConfigError, DataError: one line that says what to change.
        """
        run = finetuning.run_configuration
        config = resolve_config(run)
        policies = trained_policies(config, finetuning)
        validation_config = _validation_config(finetuning, policies)
        given = run.validation_dataset if run is not None else None
        what = "--validation_dataset" if given else f"trainers.{finetuning.trainer}.validation_dataset"
        heldout = given or trainer.validation_dataset
        validation = None
        if heldout is not None:
            validation = dataset_of(validation_config or config, heldout, what=what)
            check_dataset(validation_config or config, validation, what=what)
        elif run is not None and run.validation_config_file is not None:
            raise ConfigError("--validation_config_file has no effect without held-out rows; set --validation_dataset")
        elif not trainer.score_training_rows:
            raise ConfigError(
                f"trainers.{finetuning.trainer}.score_training_rows is false and there is no validation_dataset, so "
                "nothing would measure the policy; set a validation_dataset, or score_training_rows: true"
            )
        elif trainer.validation_interval is not None:
            logger.warning(
                "trainers.%s.validation_interval has no effect without held-out rows; set a validation_dataset",
                finetuning.trainer,
            )
        builder = builder_of(config, finetuning)
        other_rows = isinstance(builder, EvsysTrajectoryBuilderConfig) and builder.rows_per_epoch is not None
        if trainer.on_collapse == "reload_best" and validation is None and other_rows:
            raise ConfigError(
                f"trainers.{finetuning.trainer}.on_collapse: reload_best needs held-out rows to compare checkpoints, "
                "since rows_per_epoch gives each epoch other rows; set a validation_dataset, or on_collapse: stop"
            )
        start = trainer.warm_start
        return cls(
            policies=policies,
            workflow=str(config.workflow.type),
            validation_dataset=validation,
            validation_config=validation_config,
            scores_training_rows=trainer.score_training_rows,
            validation_interval=_validation_interval(run, trainer),
            general=config.general,
            demonstrations=[] if start is None else load_demonstrations(start.demonstrations),
            dump=_dump(config, finetuning, validation),
        )

    def dump_of(self, policy: str) -> dict[str, Any]:
        """The configuration as a policy of ``also_train`` has it: with its own trainer adapter and reward."""
        trained = next(each for each in self.policies if each.name == policy)
        own = {"trainer_adapter": trained.adapter_name, "reward_function": {"name": trained.reward}}
        return {**self.dump, "finetuning": {**self.dump["finetuning"], **own}}

    def is_validation_due(self, epochs_done: int, num_epochs: int) -> bool:
        """True after every ``validation_interval`` epochs and after the last, where there are held-out rows."""
        due = epochs_done % self.validation_interval == 0 or epochs_done == num_epochs
        return self.validation_dataset is not None and due


def _validation_interval(run: FinetuneRunConfig | None, trainer: EvsysTrainerConfig) -> int:
    """`--validation_interval` where it was typed, else the trainer's, else NAT's default."""
    command = click.get_current_context(silent=True)
    typed = command is not None and command.get_parameter_source("validation_interval") is ParameterSource.COMMANDLINE
    default = 5 if run is None else run.validation_interval
    return default if typed else trainer.validation_interval or default


def _validation_config(finetuning: FinetuneConfig, policies: list[TrainedPolicy]) -> Config | None:
    run = finetuning.run_configuration
    if run is None or run.validation_config_file is None:
        return None
    from nat.runtime.loader import load_config

    config = load_config(Path(run.validation_config_file))
    if [each.policy for each in trained_policies(config, finetuning)] != [each.policy for each in policies]:
        raise ConfigError(f"{run.validation_config_file}: its policy differs from the trained one; make both the same")
    return config


def _dump(config: Config, finetuning: FinetuneConfig, validation: EvalDatasetBaseConfig | None) -> dict[str, Any]:
    run = finetuning.run_configuration
    dump = config.model_dump(mode="json", by_alias=True, exclude={"finetuning": {"run_configuration"}})
    if run is not None:
        dump["command_line"] = run.model_dump(
            mode="json", include={"dataset", "validation_dataset", "validation_config_file", "result_json_path"}
        )
    if run is not None or config.eval.general.dataset is not None:
        dump["data"] = {"dataset": content_of(dataset_of(config, None if run is None else run.dataset))}
        dump["data"] |= {} if validation is None else {"validation_dataset": content_of(validation)}
    builder = builder_of(config, finetuning)
    if isinstance(builder, EvsysTraceBuilderConfig):
        dump.setdefault("data", {})["traces"] = {str(path): sha256_of(path) for path in builder.files if path.is_file()}
    templates = [llm.chat_template for llm in config.llms.values() if isinstance(llm, EvsysPolicyConfig)]
    if files := {str(path): sha256_of(path) for path in templates if path is not None and path.is_file()}:
        dump.setdefault("data", {})["chat_templates"] = files
    return dump
