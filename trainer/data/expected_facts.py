"""What is known of packed tokens before they are prepared."""

from dataclasses import replace

from trainer.config.data import DataConfig
from trainer.data.facts import SampleFacts
from trainer.data.tokenizer import MASK_ID, PADDING_ID, TRAINED, load_tokenizer, vocabulary_size


def expected_facts(data: DataConfig) -> SampleFacts:
    """What is to be known of samples once they are prepared: of a tokenizer that is yet to be trained, the most.

    Raises:
        UserError: the tokenizer cannot be had.
    """
    if data.tokenizer == TRAINED:
        # A small corpus may give fewer tokens.
        facts = SampleFacts(data.sequence_length, data.vocab_size, 0)
        return replace(facts, pad_token_id=PADDING_ID, mask_token_id=MASK_ID) if data.mask_token else facts
    tokenizer = load_tokenizer(data.tokenizer, masks=data.mask_token)
    return SampleFacts(
        data.sequence_length,
        vocabulary_size(tokenizer),
        tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        mask_token_id=tokenizer.mask_token_id,
    )
