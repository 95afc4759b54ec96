"""``nat evsys serve``: every setting of the server is one that a user can set."""

from __future__ import annotations

from nat_plugin_evsys.cli.serve import serve_command
from nat_plugin_evsys.config.ray import RayConfig
from nat_plugin_evsys.config.serve import ServeConfig

BY_ENVIRONMENT = {"operator_key"}


def test_every_setting_is_an_option_with_its_default() -> None:
    options = {option.name: option for option in serve_command.params}
    fields = {**ServeConfig.model_fields, **RayConfig.model_fields}
    assert fields.keys() - BY_ENVIRONMENT == options.keys() - {"api_key_file"}
    for name, field in ServeConfig.model_fields.items():
        if name in options and isinstance(field.default, int | float | str) and not isinstance(field.default, bool):
            assert options[name].default == field.default, name
