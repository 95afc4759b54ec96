"""``policy_endpoint()``: how any OpenAI-compatible client reaches the policy."""

from __future__ import annotations

from dataclasses import dataclass, field

from nat_plugin_evsys.calls import FUNCTIONS_HEADER
from nat_plugin_evsys.errors import ConfigError
from nat_plugin_evsys.policy.attribution import attribution_headers
from nat_plugin_evsys.policy.policy import Policy


@dataclass(frozen=True, slots=True)
class PolicyAddress:
    """What an OpenAI-compatible client needs to reach a policy.

    Attributes:
        base_url: ``http://HOST:PORT/…/v1``. Read inside a rollout it carries the rollout, so that calls by it belong to
            this rollout from any thread, process or language.
        api_key: the endpoint's key.
        model: the name to ask for.
        headers: carry the rollout too, for a client that is made once and calls by the plain URL.
    """

    base_url: str
    api_key: str = field(repr=False)
    model: str
    headers: dict[str, str]


def policy_endpoint(name: str | None = None) -> PolicyAddress:
    """Where the policy answers, for a client of your own; the endpoint is started where it does not run yet.

    Args:
        name: what ``llms:`` calls the policy; may be left out where there is one only.

    Raises:
        ConfigError: there is no such policy in this process, or several and no name.
        CheckpointError: a command that serves would find no checkpoint.
    """
    policies = Policy.all()
    found = policies if name is None else [policy for policy in policies if policy.answers_to(name)]
    if len(found) == 1:
        policy = found[0]
        policy.check_servable()
        headers = attribution_headers()
        url = policy.endpoint.url_of(policy.open_run(headers), headers.get(FUNCTIONS_HEADER))
        return PolicyAddress(url, policy.endpoint.api_key, policy.config.base_model, headers)
    if not policies:
        raise ConfigError(
            "policy_endpoint(): this process has no evsys_policy LLM; call it inside a workflow whose YAML has one "
            "under `llms:`, started with `nat finetune`, `nat run`, `nat eval` or `nat serve`"
        )
    if name is None:
        raise ConfigError(f'policy_endpoint(): there are {len(policies)} policies; name one: policy_endpoint("…")')
    if found:
        raise ConfigError(f"policy_endpoint({name!r}): {len(found)} policies answer to it; give the name in `llms:`")
    raise ConfigError(f"policy_endpoint({name!r}): `llms:` has no evsys_policy of that name")
