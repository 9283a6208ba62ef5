"""How a rank of a benchmark ends, well or not."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from sharding.ranks.errors import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_FINISHED, UserError
from sharding.ranks.sentences import print_error
from trainer.runtime.processes import end_process


@contextmanager
def process_ends() -> Iterator[None]:
    """End this process with what is done inside, whatever threads and collectives are under way.

    What a user can cause is one sentence, and anything else a traceback. Neither other ranks nor contestants in the
    middle of a step are waited for.
    """
    try:
        yield
    except UserError as error:
        print_error(str(error))
        end_process(EXIT_BAD_INPUT)
    except BaseException:  # noqa: BLE001 - whatever it was, the other ranks must not wait for this one
        traceback.print_exc()
        end_process(EXIT_FAILED)
    end_process(EXIT_FINISHED)
