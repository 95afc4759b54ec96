"""``nat evsys status`` and ``nat evsys scale``: commands about a running server."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from nat_plugin_evsys.cli.options import config_file_option, mapping_of, read_config, readable_errors
from nat_plugin_evsys.cli.serve import OPERATOR_VARIABLE
from nat_plugin_evsys.cli.status_table import status_table
from nat_plugin_evsys.errors import ConfigError

_STATUS_SECONDS = 10.0

_url_option = click.option("--url", help="URL of the server; default: $TINKER_BASE_URL, else http://127.0.0.1:8000.")


@click.command(name="status")
@_url_option
@config_file_option("Ask the server that a policy of this YAML trains on (its base_url).")
@click.option("--api-key", help="Key for the server; default: $TINKER_API_KEY.")
@click.option("--json", "as_json", is_flag=True, help="Print the server's answer as JSON.")
@readable_errors
def status_command(url: str | None, config_file: Path | None, api_key: str | None, as_json: bool) -> None:
    """Show a server's models, queue, memory and speed."""
    variable = "TINKER_API_KEY"
    if config_file is not None:
        if url is not None:
            raise click.UsageError("--config_file names the server; remove --url")
        url, variable = _service_of(config_file)
    answer = _answer("GET", url, "/status", api_key or os.environ.get(variable), timeout=_STATUS_SECONDS)
    click.echo(answer.text if as_json else status_table(answer.json()))


@click.command(name="scale")
@click.argument("replicas", type=click.IntRange(1))
@click.option("--base-model", help="Model to scale, by the name it is served under; default: every model.")
@_url_option
@click.option("--api-key", help=f"Operator's key; default: ${OPERATOR_VARIABLE}. A server without keys needs none.")
def scale_command(replicas: int, base_model: str | None, url: str | None, api_key: str | None) -> None:
    """Have REPLICAS copies of each model on a running `nat evsys serve --ray`.

    Work goes on meanwhile. Returns when new replicas have loaded the model, or when what was being computed on the
    removed ones has ended.
    """
    asked = {"replicas": replicas, "base_model": base_model}
    answer = _answer("POST", url, "/replicas", api_key or os.environ.get(OPERATOR_VARIABLE), timeout=None, json=asked)
    click.echo(status_table(answer.json()))


def _answer(method: str, url: str | None, path: str, key: str | None, **options: Any) -> Any:
    """The server's answer.

    Raises:
        ClickException: there is none, or it is an error.
    """
    import httpx

    url = (url or os.environ.get("TINKER_BASE_URL") or "http://127.0.0.1:8000").rstrip("/")
    try:
        answer = httpx.request(method, f"{url}{path}", headers={"x-api-key": key} if key else {}, **options)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise click.ClickException(f"no answer from {url}: {error}; is `nat evsys serve` running there?") from error
    if answer.status_code != 200:
        raise click.ClickException(f"{url} answered {answer.status_code}: {answer.text[:500]}")
    return answer


def _service_of(config_file: Path) -> tuple[str, str]:
    """The URL of the server that a policy of the YAML trains on, and the environment variable that holds its key."""
    llms = mapping_of(config_file, read_config(config_file), "llms")
    for llm in (mapping_of(config_file, llms, name) for name in llms):
        if llm.get("_type") == "evsys_policy" and llm.get("base_url"):
            return str(llm["base_url"]), str(llm.get("api_key_env") or "TINKER_API_KEY")
    raise ConfigError(
        f"--config_file {config_file.absolute()}: no evsys_policy has a base_url: the policy trains in the process "
        "of `nat finetune`, and there is no server to ask; `nat evsys runs --config_file …` shows its runs"
    )
