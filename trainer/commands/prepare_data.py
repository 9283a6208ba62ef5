"""``shardline data prepare``: a run's corpus, and what became of it.

``python -m trainer.commands.prepare_data CONFIG [key=value ...]``
"""

import sys
from collections.abc import Sequence

from sharding.ranks.errors import EXIT_FINISHED, UserError, ends_with_a_sentence
from trainer.data.prepare import describe_corpus, prepare_corpus


@ends_with_a_sentence
def main(arguments: Sequence[str]) -> int:
    """Prepare the corpus of a configuration; returns the exit status."""
    from trainer.checkpoint.trained_corpus import trained_fingerprint
    from trainer.config import load_config
    from trainer.run_folder.folder import RunFolder

    if not arguments:
        raise UserError("no configuration given; write python -m trainer.commands.prepare_data CONFIG [key=value ...].")
    config = load_config(arguments[0], arguments[1:])
    fingerprint = trained_fingerprint(config, RunFolder.of(config))
    if config.model.pretrained is not None and fingerprint is None and config.checkpoint.from_ is None:
        from trainer.checkpoint.token_ids import check_named_tokenizer

        check_named_tokenizer(config)
    corpus = prepare_corpus(config.data, fingerprint=fingerprint)
    print(describe_corpus(corpus))
    return EXIT_FINISHED


if __name__ == "__main__":
    from sharding.ranks.process_lifetime import die_with_parent

    die_with_parent()
    sys.exit(main(sys.argv[1:]))
