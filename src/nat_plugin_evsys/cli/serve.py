"""``nat evsys serve``."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from nat_plugin_evsys.address_space import require_address_space
from nat_plugin_evsys.config.quantization import Quantization
from nat_plugin_evsys.errors import ConfigError, EvsysError
from nat_plugin_evsys.files import others_may_read

if TYPE_CHECKING:
    from nat_plugin_evsys.config.serve import ServeConfig

KEYS_VARIABLE = "EVSYS_API_KEYS"
OPERATOR_VARIABLE = "EVSYS_OPERATOR_KEY"


@click.command(name="serve")
@click.option(
    "--base-model",
    "base_models",
    multiple=True,
    required=True,
    help="Model to serve: a Hugging Face id, a local directory or .gguf file, or builtin/…. Repeatable.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; off loopback needs a key.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="Port to listen on; 0 takes a free one.",
)
@click.option(
    "--public-url", help="Where clients reach the server behind a reverse proxy; download URLs start with it."
)
@click.option(
    "--store",
    type=click.Path(file_okay=False, path_type=Path),
    help="Directory of sessions, results and checkpoints; default: $EVSYS_HOME/service, else ./.evsys/service.",
)
@click.option(
    "--api-key",
    "api_keys",
    multiple=True,
    help=f"Key of one user, tml-…. Repeatable. Other users can see it: prefer {KEYS_VARIABLE} or a file.",
)
@click.option(
    "--api-key-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="File with one key per line; # starts a comment.",
)
@click.option(
    "--policy", "policies", multiple=True, metavar="NAME=PATH", help="Serve a tinker:// path under a name. Repeatable."
)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16"]), default="auto", show_default=True)
@click.option(
    "--quantization",
    type=click.Choice(get_args(Quantization)),
    default="none",
    show_default=True,
    help="Pack the frozen layers with bitsandbytes at load.",
)
@click.option("--context-length", type=int, help="Limit of tokens in a sequence; default: the model's own.")
@click.option("--max-batch-size", type=int, default=64, show_default=True, help="Largest sampling batch, in sequences.")
@click.option("--deterministic", is_flag=True, help="The same operations give the same bits; slower.")
@click.option("--cache-dir", type=click.Path(file_okay=False, path_type=Path), help="Where builtin models are kept.")
@click.option("--trust-remote-code", is_flag=True, help="Let transformers run code shipped with the model.")
@click.option("--ray", is_flag=True, help="Compute on replicas of each model on a Ray cluster (docs/scaling.md).")
@click.option("--replicas", type=click.IntRange(1), help="With --ray: copies of each model.")
@click.option("--gpus-per-replica", type=int, help="With --ray: 0 or 1; default: 1 if the cluster has GPUs.")
@click.option("--cpus-per-replica", type=click.IntRange(1), help="With --ray: cores and threads of each; default: 1.")
@click.option("--address", help="With --ray: a running cluster, HOST:PORT; default: a new one on this machine.")
@click.option("--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option(
    "--session-timeout", type=float, default=1800.0, show_default=True, help="Seconds idle before a session is parked."
)
@click.option(
    "--session-ttl", type=float, default=7 * 86400.0, show_default=True, help="Seconds idle before it is forgotten."
)
@click.option(
    "--housekeeping-seconds",
    type=float,
    default=15.0,
    show_default=True,
    help="Seconds between checks for idle sessions.",
)
@click.option(
    "--model-memory-mib",
    type=click.IntRange(1),
    help="Memory for models in training; beyond it the least recent are parked. Default: half of what is free.",
)
@click.option(
    "--max-queued-per-owner", type=int, default=4096, show_default=True, help="Most unfinished operations per key."
)
@click.option("--max-queued", type=int, default=16384, show_default=True, help="Most unfinished operations overall.")
@click.option(
    "--max-queued-bytes-per-owner", type=int, default=4 << 30, show_default=True, help="Most bytes of them per key."
)
@click.option(
    "--max-request-bytes", type=int, default=64 << 20, show_default=True, help="Largest request body, as it is sent."
)
@click.option(
    "--max-decompressed-bytes", type=int, default=128 << 20, show_default=True, help="Largest one decompressed."
)
@click.option(
    "--shutdown-seconds", type=float, default=30.0, show_default=True, help="Seconds to park work at shutdown."
)
@click.option(
    "--poll-seconds", type=float, default=25.0, show_default=True, help="Longest that a client's poll is held."
)
@click.option("--retain-operations", is_flag=True, help="Keep every operation's payload, to replay the log.")
def serve_command(
    api_keys: tuple[str, ...], api_key_file: Path | None, policies: tuple[str, ...], store: Path | None, **settings: Any
) -> None:
    """Train and sample over HTTP: the Tinker protocol for the tinker SDK, and OpenAI's chat completions.

    The key in $EVSYS_OPERATOR_KEY is one more, and the only one that may `nat evsys scale`.
    """
    try:
        settings["api_keys"] = [*api_keys, *_keys_of_environment(), *_keys_of_file(api_key_file)]
        settings["operator_key"] = os.environ.get(OPERATOR_VARIABLE) or None
        settings["policies"] = dict(_named(policy) for policy in policies)
        settings["ray"] = _ray(settings)
        config = _config({**settings, **({} if store is None else {"store": store})})
        require_address_space()
        from nat_plugin_evsys.service.http.server import serve

        serve(config, _announce)
    except EvsysError as error:
        raise click.ClickException(str(error)) from error


def _announce(line: str) -> None:
    print(line, flush=True)  # whoever started the server may wait for the line in a pipe


def _keys_of_environment() -> list[str]:
    return os.environ.get(KEYS_VARIABLE, "").replace(",", " ").split()


def _keys_of_file(path: Path | None) -> Iterable[str]:
    if path is None:
        return []
    try:
        lines = [line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"--api-key-file {path} cannot be read: {error}") from error
    if others_may_read(path):
        click.echo(f"warning: other users of this machine can read the keys; type: chmod go= {path}", err=True)
    keys = [line for line in lines if line]
    if not keys:
        raise ConfigError(f"--api-key-file {path} has no key in it; write one tml-… key a line")
    return keys


def _ray(settings: dict[str, Any]) -> dict[str, Any] | None:
    """Take the options that are about replicas out of ``settings``."""
    wanted = settings.pop("ray")
    names = ("replicas", "gpus_per_replica", "cpus_per_replica", "address")
    given = {name: value for name in names if (value := settings.pop(name)) is not None}
    if not wanted and given:
        raise ConfigError(f"--{min(given).replace('_', '-')} has no effect without --ray; add it")
    if wanted and "replicas" not in given:
        raise ConfigError("--ray needs --replicas N, the number of copies of each model")
    return given if wanted else None


def _named(policy: str) -> tuple[str, str]:
    name, separator, path = policy.partition("=")
    if not separator or not name or not path.startswith("tinker://"):
        raise ConfigError(f"--policy must be NAME=tinker://…, got {policy!r}")
    return name, path


def _config(settings: dict[str, Any]) -> ServeConfig:
    from pydantic import ValidationError

    from nat_plugin_evsys.config.serve import ServeConfig

    try:
        return ServeConfig(**{**settings, "base_models": list(settings["base_models"])})
    except ValidationError as error:
        # Without the input: it may be a key.
        lines = error.errors(include_url=False, include_context=False, include_input=False)
        raise ConfigError("; ".join(_problem(line) for line in lines)) from error


def _problem(line: Any) -> str:
    """One of pydantic's errors, with the name of the option that it is about."""
    message = line["msg"].removeprefix("Value error, ")
    return f"{line['loc'][0]}: {message}" if line["loc"] else message
