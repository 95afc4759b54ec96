"""The sampling parameters that this package's backends take: Tinker's and its extensions."""

from nat_plugin_evsys.runtime.extensions import SamplingParams as SamplingParams
