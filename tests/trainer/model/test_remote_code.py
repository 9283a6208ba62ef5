"""Code that comes with data: none is run, but for a model's, on an explicit switch."""

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from sharding.ranks.errors import UserError
from tests.support import ROOT
from trainer.config.sections import ModelConfig
from trainer.config.yaml_files import parse_yaml
from trainer.data.facts import SampleFacts
from trainer.data.tokenizer import load_tokenizer
from trainer.model.models import build_model_on_meta
from trainer.tasks.registry import build_task

_CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path({proof!r}).touch()

class OwnConfig(LlamaConfig):
    model_type = {model_type!r}

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""
_SIZES = {
    "hidden_size": 8,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 100,
}


def model_folder(folder: Path, model_type: str, **sizes: int) -> Path:
    """A model whose class is in a Python file beside its configuration; running that leaves a file ``ran``."""
    folder.mkdir()
    (folder / f"own_{model_type}.py").write_text(_CODE.format(proof=str(folder / "ran"), model_type=model_type))
    auto_map = {"AutoConfig": f"own_{model_type}.OwnConfig", "AutoModelForCausalLM": f"own_{model_type}.OwnModel"}
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "auto_map": auto_map} | _SIZES | sizes))
    return folder


@pytest.fixture
def code_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where transformers copies the code to before it imports it."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


def _build(folder: Path, **settings: bool) -> str:
    model = ModelConfig(pretrained=str(folder), **settings)
    return type(build_model_on_meta(build_task("causal-lm"), model, SampleFacts(16, 100, 0))).__name__


@pytest.mark.usefixtures("code_cache")
def test_a_models_code_runs_on_the_switch_alone(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", "own_llama")
    with pytest.raises(UserError, match=r"needs Python code of its own; .*model\.trust_remote_code=true"):
        _build(folder)
    assert not (folder / "ran").exists()
    assert _build(folder, trust_remote_code=True) == "OwnModel"
    assert (folder / "ran").exists()


@pytest.mark.usefixtures("code_cache")
def test_a_model_that_transformers_knows_is_built_without_its_code(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", "llama")
    assert _build(folder) == "LlamaForCausalLM"
    assert not (folder / "ran").exists()


def test_a_tokenizers_code_never_runs(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(_CODE.format(proof=str(tmp_path / "ran"), model_type="x"))
    settings = {"auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}, "tokenizer_class": "OwnTokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="cannot be loaded"):
        load_tokenizer(str(tmp_path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.getcwd []", "!!python/name:os.system"])
def test_a_configuration_makes_no_objects(tag: str) -> None:
    with pytest.raises(Exception, match="could not determine a constructor"):
        parse_yaml(f"name: {tag}")


_UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
_UNSAFE_CALLS = {
    "torch.load",
    "torch.save",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "eval",
    "exec",
    "pandas.read_pickle",
}
# Where a name in a configuration becomes an import, as its documentation says: a user's own task. And where one of a
# table of the standard library's compression modules does, or of our own modules that are loaded when they are used.
_IMPORTS_BY_NAME = {
    "trainer/runtime/own_modules.py",
    "trainer/data/row_files.py",
    "trainer/architectures/late_imports.py",
    "shardline/__init__.py",
}


def _unsafe(source: str, file: str) -> Iterator[str]:
    """What a source has that could run code from a file that it loads."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {(node.module or "").partition(".")[0]}
        else:
            names = set()
        yield from names & _UNSAFE_MODULES
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called in _UNSAFE_CALLS:
            yield called
        if called in ("importlib.import_module", "__import__") and file not in _IMPORTS_BY_NAME:
            yield called
        if called == "YAML" and keywords.get("typ") != "'safe'":
            yield called
        if keywords.get("allow_pickle", "False") != "False":
            yield "allow_pickle"
        if called in ("tempfile.mktemp", "os.tempnam"):
            yield called
        # Left out, transformers would ask on the terminal.
        asks = keywords.get("trust_remote_code") not in ("False", "model.trust_remote_code", "trust_remote_code")
        if called.startswith("Auto") and called.endswith(".from_pretrained") and asks:
            yield f"{called} without trust_remote_code"


def test_no_source_loads_what_could_run() -> None:
    found = []
    for package in ("launcher", "trainer", "sharding", "shardline", "benchmarks"):
        for path in (ROOT / package).rglob("*.py"):
            file = str(path.relative_to(ROOT))
            found += [f"{file}: {name}" for name in _unsafe(path.read_text(), file)]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "def f():\n    import pickle",
        "from marshal import loads",
        "torch.load(path, weights_only=False)",
        "eval(text)",
        "YAML(pure=True)",
        "np.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(name)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "tempfile.mktemp()",
    ],
)
def test_the_search_finds_it(source: str) -> None:
    assert list(_unsafe(source, "x.py"))
