"""Proof, before training, that a model that is to predict the next token does not see it."""

import torch
import torch.distributed as dist

from sharding.engine import Batch, Engine
from sharding.precision import compute_dtype
from sharding.ranks.errors import UserError
from sharding.ranks.process_group import Ranks
from trainer.architectures.config import build_model_config
from trainer.config import RunConfig
from trainer.data.facts import SampleFacts
from trainer.tasks.causal_lm import PROBED_POSITION

# What later tokens may change as a share of what earlier ones change: about 1 in a model that sees both, and not 0 with
# experts, which see tokens in other groups where later ones differ and round otherwise.
_TOLERANCE = {torch.float32: 1e-3}
_TOLERANCE_OF_16_BITS = 0.1


def check_causality(engine: Engine, config: RunConfig, facts: SampleFacts, ranks: Ranks) -> None:
    """Change the second half of a sequence and see that the logits of the token before it stay as they are.

    Encoders are built as language models by `transformers` without a word, and learn to copy the next token from their
    input. What a class attends to is nowhere declared; so the very model that will be trained is asked, under its
    engine, in evaluation, on sequences of the run's own shape. Every rank must call it.

    Args:
        engine: holds the model, whose task predicts next tokens.
        config: the run.
        facts: of the samples.
        ranks: this rank's place.

    Raises:
        UserError: the logits changed.
    """
    if config.precision.compute == "fp8" and config.precision.fp8_recipe == "tensorwise":
        # One scale for all tokens: later ones change the rounding of earlier ones in any model.
        return
    rows, length = config.batch.micro_size, config.data.sequence_length
    vocab_size = facts.vocab_size or 0
    if length < 2 or vocab_size < 2:
        return
    border = length // 2
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab_size, (rows, length), generator=generator)
    others = (tokens + torch.randint(1, vocab_size, (rows, length), generator=generator)) % vocab_size
    columns = torch.arange(length).expand(rows, -1)

    def logits(input_ids: torch.Tensor) -> torch.Tensor:
        batch: Batch = {"input_ids": input_ids, "labels": input_ids, PROBED_POSITION: torch.tensor(border - 1)}
        if config.data.document_mask:
            batch["position_ids"] = columns.contiguous()
        (found,) = engine.evaluate([batch])
        return found.double().cpu()

    unchanged = logits(tokens)
    by_later = _largest_difference(unchanged, logits(torch.where(columns < border, tokens, others)), ranks)
    if by_later == 0:
        return
    by_earlier = _largest_difference(unchanged, logits(torch.where(columns < border - 1, others, tokens)), ranks)
    tolerance = _TOLERANCE.get(compute_dtype(config.precision, ranks.device), _TOLERANCE_OF_16_BITS)
    # Where no token is earlier, a causal model's logits are a function of one token.
    if by_later > tolerance * (by_earlier if border > 1 else float(unchanged.abs().max())):
        raise UserError(
            f"{config.model.name} sees the tokens that it is to predict: with the "
            f"tokens from {border} on changed, the logits of token {border - 1} change by {by_later:.2g}, and by "
            f"{by_earlier:.2g} with those before it; {_remedy(config, facts)}."
        )


def _largest_difference(one: torch.Tensor, other: torch.Tensor, ranks: Ranks) -> float:
    """The same on every rank, so that all of them go on alike."""
    largest = (one - other).abs().max()
    if ranks.world_size > 1:
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    return float(largest)


def _remedy(config: RunConfig, facts: SampleFacts) -> str:
    elsewhere = "choose a causal architecture (llama, gpt2, say), or task.name=masked-lm for an encoder"
    if config.model.factory is not None:
        return "let it see earlier tokens alone, or name a task of your own for what it is meant for"
    model_config = build_model_config(config.model, facts).get_text_config()
    if getattr(model_config, "is_decoder", True):
        return elsewhere
    if config.model.pretrained is not None:
        return f"set is_decoder to true in the config.json of {config.model.pretrained}, or {elsewhere}"
    return f"set model.config.is_decoder=true, or {elsewhere}"
