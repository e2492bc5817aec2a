"""Bypasses: what the tokens get that a layer skips.

Two kinds. With those of :data:`WHOLE` every token comes out of every layer, in order: a bypass is a function
``(run, tokens, normed, choice) → tokens``. ``normed`` are the tokens behind the norm in front of the attention;
``run(tokens, sizes=None, normed=None)`` is the layer's own forward, with ``normed`` in place of what that norm gives.

With those of :data:`LASTING` the layers behind have fewer tokens: a bypass is a function ``(tokens, choice, groups,
weights) → tokens, groups`` that acts between attention and MLP.
"""

from tosa_convert.bypasses.borrow import borrow
from tosa_convert.bypasses.drop import drop
from tosa_convert.bypasses.fuse import fuse
from tosa_convert.bypasses.identity import identity
from tosa_convert.bypasses.merge import merge
from tosa_convert.bypasses.persist import persist

WHOLE = {"identity": identity, "borrow": borrow, "merge": merge}
LASTING = {"drop": drop, "fuse": fuse, "persist": persist}
PARTNERED = ("borrow", "merge", "persist")
"""Those that need a partner for each skipped token."""
