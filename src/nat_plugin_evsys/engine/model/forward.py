"""The plain forward pass, which the fast one is tested against.

Right-padded batches go through the decoder, then through the output head in chunks of rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from nat_plugin_evsys.engine.model.long_rope import sequence_lengths
from nat_plugin_evsys.engine.model.lora import LoraAdapter, applied
from nat_plugin_evsys.engine.model.targets import text_decoder
from nat_plugin_evsys.errors import ModelError

CHUNK_ELEMENTS = 2**24
"""Logits alive at a time: 64 MiB in fp32."""


class OutputHead:
    """``hidden [R, H] -> logits [R, V]`` in fp32, with what the model does after its ``lm_head``.

    Attributes:
        name: the module name of the linear layer.
        linear: the layer itself.
        scale, softcap: ``softcap * tanh(scale * linear(hidden) / softcap)``; ``softcap`` None means no cap.

    Raises:
        ModelError: the model post-processes its logits in an unknown way (checked on a probe).
    """

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config.get_text_config()
        self.linear = model.get_output_embeddings()
        self.name = next(name for name, module in model.named_modules() if module is self.linear)
        self.scale = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere
        self.scale /= float(getattr(config, "logits_scaling", None) or 1.0)  # Granite
        self.softcap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
        self._check(model)

    @property
    def is_linear(self) -> bool:
        """Whether the logits are a fixed matrix times the hidden state."""
        return self.softcap is None and self.linear.bias is None

    def __call__(self, hidden: Tensor, temperature: Tensor | None = None) -> Tensor:
        """``temperature`` (R,) in fp32 divides the logits of each row, as the sampler does it; None means 1."""
        logits: Tensor = self.linear(hidden)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        logits = logits.float()
        return logits if temperature is None else logits / temperature[:, None]

    def _check(self, model: PreTrainedModel) -> None:
        ids = torch.arange(3, device=self.linear.weight.device)[None]
        with torch.no_grad(), applied(None):
            expected = model(input_ids=ids, use_cache=False).logits.float()
            found = self(text_decoder(model)(input_ids=ids, use_cache=False).last_hidden_state)
        if not torch.allclose(expected, found, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
            raise ModelError(
                f"{type(model).__name__} changes its logits after the output head in a way this engine does not know; "
                "choose another model family"
            )


def hidden_rows(model: PreTrainedModel, sequences: Sequence[Tensor], device: torch.device) -> Tensor:
    """Last hidden states of all tokens of all sequences, concatenated: [sum of lengths, H].

    Sequences are padded on the right, so that causal attention alone keeps the padding out and no mask is needed.
    """
    lengths = torch.tensor([len(s) for s in sequences])
    ids = torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True).to(device)
    with sequence_lengths(lengths):
        hidden: Tensor = text_decoder(model)(input_ids=ids, use_cache=False).last_hidden_state
    real = torch.arange(ids.shape[1])[None, :] < lengths[:, None]
    return hidden.reshape(-1, hidden.shape[-1])[real.reshape(-1).nonzero().squeeze(1).to(device)]


def target_logprobs(
    head: OutputHead,
    adapter: LoraAdapter | None,
    hidden: Tensor,
    targets: Tensor,
    gradient: Tensor,
    temperature: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the targets, and the entropy of each row's distribution.

    Args:
        head: the output head.
        adapter: the adapter that the head runs with.
        hidden: [R, H].
        targets: [R, K] token ids.
        gradient: [R] bool; logprobs of the other rows are constants.
        temperature: [R] fp32 that divides the logits of each row; None means 1.

    Returns:
        ``(logprobs [R, K] fp32, entropy [R] fp32 without gradient, in nats)``. At most 2**24 logits live at a time:
        with gradient, each chunk of rows is computed again in the backward pass.
    """
    logprobs = hidden.new_zeros(targets.shape, dtype=torch.float32)
    entropy = hidden.new_zeros(len(targets), dtype=torch.float32)
    for rows, with_grad in ((~gradient, False), (gradient, torch.is_grad_enabled())):
        for index in rows.nonzero().squeeze(1).split(max(1, CHUNK_ELEMENTS // head.linear.weight.shape[0])):
            part, part_targets = hidden[index], targets[index]
            divisor = None if temperature is None else temperature[index]
            if with_grad:
                lp, h = checkpoint(
                    _chunk, head, adapter, part, part_targets, divisor, use_reentrant=False, preserve_rng_state=False
                )
            else:
                with torch.no_grad():
                    lp, h = _chunk(head, adapter, part, part_targets, divisor)
            logprobs = logprobs.index_copy(0, index, lp)
            entropy[index] = h
    return logprobs, entropy


def _chunk(
    head: OutputHead, adapter: LoraAdapter | None, hidden: Tensor, targets: Tensor, temperature: Tensor | None
) -> tuple[Tensor, Tensor]:
    # The backward pass runs this again, on a GPU in a thread of autograd's own: so the adapter is set here.
    with applied(adapter):
        logits = head(hidden, temperature)
    normaliser = torch.logsumexp(logits, dim=-1, keepdim=True)
    logprobs = logits.gather(1, targets) - normaliser
    with torch.no_grad():
        all_logprobs = logits - normaliser
        entropy = -(all_logprobs.exp() * all_logprobs).sum(dim=-1)
    return logprobs, entropy


def share_of_norm(found: Tensor, expected: Tensor) -> float:
    """Distance of two tensors of one shape, as a share of the norm of ``expected``; in float32."""
    return float((found.float() - expected.float()).norm() / expected.float().norm())
