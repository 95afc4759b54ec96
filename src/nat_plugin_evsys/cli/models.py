"""``nat evsys check`` and ``nat evsys export``: what a base model is good for, and how a trained one gets out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import click

from nat_plugin_evsys.address_space import require_address_space
from nat_plugin_evsys.cli.options import find_run, output_dir_options, readable_errors
from nat_plugin_evsys.config.quantization import Quantization

_CELLS = ("training", "sampling", "loss", "gradient", "sampler", "adapter")


def _precision(command: Callable[..., None]) -> Callable[..., None]:
    dtype = click.Choice(["auto", "float32", "bfloat16", "float16"])
    command = click.option("--dtype", type=dtype, default="auto", show_default=True, help="Of the weights.")(command)
    return click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")(command)


@click.command(name="check")
@click.argument("model")
@_precision
@click.option(
    "--quantization", type=click.Choice(get_args(Quantization)), default="none", show_default=True, help="At load."
)
@readable_errors
def check_command(model: str, device: str, dtype: str, quantization: str) -> None:
    """Check the engine on MODEL (a Hugging Face id, a directory, a .gguf file, or builtin/…) before training it.

    Trains an adapter for five steps and compares gradient, sampler and saved adapter with independent computations.
    The exit status is 1 if MODEL is refused or anything differs. Needs `nat_plugin_evsys[peft]`.
    """
    require_address_space()
    from nat_plugin_evsys.engine.model.loading import load_base_model
    from nat_plugin_evsys.runtime.model_check import check_model

    row = check_model(load_base_model(model, device=device, dtype=dtype, quantization=quantization))
    if row.refused:
        raise click.ClickException(row.refused)
    for cell in _CELLS:
        click.echo(f"{cell:<9} {getattr(row, cell)}")
    if not row.is_right:
        click.get_current_context().exit(1)


@click.command(name="export")
@click.argument("run", default="latest")
@click.option("--merge", "form", flag_value="merged", help="Write the base model with the adapter in its weights.")
@click.option("--adapter", "form", flag_value="adapter", help="Write the adapter alone, as PEFT and vLLM load it.")
@click.option(
    "--checkpoint",
    type=click.Choice(["best", "latest"]),
    help="Which checkpoint of RUN; default: best, or latest where none that was trained has a reward.",
)
@click.option("--output", type=click.Path(path_type=Path), help="Directory to make; default: beside the checkpoint.")
@click.option("--base-model", help="Where the base model is now; default: where it was.")
@_precision
@readable_errors
@output_dir_options
def export_command(
    output_dir: Path,
    run: str,
    form: str | None,
    checkpoint: str | None,
    output: Path | None,
    base_model: str | None,
    device: str,
    dtype: str,
) -> None:
    """Write the policy of RUN (a name, a path, `latest`, or the path of a checkpoint) for other programs.

    What is written is loaded back and compared before it is kept. `--adapter` needs `nat_plugin_evsys[peft]` for that.
    A policy that was trained with `base_url` is downloaded first: docs/models.md has the command.
    """
    require_address_space()
    from nat_plugin_evsys.engine.checkpoint_loading import load_adapter
    from nat_plugin_evsys.engine.checkpoints import read_checkpoint
    from nat_plugin_evsys.engine.model.loading import load_base_model
    from nat_plugin_evsys.runtime.export import export_adapter, export_merged

    if form is None:
        raise click.UsageError("give --merge (the whole model) or --adapter (the adapter alone)")
    path = _checkpoint(output_dir, run, checkpoint)
    info = read_checkpoint(path)
    packed = info.base_identity.get("quantization", "none")
    base = load_base_model(base_model or info.base_model, device=device, dtype=dtype, quantization=packed)
    target = output or path.parent / f"{path.name}-{form}"
    gap = (export_merged if form == "merged" else export_adapter)(base, load_adapter(path, base), target)
    click.echo(f"{target}  (loaded back: logits within {gap:.1e} of the engine's)")


def _checkpoint(output_dir: Path, run: str, which: str | None) -> Path:
    """Raises CheckpointError: there is none here."""
    from nat_plugin_evsys.errors import CheckpointError
    from nat_plugin_evsys.runs.checkpoints import checkpoint_of, is_checkpoint

    if is_checkpoint(Path(run)):
        return Path(run)
    found = find_run(output_dir, run)
    if not found.state.has_trained:
        raise CheckpointError(
            f"run {found.path} has trained nothing (it is {found.state.status}), so there is nothing to export; let "
            "it finish an epoch, or name another run"
        )
    which = which or ("latest" if found.state.best_checkpoint() is None else "best")
    where = checkpoint_of(found, which, "--checkpoint")
    if isinstance(where, str):
        state = next(record.training_state for record in found.state.checkpoints if record.adapter == where)
        raise CheckpointError(
            f"run {found.path} keeps its weights on a service; with its TINKER_BASE_URL and TINKER_API_KEY set, "
            f"`tinker checkpoint download {state or where}` makes a directory: export that"
        )
    return where
