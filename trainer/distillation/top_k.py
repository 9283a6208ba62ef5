"""What is kept of a teacher's answer: its likeliest classes and all others together; and how far a student is off it.

Of the K classes that the teacher takes for the likeliest, the logarithms of their probabilities are kept at the run's
temperature, and that of what remains, the mass of all other classes. Both models are compared by the Kullback-Leibler
divergence over these K + 1 events, that "one of the others" is said being one event. By the log-sum inequality this is
at most the divergence over all classes, and it is that one where K is all of them. Without the rest, as where K
probabilities are made to add up to 1, the student would learn a distribution that is too sharp: Anshumann et al.,
"Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs" (2025), which calls the rest a ghost token; it also
shows that any K likeliest are a biased sample of the classes, since among the others the student learns nothing.
"""

import torch
from torch.nn import functional

from sharding.engine import Batch

LOG_PROBABILITIES = "teacher/log_probabilities"
"""Of a batch: fp32 [micro, ..., K + 1], or K where that is all classes; the last of K + 1 is all others together."""

CLASSES = "teacher/classes"
"""Of a batch: which these are, int16 or int32 [micro, ..., K]."""

KEPT = frozenset({LOG_PROBABILITIES, CLASSES})
"""Both, which no model is given."""

_MOST_CLASSES_OF_INT16 = 2**15


def kept_answer(logits: torch.Tensor, top_k: int, temperature: float) -> Batch:
    """What is kept of a teacher's answer.

    Args:
        logits: the teacher's, fp32 [micro, ..., classes].
        top_k: how many classes are kept; all where there are fewer.
        temperature: logits are divided by it.

    Returns:
        ``LOG_PROBABILITIES`` and ``CLASSES``, on the logits' device.
    """
    num_classes = logits.shape[-1]
    scaled = logits / temperature
    log_z = scaled.logsumexp(dim=-1, keepdim=True)
    kept, classes = scaled.topk(min(top_k, num_classes), dim=-1)
    columns = [kept - log_z]
    if classes.shape[-1] < num_classes:
        # Not 1 less the sum of the others, which of a sure teacher would be rounding alone.
        others = scaled.scatter(-1, classes, -torch.inf).logsumexp(dim=-1, keepdim=True)
        columns.append(others - log_z)
    return {
        LOG_PROBABILITIES: torch.cat(columns, dim=-1),
        CLASSES: classes.to(class_dtype(num_classes)),
    }


def class_dtype(num_classes: int) -> torch.dtype:
    """What the number of a class is kept as."""
    return torch.int16 if num_classes <= _MOST_CLASSES_OF_INT16 else torch.int32


def kept_bytes(top_k: int, num_classes: int) -> int:
    """Bytes that are kept of each target: 4 for each probability, and 2 or 4 for each class."""
    num_kept = min(top_k, num_classes)
    return 4 * (num_kept + (num_kept < num_classes)) + class_dtype(num_classes).itemsize * num_kept


def top_k_divergence_sum(
    student: torch.Tensor, kept: Batch, is_target: torch.Tensor, temperature: float
) -> torch.Tensor:
    """temperature^2 x KL(teacher, student) over the kept classes and the rest, in nats, summed over targets.

    Args:
        student: logits, fp32 [micro, ..., classes].
        kept: ``LOG_PROBABILITIES`` and ``CLASSES`` of the same samples; of texts as long, or longer by padding.
        is_target: which count, bool [micro, ...].
        temperature: of the kept.

    Returns:
        An fp32 scalar with a gradient.
    """
    log_p, classes = kept[LOG_PROBABILITIES], kept[CLASSES].long()
    if student.ndim == 3:
        log_p, classes = log_p[:, : student.shape[1]], classes[:, : student.shape[1]]
    scaled = student / temperature
    log_z = scaled.logsumexp(dim=-1, keepdim=True)
    columns = [scaled.gather(-1, classes) - log_z]
    if log_p.shape[-1] > classes.shape[-1]:
        columns.append(scaled.scatter(-1, classes, -torch.inf).logsumexp(dim=-1, keepdim=True) - log_z)
    log_q = torch.cat(columns, dim=-1)
    # A probability of 0 times its logarithm is 0, and not NaN.
    log_p = log_p.clamp(min=torch.finfo(log_p.dtype).min)
    divergences = functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(dim=-1)
    return temperature**2 * torch.where(is_target, divergences, 0.0).sum()
