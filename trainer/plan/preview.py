"""What a run will be, and what is wrong with it, as far as no rank is needed to tell.

``python -m trainer.plan.preview --num-ranks N [--gpus]`` reads a configuration as JSON from standard input and
prints a ``Preview``: the model's size, the memory of a rank, how often training goes through the corpus, where it
continues.
"""

import argparse
import itertools
import json
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from sharding.parallel_dims import parallel_dims
from sharding.ranks.errors import EXIT_FINISHED, ends_with_a_sentence
from trainer.attempt import check_continuation, finished
from trainer.checkpoint.finish import complete_at
from trainer.checkpoint.reference import check_source, resolve_checkpoint
from trainer.checkpoint.token_ids import check_named_tokenizer
from trainer.checkpoint.trained_corpus import trained_fingerprints
from trainer.config import RunConfig, parse_config
from trainer.config.rules import World, validate
from trainer.config.stages import Stage, errors_of_stage, stages_of, widest_config
from trainer.data.any_samples import prepared_facts
from trainer.data.chat_template import load_chat_template
from trainer.data.corpus import read_documents
from trainer.data.epochs import with_counted_epochs
from trainer.data.expected_facts import expected_facts
from trainer.data.facts import SampleFacts
from trainer.data.identity import corpus_folder, errors_of, named_sources
from trainer.data.prepare_rows import check_first_row
from trainer.data.prepare_stages import refuse_single_document
from trainer.data.prepared import Prepared, PreparedMixture, PreparedStream, find_prepared
from trainer.data.prepared_own import PreparedOwn, prepare_own
from trainer.data.prepared_rows import PreparedRows
from trainer.data.prepared_stages import with_tokenizer_of_first
from trainer.data.tokenizer import TRAINED, load_tokenizer
from trainer.distillation.named_teacher import check_corpus, check_teacher
from trainer.distillation.teacher import try_teacher
from trainer.distillation.top_k import kept_bytes
from trainer.model.document_mask import check_architecture
from trainer.model.memory_estimate import estimate_memory
from trainer.model.models import model_facts
from trainer.model.trial import try_model
from trainer.optimizers.layer_decay import describe_depth_scales
from trainer.plan.record import Preview
from trainer.run_folder.folder import RunFolder
from trainer.runtime.byte_sizes import size_text
from trainer.runtime.json_output import output_aside, print_json
from trainer.tasks.monitor import check_monitor
from trainer.tasks.registry import configured_task

_MAX_DOCUMENTS = 10_000


def preview(config: RunConfig, world: World) -> Preview:
    """Check all that ranks would find out after they have started, and describe the run.

    Args:
        config: the run; what its source has is read, of a source that is not prepared yet the first document or row.
            Of rows that are not prepared yet it is not known what the model is to predict, so no model is built.
        world: the ranks that are to be started; of their GPUs nothing is asked.

    Raises:
        UserError: something that the user can mend is wrong.
    """
    validate(config, world)
    run, run_folder = config, RunFolder.of(config)
    corpora = _corpora(run, run_folder)
    # The model has positions for the longest sequences.
    config = widest_config(run)
    corpus = next(corpus for stage, corpus in corpora if stage.config.data == config.data)
    check_teacher(config)
    if corpus is not None:
        check_corpus(config, corpus)
    if config.checkpoint.from_ is None and run_folder.newest_checkpoint() is None:
        check_named_tokenizer(config, None if corpus is None else corpus.tokenizer_dir)
    if corpus is None and config.data.has_rows:
        check_first_row(config.data)
        return Preview(**_corpus_facts(config, corpus), **_start_facts(run, run_folder))
    if corpus is not None and not run.stages:
        run = config = with_counted_epochs(run, corpus)
        corpora = [(stages_of(run)[0], corpus)]
    facts = expected_facts(config.data) if corpus is None else prepared_facts(corpus, config.data)
    task = configured_task(config.task, facts)
    check_monitor(config, task)
    dims = parallel_dims(config.parallel, world.num_ranks)
    tried = try_model(config, task, facts, dims)
    for stage, of_stage in corpora:
        with errors_of_stage(stage.name):
            if stage.config.data.document_mask:
                check_architecture(stage.config, task, facts)
            if of_stage is None:
                refuse_single_document(stage.config)
                _read_first_documents(stage.config)
            else:
                of_stage.check_sequence_length(stage.config.data.sequence_length)
    device = torch.device("cuda" if world.has_gpu else "cpu")
    # Without what learning from a teacher adds to it.
    counted = model_facts(tried.model, tried.model_config)
    teacher = try_teacher(config, tried.model, facts)
    of_teacher = None if teacher is None else teacher.model
    memory = estimate_memory(
        _with_format(config, world), tried.model, tried.model_config, dims, device, facts, of_teacher
    )
    of_corpora = [_corpus_facts(stage.config, of_stage) for stage, of_stage in corpora]
    if run.stages:
        names = [stage.name for stage, _ in corpora]
        lines = [f"{name}: {facts['corpus']}" for name, facts in zip(names, of_corpora, strict=True)]
        of_corpora = [{"corpus": "\n".join(lines)}]
    return Preview(
        model=config.model.name if tried.model_config is None else tried.model_config.model_type,
        num_parameters=counted.num_parameters,
        num_frozen=counted.num_frozen,
        adapters=tried.adapters,
        rates=describe_depth_scales(tried.scales, config.optimizer.layer_decay) if tried.scales else "",
        state_bytes=memory.state.total,
        activation_bytes=memory.activations,
        teacher="" if teacher is None else teacher.description + _when_asked(config, facts, of_corpora[0]),
        teacher_bytes=memory.teacher.held + memory.teacher.gathered,
        **of_corpora[0],
        **_start_facts(run, run_folder),
    )


def _corpora(config: RunConfig, run_folder: RunFolder) -> list[tuple[Stage, Prepared | None]]:
    """The stages, or the one that a run without is, each with what is prepared of it, if it is."""
    if config.data.source == "factory" and not config.stages:
        # Whoever asks has named the function to have it run.
        return [(stages_of(config)[0], prepare_own(config.data, corpus_folder(config.data)))]
    fingerprints = trained_fingerprints(config, run_folder)
    found: list[tuple[Stage, Prepared | None]] = []
    for stage in stages_of(config):
        with errors_of_stage(stage.name):
            data = with_tokenizer_of_first(stage.config.data, found[0][1] if found else None)
            found.append((stage, find_prepared(data, fingerprints.get(stage.name))))
    return found


def _read_first_documents(config: RunConfig) -> None:
    template = None
    if config.data.has_messages and config.data.tokenizer != TRAINED:
        tokenizer = load_tokenizer(config.data.tokenizer, masks=config.data.mask_token)
        template = load_chat_template(tokenizer, config.data.chat_template, config.data.tokenizer)
    for name, source in named_sources(config.data):
        # A source on the hub is another machine's.
        if source.source != "hub":
            with errors_of(name):
                # Rows without the column are empty ones until it is clear that there is none.
                documents = itertools.islice(read_documents(source), _MAX_DOCUMENTS)
                first = next((one for one in documents if one.text or one.tokens is not None), None)
                if template is not None and first is not None and source.reads_messages:
                    template.render(json.loads(first.text), first.source_id)


def _with_format(config: RunConfig, world: World) -> RunConfig:
    """The run with a number format that need not be asked of a GPU, which may be another machine's."""
    if not world.has_gpu or config.precision.compute != "auto" or torch.cuda.is_available():
        return config
    return config.model_copy(update={"precision": config.precision.model_copy(update={"compute": "bf16"})})


def _corpus_facts(config: RunConfig, corpus: Prepared | None) -> dict[str, Any]:
    """Fields of a ``Preview``."""
    if corpus is None:
        return {"corpus": "not prepared yet: how many epochs there are is known once it is"}
    if isinstance(corpus, PreparedStream):
        return {"corpus": "a stream: how many epochs there are is not known"}
    num_read = config.num_steps * config.batch.global_size
    if isinstance(corpus, PreparedRows | PreparedOwn):
        if isinstance(corpus, PreparedOwn):
            num_samples = corpus.num_samples("train")
        else:
            num_samples = corpus.manifest.splits["train"].num_rows
        return _corpus_of(f"{num_samples:,} rows", num_samples, num_read)
    sources = corpus.corpora if isinstance(corpus, PreparedMixture) else [corpus]
    length = config.data.sequence_length
    num_samples = sum(source.stream("train").num_samples(length) for source in sources)
    mixed = f" in {len(sources)} sources" if len(sources) > 1 else ""
    return _corpus_of(f"{num_samples:,} samples of {length} tokens{mixed}", num_samples, num_read)


def _corpus_of(described: str, num_samples: int, num_read: int) -> dict[str, Any]:
    num_epochs = num_read / num_samples
    text = f"{described}; the run reads {num_epochs:,.3g} epochs"
    return {"corpus": text, "num_samples": num_samples, "num_epochs": num_epochs}


def _when_asked(config: RunConfig, facts: SampleFacts, of_corpus: dict[str, Any]) -> str:
    """What is said of a teacher that is not asked in each step."""
    top_k, num_samples = config.distill.top_k, of_corpus.get("num_samples")
    if top_k is None:
        return ""
    num_classes = len(facts.classes) if config.data.has_rows else facts.vocab_size
    if num_samples is None or num_classes is None:
        return ", asked before training"
    is_of_tokens = not config.data.has_rows or config.data.label_kind == "tags"
    num_targets = num_samples * (config.data.sequence_length if is_of_tokens else 1)
    num_bytes = size_text(num_targets * kept_bytes(top_k, num_classes))
    return f", asked before training; its answers take {num_bytes} on disk"


def _start_facts(config: RunConfig, folder: RunFolder) -> dict[str, Any]:
    """Fields of a ``Preview``."""
    check_continuation(folder, config)
    check_source(config, folder)
    newest = folder.newest_checkpoint()
    if newest is None:
        if config.checkpoint.from_ is None:
            return {"continues": "nothing: begins at step 1"}
        return {"continues": f"{config.checkpoint.load} of {resolve_checkpoint(config.checkpoint.from_)}"}
    if ended := finished(folder, config):
        text = f"nothing: {complete_at(ended[0].step, ended[2])}"
        return {"continues": text, "continues_after": newest[0], "is_complete": True}
    return {"continues": f"after step {newest[0]:,}", "continues_after": newest[0]}


@ends_with_a_sentence
def main(arguments: Sequence[str]) -> int:
    """Print the record; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m trainer.plan.preview")
    parser.add_argument("--num-ranks", type=int, required=True)
    parser.add_argument("--gpus", action="store_true")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    values = json.loads(sys.stdin.read())
    # Modules of the user's own may print.
    with output_aside(enabled=True):
        found = preview(parse_config(values, "the configuration"), World(options.num_ranks, options.gpus))
    print_json(found.model_dump())
    return EXIT_FINISHED


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    sys.exit(main(sys.argv[1:]))
