"""A program as stable text, and back: what a person reads, a golden file holds and a bug report shows.

    program

    param  "fc.weight": f32[4,3] sparse aliases ["out.weight"]
    state  "fc.weight.exp_avg": f32[4,3] of "fc.weight"
    hyper  "optimizer.0.momentum": host float
    guard  "momentum != 0" momentum = "optimizer.0.momentum"

    %v_fc_weight: f32[4,3] = read "fc.weight"
    %v_momentum: host float = read "optimizer.0.momentum"

    %t: f32[3,4] strides [1,3] = aten.t.default(%v_fc_weight)
    %pow_1: host float = operator.pow(%v_momentum, 2.0)

    write "fc.weight" = %sub

One line is one variable, guard, node or result, in the program's order; names are the graph's own. Strides
are shown where they are not those of a contiguous tensor, a device where it is not the CPU, `as` where a
placeholder's target is not its name. In a whole program, `at` says which role runs a line, where that is not
every trainer (`at owners "fc.weight"`, `at server 0`, `at everyone`), and `kept` which parts of a variable
servers keep. `own "fc.weight" [4,3] among 2` is each trainer's own part of a variable. Empty lines and lines that
begin with `#` mean nothing. Of a node's meta, "val", "variable" and "at" are kept.
"""

from syncwright.text.diff import diff
from syncwright.text.read import parse
from syncwright.text.words import TextError, dtype_text, op_name, quote, target_text
from syncwright.text.write import place_text, to_text, type_text, variable_type_text

__all__ = [
    "TextError",
    "diff",
    "dtype_text",
    "op_name",
    "parse",
    "place_text",
    "quote",
    "target_text",
    "to_text",
    "type_text",
    "variable_type_text",
]
