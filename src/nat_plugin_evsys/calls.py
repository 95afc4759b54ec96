"""Types that several rooms share. Standard library only.

A *call* is one LLM request with its exact tokens. Everything that is trained on comes from calls; text is never
tokenised again.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, Literal

from nat_plugin_evsys.call_images import CallImage

StopReason = Literal["stop", "length"]
"""``stop``: a stop token or stop string ended the sequence. ``length``: max_tokens or the context did, or the client
stopped reading the stream."""

RunKind = Literal["rollout", "evaluation"]
"""``rollout`` calls may be trained on; ``evaluation`` calls (validation) never are."""

RUN_ID_HEADER = "x-evsys-run-id"
STEP_ID_HEADER = "x-evsys-step-id"
FUNCTIONS_HEADER = "x-evsys-functions"


class PromptHistory(StrEnum):
    """How the earlier turns of a conversation came to be in a prompt."""

    NEW = "new"
    """It follows no recorded prompt and reply."""
    EXTENDED = "extended"
    """It starts with the ids of the turn that it follows, as they were read and sampled."""
    CHANGED = "changed"
    """It follows a recorded prompt, but the client sent another reply than the policy's."""
    REWRITTEN = "rewritten"
    """The template writes the turn that it follows in another way now (it drops earlier thoughts, for example)."""


class DropReason(StrEnum):
    """Why a call, or a whole trajectory, is not trained on. ``docs/drop-reasons.md`` says what to do about each."""

    # What happened in the rollouts.
    EVALUATOR_ERROR = "evaluator_error"
    """The evaluator failed, took longer than `evaluator_timeout`, or gave no finite score, so the rollout has no
    reward."""
    INFRASTRUCTURE_ERROR = "infrastructure_error"
    """The policy endpoint failed or could not be reached. That is not the policy's fault, so the rollout has no
    reward."""
    ROLLOUT_TIMEOUT = "rollout_timeout"
    """The rollout took longer than `rollout_timeout` and was cut off."""
    NO_CALLS = "no_calls"
    """The workflow ended without a call to the policy, so there is nothing to train on."""
    PROMPT_TOO_LONG = "prompt_too_long"
    """The prompt and the tokens asked for do not fit the model's context, so the call was refused."""
    REQUEST_REFUSED = "request_refused"
    """The endpoint refused the request, because something in it is wrong."""
    WORKFLOW_ERROR = "workflow_error"
    """The workflow failed before it called the policy, so there is nothing to train on."""
    VALIDATION = "validation"
    """The call was made to measure the policy, not to train it."""
    NOT_TARGETED = "not_targeted"
    """The call was made outside `target_functions`, or of a policy that is not the one under training."""
    UNATTRIBUTED = "unattributed"
    """The call reached the endpoint without the id of an open rollout, so no reward belongs to it."""
    CALL_FAILED = "call_failed"
    """The endpoint could not answer the call."""
    CLIENT_DISCONNECTED = "client_disconnected"
    """The client disconnected before the first token of the answer was sent."""

    # What was recorded elsewhere.
    TEXT_ONLY = "text_only"
    """The trajectory has text and no token ids, and the adapter's `retokenize` is off."""
    UNREADABLE_RECORD = "unreadable_record"
    """The line or entry of a file of traces is no JSON, or no trajectory in a form that NAT writes."""
    UNFINISHED_TRACE = "unfinished_trace"
    """The trace ends before its workflow does."""
    PROMPT_UNKNOWN = "prompt_unknown"
    """The record does not have the messages that the model read."""
    REPLY_UNKNOWN = "reply_unknown"
    """The record does not have what the model said: NAT's steps leave out tool calls that no later call repeats."""
    NOT_RENDERED = "not_rendered"
    """The policy's chat template cannot render the recorded messages, or the logprobs do not fit the text, or are
    missing where `rl` needs them."""
    NO_FEEDBACK = "no_feedback"
    """The record has no feedback, or none that is a number."""
    NOT_SELECTED = "not_selected"
    """The record's reward is below `min_reward`, or outside the `top_share` of the records."""
    NOT_PAIRED = "not_paired"
    """No other record of the same question has another reward, or the call is not the one at which the two part."""

    # What the curriculum holds back.
    CURRICULUM_MIN_REWARD_DIFF = "curriculum_min_reward_diff"
    """The rewards of the group differ by less than the curriculum's `min_reward_diff`."""
    CURRICULUM_PERCENTILE = "curriculum_percentile"
    """The group is outside the share of groups that the curriculum trains on in this epoch."""
    CURRICULUM_SUBSAMPLE = "curriculum_subsample"
    """The curriculum's `random_subsample` left the trajectory out."""

    # What has nothing to teach.
    REPLACED_GROUP = "replaced_group"
    """All attempts at the dataset row had the same reward, so `dynamic_sampling` rolled the row out again instead."""
    ZERO_VARIANCE_GROUP = "zero_variance_group"
    """All trajectories of the dataset row have the same reward, so none is better than another."""
    SINGLE_TRAJECTORY_GROUP = "single_trajectory_group"
    """The dataset row has only one trajectory with a reward, so there is nothing to compare it with."""
    NO_USABLE_CALLS = "no_usable_calls"
    """None of the trajectory's calls can be trained on; each call is counted under its own reason."""
    EMPTY_OUTPUT = "empty_output"
    """The reply has no tokens."""
    EMPTY_PROMPT = "empty_prompt"
    """The prompt has no tokens."""
    NON_FINITE_LOGPROBS = "non_finite_logprobs"
    """A recorded log-probability is NaN or infinite."""
    NOTHING_CHOSEN = "nothing_chosen"
    """A grammar forced every token of the reply, so the policy chose nothing."""
    TRUNCATED = "truncated"
    """The reply was cut off (at `max_tokens`, the context's end, or where the workflow stopped reading a stream), and
    `mask_truncated` leaves such replies out of the loss."""

    # What the training job did not get to.
    MOVED_TOO_FAR = "moved_too_far"
    """The policy had moved further than `target_kl` from the one that sampled the call, so the epoch's steps ended."""
    JOB_FAILED = "job_failed"
    """The training job, or the run, failed before the call was trained on."""
    JOB_CANCELED = "job_canceled"
    """The training job, or the run, was canceled before the call was trained on."""
    NOT_REACHED = "not_reached"
    """The training job completed without training on the call."""


@dataclass(frozen=True, slots=True)
class Call:
    """One recorded LLM request: what the model read, what it sampled, and from which distribution.

    Attributes:
        call_id: the completion id that the client saw (``chatcmpl-…``); with ``n > 1`` one Call per choice.
        index: the choice's index within the completion.
        run_id: NAT's workflow_run_id, or None for a call made outside any workflow run.
        step_id: UUID of NAT's LLM_START step that made the call, or None.
        policy_version: version of the adapter that sampled *all* of ``output_ids``.
        prompt_ids: token ids that the model read, length P.
        output_ids: sampled token ids, length T, including the stop token.
        logprobs: log-probability of each output id under the distribution that was sampled, length T; where a grammar,
            ``min_tokens`` or a ban ruled tokens out, under the policy itself, as it samples without them.
        stop_reason: why sampling ended.
        temperature, top_p, top_k: the sampling parameters; top_k -1 is off.
        shaped: what else gave another distribution than the learner's, such as ``min_p``; it rules training out.
        messages: the request's messages in OpenAI form; the URL of an image is ``sha256:…``.
        tools: the request's tools in OpenAI form.
        reply: the assistant message that was returned, in OpenAI form.
        sequence: arrival order within the recorder.
        functions: names of NAT's functions in which the call was made, the outermost first.
        history: how the prompt holds the turn before it.
        constrained: whether a grammar decided which tokens could be sampled.
        forced: positions in ``output_ids`` at which the grammar left one choice; they carry no loss.
        retokenized: ``output_ids`` are those of the reply's text, which may have been sampled in other tokens.
        logprobs_unknown: ``logprobs`` are zeros that mean nothing, as of every reply that is retokenized.
        malformed_calls: what the reply has that looked like a tool call, could not be read as one, and is content.
        images: what placeholders among ``prompt_ids`` stand for, in their order.
    """

    call_id: str
    index: int
    run_id: str | None
    step_id: str | None
    policy_version: int
    prompt_ids: list[int]
    output_ids: list[int]
    logprobs: list[float]
    stop_reason: StopReason
    temperature: float
    top_p: float
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    reply: dict[str, Any]
    sequence: int
    top_k: int = -1
    functions: list[str] = field(default_factory=list)
    history: PromptHistory = PromptHistory.NEW
    constrained: bool = False
    forced: list[int] = field(default_factory=list)
    retokenized: bool = False
    logprobs_unknown: bool = False
    malformed_calls: int = 0
    shaped: dict[str, Any] = field(default_factory=dict)
    images: list[CallImage] = field(default_factory=list)

    @property
    def key(self) -> CallKey:
        """Identifies the call; the id alone does not, since all choices of one completion share it."""
        return self.call_id, self.index

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict of the same lists; ``Call(**d)`` gives the call back."""
        return {each.name: getattr(self, each.name) for each in fields(self)}


CallKey = tuple[str, int]
"""``(call_id, index)``: identifies one call."""


@dataclass(frozen=True, slots=True)
class CallFate:
    """What training did with one call.

    Attributes:
        dropped: why it was not trained on, or None when it was.
        advantage: that of each of its sampled tokens, or None where none was computed.
        learner_logprobs: log-probability of each output id under the learner, at the start of the last optimizer step
            that trained on it, length T, with None at those that a grammar forced (they carry no loss); None where that
            was not computed.
    """

    dropped: DropReason | None = None
    advantage: float | None = None
    learner_logprobs: list[float | None] | None = None


@dataclass(slots=True)
class CallTally:
    """Counts of calls: ``calls == trained + sum(dropped.values())`` once an epoch is done."""

    calls: int = 0
    trained: int = 0
    dropped: Counter[DropReason] = field(default_factory=Counter)

    def add(self, other: CallTally) -> None:
        """Add another tally to this one, in place."""
        self.calls += other.calls
        self.trained += other.trained
        self.dropped.update(other.dropped)

    def drop(self, reason: DropReason, calls: int) -> None:
        """Count calls that will not be trained on."""
        if calls:
            self.dropped[reason] += calls
