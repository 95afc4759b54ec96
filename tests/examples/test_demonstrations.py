"""The demonstrations are, message for message and token for token, what NAT's agents send."""

import json
from pathlib import Path

import pytest
import yaml
from nat.runtime.loader import load_workflow
from openai_listener import Listener

from nat_plugin_evsys.engine.model.loading import load_tokenizer
from nat_plugin_evsys.policy.chat import ChatRenderer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def renderer() -> ChatRenderer:
    return ChatRenderer(load_tokenizer("builtin/tiny"))


@pytest.mark.parametrize(
    ("config", "file", "replies"),
    [
        ("quickstart.yml", "quickstart_demonstrations.json", 1),
        ("helpdesk_tools.yml", "demonstrations.json", 2),
        ("react.yml", "react_demonstrations.json", 2),
    ],
)
async def test_demonstrations_are_what_the_agent_sends(
    config: str, file: str, replies: int, listener: Listener, renderer: ChatRenderer, tmp_path: Path
) -> None:
    settings = yaml.safe_load((ROOT / "configs" / config).read_text(encoding="utf-8"))
    trainer = settings["trainers"]["trainer"]
    assert trainer["warm_start"]["demonstrations"] == f"examples/helpdesk/data/{file}"
    shown = json.loads((ROOT / trainer["warm_start"]["demonstrations"]).read_text(encoding="utf-8"))[0]
    listener.replies = [message for message in shown["messages"] if message["role"] == "assistant"]

    agent = {
        "llms": {"policy": listener.llm()},
        "functions": settings.get("functions", {}),
        "workflow": settings["workflow"],
    }
    (tmp_path / "agent.yml").write_text(yaml.safe_dump(agent))
    question = next(message["content"] for message in shown["messages"] if message["role"] == "user")
    question = question.rsplit("Question: ", 1)[-1].strip()
    async with load_workflow(str(tmp_path / "agent.yml")) as workflow, workflow.run(question) as runner:
        result = await runner.result(to_type=str)

    positions = [at for at, message in enumerate(shown["messages"]) if message["role"] == "assistant"]
    assert len(listener.requests) == len(positions) == replies
    assert shown["messages"][-1]["content"].endswith(result)
    for request, at in zip(listener.requests, positions, strict=True):
        assert request.get("tools") == shown.get("tools")
        assert renderer.render(request["messages"], request.get("tools")) == renderer.render(
            shown["messages"][:at], shown.get("tools")
        )


@pytest.mark.parametrize(
    "config", ["quickstart.yml", "tiny.yml", "helpdesk_tools.yml", "react.yml", "qwen3-0.6b.yml", "interview.yml"]
)
def test_a_config_names_files_that_exist_and_one_output_directory(config: str) -> None:
    settings = yaml.safe_load((ROOT / "configs" / config).read_text(encoding="utf-8"))
    assert settings["llms"]["policy"]["output_dir"] == settings["finetuning"]["output_dir"]
    trainer = settings["trainers"]["trainer"]
    files = [settings["eval"]["general"]["dataset"]["file_path"], trainer["validation_dataset"]]
    files += [trainer["warm_start"]["demonstrations"]] if "warm_start" in trainer else []
    assert [file for file in files if not (ROOT / file).is_file()] == []
