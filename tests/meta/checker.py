"""The run-time checker behind jaxtyping, under Python's own rule that an int will do where a float is asked for."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
