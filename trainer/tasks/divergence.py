"""How far a student's predictions are from its teacher's, summed over targets."""

import torch
from torch.nn import functional

from sharding.engine import Batch
from trainer.data.facts import SampleFacts
from trainer.tasks.next_tokens import IGNORED_LABEL
from trainer.tasks.task import Outputs


def divergence_sum(
    student: torch.Tensor, teacher: torch.Tensor, is_target: torch.Tensor, temperature: float
) -> torch.Tensor:
    """temperature^2 x KL(teacher, student) in nats, summed over targets, an fp32 scalar with a gradient.

    The square keeps gradients as large as those of the targets whatever the temperature is: Hinton et al., "Distilling
    the Knowledge in a Neural Network" (2015), section 2.

    Args:
        student: logits, fp32 [..., classes].
        teacher: logits, of the same shape, without a gradient.
        is_target: which count, bool [...].
        temperature: both are divided by it.
    """
    log_student = (student / temperature).log_softmax(dim=-1)
    divergences = functional.kl_div(log_student, (teacher / temperature).softmax(dim=-1), reduction="none").sum(dim=-1)
    return temperature**2 * torch.where(is_target, divergences, 0.0).sum()


def difference_sum(
    student: torch.Tensor, teacher: torch.Tensor, is_target: torch.Tensor, is_token: torch.Tensor | None
) -> torch.Tensor:
    """The mean squared difference of hidden states at each target, summed over targets, an fp32 scalar.

    Args:
        student: states, [samples, ..., width], or [samples, length, ..., width] where each token may be a target.
        teacher: of the same shape, without a gradient.
        is_target: which count, bool [samples] or [samples, length].
        is_token: what is no padding of samples that are texts with one target each, bool [samples, length].
    """
    squares = (student.float() - teacher.float()).square()
    if is_token is not None and is_target.ndim == 1 and squares.shape[:2] == is_token.shape:
        # How long the padding is depends on which texts are beside one another.
        of_tokens = torch.where(is_token, squares.flatten(2).mean(dim=-1), 0.0).sum(dim=1)
        differences = of_tokens / is_token.sum(dim=1).clamp(min=1)
    else:
        differences = squares.flatten(is_target.ndim).mean(dim=-1)
    return torch.where(is_target, differences, 0.0).sum()


def token_logits(outputs: Outputs, batch: Batch, facts: SampleFacts) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of tokens and where there is a target, as ``Task.class_logits`` gives them.

    Args:
        outputs: with logits [micro, length, vocabulary], of which those that only pad the vocabulary are left out.
        batch: with ``labels``, int64 [micro, length].
        facts: of the samples.
    """
    assert outputs.logits is not None, "the forward pass gives logits"
    return outputs.logits[..., : facts.vocab_size].float(), batch["labels"] != IGNORED_LABEL
