"""Pruning during training: the same weights under every layout, wherever a run goes on, and zeros that stay."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from sharding.part import part_of_run, whole_part
from sharding.ranks.errors import UserError
from sharding.ranks.object_exchange import gather_objects
from sharding.ranks.process_group import Ranks
from tests.runs_in_process import RunsInProcess, saved_state
from tests.sharding.engine_cases import tiny_config
from tests.support import TINY_MODEL, read_metrics, run_on_ranks, write_corpus
from trainer.config.prune import PruneConfig, sparsity_after
from trainer.config.rules import World, validate
from trainer.faults.injection.inject import Fault
from trainer.optimizers.prune_choice import pruned_parameters
from trainer.optimizers.prune_masks import PruneInputs, shrink_masks
from trainer.optimizers.prune_selection import Scored, smaller_half_of_fours, smallest, sort_keys
from trainer.optimizers.pruning import Pruning
from trainer.run_folder.folder import RunFolder

_STEPS = 6
# Scheduled, so that the third step, where runs are stopped, is between two choices.
_PRUNE = {"sparsity": 0.5, "begin": 1, "end": 5, "every": 2}
# After a few steps the loss does not depend on what is attended to.
_ATTENDS = ["*.q_proj.weight", "*.k_proj.weight"]
_SGD = {"name": "sgd", "lr": 0.05, "weight_decay": 0.01, "nesterov": True}
_ADAMW = {"name": "adamw", "lr": 1e-3}
_LAYOUTS = [
    *({"strategy": strategy} for strategy in ("ddp", "zero1", "zero2", "zero3")),
    *({"backend": "bucketed", "strategy": strategy} for strategy in ("zero1", "zero2", "zero3")),
]
_CONFIG: Any = TINY_MODEL["config"]
# One layer, and micro-batches that one, two and three ranks divide a step into.
_SMALL: dict[str, Any] = {
    "model": {**TINY_MODEL, "config": {**_CONFIG, "num_hidden_layers": 1}},
    "batch": {"micro_size": 2},
}
_RULES: dict[str, dict[str, Any]] = {
    "importance": {"prune": {**_PRUNE, "by": "importance", "exclude": _ATTENDS}, "optimizer": _SGD, **_SMALL},
    "moments": {"prune": {**_PRUNE, "by": "importance", "scope": "layer"}, "optimizer": _ADAMW, **_SMALL},
    "magnitude": {"prune": _PRUNE, "optimizer": _SGD, **_SMALL},
}


def _keys(scores: torch.Tensor) -> torch.Tensor:
    return sort_keys(scores, torch.ones_like(scores, dtype=torch.bool))


def test_exactly_the_smallest_and_of_equal_ones_the_first() -> None:
    generator = torch.Generator().manual_seed(0)
    # Few different values, so that most thresholds fall among equal ones.
    tensors = [torch.randint(0, 9, shape, generator=generator).float() / 7 for shape in ((5, 7), (31,), (2, 3, 4))]
    scored = [Scored(whole_part(str(index), tensor), _keys(tensor)) for index, tensor in enumerate(tensors)]
    values = torch.cat([tensor.flatten() for tensor in tensors])
    order = values.argsort(stable=True)
    for count in (0, 1, 17, 45, len(values) - 1, len(values)):
        (marked,) = smallest([scored], [count], num_ranks=1)
        expected = torch.zeros(len(values), dtype=torch.bool)
        expected[order[:count]] = True
        assert torch.equal(torch.cat([marks.flatten() for marks in marked]), expected), count
    # Each for itself.
    counts = [3, 0, 24]
    for (marks,), one, count in zip(
        smallest([[one] for one in scored], counts, num_ranks=1), tensors, counts, strict=True
    ):
        expected = torch.zeros(one.numel(), dtype=torch.bool)
        expected[one.flatten().argsort(stable=True)[:count]] = True
        assert torch.equal(marks.flatten(), expected)


def test_bits_are_in_the_order_of_scores_and_what_is_pruned_comes_first() -> None:
    scores = torch.tensor([0.0, -0.0, 1e-44, 1e-30, 1.0, -2.0, torch.inf, torch.nan])
    keys = _keys(scores)
    assert keys.tolist() == sorted(keys.tolist())
    assert keys[0] == keys[1] > 0
    assert keys[6] == keys[7]
    assert sort_keys(scores, torch.zeros(8, dtype=torch.bool)).tolist() == [0] * 8


def test_two_of_four() -> None:
    weight = torch.tensor([[4.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0, -5.0, 1.0, 6.0, -7.0]])
    expected = [[0, 1, 1, 0, 1, 1, 0, 0], [1, 1, 0, 0, 1, 1, 0, 0]]
    assert smaller_half_of_fours(Scored(whole_part("w", weight), _keys(weight))).int().tolist() == expected
    # A run of whole groups, as the bucketed engine has it, and one that cuts them.
    run = weight.flatten()[4:12]
    marked = smaller_half_of_fours(Scored(part_of_run("w", run, (2, 8), 4), _keys(run)))
    assert marked.int().tolist() == [1, 1, 0, 0, 1, 1, 0, 0]
    with pytest.raises(RuntimeError, match="w is divided over ranks within groups of four"):
        smaller_half_of_fours(Scored(part_of_run("w", run, (2, 8), 6), _keys(run)))


def test_sparsity_grows_along_the_cubic() -> None:
    config = PruneConfig(sparsity=0.8, begin=100, end=300, every=50)
    found = {step: sparsity_after(config, step) for step in (99, 100, 125, 150, 200, 250, 299, 300, 301)}
    expected = {step: 0.8 * (1 - (1 - (step - 100) / 200) ** 3) for step in (150, 200, 250)} | {300: 0.8}
    assert {step: value for step, value in found.items() if value is not None} == pytest.approx(expected)
    assert sparsity_after(PruneConfig(sparsity=0.5), 0) == 0.5
    assert sparsity_after(PruneConfig(), 0) is None


_SHAPES = {
    "embed.weight": (9, 8),
    "a.weight": (4, 8),
    "conv.weight": (4, 1, 3, 3),
    "a.bias": (4,),
    "tiny.weight": (1, 1),
}
_LAYER_WEIGHTS = ("a.weight", "conv.weight", "tiny.weight")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ["a.weight", "conv.weight", "tiny.weight"]),
        ({"exclude": ["tiny*"]}, ["a.weight", "conv.weight"]),
        ({"parameters": ["embed.*", "a.*"]}, ["embed.weight", "a.weight"]),
        ({"pattern": "2:4"}, ["a.weight"]),
        ({"parameters": ["b.*"]}, "prune.parameters=b.* matches no trained matrix or kernel; the nearest names are"),
        ({"exclude": ["*"]}, "prune.sparsity=0.5 prunes trained matrices and kernels, but .* leave none"),
        (
            {"pattern": "2:4", "parameters": ["conv*"]},
            r"a row of conv.weight \[4, 1, 3, 3\] has 9, which four does not",
        ),
        ({"scope": "layer", "sparsity": 0.9}, r"leaves nothing of tiny.weight \(1 weights\)"),
    ],
)
def test_which_parameters(settings: dict[str, Any], expected: list[str] | str) -> None:
    config = PruneConfig.model_validate({"sparsity": 0.5, **settings})
    if isinstance(expected, list):
        assert pruned_parameters(config, _LAYER_WEIGHTS, _SHAPES) == expected
        return
    with pytest.raises(UserError, match=expected):
        pruned_parameters(config, _LAYER_WEIGHTS, _SHAPES)


@pytest.mark.parametrize(
    ("prune", "others", "sentence"),
    [
        ({"sparsity": 1.0}, {}, "prune.sparsity=1 leaves no weight of what it prunes; set it below 1"),
        (
            {"sparsity": 0.4, "pattern": "2:4"},
            {},
            "prune.pattern=2:4 keeps two of each four weights, but prune.sparsity=0.4",
        ),
        ({"sparsity": 0.5, "pattern": "2:4", "scope": "layer"}, {}, "prune.scope=layer goes with prune.pattern=unstr"),
        ({"sparsity": 0.5, "pattern": "2:4", "begin": 1, "end": 2}, {}, "prune.pattern=2:4 prunes all at once"),
        ({"sparsity": 0.5, "begin": 3, "end": 2}, {}, "prune.end=2 is before prune.begin=3"),
        ({"sparsity": 0.5, "by": "gradient", "end": 2}, {}, "prune.begin=0 is before the first; set prune.begin to 1"),
        ({"sparsity": 0.5}, {}, "prune.end=0 prunes initial values that nothing has trained"),
        ({"sparsity": 0.5, "end": 5}, {}, "prune.end=5 is after the last of 4 steps, .* set schedule.total_steps"),
        ({"by": "gradient"}, {}, "prune.by=gradient goes with prune.sparsity only, which is 0.0"),
        (
            {"sparsity": 0.5, "end": 2},
            {"parallel": {"backend": "deepspeed", "strategy": "zero2"}},
            "DeepSpeed does not show",
        ),
        ({"sparsity": 0.5, "end": 2}, {"metrics": {"gradient_noise_scale": True}}, "metrics.gradient_noise_scale"),
    ],
)
def test_what_is_refused(prune: dict[str, Any], others: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        validate(tiny_config(prune=prune, **{"parallel": {"strategy": "zero2"}} | others), World(2, has_gpu=False))


def test_a_short_run_may_be_the_beginning_of_a_long_one() -> None:
    prune, schedule = {"sparsity": 0.5, "end": 50}, {"name": "cosine", "total_steps": 60}
    validate(tiny_config({"strategy": "zero2"}, prune=prune, schedule=schedule), World(2, has_gpu=False))


def test_nothing_left_of_a_parameter_is_a_sentence() -> None:
    weights = [whole_part("model/small", torch.full((2, 2), 1e-3)), whole_part("model/large", torch.randn(20, 20))]
    masks = [torch.ones(2, 2, dtype=torch.bool), torch.ones(20, 20, dtype=torch.bool)]
    config = PruneConfig(sparsity=0.5)
    with pytest.raises(
        UserError, match=r"prune.scope=global, leaves nothing of small \(4 weights\), .* prune.scope=layer"
    ):
        shrink_masks(config, 0.5, PruneInputs(weights, masks, []), num_ranks=1)
    assert all(bool(mask.all()) for mask in masks)
    by_gradient = PruneConfig(sparsity=0.5, by="gradient", begin=1, end=1)
    with pytest.raises(UserError, match=r"prune.by=gradient judges by gradients, but none has come"):
        shrink_masks(by_gradient, 0.5, PruneInputs(weights, masks, [torch.zeros_like(w.tensor) for w in weights]), 1)


def _name(rule: str, parallel: Mapping[str, str], ranks: Ranks) -> str:
    return "-".join([rule, str(ranks.world_size), *parallel.values()])


def _reference(ranks: Ranks, root: Path, corpus: Path) -> None:
    runs = RunsInProcess(ranks, root, corpus)
    for rule, sections in _RULES.items():
        runs.train(rule, steps=_STEPS, parallel={"strategy": "none"}, **sections)


def _two_ranks(ranks: Ranks, root: Path, corpus: Path) -> None:
    runs = RunsInProcess(ranks, root, corpus)
    for parallel in _LAYOUTS:
        runs.train(_name("importance", parallel, ranks), steps=_STEPS, parallel=parallel, **_RULES["importance"])
    for parallel in _LAYOUTS[2], _LAYOUTS[6]:
        runs.train(_name("moments", parallel, ranks), steps=_STEPS, parallel=parallel, **_RULES["moments"])
    # Stopped in the middle of the schedule, and continued otherwise.
    for name, first, then in (("moved", _LAYOUTS[3], _LAYOUTS[5]), ("spread", _LAYOUTS[6], None)):
        runs.train(name, steps=_STEPS, stop_at=4, parallel=first, **_RULES["importance"])
        if then is not None:
            runs.train(name, steps=_STEPS, parallel=then, **_RULES["importance"])
    _keep_zeros(runs)


def _three_ranks(ranks: Ranks, root: Path, corpus: Path) -> None:
    runs = RunsInProcess(ranks, root, corpus)
    runs.train("spread", steps=_STEPS, parallel=_LAYOUTS[1], **_RULES["importance"])
    for parallel in _LAYOUTS[0], _LAYOUTS[3], _LAYOUTS[4], _LAYOUTS[6]:
        runs.train(_name("magnitude", parallel, ranks), steps=_STEPS, parallel=parallel, **_RULES["magnitude"])


_OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"name": "adamw", "lr": 1e-2, "weight_decay": 0.1},
    "sgd": {"name": "sgd", "lr": 0.1, "weight_decay": 0.1, "nesterov": True, "clip_norm": 0.01},
    "muon": {"name": "muon", "lr": 1e-2, "weight_decay": 0.1},
    "adafactor": {"name": "adafactor", "lr": 1e-1},
    "adamw8bit": {"name": "adamw8bit", "lr": 1e-2},
}
_WIDE = {**TINY_MODEL, "config": {**_CONFIG, "hidden_size": 66, "intermediate_size": 66, "num_hidden_layers": 1}}


def _keep_zeros(runs: RunsInProcess) -> None:
    prune = {"sparsity": 0.5, "begin": 2, "end": 2}
    for name, optimizer in _OPTIMIZERS.items():
        runs.train(
            f"zeros-{name}",
            steps=5,
            model=_WIDE,
            optimizer=optimizer | {"ema_decay": 0.5},
            prune=prune,
            parallel=_LAYOUTS[2] if name != "sgd" else _LAYOUTS[0],
        )
    # A step whose loss is not finite, one whose samples are left out, and a return to the last checkpoint.
    nan, spike = (Fault(fault=fault, rank=1, step=step) for fault, step in (("nan", 3), ("spike", 5)))
    judged = {"spike_warmup_steps": 2, "spike_window_steps": 2}
    for policy in ("skip", "rollback"):
        faults = judged | {"spike_policy": policy}
        prune = {"sparsity": 0.5, "by": "importance", "begin": 1, "end": 7, "every": 2, "exclude": _ATTENDS}
        runs.train(f"faulty-{policy}", [nan, spike], steps=8, faults=faults, prune=prune, optimizer=_SGD, **_SMALL)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs on one, two and three ranks."""
    root = tmp_path_factory.mktemp("pruning")
    corpus = write_corpus(root / "corpus")
    for function, num_ranks in ((_reference, 1), (_two_ranks, 2), (_three_ranks, 3)):
        run_on_ranks(function, num_ranks, root, corpus, timeout_s=300)
    return root


def _state(root: Path, name: str, step: int = _STEPS) -> dict[str, torch.Tensor]:
    return saved_state(RunFolder(root / "runs" / name), step)[1]


def _masks(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("mask/"): mask for name, mask in state.items() if name.startswith("mask/")}


def _check_zeros(state: Mapping[str, torch.Tensor], sparsity: float = 0.5) -> None:
    """Exactly so many weights, their averages and first moments are zero, and others are not."""
    masks = _masks(state)
    sizes = [mask.numel() for mask in masks.values()]
    assert sum(int((~mask).sum()) for mask in masks.values()) == round(sparsity * sum(sizes))
    for name, mask in masks.items():
        for prefix in ("model", "ema"):
            weight = state.get(f"{prefix}/{name}")
            assert weight is None or not weight[~mask].any(), (prefix, name)
        assert bool((state[f"model/{name}"][mask] != 0).all()), name


def test_every_layout_prunes_what_one_process_does(root: Path) -> None:
    references = {rule: _state(root, rule) for rule in _RULES}
    runs = sorted(
        path.name
        for path in (root / "runs").iterdir()
        if path.name.rpartition("-")[2] in ("ddp", "zero1", "zero2", "zero3")
    )
    assert len(runs) == 7 + 2 + 4
    for run in [*runs, "moved", "spread"]:
        reference = references.get(run.partition("-")[0], references["importance"])
        state = _state(root, run)
        masks, expected = _masks(state), _masks(reference)
        assert masks.keys() == expected.keys() != set()
        different = {name: int((mask != expected[name]).sum()) for name, mask in masks.items()}
        assert not any(different.values()), (run, different)
        for name, tensor in state.items():
            assert torch.allclose(tensor.double(), reference[name].double(), rtol=1e-3, atol=2e-5), (run, name)


def test_exactly_so_many_weights_are_zero_and_embeddings_stay(root: Path) -> None:
    for rule, sections in _RULES.items():
        state = _state(root, rule)
        assert "embed_tokens" not in " ".join(_masks(state))
        if sections["prune"].get("scope") == "layer":
            for mask in _masks(state).values():
                assert int((~mask).sum()) == round(0.5 * mask.numel())
        else:
            _check_zeros(state)
        sparsities = [line["train/sparsity"] for line in read_metrics(root / "runs" / rule)]
        assert sparsities == pytest.approx([0, 0, 0.4375, 0.4375, 0.5, 0.5], abs=1e-3)


@pytest.mark.parametrize("name", _OPTIMIZERS)
def test_zeros_stay_under_each_optimizer(root: Path, name: str) -> None:
    state = _state(root, f"zeros-{name}", 5)
    _check_zeros(state)
    assert any(key.startswith("ema/") for key in state)


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_faults_break_no_mask(root: Path, policy: str) -> None:
    folder = RunFolder(root / "runs" / f"faulty-{policy}")
    training, state = saved_state(folder, 8)
    # Under skip that step is taken again as well.
    assert training.num_skipped_steps == (policy == "rollback")
    assert training.skipped_samples
    _check_zeros(state)
    squares = {name: square for name, square in state.items() if name.startswith("square/")}
    assert len(squares) == len(_masks(state))
    assert all(bool(square.isfinite().all()) for square in squares.values())


def _whole_groups_of_four(ranks: Ranks) -> None:
    from sharding.state import MODEL_PREFIX
    from tests.sharding.network_cases import IMAGES, network_config, network_engine
    from trainer.optimizers.pruning import Pruning

    prune = PruneConfig(sparsity=0.5, pattern="2:4")
    counts = {}
    for parallel in _LAYOUTS:
        config = network_config("mlp", {"hidden_sizes": [20]}, parallel)
        engine = network_engine(config, IMAGES, ranks)
        shapes = {
            part.name.removeprefix(MODEL_PREFIX): part.global_shape for part in engine.state(with_optimizer=False)
        }
        names = pruned_parameters(prune, [name for name, shape in shapes.items() if len(shape) == 2], shapes)
        pruning = Pruning(engine, prune, "sgd", names, ranks)
        pruning.begin(0)
        pieces = [
            (part.name, box, piece.clone())
            for part in pruning.state()
            for box, piece in part.pieces()
            if part.is_written_here
        ]
        whole = {name: torch.zeros(shapes[name], dtype=torch.bool) for name in names}
        for of_rank in gather_objects(pieces, ranks):
            for name, box, piece in of_rank:
                whole[name.removeprefix("mask/")][box.slices] = piece
        for mask in whole.values():
            assert bool((mask.reshape(-1, 4).sum(dim=1) == 2).all()), parallel
        counts[str(parallel)] = torch.cat([mask.flatten() for mask in whole.values()])
    assert all(torch.equal(mask, counts[str(_LAYOUTS[0])]) for mask in counts.values())


def test_two_of_four_on_ranks(root: Path) -> None:
    run_on_ranks(_whole_groups_of_four, 3)


class _Unasked:
    """An engine that has nothing to tell, as DeepSpeed's whose state lies in files: it would be copied to memory."""

    def named_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [("a.weight", torch.nn.Parameter(torch.ones(2, 2)))]

    def state(self, *, with_optimizer: bool) -> Any:
        raise AssertionError("without masks nobody needs the weights")


def test_a_run_without_masks_holds_no_copy_of_its_weights() -> None:
    alone = Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1, device=torch.device("cpu"))
    engine: Any = _Unasked()
    pruning = Pruning(engine, PruneConfig(), "adamw", [], alone)
    pruning.load(["model/a.weight"], lambda _: None, is_own=True)
    pruning.begin(0)
    pruning.mask_gradients()
    pruning.after_step(1)
    assert pruning.state() == []
    assert pruning.metrics() == {}
