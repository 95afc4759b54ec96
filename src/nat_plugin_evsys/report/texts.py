"""One-line progress texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nat.data_models.finetuning import TrainingJobStatus


def phase_text(name: str, detail: str) -> str:
    """``rollouts, epoch 2/4``."""
    return f"{name}, {detail}" if detail else name


def steps_text(done: int, total: int, note: str) -> str:
    """``step 3/40, loss 1.234``."""
    return f"step {done}/{total}" + (f", {note}" if note else "")


def job_text(status: TrainingJobStatus) -> str:
    """``training 40%, step 2/5, loss -0.1234, 950 tokens/s``, as far as the status has these."""
    known = status.metadata or {}
    parts = [str(known["phase"])] if known.get("phase") else [status.status.value]
    if status.progress is not None:
        parts[0] += f" {status.progress:.0f}%"
    if known.get("steps") is not None:
        parts.append(f"step {known.get('step', 0)}/{known['steps']}")
    if known.get("loss") is not None:
        parts.append(f"loss {known['loss']:.4f}")
    if known.get("tokens_per_second") is not None:
        parts.append(f"{known['tokens_per_second']:.0f} tokens/s")
    if status.status == "failed" and status.message:
        parts.append(status.message)
    return ", ".join(parts)


def epoch_text(epoch: int, epochs: int, row: Mapping[str, Any]) -> str:
    """``epoch 2/4 done: sampled reward 0.500 (0.000 to 1.000), loss …, 48 calls trained, 16 dropped, learning rate
    0.0005, KL 0.013, 12.3 s``. The KL is how far the epoch's steps moved the policy (``kl_moved``), in nats a token.

    What the row lacks is looked up in its ``job``, the metadata of the training job's last status. A run that trains
    several policies says whose row it is.
    """
    facts = {**(row.get("job") or {}), **row}
    parts = []
    if facts.get("reward_mean") is not None:
        spread = ""
        if facts.get("reward_min") is not None and facts.get("reward_max") is not None:
            spread = f" ({facts['reward_min']:.3f} to {facts['reward_max']:.3f})"
        parts.append(f"sampled reward {facts['reward_mean']:.3f}{spread}")
    if facts.get("loss") is not None:
        parts.append(f"loss {facts['loss']:.4f}")
    if facts.get("trained") is not None:
        parts.append(f"{facts['trained']} calls trained")
    if facts.get("dropped"):
        parts.append(f"{sum(facts['dropped'].values())} dropped")
    metrics = facts.get("metrics") or {}
    if facts.get("trained") and "learning_rate" in metrics:
        parts.append(f"learning rate {metrics['learning_rate']:.3g}")
    if facts.get("trained") and "kl_moved" in metrics:
        parts.append(f"KL {metrics['kl_moved']:.2g}")
    seconds = [facts[name] for name in ("rollout_seconds", "training_seconds") if facts.get(name) is not None]
    if seconds:
        parts.append(f"{sum(seconds):.1f} s")
    name = f" for {row['policy']}" if "policy" in row else ""
    return f"epoch {epoch}/{epochs} done{name}" + (f": {', '.join(parts)}" if parts else "")


def validation_text(epoch: int, reward: float, when: str | None = None, policy: str | None = None) -> str:
    """``held-out reward 0.625 after 2 epochs``, behind the policy's name if there are several."""
    if when is None:
        when = "before training" if epoch == 0 else f"after {epoch} epoch{'' if epoch == 1 else 's'}"
    return f"{'' if policy is None else f'{policy}: '}held-out reward {reward:.3f} {when}"
