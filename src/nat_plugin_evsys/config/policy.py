"""``llms: <name>: {_type: evsys_policy, …}``: the model under training."""

from pathlib import Path
from typing import Literal

from nat.data_models.common import OptionalSecretStr
from nat.data_models.llm import LLMBaseConfig
from pydantic import Field, SecretStr, field_validator, model_validator

from nat_plugin_evsys.config.quantization import QUANTIZATION, Quantization
from nat_plugin_evsys.config.ray import RayConfig
from nat_plugin_evsys.config.strict import StrictConfig
from nat_plugin_evsys.config.urls import server_url
from nat_plugin_evsys.config.vllm import VllmConfig
from nat_plugin_evsys.runtime import defaults

DEFAULT_OUTPUT_DIR = Path("./.tmp/nat/finetuning/")
"""NAT's own default of ``finetuning.output_dir``."""

SpecialTokens = Literal["text", "control"]
Reasoning = Literal["split", "content"]
HintMode = Literal["honour", "ignore", "refuse"]

NOT_OVER_A_SERVICE = {
    "lora_alpha": "a Tinker service has 32",
    "device": "the service has its own",
    "dtype": "the service has its own",
    "quantization": "the service has its own",
    "max_batch_size": "the service has its own",
    "ray": "the service has its own replicas: `nat evsys serve --ray`",
    "rollout_engine": "the service samples",
    "vllm": "the service samples",
    "deterministic": "the service computes: `nat evsys serve --deterministic`",
    "trust_remote_code": "the service loads the model",
}
"""Settings of the embedded engine that do not apply to a service, and why; refused unless left at their defaults."""

ONLY_OVER_A_SERVICE = ("api_key_env", "tokenizer")
"""Settings that mean nothing without ``base_url``."""


class EvsysPolicyConfig(StrictConfig, LLMBaseConfig, name="evsys_policy"):
    """The LLM under training: a base model plus a LoRA adapter, served by an OpenAI-compatible endpoint on loopback.

    The workflow and the trainer adapter both refer to it by name. `nat finetune` trains its adapter;
    `nat run`, `nat eval` and `nat serve` on the same YAML serve the checkpoint that `checkpoint` names.
    """

    base_model: str = Field(
        description="Any causal LM that transformers loads, as a Hugging Face id, a local directory or a `.gguf` file; "
        "`builtin/smollm2-135m` (SmolLM2-135M-Instruct, from the package index); or `builtin/tiny` (a toy for tests)."
    )
    base_url: str | None = Field(
        default=None,
        description="Train and sample on the Tinker service at this URL (`nat evsys serve` on another machine, or any "
        "other) instead of in this process; `base_model` is then the service's name for the model.",
    )
    api_key_env: str = Field(
        default="TINKER_API_KEY",
        description="Environment variable that holds the service's key; not needed if base_url is on loopback.",
    )
    tokenizer: str | None = Field(
        default=None,
        description="With base_url: local directory or Hugging Face id of the model's tokenizer, needed if the "
        "service's model name does not lead to one on this machine.",
    )
    output_dir: Path = Field(
        default=DEFAULT_OUTPUT_DIR,
        description="Directory of the runs, where `checkpoint: latest` looks; must equal `finetuning.output_dir`.",
    )
    checkpoint: str = Field(
        default="latest",
        description="What `nat run`, `nat eval` and `nat serve` serve: `none` (the base model), `latest` or `best` (of "
        "the newest run in output_dir with a trained epoch), or the path of a checkpoint or of a LoRA adapter that "
        "PEFT wrote (with base_url: a tinker:// path). `best` has the highest held-out reward; without a "
        "`validation_dataset`, it is the reward of the rollouts that a checkpoint made, which the last one has not "
        "(and none has with `rows_per_epoch`, which gives each other rows). `nat finetune` starts a new adapter unless "
        "this is a path.",
    )
    lora_rank: int = Field(default=defaults.RANK, ge=1, description="Rank of the LoRA adapter.")
    lora_alpha: float = Field(
        default=defaults.ALPHA, gt=0, description="LoRA scale numerator: the update is alpha/rank * B A x."
    )
    train_attn: bool = Field(default=defaults.TRAIN_ATTN, description="Put LoRA on the attention projections.")
    train_mlp: bool = Field(default=defaults.TRAIN_MLP, description="Put LoRA on the MLP projections.")
    train_unembed: bool = Field(default=defaults.TRAIN_UNEMBED, description="Put LoRA on the unembedding (lm_head).")
    temperature: float = Field(
        default=1.0,
        ge=0.0,
        description="Sampling temperature of the rollouts that train this policy, unless the request sets one. The "
        "learner uses the temperature of each call, so ratios start at 1.",
    )
    eval_temperature: float = Field(
        default=0.0,
        ge=0.0,
        description="Sampling temperature of everything else (validation, run, eval, serve, and rollouts that train "
        "other policies only); 0 is greedy.",
    )
    top_p: float = Field(
        default=1.0,
        gt=0.0,
        le=1.0,
        description="Nucleus sampling mass. `nat finetune` refuses less than 1: such calls cannot be trained on.",
    )
    max_tokens: int = Field(default=512, ge=1, description="Token limit of a reply, unless the request sets one.")
    context_length: int | None = Field(
        default=None, ge=1, description="Limit of prompt + sampled tokens; default is the model's own limit."
    )
    seed: int = Field(
        default=0,
        description="Seed of the adapter's initialisation, of all sampling in a `nat finetune` that trains this "
        "policy, and of the order in which `rows_per_epoch` takes the rows. The other seeds of a run are the "
        "adapter's `shuffle_seed`, `warm_start.seed` and the trainer's `seed`.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="`auto`: CUDA when present, else CPU.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="`auto`: bfloat16 on CUDA, float32 on CPU."
    )
    quantization: Quantization = Field(default="none", description=QUANTIZATION)
    max_batch_size: int = Field(
        default=defaults.MAX_BATCH_SIZE, ge=1, description="Largest sampling batch, in sequences."
    )
    deterministic: bool = Field(
        default=False,
        description="The same run gives the same weights, bit for bit, also if it was killed and resumed: every "
        "sequence is sampled alone, and the process computes on one thread. Slower; see training.md.",
    )
    ray: RayConfig | None = Field(
        default=None,
        description="Train and sample on several devices: `{replicas: N}` copies of the base model on a Ray cluster, "
        "which is started on this machine unless `address` names one. Needs `nat_plugin_evsys[ray]`; see scaling.md.",
    )
    rollout_engine: Literal["embedded", "vllm"] = Field(
        default="embedded",
        description="What samples during a `nat finetune` that trains this policy: the engine in this process (or its "
        "replicas), or a vLLM server that gets each policy version's adapter. All else is sampled embedded, unless "
        "`ray` has `gpus_per_replica` above 1.",
    )
    vllm: VllmConfig | None = Field(
        default=None,
        description="With rollout_engine: vllm, the server: `{command: /opt/vllm/bin/vllm}` starts one, "
        "`{base_url: …}` uses one; see scaling.md.",
    )
    chat_template: Path | None = Field(
        default=None, description="A Jinja chat template file that replaces the tokenizer's own."
    )
    enable_thinking: bool | None = Field(
        default=None, description="Passed to the chat template as `enable_thinking` (Qwen3 and kin) when set."
    )
    reasoning: Reasoning = Field(
        default="split",
        description="What becomes of `<think>` blocks in a reply, if the chat template knows them: `split` puts them "
        "into the message's `reasoning_content`, as vLLM's parsers do; `content` leaves them in the content.",
    )
    special_tokens: SpecialTokens = Field(
        default="text",
        description="What becomes of a special token's text within a message (`<|im_end|>` would end the turn): `text` "
        "writes it in ordinary tokens, `control` lets it be the special token.",
    )
    hints: HintMode = Field(
        default="honour",
        description="What becomes of requests that ask for a form of the reply (`tool_choice: required` or a name, "
        "`parallel_tool_calls: false`, `strict: true`, `response_format`): `honour` samples only what has that form "
        "(over a service, which cannot, freely); `ignore` samples freely, and says so once; `refuse` answers 400.",
    )
    host: str = Field(default="127.0.0.1", description="Address that the policy endpoint listens on.")
    port: int = Field(default=0, ge=0, le=65535, description="Port of the policy endpoint; 0 takes a free one.")
    api_key: OptionalSecretStr = Field(
        default=None,
        description="Key of the policy endpoint (not of the service: that is `api_key_env`), for an agent that is "
        "configured ahead of time; take it from the environment: `${POLICY_KEY}`. Default is a new one each time.",
    )
    request_timeout: float = Field(default=600.0, gt=0, description="Seconds a client waits for one call.")
    disable_streaming: bool = Field(
        default=True,
        description="Make LangChain agents use plain calls even if they ask for a stream (same tokens, less CPU).",
    )
    trust_remote_code: bool = Field(default=False, description="Let transformers run code shipped with the model.")

    @field_validator("api_key")
    @classmethod
    def _no_empty_key(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not value.get_secret_value().strip():
            raise ValueError("api_key is empty; set the environment variable that it is taken from, or remove api_key")
        return value

    @field_validator("base_url")
    @classmethod
    def _plain_url(cls, value: str | None) -> str | None:
        return server_url("base_url", value)

    @model_validator(mode="after")
    def _something_samples(self) -> "EvsysPolicyConfig":
        if self.rollout_engine == "vllm":
            if self.deterministic:
                raise ValueError("deterministic: vLLM's samples depend on how it batches; use rollout_engine: embedded")
        elif self.ray is not None and (self.ray.gpus_per_replica or 0) > 1:
            raise ValueError(
                f"ray: gpus_per_replica is {self.ray.gpus_per_replica}: a model that is split over GPUs is trained, "
                "not sampled from; set rollout_engine: vllm, or gpus_per_replica: 1"
            )
        elif self.vllm is not None:
            raise ValueError("vllm: without rollout_engine: vllm it has no effect; set that, or remove it")
        return self

    @model_validator(mode="after")
    def _sequences_alone(self) -> "EvsysPolicyConfig":
        if self.deterministic and self.max_batch_size != defaults.MAX_BATCH_SIZE:
            raise ValueError("max_batch_size has no effect with deterministic: true, which samples each sequence alone")
        return self

    @model_validator(mode="after")
    def _settings_reach_the_engine(self) -> "EvsysPolicyConfig":
        changed = {
            name for name, field in type(self).model_fields.items() if getattr(self, name) != field.get_default()
        }
        if self.base_url is None:
            useless = [name for name in ONLY_OVER_A_SERVICE if name in changed]
            if useless:
                raise ValueError(f"{', '.join(useless)}: set without base_url it has no effect; remove it")
            return self
        reasons = dict(NOT_OVER_A_SERVICE)
        if self.checkpoint.startswith("tinker://"):
            reasons |= dict.fromkeys(("train_attn", "train_mlp", "train_unembed"), "the checkpoint has its layers")
        useless = [f"{name} ({why})" for name, why in reasons.items() if name in changed]
        if useless:
            raise ValueError(f"no effect over a service (base_url is set): {', '.join(useless)}; remove it")
        return self
