"""Secrets stay in the environment: a setting that holds one is refused, since settings are written down and shown.

What is a secret is told by the name of its variable, or by what it looks like: a token of a known kind, a private key,
a URL with a password, the address of a webhook.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sharding.ranks.errors import UserError

_REDACTED = "***"
# The last word of a name tells: WANDB_API_KEY, HF_TOKEN_2, GITHUB_PAT, DB_PASS; not HISTKEY, TOKENIZERS_PARALLELISM.
_SECRET_WORD = re.compile(
    r"(?i)(?:.*(?:password|passwd|passphrase|secret|token)|(?:.*(?:api|access|auth|private|secret|signing))?key"
    r"|credentials?|pass|pwd|pat|dsn)$"
)
_FOLDERS = frozenset({"PWD", "OLDPWD"})
_WEBHOOK_NAME = re.compile(r"(?i)webhook")
# Of an argument: api_key= and HF_TOKEN= are secret, data.tokenizer= and shard_tokens= are not.
_SECRET_ARGUMENT = re.compile(
    r"(?is)((?:^|[^a-z])(?:api)?(?:key|token|secret|passwd|password|pass|pat|credentials|dsn)=).+"
)
_SECRET_OPTION = re.compile(r"(?i)^--?(?:[a-z0-9-]*[^a-z])?(?:api)?(?:key|token|secret|passwd|password)$")
# Shorter ones are found in ordinary words.
_MIN_LENGTH = 8
# A single word of this many letters is more likely one that people use than a secret; it would be found everywhere.
_MIN_LENGTH_OF_WORD = 16

_SHAPES: dict[str, str] = {
    "a token of GitHub": r"gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{22,}",
    "a token of GitLab": r"glpat-[A-Za-z0-9_-]{20,}",
    "a token of Hugging Face": r"hf_[A-Za-z0-9]{30,}",
    "a key of wandb": r"wandb_v\d+_[A-Za-z0-9_]{30,}",
    "a key of an AI service": r"sk-(?:ant|proj|svcacct|or)-[A-Za-z0-9_-]{20,}|sk-[A-Za-z0-9]{40,}",
    "a key of AWS": r"(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Z0-9])",
    "a key of Google": r"AIza[A-Za-z0-9_-]{35}|ya29\.[A-Za-z0-9_-]{30,}",
    "a token of Slack": r"xox[abeoprs]-[0-9A-Za-z-]{20,}|xapp-[0-9A-Za-z-]{20,}",
    "a key of Stripe": r"[rs]k_live_[A-Za-z0-9]{20,}",
    "a token of npm or PyPI": r"npm_[A-Za-z0-9]{36}|pypi-[A-Za-z0-9_-]{60,}",
    "a signed token": r"eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----(?:[A-Za-z0-9+/=\\\s]|-(?!----))*"
    r"(?:-----END [A-Z ]*PRIVATE KEY-----)?",
    "the address of a webhook": r"https://hooks\.slack\.com/(?:services|workflows|triggers)/[^\s\"'\\]+"
    r"|https://(?:[a-z]+\.)?discord(?:app)?\.com/api/webhooks/\d+/[\w-]+"
    r"|https://[\w.-]+\.webhook\.office\.com/[^\s\"'\\]+",
}
_TOKEN = re.compile(
    r"(?<![A-Za-z0-9_])(?:" + "|".join(f"(?P<s{index}>{shape})" for index, shape in enumerate(_SHAPES.values())) + ")"
)
# What stands between names in braces, brackets or after a dollar is filled in later, as in code that builds a URL.
_PASSWORD_IN_URL = re.compile(
    r"(?i)(?P<before>\b[a-z][a-z0-9+.-]{0,30}://[^/?#\s:@\"']*:)(?P<secret>(?![${<*])[^/?#@\s\"']+)(?=@)"
)
_SIGNED_URL = re.compile(
    r"(?i)(?P<before>[?&](?:x-amz-signature|x-amz-security-token|x-goog-signature|sig|access_token|token|api_?key|"
    r"password)=)(?P<secret>[^&#\s\"'${<*]{12,})"
)
# A text that is given to a name in code or a file: 16 characters or more, letters and digits mixed, no dots as in the
# name of a layer.
_ASSIGNED = re.compile(
    r"(?i)(?P<before>(?:(?:api|access|auth|private|secret|wandb)[_-]?key|token|secret|passwd|password|_pass|_pat)"
    r"[\"']?\s*[:=]\s*[\"'])(?P<secret>(?=[^\"']*[0-9])(?=[^\"']*[a-z])[a-z0-9+/_=~-]{16,})(?=[\"'])"
)


def refuse_secrets(settings: Mapping[str, Any], environment: Mapping[str, str]) -> None:
    """Assert that no setting holds a secret.

    Raises:
        UserError: one does; the secret is not repeated.
    """
    secrets = _secrets(environment)
    for key, text in _texts(settings, ""):
        for name, value in secrets.items():
            if value in text:
                raise UserError(
                    f"{key} holds the value of {name}, and settings are written to the run's folder and shown; remove "
                    f"it there: what needs {name} reads it from the environment."
                )
        if _PASSWORD_IN_URL.search(text) or _SIGNED_URL.search(text):
            raise UserError(
                f"{key} is a URL with a password, and settings are written to the run's folder and shown; take the "
                "password out, and give it by the environment or a credentials file."
            )
        if (kind := _kind_of_token(text)) is not None:
            raise UserError(
                f"{key} holds what looks like {kind}, and settings are written to the run's folder and shown; take it "
                "out, and give it by the environment or a credentials file."
            )


def redact(text: str, environment: Mapping[str, str]) -> str:
    """A text without secrets: those of the environment, and what looks like one."""
    for value in sorted(_secrets(environment).values(), key=len, reverse=True):
        text = text.replace(value, _REDACTED)
    text = _TOKEN.sub(_REDACTED, text)
    for pattern in (_PASSWORD_IN_URL, _SIGNED_URL, _ASSIGNED):
        text = pattern.sub(rf"\g<before>{_REDACTED}", text)
    return text


def redact_values(value: Any, environment: Mapping[str, str]) -> Any:
    """Nested plain values without secrets; written as JSON they could hide behind its escapes."""
    if isinstance(value, str):
        return redact(value, environment)
    if isinstance(value, Mapping):
        return {name: redact_values(inner, environment) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redact_values(inner, environment) for inner in value]
    return value


def redact_arguments(argv: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """A command line without secrets, also those that only the name of their option or setting tells."""
    shown = []
    for before, argument in zip(["", *argv], argv, strict=False):
        if _SECRET_OPTION.match(before) and not argument.startswith("-"):
            shown.append(_REDACTED)
        else:
            shown.append(redact(_SECRET_ARGUMENT.sub(rf"\1{_REDACTED}", argument), environment))
    return shown


def _secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that hold a secret: WANDB_API_KEY, GITHUB_PAT, DATABASE_URL with its password ..."""
    found = {}
    for name, value in environment.items():
        in_url = _PASSWORD_IN_URL.search(value)
        secret = value if in_url is None else in_url["secret"]
        is_named = in_url is not None or _is_secret_name(name) or ("://" in value and _WEBHOOK_NAME.search(name))
        if (is_named and _is_telling(secret)) or _kind_of_token(value) is not None:
            found[name] = secret
    return found


def _is_secret_name(name: str) -> bool:
    words = [word for word in re.split(r"[^A-Za-z0-9]+", name) if word and not word.isdigit()]
    return bool(words) and name not in _FOLDERS and _SECRET_WORD.match(words[-1]) is not None


def _is_telling(value: str) -> bool:
    """Whether what is found to be equal to a value is that secret, and no word or file that everybody may read of."""
    if len(value) < _MIN_LENGTH or (value.isalpha() and len(value) < _MIN_LENGTH_OF_WORD):
        return False
    # A key or credentials file is named, and the name is no secret.
    return not (value.startswith("/") and Path(value).exists())


def _kind_of_token(text: str) -> str | None:
    match = _TOKEN.search(text)
    if match is None or match.lastgroup is None:
        return None
    return list(_SHAPES)[int(match.lastgroup[1:])]


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Every text in nested settings with its key."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            # A name can be a text of the user's too.
            yield key or "the top level", str(name)
            yield from _texts(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner, key)
