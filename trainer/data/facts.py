"""What a model and a task may know of the samples, before any is read and without torch."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class SampleFacts:
    """What is known of all samples of a run.

    What samples do not have is None or empty.

    Attributes:
        sequence_length: tokens of a sample that the model computes on, the most where samples have several lengths;
            None where they are no tokens.
        vocab_size: largest token id and one; None where samples are no tokens.
        eos_token_id: token that ends each document; None where there is none.
        tokenizer_dir: folder that ``AutoTokenizer.from_pretrained`` loads; None where there is none.
        pad_token_id: token that fills up shorter rows; None where the tokenizer has none, and rows are filled with
            0 unless the model says otherwise.
        mask_token_id: token that hides another one; None where the tokenizer has none.
        classes: names of the labels in the order of their indices.
        class_counts: training rows of each class; of tags, tokens.
        num_features: numbers of a row.
        categories: of each categorical column its name and the number of its values, with index 0, which stands for
            whatever training has not seen.
        image_shape: channels, height and width of an image.
        num_audio_samples: samples of a recording, the most where they have several lengths.
        sampling_rate: samples of a recording in a second.
        means: what was subtracted from each number of a row, each channel of an image, counted in white, or from sound.
        scales: what each was divided by after that.
        label_mean: mean of the numbers that training is to predict.
        label_scale: their standard deviation, 1 where they are all alike.
    """

    sequence_length: int | None = None
    vocab_size: int | None = None
    eos_token_id: int | None = None
    tokenizer_dir: Path | None = None
    pad_token_id: int | None = None
    mask_token_id: int | None = None
    classes: tuple[str, ...] = ()
    class_counts: tuple[int, ...] = ()
    num_features: int | None = None
    categories: tuple[tuple[str, int], ...] = ()
    image_shape: tuple[int, int, int] | None = None
    num_audio_samples: int | None = None
    sampling_rate: int | None = None
    means: tuple[float, ...] = ()
    scales: tuple[float, ...] = ()
    label_mean: float | None = None
    label_scale: float | None = None
