"""``shardline generate``: continue a text with a run's model.

``python -m trainer.commands.generate RUN --prompt TEXT [...]``; RUN is a run's folder or an exported model.
"""

import argparse
import sys
from collections.abc import Sequence

from sharding.ranks.errors import EXIT_FINISHED, ends_with_a_sentence
from trainer.commands.run_arguments import add_code_arguments, allowed_code
from trainer.deploy.generation import generate_text, load_model


@ends_with_a_sentence
def main(arguments: Sequence[str]) -> int:
    """Generate and print; returns the exit status."""
    parser = argparse.ArgumentParser(prog="shardline generate")
    parser.add_argument("run")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-new-tokens", type=int)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-k", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--step", type=int)
    parser.add_argument("--ema", action="store_true")
    add_code_arguments(parser)
    options = parser.parse_args(arguments)
    model, tokenizer = load_model(options.run, options.step, averaged=options.ema, allowed=allowed_code(options))
    text = generate_text(
        model,
        tokenizer,
        options.prompt,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        seed=options.seed,
    )
    print(text)
    return EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
