"""``shardline data prepare``: a run's corpus, and what became of it."""

import sys

from trainer.commands.arguments import Config, Overrides
from trainer.commands.entry import entry


def prepare_data(config: Config, overrides: Overrides = None) -> int:
    """Clean, tokenise and pack a run's corpus; done already means done at once."""
    from sharding.ranks.errors import EXIT_FINISHED
    from trainer.checkpoint.trained_corpus import trained_fingerprints
    from trainer.config import load_config
    from trainer.data.evaluation_sets import describe_trained
    from trainer.data.prepare import describe_corpus
    from trainer.data.prepare_stages import prepare_run
    from trainer.run_folder.folder import RunFolder

    run_config = load_config(config, overrides or [])
    fingerprints = trained_fingerprints(run_config, RunFolder.of(run_config))
    if run_config.model.pretrained is not None and not fingerprints and run_config.checkpoint.from_ is None:
        from trainer.checkpoint.token_ids import check_named_tokenizer

        check_named_tokenizer(run_config)
    for one in prepare_run(run_config, fingerprints):
        if one.stage.name:
            print(one.stage.label)
        print(describe_corpus(one.corpus))
        for name, of_set in one.sets.items():
            print(f"evaluation.sets {name}")
            print(describe_corpus(of_set))
        for sentence in describe_trained(one.sets, one.corpus):
            print(f"note: {sentence}")
    return EXIT_FINISHED


main = entry(prepare_data)

if __name__ == "__main__":
    from sharding.ranks.process_lifetime import die_with_parent

    die_with_parent()
    sys.exit(main(sys.argv[1:]))
