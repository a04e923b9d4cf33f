"""Settings as a record of them may be kept: without tokens, keys and passwords."""

import re
from collections.abc import Mapping
from os import PathLike, fspath
from typing import Any

import attrs

HIDDEN = "(hidden)"
SHORTEST = 4
"""Characters that a secret has at least for it to be looked for in a text."""
_SECRET_KEY = re.compile(
    r"(^|_)(tokens?|password|passwd|pwd|passphrase|secrets?|bearer|auth|authorization|credentials?"
    r"|(api|access|account|auth|private|secret|wandb)_?keys?(_value)?)$"
)
_TOKEN_OF_A_TEXT = re.compile(r"(^|_)(pad|eos|bos|unk|sep|cls|mask|special|new|stop)_tokens?$")
# As hubs, trackers and services make them, long enough that no word of a sentence looks like one.
_SECRET_TEXT = re.compile(r"\b((hf|api_org|gh[oprsu]|github_pat|wandb_v\d)_|sk[_-])[A-Za-z0-9_-]{16,}")
_AFTER_A_SCHEME = re.compile(r"\b((?:Bearer|Basic)\s+)[A-Za-z0-9._~+/=-]{16,}")
# Up to the word's last @, since a password that nobody has encoded may hold any character; a port is none.
_PASSWORD_IN_URL = re.compile(r"(://[^/\s:@?#\[]*:)(?!\d{1,5}(?:[/?#\s]|$))(?:(?!://)\S)+(?=@)")
# In the query of an address, in the settings of a database, in front of a command.
_ASSIGNED = re.compile(
    r"""(?<![\w.:/@%-])(?P<key>[A-Za-z_][\w.-]*)(?P<sign>=|\s+=\s+)(?!\(hidden\))
    (?P<value>'(?:\\.|[^'\\])+'|"(?:\\.|[^"\\])+"|[^\s&;'"=][^\s&;]*?(?=['")\],.]*(?:[\s&;]|$)))""",
    re.VERBOSE,
)
_SIGNATURE = re.compile(r"(^|[_-])(sig|signature)$", re.IGNORECASE)
_SWITCH = re.compile(r"None|null|True|true|False|false")
_COUNT = re.compile(r"[\d._]+")


def plain_settings(config: Any) -> dict[str, Any]:
    """A configuration's fields as a run's records keep them: plain values, and no secret among them."""
    return without_secrets({field.name: getattr(config, field.name) for field in attrs.fields(type(config))})


def without_secrets(value: Any) -> Any:
    """A tree of settings, every secret in it replaced by :data:`HIDDEN`, and objects by the name of their kind.

    A secret is a text that stands under a key such as "token", "api_key" or "password", however deep; and wherever it
    stands, one that looks like a hub's token, the password of an address, and what "password=" is said of. An object
    could print anything, so that nothing of it is kept.
    """
    if isinstance(value, Mapping):
        return {
            _plain(key): HIDDEN if _names_a_secret(key) and _texts(item) else without_secrets(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return (
            type(value)(map(without_secrets, value)) if type(value) in (list, tuple) else [*map(without_secrets, value)]
        )
    if isinstance(value, str):
        return _without_secret_words(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    return without_secrets(fspath(value)) if isinstance(value, PathLike) else f"<{type(value).__name__}>"


def hide(text: str, *settings: Mapping[str, Any]) -> str:
    """A text, such as an error's, without the secrets that some settings hold."""
    # The longest first, since one may be part of another; a very short one would be found in the sentence's own words.
    for secret in sorted(_secrets(settings), key=len, reverse=True):
        if len(secret) >= SHORTEST:
            text = text.replace(secret, HIDDEN)
    return _without_secret_words(text)


def _plain(key: Any) -> Any:
    """A key as JSON can hold it."""
    return key if key is None or isinstance(key, str | bool | int | float) else str(key)


def _names_a_secret(key: Any) -> bool:
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", str(key)).replace("-", "_").lower()
    return _SECRET_KEY.search(words) is not None and _TOKEN_OF_A_TEXT.search(words) is None


def _without_secret_words(text: str) -> str:
    text = _AFTER_A_SCHEME.sub(rf"\1{HIDDEN}", _SECRET_TEXT.sub(HIDDEN, text))
    return _ASSIGNED.sub(_assigned, _PASSWORD_IN_URL.sub(rf"\1{HIDDEN}", text))


def _assigned(found: re.Match[str]) -> str:
    """A setting within a text, its value hidden if it is called a secret and is neither a switch nor a count."""
    key, sign, value = found["key"], found["sign"], found["value"]
    counts = "token" in key.lower() and _COUNT.fullmatch(value)
    secret = _names_a_secret(key) or _SIGNATURE.search(key)
    return f"{key}{sign}{HIDDEN}" if secret and not counts and not _SWITCH.fullmatch(value) else found[0]


def _texts(value: Any) -> list[str]:
    """The texts in a value; counts and switches that are called "tokens" are no secrets."""
    if isinstance(value, bytes):  # as it reads, and as it is printed
        return [value.decode(errors="replace"), repr(value)[2:-1]] if value else []
    if isinstance(value, str):
        return [value] if value else []
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [text for item in items for text in _texts(item)]


def _secrets(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        own = [text for key, item in value.items() if _names_a_secret(key) for text in _texts(item)]
        return own + _secrets(list(value.values()))
    return [secret for item in value for secret in _secrets(item)] if isinstance(value, list | tuple) else []
