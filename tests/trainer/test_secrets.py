"""Settings that hold a secret are refused, and the sentence does not repeat it."""

from pathlib import Path

import pytest

from sharding.errors import UserError
from trainer.config import load_config
from trainer.secrets import blot_out, refuse_secrets


@pytest.mark.parametrize(
    ("name", "override"),
    [
        ("HF_TOKEN", "data.tokenizer={}"),
        ("WANDB_API_KEY", "tracking.wandb.tags=[a,{}]"),
        ("AWS_SECRET_ACCESS_KEY", "output_dir=/data/{}/runs"),
        ("MY_PASSWORD", "model.config.{}=1"),
    ],
)
def test_a_secret_of_the_environment(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, name: str, override: str
) -> None:
    monkeypatch.setenv(name, "planted-3f9ac1")
    load_config(config_file)
    with pytest.raises(UserError, match=f"holds the value of {name}") as refused:
        load_config(config_file, [override.format("planted-3f9ac1")])
    assert "planted" not in str(refused.value)


@pytest.mark.parametrize("url", ["s3://id:hush@bucket/runs", "https://user:p%40ss@host:9000/x"])
def test_a_password_in_a_url(config_file: Path, url: str) -> None:
    with pytest.raises(UserError, match="output_dir is a URL with a password") as refused:
        load_config(config_file, [f"output_dir={url}"])
    assert url not in str(refused.value)


def test_what_is_no_secret() -> None:
    settings = {"a": ["s3://bucket/a:b@c", "http://host:9000/x", "gpt2"], "b": {"tokenizer": "trusted"}}
    refuse_secrets(settings, {"HF_TOKEN": "", "API_KEY": "gpt2", "TOKENIZERS_PARALLELISM": "trusted-or-not"})


def test_secrets_are_blotted_out_of_what_is_written() -> None:
    environment = {"HF_TOKEN": "planted-1234", "X_KEY": "planted-1234-longer", "HOME": "/home/somebody"}
    text = "a planted-1234 b planted-1234-longer /home/somebody"
    assert blot_out(text, environment) == "a *** b *** /home/somebody"
