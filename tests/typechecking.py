"""The checker of signatures under pytest: beartype, with int accepted where float is asked.

SAELens builds our configs from JSON, dicts where objects are declared; `__post_init__` makes
objects of them, so their constructors are not checked.
"""

from beartype import BeartypeConf, beartype

_FROM_JSON = ("CrosscoderConfig.__init__", "CrosscoderTrainingConfig.__init__")
_check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def typechecker(function):
    return function if function.__qualname__ in _FROM_JSON else _check(function)
