"""Imports what ``nat finetune`` and ``nat evsys serve`` import, plugins included; see ``warm_process``."""

import importlib
import pkgutil
import warnings

import nat_plugin_evsys

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import langchain_openai  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import nat.cli.entrypoint
    import nat.cli.main  # noqa: F401
    import openai.resources.chat  # noqa: F401
    import tinker  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401
    from nat.runtime.loader import PluginTypes, discover_and_register_plugins

    discover_and_register_plugins(PluginTypes.ALL)
    for module in pkgutil.walk_packages(nat_plugin_evsys.__path__, "nat_plugin_evsys."):
        importlib.import_module(module.name)
