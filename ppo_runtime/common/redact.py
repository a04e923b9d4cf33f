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
_SECRET_TEXT = re.compile(r"\b((hf|api_org|gh[oprsu]|github_pat|wandb_v\d)_|sk[_-]|glpat-|xox[a-z]-)[A-Za-z0-9_-]{16,}")
_AFTER_A_SCHEME = re.compile(r"\b((?:Bearer|Basic)\s+)[A-Za-z0-9._~+/=-]{16,}")
# Up to the word's last @, since a password that nobody has encoded may hold any character; a port is none.
_PASSWORD_IN_URL = re.compile(r"(://[^/\s:@?#\[]*:)(?!\d{1,5}(?:[/?#\s]|$))(?:(?!://)\S)+(?=@)")
# In the query of an address, in the settings of a database, in front of a command.
_ASSIGNED = re.compile(
    r"""(?<![\w.:/@%-])(?P<key>[A-Za-z_][\w.-]*)(?P<sign>=|\s+=\s+)(?!\(hidden\))
    (?P<value>'(?:\\.|[^'\\])+'|"(?:\\.|[^"\\])+"|[^\s&;'"=][^\s&;]*)""",
    re.VERBOSE,
)
_ENDS_A_SENTENCE = "'\")],."
# A token in front of an address; a name has no digits as a rule.
_TOKEN_IN_URL = re.compile(r"(://)(?=[^/\s:@?#\[]{0,200}\d)[^/\s:@?#\[]{8,}(?=@)")
# An option of a command with its value, and what is said of a name in a text.
_OPTION = re.compile(r"(?<![\w-])(?P<key>--?[A-Za-z][\w-]*)(?P<sign>\s+)(?!\(hidden\))(?P<value>[^\s-]\S*)")
_SAID_OF = re.compile(r"(?<![\w-])(?P<key>[A-Za-z][\w-]*)(?P<sign>:\s+)(?=\S{0,200}\d)(?P<value>[\w.~+/=-]{8,})")
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
        # As a command's words stand in a list: what follows "--token" is one.
        items = [
            HIDDEN if isinstance(item, str) and _is_option_of_a_secret(before) else without_secrets(item)
            for before, item in zip([None, *value], value, strict=False)
        ]
        return tuple(items) if type(value) is tuple else items
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


def _is_option_of_a_secret(word: Any) -> bool:
    return isinstance(word, str) and word.startswith("-") and word[-1] != "-" and _names_a_secret(word.lstrip("-"))


def _names_a_secret(key: Any) -> bool:
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", str(key)).replace("-", "_").lower()
    return _SECRET_KEY.search(words) is not None and _TOKEN_OF_A_TEXT.search(words) is None


def _without_secret_words(text: str) -> str:
    text = _AFTER_A_SCHEME.sub(rf"\1{HIDDEN}", _SECRET_TEXT.sub(HIDDEN, text))
    text = _TOKEN_IN_URL.sub(rf"\1{HIDDEN}", _PASSWORD_IN_URL.sub(rf"\1{HIDDEN}", text))
    for setting in (_ASSIGNED, _OPTION, _SAID_OF):
        text = setting.sub(_assigned, text)
    return text


def _assigned(found: re.Match[str]) -> str:
    """A setting within a text, its value hidden if it is called a secret and is neither a switch nor a count."""
    key, sign, given = found["key"], found["sign"], found["value"]
    value = given if given[0] in "'\"" else given[0] + given[1:].rstrip(_ENDS_A_SENTENCE)
    counts = "token" in key.lower() and _COUNT.fullmatch(value)
    secret = (_names_a_secret(key) or _SIGNATURE.search(key)) and not counts and not _SWITCH.fullmatch(value)
    return f"{key}{sign}{HIDDEN}{given[len(value) :]}" if secret else found[0]


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
