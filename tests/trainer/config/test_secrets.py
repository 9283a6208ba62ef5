"""Settings that hold a secret are refused, and the sentence does not repeat it."""

from pathlib import Path

import pytest

from sharding.ranks.errors import UserError
from trainer.config import load_config
from trainer.config.secrets import redact, redact_arguments, redact_values, refuse_secrets


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


def test_secrets_are_redacted_in_what_is_written() -> None:
    environment = {"HF_TOKEN": "planted-1234", "X_KEY": "planted-1234-longer", "HOME": "/home/somebody"}
    text = "a planted-1234 b planted-1234-longer /home/somebody"
    assert redact(text, environment) == "a *** b *** /home/somebody"


SLACK = "https://hooks.slack.com/" + "services/T0123456/B0123456/abcdefghijklmnop"


@pytest.mark.parametrize(
    ("name", "value", "secret"),
    [
        ("GITHUB_PAT", "planted-0001", "planted-0001"),
        ("DB_PASS", "planted-0002", "planted-0002"),
        ("MYSQL_PWD", "planted-0003", "planted-0003"),
        ("HF_TOKEN_2", "planted-0004", "planted-0004"),
        ("OPENAI_APIKEY", "planted-0005", "planted-0005"),
        ("DATABASE_URL", "postgres://user:planted-0006@db:5432/runs", "planted-0006"),
        (
            "SLACK_WEBHOOK_URL",
            "https://chat.example.org/hooks/planted-0007",
            "https://chat.example.org/hooks/planted-0007",
        ),
        ("NOTIFY", SLACK, SLACK),
        ("SENTRY_DSN", "https://planted0008@sentry.example.org/3", "https://planted0008@sentry.example.org/3"),
        ("SOMETHING", "hf_" + "Planted9" * 5, "hf_" + "Planted9" * 5),
    ],
)
def test_what_is_a_secret_by_name_or_shape(name: str, value: str, secret: str) -> None:
    assert redact(f"say {secret}.", {name: value}) == "say ***."
    with pytest.raises(UserError, match="settings are written to the run's folder and shown") as refused:
        refuse_secrets({"output_dir": f"/data/{secret}/x"}, {name: value})
    assert secret not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HISTKEY", "history-of-mine"),
        ("PWD", "/data/project-7"),
        ("TOKENIZERS_PARALLELISM", "trusted-or-not"),
        ("NUM_TOKENS", "1000000000"),
        # Words that people use in names and texts would be redacted everywhere.
        ("DB_PASS", "shardline"),
        ("KUBERNETES_PORT", "tcp://10.96.0.1:443"),
        ("EDITOR_BYPASS", "something-7"),
    ],
)
def test_what_is_none(name: str, value: str) -> None:
    assert redact(f"say {value}.", {name: value}) == f"say {value}."
    refuse_secrets({"output_dir": f"/data/{value}"}, {name: value})


def test_a_file_of_keys_is_named_and_no_secret(tmp_path: Path) -> None:
    file = tmp_path / "credentials.json"
    file.write_text("{}")
    assert redact(f"{file}", {"GOOGLE_APPLICATION_CREDENTIALS": str(file)}) == f"{file}"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("+TOKEN = 'ghp_" + "a1B2" * 9 + "'", "+TOKEN = '***'"),
        ("+x = f('github_pat_" + "11AAAAAAA0" * 4 + "')", "+x = f('***')"),
        ("+key: AKIA" + "PLANTED7" * 2, "+key: ***"),
        ("+  - xoxb-" + "123456789012-abcdefABCDEF", "+  - ***"),
        ('+wandb.login(api_key="' + "c0ffee42" * 5 + '")', '+wandb.login(api_key="***")'),
        ("+DB_PASSWORD='abcd1234efgh5678'", "+DB_PASSWORD='***'"),
        ("+url = 'postgresql://me:hunter22@db/x'", "+url = 'postgresql://me:***@db/x'"),
        (
            "+get('https://x.blob.example/a?sv=1&sig=" + "AbCd1234%2B" * 3 + "')",
            "+get('https://x.blob.example/a?sv=1&sig=***')",
        ),
        ("+eyJ" + "hbGciOiJIUzI1NiJ9.eyJ" + "zdWIiOiIxMjM0NTY.SflKxwRJSMeKKF", "+***"),
        (
            "+k = '-----BEGIN RSA PRIVATE KEY-----\n+MIIEpAIBAAKCAQEA\n+-----END RSA PRIVATE KEY-----\n+' # mine",
            "+k = '***\n+' # mine",
        ),
    ],
)
def test_a_diff_without_the_environment(text: str, shown: str) -> None:
    assert redact(text, {}) == shown


@pytest.mark.parametrize(
    "text",
    [
        "index 83db48f84ec878fbfb30b46d16630e944e34f205..0f2d8b1 100644",
        "+pad_token = '<|endoftext|>'",
        "+key = 'model.layers.0.self_attn.q_proj.weight'",
        "+num_key_value_heads=2, tokens=1_000_000_000",
        "+url = f'postgres://{user}:{password}@{host}/x'",
        "+the shelf_of_things_with_a_very_long_name_indeed_it_is = 1",
        "+task-with-a-long-name-that-has-sk-learn-in-it-12345678901234567890",
        "+assert '-----BEGIN CERTIFICATE-----' in text",
        "git@github.com:somebody/project.git http://host:9000/x@y s3://bucket/a:b@c",
    ],
)
def test_useful_text_stays(text: str) -> None:
    assert redact(text, {}) == text


def test_what_json_would_escape_is_found() -> None:
    values = {"argv": ['a "quoted" pass"word\\1', 7, None], "code": {"git_diff": 'x = "pass"word\\1"'}}
    shown = {"argv": ['a "quoted" ***', 7, None], "code": {"git_diff": 'x = "***"'}}
    assert redact_values(values, {"DB_PASS": 'pass"word\\1'}) == shown


def test_a_command_line() -> None:
    argv = ["shardline", "--api-key", "abc", "--token=x", "data.shard_tokens=1000", "--keep", "7", "x=planted-0001"]
    shown = ["shardline", "--api-key", "***", "--token=***", "data.shard_tokens=1000", "--keep", "7", "x=***"]
    assert redact_arguments(argv, {"GITHUB_PAT": "planted-0001"}) == shown


@pytest.mark.timeout(20)
def test_a_large_diff_takes_no_time() -> None:
    for piece in ("a-", "a.", "abcDEF123+", "key_token=", "eyJa.", "x://y:", "-----BEGIN PRIVATE KEY-----"):
        redact(piece * 100_000, {})
