"""``shardline data prepare``: a run's corpus, and what became of it."""

import sys

from trainer.commands.arguments import Config, Overrides
from trainer.commands.entry import entry


def prepare_data(config: Config, overrides: Overrides = None) -> int:
    """Clean, tokenise and pack a run's corpus; done already means done at once."""
    from sharding.ranks.errors import EXIT_FINISHED
    from trainer.checkpoint.trained_corpus import trained_fingerprint
    from trainer.config import load_config
    from trainer.data.evaluation_sets import describe_trained, prepare_sets
    from trainer.data.prepare import describe_corpus, prepare_samples
    from trainer.run_folder.folder import RunFolder

    run_config = load_config(config, overrides or [])
    fingerprint = trained_fingerprint(run_config, RunFolder.of(run_config))
    if run_config.model.pretrained is not None and fingerprint is None and run_config.checkpoint.from_ is None:
        from trainer.checkpoint.token_ids import check_named_tokenizer

        check_named_tokenizer(run_config)
    corpus = prepare_samples(run_config.data, fingerprint=fingerprint)
    print(describe_corpus(corpus))
    sets = prepare_sets(run_config, corpus)
    for name, of_set in sets.items():
        print(f"evaluation.sets {name}")
        print(describe_corpus(of_set))
    for sentence in describe_trained(sets, corpus):
        print(f"note: {sentence}")
    return EXIT_FINISHED


main = entry(prepare_data)

if __name__ == "__main__":
    from sharding.ranks.process_lifetime import die_with_parent

    die_with_parent()
    sys.exit(main(sys.argv[1:]))
